"""The state of several heads and of one merged head, computed and drawn: the opening pictures of walkthrough 12.

Magnitude is lightness (dark is large), so that nothing depends on hue; what no head can reach is hatched, what merging
opens has a thick frame. The red of new cells is the red of StateX's Figure 2.
"""

from __future__ import annotations

from functools import cache

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lrm_recall.figures.display import describe
from lrm_recall.figures.style import new_figure, theme
from lrm_recall.teach.head_merging import (
    block_diagonal,
    block_mask,
    make_keys,
    make_values,
    merge,
    read,
    recall_error,
    split_channels,
    write,
)
from lrm_recall.teach.picture import picture

CHANNELS = (16, 32)  # key and value channels of the whole layer, however many heads share them
HEADS = (1, 2, 4, 8)  # that divide both
OLD, NEW = "#0b4a8f", "#c1121f"  # cells on and off the diagonal


def heads(number: int) -> str:
    """ "one head", "4 heads"."""
    return "one head" if number == 1 else f"{number} heads"


def pairs_of(number: int) -> str:
    """ "1 pair", "4 pairs"."""
    return f"{number} pair{'s' * (number != 1)}"


def remembered_picture(num_heads: int = 4, num_pairs: int = 16) -> Figure:
    """Sixteen pairs whose values are the rows of a picture: as stored, and as read back from two states.

    Args:
        num_heads: of HEADS, of the state in the middle; the state on the right is always one head.
        num_pairs: rows that are stored, from the top, 1 to 16. Each state has the best keys that it can have.

    Raises:
        ValueError: a number of pairs or heads out of range.
    """
    if not 1 <= num_pairs <= CHANNELS[0]:
        raise ValueError(f"num_pairs must lie between 1 and {CHANNELS[0]}, got {num_pairs}")
    values = picture()[:num_pairs]  # [N, 32]
    panels, lost = [(f"what was stored\n{pairs_of(num_pairs)} of key and value", values)], []
    for number in (num_heads, 1):
        key_dim, value_dim = (split_channels(width, number) for width in CHANNELS)
        keys = make_keys("best", num_pairs, number, key_dim)
        asked = values.unflatten(-1, (number, value_dim)).unsqueeze(0)  # [1, N, H, V]
        answers = read(write(keys, asked), keys)
        error = recall_error(answers, asked).item()
        title = f"read back from {heads(number)}\n{number * key_dim * value_dim} numbers of state, {error:.0%} lost"
        panels.append((title, answers[0].flatten(1)))
        lost.append(f"{heads(number)} {'loses' if number == 1 else 'lose'} {error:.0%}")
    with mpl.rc_context(theme()):
        figure = new_figure(7.0, 1.75)
        for axes, (title, rows) in zip(figure.subplots(1, 3), panels, strict=True):
            shown = torch.full((16, CHANNELS[1]), float("nan"))
            shown[:num_pairs] = rows / rows.abs().max().clamp_min(1e-6)
            axes.imshow(shown.numpy(), cmap="Greys", vmin=-1, vmax=1, interpolation="nearest")
            if num_pairs < 16:  # rows that were not stored are not white: white is what the picture is without ink
                axes.axhspan(num_pairs - 0.5, 15.5, facecolor="#f4f4f4", edgecolor="#c4c4c4", hatch="////", linewidth=0)
            axes.set(xticks=[], yticks=[], title=title)
            axes.grid(False)
    return describe(figure, f"The first {num_pairs} of 16 rows of a picture of the words MERGE STATE, stored as values "
                            f"under as many keys, and read back. Of what was stored, {', '.join(lost)}.")


@cache
def _states(num_heads: int, num_pairs: int) -> tuple[Tensor, Tensor]:
    """|state| of H heads on the diagonal, and of one merged head with the same vectors: two of [H K, H V]."""
    key_dim, value_dim = (split_channels(width, num_heads) for width in CHANNELS)
    keys, values = make_keys("random", num_pairs, num_heads, key_dim), make_values(num_pairs, num_heads, value_dim)
    separate = block_diagonal(write(keys, values)[0])
    return separate.abs(), write(merge(keys), merge(values))[0, 0].abs()


