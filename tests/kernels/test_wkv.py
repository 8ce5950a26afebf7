"""RWKV4's recurrence in one walk over the tokens, against the loop in fp64: output, final state and every gradient."""

import pytest
import torch
from closeness import assert_close, forward_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_kernels.wkv import wkv
from lrm_recall.ops.dispatch import Unsupported
from lrm_recall.ops.libraries.own import rwkv4 as adapter
from lrm_recall.ops.rwkv4 import NOTHING, empty_state, rwkv4_chunked, rwkv4_recurrent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
RESULTS = ("output", "final state", "d w", "d u", "d k", "d v", "d state")


@pytest.fixture(scope="module", autouse=True)
def poison():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


def drawn(B, T, D, *, spread=1.0, seed=0, k_dtype=torch.float32, v_dtype=torch.float32):
    """w, u, k, v and a state; the log weights lie within `spread` of 0."""
    draw = torch.Generator().manual_seed(seed)
    w, u, v, sums = (torch.randn(shape, generator=draw) for shape in ((D,), (D,), (B, T, D), (B, 3, D)))
    k, p = (spread * (2 * torch.rand(shape, generator=draw) - 1) for shape in ((B, T, D), (B, D)))
    weight = sums[:, 1].abs() + 0.5
    state = torch.stack((sums[:, 0] * weight, weight, p), dim=1)  # [B, 3, D]
    return [x.to(DEVICE) for x in (2 * w - 2, u, k.to(k_dtype), v.to(v_dtype), state)]


def kernel(w, u, k, v, state=None):
    return [x.cpu() for x in wkv(w, u, k, v, state)]


def loop(w, u, k, v, state=None):
    return [x.cpu() for x in rwkv4_recurrent(w, u, k, v, initial_state=state)]


def assert_agrees(inputs, tolerance=1e-5, least_scales=None):
    results, gradients = forward_and_gradients(kernel, inputs)
    assert [x.dtype for x in (*results, *gradients)] == [inputs[3].dtype, torch.float32, *(x.dtype for x in inputs)]
    exact_results, exact_gradients = forward_and_gradients(loop, [x.double() for x in inputs])
    expected = exact_results + exact_gradients
    for name, x, y in zip(RESULTS, results + gradients, expected, strict=False):
        assert_close(x, y, tolerance, name, (least_scales or {}).get(name, 0.0))
    return results, gradients


@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize(
    ("B", "T", "D"),
    [
        (2, 1, 5),
        (1, 8, 32),  # one round and one program
        (2, 7, 40),
        (1, 25, 33),
    ],
)
def test_output_state_and_gradients(B, T, D, given):
    least_scales = {"d w": 1.0, "d u": 1.0, "d k": 1.0} if T == 1 else {}  # of one token and no state there is nothing
    assert_agrees(drawn(B, T, D)[: 5 if given else 4], least_scales=least_scales)


@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
def test_log_weights_up_to_60(given):
    assert_agrees(drawn(2, 30, 8, spread=60.0)[: 5 if given else 4])


@pytest.mark.parametrize(("k_dtype", "v_dtype"), [
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.bfloat16),
], ids=str)  # fmt: skip
def test_narrow_dtypes(k_dtype, v_dtype):
    assert_agrees(drawn(2, 12, 9, k_dtype=k_dtype, v_dtype=v_dtype), TOLERANCE[v_dtype])


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 18), st.integers(1, 35), st.floats(0, 60), st.integers(0, 99))
def test_any_shape(B, T, D, spread, seed):
    scales = dict.fromkeys(RESULTS[2:], 1.0)  # differences of terms of about one may cancel
    assert_agrees(drawn(B, T, D, spread=spread, seed=seed), least_scales=scales)


def test_tokens_that_do_not_count_leave_no_trace():
    w, u, k, v, _ = drawn(2, 20, 6)
    k[0, :11] = NOTHING
    counts = (k > NOTHING).cpu()

    def run(form):
        def counted(*inputs):  # what a token that does not count gives is never read
            output, final = form(*inputs)
            return output.where(counts, 0.0), final

        return forward_and_gradients(counted, [w, u, k, v])

    (results, gradients), (expected_results, expected_gradients) = run(kernel), run(loop)
    for name, x, y in zip(RESULTS, results + gradients, expected_results + expected_gradients, strict=False):
        assert_close(x, y, 1e-5, name)
    output, final = wkv(w, u, k, v)
    short, short_final = wkv(w, u, k[:1, 11:], v[:1, 11:])
    assert output.isfinite().all()
    assert_close(output[:1, 11:], short, 1e-6)
    assert_close(final[:1], short_final, 1e-6)
    for x in gradients[2:]:
        assert not x[0, :11].any()


