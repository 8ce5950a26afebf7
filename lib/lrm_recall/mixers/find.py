"""Finding a mixer by its name: `lrm_recall.mixers.<name>` exposes its class as `MIXER`; there is no table to keep."""

from __future__ import annotations

import importlib
import pkgutil

import lrm_recall.mixers
from lrm_recall.mixers.base import Mixer
from lrm_recall.options import did_you_mean

_HELPERS = {"base", "find"}  # modules beside the mixers that are not mixers


def mixer_names() -> list[str]:
    """Every value that `RecurrentLMConfig.mixer` may take."""
    modules = pkgutil.iter_modules(lrm_recall.mixers.__path__)
    return sorted(m.name for m in modules if m.name not in _HELPERS and not m.name.startswith("_"))


def mixer_class(name: str) -> type[Mixer]:
    """The class of the mixer called `name`.

    Raises:
        ValueError: there is no such mixer.
    """
    names = mixer_names()
    if name not in names:
        raise ValueError(f"unknown mixer {name!r}{did_you_mean(name, names)}; available: {', '.join(names)}")
    return importlib.import_module(f"lrm_recall.mixers.{name}").MIXER
