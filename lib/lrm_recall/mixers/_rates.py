"""The decay rates A = -exp(A_log) of Mamba's layers, computed again only when A_log has changed."""

from __future__ import annotations

import torch
from torch import Tensor


class Rates:
    """Keeps A [...] fp32 of a parameter between calls without gradients: a decoded token has no time for three kernels.

    A CUDA graph that was captured with the kept values is of no use after the parameter has changed; the fingerprint in
    lrm_recall.decode sees to that.

    Known: torch's fused optimisers, transformers' default among them, change A_log without counting it in `_version`.
    A model that was scored before such a step is then scored with the rates of before, until it is loaded anew or
    `torch.autograd.graph.increment_version(model.parameters())` is called.
    """

    def __init__(self) -> None:
        self._kept: Tensor | None = None
        self._of: tuple[int, int] | None = None

    def __call__(self, A_log: Tensor) -> Tensor:
        if torch.is_grad_enabled() or A_log.is_inference():
            return -A_log.float().exp()
        now = (A_log.data_ptr(), A_log._version)
        if self._kept is None or self._of != now:
            self._kept, self._of = -A_log.float().exp(), now
        return self._kept
