"""Peak memory of a piece of work: of the device when it runs on one, else of this process.

On a CPU nothing counts what tensors take, so the process's resident memory stands in for it, libraries
included (some 400 MB after `import torch`). Linux keeps a peak that can be reset; macOS only the peak since
the process began. Runs that share a process share its peak: what one of them reports is that of all since the last of
them began.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

_PROC = Path("/proc/self")


def reset_peak(device: torch.device) -> None:
    """Start measuring: later peaks count from here where the system allows it."""
    if device.type == "cuda":
        torch.cuda.init()  # there are no statistics to reset before
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox may forbid it: the peak then counts from the process's start
            (_PROC / "clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_mb(device: torch.device) -> float:
    """Peak memory in MB (10^6 bytes) since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "linux":
        line = next(line for line in (_PROC / "status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS
