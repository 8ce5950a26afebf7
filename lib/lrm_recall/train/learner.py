"""A model that learns: one step of training and its answers, in the precision that is asked for.

B batch, P questions of an example, V vocabulary size
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrm_recall.train.batches import IGNORE, Split
from lrm_recall.train.optimise import FitSettings, make_optimizer

Logits = Callable[[nn.Module, Split], Tensor]  # of the questions of a batch: [B * P, V]


class Learner:
    """A model, its optimiser, and with precision "bf16" the copy in bfloat16 that computes in its place.

    With such a copy the parameters themselves, their gradients' norm and the optimiser's states stay fp32: after every
    step the copy takes the new values, rounded. What makes a filter out of its lags stays fp32 in the copy too, since
    bfloat16 cannot tell 255/256 from 1: modules one of whose parts holds constants, or with an attribute `in_fp32`.

    Args:
        settings: how to train.
        model: what; its parameters are changed.
        logits: of the questions of a batch, from a model and the batch.
        rate: as for `make_optimizer`.
    """

    def __init__(self, settings: FitSettings, model: nn.Module, logits: Logits, rate: Tensor | None = None) -> None:
        self.optimizer = make_optimizer(model, settings, rate)
        self._logits, self._max_grad_norm = logits, settings.max_grad_norm
        self._learns, self._copies = list(model.parameters()), []
        self._computes = model
        if settings.precision == "bf16":
            self._computes = _in_bf16(model)
            self._copies = list(self._computes.parameters())

    def descend(self, batch: Split) -> Tensor:
        """One step of training; the mean loss of the batch's questions, detached."""
        self._computes.train()
        loss = F.cross_entropy(self._logits(self._computes, batch).float(), batch.answers.flatten(),
                               ignore_index=IGNORE)  # fmt: skip
        self._computes.zero_grad()
        loss.backward()
        for parameter, copied in zip(self._learns, self._copies, strict=False):  # no copies, no pairs
            parameter.grad = None if copied.grad is None else copied.grad.float()
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._learns, self._max_grad_norm)
        self.optimizer.step()
        self.renew()
        return loss.detach()

    @torch.no_grad()
    def answer(self, batch: Split) -> Tensor:
        """Logits of the batch's questions, fp32 [B * P, V]."""
        self._computes.eval()
        return self._logits(self._computes, batch).float()

    @torch.no_grad()
    def renew(self) -> None:
        """Let the copy have the parameters as they are."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._learns)

    def parameters(self) -> list[nn.Parameter]:
        """All that a step changes, the copy's too."""
        return [*self._learns, *self._copies]


def _in_bf16(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model).to(torch.bfloat16)
    for original, module in zip(model.modules(), copied.modules(), strict=True):
        parts = original.children()
        constants = [buffer for part in parts for buffer in part.buffers(recurse=False) if buffer.is_floating_point()]
        if constants or getattr(original, "in_fp32", False):
            module.float().load_state_dict(original.state_dict())
    return copied
