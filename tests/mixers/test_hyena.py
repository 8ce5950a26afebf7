"""Hyena against its formula in fp64 with a convolution by definition, in zoology's form and in mad-lab's."""

import math

import pytest
import torch
from closeness import assert_close

from lrm_recall.context import Context
from lrm_recall.mixers.hyena import Hyena


def filter_by_definition(p, l_max, T):
    """The long filter [T, E] of zoology and mad-lab without the bias; `p` are Hyena's parameters."""
    p = {name.removeprefix("filter_fn."): x for name, x in p.items()}
    lag = torch.arange(T).double()
    angle = 1e-4 * 2 * math.pi * lag / l_max
    time = lag / (l_max - 1)
    h = torch.stack((time, angle.cos(), -angle.sin()), -1)
    for layer in (0, 2, 4):
        h = torch.sin(p["implicit_filter.1.freq"] * (h @ p[f"implicit_filter.{layer}.weight"].T
                                                     + p[f"implicit_filter.{layer}.bias"]))  # fmt: skip
    h = h @ p["implicit_filter.6.weight"].T
    rates = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, h.shape[1]).double()
    return h * torch.exp(-time[:, None] * rates.abs())


def conv_by_definition(x, taps, bias):
    """bias + sum over lags, for [T, E]; taps [T or fewer, E]."""
    rows = []
    for t in range(len(x)):
        rows.append(bias + sum(taps[s] * x[t - s] for s in range(min(t + 1, len(taps)))))
    return torch.stack(rows)


def make(hidden_size=4, **options):
    """With weights large enough that every part of the filter shows."""
    torch.manual_seed(0)
    mixer = Hyena(hidden_size, **options).double()
    for x in mixer.filter_fn.implicit_filter.parameters():
        torch.nn.init.normal_(x)
    return mixer


@pytest.mark.parametrize("T", [1, 2, 9, 40])
@pytest.mark.parametrize(
    "options",
    [{"filter_order": 5}, {"filter_order": 3, "short_filter_order": 1}, {"inner_factor": 2, "short_filter_order": 4}],
)
def test_hyena_is_zoologys_formula(options, T):
    mixer, x = make(l_max=40, **options), torch.randn(1, T, 4).double()
    p = dict(mixer.named_parameters())
    taps = filter_by_definition(p, 40, T)
    u = x[0] @ p["in_proj.weight"].T + p["in_proj.bias"]
    u = conv_by_definition(u, p["short_filter.weight"][:, 0].flip(-1).T, p["short_filter.bias"])
    pre, post, v = u.chunk(3, -1)
    v = pre * v
    y = post * (conv_by_definition(v, taps, 0) + p["filter_fn.bias"] * v)
    assert_close(mixer(x)[0], y @ p["out_proj.weight"].T + p["out_proj.bias"], 1e-6)  # z, t, deltas are fp32


def test_mad_labs_layer_is_hyena_with_its_channels_reversed():
    """mad-lab: pre-gate second, post-gate first, and in_proj's channels repeated proj_groups times."""
    mixer, D, E, groups, T = make(hidden_size=4, l_max=12, inner_factor=4, proj_groups=4, filter_order=4), 4, 16, 4, 12
    theirs = {name: x.clone() for name, x in mixer.named_parameters()}
    deltas = mixer.filter_fn.modulation.deltas.clone()
    x = torch.randn(1, T, D).double()

    u = (x[0] @ theirs["in_proj.weight"].T + theirs["in_proj.bias"]).repeat(1, groups)
    u = conv_by_definition(u, theirs["short_filter.weight"][:, 0].flip(-1).T, theirs["short_filter.bias"])
    post, pre, v = u.chunk(3, -1)
    v = pre * v
    taps = filter_by_definition(theirs, 12, T)
    y = post * (conv_by_definition(v, taps, 0) + theirs["filter_fn.bias"] * v)
    expected = y @ theirs["out_proj.weight"].T + theirs["out_proj.bias"]

    def gates(x):  # the three thirds: pre and post change places, channels turn round
        post, pre, v = x.chunk(3)
        return torch.cat((pre.flip(0), post.flip(0), v.flip(0)))

    width = 3 * E // groups
    place = (2 * E - 1 - torch.arange(width)) % width
    mixer.load_state_dict({
        **theirs,
        "filter_fn.pos_emb.t": mixer.filter_fn.pos_emb.t,
        "in_proj.weight": theirs["in_proj.weight"][place], "in_proj.bias": theirs["in_proj.bias"][place],
        "short_filter.weight": gates(theirs["short_filter.weight"]),
        "short_filter.bias": gates(theirs["short_filter.bias"]),
        "filter_fn.bias": theirs["filter_fn.bias"].flip(0),
        "filter_fn.implicit_filter.6.weight": theirs["filter_fn.implicit_filter.6.weight"].flip(0),
        "filter_fn.modulation.deltas": deltas.flip(-1),
        "out_proj.weight": theirs["out_proj.weight"].flip(1),
    })  # fmt: skip
    assert_close(mixer(x)[0], expected, 1e-6)


