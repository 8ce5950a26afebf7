"""Mamba2's wider state (the right half of StateX's Figure 2, computed), and the gradient its new rows get."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lrm_recall.figures.display import describe
from lrm_recall.figures.head_merging import NEW, OLD
from lrm_recall.figures.style import new_figure, theme
from lrm_recall.teach.widened_state import FACTOR, Widened

NAMES = {"zero_B": "only B zero", "zero_C": "only C zero", "zero_both": "both zero"}


def widened_state(found: Mapping[str, Widened]) -> Figure:
    """Above, the state after a text for each start of the new rows; below, the gradient on the new rows of B and C.

    Args:
        found: start -> what `teach.widened_state.try_start` found.
    """
    top = max(each.state.abs().max().item() for each in found.values()) ** 0.5
    most = max(max(each.gradient) for each in found.values())
    with mpl.rc_context(theme()):
        figure = new_figure(7.0, 3.6)
        grid = figure.subplots(2, len(found), sharey="row", height_ratios=(1.9, 1))
        for (start, each), above, below in zip(found.items(), *grid, strict=True):
            shown = each.state.abs().sqrt()  # the square root lets small values show
            rows, columns = shown.shape
            old = rows // FACTOR
            is_old = (torch.arange(rows) < old).unsqueeze(1).expand(rows, columns)
            for colour, cells in ((OLD, is_old), (NEW, ~is_old)):
                shades = mpl.colors.LinearSegmentedColormap.from_list("shades", ["#ffffff", colour])
                above.imshow(torch.where(cells, shown, float("nan")).numpy(), cmap=shades, vmin=0, vmax=top,
                             extent=(0, columns, rows, 0), interpolation="nearest", aspect="auto")
            above.add_patch(Rectangle((0, 0), columns, old, fill=False, edgecolor="#1a1a1a", linewidth=1.6))
            empty = not each.state[old:].any()
            if empty:
                above.add_patch(Rectangle((0, old), columns, rows - old, facecolor="#f8f8f8", edgecolor="#c4c4c4",
                                          hatch="////", linewidth=0))
            above.text(columns / 2, (old + rows) / 2, "not written" if empty else "written, not read", ha="center",
                       va="center", bbox={"facecolor": "white", "edgecolor": "#8c8c8c", "boxstyle": "round"})
            above.set(xticks=[], yticks=[0, old, rows], title=NAMES[start], xlabel=f"{columns} value channels")
            above.grid(False)
            below.barh(["B", "C"], each.gradient, color="#9ec5e8", edgecolor="#1a1a1a", linewidth=0.8, height=0.6)
            for row, size in enumerate(each.gradient):
                below.text(size + 0.03 * most, row, f"{size:.3f}" if size else "0 exactly", va="center")
            below.set(xlim=(0, 1.45 * most), xlabel="gradient on the new rows", xticks=[])
            below.grid(False)
        grid[1, 0].invert_yaxis()
        grid[0, 0].set_ylabel("key channels of the state")
    lines = "; ".join(f"{NAMES[start]}: largest change of a logit {each.function_change:.1g}, gradient on B "
                      f"{each.gradient[0]:.3f}, on C {each.gradient[1]:.3f}" for start, each in found.items())
    return describe(figure, f"The state of a Mamba2 layer with {FACTOR} times the key channels, old rows framed, new "
                            f"ones below, for three starts of the new rows, and the gradient these get. {lines}.")


def widened_state_markdown(found: Mapping[str, Widened]) -> str:
    """A table of the starts: what the surgery did to the function, and what a few steps of training did to the rows.

    Args:
        found: start -> what `teach.widened_state.try_start` found.
    """
    lines = ["| new rows | largest change of a logit | gradient on B | on C | B has moved by | C by |",
             "|---|---|---|---|---|---|"]
    for start, each in found.items():
        numbers = (each.function_change, *each.gradient, *each.moved)
        lines.append(" | ".join([f"| {NAMES[start]}", *(f"{number:.3f}" if number else "0" for number in numbers)])
                     + " |")
    return "\n".join(lines)
