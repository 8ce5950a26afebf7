"""RWKV4 and RWKV5 against their formulas, RWKV4 against that of transformers, and the names of zoology and mad-lab."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from transformers import RwkvConfig
from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

from lrm_recall.context import Context
from lrm_recall.mixers.rwkv4 import RWKV4
from lrm_recall.mixers.rwkv5 import RWKV5


def with_random_parameters(mixer):
    torch.manual_seed(0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer.double()


def mixed(mixer, x, name):
    """The input of projection `name`: a token and the one before, per channel."""
    mix = getattr(mixer, f"time_mix_{name}")[0, 0]
    return mix * x + (1 - mix) * torch.cat((torch.zeros_like(x[:1]), x[:-1]))


def test_rwkv4_is_its_formula():
    mixer, x = with_random_parameters(RWKV4(6)), torch.randn(1, 9, 6).double()
    k = mixed(mixer, x[0], "k") @ mixer.key.weight.T
    v = mixed(mixer, x[0], "v") @ mixer.value.weight.T
    r = mixed(mixer, x[0], "r") @ mixer.receptance.weight.T
    rows = []
    for t in range(9):
        weight = (k[: t + 1] - torch.arange(t - 1, -2, -1).unsqueeze(-1) * mixer.time_decay.exp()).exp()
        weight[t] = (mixer.time_first + k[t]).exp()
        rows.append((weight * v[: t + 1]).sum(0) / weight.sum(0))
    assert_close(mixer(x)[0], (torch.sigmoid(r) * torch.stack(rows)) @ mixer.output.weight.T, 1e-10)


@pytest.mark.parametrize("T", [1, 7, 70])
def test_rwkv4_is_that_of_transformers(T):
    torch.manual_seed(0)
    theirs, ours = RwkvSelfAttention(RwkvConfig(hidden_size=16)), RWKV4(16)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    short = {"time_mix_key": "time_mix_k", "time_mix_value": "time_mix_v", "time_mix_receptance": "time_mix_r"}
    ours.load_state_dict({short.get(name, name): tensor for name, tensor in theirs.state_dict().items()})
    x, weight = torch.randn(2, T, 16), torch.randn(2, T, 16)
    expected, _ = theirs(x)
    assert_close(ours(x), expected)
    expected_gradients = torch.autograd.grad(expected, list(theirs.parameters()), weight, allow_unused=True)
    names = [short.get(name, name) for name, _ in theirs.named_parameters()]
    gradients = torch.autograd.grad(ours(x), [ours.get_parameter(name) for name in names], weight)
    for name, gradient, exact in zip(names, gradients, expected_gradients, strict=True):
        least = 1.0 if T == 1 else 0.0  # an average over one token does not depend on its weight
        assert_close(gradient, torch.zeros_like(gradient) if exact is None else exact, 1e-5, name, least)


def test_rwkv5_is_its_formula():
    mixer = with_random_parameters(RWKV5(6, head_dim=4, dim_att=8, head_dim_divisor=2))
    x = torch.randn(1, 9, 6).double()
    r = mixed(mixer, x[0], "r") @ mixer.receptance.weight.T
    k = mixed(mixer, x[0], "k") @ mixer.key.weight.T
    v = mixed(mixer, x[0], "v") @ mixer.value.weight.T
    g = mixed(mixer, x[0], "g") @ mixer.gate.weight.T
    heads = []
    for h in range(2):
        own = slice(4 * h, 4 * h + 4)
        decay, bonus = torch.exp(-mixer.time_decay[h].exp()), mixer.time_faaaa[h]
        state, rows = torch.zeros(4, 4).double(), []
        for t in range(9):
            write = torch.outer(k[t, own], v[t, own])
            rows.append(r[t, own] @ (state + bonus.unsqueeze(-1) * write))
            state = decay.unsqueeze(-1) * state + write
        o = torch.stack(rows) / 2
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        heads.append(o * mixer.ln_x.weight[own] + mixer.ln_x.bias[own])
    assert_close(mixer(x)[0], (torch.cat(heads, -1) * F.silu(g)) @ mixer.output.weight.T, 1e-6)  # the op's fp32 decay


def test_rwkv4_has_zoologys_names():
    assert {name: tuple(p.shape) for name, p in RWKV4(8).state_dict().items()} == {
        "time_decay": (8,), "time_first": (8,),
        "time_mix_k": (1, 1, 8), "time_mix_v": (1, 1, 8), "time_mix_r": (1, 1, 8),
        "key.weight": (8, 8), "value.weight": (8, 8), "receptance.weight": (8, 8), "output.weight": (8, 8),
    }  # fmt: skip


def test_rwkv5_has_the_names_of_mad_lab_and_zoology():
    assert {name: tuple(p.shape) for name, p in RWKV5(8, head_dim=4, dim_att=12).state_dict().items()} == {
        "time_decay": (3, 4), "time_faaaa": (3, 4),
        "time_mix_k": (1, 1, 8), "time_mix_v": (1, 1, 8), "time_mix_r": (1, 1, 8), "time_mix_g": (1, 1, 8),
        "key.weight": (12, 8), "value.weight": (12, 8), "receptance.weight": (12, 8), "gate.weight": (12, 8),
        "output.weight": (8, 12), "ln_x.weight": (12,), "ln_x.bias": (12,),
    }  # fmt: skip


def test_initial_values_of_rwkv4():
    """Channel by channel, as zoology computes them."""
    mixer = RWKV4(7, n_layer=4, layer_idx=1)
    for i in range(7):
        values = {
            "time_decay": -5 + 8 * (i / 6) ** (0.7 + 1.3 / 3),
            "time_first": math.log(0.3) + 0.5 * ((i + 1) % 3 - 1),
            "time_mix_k": (i / 7) ** 0.75,
            "time_mix_v": (i / 7) ** 0.75 + 0.3 / 3,
            "time_mix_r": (i / 7) ** 0.375,
        }
        for name, value in values.items():
            assert mixer.get_parameter(name).flatten()[i].item() == pytest.approx(value, abs=1e-6), name


def test_initial_values_of_rwkv5():
    """Channel by channel, as mad-lab computes them."""
    mixer = RWKV5(6, head_dim=4, dim_att=8, n_layer=4, layer_id=1)
    for i in range(8):
        values = {
            "time_decay": -6 + 5 * (i / 7) ** (0.7 + 1.3 / 3),
            "time_faaaa": (1 - i / 7) / 3 + 0.1 * ((i + 1) % 3 - 1),
        }
        for name, value in values.items():
            assert mixer.get_parameter(name).flatten()[i].item() == pytest.approx(value, abs=1e-6), name
    for name, power in (("k", 0.75), ("r", 0.375), ("g", 0.375)):
        assert_close(mixer.get_parameter(f"time_mix_{name}")[0, 0], (torch.arange(6) / 6) ** power)


@pytest.mark.parametrize("make", [RWKV4, lambda D: RWKV5(D, head_dim=4)])
def test_init_weights_fills_what_came_without_values(make):
    with torch.device("meta"):
        mixer = make(8)
    mixer.to_empty(device="cpu")
    for tensor in mixer.state_dict().values():
        tensor.fill_(float("nan"))
    mixer.init_weights(0.02)
    fresh = make(8).state_dict()
    for name, tensor in mixer.state_dict().items():
        linear = name.split(".")[0] in ("key", "value", "receptance", "gate", "output")
        assert linear or torch.equal(tensor, fresh[name]), name


@pytest.mark.parametrize("make", [RWKV4, lambda D: RWKV5(D, head_dim=4)])
def test_nothing_but_padding_leaves_an_empty_cache_behind(make):
    """A prompt may be fed in pieces of which a row's first is all padding."""
    mixer, x, cache = make(8), torch.randn(2, 6, 8), {}
    mixer(x, Context(mask=torch.zeros(2, 6, dtype=torch.bool), offset=torch.tensor([6, 6]), cache=cache))
    new = torch.randn(2, 5, 8)
    continued = mixer(new, Context(offset=torch.tensor([6, 6]), past_length=6, cache=cache))
    assert torch.equal(continued, mixer(new, Context(cache={})))


@pytest.mark.parametrize(
    ("mixer", "options", "message"),
    [
        (RWKV4, {"layer_idx": 12}, "got layer_idx=12, n_layer=12"),
        (RWKV4, {"layer_idx": -1}, "layer_idx must be from 0 to n_layer - 1, got layer_idx=-1"),
        (RWKV4, {"n_layer": 0}, "n_layer=0"),
        (RWKV5, {"head_dim": 3}, "head_dim must divide dim_att: got head_dim=3, dim_att=8"),
        (RWKV5, {"head_dim": 16}, "head_dim=16, dim_att=8"),
        (RWKV5, {"head_dim": 0}, "head_dim=0"),
        (RWKV5, {"head_dim": 4, "dim_att": 0}, "dim_att=0"),
        (RWKV5, {"head_dim": 4, "head_dim_divisor": 0}, "head_dim_divisor must be at least 1, got 0"),
        (RWKV5, {"head_dim": 4, "layer_id": 1}, "got layer_id=1, n_layer=1"),
    ],
)
def test_bad_options(mixer, options, message):
    with pytest.raises(ValueError, match=message):
        mixer(8, **options)
