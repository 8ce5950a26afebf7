"""What a solution of the walkthrough's exercises returned, beside what is asked: mistakes are seen, not only told.

Pure functions of the verdicts of `lrm_recall.teach.alpha_exercises`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from lrm_recall.figures.display import describe
from lrm_recall.figures.style import theme

if TYPE_CHECKING:
    from lrm_recall.teach.alpha_exercises import Verdict


def mask_drawn(verdict: Verdict) -> Figure:
    """The mask that was returned, chunks down and positions across, with a cross on each wrong cell."""
    with mpl.rc_context(theme()):
        figure = Figure(figsize=(8.3, 2.1), layout="constrained")
        axes = figure.subplots()
        wanted = verdict.wanted.numpy().T  # [N, T]
        given = np.zeros_like(wanted) if verdict.given is None else verdict.given.numpy().T
        axes.pcolormesh(given.astype(float), cmap="Blues", vmin=0, vmax=1.4, edgecolors="#b0b0b0", linewidth=0.6)
        wrong = "Nothing is drawn yet."
        if verdict.given is None:
            axes.text(wanted.shape[1] / 2, wanted.shape[0] / 2, "your mask will be drawn here", ha="center",
                      va="center", color="#4d4d4d", bbox={"facecolor": "white", "edgecolor": "none"})
        else:
            rows, columns = np.nonzero(given != wanted)
            wrong = f"{len(rows)} wrong cells in the first case."
            axes.plot(columns + 0.5, rows + 0.5, "x", color="#d55e00", markersize=9, markeredgewidth=2.4)
        axes.set_xticks(np.arange(wanted.shape[1]) + 0.5, range(wanted.shape[1]))
        axes.set_yticks(np.arange(wanted.shape[0]) + 0.5, [f"chunk {n}" for n in range(wanted.shape[0])])
        axes.set(xlabel="position that asks  (filled: may look;  cross: wrong)")
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_title(_heading(verdict), fontweight="bold")
    return describe(figure, f"Exercise, the causal mask: {verdict.text} {wrong}")


def gate_drawn(verdict: Verdict) -> Figure:
    """The weight of one chunk against its score: what is asked dashed, what was returned solid."""
    with mpl.rc_context(theme()):
        figure = Figure(figsize=(8.3, 2.5), layout="constrained")
        axes = figure.subplots()
        scores = np.linspace(-1, 1, len(verdict.wanted))
        axes.plot(scores, verdict.wanted[:, 0].numpy(), color="#8c8c8c", linestyle="--", linewidth=2, label="asked")
        if verdict.given is not None:
            axes.plot(scores, verdict.given[:, 0].detach().numpy(), color="#0173b2", linewidth=2, label="yours")
        axes.axvline(0.2, color="#1a1a1a", linestyle=":", linewidth=0.9)
        axes.annotate("score of the null chunk", (0.2, 0.03), xytext=(4, 0), textcoords="offset points", fontsize=8)
        axes.set(xlabel="score of the only chunk", ylabel="weight of the chunk", ylim=(-0.04, 1.08), xlim=(-1, 1))
        axes.legend(loc="upper left")
        axes.set_title(_heading(verdict), fontweight="bold")
        sns.despine(ax=axes)
    return describe(figure, f"Exercise, the null chunk's gate: {verdict.text}")


def _heading(verdict: Verdict) -> str:
    """"Yes", "No" or "Not yet"."""
    return verdict.text.partition(":")[0]
