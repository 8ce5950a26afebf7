"""What every mixer promises: caching, padding, causality, a state of the size it says, clear errors."""

import pytest
import torch
from cases import MIXERS, D
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.context import Context
from lrm_recall.mixers.find import mixer_class


def make(name, seed=0):
    torch.manual_seed(seed)
    mixer, options = MIXERS[name]
    return mixer_class(mixer)(D, **options)


@pytest.fixture(params=list(MIXERS))
def mixer(request):
    return make(request.param)


def step_through(mixer, x, pieces, **context):
    """Run x in pieces of these lengths over one cache."""
    cache, parts, past = {}, [], 0
    for piece in x.split(pieces, dim=1):
        parts.append(mixer(piece, Context(past_length=past, cache=cache, **context)))
        past += piece.shape[1]
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("prompt", [1, 2, 7, 16, 33, 64, 65, 130])  # below, at and above chunks of 16, 64 and 128
def test_prefill_then_token_by_token(mixer, prompt):
    x = torch.randn(2, prompt + 5, D)
    y, _ = step_through(mixer, x, [prompt, 1, 1, 1, 1, 1])
    assert_close(y, mixer(x))


@pytest.mark.parametrize("pieces", [[3, 20, 2], [1, 1, 70], [64, 64, 3]])
def test_prefill_in_pieces(mixer, pieces):
    x = torch.randn(2, sum(pieces), D)
    assert_close(step_through(mixer, x, pieces)[0], mixer(x))


@pytest.mark.parametrize("pieces", [[80], [40, 40], [12, *[1] * 68]])
def test_left_padding_leaves_no_trace(mixer, pieces):
    rows = [torch.randn(1, length, D) for length in (80, 71, 1, 40)]
    offset = torch.tensor([80 - row.shape[1] for row in rows])
    x = torch.randn(4, 80, D)  # anything at all on the padding
    for i, row in enumerate(rows):
        x[i, offset[i] :] = row[0]
    mask = torch.arange(80) >= offset.unsqueeze(-1)
    cache, parts, past = {}, [], 0
    for piece, real in zip(x.split(pieces, 1), mask.split(pieces, 1), strict=True):
        seen = torch.minimum(offset, torch.tensor(past + piece.shape[1]))  # the padding so far
        parts.append(mixer(piece, Context(mask=real, offset=seen, past_length=past, cache=cache)))
        past += piece.shape[1]
    y = torch.cat(parts, 1)
    assert y.isfinite().all()
    for i, row in enumerate(rows):
        assert_close(y[i, offset[i] :], mixer(row)[0])


def test_padding_told_by_the_mask_alone(mixer):
    x, mask = torch.randn(2, 20, D), torch.ones(2, 20, dtype=torch.bool)
    mask[0, :6] = False
    assert_close(mixer(x, Context(mask=mask))[0, 6:], mixer(x[:1, 6:])[0])


@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from(list(MIXERS)), T=st.integers(1, 140), seed=st.integers(0, 100), where=st.floats(0, 1))
def test_no_output_depends_on_a_later_input(name, T, seed, where):
    mixer, t = make(name, seed), int(where * (T - 1))
    x = torch.randn(1, T, D, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0, t].square().sum(), x)
    assert gradient[0, t].ne(0).any()
    assert gradient[0, t + 1 :].eq(0).all()


@pytest.mark.parametrize("name", [name for name in MIXERS if "short" not in name])
def test_the_first_token_reaches_the_last(name):
    x = torch.randn(1, 140, D, requires_grad=True)
    (gradient,) = torch.autograd.grad(make(name)(x)[0, -1].sum(), x)
    assert gradient[0, 0].ne(0).any()


def test_rows_do_not_mix(mixer):
    x = torch.randn(3, 20, D)
    assert_close(mixer(x)[1], mixer(x[1:2])[0])


def test_cached_tensors_have_the_batch_first(mixer):
    """So that a beam search can reorder them, and a batch be cut."""
    x = torch.randn(3, 20, D)
    full = mixer(x)
    _, cache = step_through(mixer, x[:, :19], [19])
    assert cache and all(tensor.shape[0] == 3 for tensor in cache.values())
    order = torch.tensor([2, 0])
    kept = {name: tensor[order] for name, tensor in cache.items()}
    assert_close(mixer(x[order, 19:], Context(past_length=19, cache=kept)), full[order, 19:])


def test_state_size_is_what_the_cache_holds(mixer):
    """But for the windows of convolutions, which StateX does not count."""
    _, cache = step_through(mixer, torch.randn(1, 9, D), [9])
    assert mixer.state_size(9) == sum(x.numel() for name, x in cache.items() if not name.endswith("conv"))


@pytest.mark.parametrize("name", [name for name in MIXERS if not name.startswith("mamba2")])  # its chunks' states stay
def test_a_cached_state_keeps_no_larger_tensor_alive(name):
    _, cache = step_through(make(name), torch.randn(1, 140, D), [140])
    state = cache.get("state", torch.zeros(()))
    assert state.untyped_storage().nbytes() <= state.numel() * state.element_size()


@pytest.mark.parametrize("name", ["attention", "baseconv, long"])
def test_a_growing_state_needs_a_length(name):
    with pytest.raises(ValueError, match="sequence_length is needed"):
        make(name).state_size()


def test_bfloat16(mixer):
    x = torch.randn(2, 20, D)
    with torch.no_grad():
        expected = mixer(x)
        y, _ = step_through(mixer.bfloat16(), x.bfloat16(), [18, 1, 1])
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), expected, 0.03)


@pytest.mark.parametrize(
    ("mixer", "options", "message"),
    [
        ("gla", {"num_heads": 3}, "num_heads=3, hidden_size=16, expand_k giving 8"),
        ("gla", {"num_heads": 8, "expand_v": 0.25}, "expand_v giving 4"),
        ("gla", {"num_heads": 0}, "num_heads=0"),
        ("gla", {"gate_low_rank_dim": 0}, "gate_low_rank_dim must be at least 1, got 0"),
        ("gla", {"gate_logit_normalizer": 0}, "gate_logit_normalizer must be at least 1, got 0"),
        ("mamba2", {"head_dim": 3}, "head_dim=3, expand=2, hidden_size=16"),
        ("mamba2", {"head_dim": 64}, "head_dim=64"),
        ("mamba2", {"head_dim": 16, "n_groups": 3}, "n_groups must divide the 2 heads, got 3"),
        ("mamba2", {"head_dim": 16, "state_size": 0}, "state_size must be at least 1, got 0"),
        ("mamba2", {"head_dim": 16, "time_step_min": 0.2}, "got 0.2, 0.1 and 0.0001"),
        ("baseconv", {"kernel_size": 0}, "kernel_size must be at least 1, or -1 for a long convolution, got 0"),
        ("baseconv", {"max_length": 0}, "max_length must be at least 1, got 0"),
        ("attention", {"num_heads": 5}, "num_heads=5, hidden_size=16"),
        ("attention", {"num_heads": 16}, "even number of channels per head"),
        ("attention", {"rope_theta": 0.0}, "rope_theta must be positive, got 0.0"),
    ],
)
def test_bad_options(mixer, options, message):
    with pytest.raises(ValueError, match=message):
        mixer_class(mixer)(D, **options)


def test_mamba2_has_chunks_of_a_power_of_two():
    with pytest.raises(ValueError, match="chunk_size must be a power of two, got 48"):
        mixer_class("mamba2")(D, head_dim=8, chunk_size=48)(torch.randn(1, 50, D))
