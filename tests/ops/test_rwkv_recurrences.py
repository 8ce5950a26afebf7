"""The chunked forms of RWKV5 and RWKV4 against their fp32 loops, and the loops against the definitions."""

import pytest
import torch
from closeness import assert_close, assert_same, forward_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.ops.rwkv4 import NOTHING, empty_state, rwkv4, rwkv4_chunked, rwkv4_recurrent, rwkv4_step
from lrm_recall.ops.rwkv5 import rwkv5, rwkv5_chunked, rwkv5_recurrent, rwkv5_step


def from_state(op, **options):
    """The op as a function of its tensors, the state the last of them."""
    return lambda *inputs: op(*inputs[:-1], initial_state=inputs[-1], **options)


def draw5(T, decay, *, B=2, H=2, K=4, V=3, seed=0, dtype=torch.float32):
    """r, k, v, log_decay, bonus and a state; "mixed" has decays of 0, -1e4 and in between side by side."""
    generator = torch.Generator().manual_seed(seed)
    r, k, v, bonus, state = (
        torch.randn(shape, generator=generator)
        for shape in ((B, T, H, K), (B, T, H, K), (B, T, H, V), (H, K), (B, H, K, V))
    )
    log_decay = -torch.rand(H, K, generator=generator)
    if decay == "mixed":
        log_decay = log_decay * torch.tensor([0.0, 0.05, 4.0, 1e4, 1e4])[:K]
    else:
        log_decay = decay * log_decay
    return [x.to(dtype) for x in (r, k, v, log_decay, bonus, state)]


def terms_of_decay(inputs, gradients):
    """A log decay's gradient is the sum over pairs of tokens of their distance times what they give each other."""
    return {3: sum((inputs[i] * gradients[i]).norm().item() for i in (0, 1, 5))}


def test_the_loop_of_rwkv5_is_the_definition():
    r, k, v, log_decay, bonus, state = draw5(9, 1.0, dtype=torch.float64)
    o, final = rwkv5_recurrent(r, k, v, log_decay, bonus, initial_state=state)
    for t in range(9):
        expected = torch.einsum("bhk,bhkv->bhv", r[:, t] * (t * log_decay).exp(), state)
        expected = expected + (r[:, t] * bonus * k[:, t]).sum(-1, keepdim=True) * v[:, t]
        for j in range(t):
            weight = (r[:, t] * k[:, j] * ((t - 1 - j) * log_decay).exp()).sum(-1, keepdim=True)
            expected = expected + weight * v[:, j]
        assert_close(o[:, t], expected, 1e-12)
    decayed = (9 * log_decay).exp().unsqueeze(-1) * state
    for j in range(9):
        decayed = decayed + torch.einsum("bhk,bhv->bhkv", k[:, j] * ((8 - j) * log_decay).exp(), v[:, j])
    assert_close(final, decayed, 1e-12)


def test_steps_of_rwkv5_are_the_loop():
    r, k, v, log_decay, bonus, state = draw5(12, 1.0)
    expected, final = rwkv5_recurrent(r, k, v, log_decay, bonus, initial_state=state)
    for t in range(12):
        o, state = rwkv5_step(r[:, t], k[:, t], v[:, t], log_decay, bonus, state)
        assert_close(o, expected[:, t])
    assert_close(state, final)


@pytest.mark.parametrize("decay", [0.0, 0.05, 1.0, 10.0, 1e4, "mixed"])  # leaves of 16, 16, 16, 8 or less, 1 token
@pytest.mark.parametrize("T", [1, 2, 7, 16, 17, 40])
def test_chunked_rwkv5_equals_the_loop(T, decay):
    chunked = from_state(rwkv5_chunked, chunk_size=16)
    assert_same(chunked, from_state(rwkv5_recurrent), draw5(T, decay), least_scales=terms_of_decay)


def test_the_default_chunk_of_rwkv5_equals_the_loop():
    assert_same(from_state(rwkv5_chunked), from_state(rwkv5_recurrent), draw5(150, 0.1))


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
def test_any_shape_chunk_and_decay_of_rwkv5(T, B, H, K, V, log_chunk, decay, seed):
    inputs = draw5(T, decay, B=B, H=H, K=K, V=V, seed=seed)
    chunked = from_state(rwkv5_chunked, chunk_size=1 << log_chunk)
    assert_same(chunked, from_state(rwkv5_recurrent), inputs, 1e-4, terms_of_decay)


