"""How many pairs fit: the limit of linear algebra, what the GLA update reaches, and what trained models do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lrm_recall.figures.display import describe
from lrm_recall.figures.head_merging import CHANNELS, heads, pairs_of
from lrm_recall.figures.style import new_figure, theme
from lrm_recall.teach.head_merging import compare_controls, error_limit, measured_error

LOOKS = {  # heads -> colour, marker, line style: neighbours differ in all three
    8: ("#949494", "v", ":"), 4: ("#0173b2", "o", "-."), 2: ("#d55e00", "s", "--"), 1: ("#1a1a1a", "D", "-"),
}
BROKEN = 0.9  # recall below this counts as broken
_PAIRS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)


@cache
def _errors(num_heads: int) -> dict[int, float]:
    return {pairs: measured_error("best", pairs, num_heads, CHANNELS) for pairs in _PAIRS}


def capacity(history: Sequence[Mapping[str, Any]], num_heads: Sequence[int] = (4, 2, 1), marked: int = 16) -> Figure:
    """Left: the share of the values that is lost, limit and measurement. Right: the recall of trained models.

    Args:
        history: of `teach.merge_training.run_merging`.
        num_heads: models to draw, of LOOKS; those without a trained model stand on the left alone.
        marked: number of pairs to read off, 1 to 32.
    """
    curves = {number: {entry["pairs"]: entry["accuracy"] for entry in history
                       if entry["curve"] == "pairs" and entry["name"] == str(number)} for number in num_heads}
    with mpl.rc_context(theme()):
        figure = Figure(figsize=(7.0, 3.1))  # a layout engine takes half the time that a slider has
        left, right = figure.subplots(1, 2, sharex=True, gridspec_kw={"left": 0.075, "right": 0.985, "bottom": 0.24,
                                                                      "top": 0.925, "wspace": 0.19})
        for number in num_heads:
            colour, marker, line = LOOKS[number]
            limit = [error_limit(pairs, CHANNELS[0] // number) for pairs in range(1, 33)]
            left.plot(range(1, 33), limit, color=colour, linestyle=line, linewidth=1.4)
            measured = _errors(number)
            left.plot(list(measured), list(measured.values()), color=colour, marker=marker, markersize=4.5,
                      linestyle="none", markeredgewidth=0)
            if curve := curves[number]:
                right.plot(list(curve), list(curve.values()), color=colour, marker=marker, markersize=4.5,
                           linestyle=line, linewidth=1.2, markeredgewidth=0)
                _limit_mark(right, CHANNELS[0] // number, colour, marker)
        for axes in (left, right):
            axes.axvline(marked, color="#5c5c5c", linewidth=1.4, zorder=1)
            axes.set(xlabel="pairs stored", xlim=(0, 33), ylim=(-0.03, 1.06), xticks=[0, 4, 8, 16, 24, 32])
            sns.despine(ax=axes)
        right.axhline(BROKEN, color="#8c8c8c", linewidth=0.8, linestyle=":", zorder=0)
        at = ", ".join(f"{error_limit(marked, CHANNELS[0] // number):.2f}" for number in num_heads)
        left.set(title=f"values lost; limit at {pairs_of(marked)}: {at}", ylabel="share of the values lost")
        right.set(title="trained models: questions answered right", ylabel="accuracy")
        models = [Line2D([], [], color=LOOKS[n][0], linestyle=LOOKS[n][2], marker=LOOKS[n][1], markersize=5,
                         label=heads(n)) for n in num_heads]
        notes = [Line2D([], [], color="#4d4d4d", label="limit"),
                 Line2D([], [], color="#4d4d4d", linestyle="none", marker="o", markersize=5, label="measured")]
        figure.legend(handles=[*models, *notes], loc="lower center", ncols=6, frameon=False, handlelength=2.4)
    return describe(figure, _capacity_in_words(curves, num_heads, marked))


def pairs_before_break(curve: Mapping[int, float], level: float = BROKEN) -> int:
    """The largest measured number of pairs up to which recall never fell below the level; 0 if the first did."""
    held = 0
    for pairs, accuracy in sorted(curve.items()):
        if accuracy < level:
            break
        held = pairs
    return held


def capacity_markdown(row: Mapping[str, Any]) -> str:
    """A table of the trained models: parameters, state, the linear limit, and where their recall breaks.

    Args:
        row: with the `config`, `metrics` and `history` of `teach.merge_training.run_merging`.
    """
    lines = ["| heads | parameters | state | pairs without loss, limit | trained: recall 0.9 or above up to |",
             "|---|---|---|---|---|"]
    for number in row["config"]["heads"]:
        curve = {entry["pairs"]: entry["accuracy"] for entry in row["history"]
                 if entry["curve"] == "pairs" and entry["name"] == str(number)}
        lines.append(f"| {number} | {row['metrics'][f'parameters_{number}']:,} | {row['metrics'][f'state_{number}']} "
                     f"| {CHANNELS[0] // number} | {pairs_before_break(curve)} |")
    return "\n".join(lines)


def controls(num_heads: int = 4, num_pairs: int = 16) -> Figure:
    """The negative control: what is lost when the state grows but the cross terms do not come with it.

    Args:
        num_heads: of the layer that is merged.
        num_pairs: that are stored.
    """
    errors = compare_controls(CHANNELS, num_heads, num_pairs)
    whole = CHANNELS[0] * CHANNELS[1]
    rows = {
        f"{heads(num_heads)}, {whole // num_heads} numbers": errors["heads"],
        f"merged, {whole} numbers": errors["merged"],
        f"merged, cross terms masked, {whole} numbers": errors["masked"],
        f"one head's keys copied {num_heads} times, {whole} numbers": errors["copied"],
    }
    with mpl.rc_context(theme()):
        figure = new_figure(7.0, 1.75)
        axes = figure.subplots()
        bars = axes.barh(list(rows), list(rows.values()), height=0.62, edgecolor="#1a1a1a", linewidth=0.8,
                         color=["#9ec5e8", "#c1121f", "#ffffff", "#ffffff"])
        for bar, hatch in zip(bars, ("", "", "////", "xxx"), strict=True):
            bar.set_hatch(hatch)
        for index, error in enumerate(rows.values()):
            axes.text(error + 0.012, index, f"{error:.2f}", va="center")
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel=f"share of the values lost, {num_pairs} pairs")
        axes.grid(False, axis="y")
        sns.despine(ax=axes, left=True)
    lines = "; ".join(f"{name}: {error:.2f}" for name, error in rows.items())
    return describe(figure, f"Share of {num_pairs} values lost. {lines}.")


def _limit_mark(axes: Axes, pairs: int, colour: str, marker: str) -> None:
    """A mark on top of the panel where the linear limit of a model lies."""
    axes.plot([pairs], [1.045], marker=marker, markersize=6.5, markerfacecolor="none", markeredgecolor=colour,
              clip_on=False, linestyle="none")


def _capacity_in_words(curves: Mapping[int, Mapping[int, float]], num_heads: Sequence[int], marked: int) -> str:
    lines = []
    for number in num_heads:
        line = (f"{heads(number)}: nothing need be lost up to {CHANNELS[0] // number} pairs; at "
                f"{pairs_of(marked)} the limit is {error_limit(marked, CHANNELS[0] // number):.2f}")
        if curve := curves[number]:
            line += f"; the trained model stays at {BROKEN} or above up to {pairs_before_break(curve)} pairs"
        lines.append(line)
    return f"Left, share of the values lost against pairs; right, accuracy of trained models. {'. '.join(lines)}."
