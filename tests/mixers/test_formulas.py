"""GLA, BaseConv and attention against their formulas written out, and the names and sizes of public checkpoints."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close

from lrm_recall.context import Context
from lrm_recall.mixers.attention import Attention
from lrm_recall.mixers.baseconv import BaseConv
from lrm_recall.mixers.gla import GLA


def test_gla_is_its_formula():
    torch.manual_seed(0)
    mixer, x = GLA(16, num_heads=2, norm_eps=1e-3).double(), torch.randn(1, 9, 16).double()
    torch.nn.init.normal_(mixer.g_norm_swish_gate.weight)
    weights = {name.removesuffix(".weight"): p for name, p in mixer.named_parameters()}
    gate = x @ weights["gk_proj.0"].T @ weights["gk_proj.1"].T + weights["gk_proj.1.bias"]
    q, k, v = x @ weights["q_proj"].T, x @ weights["k_proj"].T, x @ weights["v_proj"].T
    alpha = torch.sigmoid(gate) ** (1 / 16)
    heads = []
    for h in range(2):
        key, value = slice(4 * h, 4 * h + 4), slice(8 * h, 8 * h + 8)
        state, outputs = torch.zeros(4, 8).double(), []
        for t in range(9):
            state = alpha[0, t, key, None] * state + torch.outer(k[0, t, key], v[0, t, value])
            outputs.append(q[0, t, key] @ state / math.sqrt(4))
        o = torch.stack(outputs)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weights["g_norm_swish_gate"]
        heads.append(o * F.silu(x[0] @ weights["g_proj"][value].T))
    assert_close(mixer(x)[0], torch.cat(heads, -1) @ weights["o_proj"].T, 1e-10)


def test_gla_has_the_parameters_of_the_public_1_3b_checkpoint():
    with torch.device("meta"):
        mixer = GLA(2048)
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert shapes == {
        "q_proj.weight": (1024, 2048),
        "k_proj.weight": (1024, 2048),
        "v_proj.weight": (2048, 2048),
        "g_proj.weight": (2048, 2048),
        "gk_proj.0.weight": (16, 2048),
        "gk_proj.1.weight": (1024, 16),
        "gk_proj.1.bias": (1024,),
        "g_norm_swish_gate.weight": (512,),
        "o_proj.weight": (2048, 2048),
    }
    assert round(24 * mixer.state_size() / 1e6, 2) == 12.58  # StateX, table 2


@pytest.mark.parametrize("T", [5, 200])
@pytest.mark.parametrize("kernel_size", [1, 3, -1])
def test_baseconv_is_its_formula(kernel_size, T):
    torch.manual_seed(0)
    mixer, x = BaseConv(4, kernel_size=kernel_size, max_length=256), torch.randn(2, T, 4)
    if kernel_size == -1:
        lag = torch.arange(T)
        angle = 2 * math.pi * lag / 256
        z = torch.stack((lag / 255, torch.cos(1e-4 * angle), -torch.sin(1e-4 * angle)), -1)
        taps, conv = mixer.conv.mlp(z), x
    else:
        taps = F.pad(mixer.conv.conv.weight[:, 0].flip(-1).T, (0, 0, 0, T))
        conv = mixer.conv.conv.bias
    conv = conv + torch.stack([(taps[: t + 1].flip(0) * x[:, : t + 1]).sum(1) for t in range(T)], 1)
    assert_close(mixer(x), conv * mixer.projection(x) + x)


def test_baseconv_has_zoologys_names():
    short, long = BaseConv(4), BaseConv(4, kernel_size=-1, max_length=8)
    assert {name: tuple(p.shape) for name, p in short.state_dict().items()} == {
        "projection.weight": (4, 4), "projection.bias": (4,), "conv.conv.weight": (4, 1, 3), "conv.conv.bias": (4,)
    }  # fmt: skip
    assert {name: tuple(p.shape) for name, p in long.state_dict().items()} == {
        "projection.weight": (4, 4), "projection.bias": (4,), "conv.pos_emb.z": (1, 8, 3),
        "conv.mlp.0.weight": (16, 3), "conv.mlp.0.bias": (16,), "conv.mlp.2.weight": (4, 16), "conv.mlp.2.bias": (4,),
    }  # fmt: skip
    assert "conv.pos_emb.z" not in dict(long.named_parameters())  # constant


def test_a_long_convolution_refuses_a_longer_sequence():
    mixer = BaseConv(4, kernel_size=-1, max_length=8)
    mixer(torch.randn(1, 8, 4))
    with pytest.raises(ValueError, match="a sequence of 9 tokens .* max_length is 8"):
        mixer(torch.randn(1, 9, 4))


@pytest.mark.parametrize("rotary", [True, False])
def test_attention_is_its_formula(rotary):
    torch.manual_seed(0)
    mixer, x = Attention(16, num_heads=2, rotary=rotary, rope_theta=100.0), torch.randn(1, 9, 16)
    q, k, v = (f(x)[0].view(9, 2, 8) for f in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if rotary:  # channels i and i + 4 are the parts of a complex number that turns by position * 100^(-i/4)
        turn = torch.polar(torch.ones(9, 4), torch.outer(torch.arange(9.0), 100.0 ** -(torch.arange(4) / 4)))
        q, k = (torch.complex(u[..., :4], u[..., 4:]) * turn.unsqueeze(1) for u in (q, k))
        q, k = (torch.cat((u.real, u.imag), -1) for u in (q, k))
    rows = []
    for t in range(9):
        scores = (q[t] * k[: t + 1]).sum(-1) / math.sqrt(8)  # [t + 1, H]
        rows.append((scores.softmax(0).unsqueeze(-1) * v[: t + 1]).sum(0).flatten())
    assert_close(mixer(x)[0], mixer.o_proj(torch.stack(rows)))


def test_attention_counts_positions_from_the_first_real_token():
    mixer, x, cache = Attention(16, num_heads=2), torch.randn(1, 12, 16), {}
    offset = torch.tensor([5])
    mixer(x, Context(mask=torch.arange(12).unsqueeze(0) >= 5, offset=offset, cache=cache))
    alone = {}
    mixer(x[:, 5:], Context(cache=alone))
    assert_close(cache["keys"][:, :, 5:], alone["keys"])


@pytest.mark.parametrize("make", [GLA, BaseConv, lambda D: BaseConv(D, kernel_size=-1, max_length=8)])
def test_init_weights_fills_what_came_without_values(make):
    """As transformers does after building a model on the meta device."""
    with torch.device("meta"):
        mixer = make(8)
    mixer.to_empty(device="cpu")
    for tensor in mixer.state_dict().values():
        tensor.fill_(float("nan"))
    mixer.init_weights(0.02)
    linear = {id(p) for m in mixer.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()}
    for name, tensor in [*mixer.named_parameters(), *mixer.named_buffers()]:
        assert id(tensor) in linear or tensor.isfinite().all(), name
    fresh = make(8)
    for name, buffer in mixer.named_buffers():
        assert torch.equal(buffer, fresh.get_buffer(name))
