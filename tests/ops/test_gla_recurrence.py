"""The chunked form of GLA against its fp32 loop, and the loop against the definition."""

from functools import partial

import pytest
import torch
from closeness import assert_close, assert_same, forward_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.ops.gla import gla_chunked, gla_recurrent, gla_step


def chunked(*inputs, **options):
    *qkvg, state = inputs
    return gla_chunked(*qkvg, initial_state=state, **options)


def recurrent(*inputs):
    *qkvg, state = inputs
    return gla_recurrent(*qkvg, initial_state=state)


def draw(T, decay, *, B=2, H=2, K=4, V=3, seed=0, dtype=torch.float32):
    """q, k, v, log_decay and a state; `decay` scales the log decays, "mixed" has -1e4 among small ones."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, uniform, hit, state = (
        torch.randn(B, T, H, K, generator=generator),
        torch.randn(B, T, H, K, generator=generator),
        torch.randn(B, T, H, V, generator=generator),
        torch.rand(B, T, H, K, generator=generator),
        torch.rand(B, T, H, K, generator=generator),
        torch.randn(B, H, K, V, generator=generator),
    )
    log_decay = torch.where(hit < 0.1, -1e4, -0.1 * uniform) if decay == "mixed" else -decay * uniform
    return [x.to(dtype) for x in (q, k, v, log_decay, state)]


def terms_of_decay(inputs, gradients):
    """A log decay's gradient is q * dq - k * dk summed over the tokens behind it."""
    return {3: sum((inputs[i] * gradients[i]).norm().item() for i in (0, 1))}


def test_the_loop_is_the_definition():
    q, k, v, log_decay, state = draw(9, 1.0, dtype=torch.float64)
    o, final = gla_recurrent(q, k, v, log_decay, initial_state=state)
    K = q.shape[-1]
    for t in range(9):
        expected = torch.einsum("bhk,bhkv->bhv", q[:, t] * log_decay[:, : t + 1].sum(1).exp(), state)
        for j in range(t + 1):
            weight = (q[:, t] * k[:, j] * log_decay[:, j + 1 : t + 1].sum(1).exp()).sum(-1, keepdim=True)
            expected = expected + weight * v[:, j]
        assert_close(o[:, t], expected * K**-0.5, 1e-12)
    decayed = log_decay.sum(1).exp().unsqueeze(-1) * state
    for j in range(9):
        decayed = decayed + torch.einsum("bhk,bhv->bhkv", k[:, j] * log_decay[:, j + 1 :].sum(1).exp(), v[:, j])
    assert_close(final, decayed, 1e-12)


def test_steps_are_the_loop():
    *inputs, state = draw(12, 1.0)
    expected, final = gla_recurrent(*inputs, scale=0.3, initial_state=state)
    for t in range(12):
        o, state = gla_step(*(x[:, t] for x in inputs), state, scale=0.3)
        assert_close(o, expected[:, t])
    assert_close(state, final)


@pytest.mark.parametrize("decay", [0.0, 0.05, 1.0, 10.0, 1e4, "mixed"])
@pytest.mark.parametrize("T", [1, 2, 7, 16, 17, 40])
def test_chunked_equals_the_loop(T, decay):
    assert_same(partial(chunked, chunk_size=16), recurrent, draw(T, decay), least_scales=terms_of_decay)


def test_default_chunk_equals_the_loop():
    assert_same(chunked, recurrent, draw(150, 0.1))


@settings(deadline=None, max_examples=100)
@given(
    T=st.integers(1, 40),
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    K=st.integers(2, 5),
    V=st.integers(2, 5),
    log_chunk=st.integers(0, 5),
    decay=st.one_of(st.floats(-2, 5).map(lambda power: 10.0**power), st.sampled_from([0.0, "mixed"])),
    seed=st.integers(0, 1000),
)
def test_any_shape_chunk_and_decay(T, B, H, K, V, log_chunk, decay, seed):
    inputs = draw(T, decay, B=B, H=H, K=K, V=V, seed=seed)
    assert_same(partial(chunked, chunk_size=1 << log_chunk), recurrent, inputs, 1e-4, terms_of_decay)


@pytest.mark.parametrize("decay", [0.05, 100.0])
def test_gradients_in_double_precision(decay):
    inputs = [x.requires_grad_() for x in draw(6, decay, B=1, H=1, K=2, V=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(partial(chunked, chunk_size=4), inputs)


def test_the_state_carries_over():
    q, k, v, log_decay, state = draw(33, 1.0)
    whole, final = gla_chunked(q, k, v, log_decay, initial_state=state, chunk_size=8)
    parts = []
    for piece in (slice(0, 1), slice(1, 12), slice(12, 33)):
        o, state = gla_chunked(
            q[:, piece], k[:, piece], v[:, piece], log_decay[:, piece], initial_state=state, chunk_size=8
        )
        parts.append(o)
    assert_close(torch.cat(parts, 1), whole)
    assert_close(state, final)


def test_no_state_unless_asked():
    q, k, v, log_decay, _ = draw(20, 1.0)
    o, state = gla_chunked(q, k, v, log_decay, chunk_size=8, output_final_state=False)
    assert state is None
    assert_close(o, gla_recurrent(q, k, v, log_decay)[0])


def test_strided_input_is_read_as_it_is():
    *qkvg, state = draw(20, 1.0)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkvg]
    assert not strided[0].is_contiguous()
    assert torch.equal(chunked(*strided, state)[0], chunked(*qkvg, state)[0])


def test_bfloat16_in_and_out_with_fp32_inside():
    inputs = [x.bfloat16() for x in draw(40, 0.5)]
    (o, state), gradients = forward_and_gradients(partial(chunked, chunk_size=16), inputs)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    results, expected = forward_and_gradients(recurrent, [x.float() for x in inputs])
    for actual, exact in zip([o, state, *gradients], [*results, *expected], strict=True):
        assert_close(actual, exact, 0.01)


def test_scale():
    q, k, v, log_decay, _ = draw(10, 1.0)
    assert_close(gla_chunked(q, k, v, log_decay, scale=3.0)[0], 6 * gla_chunked(q, k, v, log_decay)[0])  # K**-0.5 = 1/2


@pytest.mark.parametrize("chunk_size", [0, -4, 48])
def test_a_chunk_is_a_power_of_two(chunk_size):
    q, k, v, log_decay, _ = draw(4, 1.0)
    with pytest.raises(ValueError, match=f"power of two, got {chunk_size}"):
        gla_chunked(q, k, v, log_decay, chunk_size=chunk_size)
