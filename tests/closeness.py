"""How tests compare tensors: by the relative error of the whole tensor, so that no tolerance hides in a small scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FP32 = 1e-5


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: float = FP32, what: str = "tensor", least_scale: float = 0.0
) -> None:
    """||actual - expected|| over ||expected||; a norm below `least_scale`, or below normal fp32, counts as that."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.isfinite().all(), f"{what} is not finite"
    scale = max(expected.double().norm().item(), least_scale, torch.finfo(torch.float32).tiny)
    error = (actual.double() - expected.double()).norm().item() / scale
    assert error <= tolerance, f"{what}: relative error {error:.2e} above {tolerance:.0e}"


def forward_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor], seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Both results of `function`, and the gradient of a random weighting of both with respect to every input."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, inputs, weights))


def assert_same(
    function: Callable[..., tuple[Tensor, Tensor]],
    oracle: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    tolerance: float = FP32,
    least_scales: Callable[..., dict[int, float]] | None = None,
) -> None:
    """Output, final state and every gradient of two functions of the same inputs agree.

    `least_scales(inputs, gradients)` says for some inputs, by index, how large the terms are whose sum or difference
    their gradient is: where those cancel, the rounding of the terms is what remains.
    """
    results, gradients = forward_and_gradients(function, inputs)
    expected_results, expected_gradients = forward_and_gradients(oracle, inputs)
    for name, actual, expected in zip(("output", "final state"), results, expected_results, strict=True):
        assert_close(actual, expected, tolerance, name)
    scales = least_scales(inputs, expected_gradients) if least_scales else {}
    for i, (actual, expected) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert_close(actual, expected, tolerance, f"gradient of input {i}", scales.get(i, 0.0))
