"""The chunked form of Mamba2's recurrence against its fp32 loop, and the loop against the definition."""

from functools import partial

import pytest
import torch
from closeness import assert_close, assert_same, forward_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.ops.ssd import ssd_chunked, ssd_recurrent, ssd_step


def chunked(*inputs, **options):
    *args, state = inputs
    return ssd_chunked(*args, initial_state=state, **options)


def recurrent(*inputs):
    *args, state = inputs
    return ssd_recurrent(*args, initial_state=state)


def draw(T, decay, *, batch=2, H=4, G=2, P=3, N=4, seed=0, dtype=torch.float32):
    """x, dt, A, B, C, D and a state; dt goes up to `decay`; "mixed" has 1e4 among small ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, T, H, P, generator=generator)
    uniform, hit = torch.rand(2, batch, T, H, generator=generator).unbind()
    A = -0.5 - torch.rand(H, generator=generator)
    B, C = torch.randn(2, batch, T, G, N, generator=generator).unbind()
    D = torch.randn(H, generator=generator)
    state = torch.randn(batch, H, P, N, generator=generator)
    dt = torch.where(hit < 0.1, 1e4, 0.1 * uniform) if decay == "mixed" else decay * uniform
    return [y.to(dtype) for y in (x, dt, A, B, C, D, state)]


def terms_of_decay(inputs, gradients):
    """The gradient of dt * A is y * dy - x * dx summed over the tokens behind it; that of D is a sum of x * dy."""
    (x, dt, A), dx = inputs[:3], gradients[0]
    terms = (x * dx).norm(dim=-1)  # [B, T, H]
    return {1: (A * terms).norm().item(), 2: (dt * terms).norm().item(), 5: x.norm().item()}


def test_the_loop_is_the_definition():
    x, dt, A, B, C, D, state = draw(7, 1.0, dtype=torch.float64)
    y, _ = ssd_recurrent(x, dt, A, B, C, D, initial_state=state)
    B, C = B.repeat_interleave(2, 2), C.repeat_interleave(2, 2)  # head h reads group h // (H / G)
    for t in range(7):
        expected = D[:, None] * x[:, t]
        decay = (dt[:, : t + 1].sum(1) * A).exp()
        expected = expected + torch.einsum("bh,bhpn,bhn->bhp", decay, state, C[:, t])
        for j in range(t + 1):
            weight = (dt[:, j + 1 : t + 1].sum(1) * A).exp() * dt[:, j] * (B[:, j] * C[:, t]).sum(-1)
            expected = expected + weight.unsqueeze(-1) * x[:, j]
        assert_close(y[:, t], expected, 1e-12)


@pytest.mark.parametrize("skip", [True, False])
def test_steps_are_the_loop(skip):
    x, dt, A, B, C, D, state = draw(12, 1.0)
    D = D if skip else None
    expected, final = ssd_recurrent(x, dt, A, B, C, D, initial_state=state)
    for t in range(12):
        y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        assert_close(y, expected[:, t])
    assert_close(state, final)


@pytest.mark.parametrize("decay", [0.0, 0.05, 1.0, 30.0, 1e4, "mixed"])
@pytest.mark.parametrize("T", [1, 2, 7, 16, 17, 40])
def test_chunked_equals_the_loop(T, decay):
    assert_same(partial(chunked, chunk_size=16), recurrent, draw(T, decay), least_scales=terms_of_decay)


def test_default_chunk_equals_the_loop():
    assert_same(chunked, recurrent, draw(150, 0.1))


@settings(deadline=None, max_examples=100)
@given(
    T=st.integers(1, 40),
    batch=st.integers(1, 2),
    G=st.integers(1, 2),
    R=st.integers(1, 2),
    P=st.integers(2, 4),
    N=st.integers(2, 4),
    log_chunk=st.integers(0, 5),
    decay=st.one_of(st.floats(-2, 5).map(lambda power: 10.0**power), st.sampled_from([0.0, "mixed"])),
    seed=st.integers(0, 1000),
)
def test_any_shape_chunk_and_decay(T, batch, G, R, P, N, log_chunk, decay, seed):
    inputs = draw(T, decay, batch=batch, H=G * R, G=G, P=P, N=N, seed=seed)
    assert_same(partial(chunked, chunk_size=1 << log_chunk), recurrent, inputs, 1e-4, terms_of_decay)


@pytest.mark.parametrize("decay", [0.5, 20.0])
def test_gradients_in_double_precision(decay):
    inputs = [x.requires_grad_() for x in draw(6, decay, batch=1, H=2, G=1, P=2, N=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(partial(chunked, chunk_size=4), inputs)


def test_the_state_carries_over():
    x, dt, A, B, C, D, state = draw(33, 1.0)
    whole, final = ssd_chunked(x, dt, A, B, C, D, initial_state=state, chunk_size=8)
    parts = []
    for i in (slice(0, 1), slice(1, 12), slice(12, 33)):
        y, state = ssd_chunked(x[:, i], dt[:, i], A, B[:, i], C[:, i], D, initial_state=state, chunk_size=8)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole)
    assert_close(state, final)


def test_without_skip_or_state():
    x, dt, A, B, C, _, _ = draw(20, 1.0)
    y, state = ssd_chunked(x, dt, A, B, C, chunk_size=8, output_final_state=False)
    assert state is None
    assert_close(y, ssd_recurrent(x, dt, A, B, C)[0])


def test_strided_input_is_read_as_it_is():
    x, dt, A, B, C, D, state = draw(20, 1.0)
    strided = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in (x, dt, B, C)]
    assert not strided[0].is_contiguous()
    actual = ssd_chunked(*strided[:2], A, *strided[2:], D, initial_state=state, chunk_size=8)
    assert_close(actual[0], ssd_chunked(x, dt, A, B, C, D, initial_state=state, chunk_size=8)[0], 1e-6)


def test_bfloat16_in_and_out_with_fp32_inside():
    inputs = [y.bfloat16() for y in draw(40, 0.5)]
    (y, state), gradients = forward_and_gradients(partial(chunked, chunk_size=16), inputs)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    results, expected = forward_and_gradients(recurrent, [x.float() for x in inputs])
    for actual, exact in zip([y, state, *gradients], [*results, *expected], strict=True):
        assert_close(actual, exact, 0.01)


def test_bad_arguments():
    x, dt, A, B, C, D, _ = draw(4, 1.0)
    for chunk_size in (0, -4, 48):
        with pytest.raises(ValueError, match=f"chunk_size must be a power of two, got {chunk_size}"):
            ssd_chunked(x, dt, A, B, C, D, chunk_size=chunk_size)
    with pytest.raises(ValueError, match="got 3 groups, 4 heads"):
        ssd_chunked(x, dt, A, torch.zeros(2, 4, 3, 4), torch.zeros(2, 4, 3, 4), D)
