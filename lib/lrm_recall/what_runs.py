"""What runs each op on this machine, and why."""

from __future__ import annotations

import pandas as pd
import torch

from lrm_kernels import autotune
from lrm_recall.ops import attention_step  # noqa: F401  it adds itself to LIBRARY_OF
from lrm_recall.ops.dispatch import BACKEND_VARIABLE, LIBRARY_OF, backend, find_adapter


def backends(device: str | None = None) -> pd.DataFrame:
    """For each op: what runs it (`runs`) and the reason (`why`); the autotuning mode is in `.attrs`.

    Args:
        device: "cpu" or "cuda"; by default a GPU if there is one. Asking for "cuda" imports the libraries.

    Raises:
        ValueError: another device, or LRM_RECALL_BACKEND has a value that it cannot have.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    table = pd.DataFrame([(op, *_choice(op, device)) for op in LIBRARY_OF], columns=["op", "runs", "why"])
    table.attrs["autotune"] = autotune.mode()
    return table.set_index("op")


def _choice(op: str, device: str) -> tuple[str, str]:
    if device == "cpu":
        return "torch", "the libraries have kernels for a GPU only"
    if backend() == "torch":
        return "torch", f"{BACKEND_VARIABLE}=torch"
    adapter, why = find_adapter(op)
    return ("torch", why) if adapter is None else (why, "a kernel; what it cannot take runs in torch, with a warning")
