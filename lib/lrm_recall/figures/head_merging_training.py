"""What merging does to a trained model: before any training, and while it trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.figure import Figure

from lrm_recall.figures.display import describe
from lrm_recall.figures.style import new_figure, theme

ARMS = {  # arm -> name, colour, marker, line style
    "reinitialise": ("merged, re-initialised", "#1a1a1a", "D", "-"),
    "inherit": ("merged, inherited", "#d55e00", "s", "--"),
    "keep": ("heads kept", "#0173b2", "o", "-."),
}


def function_change(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Before any training: how far the layer's output moves, and what is left of recall.

    Args:
        history: of `teach.merge_training.run_merging`.
    """
    changes = {entry["name"]: (entry["change"], entry["accuracy"]) for entry in history
               if entry["curve"] == "ingredients"}
    panels = ("layer's output moves by", "questions answered right")
    with mpl.rc_context(theme()):
        figure = new_figure(7.0, 1.95)
        for index, (axes, title) in enumerate(zip(figure.subplots(1, 2, sharey=True), panels, strict=True)):
            numbers = [pair[index] for pair in changes.values()]
            axes.barh(list(changes), numbers, height=0.62, color="#9ec5e8" if index else "#f2b8a0",
                      edgecolor="#1a1a1a", linewidth=0.8)
            for row, number in enumerate(numbers):
                axes.text(number + 0.015 * (1.3 if index == 0 else 1), row, f"{number:.3f}", va="center")
            axes.set(title=title, xlim=(0, 1.35 if index == 0 else 1))
            axes.grid(False, axis="y")
            sns.despine(ax=axes, left=True)
        axes.invert_yaxis()
    lines = "; ".join(f"{name}: output moves by {change:.3f} of its length, accuracy {accuracy:.3f}"
                      for name, (change, accuracy) in changes.items())
    return describe(figure, f"What each ingredient of a merge does before any training. {lines}.")


def arms(history: Sequence[Mapping[str, Any]], pairs: int) -> Figure:
    """Three ways to go on with a trained model, all with the same budget: recall while it trains, and recall after.

    Args:
        history: of `teach.merge_training.run_merging`.
        pairs: the number that training uses, marked on the right.
    """
    lines = []
    with mpl.rc_context(theme()):
        figure = new_figure(7.0, 3.0)
        left, right = figure.subplots(1, 2, sharey=True)
        for arm, (name, colour, marker, line) in ARMS.items():
            look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4.5, "linewidth": 1.3,
                    "markeredgewidth": 0}
            steps = {e["step"]: e["accuracy"] for e in history if e["curve"] == "steps" and e["name"] == arm}
            after = {e["pairs"]: e["accuracy"] for e in history if e["curve"] == "pairs" and e["name"] == arm}
            left.plot(list(steps), list(steps.values()), label=name, **look)
            right.plot(list(after), list(after.values()), **look)
            lines.append(f"{name}: {steps[0]:.2f} at once, {steps[max(steps)]:.2f} after {max(steps)} steps")
        left.set(title=f"while training on, {pairs} pairs", xlabel="steps after the surgery", ylabel="accuracy",
                 ylim=(-0.03, 1.05))
        right.set(title="afterwards", xlabel="pairs stored", xticks=[0, 4, 8, 16, 24, 32])
        right.axvline(pairs, color="#8c8c8c", linewidth=0.8, zorder=0)
        for axes in (left, right):
            sns.despine(ax=axes)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, handlelength=2.6)
    return describe(figure, f"Accuracy of one trained model that goes on in three ways. {'; '.join(lines)}.")


def arms_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the three ways to go on: recall at once and at the end, and the first step that beats the old model.

    Args:
        rows: one a seed, with the `config` and `history` of `teach.merge_training.run_merging`.
    """
    lines = ["| seed | the layer | recall at once | at the end | better than the old model after |",
             "|---|---|---|---|---|"]
    for row in rows:
        curves = {arm: {e["step"]: e["accuracy"] for e in row["history"] if e["curve"] == "steps" and e["name"] == arm}
                  for arm in ARMS}
        for arm, curve in curves.items():
            better = next((f"{step} steps" for step, now in curve.items() if now > curves["keep"][0]), "never")
            lines.append(f"| {row['config']['seed']} | {ARMS[arm][0]} | {curve[0]:.3f} | {curve[max(curve)]:.3f} "
                         f"| {better} |")
    return "\n".join(lines)