def state_matrices(num_heads: int = 4, num_pairs: int = 6) -> Figure:
    """The states that `gla_recurrent` reaches after the same pairs: H heads as blocks on a diagonal, and one head.

    Args:
        num_heads: of HEADS.
        num_pairs: that were read, 1 or more.
    """
    separate, merged = _states(num_heads, num_pairs)
    mask = block_mask(num_heads, *(split_channels(width, num_heads) for width in CHANNELS))
    top = merged.max().item()
    with mpl.rc_context(theme()):
        figure = Figure(figsize=(7.0, 2.75))  # a layout engine takes half the time that a slider has
        left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"left": 0.075, "right": 0.985, "bottom": 0.165,
                                                                      "top": 0.915, "wspace": 0.07})
        _matrix(left, separate, mask, num_heads, top)
        _matrix(right, merged, mask, num_heads, top)
        reach, whole = int(mask.sum()), mask.numel()
        left.set_title(f"{heads(num_heads)}: {reach} numbers can be other than 0")
        right.set_title(f"merged into one head: all {whole} can")
        left.set_ylabel(f"{CHANNELS[0]} key channels")
        for axes in (left, right):
            axes.set_xlabel(f"{CHANNELS[1]} value channels")
    same = (separate - merged)[mask].abs().max().item()
    outside = ("; the rest is hatched, out of reach", f", and off the diagonal {whole - reach} cells more, in red")
    beside, gained = outside if num_heads > 1 else ("", "")
    return describe(figure, f"Two matrices of {CHANNELS[0]} key by {CHANNELS[1]} value channels after "
                            f"{pairs_of(num_pairs)}, darker for larger magnitude. Left, {heads(num_heads)}: {reach} of "
                            f"{whole} cells in blocks on the diagonal{beside}. Right, the heads merged: the same "
                            f"blocks (largest difference {same:.0e}){gained}.")


def _matrix(axes: Axes, state: Tensor, mask: Tensor, num_heads: int, top: float) -> None:
    """One state: blocks in blue, what lies outside them in red where it is filled, hatched where it is not."""
    rows, columns = state.shape
    out_of_reach = not state[~mask].any()
    for colour, cells in ((OLD, mask), (NEW, ~mask))[: 1 if out_of_reach else 2]:
        shades = mpl.colors.LinearSegmentedColormap.from_list("shades", ["#ffffff", colour])
        axes.imshow(torch.where(cells, state, float("nan")).numpy(), cmap=shades, vmin=0, vmax=top, zorder=1,
                    extent=(0, columns, rows, 0), interpolation="nearest", aspect="auto")
    if out_of_reach:  # below the blocks
        axes.add_patch(Rectangle((0, 0), columns, rows, facecolor="#f4f4f4", edgecolor="#c4c4c4", hatch="////",
                                 linewidth=0, zorder=0.5))
    for corner, width, height in _blocks(num_heads, rows, columns):
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="#1a1a1a", linewidth=1.6, zorder=2))
    height, width = rows / num_heads, columns / num_heads
    axes.set(xticks=[width * i for i in range(num_heads + 1)], yticks=[height * i for i in range(num_heads + 1)],
             xlim=(0, columns), ylim=(rows, 0))
    axes.grid(False)


def _blocks(num_heads: int, rows: int, columns: int) -> list[tuple[tuple[float, float], float, float]]:
    """(corner, width, height) of the block of each head."""
    height, width = rows / num_heads, columns / num_heads
    return [((width * head, height * head), width, height) for head in range(num_heads)]


def mask_figure(mask: Tensor | None, num_heads: int = 4, num_pairs: int = 6) -> Figure:
    """The exercise, seen: the reader's mask, and what it leaves of the merged state beside what it should leave.

    Args:
        mask: [H K, H V], or None where there is none yet.
        num_heads, num_pairs: as in `state_matrices`.
    """
    separate, merged = _states(num_heads, num_pairs)
    usable = isinstance(mask, Tensor) and mask.shape == merged.shape
    left = merged * mask if usable else torch.full_like(merged, float("nan"))
    panels = {"your mask": mask.float() if usable else left, "merged state, your mask": left,
              f"wanted: {heads(num_heads)}": separate}
    with mpl.rc_context(theme()):
        figure = new_figure(7.0, 1.6)
        for axes, (title, matrix) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            axes.imshow(matrix.numpy(), cmap="Greys", vmin=0, vmax=1 if title == "your mask" else merged.max().item(),
                        interpolation="nearest", aspect="auto")
            if matrix.isnan().all():
                axes.text(0.5, 0.5, "not yet", transform=axes.transAxes, ha="center", va="center", color="#4d4d4d")
            axes.set(xticks=[], yticks=[], title=title)
            axes.grid(False)
    equal = usable and torch.allclose(left, separate, atol=1e-6)
    said = "they are equal" if equal else "they differ" if usable else "there is no usable mask yet"
    return describe(figure, f"The reader's mask, the merged state under it, and the state of {heads(num_heads)}: "
                            f"{said}.")
