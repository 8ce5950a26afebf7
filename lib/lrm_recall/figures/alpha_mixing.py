"""Figures of the alpha-mixing walkthrough: accuracy and branch norms at one alpha, learned alphas, and the control.

Pure functions of numbers that `lrm_recall.teach.alpha_mixing` computes; a slider calls the same ones. The mixer's own
branch is filled, retrieval is hatched, so that nothing rests on colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from lrm_recall.figures.display import describe
from lrm_recall.figures.style import theme

if TYPE_CHECKING:
    from lrm_recall.teach.alpha_mixing import Trace

MIXED = {"facecolor": "#0173b2", "edgecolor": "#1a1a1a", "linewidth": 0.5}
RETRIEVED = {"facecolor": "#f6c79b", "edgecolor": "#8a3a00", "linewidth": 0.5, "hatch": "////"}
_NOW = "#d55e00"  # where the slider stands
_MARKERS = "osv^D"
_ROLES = ("key", "value", "query", "filler")


def alpha_slider(table: np.ndarray, alphas: Sequence[float], pairs: Sequence[int], example: Trace, roles: Sequence[str],
                 alpha: float) -> Figure:
    """Accuracy against alpha, accuracy against the number of pairs, and both branches' norms, at one alpha.

    Args:
        table: [alphas, pairs] accuracies.
        alphas, pairs: what the rows and columns of the table are; the last alpha must be 1, the base model.
        example: a sequence whose branches are drawn; roles: its positions' parts.
        alpha: one of `alphas`.

    Raises:
        ValueError: alpha is not in the table, or the table has no base model.
    """
    alphas = np.asarray(alphas, dtype=float)
    row = int(np.abs(alphas - alpha).argmin())
    if abs(alphas[row] - alpha) > 1e-6:
        raise ValueError(f"alpha {alpha} is not in the table, which has {', '.join(f'{a:g}' for a in alphas)}")
    if alphas[-1] != 1:
        raise ValueError(f"the last alpha must be 1, the base model, got {alphas[-1]:g}")
    with mpl.rc_context(theme()):
        figure = Figure(figsize=(8.3, 5.4))
        grid = figure.add_gridspec(2, 2, width_ratios=(3, 2), left=0.075, right=0.975, top=0.875, bottom=0.125,
                                   wspace=0.2, hspace=0.52)
        _accuracies(figure.add_subplot(grid[0, 0]), table, alphas, pairs, row)
        _by_pairs(figure.add_subplot(grid[0, 1]), table, pairs, row, alpha)
        _norms(figure.add_subplot(grid[1, :]), example, roles, alpha)
        figure.suptitle(f"α = {alpha:.2f}: {alpha:.0%} the mixer's own output, {1 - alpha:.0%} retrieved", x=0.012,
                        ha="left", fontweight="bold")
    values = "; ".join(f"{number} pairs {table[row, i]:.2f} (base {table[-1, i]:.2f})" for i, number in
                       enumerate(pairs))
    best = alphas[table[:, -1].argmax()]
    return describe(figure, f"Mixing at alpha {alpha:.2f}. Accuracy: {values}. With {pairs[-1]} pairs the best alpha "
                            f"is {best:g}. Mean norm a token: mixer {alpha * example.mixed.mean():.1f}, retrieved "
                            f"{(1 - alpha) * example.retrieved.mean():.1f}.")


def trained_apart_or_together(curves: Mapping[str, np.ndarray], alphas: Sequence[float], trained_at: float) -> Figure:
    """Accuracy against the alpha that is set after training, one line for each way of training.

    Args:
        curves: name -> [alphas] accuracies.
        trained_at: the alpha that all were trained at.
    """
    with mpl.rc_context(theme()):
        figure = Figure(figsize=(8.3, 2.7), layout="constrained")
        axes = figure.subplots()
        for index, (name, values) in enumerate(curves.items()):
            axes.plot(alphas, values, marker="os"[index % 2], markersize=5, color=("#0173b2", "#3b3b3b")[index % 2],
                      linestyle=("-", "--")[index % 2], markerfacecolor=("#0173b2", "white")[index % 2], label=name)
        axes.axvline(trained_at, color="#5a5a5a", linewidth=0.9, linestyle=":")
        axes.annotate(f"trained at α = {trained_at:g}", (trained_at, 0.04), xytext=(4, 0), textcoords="offset points",
                      fontsize=8)
        axes.set(xlabel="α after training", ylabel="accuracy", ylim=(-0.03, 1.06), xlim=(-0.02, 1.03))
        axes.set_title("A mixer that was never needed has never learned to recall")
        axes.legend(loc="lower left", frameon=True)
        sns.despine(ax=axes)
    ends = "; ".join(f"{name}: {values[0]:.2f} at alpha {alphas[0]:g}, {values[-1]:.2f} at alpha {alphas[-1]:g}"
                     for name, values in curves.items())
    return describe(figure, f"Accuracy when alpha is changed after training at {trained_at:g}. {ends}.")


def learned_alpha(example: Trace, roles: Sequence[str], by_role: Mapping[str, np.ndarray]) -> Figure:
    """The learned alpha of every token of one sequence, and its distribution by the token's part.

    Args:
        example: one sequence; roles: [T] its positions' parts.
        by_role: part -> alphas over many sequences.
    """
    markers = dict(zip(_ROLES, ("o", "s", "D", "."), strict=True))
    with mpl.rc_context(theme()):
        figure = Figure(figsize=(8.3, 3.1), layout="constrained")
        line, spread = figure.subplots(1, 2, width_ratios=(3, 1.3), sharey=True)
        line.vlines(range(len(roles)), 0.5, example.alpha, color="#8c8c8c", linewidth=1)
        for role in _ROLES:
            where = [index for index, each in enumerate(roles) if each == role]
            line.plot(where, example.alpha[where], linestyle="none", marker=markers[role], markersize=6,
                      color="#0173b2" if role != "query" else _NOW, markeredgecolor="#1a1a1a", label=role,
                      markerfacecolor={"value": "white", "filler": "#8c8c8c"}.get(role))
        _token_axis(line, example, roles)
        present = [role for role in _ROLES if len(by_role.get(role, ()))]
        spread.boxplot([by_role[role] for role in present], orientation="vertical", widths=0.5, showfliers=False,
                       medianprops={"color": "#1a1a1a", "linewidth": 1.6})
        spread.set_xticks(range(1, len(present) + 1), present)
        for axes in (line, spread):
            axes.axhline(0.5, color="#1a1a1a", linewidth=0.8)
            sns.despine(ax=axes)
        line.set_ylabel("learned α\n← retrieve    own →")
        line.set_title("One sequence, token by token")
        line.legend(
            loc="upper center", bbox_to_anchor=(0.72, 1.17), ncols=4, frameon=False, handletextpad=0.2,
            columnspacing=1)
        spread.set_title("Many sequences, by part")
    words = "; ".join(f"{role} {np.median(by_role[role]):.2f}" for role in present)
    return describe(figure, f"The alpha that each token chooses after training; 1 is the mixer's own output. Medians: "
                            f"{words}.")


def shuffled_control(accuracies: Mapping[str, float], chance: float) -> Figure:
    """Accuracy with the chunks that were found, and with others: one line each.

    Args:
        accuracies: which chunks -> accuracy.
        chance: the accuracy of guessing one of the values.
    """
    with mpl.rc_context(theme()):
        figure = Figure(figsize=(8.3, 0.42 * len(accuracies) + 0.95), layout="constrained")
        axes = figure.subplots()
        for y, value in enumerate(accuracies.values()):
            axes.barh(y, value, height=0.58, **(RETRIEVED if y else MIXED))
            axes.annotate(f"{value:.3f}", (value, y), xytext=(5, 0), textcoords="offset points", va="center")
        axes.axvline(chance, color="#1a1a1a", linewidth=0.9, linestyle=":")
        axes.set(yticks=range(len(accuracies)), yticklabels=list(accuracies), xlim=(0, 1.09),
                 xlabel="accuracy  (dotted: guessing)")
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_title("The same model, the same weights, other chunks")
        sns.despine(ax=axes, left=True)
    values = "; ".join(f"{name}: {value:.3f}" for name, value in accuracies.items())
    return describe(figure, f"Accuracy of one trained model, given different chunks. {values}. Guessing: {chance:.3f}.")


def _accuracies(axes: Axes, table: np.ndarray, alphas: np.ndarray, pairs: Sequence[int], row: int) -> None:
    """Accuracy against alpha, a line for each number of pairs, and a rule at the slider."""
    shades = sns.color_palette("Blues", len(pairs) + 2)[2:]
    for column, number in enumerate(pairs):
        marker = _MARKERS[column % len(_MARKERS)]
        axes.plot(alphas, table[:, column], color=shades[column], linewidth=1.5, zorder=2)
        axes.plot(alphas[row], table[row, column], marker=marker, markersize=7, color=shades[column],
                  markeredgecolor="#1a1a1a", linestyle="none", label=f"{number}", zorder=4)
    axes.axvline(alphas[row], color=_NOW, linewidth=1.4, linestyle="--", zorder=1)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.03, 1.08), yticks=(0, 0.5, 1), ylabel="accuracy",
             xlabel="α    (0: retrieved only,  1: the base model)")
    axes.set_title("Recall at every α", y=1.0)
    axes.legend(title="pairs in the sequence", ncols=len(pairs), loc="lower left", handletextpad=0.1, columnspacing=0.9)
    sns.despine(ax=axes)


def _by_pairs(axes: Axes, table: np.ndarray, pairs: Sequence[int], row: int, alpha: float) -> None:
    """Accuracy against the number of pairs, at this alpha and for the base model."""
    axes.fill_between(pairs, table[-1], table[row], color="#d9d9d9", linewidth=0)
    axes.plot(pairs, table[-1], color="#3b3b3b", linestyle="--", marker="s", markersize=5, markerfacecolor="white")
    axes.plot(pairs, table[row], color=_NOW, marker="o", markersize=5)
    axes.set(ylim=(-0.03, 1.08), yticks=(0, 0.5, 1), xlabel="pairs in the sequence", xticks=list(pairs))
    axes.set_title(f"Dots: α = {alpha:.2f};  squares: base model", y=1.0)
    sns.despine(ax=axes)


def _norms(axes: Axes, example: Trace, roles: Sequence[str], alpha: float) -> None:
    """Both branches' norms after alpha: the mixer's upwards, retrieval's downwards."""
    nothing = example.chosen < 0  # the layer then hands the mixer's output on as it is
    _bars(axes, np.where(nothing, 1, alpha) * example.mixed, **MIXED)
    _bars(axes, -np.where(nothing, 0, 1 - alpha) * example.retrieved, **RETRIEVED)
    axes.axhline(0, color="#1a1a1a", linewidth=0.8)
    limit = 1.1 * max(example.mixed.max(), example.retrieved.max())
    axes.set_ylim(-limit, limit)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set_ylabel("norm of the output")
    axes.set_title("Who speaks at which token:  above, the mixer, α ‖mixed‖;  below, hatched, retrieval, "
                   "(1 − α) ‖retrieved‖", y=1.0)
    _token_axis(axes, example, roles)
    sns.despine(ax=axes)


