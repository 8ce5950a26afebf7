"""Windows and grouped queries of the attention mixer, against every score written out."""

import math

import pytest
import torch
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.context import Context
from lrm_recall.mixers.attention import Attention

D = 16


def formula(mixer, x, window):
    """One row [T, D], query by query and head by head."""
    T, K = x.shape[0], mixer.head_dim
    q, k, v = (f(x).unflatten(-1, (-1, K)) for f in (mixer.q_proj, mixer.k_proj, mixer.v_proj))  # [T, H or G, K]
    if mixer.rope_theta is not None:
        frequency = mixer.rope_theta ** -(torch.arange(K // 2) / (K // 2))
        turn = torch.polar(torch.ones(T, K // 2), torch.outer(torch.arange(float(T)), frequency)).unsqueeze(1)
        q, k = (torch.complex(u[..., : K // 2], u[..., K // 2 :]) * turn for u in (q, k))
        q, k = (torch.cat((u.real, u.imag), -1) for u in (q, k))
    rows = []
    for t in range(T):
        first = max(0, t + 1 - window)
        heads = []
        for h in range(mixer.num_heads):
            g = h * mixer.num_kv_heads // mixer.num_heads
            weights = (k[first : t + 1, g] @ q[t, h] / math.sqrt(K)).softmax(0)
            heads.append(weights @ v[first : t + 1, g])
        rows.append(torch.cat(heads))
    return mixer.o_proj(torch.stack(rows))


def make(**options):
    torch.manual_seed(0)
    mixer = Attention(D, **options)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


@pytest.mark.parametrize("window", [1, 2, 7, 130, 300])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "bias": True}, {"num_kv_heads": 1, "rotary": False}])
def test_it_is_its_formula(options, window):
    mixer, x = make(window=window, **options), torch.randn(1, 270, D)  # pieces of 128, 130 or all tokens
    assert_close(mixer(x)[0], formula(mixer, x[0], window))


def test_a_window_as_long_as_the_sequence_is_none():
    x = torch.randn(2, 20, D)
    assert_close(make(window=20)(x), make()(x))


@settings(deadline=None, max_examples=100)
@given(
    window=st.integers(1, 12),
    pieces=st.lists(st.one_of(st.just(1), st.integers(2, 9)), min_size=1, max_size=8),
    padding=st.one_of(st.just(0), st.integers(1, 20)),
    seed=st.integers(0, 100),
)
def test_pieces_and_padding_change_nothing(window, pieces, padding, seed):
    mixer, T = make(window=window, num_kv_heads=2), sum(pieces)
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(seed))
    offset = torch.tensor([0, min(padding, T - 1)])
    cache, parts, past = {}, [], 0
    for piece in x.split(pieces, dim=1):
        context = Context(past_length=past, cache=cache)
        if padding:
            context.offset = torch.minimum(offset, torch.tensor(past + piece.shape[1]))
            context.mask = torch.arange(past, past + piece.shape[1]) >= offset.unsqueeze(-1)
        parts.append(mixer(piece, context))
        past += piece.shape[1]
        assert cache["keys"].shape == cache["values"].shape == (2, 2, window - 1, 4)
    y = torch.cat(parts, 1)
    assert y.isfinite().all()
    for row, first in enumerate(offset):
        assert_close(y[row, first:], formula(mixer, x[row, first:], window))


def test_a_step_may_have_its_position_on_the_device():
    """As in a captured CUDA graph, where it is read by the device alone."""
    mixer, x = make(window=6), torch.randn(2, 10, D)
    expected, cache, parts = mixer(x), {}, []
    for t in range(10):
        parts.append(mixer(x[:, t : t + 1], Context(past_length=torch.tensor(t), cache=cache)))
    assert_close(torch.cat(parts, 1), expected)


def test_what_left_the_window_has_no_effect():
    mixer, x = make(window=5), torch.randn(1, 300, D, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0, 200].sum(), x)
    reached = gradient[0].ne(0).any(-1)
    assert reached[196:201].all()
    assert reached.sum() == 5


def test_a_window_needs_no_mask_of_all_by_all(monkeypatch):
    masks = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v, mask=None, **options):
        masks.append(mask)
        return attention(q, k, v, mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    make(window=200)(torch.randn(1, 2000, D))
    assert len(masks) == 10
    assert sum(mask.numel() for mask in masks if mask is not None) <= 2000 * 400
    masks.clear()
    make(num_kv_heads=2)(torch.randn(1, 2000, D))
    assert masks == [None]  # plain causality has a kernel of its own


def test_the_state_is_bounded_by_the_window():
    assert make(window=9, num_kv_heads=2).state_size() == 2 * 2 * 4 * 8
    assert make(num_kv_heads=2).state_size(100) == 2 * 2 * 4 * 100


def test_parameters():
    shapes = {name: tuple(p.shape) for name, p in make(num_kv_heads=2, bias=True).named_parameters()}
    assert shapes == {
        "q_proj.weight": (16, 16), "q_proj.bias": (16,), "k_proj.weight": (8, 16), "k_proj.bias": (8,),
        "v_proj.weight": (8, 16), "v_proj.bias": (8,), "o_proj.weight": (16, 16), "o_proj.bias": (16,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads must divide the 4 heads, got 3"),
        ({"num_kv_heads": 0}, "num_kv_heads must divide the 4 heads, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(D, **options)
