"""RetNet against its formula written out, and the names and sizes of the public checkpoint."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close

from lrm_recall.context import Context
from lrm_recall.mixers.retnet import RetNet


def rotated(x):
    """x [T, K]: channels i and i + K/2 are the parts of a complex number that turns by position * 10000^(-2i/K)."""
    T, K = x.shape
    angle = torch.outer(torch.arange(T).double(), 10000.0 ** -(torch.arange(0, K, 2).double() / K))
    turned = torch.complex(x[:, : K // 2], x[:, K // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def convolved(x, weight):
    """silu of the causal convolution of x [T, D] with weight [D, 1, W]."""
    W = weight.shape[-1]
    padded = F.pad(x, (0, 0, W - 1, 0))
    return F.silu(sum(padded[w : w + len(x)] * weight[:, 0, w] for w in range(W)))


OPTIONS = {
    "default": {"num_heads": 2},
    "shared keys": {"num_heads": 4, "num_kv_heads": 2, "expand_v": 1.0},
    "convolutions": {"num_heads": 2, "use_short_conv": True, "conv_size": 3},
    "no gate": {"num_heads": 2, "use_output_gate": False, "expand_k": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_retnet_is_its_formula(options):
    torch.manual_seed(0)
    mixer, x = RetNet(16, norm_eps=1e-3, **options).double(), torch.randn(1, 9, 16).double()
    norm = mixer.g_norm_swish_gate if mixer.use_output_gate else mixer.g_norm
    torch.nn.init.normal_(norm.weight)
    q, k, v = (x[0] @ getattr(mixer, f"{name}_proj").weight.T for name in "qkv")
    if mixer.use_short_conv:
        q, k, v = (
            convolved(y, getattr(mixer, f"{name}_conv1d").weight) for y, name in zip((q, k, v), "qkv", strict=True)
        )
    K, V = mixer.head_k_dim, mixer.head_v_dim
    lag = torch.arange(9).unsqueeze(-1) - torch.arange(9)
    heads = []
    for h in range(mixer.num_heads):
        shared = h * mixer.num_kv_heads // mixer.num_heads
        query, key = rotated(q[:, h * K : (h + 1) * K]), rotated(k[:, shared * K : (shared + 1) * K])
        decay = torch.where(lag >= 0, (1 - 2.0 ** (-5 - h)) ** lag.clamp(min=0).double(), 0)
        o = query @ key.T / math.sqrt(K) * decay @ v[:, shared * V : (shared + 1) * V]
        o = o / (o.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
        if mixer.use_output_gate:
            o = o * F.silu(x[0] @ mixer.g_proj.weight[h * V : (h + 1) * V].T)
        heads.append(o)
    assert_close(mixer(x)[0], torch.cat(heads, -1) @ mixer.o_proj.weight.T, 1e-6)  # the rotation is in fp32


def test_retnet_has_the_parameters_of_the_public_1_3b_checkpoint():
    with torch.device("meta"):
        mixer = RetNet(2048)
    assert {name: tuple(p.shape) for name, p in mixer.state_dict().items()} == {
        "q_proj.weight": (2048, 2048),
        "k_proj.weight": (2048, 2048),
        "v_proj.weight": (4096, 2048),
        "g_proj.weight": (4096, 2048),
        "g_norm_swish_gate.weight": (512,),
        "o_proj.weight": (2048, 4096),
    }
    assert mixer.state_size() == 8 * 256 * 512


def test_retnet_has_flas_names_for_its_options():
    mixer = RetNet(16, num_heads=4, num_kv_heads=2, use_short_conv=True, use_output_gate=False)
    assert {name: tuple(p.shape) for name, p in mixer.state_dict().items()} == {
        "q_proj.weight": (16, 16), "k_proj.weight": (8, 16), "v_proj.weight": (16, 16),
        "q_conv1d.weight": (16, 1, 4), "k_conv1d.weight": (8, 1, 4), "v_conv1d.weight": (16, 1, 4),
        "g_norm.weight": (8,), "o_proj.weight": (16, 32),
    }  # fmt: skip


def test_positions_count_from_the_first_real_token():
    """Only differences of positions show in an output, but the cached state holds turned keys."""
    mixer, x, cache, alone = RetNet(16, num_heads=2), torch.randn(1, 12, 16), {}, {}
    mask = torch.arange(12).unsqueeze(0) >= 5
    mixer(x, Context(mask=mask, offset=torch.tensor([5]), cache=cache))
    mixer(x[:, 5:], Context(cache=alone))
    assert_close(cache["state"], alone["state"])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_init_weights_fills_what_came_without_values(options):
    with torch.device("meta"):
        mixer = RetNet(16, **options)
    mixer.to_empty(device="cpu")
    for tensor in mixer.state_dict().values():
        tensor.fill_(float("nan"))
    mixer.init_weights(0.02)
    for name, tensor in mixer.state_dict().items():
        assert "proj" in name or tensor.isfinite().all(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3, hidden_size=16, expand_k giving 16"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 8, "expand_v": 0.25}, "expand_v giving 4"),
        ({"num_heads": 16}, "even number of key channels per head: got num_heads=16"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads must divide the 4 heads, got 3"),
        ({"num_heads": 4, "num_kv_heads": 0}, "num_kv_heads must divide the 4 heads, got 0"),
        ({"num_heads": 4, "conv_size": 0}, "conv_size must be at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RetNet(16, **options)
