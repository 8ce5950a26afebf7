"""Attention over chosen chunks, against plain torch: output and every gradient."""

import numpy as np
import pytest
import torch
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_kernels import chunk_attention_tiles
from lrm_kernels.chunk_attention import chunk_attention, chunk_attention_reference
from lrm_kernels.chunk_attention_tiles import Tiles, heads_at_once

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
SMALL = Tiles(queries=16, tokens=16, part=32, warps=4, stages=1)


@pytest.fixture(scope="module", autouse=True)
def bf16_as_on_a_gpu():
    """Triton's interpreter keeps bf16 as its bits, multiplies matrices of them as if they were integers, and cuts
    where a GPU rounds."""
    if DEVICE == "cuda":
        yield
        return
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def floats(x):
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == bfloat16 else x.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(floats(a), floats(b), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) != (float32, bfloat16):
            return cast(self, x, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy(), bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
        yield


@pytest.fixture(scope="module", autouse=True)
def poison():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


def drawn(B, T, H, d, N, U, k, *, gate, dtype=torch.float32, least=-1, seed=0):
    """Inputs of chunk_attention, those with gradients asking for them; about one choice in N is no chunk."""
    draw = torch.Generator().manual_seed(seed)
    queries, keys, values = (
        torch.randn(shape, generator=draw).to(DEVICE, dtype).requires_grad_()
        for shape in ((B, T, H, d), (B, N, U, H, d), (B, N, U, H, d))
    )
    indices = torch.randint(least, N, (B, T, k), generator=draw).to(DEVICE)
    weights = torch.rand(B, T, k, generator=draw).to(DEVICE, dtype).requires_grad_() if gate else None
    return queries, keys, values, indices, weights


def with_gradients(function, inputs, dtype=None):
    """Output of `function` in `dtype`, and the gradient of each input that wants one, for a fixed output gradient."""
    inputs = [x if x is None or dtype is None or not x.is_floating_point() else x.to(dtype) for x in inputs]
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    out = function(*inputs)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def assert_agrees(inputs, tolerance=1e-5):
    actual = with_gradients(chunk_attention, inputs)
    expected = with_gradients(chunk_attention_reference, inputs, torch.float32)
    for name, x, y in zip(("output", "d queries", "d keys", "d values", "d weights"), actual, expected, strict=False):
        assert x.dtype == inputs[0].dtype
        # a softmax over one token has no gradient: what remains is the rounding of two terms of about one
        assert_close(x.float(), y, tolerance, name, least_scale=1.0 if name in ("d queries", "d keys") else 0.0)
    return actual


@pytest.mark.parametrize("gate", [True, False], ids=["weights", "one softmax"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("B", "T", "H", "d", "N", "U", "k"),
    [
        (2, 37, 2, 24, 5, 3, 2),
        (3, 16, 1, 32, 8, 2, 1),  # MQAR
        (1, 33, 3, 64, 4, 16, 4),
        (2, 9, 1, 5, 3, 70, 2),  # a chunk in two blocks
        (1, 1, 2, 16, 3, 1, 1),
        (1, 7, 1, 16, 2, 4, 7),  # k larger than the chunks there are: all of them twice or more
    ],
)
def test_output_and_gradients(B, T, H, d, N, U, k, dtype, gate):
    assert_agrees(drawn(B, T, H, d, N, U, k, gate=gate, dtype=dtype, least=0 if T == 1 else -1), TOLERANCE[dtype])


@pytest.mark.parametrize("gate", [True, False], ids=["weights", "one softmax"])
@pytest.mark.parametrize(("U", "k", "at_once"), [(9, 3, 1), (9, 3, 2), (40, 2, 1), (16, 1, 1), (40, 1, 2)])
def test_many_blocks_parts_and_passes_over_the_heads(U, k, at_once, gate, monkeypatch):
    for table in (chunk_attention_tiles.FORWARD, chunk_attention_tiles.BACKWARD):
        monkeypatch.setitem(table, (4, 64), SMALL)
    monkeypatch.setattr(chunk_attention_tiles, "SCRATCH_BYTES", at_once * 70 * k * 20 * 4)  # of three heads
    assert_agrees(drawn(1, 70, 3, 20, 2, U, k, gate=gate, least=0))  # 35 queries and more in one of two chunks


@pytest.mark.parametrize("gate", [True, False], ids=["weights", "one softmax"])
def test_one_chunk_chosen_by_every_query_and_others_by_none(gate, monkeypatch):
    monkeypatch.setitem(chunk_attention_tiles.BACKWARD, (4, 64), SMALL)
    queries, keys, values, indices, weights = drawn(2, 70, 1, 16, 4, 5, 2, gate=gate)
    indices.fill_(2)
    _, _, d_keys, d_values, *_ = assert_agrees((queries, keys, values, indices, weights))
    for gradient in (d_keys, d_values):
        assert (gradient[:, [0, 1, 3]] == 0).all()


@pytest.mark.parametrize("gate", [True, False], ids=["weights", "one softmax"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_query_without_a_chunk_gives_zeros_whatever_it_holds(k, gate):
    queries, keys, values, indices, weights = drawn(2, 20, 2, 8, 3, 4, k, gate=gate, least=0)
    indices[:, :5], indices[:, 5:7, 0] = -1, -1
    with torch.no_grad():
        queries[:, :5] = torch.nan
        if gate:
            weights[:, :5] = torch.inf
    out, d_queries, d_keys, d_values, *d_weights = with_gradients(
        chunk_attention, (queries, keys, values, indices, weights)
    )
    assert (out[:, :5] == 0).all() and (d_queries[:, :5] == 0).all() and out.isfinite().all()
    for gradient in (d_queries, d_keys, d_values, *d_weights):
        assert gradient.isfinite().all()
    if gate:
        assert (d_weights[0][indices < 0] == 0).all() and (d_weights[0][indices >= 0] != 0).all()


@pytest.mark.parametrize("gate", [True, False], ids=["weights", "one softmax"])
def test_nobody_found_anything(gate):
    queries, keys, values, indices, weights = drawn(1, 6, 1, 8, 2, 3, 2, gate=gate)
    for x in with_gradients(chunk_attention, (queries, keys, values, indices.fill_(-1), weights)):
        assert (x == 0).all()


def test_large_logits_stay_finite():
    queries, keys, values, indices, _ = drawn(1, 20, 1, 16, 3, 5, 2, gate=False, least=0)
    with torch.no_grad():
        queries *= 300
    assert_agrees((queries, keys, values, indices, None), 1e-4)


def test_a_choice_out_of_range_is_no_chunk_and_a_view_is_fine():
    queries, keys, values, indices, weights = drawn(2, 11, 2, 8, 3, 4, 2, gate=True)
    expected = chunk_attention(queries, keys, values, indices, weights)
    indices = torch.where(indices < 0, 3, indices)  # row 0's chunk 3 would be row 1's chunk 0
    views = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (queries, keys, values)]
    assert torch.equal(chunk_attention(*views, indices, weights), expected)


def test_weights_may_be_of_another_dtype():
    queries, keys, values, indices, weights = drawn(1, 20, 1, 16, 3, 5, 2, gate=True, dtype=torch.bfloat16)
    wide = weights.detach().float().requires_grad_()
    narrow = with_gradients(chunk_attention, (queries, keys, values, indices, weights))
    mixed = with_gradients(chunk_attention, (queries, keys, values, indices, wide))
    assert [x.dtype for x in mixed] == [torch.bfloat16] * 4 + [torch.float32]
    for x, y in zip(narrow, mixed, strict=True):
        assert torch.equal(x, y.to(torch.bfloat16))


def test_the_same_in_every_run():
    inputs = drawn(1, 60, 2, 16, 3, 5, 3, gate=True)
    for x, y in zip(with_gradients(chunk_attention, inputs), with_gradients(chunk_attention, inputs), strict=True):
        assert torch.equal(x, y)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 40), st.integers(1, 3), st.integers(1, 40), st.integers(1, 6), st.integers(1, 36),
    st.integers(1, 4), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_shape(B, T, H, d, N, U, k, gate, seed):
    assert_agrees(drawn(B, T, H, d, N, U, k, gate=gate, least=0 if T * k < 4 else -1, seed=seed))


def test_heads_are_taken_in_groups_of_nearly_one_size(monkeypatch):
    monkeypatch.setattr(chunk_attention_tiles, "SCRATCH_BYTES", 1000)
    assert [heads_at_once(16, size) for size in (62, 63, 100, 900, 5000)] == [16, 8, 8, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": (1, 2, 4, 3, 8)}, r"keys must have the shape \[1, 2, 4, 2, 8\] beside queries \[1, 5, 2, 8\], got"),
        ({"values": (1, 2, 3, 2, 8)}, r"values must have the shape \[1, 2, 4, 2, 8\]"),
        ({"indices": (1, 4, 3)}, r"indices must have the shape \[1, 5, 3\]"),
        ({"weights": (1, 5, 2)}, r"weights must have the shape \[1, 5, 3\]"),
        ({"indices": (5, 3)}, "4, 5 and 3 dimensions, got 4, 5 and 2"),
        ({"indices": (1, 5, 0), "weights": (1, 5, 0)}, "no dimension may be empty"),
        ({"queries": (1, 5, 2, 300), "keys": (1, 2, 4, 2, 300), "values": (1, 2, 4, 2, 300)}, "at most 256 channels"),
        ({"keys": (1, 2, 257, 2, 8), "values": (1, 2, 257, 2, 8)}, "256 tokens, got 8 and 257"),
    ],
)
def test_refuses_shapes_that_do_not_fit(change, message):
    shapes = {"queries": (1, 5, 2, 8), "keys": (1, 2, 4, 2, 8), "values": (1, 2, 4, 2, 8), "indices": (1, 5, 3),
              "weights": (1, 5, 3)} | change  # fmt: skip
    inputs = {name: torch.zeros(shape, device=DEVICE) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        chunk_attention(**inputs | {"indices": inputs["indices"].long()})


def test_refuses_dtypes():
    queries, keys, values, indices, _ = drawn(1, 5, 1, 8, 2, 3, 2, gate=False)
    with pytest.raises(ValueError, match="share one dtype of torch.bfloat16, torch.float16, torch.float32, got"):
        chunk_attention(queries.bfloat16(), keys, values, indices)
    with pytest.raises(ValueError, match="torch.float64"):
        chunk_attention(queries.double(), keys.double(), values.double(), indices)
    with pytest.raises(ValueError, match=r"indices must be torch.int64, got torch.int32"):
        chunk_attention(queries, keys, values, indices.int())
