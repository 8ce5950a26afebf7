"""Which device a sweep may use: asked before it starts, because a run that dies of a missing device is a failed row."""

from __future__ import annotations

import torch


def usable_device(name: str) -> str:
    """`name`, if tensors can be made there.

    Raises:
        ValueError: no such device on this machine.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        allowed = ["cpu", *([found.type] if found else [])]
        raise ValueError(f"device {name!r} is not available here; allowed: {', '.join(allowed)}") from None
    return name
