"""Accuracy against the size of the recurrent state: whether recall is bought with state or with retrieval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lrm_recall.figures.display import describe
from lrm_recall.figures.mqar_cells import mqar_cells
from lrm_recall.figures.style import in_order, legend, mark, model_handles, new_figure, theme, variant_name


def mqar_state(rows: pd.DataFrame, profile: str, resona: Mapping[str, Any] | None = None) -> Figure:
    """One column a length; state elements of one sequence (log scale) against accuracy, one point a cell.

    Filled points have Resona, hollow ones are base models. The state is the mixers' alone: what Resona keeps
    (the token ids and one embedding a chunk) grows with the sequence and is no recurrent state.

    Args:
        rows: result rows.
        profile: whose rows.
        resona: the Resona options to draw, see `mqar_cells.mqar_runs`.

    Raises:
        ValueError: no such rows.
    """
    cells = mqar_cells(rows, resona)
    cells = cells[cells["profile"] == profile]
    if cells.empty:
        raise ValueError(f"no MQAR rows of profile {profile!r}")
    mixers, lengths = in_order(cells["mixer"]), sorted(cells["length"].unique())
    with mpl.rc_context(theme()):
        figure = new_figure(2.7 * len(lengths) + 1.6, 2.9)
        grid = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
        for length, axes in zip(lengths, grid, strict=True):
            for cell in cells[cells["length"] == length].to_dict("records"):
                look, base = mark(cell["mixer"]), cell["variant"] == "base"
                axes.plot(cell["state_size"], cell["accuracy"], marker=look.marker, linestyle="none", markersize=7,
                          color=look.colour, markerfacecolor="none" if base else look.colour, alpha=0.85)
            axes.set_xscale("log", base=2)
            axes.set_xlim(*_powers_of_two_around(cells["state_size"]))
            axes.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep="", places=0))
            axes.set(xlabel="state elements a sequence", ylim=(-0.05, 1.08), yticks=[0, 0.5, 1],
                     title=f"length {length}")
            sns.despine(ax=axes)
        grid[0].set_ylabel("accuracy")
        grey = {"color": "#4d4d4d", "marker": "o", "linestyle": "none", "markersize": 6}
        legend(figure, {"Model": model_handles(mixers),
                        "Variant": [Line2D([], [], label="base model", markerfacecolor="none", **grey),
                                    Line2D([], [], label="with Resona", **grey)]})
        figure.suptitle("Accuracy against the size of the recurrent state", x=0.01, ha="left")
    lines = [f"{mark(cell['mixer']).name} {variant_name(cell['variant'])}, length {cell['length']}: "
             f"{int(cell['state_size'])} elements, {cell['accuracy']:.3f}" for cell in cells.to_dict("records")]
    return describe(figure, f"Accuracy against elements of recurrent state. {'; '.join(lines)}.")


def _powers_of_two_around(sizes: pd.Series) -> tuple[float, float]:
    """Limits of the axis: the powers of two at or beyond the sizes, with a little room."""
    low, high = math.floor(math.log2(sizes.min())), math.ceil(math.log2(sizes.max()))
    return 2 ** (low - 0.4), 2 ** (high + 0.4)
