"""Hymba against its formula written out, and beside Resona."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close

from lrm_recall.config import RecurrentLMConfig
from lrm_recall.mixers.hymba import Hymba
from lrm_recall.model import RecurrentLM

D = 16
SMALL = {"num_attention_heads": 4, "num_key_value_heads": 2, "time_step_rank": 5, "ssm_state_size": 3}


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attention_branch(q, k, v, before):
    """q [T, E], k and v [T, E / 2], 4 heads of 8 channels on 2 of keys; a query reads `before` tokens before itself."""
    T = q.shape[0]
    q, k, v = (u.unflatten(-1, (-1, 8)) for u in (q, k, v))
    turn = torch.polar(torch.ones(T, 4), torch.outer(torch.arange(float(T)), 100.0 ** -(torch.arange(4) / 4)))
    q, k = (torch.complex(u[..., :4], u[..., 4:]) * turn.unsqueeze(1) for u in (q, k))
    q, k = (torch.cat((u.real, u.imag), -1) for u in (q, k))
    rows = []
    for t in range(T):
        seen = slice(max(0, t - before), t + 1)
        weights = [(k[seen, h // 2] @ q[t, h] / math.sqrt(8)).softmax(0) for h in range(4)]
        rows.append(torch.cat([weights[h] @ v[seen, h // 2] for h in range(4)]))
    return torch.stack(rows)


def mamba_branch(p, u, gate):
    """u and gate [T, E]; p, the branch's parameters by name."""
    T, E = u.shape
    u = torch.stack([(p["conv1d.weight"][:, 0] * F.pad(u, (0, 0, 2, 0))[t : t + 3].T).sum(-1) for t in range(T)])
    u = F.silu(u + p["conv1d.bias"])
    dt, B, C = (u @ p["x_proj.weight"].T).split((5, 3, 3), -1)
    dt, B, C = (rms_norm(y, p[f"{name}_layernorm.weight"]) for y, name in ((dt, "dt"), (B, "B"), (C, "C")))
    dt = F.softplus(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    state, rows = torch.zeros(E, 3), []
    for t in range(T):
        state = (-dt[t, :, None] * p["A_log"].exp()).exp() * state + torch.outer(dt[t] * u[t], B[t])
        rows.append(state @ C[t] + p["D"] * u[t])
    return torch.stack(rows) * F.silu(gate)


@pytest.mark.parametrize("attention", [True, False])
def test_it_is_its_formula(attention):
    torch.manual_seed(0)
    mixer = Hymba(D, attention=attention, attention_window_size=3, rope_base=100.0, **SMALL)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, p = torch.randn(1, 9, D), dict(mixer.named_parameters())
    sizes = (32, 16, 16, 32, 32) if attention else (32, 32)
    *qkv, u, gate = (x[0] @ p["in_proj.weight"].T + p["in_proj.bias"]).split(sizes, -1)
    y = rms_norm(mamba_branch(dict(mixer.mamba.named_parameters()), u, gate), p["pre_avg_layernorm2.weight"])
    if attention:
        y = (rms_norm(attention_branch(*qkv, before=3), p["pre_avg_layernorm1.weight"]) + y) / 2
    assert_close(mixer(x)[0], y @ p["out_proj.weight"].T + p["out_proj.bias"])


def test_it_has_the_parameters_of_the_barebones_block():
    """Those of its lists of one without their index."""
    with torch.device("meta"):
        mixer = Hymba(768, num_attention_heads=12)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "in_proj.weight": (3 * 1536 + 2 * 4 * 128, 768),
        "in_proj.bias": (3 * 1536 + 2 * 4 * 128,),
        "pre_avg_layernorm1.weight": (1536,),
        "pre_avg_layernorm2.weight": (1536,),
        "mamba.conv1d.weight": (1536, 1, 3),
        "mamba.conv1d.bias": (1536,),
        "mamba.x_proj.weight": (8 + 2 * 16, 1536),
        "mamba.dt_proj.weight": (1536, 8),
        "mamba.dt_proj.bias": (1536,),
        "mamba.A_log": (1536, 16),
        "mamba.D": (1536,),
        "mamba.dt_layernorm.weight": (8,),
        "mamba.B_layernorm.weight": (16,),
        "mamba.C_layernorm.weight": (16,),
        "out_proj.weight": (768, 1536),
        "out_proj.bias": (768,),
    }


def test_the_state():
    assert Hymba(D, attention=False, **SMALL).state_size() == 32 * 3
    assert Hymba(D, attention_window_size=7, **SMALL).state_size() == 32 * 3 + 2 * 16 * 7
    everything = Hymba(D, attention_window_size=None, **SMALL)
    assert everything.state_size(50) == 32 * 3 + 2 * 16 * 50
    with pytest.raises(ValueError, match="sequence_length is needed"):
        everything.state_size()


@pytest.mark.parametrize("overrides", [{}, {"0": {"attention": False}}])
def test_resona_beside_the_branches_and_in_the_place_of_attention(overrides):
    """A global and a windowed layer, retrieval in the first: decoding with the cache is the forward pass."""
    torch.manual_seed(0)
    model = RecurrentLM(RecurrentLMConfig(
        vocab_size=50, hidden_size=D, num_hidden_layers=2, initializer_range=0.3, mixer="hymba",
        mixer_args={**SMALL, "attention_window_size": 5},
        layer_overrides={**overrides, "1": {"attention_window_size": None}},
        resona={"layers": [0], "chunk_size": 4},
    )).eval()  # fmt: skip
    ids, cache, parts = torch.randint(0, 50, (2, 24)), None, []
    with torch.no_grad():
        for piece in ids.split([13, *[1] * 11], dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        assert_close(torch.cat(parts, 1), model(ids).logits)


def test_init_weights_leaves_nothing_but_plain_projections_and_norms():
    with torch.device("meta"):
        mixer = Hymba(D, **SMALL)
    mixer.to_empty(device="cpu")
    for parameter in mixer.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    mixer.init_weights(0.02)
    left = [name for name, parameter in mixer.named_parameters() if parameter.isnan().any()]
    assert left and all("in_proj" in name or "norm" in name or "x_proj" in name or "out_proj" in name for name in left)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mamba_expand": 0}, "mamba_expand must be at least 1, got 0"),
        ({"num_attention_heads": 5}, "got 5 heads, mamba_expand=2, hidden_size=16"),
        ({"num_attention_heads": 32}, "even number of channels per head, got 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide the 8 heads, got 3"),
        ({"attention_window_size": -1}, "attention_window_size must be at least 0, got -1"),
        ({"rope_base": 0.0}, "rope_base must be positive, got 0.0"),
        ({"ssm_state_size": 0}, "ssm_state_size must be at least 1, got 0"),
        ({"time_step_rank": 0}, "time_step_rank must be at least 1, got 0"),
        ({"conv_kernel_size": 0}, "conv_kernel_size must be at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Hymba(D, **options)