@pytest.mark.parametrize("decay", [0.05, 100.0])
def test_gradients_of_rwkv5_in_double_precision(decay):
    inputs = [x.requires_grad_() for x in draw5(6, decay, B=1, H=1, K=2, V=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(from_state(rwkv5_chunked, chunk_size=4), inputs)


@pytest.mark.parametrize("chunk_size", [0, -4, 48])
def test_a_chunk_of_rwkv5_is_a_power_of_two(chunk_size):
    *inputs, _ = draw5(4, 1.0)
    with pytest.raises(ValueError, match=f"power of two, got {chunk_size}"):
        rwkv5_chunked(*inputs, chunk_size=chunk_size)


def draw4(T, spread, *, B=2, D=5, seed=0, dtype=torch.float32):
    """w, u, k, v and a state; the log weights have a standard deviation of `spread`."""
    generator = torch.Generator().manual_seed(seed)
    w, u, k, v, sums = (
        torch.randn(shape, generator=generator) for shape in ((D,), (D,), (B, T, D), (B, T, D), (B, 3, D))
    )
    weight = sums[:, 1].abs() + 0.5
    state = torch.stack((sums[:, 0] * weight, weight, spread * sums[:, 2]), dim=1)
    return [x.to(dtype) for x in (3 * w - 1, u, spread * k, v, state)]  # decays from exp(-20) to about 1


def test_the_loop_of_rwkv4_is_the_definition():
    w, u, k, v, _ = draw4(9, 5.0, dtype=torch.float64)
    wkv, state = rwkv4_recurrent(w, u, k, v)
    for t in range(9):
        age = torch.arange(t - 1, -1, -1, dtype=torch.float64).unsqueeze(-1)  # [t, 1]
        logits = torch.cat((k[:, :t] - age * w.exp(), u + k[:, t : t + 1]), 1)  # [B, t + 1, D]
        assert_close(wkv[:, t], (logits.softmax(1) * v[:, : t + 1]).sum(1), 1e-12)
    left = (k - torch.arange(8, -1, -1).unsqueeze(-1) * w.exp()).exp()
    numerator, denominator, p = state.unbind(1)
    assert_close(numerator * p.exp(), (left * v).sum(1), 1e-12)
    assert_close(denominator * p.exp(), left.sum(1), 1e-12)


def test_steps_of_rwkv4_are_the_loop():
    w, u, k, v, state = draw4(12, 3.0)
    expected, final = rwkv4_recurrent(w, u, k, v, initial_state=state)
    for t in range(12):
        o, state = rwkv4_step(w, u, k[:, t], v[:, t], state)
        assert_close(o, expected[:, t])
    assert_close(state, final)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("T", [1, 2, 7, 16, 17, 40])
def test_chunked_rwkv4_equals_the_loop(T, spread):
    assert_same(from_state(rwkv4_chunked, chunk_size=16), from_state(rwkv4_recurrent), draw4(T, spread))


def test_the_default_chunk_of_rwkv4_equals_the_loop():
    assert_same(from_state(rwkv4_chunked), from_state(rwkv4_recurrent), draw4(150, 1.0))
    w, u, k, v, _ = draw4(150, 1.0)
    assert_same(rwkv4_chunked, rwkv4_recurrent, [w, u, k, v])


@settings(deadline=None, max_examples=100)
@given(
    T=st.integers(1, 40),
    B=st.integers(1, 2),
    D=st.integers(1, 5),
    chunk_size=st.integers(1, 33),
    power=st.floats(-1, 5),
    seed=st.integers(0, 1000),
)
def test_any_shape_chunk_and_log_weights_of_rwkv4(T, B, D, chunk_size, power, seed):
    """In fp64: exponents in the thousands leave fp32 no digits for their differences, in either form."""
    inputs = draw4(T, 10.0**power, B=B, D=D, seed=seed, dtype=torch.float64)
    chunked = from_state(rwkv4_chunked, chunk_size=chunk_size)
    assert_same(chunked, from_state(rwkv4_recurrent), inputs, 1e-5, lambda *_: dict.fromkeys(range(5), 1e-6))


@pytest.mark.parametrize("where", [0, 5, 20, 39])
@pytest.mark.parametrize("height", [1e3, 1e30])
def test_one_huge_log_weight(height, where):
    """From its token on nothing earlier is left, and the tokens before do not know of it."""
    w, u, k, v, state = draw4(40, 1.0)
    calm = rwkv4_chunked(w - 5, u, k, v, initial_state=state, chunk_size=16)[0]
    k[:, where] = height
    inputs = [w - 5, u, k, v, state]
    (wkv, final), gradients = forward_and_gradients(from_state(rwkv4_chunked, chunk_size=16), inputs)
    assert final.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    assert torch.equal(wkv[:, :where], calm[:, :where])
    assert_close(wkv[:, where:], v[:, where : where + 1].expand_as(wkv[:, where:]))


def test_gradients_of_rwkv4_in_double_precision():
    """Of the sums that the state stands for; its own scale p may be anything, and is a constant."""

    def chunked(*inputs):
        wkv, state = from_state(rwkv4_chunked, chunk_size=4)(*inputs)
        return wkv, state[:, :2] * state[:, 2:].exp()

    inputs = [x.requires_grad_() for x in draw4(6, 1.0, B=1, D=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(chunked, inputs)


def test_tokens_that_do_not_count_leave_no_trace():
    w, u, k, v, _ = draw4(20, 1.0)
    wkv, state = rwkv4_chunked(w, u, k[:, 7:], v[:, 7:], chunk_size=8)
    k[:, :7] = NOTHING
    padded, padded_state = rwkv4_chunked(w, u, k, v, chunk_size=8)
    assert padded.isfinite().all()
    assert_close(padded[:, 7:], wkv, 1e-6)
    assert_close(padded_state, state, 1e-6)


@pytest.mark.parametrize("chunk_size", [0, -4])
def test_a_chunk_of_rwkv4_has_tokens(chunk_size):
    *inputs, _ = draw4(4, 1.0)
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {chunk_size}"):
        rwkv4_chunked(*inputs, chunk_size=chunk_size)


OPS = {"rwkv5": (rwkv5, rwkv5_recurrent, lambda T: draw5(T, 1.0), (0, 1, 2)),
       "rwkv4": (rwkv4, rwkv4_recurrent, lambda T: draw4(T, 1.0), (2, 3))}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_the_state_carries_over(name):
    op, _, draw, over_time = OPS[name]
    *inputs, state = draw(33)
    whole, final = op(*inputs, initial_state=state, chunk_size=8)
    parts = []
    for piece in (slice(0, 1), slice(1, 12), slice(12, 33)):
        cut = [x[:, piece] if i in over_time else x for i, x in enumerate(inputs)]
        o, state = op(*cut, initial_state=state, chunk_size=8)
        parts.append(o)
    assert_close(torch.cat(parts, 1), whole)
    assert_close(state, final)


@pytest.mark.parametrize("T", [5, 20])
@pytest.mark.parametrize("name", OPS)
def test_no_state_unless_asked(name, T):
    op, loop, draw, _ = OPS[name]
    *inputs, _ = draw(T)
    o, state = op(*inputs, chunk_size=8, output_final_state=False)
    assert state is None
    assert_close(o, loop(*inputs)[0])


@pytest.mark.parametrize("name", OPS)
def test_bfloat16_in_and_out_with_fp32_inside(name):
    op, loop, draw, over_time = OPS[name]
    inputs = [x.bfloat16() if i in over_time else x for i, x in enumerate(draw(40))]
    (o, state), gradients = forward_and_gradients(from_state(op, chunk_size=16), inputs)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    results, expected = forward_and_gradients(from_state(loop), [x.float() for x in inputs])
    for actual, exact in zip([o, state, *gradients], [*results, *expected], strict=True):
        assert_close(actual, exact, 0.01)


def test_an_empty_state_is_no_state():
    w, u, k, v, _ = draw4(20, 1.0)
    o, state = rwkv4(w, u, k, v, initial_state=empty_state(v))
    expected, expected_state = rwkv4(w, u, k, v)
    assert torch.equal(o, expected) and torch.equal(state, expected_state)
