"""The chunked forms of the delta rules against their fp32 loop, and the loop against the definition."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close, assert_same, forward_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from lrm_recall.ops.delta_rule import delta_rule_chunked, delta_rule_recurrent, delta_rule_step
from lrm_recall.ops.gated_delta_rule import (
    gated_delta_rule_chunked,
    gated_delta_rule_recurrent,
    gated_delta_rule_step,
)

FORMS = {
    "delta rule": (delta_rule_recurrent, delta_rule_chunked, delta_rule_step),
    "gated delta rule": (gated_delta_rule_recurrent, gated_delta_rule_chunked, gated_delta_rule_step),
}


@pytest.fixture(params=list(FORMS))
def rule(request):
    return request.param


def recurrent(rule, *inputs):
    *inputs, state = inputs
    return FORMS[rule][0](*inputs, initial_state=state)


def chunked(rule, *inputs, **options):
    *inputs, state = inputs
    return FORMS[rule][1](*inputs, initial_state=state, **options)


def draw(rule, T, decay=0.1, beta=None, *, B=2, H=2, K=4, V=3, alike=0.0, seed=0, dtype=torch.float32):
    """q, k, v, for the gated rule log_decay, beta and a state.

    `decay` scales the log decays, "mixed" has -1e4 among small ones; `beta` is every token's, or None for anything
    from 0 to 2; `alike` moves all keys that far towards one direction before they are brought to length 1.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v, uniform, hit, share, state = (
        torch.randn(B, T, H, K, generator=generator),
        torch.randn(B, T, H, K, generator=generator),
        torch.randn(B, T, H, V, generator=generator),
        torch.rand(B, T, H, generator=generator),
        torch.rand(B, T, H, generator=generator),
        torch.rand(B, T, H, generator=generator),
        torch.randn(B, H, K, V, generator=generator),
    )
    k = F.normalize(k + alike, dim=-1)
    log_decay = torch.where(hit < 0.1, -1e4, -0.1 * uniform) if decay == "mixed" else -decay * uniform
    beta = 2 * share if beta is None else torch.full_like(share, beta)
    inputs = [q, k, v, log_decay, beta, state] if rule.startswith("gated") else [q, k, v, beta, state]
    return [x.to(dtype) for x in inputs]


def test_the_loop_is_the_definition(rule):
    """Each value reaches the state through the product of all later transitions a (I - beta k k^T)."""
    q, k, v, *log_decay, beta, state = inputs = draw(rule, 9, 1.0, dtype=torch.float64)
    o, final = recurrent(rule, *inputs)
    decay = log_decay[0].exp() if log_decay else torch.ones_like(beta)
    eye, key = torch.eye(4, dtype=torch.float64), k.unsqueeze(-1)
    transitions = decay[..., None, None] * (eye - beta[..., None, None] * key @ key.mT)  # [B, T, H, K, K]
    for t in range(9):
        expected, product = torch.zeros_like(state), eye
        for j in range(t, -1, -1):
            expected = expected + product @ (beta[:, j, :, None, None] * key[:, j] @ v[:, j].unsqueeze(-2))
            product = product @ transitions[:, j]
        expected = expected + product @ state
        assert_close(o[:, t], torch.einsum("bhk,bhkv->bhv", q[:, t], expected) * 4**-0.5, 1e-12)
    assert_close(final, expected, 1e-12)


def test_transformers_computes_the_same():
    """Qwen3-Next, in its torch form."""
    *inputs, state = draw("gated delta rule", 150, K=16, V=8)
    o, final = gated_delta_rule_chunked(*inputs, initial_state=state)
    expected = torch_chunk_gated_delta_rule(*inputs, initial_state=state, output_final_state=True)
    assert_close(o, expected[0])
    assert_close(final, expected[1])


def test_steps_are_the_loop(rule):
    loop, _, step = FORMS[rule]
    *inputs, state = draw(rule, 12, 1.0)
    expected, final = loop(*inputs, scale=0.3, initial_state=state)
    for t in range(12):
        o, state = step(*(x[:, t] for x in inputs), state, scale=0.3)
        assert_close(o, expected[:, t])
    assert_close(state, final)


@pytest.mark.parametrize("decay", [0.0, 0.05, 1.0, 10.0, 1e4, "mixed"])
@pytest.mark.parametrize("T", [1, 2, 7, 16, 17, 40])
def test_chunked_equals_the_loop(T, decay):
    rule = "gated delta rule"
    assert_same(partial(chunked, rule, chunk_size=16), partial(recurrent, rule), draw(rule, T, decay))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0, None])
@pytest.mark.parametrize("T", [1, 17, 40])
def test_any_beta_without_decay(T, beta):
    rule = "delta rule"
    assert_same(partial(chunked, rule, chunk_size=16), partial(recurrent, rule), draw(rule, T, beta=beta))


