"""How the kernels around Resona's search and attention are held to their torch forms, on a CPU and on a GPU."""

from __future__ import annotations

import torch
from closeness import assert_close

from lrm_recall.ops.norm import rms_norm_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
EPS = 1e-6


class Draw:
    """Leaves and indices from one seed."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.dtype, self._generator = dtype, torch.Generator().manual_seed(seed)

    def leaf(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(DEVICE, self.dtype).requires_grad_()

    def indices(self, *shape: int, N: int = 4) -> torch.Tensor:
        """Chunks of every position; about one in N + 1 is none, in any place."""
        return torch.randint(-1, N, shape, generator=self._generator).to(DEVICE)


def with_gradients(function, inputs, wide=False):
    """Results and the gradients of all leaves for a fixed gradient of the results; `wide` computes in fp32."""
    inputs = [x.detach().float().requires_grad_() if wide and _learns(x) else x for x in inputs]
    out = function(*inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    draw = torch.Generator().manual_seed(9)
    d_outputs = [torch.randn(y.shape, generator=draw).bfloat16().to(y) for y in outputs]  # the same in every dtype
    leaves = [x for x in inputs if _learns(x)]
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, leaves, d_outputs))


def _learns(x) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def assert_agrees(kernel, torch_form, inputs, tolerance=1e-5, least_scale=0.0):
    """`least_scale`: of gradients whose terms cancel."""
    results, gradients = with_gradients(kernel, inputs)
    expected, expected_gradients = with_gradients(torch_form, inputs, wide=True)
    for x, y in zip(results, expected, strict=True):
        assert_close(x.float(), y, tolerance, "result")
    leaves = [x for x in inputs if _learns(x)]
    for i, (leaf, x, y) in enumerate(zip(leaves, gradients, expected_gradients, strict=True)):
        assert x.dtype == leaf.dtype
        assert_close(x.float(), y, tolerance, f"gradient of leaf {i}", least_scale)
    return results, gradients


def norms_torch(x, weight, eps):
    return tuple(rms_norm_torch(x, weight, eps) for _ in range(3))