def test_hyena_has_zoologys_names_and_takes_its_repeated_sines():
    mixer = Hyena(4, l_max=8, filter_order=5)
    names = {
        "in_proj.weight": (12, 4), "in_proj.bias": (12,), "out_proj.weight": (4, 4), "out_proj.bias": (4,),
        "short_filter.weight": (12, 1, 3), "short_filter.bias": (12,), "filter_fn.bias": (4,),
        "filter_fn.pos_emb.z": (1, 8, 3), "filter_fn.implicit_filter.1.freq": (1, 5),
        "filter_fn.implicit_filter.0.weight": (5, 3), "filter_fn.implicit_filter.0.bias": (5,),
        "filter_fn.implicit_filter.2.weight": (5, 5), "filter_fn.implicit_filter.2.bias": (5,),
        "filter_fn.implicit_filter.4.weight": (5, 5), "filter_fn.implicit_filter.4.bias": (5,),
        "filter_fn.implicit_filter.6.weight": (4, 5),
    }  # fmt: skip
    constants = {"filter_fn.pos_emb.t": (1, 8, 1), "filter_fn.modulation.deltas": (1, 1, 4)}
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == names
    assert {name: tuple(p.shape) for name, p in mixer.state_dict().items()} == names | constants
    theirs = {name: torch.randn(shape) for name, shape in (names | constants).items()}
    repeated = {f"filter_fn.implicit_filter.{i}.freq": theirs["filter_fn.implicit_filter.1.freq"] for i in (3, 5)}
    mixer.load_state_dict(theirs | repeated)
    assert all(torch.equal(x, theirs[name]) for name, x in mixer.state_dict().items())
    with pytest.raises(RuntimeError, match="implicit_filter.7.freq"):
        mixer.load_state_dict(theirs | {"filter_fn.implicit_filter.7.freq": torch.ones(1, 5)})


def test_hyena_starts_as_zoologys():
    """After init_weights on tensors that came without values, as transformers makes them."""
    torch.manual_seed(0)
    with torch.device("meta"):
        mixer = Hyena(256, l_max=50)
    mixer.to_empty(device="cpu")
    for tensor in mixer.state_dict().values():
        tensor.fill_(float("nan"))
    mixer.init_weights(0.02)
    linear = {id(p) for m in mixer.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()}
    x = {name: x for name, x in mixer.state_dict(keep_vars=True).items() if id(x) not in linear}
    assert all(tensor.isfinite().all() for tensor in x.values())
    time = torch.linspace(0, 1, 50)
    phase = 1e-4 * 2 * math.pi * torch.arange(50) / 50
    z = torch.stack((time, phase.cos(), -phase.sin()), -1)
    torch.testing.assert_close(x["filter_fn.pos_emb.z"][0].detach(), z)
    torch.testing.assert_close(x["filter_fn.pos_emb.t"][0, :, 0], time)
    assert x["filter_fn.implicit_filter.1.freq"].eq(1).all()
    rates = x["filter_fn.modulation.deltas"].flatten()
    assert_close(rates[[0, -1]], torch.tensor((math.log(0.01) / 1.5, math.log(0.01) / 0.3)))
    assert abs(x["filter_fn.bias"].std() - 1) < 0.2
    for name in ("weight", "bias"):
        assert 0.55 < x[f"short_filter.{name}"].abs().max() <= 3**-0.5


def test_later_inputs_change_no_bit_of_an_output():
    mixer, x = Hyena(8, l_max=300), torch.randn(2, 300, 8)
    with torch.no_grad():
        expected = mixer(x)
        x[:, 170:] = 100 * torch.randn(2, 130, 8)
        assert torch.equal(mixer(x)[:, :170], expected[:, :170])


def test_a_longer_sequence_is_refused_in_one_call_and_in_several():
    mixer, cache = Hyena(4, l_max=8), {}
    mixer(torch.randn(1, 8, 4), Context(cache=cache))
    with pytest.raises(ValueError, match="a sequence of 9 tokens .* l_max is 8"):
        mixer(torch.randn(1, 9, 4))
    with pytest.raises(ValueError, match="a sequence of 9 tokens .* l_max is 8"):
        mixer(torch.randn(1, 1, 4), Context(past_length=8, cache=cache))


def test_the_state_is_the_inputs_of_the_long_filter():
    mixer, cache = Hyena(4, inner_factor=2), {}
    mixer(torch.randn(1, 9, 4), Context(cache=cache))
    assert {name: tuple(x.shape) for name, x in cache.items()} == {"conv": (1, 2, 24), "inputs": (1, 9, 8)}
    assert mixer.state_size(9) == cache["inputs"].numel()
    with pytest.raises(ValueError, match="sequence_length is needed"):
        mixer.state_size()


@pytest.mark.parametrize("option", ["l_max", "filter_order", "short_filter_order", "inner_factor", "proj_groups"])
def test_options_are_positive(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        Hyena(4, **{option: 0})


def test_projection_groups_divide_the_channels():
    with pytest.raises(ValueError, match="proj_groups must divide the 12 channels of the projections, got 5"):
        Hyena(4, proj_groups=5)