def test_default_chunk_equals_the_loop(rule):
    assert_same(partial(chunked, rule), partial(recurrent, rule), draw(rule, 150, K=16, V=8))


@pytest.mark.parametrize("alike", [1.0, 10.0, 1e4])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_keys_that_are_almost_the_same(rule, beta, alike):
    """The powers of A grow beyond any precision; its inverse must not be made of them."""
    inputs = draw(rule, 128, beta=beta, alike=alike, K=8)
    assert_same(partial(chunked, rule), partial(recurrent, rule), inputs, 2e-4)


@settings(deadline=None, max_examples=100)
@given(
    rule=st.sampled_from(list(FORMS)),
    T=st.integers(1, 40),
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    K=st.integers(2, 5),
    V=st.integers(2, 5),
    chunk_size=st.integers(1, 40),
    decay=st.one_of(st.floats(-2, 5).map(lambda power: 10.0**power), st.sampled_from([0.0, "mixed"])),
    beta=st.sampled_from([None, 0.01, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_chunk_and_decay(rule, T, B, H, K, V, chunk_size, decay, beta, seed):
    inputs = draw(rule, T, decay, beta, B=B, H=H, K=K, V=V, seed=seed)
    assert_same(partial(chunked, rule, chunk_size=chunk_size), partial(recurrent, rule), inputs, 1e-4)


@pytest.mark.parametrize("decay", [0.05, 100.0])
def test_gradients_in_double_precision(rule, decay):
    inputs = [x.requires_grad_() for x in draw(rule, 6, decay, B=1, H=1, K=2, V=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(partial(chunked, rule, chunk_size=4), inputs)


def test_no_output_depends_on_a_later_token(rule):
    """Not in its value, and not by rounding in its gradient."""
    *inputs, state = draw(rule, 20, 0.5)
    inputs = [x.requires_grad_() for x in inputs]
    o, _ = chunked(rule, *inputs, state, chunk_size=8)
    for gradient in torch.autograd.grad(o[:, 12].sum(), inputs):
        assert gradient[:, 12].ne(0).any() and gradient[:, 13:].eq(0).all()
    changed = [torch.cat((x[:, :13], 2 * x[:, 13:]), 1) for x in inputs]
    assert torch.equal(chunked(rule, *changed, state, chunk_size=8)[0][:, :13], o[:, :13])


def test_the_state_carries_over(rule):
    *inputs, state = draw(rule, 33, 1.0)
    whole, final = chunked(rule, *inputs, state, chunk_size=8)
    parts = []
    for piece in (slice(0, 1), slice(1, 12), slice(12, 33)):
        o, state = chunked(rule, *(x[:, piece] for x in inputs), state, chunk_size=8)
        parts.append(o)
    assert_close(torch.cat(parts, 1), whole)
    assert_close(state, final)


@pytest.mark.parametrize("T", [1, 20])
def test_no_state_unless_asked(rule, T):
    *inputs, state = draw(rule, T)
    o, final = chunked(rule, *inputs, state, chunk_size=8, output_final_state=False)
    assert final is None
    assert_close(o, recurrent(rule, *inputs, state)[0])


def test_the_state_is_zero_unless_given(rule):
    *inputs, state = draw(rule, 20)
    assert torch.equal(chunked(rule, *inputs, None)[1], chunked(rule, *inputs, torch.zeros_like(state))[1])


def test_the_final_state_keeps_no_other_alive(rule):
    """A cache holds on to it."""
    _, final = chunked(rule, *draw(rule, 40), chunk_size=8)
    assert final.untyped_storage().nbytes() == final.nbytes


def test_strided_input_is_read_as_it_is(rule):
    *inputs, state = draw(rule, 20, 1.0)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not strided[0].is_contiguous()
    assert torch.equal(chunked(rule, *strided, state)[0], chunked(rule, *inputs, state)[0])


def test_bfloat16_in_and_out_with_fp32_inside(rule):
    inputs = [x.bfloat16() for x in draw(rule, 40, 0.5)]
    (o, state), gradients = forward_and_gradients(partial(chunked, rule, chunk_size=16), inputs)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    results, expected = forward_and_gradients(partial(recurrent, rule), [x.float() for x in inputs])
    for actual, exact in zip([o, state, *gradients], [*results, *expected], strict=True):
        assert_close(actual, exact, 0.01)


def test_scale(rule):
    inputs = draw(rule, 10)
    assert_close(chunked(rule, *inputs, scale=3.0)[0], 6 * chunked(rule, *inputs)[0])  # K**-0.5 = 1/2


@pytest.mark.parametrize("chunk_size", [0, -4])
def test_a_chunk_has_tokens(rule, chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {chunk_size}"):
        chunked(rule, *draw(rule, 4), chunk_size=chunk_size)
