"""Which code runs an op: its torch form, or on a GPU the kernel of a library. The one place where that is decided.

`gla = dispatched("gla", gla_chunked)` makes the op that mixers call. For tensors on a CPU it is the torch form. On a
CUDA device it is the adapter of the same name in `lrm_recall.ops.libraries`, which hands the arguments to a library's
kernel; where the library is missing or cannot take these shapes, the torch form runs and one warning says why.

The environment variable LRM_RECALL_BACKEND forces the choice: `torch` (never a library), `library` (an error where a
library cannot run) or `auto`, the default.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BACKEND_VARIABLE = "LRM_RECALL_BACKEND"
BACKENDS = ("auto", "torch", "library")


@dataclass(frozen=True)
class Library:
    """A package with GPU kernels.

    Attributes:
        package: its name on PyPI.
        adapters: our module that hands our arguments to its functions; importing it imports the library.
    """

    package: str
    adapters: str

    @property
    def install(self) -> str:
        """The command that makes it available."""
        return f"pip install {self.package}"


OWN = Library("triton", "lrm_recall.ops.libraries.own")
FLA = Library("flash-linear-attention", "lrm_recall.ops.libraries.fla")
MAMBA_SSM = Library("mamba-ssm", "lrm_recall.ops.libraries.mamba_ssm")
CAUSAL_CONV1D = Library("causal-conv1d", "lrm_recall.ops.libraries.causal_conv1d")

# What runs each op on a GPU; an op that is not here has its torch form alone.
LIBRARY_OF: dict[str, Library] = {
    "gla": FLA,
    "delta_rule": FLA,
    "gated_delta_rule": FLA,
    "retention": FLA,
    "rwkv5": FLA,
    "ssd": MAMBA_SSM,
    "selective_scan": MAMBA_SSM,
    "short_conv": CAUSAL_CONV1D,
    "rms_norm": FLA,
    "layer_norm": FLA,
    "add_rms_norm": FLA,
    "gated_rms_norm": FLA,
    "rms_norm_of_gated": MAMBA_SSM,
    "rotate": FLA,
    "linears": OWN,
    "long_conv": OWN,
    "rwkv4": OWN,
    "swiglu": FLA,
    "cross_entropy": FLA,
    "chunk_search": OWN,
    "chunk_attention": OWN,
    "unit_rows": OWN,
    "pool_chunks": OWN,
    "gate_weights": OWN,
    "mix_retrieved": OWN,
}


# What a library can do in one call, in the place of several ops that have kernels of their own.
FUSIONS: dict[str, Library] = {
    "mamba_inner": MAMBA_SSM, "mamba2_inner": MAMBA_SSM, "resona_step": OWN, "memory_norm": OWN,
}


class Unsupported(Exception):
    """An adapter raises this, before it does anything, for arguments that its kernel cannot take; the text says why."""


def backend() -> str:
    """The value of LRM_RECALL_BACKEND.

    Raises:
        ValueError: it is none of `auto`, `torch` and `library`.
    """
    value = os.environ.get(BACKEND_VARIABLE, "auto")
    if value not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE} must be one of {', '.join(BACKENDS)}, got {value!r}")
    return value


@functools.cache
def find_adapter(op: str) -> tuple[Callable | None, str]:
    """The function that hands `op` to a library, or None; and why."""
    library = LIBRARY_OF.get(op) or FUSIONS.get(op)
    if library is None:
        return None, "no library has a kernel for it"
    try:
        module = importlib.import_module(library.adapters)
    except ImportError as error:
        return None, f"{library.package} cannot be imported ({error}); {library.install}"
    return getattr(module, op), library.package


def dispatched(op: str, torch_form: Callable) -> Callable:
    """The op: its torch form on a CPU, a library's kernel on a GPU.

    Args:
        op: its name in LIBRARY_OF and in the library's module of adapters.
        torch_form: takes the same arguments; its first is a tensor, whose device decides.
    """

    @functools.wraps(torch_form)
    def run(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not x.is_cuda or backend() == "torch":
            return torch_form(x, *args, **kwargs)
        adapter, why = find_adapter(op)
        if adapter is not None:
            try:
                return adapter(x, *args, **kwargs)
            except Unsupported as reason:
                why = f"{LIBRARY_OF[op].package} cannot take this call: {reason}"
        _fall_back(op, why)
        return torch_form(x, *args, **kwargs)

    run.__name__ = run.__qualname__ = op
    return run


def fusion(name: str, x: Any) -> Callable | None:
    """A library's one call for several ops on x's device, or None where it has to be the ops one by one."""
    return find_adapter(name)[0] if x.is_cuda and backend() != "torch" else None


def _fall_back(op: str, why: str) -> None:
    """Refuse, or warn once, that the torch form of an op has to do."""
    if backend() == "library":
        raise RuntimeError(f"{BACKEND_VARIABLE}=library, but for {op} {why}")
    _warn_once(f"{op} runs in torch on the GPU, many times slower than a kernel would: {why}")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)
