"""Sliders over a pure function that returns a figure. Nothing else is interactive here.

A notebook calls `explore` only where its parameter INTERACTIVE is true: papermill can hang on a widget, so a batch run
never makes one, and the static figures tell the same story.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from IPython.display import display
from ipywidgets import FloatSlider, IntSlider, SelectionSlider, Widget, interactive
from matplotlib.figure import Figure

from lrm_recall.figures.display import show


def explore(draw: Callable[..., Figure], **controls: Sequence[Any]) -> interactive:
    """Show `draw(**values)` below one slider for each control, and draw again when one moves.

    Args:
        draw: a pure function of the controls' values.
        controls: for each argument of `draw`, (low, high) or (low, high, step) for a slider over numbers (whole ones
            when low is an int), or a list of the values to choose among. A slider starts at its first value.

    Returns:
        The widget; its `children` are the sliders, in the order of the controls, and the output.

    Raises:
        ValueError: a control is neither.
    """
    box = interactive(lambda **values: show(draw(**values)), **{name: _slider(name, of) for name, of in
                                                                controls.items()})
    display(box)
    return box


def _slider(name: str, values: Sequence[Any]) -> Widget:
    label = {"description": name.replace("_", " "), "style": {"description_width": "initial"}}
    if isinstance(values, list) and values:
        return SelectionSlider(options=values, **label)
    if isinstance(values, tuple) and len(values) in (2, 3):
        kind = IntSlider if isinstance(values[0], int) else FloatSlider
        low, high, *step = values
        return kind(value=low, min=low, max=high, **({"step": step[0]} if step else {}), **label)
    raise ValueError(f"{name} must be (low, high), (low, high, step) or a list of values, got {values!r}")
