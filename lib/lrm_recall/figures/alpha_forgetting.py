"""The cold open of the alpha-mixing walkthrough: a state, what it gives back for the first key, and the error.

Pure functions of the numbers of `lrm_recall.teach.alpha_forgetting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from lrm_recall.figures.display import describe
from lrm_recall.figures.style import theme

if TYPE_CHECKING:
    from lrm_recall.teach.alpha_forgetting import Forgetting


def state_forgets(story: Forgetting, pairs: Sequence[int]) -> Figure:
    """One row for each number of pairs: the state and the first value beside what is read; on the right the error.

    Raises:
        ValueError: more pairs than were written, or fewer than one.
    """
    written = len(story.errors)
    for number in pairs:
        if not 1 <= number <= written:
            raise ValueError(f"pairs must lie between 1 and the {written} that were written, got {number}")
    rows = len(pairs)
    height = 1.35 * rows + 1.05 if rows > 1 else 3.1
    with mpl.rc_context(theme()):
        figure = Figure(figsize=(8.3, height))
        grid = figure.add_gridspec(rows, 3, width_ratios=(1.05, 1.75, 2.5), left=0.075, right=0.985,
                                   top=1 - 0.62 / height, bottom=0.48 / height, wspace=0.3, hspace=0.4)
        scale = np.quantile(np.abs(story.states[-1]), 0.98)  # the same for every number of pairs
        for row, number in enumerate(pairs):
            state, read = figure.add_subplot(grid[row, 0]), figure.add_subplot(grid[row, 1])
            state.imshow(np.abs(story.states[number - 1]), cmap="Blues", vmin=0, vmax=scale, aspect="auto")
            state.set(xticks=[], yticks=[], ylabel=f"{number} pair{'s' * (number > 1)}")
            state.grid(False)
            _readout(read, story, number)
            if row == 0:
                state.set_title("size of each number")
                read.set_title("first value: line stored, bars read")
            if row == rows - 1:
                read.set_xlabel("channel")
        axes = figure.add_subplot(grid[:, 2])
        steps = np.arange(1, written + 1)
        axes.plot(steps, story.expected, color="#8c8c8c", linestyle="--", linewidth=1.4, label="formula")
        axes.plot(steps, story.errors, color="#0173b2", linewidth=2, label="measured in the state")
        axes.plot(list(pairs), story.errors[np.asarray(pairs) - 1], "o", color="#d55e00", markersize=8,
                  markeredgecolor="#1a1a1a", clip_on=False, zorder=3)
        axes.axhline(1, color="#1a1a1a", linewidth=0.8, linestyle=":")
        axes.annotate("as wrong as answering nothing", (written, 1), xytext=(0, -4), textcoords="offset points",
                      va="top", ha="right", fontsize=8)
        axes.set(xlim=(0, written + 1), ylim=(0, max(1.9, story.errors.max() * 1.05)), xlabel="pairs written so far")
        axes.set_title("recall error of the first pair")
        axes.legend(loc="upper left")
        sns.despine(ax=axes)
        decay = "nothing decays" if story.decay == 1 else f"decay {story.decay:g} a token"
        figure.suptitle(f"A state of {story.states.shape[1]} × {story.states.shape[2]} numbers; {decay}", x=0.012,
                        ha="left", fontweight="bold")
    values = ", ".join(f"{story.errors[number - 1]:.2f} after {number}" for number in pairs)
    return describe(figure, f"Key-value pairs written into one state ({decay}). Relative error of the first pair: "
                            f"{values}; it passes 1, the error of answering nothing, after "
                            f"{int((story.errors > 1).argmax()) + 1 if (story.errors > 1).any() else 'more'} pairs.")


def _readout(axes, story: Forgetting, number: int) -> None:
    """The stored value as steps, what the first key reads now as bars."""
    channels = np.arange(len(story.stored))
    axes.bar(channels, story.recalled[number - 1], width=0.8, color="#d55e00", alpha=0.75, linewidth=0)
    axes.step(np.append(channels, len(channels)) - 0.5, np.append(story.stored, story.stored[-1]), where="post",
              color="#1a1a1a", linewidth=1.3)
    limit = 1.08 * max(np.abs(story.recalled).max(), np.abs(story.stored).max())
    axes.set(xticks=[], ylim=(-limit, limit))
    axes.axhline(0, color="#8c8c8c", linewidth=0.6)
    sns.despine(ax=axes, left=True, bottom=True)
