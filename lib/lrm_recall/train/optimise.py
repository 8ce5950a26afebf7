"""The optimiser of small models and its learning rate over time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a small model is trained; what a value means is the same on every device.

    Raises:
        ValueError: a value out of its range.
    """

    learning_rate: float
    batch_size: int
    max_epochs: int
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warmup, over all max_epochs
    warmup: float = 0.0  # share of the steps over which the learning rate rises from zero
    final_rate: float = 0.0  # where the cosine ends, as a share of learning_rate
    weight_decay: float = 0.0  # of matrices; vectors are never decayed
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    max_grad_norm: float | None = 1.0  # None: gradients are not clipped
    target_accuracy: float | None = None  # of validation: stop after the epoch that reaches it; None: never
    seed: int = 0  # of the order of the examples
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # tf32: of a GPU's matrix products; bf16: see `Learner`

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a finite number above zero, got {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number, zero or above, got {self.weight_decay}")
        if self.target_accuracy is not None and not 0 < self.target_accuracy <= 1:
            raise ValueError(f"target_accuracy must lie in (0, 1] or be None, got {self.target_accuracy}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps, 0 or more and below 1, got {self.warmup}")
        if not 0 <= self.final_rate <= 1:
            raise ValueError(f"final_rate is a share of learning_rate, from 0 to 1, got {self.final_rate}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above zero or None, got {self.max_grad_norm}")
        for name, allowed in (("schedule", ("cosine", "constant")), ("precision", ("fp32", "tf32", "bf16"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def rate(self, done: float) -> float:
        """The learning rate when a share `done` of the steps is over."""
        return self.learning_rate * self._share(done)

    def _share(self, done: float) -> float:
        """Linear up; then one, or half a cosine down to `final_rate`."""
        if done < self.warmup:
            return done / self.warmup
        if self.schedule == "constant":
            return 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))
        return self.final_rate + (1 - self.final_rate) * cosine

    def steps_per_epoch(self, num_train: int) -> int:
        """Batches of an epoch, the last one as small as it comes."""
        return -(-num_train // self.batch_size)


def make_optimizer(model: nn.Module, settings: FitSettings, rate: Tensor | None = None) -> torch.optim.Optimizer:
    """AdamW, matrices decayed and vectors not; fused takes a third of foreach's time on a CPU too.

    Args:
        rate: [] fp32 on the model's device: the learning rate is read from there at every step, and nothing of a step
            depends on the host, so that it can be captured. None: the caller sets the groups' `lr`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True,
        capturable=rate is not None,
    )
    if rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate
    return optimizer
