"""The chunked form of the selective scan against its fp32 loop, and the loop against the definition."""

from functools import partial

import pytest
import torch
from closeness import assert_close, assert_same, forward_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.ops import selective_scan as module
from lrm_recall.ops.selective_scan import (
    selective_scan,
    selective_scan_chunked,
    selective_scan_recurrent,
    selective_scan_step,
)


def chunked(*inputs, **options):
    *inputs, state = inputs
    return selective_scan_chunked(*inputs, initial_state=state, **options)


def recurrent(*inputs):
    *inputs, state = inputs
    return selective_scan_recurrent(*inputs, initial_state=state)


def draw(T, decay, *, batch=2, E=3, N=4, seed=0, dtype=torch.float32):
    """x, dt, A, B, C, D and a state; `decay` is the largest -dt A, "mixed" has 1e4 among small ones."""
    generator = torch.Generator().manual_seed(seed)
    x, dt, hit, A, B, C, D, state = (
        torch.randn(batch, T, E, generator=generator),
        torch.rand(batch, T, E, generator=generator),
        torch.rand(batch, T, E, generator=generator),
        -torch.rand(E, N, generator=generator),
        torch.randn(batch, T, N, generator=generator),
        torch.randn(batch, T, N, generator=generator),
        torch.randn(E, generator=generator),
        torch.randn(batch, E, N, generator=generator),
    )
    A = torch.where(hit[0, 0].unsqueeze(-1) < 0.3, 1e4, 0.1) * A if decay == "mixed" else decay * A
    return [y.to(dtype) for y in (x, dt, A, B, C, D, state)]


def test_the_loop_is_the_definition():
    """What token j writes reaches token t through the decay of every channel and state channel between them."""
    x, dt, A, B, C, D, state = draw(9, 1.0, dtype=torch.float64)
    y, final = selective_scan_recurrent(x, dt, A, B, C, D, initial_state=state)
    for t in range(9):
        expected = (dt[:, : t + 1].sum(1).unsqueeze(-1) * A).exp() * state
        for j in range(t + 1):
            left = (dt[:, j + 1 : t + 1].sum(1).unsqueeze(-1) * A).exp()  # [B, E, N]
            expected = expected + left * torch.einsum("be,bn->ben", dt[:, j] * x[:, j], B[:, j])
        assert_close(y[:, t], torch.einsum("ben,bn->be", expected, C[:, t]) + D * x[:, t], 1e-12)
    assert_close(final, expected, 1e-12)


def test_steps_are_the_loop():
    x, dt, A, B, C, D, state = draw(12, 1.0)
    expected, final = selective_scan_recurrent(x, dt, A, B, C, D, initial_state=state)
    for t in range(12):
        y, state = selective_scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        assert_close(y, expected[:, t])
    assert_close(state, final)


@pytest.mark.parametrize("decay", [0.0, 0.05, 1.0, 10.0, 1e4, "mixed"])
@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 40])
def test_chunked_equals_the_loop(T, decay):
    assert_same(partial(chunked, chunk_size=8), recurrent, draw(T, decay))


def test_default_chunk_equals_the_loop():
    assert_same(lambda *inputs: selective_scan(*inputs[:-1], initial_state=inputs[-1]), recurrent, draw(75, 0.1))


@settings(deadline=None, max_examples=100)
@given(
    T=st.integers(1, 40),
    batch=st.integers(1, 3),
    E=st.integers(1, 5),
    N=st.integers(1, 5),
    chunk_size=st.integers(1, 45),
    decay=st.one_of(st.floats(-2, 5).map(lambda power: 10.0**power), st.sampled_from([0.0, "mixed"])),
    seed=st.integers(0, 1000),
)
def test_any_shape_chunk_and_decay(T, batch, E, N, chunk_size, decay, seed):
    inputs = draw(T, decay, batch=batch, E=E, N=N, seed=seed)
    results, gradients = forward_and_gradients(partial(chunked, chunk_size=chunk_size), inputs)
    expected_results, expected_gradients = forward_and_gradients(recurrent, inputs)
    for actual, expected in zip([*results, *gradients], [*expected_results, *expected_gradients], strict=True):
        assert_close(actual, expected, 1e-4, least_scale=1e-2)  # a sum of few terms may cancel