def _bars(axes: Axes, heights: np.ndarray, **look: Any) -> None:
    """Bars from zero as one collection: a slider redraws it in half the time that 32 patches take."""
    left, right, zero = np.arange(len(heights)) - 0.38, np.arange(len(heights)) + 0.38, np.zeros(len(heights))
    corners = np.stack([(left, zero), (left, heights), (right, heights), (right, zero)]).transpose(2, 0, 1)
    axes.add_collection(PolyCollection(corners, **look), autolim=False)


def _token_axis(axes: Axes, example: Trace, roles: Sequence[str]) -> None:
    """Tokens below the axis, a query with its question mark; filler has no label."""
    named = [place for place, role in enumerate(roles) if role != "filler"]
    labels = token_labels(example, roles)
    axes.set_xticks(named, [labels[place] for place in named], rotation=90)
    axes.set_xlim(-0.8, len(roles) - 0.2)
    axes.grid(False, axis="x")
    axes.set_xlabel("tokens in their order: the pairs, then the questions (?) and filler (no label)")


def token_labels(example: Trace, roles: Sequence[str]) -> list[str]:
    """Each token as it is shown: "k54", "v87", "54?", "·"."""
    shown = {"key": "k{}", "value": "v{}", "query": "{}?", "filler": "·"}
    return [shown[role].format(token) for token, role in zip(example.tokens.tolist(), roles, strict=True)]
