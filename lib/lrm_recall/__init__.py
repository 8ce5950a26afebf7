"""Recall in linear recurrent language models: Resona, StateX and the mixers they build on.

The public names are imported when first used: the command line reads parameter files without waiting for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "RecurrentLM": "lrm_recall.model",
    "RecurrentModel": "lrm_recall.model",
    "RecurrentLMConfig": "lrm_recall.config",
    "RecurrentCache": "lrm_recall.cache",
    "backends": "lrm_recall.what_runs",
    "Resona": "lrm_recall.resona.layer",
    "Retrieval": "lrm_recall.resona.layer",
    "Size": "lrm_recall.statex.surgery",
    "choose_layers": "lrm_recall.statex.choose",
    "expand_state": "lrm_recall.statex.surgery",
    "merge_heads": "lrm_recall.statex.surgery",
    "widen_state": "lrm_recall.statex.surgery",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lrm_recall' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