@pytest.mark.parametrize("where", [0, 9, 19])
def test_one_huge_log_weight(where):
    w, u, k, v, state = drawn(1, 20, 6)
    calm, _ = kernel(w, u, k, v, state)
    k[:, where] = 1e30
    (output, final), gradients = forward_and_gradients(kernel, [w, u, k, v, state])
    assert torch.equal(output[:, :where], calm[:, :where])
    assert_close(output[:, where:], v[:, where : where + 1].cpu().expand_as(output[:, where:]))
    assert all(x.isfinite().all() for x in (final, *gradients))


def test_the_state_carries_over_and_an_empty_one_is_none():
    w, u, k, v, state = drawn(2, 19, 6)
    whole, final = wkv(w, u, k, v, state)
    parts = []
    for piece in (slice(0, 1), slice(1, 12), slice(12, 19)):  # views, none contiguous
        output, state = wkv(w, u, k[:, piece], v[:, piece], state)
        parts.append(output)
    assert_close(torch.cat(parts, 1), whole, 1e-6)
    assert_close(state, final, 1e-6)
    for x, y in zip(wkv(w, u, k, v, empty_state(v)), wkv(w, u, k, v), strict=True):
        assert torch.equal(x, y)


def test_no_final_state_unless_asked():
    inputs = drawn(2, 10, 6)[:4]
    output, final = wkv(*inputs, output_final_state=False)
    assert final is None and torch.equal(output, wkv(*inputs)[0])
    without = forward_and_gradients(lambda *x: [wkv(*x, output_final_state=False)[0].cpu()], inputs)[1]
    unread = forward_and_gradients(lambda *x: [wkv(*x)[0].cpu()], inputs)[1]
    for x, y in zip(without, unread, strict=True):
        assert torch.equal(x, y) and x.any()


def test_only_the_final_state_is_read():
    inputs = drawn(1, 10, 6)
    actual = forward_and_gradients(lambda *x: kernel(*x)[1:], inputs)[1]

    def unread(*x):  # autograd wants every input in the graph, and u is not in the state's
        output, final = loop(*x)
        return [final + 0 * output.sum()]

    expected = forward_and_gradients(unread, [x.double() for x in inputs])[1]
    for name, x, y in zip(RESULTS[2:], actual, expected, strict=True):
        assert_close(x, y, 1e-5, name)


def test_a_gradient_that_is_a_view():
    inputs = [x.requires_grad_() for x in drawn(1, 5, 6)[:4]]
    ones = torch.ones(1, 5, 6, device=DEVICE)
    for x, y in zip(torch.autograd.grad(wkv(*inputs)[0].sum(), inputs),  # the gradient of a sum has strides of 0
                    torch.autograd.grad(wkv(*inputs)[0], inputs, ones), strict=True):
        assert torch.equal(x, y)


def test_the_adapter_takes_what_the_torch_form_takes():
    w, u, k, v, state = drawn(2, 9, 6)
    for options in ({}, {"initial_state": state}, {"output_final_state": False}, {"chunk_size": 4}):
        for x, y in zip(adapter(w, u, k, v, **options), rwkv4_chunked(w, u, k, v, **options), strict=True):
            assert (x is None) == (y is None)
            if y is not None:
                assert_close(x, y)
    with pytest.raises(Unsupported, match="float64"):
        adapter(w, u, k.double(), v.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 4, 6)}, r"share one shape \[B, T, D\], got \(2, 5, 6\) and \(2, 4, 6\)"),
        ({"k": torch.zeros(5, 6), "v": torch.zeros(5, 6)}, r"share one shape \[B, T, D\], got \(5, 6\)"),
        ({"w": torch.zeros(5)}, r"w must have the shape \(6,\) beside k of \(2, 5, 6\), got \(5,\)"),
        ({"u": torch.zeros(1, 6)}, r"u must have the shape \(6,\)"),
        ({"initial_state": torch.zeros(1, 3, 6)}, r"initial_state must have the shape \(2, 3, 6\)"),
        ({"v": torch.zeros(2, 5, 6).double()}, "v must be float32, float16 or bfloat16, got torch.float64"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    inputs = {"w": torch.zeros(6), "u": torch.zeros(6), "k": torch.zeros(2, 5, 6), "v": torch.zeros(2, 5, 6)} | change
    with pytest.raises(ValueError, match=message):
        wkv(**{name: x.to(DEVICE) for name, x in inputs.items()})
