"""Search as heat maps: which chunk each position picks, and the chunk that lights up only once it is complete.

Pure functions of the numbers of `lrm_recall.teach.alpha_search` and `lrm_recall.teach.alpha_mixing`.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lrm_recall.figures.display import describe
from lrm_recall.figures.style import theme

_PICK = "#d55e00"
_LIT, _GROWING, _DARK = "#f6c79b", "#f2f2f2", "white"


def search_map(labels: Sequence[str], cosines: np.ndarray, chosen: np.ndarray, chunk_size: int, title: str) -> Figure:
    """Cosine of each position (across) with each chunk (down); a ring where the search has picked.

    Args:
        labels: [T] tokens as shown.
        cosines: [T, N]; what the causal rule hides is drawn hatched.
        chosen: [T] chunk picked, -1 for none.
        chunk_size: tokens in a chunk.
    """
    length, chunks = cosines.shape
    hidden = np.arange(chunks)[:, None] >= np.arange(length)[None] // chunk_size  # [N, T]
    names = [" ".join(labels[n * chunk_size:(n + 1) * chunk_size]) for n in range(chunks)]
    height = max(2.6, 0.2 * chunks + 1.55)
    longest = max(map(len, names))
    with mpl.rc_context(theme()):
        figure = Figure(figsize=(8.3, height))
        left = min(0.36, 0.03 + 0.0088 * longest)
        axes = figure.add_axes((left, 0.82 / height, 0.93 - left, 1 - 1.22 / height))
        image = axes.imshow(np.ma.array(cosines.T, mask=hidden), cmap="Greys", vmin=0, vmax=1, aspect="auto")
        axes.set_facecolor("white")
        axes.add_collection(PatchCollection(_staircase(chunks, length, chunk_size), facecolor="#eef2f7",
                                            edgecolor="#b5c3d6", hatch="////", linewidth=0))
        found = np.flatnonzero(chosen >= 0)
        axes.scatter(found, chosen[found], s=46, facecolors="none", edgecolors=_PICK, linewidths=1.8)
        axes.set_xticks(range(length), labels, rotation=90)
        axes.set_yticks(range(chunks), names)
        axes.set(xlim=(-0.5, length - 0.5), ylim=(chunks - 0.5, -0.5))
        axes.grid(False)
        figure.text(0.012, 1 - 0.1 / height, title, va="top", fontweight="bold", fontsize=11)
        bar = figure.colorbar(image, cax=figure.add_axes((0.945, 0.82 / height, 0.012, 1 - 1.22 / height)))
        bar.set_ticks([0, 0.5, 1])
        bar.outline.set_visible(False)
        axes.set_xlabel("who asks     (ring: the chunk picked;  hatched: hidden by the causal rule)")
    picks = "; ".join(f"{labels[t]} ({t}) picks {names[chosen[t]]!r}" for t in found[-8:])
    return describe(figure, f"{title}. Heat map of the similarity of {length} positions with {chunks} chunks of "
                            f"{chunk_size}. The last picks: {picks}.")


def chunk_lights_up(reach: np.ndarray, chunk_size: int, position: int) -> Figure:
    """The tokens as read up to one position, their chunks lit once complete; below, which token reaches which output.

    Args:
        reach: [outputs, tokens] from `lrm_recall.teach.alpha_search.influence`.
        chunk_size: tokens in a chunk.
        position: who looks, from 0.

    Raises:
        ValueError: the position is not in the sequence.
    """
    length = len(reach)
    if not 0 <= position < length:
        raise ValueError(f"position must lie between 0 and {length - 1}, got {position}")
    lit = int(np.count_nonzero(reach[position]))
    with mpl.rc_context(theme()):
        figure = Figure(figsize=(8.3, 3.6))
        strip = figure.add_axes((0.03, 0.1, 0.44, 0.7))
        _strip(strip, reach, length, chunk_size, position)
        axes = figure.add_axes((0.585, 0.14, 0.37, 0.68))
        axes.imshow(np.where(reach > 0, 0.35 + 0.65 * reach, 0), cmap="Greys", vmin=0, vmax=1.15, aspect="auto")
        axes.add_patch(Rectangle((-0.5, position - 0.5), length, 1, fill=False, edgecolor=_PICK, linewidth=2))
        edges = np.arange(chunk_size, length, chunk_size) - 0.5
        axes.vlines(edges, -0.5, length - 0.5, color="#8c8c8c", linewidth=0.7)
        axes.set(xticks=range(0, length, chunk_size), yticks=range(0, length, chunk_size), xlabel="token replaced",
                 ylabel="output that moves")
        axes.grid(False)
        axes.set_title("Replace one token: which outputs move?", fontsize=9)
        figure.text(0.012, 0.97, f"Position {position} can read {lit // chunk_size} complete "
                                 f"chunk{'s' * (lit // chunk_size != 1)} of {chunk_size}", va="top",
                    fontweight="bold", fontsize=11)
    reads = "no chunk yet"
    if lit:
        reads = f"{lit // chunk_size} complete chunk{'s' * (lit > chunk_size)}, tokens 0 to {lit - 1}"
    return describe(figure, f"Causal rule with chunks of {chunk_size}: position {position} reads {reads}. Left, the "
                            f"chunks of {length} tokens; right, which outputs move when one token is replaced.")


def _strip(axes: Axes, reach: np.ndarray, length: int, chunk_size: int, position: int) -> None:
    """One row a chunk, a box a token: lit where the output at `position` moves with the token, dashed while unread."""
    rows = -(-length // chunk_size)
    for token in range(length):
        row, column = divmod(token, chunk_size)
        reached, seen = reach[position, token] > 0, token <= position
        axes.add_patch(Rectangle((column + 0.06, row + 0.12), 0.88, 0.76, facecolor=_LIT if reached else
                                 _GROWING if seen else _DARK, edgecolor="#8a3a00" if reached else "#8c8c8c",
                                 linewidth=1.6 if reached else 0.9, linestyle="-" if seen else ":"))
        axes.text(column + 0.5, row + 0.5, str(token), ha="center", va="center", fontweight="bold" if token == position
                  else "normal", color="#1a1a1a" if seen else "#6b6b6b")
        if token == position:
            axes.add_patch(Rectangle((column + 0.02, row + 0.06), 0.96, 0.88, fill=False, edgecolor=_PICK,
                                     linewidth=2.4))
    for row in range(rows):
        last = min((row + 1) * chunk_size, length) - 1
        state = "lit: may be read" if reach[position, row * chunk_size] > 0 else (
            "complete, but not before it" if last == position else
            "growing" if row * chunk_size <= position else "not begun")
        axes.text(chunk_size + 0.12, row + 0.5, state, va="center", fontsize=8)
    axes.set(xlim=(0, chunk_size * 1.55 + 0.8), ylim=(rows, 0), xticks=[], yticks=[])
    axes.set_title("Chunks as they are read (orange frame: who looks)", fontsize=9)
    axes.set_frame_on(False)


def _staircase(chunks: int, length: int, chunk_size: int) -> list[Rectangle]:
    """What the causal rule hides, one rectangle a chunk: every position up to the chunk's last token."""
    return [Rectangle((-0.5, n - 0.5), min((n + 1) * chunk_size, length), 1) for n in range(chunks)]
