"""How much time Triton may spend on choosing launch configurations.

A tuned kernel is compiled and timed in every configuration that its author listed, once for each shape. For the few
hundred kernels of flash-linear-attention and mamba-ssm that is minutes before the first step. Three modes:

    quick    one configuration a kernel, the one nearest to 4 warps, 2 stages and blocks of 64; the default
    shipped  the configurations that we measured (lrm_kernels/tuned/*.json), quick for everything else
    full     what the library does itself: minutes, and the best configuration for this very shape

The mode is the environment variable LRM_KERNELS_AUTOTUNE. It must stand before the first kernel is defined, since that
is when a kernel's configurations are trimmed; lrm_recall applies it before it imports a library.
"""

from __future__ import annotations

import functools
import json
import os
import weakref
from pathlib import Path
from typing import Any

VARIABLE = "LRM_KERNELS_AUTOTUNE"
MODES = ("quick", "shipped", "full")
TUNED = Path(__file__).parent / "tuned"

_WARPS, _STAGES, _BLOCK = 4, 2, 64  # what a quick configuration is nearest to
_tuners: weakref.WeakSet = weakref.WeakSet()  # every tuned kernel defined since `apply`


def mode() -> str:
    """The mode that LRM_KERNELS_AUTOTUNE names.

    Raises:
        ValueError: it is none of MODES.
    """
    value = os.environ.get(VARIABLE, "quick")
    if value not in MODES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(MODES)}, got {value!r}")
    return value


@functools.cache
def apply() -> str:
    """Make every kernel that Triton tunes from now on follow the mode; the mode. Without Triton, nothing happens."""
    chosen = mode()
    try:
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.errors import OutOfResources
    except ImportError:
        return chosen
    define, run = Autotuner.__init__, Autotuner.run

    @functools.wraps(define)
    def define_trimmed(self: Any, *args: Any, **kwargs: Any) -> None:
        define(self, *args, **kwargs)
        _tuners.add(self)
        if chosen != "full":
            _trim(self, shipped() if chosen == "shipped" else {})

    @functools.wraps(run)
    def run_trimmed(self: Any, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return run(self, *args, **kwargs)
            except OutOfResources:
                if not self.spare:  # nothing smaller is listed
                    raise
                self.configs = [self.spare.pop(0)]

    Autotuner.__init__ = define_trimmed
    if chosen != "full":
        Autotuner.run = run_trimmed
    return chosen


def distance(config: Any) -> tuple[int, ...]:
    """How far a triton.Config is from the quick one; the first of the nearest is taken."""
    blocks = [value for value in config.kwargs.values() if isinstance(value, int) and value > 0]
    off = sum(abs(value.bit_length() - _BLOCK.bit_length()) for value in blocks)
    return (off + abs(config.num_warps.bit_length() - _WARPS.bit_length()), abs(config.num_stages - _STAGES))


def _trim(tuner: Any, tuned: dict[str, dict]) -> None:
    """Leave a kernel its one configuration; the others wait for a shape in which it needs too much shared memory."""
    tuner.spare = sorted(tuner.configs, key=distance)
    measured = tuned.get(kernel_name(tuner))
    if measured is not None:
        tuner.spare.sort(key=lambda config: describe(config) != measured)
    tuner.configs = [tuner.spare.pop(0)]


def kernel_name(tuner: Any) -> str:
    """The name of the function that an Autotuner, or a decorator around it, launches."""
    function = tuner.fn
    while hasattr(function, "fn"):
        function = function.fn
    return function.__name__


def describe(config: Any) -> dict[str, Any]:
    """A triton.Config as JSON holds it."""
    return {"kwargs": dict(config.kwargs), "num_warps": config.num_warps, "num_stages": config.num_stages}


@functools.cache
def shipped() -> dict[str, dict]:
    """The measured configuration of each kernel, by name, for this GPU's compute capability; none were for others."""
    import torch

    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    path = TUNED / f"sm_{major}{minor}.json"
    return json.loads(path.read_text())["kernels"] if path.exists() else {}


def measured() -> dict[str, dict]:
    """In mode `full`: for each kernel tuned so far, the configuration that won for most of its shapes."""
    best: dict[str, dict] = {}
    for tuner in _tuners:
        wins: dict[str, int] = {}
        for config in tuner.cache.values():
            text = json.dumps(describe(config), sort_keys=True)
            wins[text] = wins.get(text, 0) + 1
        if wins:
            best[kernel_name(tuner)] = json.loads(max(sorted(wins), key=wins.__getitem__))
    return dict(sorted(best.items()))
