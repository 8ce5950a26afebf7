"""What the grids of every experiment share: checking what is crossed, and the options of Resona that a row names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrm_recall.options import accepted_options
from lrm_recall.resona.layer import Resona


def check_axes(axes: Mapping[str, Any]) -> None:
    """Raise ValueError unless each of the axes, by name, lists at least one value."""
    for name, values in axes.items():
        if not values or isinstance(values, str):
            raise ValueError(f"{name} must list at least one value, got {values!r}")


def every_option(*given: Mapping[str, Any] | None) -> dict[str, Any]:
    """All options of Resona, so that a row says what each was: what is given last counts, the defaults least."""
    options = {name: option.default for name, option in accepted_options(Resona).items()}
    for each in given:
        options |= each or {}
    return options


def resona_layers(variant: str) -> list[int] | None:
    """Layers that a variant names, such as "resona0+2"; None for "base".

    Raises:
        ValueError: it is neither "base" nor "resona" and layers.
    """
    if variant == "base":
        return None
    layers = variant.removeprefix("resona").split("+")
    if not variant.startswith("resona") or not all(layer.isdecimal() for layer in layers):
        raise ValueError(f"a variant is 'base' or 'resona' and layers, such as 'resona0' or 'resona0+2', "
                         f"got {variant!r}")
    return [int(layer) for layer in layers]
