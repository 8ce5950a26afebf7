"""Several matrices times one token, against torch."""

import pytest
import torch
from closeness import assert_close

from lrm_kernels.matvec import (
    MOST_MATRICES,
    MOST_ROWS,
    matvec,
    matvec_reference,
    matvec_swiglu,
    matvec_swiglu_reference,
    warps,
)

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def drawn(device, dtype, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype) / shape[-1] ** 0.5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "K", "outputs"),
    [(1, 64, [32]), (1, 300, [7, 64, 33, 5, 1]), (3, 17, [3, 40]), (MOST_ROWS, 2049, [2, 3]), (2, 1, [1, 1, 1])],
)
def test_matvec(device, dtype, rows, K, outputs):
    x, weights = drawn(device, dtype, rows, 1, K), [drawn(device, dtype, N, K) for N in outputs]
    actual = matvec(x, weights)
    assert [y.shape for y in actual] == [(rows, 1, N) for N in outputs]
    for y, expected in zip(actual, matvec_reference(x, weights), strict=True):
        assert_close(y.float(), expected.float(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "K", "N"), [(1, 64, 40), (2, 300, 7), (MOST_ROWS, 33, 1)])
def test_matvec_swiglu(device, dtype, rows, K, N):
    x, gate, up = drawn(device, dtype, rows, 1, K), drawn(device, dtype, N, K), drawn(device, dtype, N + 1, K)[:N]
    actual = matvec_swiglu(8 * x, gate, up)  # the gate must leave its linear part
    assert_close(actual.float(), matvec_swiglu_reference((8 * x).float(), gate.float(), up.float()), TOLERANCE[dtype])


def test_refuses_what_belongs_to_a_matrix_product(device):
    weight = drawn(device, torch.float32, 4, 8)
    with pytest.raises(ValueError, match=f"at most {MOST_ROWS} rows and {MOST_MATRICES} matrices, got 5 and 1"):
        matvec(drawn(device, torch.float32, 5, 1, 8), [weight])
    with pytest.raises(ValueError, match="got 1 and 6"):
        matvec(drawn(device, torch.float32, 1, 1, 8), [weight] * 6)


def test_small_tiles_have_few_warps():
    assert [warps(elements) for elements in (32, 128, 512, 2048, 4096)] == [1, 1, 4, 8, 8]
