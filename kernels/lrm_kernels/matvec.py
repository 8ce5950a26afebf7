"""Products of weight matrices with one token, at the speed at which the weights can be read.

Decoding one sequence multiplies every weight with a single vector. The library for matrix products is built for
tiles and reads these weights at half of the memory's bandwidth or less, and it needs a launch for each of them.
`matvec` multiplies several matrices with the same vector in one launch; `matvec_swiglu` is the first half of a SwiGLU.

R rows of x (sequences that are decoded together), K inputs, N outputs
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 4  # above this the weights are better read once, by a matrix product
MOST_MATRICES = 5

_BLOCK_N, _BLOCK_K, _WARPS = 2, 2048, 8  # on an H100 within 5 % of the best for each shape of a 1.3B model
_LEAST_ELEMENTS = 128  # of a warp: four a thread


def matvec_reference(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """What `matvec` computes, in plain torch."""
    return [F.linear(x, weight) for weight in weights]


def matvec_swiglu_reference(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """What `matvec_swiglu` computes, in plain torch."""
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


@triton.jit
def _dot(x, w, rows, N, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Products of the matrix rows `rows` [BLOCK_N] with the vector at x, in fp32: [BLOCK_N]."""
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = columns < K
        a = tl.load(w + rows.to(tl.int64)[:, None] * K + columns[None, :],
                    mask=(rows < N)[:, None] & inside[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        b = tl.load(x + columns, mask=inside, other=0.0)  # [BLOCK_K]
        total += tl.sum(a.to(tl.float32) * b.to(tl.float32)[None, :], axis=1)
    return total


@triton.jit
def _matvec_kernel(
    x, y, w0, w1, w2, w3, w4,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Matrix i belongs to the programs from i's first on; each writes behind the outputs of the matrices before it.
    P0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    P1: tl.constexpr = P0 + (N1 + BLOCK_N - 1) // BLOCK_N
    P2: tl.constexpr = P1 + (N2 + BLOCK_N - 1) // BLOCK_N
    P3: tl.constexpr = P2 + (N3 + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    x += row * K
    y += row * (N0 + N1 + N2 + N3 + N4)
    if program < P0:
        rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(y + rows, _dot(x, w0, rows, N0, K, BLOCK_N, BLOCK_K).to(y.dtype.element_ty), mask=rows < N0)
    elif program < P1:
        rows = (program - P0) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(y + N0 + rows, _dot(x, w1, rows, N1, K, BLOCK_N, BLOCK_K).to(y.dtype.element_ty), mask=rows < N1)
    elif program < P2:
        rows = (program - P1) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(y + N0 + N1 + rows, _dot(x, w2, rows, N2, K, BLOCK_N, BLOCK_K).to(y.dtype.element_ty),
                 mask=rows < N2)
    elif program < P3:
        rows = (program - P2) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(y + N0 + N1 + N2 + rows, _dot(x, w3, rows, N3, K, BLOCK_N, BLOCK_K).to(y.dtype.element_ty),
                 mask=rows < N3)
    else:
        rows = (program - P3) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(y + N0 + N1 + N2 + N3 + rows, _dot(x, w4, rows, N4, K, BLOCK_N, BLOCK_K).to(y.dtype.element_ty),
                 mask=rows < N4)


@triton.jit
def _swiglu_kernel(
    x, y, gate, up, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    x += row * K
    g = _dot(x, gate, rows, N, K, BLOCK_N, BLOCK_K)
    u = _dot(x, up, rows, N, K, BLOCK_N, BLOCK_K)
    tl.store(y + row * N + rows, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=rows < N)


def matvec(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """x W^T for several matrices W, in one launch.

    Args:
        x: [..., K], at most MOST_ROWS rows, contiguous.
        weights: at most MOST_MATRICES of [N_i, K], contiguous, of x's dtype.

    Returns:
        [..., N_i] each, views of one tensor.

    Raises:
        ValueError: too many rows or matrices.
    """
    K, rows = x.shape[-1], x.numel() // x.shape[-1]
    _check(rows, len(weights))
    outputs = [weight.shape[0] for weight in weights]
    y = x.new_empty(*x.shape[:-1], sum(outputs))
    N = outputs + [0] * (MOST_MATRICES - len(weights))
    w = weights + [weights[0]] * (MOST_MATRICES - len(weights))
    programs = sum(triton.cdiv(n, _BLOCK_N) for n in outputs)
    _matvec_kernel[(programs, rows)](x, y, *w, *N, K=K, BLOCK_N=_BLOCK_N, BLOCK_K=_block_k(K),
                                     num_warps=warps(_BLOCK_N * _block_k(K)))
    return list(y.split(outputs, dim=-1))


def matvec_swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x gate^T) * (x up^T), in one launch.

    Args:
        x: [..., K], at most MOST_ROWS rows, contiguous.
        gate, up: [N, K], contiguous, of x's dtype.

    Returns:
        [..., N].

    Raises:
        ValueError: too many rows.
    """
    K, rows = x.shape[-1], x.numel() // x.shape[-1]
    _check(rows, 2)
    N = gate.shape[0]
    y = x.new_empty(*x.shape[:-1], N)
    _swiglu_kernel[(triton.cdiv(N, _BLOCK_N), rows)](
        x, y, gate, up, N=N, K=K, BLOCK_N=_BLOCK_N, BLOCK_K=_block_k(K), num_warps=warps(_BLOCK_N * _block_k(K))
    )
    return y


def warps(elements: int) -> int:
    """For a tile of so many elements, a power of two: with more warps than that, some would do what others do."""
    return max(1, min(_WARPS, elements // _LEAST_ELEMENTS))


def _block_k(K: int) -> int:
    return min(_BLOCK_K, triton.next_power_of_2(K))


def _check(rows: int, matrices: int) -> None:
    if rows > MOST_ROWS or matrices > MOST_MATRICES:
        raise ValueError(f"matvec takes at most {MOST_ROWS} rows and {MOST_MATRICES} matrices, "
                         f"got {rows} and {matrices}")
