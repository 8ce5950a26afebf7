"""Seeing what the Resona layers of a model retrieve while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from lrm_recall.resona.layer import Resona, Retrieval


@contextlib.contextmanager
def watched(layers: Mapping[int, Resona]) -> Iterator[dict[int, Retrieval]]:
    """What each layer searches for in the calls of this block, by its number; the last call counts.

    The search runs once more for it, and what a call is handed (`chunk_indices`) is what it shows.
    """
    found: dict[int, Retrieval] = {}

    def watch(index: int, layer: Resona) -> Any:
        def before(_: Any, arguments: tuple) -> None:
            found[index] = layer.retrieve(*arguments)

        return layer.register_forward_pre_hook(before)

    hooks = [watch(index, layer) for index, layer in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
