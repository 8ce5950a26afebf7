"""How the figures look: one mark a model, one line style a source, legible without colour.

A model is told by the shape of its marker and by colour, a source (this run, committed rows of another
profile, the paper) by fill and line style, so that a greyscale print loses nothing. All text is at least 8
points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

TEXT_SIZE = 9  # points; tick labels are one smaller, nothing is below 8


class Mark(NamedTuple):
    """How a model is named, as in the papers, and drawn."""

    name: str
    marker: str
    colour: str


# mixer -> mark. Colours from seaborn's "colorblind" palette, neighbours in a legend far apart in lightness.
MODELS = {
    "baseconv": Mark("BaseConv", "o", "#0173b2"),
    "h3": Mark("H3", "v", "#949494"),
    "hyena": Mark("Hyena", "P", "#ca9161"),
    "rwkv4": Mark("RWKV", "X", "#cc78bc"),
    "rwkv5": Mark("RWKV5", "d", "#7a3b6d"),
    "mamba": Mark("Mamba", "<", "#56b4e9"),
    "mamba2": Mark("Mamba2", "s", "#d55e00"),
    "gla": Mark("GLA", "^", "#029e73"),
    "deltanet": Mark("DeltaNet", ">", "#de8f05"),
    "gated_deltanet": Mark("Gated DeltaNet", "p", "#8c5a00"),
    "retnet": Mark("RetNet", "h", "#1b3f8b"),
    "hymba": Mark("Hymba", "*", "#a3161a"),
    "attention": Mark("Transformer", "D", "#3b3b3b"),
}

# where a value comes from -> how it is drawn: this run's own rows in front, the committed rows of other
# profiles small and dotted, the paper as a ring around the place where our dot should be
SOURCES: dict[str, dict[str, Any]] = {
    "own": {"linestyle": "-", "markersize": 6.0, "linewidth": 1.6, "zorder": 4, "markeredgecolor": "#1a1a1a",
            "markeredgewidth": 0.8},
    "laptop": {"linestyle": ":", "markersize": 3.4, "linewidth": 1.1, "zorder": 3},
    "h100": {"linestyle": "-.", "markersize": 3.4, "linewidth": 0.9, "zorder": 3},
    "paper": {"linestyle": (0, (3, 1, 1, 1, 1, 1)), "markersize": 3.4, "linewidth": 0.9, "zorder": 3},
    "printed": {"linestyle": "--", "markersize": 9.5, "linewidth": 0.8, "zorder": 2,
                "markerfacecolor": "none"},
}
# lines of one model's variants, in the order of their names: base, then Resona at one layer after another
VARIANTS: tuple[dict[str, Any], ...] = (
    {"color": "#3b3b3b", "linestyle": "-", "marker": "o", "markersize": 4},
    {"color": "#0173b2", "linestyle": "--", "marker": "^", "markersize": 5},
    {"color": "#d55e00", "linestyle": ":", "marker": "s", "markersize": 4},
)
OTHER_PROFILES = ("laptop", "h100", "paper")  # whose committed rows are drawn beside this run's


def mark(mixer: str) -> Mark:
    """The mark of a mixer; ValueError for one that has none, so that two models never look the same."""
    if mixer not in MODELS:
        raise ValueError(f"no mark for mixer {mixer!r}; figures/style.py has: {', '.join(MODELS)}")
    return MODELS[mixer]


def in_order(mixers: Iterable[str]) -> list[str]:
    """The mixers, each once, in the order of MODELS, the papers' own."""
    present = {name for name in mixers if mark(name)}
    return [name for name in MODELS if name in present]


def variant_name(variant: str) -> str:
    """What a variant is called in titles: "base" or "resona0" to words."""
    return "Base model" if variant == "base" else f"+ Resona, layer {variant.removeprefix('resona')}"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, outside pyplot's global state."""
    return Figure(figsize=(width, height), layout="constrained")


def theme() -> dict[str, object]:
    """matplotlib settings of every figure, for `matplotlib.rc_context`."""
    sizes = {f"{name}size": TEXT_SIZE for name in ("font.", "axes.label", "axes.title", "legend.font",
                                                   "legend.title_font")}
    return {
        **sns.axes_style("whitegrid"), **sns.plotting_context("paper"), **sizes,
        "figure.titlesize": TEXT_SIZE + 2, "xtick.labelsize": TEXT_SIZE - 1, "ytick.labelsize": TEXT_SIZE - 1,
        "grid.color": "#e4e4e4", "axes.edgecolor": "#8c8c8c", "axes.titlelocation": "left",
    }


def legend(figure: Figure, groups: Mapping[str, Sequence[Line2D]]) -> None:
    """One legend in a column on the right: each group under its heading."""
    handles = []
    for heading, entries in groups.items():
        space = [Line2D([], [], linestyle="none", label=" ")] if handles else []
        handles += [*space, Line2D([], [], linestyle="none", label=heading), *entries]
    drawn = figure.legend(handles=handles, loc="outside right center", frameon=False, handlelength=2.8,
                          labelspacing=0.65)
    for text in drawn.get_texts():
        if text.get_text() in groups:
            text.set_fontweight("bold")


def model_handles(mixers: Iterable[str]) -> list[Line2D]:
    """Legend entries of models: marker and colour."""
    return [Line2D([], [], color=m.colour, marker=m.marker, markersize=6, markeredgewidth=0, linestyle="none",
                   label=m.name) for m in map(mark, mixers)]


def source_handle(source: str, label: str) -> Line2D:
    """Legend entry of one source: line style and fill, in grey."""
    return Line2D([], [], color="#4d4d4d", marker="o", label=label, **SOURCES[source])
