"""Sliders over a pure function that returns a figure. Nothing else is interactive here.

A notebook calls `explore` only where its parameter INTERACTIVE is true: papermill can hang on a widget, so a batch run
never makes one, and the static figures tell the same story.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
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
            when low is an int), or a list of the values to choose among. A slider starts at the default of that
            argument, or where it has none at its first value.

    Returns:
        The widget; its `children` are the sliders, in the order of the controls, and the output.

    Raises:
        ValueError: a control is neither, or its argument's default is not among its values.
    """
    start = {name: argument.default for name, argument in signature(draw).parameters.items()
             if argument.default is not Parameter.empty}
    sliders = {name: _slider(name, of, start.get(name, of[0] if of else None)) for name, of in controls.items()}
    gc.collect()
    gc.freeze()  # what a walkthrough has made so far stays: searching it for garbage takes several redraws' time
    box = interactive(lambda **values: show(draw(**values)), **sliders)
    display(box)
    return box


def _slider(name: str, values: Sequence[Any], start: Any) -> Widget:
    label = {"description": name.replace("_", " "), "style": {"description_width": "initial"}}
    if isinstance(values, list) and start in values:
        return SelectionSlider(options=values, value=start, **label)
    if isinstance(values, tuple) and len(values) in (2, 3) and values[0] <= start <= values[1]:
        kind = IntSlider if isinstance(values[0], int) else FloatSlider
        low, high, *step = values
        return kind(value=start, min=low, max=high, **({"step": step[0]} if step else {}), **label)
    raise ValueError(f"{name} must be (low, high), (low, high, step) or a list of values, and begin at one of them; "
                     f"got {values!r}, to begin at {start!r}")
