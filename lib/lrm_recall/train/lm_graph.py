"""Forward and backward pass of a language model by replay of a CUDA graph.

A step of a model of 25M parameters is some two thousand kernels, most of which end before Python has launched the next.
Captured once and replayed, they run one after the other. What comes after them in a step (clipping, AdamW, schedule)
stays with transformers' Trainer: a few fused kernels.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lrm_recall.train.device import own_stream
from lrm_recall.train.graph import CaptureError, Recorder

Batch = dict[str, Tensor]


class ReplayedPass:
    """Forward and backward pass, captured when it is first called.

    Args:
        forward_backward: from a batch, whose tensors always have the same shapes, to the loss; adds the gradients to
            `.grad` of the parameters, draws no random numbers, and changes nothing else.
        parameters: of the model, where they stay.
    """

    def __init__(self, forward_backward: Callable[[Batch], Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self._pass = forward_backward
        self._parameters = list(parameters)
        self._replay: Callable[[], None] | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """The loss []; gradients are added to those that parameters have. They stand until the next call.

        Raises:
            CaptureError: the pass cannot be captured; gradients are as they were.
            ValueError: tensors of other shapes than those of the first call.
        """
        if self._replay is None:
            self._capture(batch)
        for name, buffer in self._batch.items():
            if batch[name].shape != buffer.shape:
                raise ValueError(f"the pass was captured for {name} {tuple(buffer.shape)}, got "
                                 f"{tuple(batch[name].shape)}")
            buffer.copy_(batch[name], non_blocking=True)
        pairs = zip(self._gradients, [parameter.grad for parameter in self._learning], strict=True)
        before = [(made, grad.clone() if grad is made else grad)  # the replay writes over what it made before
                  for made, grad in pairs if grad is not None]
        self._replay()
        if before:
            torch._foreach_add_(*map(list, zip(*before, strict=True)))
        _point(self._learning, self._gradients)
        # An update follows, of which fused optimisers tell nobody: no layer may answer with what it has kept of these
        increment_version(self._learning)
        return self._loss.clone()

    def close(self) -> None:
        """Give the graph's memory back, the gradients of the last call with it; another call captures anew."""
        if self._replay is not None:
            self._recorder.close()
            _point(self._learning, [None] * len(self._learning))
            self._replay = self._gradients = self._batch = None

    def _capture(self, batch: Batch) -> None:
        before, device = [parameter.grad for parameter in self._parameters], self._parameters[0].device
        self._batch = {name: tensor.to(device, copy=True) for name, tensor in batch.items()}
        self._loss, self._recorder = torch.zeros((), device=device), Recorder()
        try:
            with own_stream(device):
                self._replay = self._recorder.record(self._run)
            self._learning = [parameter for parameter in self._parameters if parameter.grad is not None]
            self._gradients = [parameter.grad for parameter in self._learning]
        finally:
            _point(self._parameters, before)

    def _run(self) -> None:
        """What is captured: gradients are made, not added to, so that the graph need not empty them."""
        none = [None] * len(self._parameters)
        _point(self._parameters, none)
        self._loss.copy_(self._pass(self._batch))
        if not torch.cuda.is_current_stream_capturing():
            _point(self._parameters, none)
            torch.cuda.empty_cache()  # a capture takes as much again, of its own, and may free nothing


class ReplayedStep:
    """transformers' `Trainer.training_step` by replay; eager, after a warning, where it cannot be captured.

    Args:
        training_step: of the Trainer.
    """

    def __init__(self, training_step: Callable[..., Tensor]) -> None:
        self._eager = training_step
        self._replayed: ReplayedPass | None = None
        self._refused = False

    def __call__(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor) -> Tensor:
        """The loss []; the gradients are added to those of the model."""
        if self._refused:
            return self._eager(model, inputs, num_items)
        if self._replayed is None:
            self._replayed = ReplayedPass(
                lambda batch: self._eager(model, {name: batch[name] for name in inputs}, batch["num_items"]),
                model.parameters(),
            )  # fmt: skip
        try:
            return self._replayed({**inputs, "num_items": num_items})
        except (CaptureError, torch.OutOfMemoryError) as error:
            reason = str(error)  # not the error, whose traceback holds all that the pass has made
        warnings.warn(f"training kernel by kernel, several times slower: {reason}", stacklevel=2)
        self._refused, self._replayed = True, None
        gc.collect()
        torch.cuda.empty_cache()
        return self._eager(model, inputs, num_items)

    def close(self) -> None:
        """Give the graph's memory back."""
        if self._replayed is not None:
            self._replayed.close()


def _point(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
