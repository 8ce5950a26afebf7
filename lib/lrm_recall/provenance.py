"""Where a result comes from: machine, code, versions. Works outside git and without torch.

`machine()` goes into every row of results; `snapshot()` into every executed notebook.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "pandas", "distributed", "papermill")


def machine() -> dict[str, Any]:
    """This machine, for a row: name, cpu, cores, device, python, torch, commit."""
    return {
        "name": platform.node(),
        "cpu": cpu_name(),
        "cores": core_count(),
        "device": device_name(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "commit": commit(),
    }


def snapshot() -> dict[str, Any]:
    """Here and now: `machine()`, the operating system, versions of the libraries, the time."""
    return {
        **machine(),
        "system": platform.platform(),
        "versions": {name: version(name) for name in PACKAGES},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe(snapshot: dict[str, Any], **extra: object) -> str:
    """A snapshot as a few lines for a notebook's provenance cell; `extra`, such as seed=0, comes last."""
    lines = {
        "commit": snapshot["commit"] or "not in git",
        "machine": f"{snapshot['cpu']}, {snapshot['cores']} cores, device {snapshot['device']}",
        "system": f"{snapshot['system']}, Python {snapshot['python']}",
        "versions": ", ".join(f"{name} {v}" for name, v in snapshot["versions"].items() if v),
        "date": snapshot["created"],
        **extra,
    }
    return "\n".join(f"{name:<9} {value}" for name, value in lines.items())


def version(package: str) -> str | None:
    """Version of an installed package, found without importing it; None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def core_count() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def cpu_name() -> str:
    """The processor's marketing name, or its architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    elif sys.platform == "darwin" and (name := _output("sysctl", "-n", "machdep.cpu.brand_string")):
        return name
    return platform.processor() or platform.machine()


def device_name() -> str:
    """Name of the accelerator, or "cpu". Where torch has not been imported nothing can have used one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "cpu"


@functools.cache
def commit() -> str | None:
    """Commit of the checkout that holds this file, "-dirty" added when its code differs; None outside git.

    Outputs are left out of the comparison: the rows of a run must not make the next run's commit dirty.
    """
    here = Path(__file__).resolve()
    root = _output("git", "-C", str(here.parent), "rev-parse", "--show-toplevel")
    if not root or not _output("git", "-C", root, "ls-files", str(here)):
        return None  # in no checkout, or installed somewhere inside another project's
    name = _output("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    if name is None:
        return None  # nothing is committed yet
    changes = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no", "--", ":!outputs")
    return f"{name}-dirty" if changes else name


def _output(*command: str) -> str | None:
    """What a program prints, without the blanks around it; None when it fails or is not there."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