@pytest.mark.parametrize("decay", [0.05, 100.0])
def test_gradients_in_double_precision(decay):
    inputs = [y.requires_grad_() for y in draw(6, decay, batch=1, E=2, N=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(partial(chunked, chunk_size=4), inputs)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_groups_of_rows_do_not_change_anything(rows, monkeypatch):
    """A large batch is worked on a few rows at a time."""
    monkeypatch.setattr(module, "_WORKING_SET", rows * 8 * 3 * 4)
    assert_same(partial(chunked, chunk_size=8), recurrent, draw(20, 1.0, batch=5))


def test_the_state_carries_over():
    x, dt, A, B, C, D, state = draw(33, 1.0)
    whole, final = selective_scan_chunked(x, dt, A, B, C, D, initial_state=state, chunk_size=8)
    parts = []
    for piece in (slice(0, 1), slice(1, 12), slice(12, 33)):
        y, state = selective_scan_chunked(
            x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece], D, initial_state=state, chunk_size=8
        )
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole)
    assert_close(state, final)


def test_no_state_unless_asked():
    *inputs, _ = draw(20, 1.0)
    y, state = selective_scan_chunked(*inputs, chunk_size=8, output_final_state=False)
    assert state is None
    assert_close(y, selective_scan_recurrent(*inputs)[0])


def test_d_may_be_missing():
    x, dt, A, B, C, D, state = draw(20, 1.0)
    assert_close(chunked(x, dt, A, B, C, None, state)[0] + D * x, chunked(x, dt, A, B, C, D, state)[0])
    assert_close(selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], None, state)[0] + D * x[:, 0],
                 selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)[0])  # fmt: skip


def test_gradients_do_not_reach_the_future():
    inputs = [y.requires_grad_() for y in draw(20, 1.0)]
    x, dt, A, B, C, D, state = inputs
    y, _ = chunked(*inputs, chunk_size=8)
    for gradient in torch.autograd.grad(y[:, 11].sum(), [x, dt, B, C]):
        assert gradient[:, 11].ne(0).all()
        assert gradient[:, 12:].eq(0).all()


def test_strided_input_is_read_as_it_is():
    x, dt, A, B, C, D, state = draw(20, 1.0)
    strided = [y.mT.contiguous().mT for y in (x, dt, A, B, C)]
    assert not strided[0].is_contiguous()
    assert torch.equal(chunked(*strided, D, state)[0], chunked(x, dt, A, B, C, D, state)[0])


def test_bfloat16_in_and_out_with_fp32_inside():
    inputs = [y.bfloat16() for y in draw(40, 0.5)]
    (y, state), gradients = forward_and_gradients(partial(chunked, chunk_size=16), inputs)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    results, expected = forward_and_gradients(recurrent, [y.float() for y in inputs])
    for actual, exact in zip([y, state, *gradients], [*results, *expected], strict=True):
        assert_close(actual, exact, 0.01)


def test_memory_for_backward_is_a_fraction_of_all_states():
    """Kept: inputs, and one state a chunk."""
    T, E, N = 64, 32, 16
    inputs = [y.requires_grad_() for y in draw(T, 1.0, batch=1, E=E, N=N)]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.setdefault(y.data_ptr(), y), lambda y: y):
        chunked(*inputs, chunk_size=16)
    assert sum(y.numel() for y in kept.values()) < T * E * N / 2


@pytest.mark.parametrize("chunk_size", [0, -4])
def test_a_chunk_has_a_token(chunk_size):
    *inputs, _ = draw(4, 1.0)
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {chunk_size}"):
        selective_scan_chunked(*inputs, chunk_size=chunk_size)
