"""The chunked form of retention against its fp32 loop, and the loop against the definition."""

from functools import partial

import pytest
import torch
from closeness import assert_close, assert_same, forward_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.ops.retention import (
    multi_scale_log_decay,
    retention,
    retention_chunked,
    retention_recurrent,
    retention_step,
)


def chunked(*inputs, **options):
    *qkvd, state = inputs
    return retention_chunked(*qkvd, initial_state=state, **options)


def recurrent(*inputs):
    *qkvd, state = inputs
    return retention_recurrent(*qkvd, initial_state=state)


def draw(T, decay, *, B=2, H=2, K=4, V=3, seed=0, dtype=torch.float32):
    """q, k, v, log_decay up to -`decay` (or RetNet's own, None), and a state."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, state = (
        torch.randn(shape, generator=generator)
        for shape in ((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, H, K, V))
    )
    log_decay = multi_scale_log_decay(H) if decay is None else -decay * torch.rand(H, generator=generator)
    return [x.to(dtype) for x in (q, k, v, log_decay, state)]


def terms_of_decay(inputs, gradients):
    """A log decay's gradient is the sum over pairs of tokens of their distance times what they give each other."""
    return {3: sum((inputs[i] * gradients[i]).norm().item() for i in (0, 1, 4))}


def test_the_decays_are_those_of_the_paper():
    assert_close(multi_scale_log_decay(8).exp(), torch.tensor([1 - 2.0 ** (-5 - h) for h in range(8)]), 1e-7)
    assert_close(multi_scale_log_decay(30)[-1], torch.tensor(-(2.0**-34)), 1e-6)  # 1 - 2^-34 is 1 in fp32


def test_the_loop_is_the_definition():
    q, k, v, log_decay, state = draw(9, 1.0, dtype=torch.float64)
    o, final = retention_recurrent(q, k, v, log_decay, initial_state=state)
    gamma = log_decay.exp()  # [H]
    for t in range(9):
        expected = torch.einsum("h,bhk,bhkv->bhv", gamma ** (t + 1), q[:, t], state)
        for j in range(t + 1):
            weight = gamma ** (t - j) * (q[:, t] * k[:, j]).sum(-1)  # [B, H]
            expected = expected + weight.unsqueeze(-1) * v[:, j]
        assert_close(o[:, t], expected * 4**-0.5, 1e-12)
    decayed = torch.einsum("h,bhkv->bhkv", gamma**9, state)
    for j in range(9):
        decayed = decayed + torch.einsum("h,bhk,bhv->bhkv", gamma ** (8 - j), k[:, j], v[:, j])
    assert_close(final, decayed, 1e-12)


def test_steps_are_the_loop():
    q, k, v, log_decay, state = draw(12, 1.0)
    expected, final = retention_recurrent(q, k, v, log_decay, scale=0.3, initial_state=state)
    for t in range(12):
        o, state = retention_step(q[:, t], k[:, t], v[:, t], log_decay, state, scale=0.3)
        assert_close(o, expected[:, t])
    assert_close(state, final)


@pytest.mark.parametrize("decay", [None, 0.0, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("T", [1, 2, 7, 16, 17, 40])
def test_chunked_equals_the_loop(T, decay):
    assert_same(partial(chunked, chunk_size=16), recurrent, draw(T, decay), least_scales=terms_of_decay)


def test_default_chunk_equals_the_loop():
    assert_same(chunked, recurrent, draw(150, None))


@settings(deadline=None, max_examples=100)
@given(
    T=st.integers(1, 40),
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    K=st.integers(2, 5),
    V=st.integers(2, 5),
    chunk_size=st.integers(1, 33),
    decay=st.one_of(st.floats(-2, 5).map(lambda power: 10.0**power), st.sampled_from([None, 0.0])),
    seed=st.integers(0, 1000),
)
def test_any_shape_chunk_and_decay(T, B, H, K, V, chunk_size, decay, seed):
    inputs = draw(T, decay, B=B, H=H, K=K, V=V, seed=seed)
    assert_same(partial(chunked, chunk_size=chunk_size), recurrent, inputs, 1e-4, terms_of_decay)


@pytest.mark.parametrize("decay", [0.05, 100.0])
def test_gradients_in_double_precision(decay):
    inputs = [x.requires_grad_() for x in draw(6, decay, B=1, H=1, K=2, V=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(partial(chunked, chunk_size=4), inputs)


def test_the_state_carries_over():
    q, k, v, log_decay, state = draw(33, 1.0)
    whole, final = retention(q, k, v, log_decay, initial_state=state, chunk_size=8)
    parts = []
    for piece in (slice(0, 1), slice(1, 12), slice(12, 33)):
        o, state = retention(q[:, piece], k[:, piece], v[:, piece], log_decay, initial_state=state, chunk_size=8)
        parts.append(o)
    assert_close(torch.cat(parts, 1), whole)
    assert_close(state, final)


@pytest.mark.parametrize("T", [5, 20])
def test_no_state_unless_asked(T):
    q, k, v, log_decay, _ = draw(T, 1.0)
    o, state = retention_chunked(q, k, v, log_decay, chunk_size=8, output_final_state=False)
    assert state is None
    assert_close(o, retention_recurrent(q, k, v, log_decay)[0])


def test_strided_input_is_read_as_it_is():
    q, k, v, log_decay, state = draw(20, 1.0)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    assert torch.equal(chunked(*strided, log_decay, state)[0], chunked(q, k, v, log_decay, state)[0])


def test_bfloat16_in_and_out_with_fp32_inside():
    inputs = [x.bfloat16() for x in draw(40, 0.5)]
    (o, state), gradients = forward_and_gradients(partial(chunked, chunk_size=16), inputs)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    results, expected = forward_and_gradients(recurrent, [x.float() for x in inputs])
    for actual, exact in zip([o, state, *gradients], [*results, *expected], strict=True):
        assert_close(actual, exact, 0.01)


def test_scale():
    q, k, v, log_decay, _ = draw(10, 1.0)
    o = retention_chunked(q, k, v, log_decay)[0]
    assert_close(retention_chunked(q, k, v, log_decay, scale=3.0)[0], 6 * o)  # K**-0.5 = 1/2


@pytest.mark.parametrize("chunk_size", [0, -4])
def test_a_chunk_has_tokens(chunk_size):
    q, k, v, log_decay, _ = draw(4, 1.0)
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {chunk_size}"):
        retention_chunked(q, k, v, log_decay, chunk_size=chunk_size)
