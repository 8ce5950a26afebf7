"""The explorer of notebook 01: a trained tiny model at each alpha, chunk_size and top_k, and where it looked.

Pure functions of the numbers that `lrm_recall.teach.mqar_explorer` computes; a slider calls the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from lrm_recall.figures.display import describe
from lrm_recall.figures.style import SOURCES, VARIANTS, theme
from lrm_recall.teach.mqar_explorer import Knobs, answer_chunks

if TYPE_CHECKING:
    from lrm_recall.teach.mqar_explorer import Example, Explored

_ACCURACY = {**VARIANTS[1], "linestyle": "-"}
_FOUND = {**VARIANTS[0], "linestyle": "--", "marker": "s", "markerfacecolor": "white"}
_NOW = VARIANTS[2]["color"]  # where the knobs stand
_TRAINED = {**SOURCES["printed"], "linestyle": "none", "marker": "o", "markersize": 11, "markeredgecolor": "#1a1a1a"}


def turned_knobs(explored: Explored, alpha: float, chunk_size: int, top_k: int) -> Figure:
    """Accuracy against each knob with the other two as given, and the chunks that the questions of one example read.

    Args:
        explored: every setting of the trained model.
        alpha, chunk_size, top_k: the current one.

    Raises:
        ValueError: a setting that was not tried.
    """
    knobs = Knobs(alpha, chunk_size, top_k)
    a, c, k = explored.index(knobs)
    trained = explored.index(explored.trained)
    with mpl.rc_context(theme()):
        figure = Figure(figsize=(8.3, 5.7))  # a layout engine takes half the time that a slider has
        grid = figure.add_gridspec(1, 3, width_ratios=(1.45, 1, 0.8), left=0.066, right=0.985, top=0.875, bottom=0.6,
                                   wspace=0.2)
        by_alpha, by_chunk, by_top_k = (figure.add_subplot(cell) for cell in grid)
        _sweep(by_alpha, explored.alphas, explored.accuracy[:, c, k], None, a, trained[0] if (c, k) == trained[1:]
               else None)
        by_alpha.axhline(explored.alone, color="#3b3b3b", linewidth=1, linestyle="-.")
        by_alpha.axhline(explored.guessing, color="#3b3b3b", linewidth=1, linestyle=":")
        by_alpha.set(xlabel="α    (0: retrieved only,  1: the mixer alone)", ylabel="share of the questions")
        _sweep(by_chunk, explored.chunk_sizes, explored.accuracy[a, :, k], explored.found[:, k], c,
               trained[1] if (a, k) == (trained[0], trained[2]) else None)
        by_chunk.set_xlabel("chunk size")
        _sweep(by_top_k, explored.top_ks, explored.accuracy[a, c], explored.found[c], k,
               trained[2] if (a, c) == trained[:2] else None)
        by_top_k.set_xlabel("top-k")
        for axes in (by_chunk, by_top_k):
            axes.tick_params(labelleft=False)
        _legend(figure)
        _where_it_looked(figure.add_axes((0.105, 0.13, 0.88, 0.3)), explored.example, (a, c, k), knobs)
        figure.text(0.012, 0.985, f"{_said(knobs)}: {explored.accuracy[a, c, k]:.2f} of the questions answered"
                    f"{', as trained' if (a, c, k) == trained else ''}", va="top", fontweight="bold", fontsize=11)
    return describe(figure, _alt(explored, knobs))


def knobs_in_words(explored: Explored) -> str:
    """What the knobs do to the accuracy, in the numbers of this model; ValueError where alpha 1 was not tried."""
    trained, longest, most = explored.trained, explored.chunk_sizes[-1], explored.top_ks[-1]
    at = explored.index(trained)
    base, long, many = (explored.index(trained._replace(**knob))
                        for knob in ({"alpha": 1.0}, {"chunk_size": longest}, {"top_k": most}))
    return (
        f"As trained ({_said(trained)}) the model answers {explored.accuracy[at]:.3f} of the questions. At α = 1 its "
        f"mixer alone answers {explored.accuracy[base]:.3f}: all that it learnt beside retrieval. The same mixer "
        f"trained without Resona reaches {explored.alone:.3f}, guessing among the values listed "
        f"{explored.guessing:.3f}. With chunks of {longest} the search finds the answer's chunk for "
        f"{explored.found[long[1:]]:.3f} of the questions, and {explored.accuracy[long]:.3f} are answered. With top "
        f"{most} the best chunk keeps {explored.best_weight[many[1:]]:.3f} of the gate's weight, and "
        f"{explored.accuracy[many]:.3f} are answered."
    )


def _said(knobs: Knobs) -> str:
    return f"α = {knobs.alpha:g}, chunks of {knobs.chunk_size}, top {knobs.top_k}"


def _alt(explored: Explored, knobs: Knobs) -> str:
    a, c, k = explored.index(knobs)
    example, looked = explored.example, explored.example.chosen[knobs.chunk_size, knobs.top_k]
    found = (looked == answer_chunks(example.pairs, knobs.chunk_size)[:, None]).any(1)
    return (
        f"A trained tiny model at alpha {knobs.alpha:g}, chunks of {knobs.chunk_size}, top {knobs.top_k}: accuracy "
        f"{explored.accuracy[a, c, k]:.3f}, answer's chunk found for {explored.found[c, k]:.3f}. Accuracy by alpha: "
        f"{_pairs(explored.alphas, explored.accuracy[:, c, k])}; trained without Resona {explored.alone:.2f}, "
        f"guessing {explored.guessing:.2f}. By chunk size: "
        f"{_pairs(explored.chunk_sizes, explored.accuracy[a, :, k])}. By top-k: "
        f"{_pairs(explored.top_ks, explored.accuracy[a, c])}. In the example {found.sum()} of {len(found)} questions "
        f"look into the chunk of their answer, {example.right[a, c, k].sum()} are answered right."
    )


def _pairs(values: Sequence[float], shares: np.ndarray) -> str:
    return ", ".join(f"{value:g} {share:.2f}" for value, share in zip(values, shares, strict=True))


def _sweep(axes: Axes, values: Sequence[float], shares: np.ndarray, found: np.ndarray | None, now: int,
           trained: int | None) -> None:  # fmt: skip
    """One knob: accuracy, share of found chunks if given, a rule at the current value, a ring at the trained one."""
    at = np.arange(len(values))
    axes.axvline(now, color=_NOW, linewidth=1.4, linestyle="--", zorder=1)
    if found is not None:
        axes.plot(at, found, **_FOUND)
    axes.plot(at, shares, **_ACCURACY, zorder=3)
    axes.plot(now, shares[now], marker="o", markersize=7, color=_NOW, markeredgecolor="#1a1a1a", zorder=4)
    if trained is not None:
        axes.plot(trained, shares[trained], **_TRAINED)
    axes.set(xlim=(-0.5, len(values) - 0.5), ylim=(-0.05, 1.1), yticks=(0, 0.5, 1))
    axes.set_xticks(at, [f"{value:g}" for value in values])
    sns.despine(ax=axes)


def _legend(figure: Figure) -> None:
    entries = [
        Line2D([], [], **_ACCURACY, label="answered right"),
        Line2D([], [], **_FOUND, label="looked into the answer's chunk"),
        Line2D([], [], marker="o", markersize=7, color=_NOW, linestyle="--", markeredgecolor="#1a1a1a", label="now"),
        Line2D([], [], **_TRAINED, label="as trained"),
        Line2D([], [], color="#3b3b3b", linewidth=1, linestyle="-.", label="trained without Resona"),
        Line2D([], [], color="#3b3b3b", linewidth=1, linestyle=":", label="guessing"),
    ]
    figure.legend(handles=entries, loc="upper left", bbox_to_anchor=(0.005, 0.955), ncols=6, frameon=False,
                  handlelength=2, columnspacing=1.1, handletextpad=0.4, fontsize=8)


def _where_it_looked(axes: Axes, example: Example, at: tuple[int, int, int], knobs: Knobs) -> None:
    """Questions down, tokens across: the chunks that each question reads, shaded by weight, and the true one framed."""
    length, size = len(example.tokens), knobs.chunk_size
    chosen, weights = (table[size, knobs.top_k] for table in (example.chosen, example.weights))
    right = example.right[at]
    seen = chosen >= 0
    rows = np.nonzero(seen)[0]
    boxes = [Rectangle((chunk * size - 0.5, row - 0.4), size, 0.8)
             for row, chunk in zip(rows, chosen[seen], strict=True)]
    shades = [to_rgba(_ACCURACY["color"], 0.12 + 0.88 * weight) for weight in weights[seen]]
    axes.add_collection(PatchCollection(boxes, facecolors=shades, edgecolors=_ACCURACY["color"], linewidths=0.8))
    true = [Rectangle((chunk * size - 0.5, row - 0.46), min(size, length - chunk * size), 0.92)
            for row, chunk in enumerate(answer_chunks(example.pairs, size))]
    axes.add_collection(PatchCollection(true, facecolors="none", edgecolors=_NOW, linewidths=1.8))
    axes.vlines(np.arange(0, length + 1, size) - 0.5, -0.5, len(right) - 0.5, color="#d0d0d0", linewidth=0.6, zorder=0)
    axes.plot(example.positions, np.arange(len(right)), linestyle="none", marker="<", markersize=6, color="#1a1a1a")
    places, names = _token_labels(example)
    axes.set_xticks(places, names, rotation=90)
    axes.set_yticks(range(len(right)), [f"{example.tokens[position]}?  {'✓' if good else '✗'}"
                                        for position, good in zip(example.positions, right, strict=True)])
    for label, good in zip(axes.get_yticklabels(), right, strict=True):
        label.set_color("#1a1a1a" if good else _NOW)
    axes.set(xlim=(-0.5, length - 0.5), ylim=(len(right) - 0.5, -0.5))
    axes.set_xlabel("one sequence: key and value of each pair, then the questions (?) and filler (no label)")
    axes.grid(False)
    sns.despine(ax=axes, left=True)
    axes.set_title("Where the questions (◂) looked, and whether the answer was right (✓)", y=1.09)
    key: list[Any] = [
        Patch(facecolor=_ACCURACY["color"], label="chunk read, darker: more weight"),
        Patch(facecolor="none", edgecolor=_NOW, linewidth=1.8, label="chunk that holds the answer"),
    ]
    axes.legend(handles=key, loc="lower right", bbox_to_anchor=(1.005, 0.98), ncols=2, frameon=False, fontsize=8)


def _token_labels(example: Example) -> tuple[list[int], list[str]]:
    """The positions of pairs and questions, and what stands there."""
    pairs = [("v{}" if place % 2 else "k{}").format(token)
             for place, token in enumerate(example.tokens[: 2 * len(example.pairs)])]
    asked = [f"{example.tokens[position]}?" for position in example.positions]
    return [*range(len(pairs)), *example.positions], pairs + asked
