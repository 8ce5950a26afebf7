"""What is timed, and how: wall-clock seconds with the device waited for, after runs that compile."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

_LONG = 5.0  # seconds; what took longer when warm is timed twice at most


def timed(work: Callable[[], float | None], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each repeat of `work`, which may return the seconds of the part that counts.

    On a GPU the first run compiles kernels and the second captures graphs, so two go before the first that counts; on
    a CPU one.
    """
    for _ in range(2 if device.type == "cuda" else 1):
        warm_up = _once(work, device)
    return [_once(work, device) for _ in range(min(repeats, 2) if warm_up > _LONG else repeats)]


def _once(work: Callable[[], float | None], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    part = work()
    wait(device)
    return time.perf_counter() - start if part is None else part


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor) -> None:
    """Read a prompt ids [1, T] into a cache; logits of its last token alone, as `generate` does."""
    model(input_ids=ids, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def decode(model: nn.Module, ids: Tensor, new_tokens: int) -> float:
    """Seconds that `generate` takes for `new_tokens` after the one that the prompt ids [1, T] itself gives."""
    clock = _Clock()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens + 1,
        stopping_criteria=StoppingCriteriaList([clock]),
    )  # fmt: skip
    wait(ids.device)
    return time.perf_counter() - clock.start


def train_step(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward over ids [1, T]; no optimiser."""
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


class _Clock(StoppingCriteria):
    """Never stops anything; remembers when the first token was there."""

    start: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        if self.start is None:
            wait(input_ids.device)
            self.start = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


_bandwidths: dict[str, float] = {}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy on a GPU, reads and writes counted; measured once a process."""
    name = str(device)
    if name not in _bandwidths:
        x = torch.empty(2**30, dtype=torch.uint8, device=device)
        y = torch.empty_like(x)

        def copy() -> None:
            y.copy_(x)

        _bandwidths[name] = 2 * x.numel() / min(_once(copy, device) for _ in range(10))
    return _bandwidths[name]
