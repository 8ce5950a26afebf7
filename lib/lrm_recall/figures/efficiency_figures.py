"""What retrieval and a larger state cost, drawn: ratios to the model alone, and speed against state."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lrm_recall.figures.display import describe
from lrm_recall.figures.efficiency_cells import efficiency_cells
from lrm_recall.figures.efficiency_tables import TABLES, paper_cost_table
from lrm_recall.figures.style import SOURCES, in_order, legend, mark, model_handles, new_figure, source_handle, theme

_PANELS = {5: "reading a prompt (Table 5)", 6: "decoding (Table 6)", 7: "peak memory (Table 7)"}


def resona_overhead(rows: pd.DataFrame) -> Figure:
    """Prefill, decoding and memory with Resona as a ratio to the same model alone, against length; the paper's rings.

    Args:
        rows: see `efficiency_cells`.

    Raises:
        ValueError: no such rows, or none with Resona.
    """
    tables = {number: paper_cost_table(rows, number) for number in TABLES}
    own = pd.concat(table[table["our_ratio"].notna()] for table in tables.values())
    if own.empty:
        raise ValueError("no measurement with Resona")
    mixers = in_order(own["mixer"])
    with mpl.rc_context(theme()):
        figure = new_figure(10.4, 3.1)
        for (number, table), axes in zip(tables.items(), figure.subplots(1, len(tables)), strict=True):
            for mixer in mixers:
                part = table[(table["mixer"] == mixer) & (table["variant"] == "resona")]
                _line(axes, part, "our_ratio", mixer, "own")
                _line(axes, part, "paper_ratio", mixer, "printed")
            axes.axhline(1, color="#4d4d4d", linewidth=0.9)
            axes.set_title(_PANELS[number])
            _lengths(axes)
        figure.axes[0].set_ylabel("with Resona / alone")
        sources = {"own": f"this run ({rows['profile'].iloc[0]})", "printed": "the paper, 1.3B"}
        legend(figure, {"Model": model_handles(mixers),
                        "Source": [source_handle(source, label) for source, label in sources.items()]})
        figure.suptitle("What Resona adds to a model's cost", x=0.01, ha="left")
    words = [f"{mark(cell['mixer']).name}, {cell['length']:,} tokens: {cell['our_ratio']:.2f}"
             + (f" (paper {cell['paper_ratio']:.2f})" if pd.notna(cell["paper_ratio"]) else "")
             for cell in own.to_dict("records")]
    return describe(figure, f"Cost with Resona over the model alone, for prefill, decoding and memory. "
                            f"{'; '.join(words)}.")


def costs(rows: pd.DataFrame) -> Figure:
    """Milliseconds and memory against length, every model alone and with Resona, both axes logarithmic."""
    cells = efficiency_cells(rows)
    cells = cells[(cells["expanded_layers"] == 0) & cells["task"].isin(["prefill", "decode"])]
    mixers = in_order(cells["mixer"])
    panels = [(_PANELS[number], *TABLES[number][1:]) for number in TABLES]
    with mpl.rc_context(theme()):
        figure = new_figure(10.4, 3.1)
        for (title, task, column, unit), axes in zip(panels, figure.subplots(1, len(panels)), strict=True):
            for (mixer, variant), part in cells[cells["task"] == task].groupby(["mixer", "variant"], sort=False):
                _line(axes, part, column, mixer, "own" if variant == "base" else "laptop")
            axes.set(yscale="log", title=f"{title}, {unit}")
            axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
            _lengths(axes)
        legend(figure, {"Model": model_handles(mixers), "Variant": [
            source_handle("own", "alone"), source_handle("laptop", "with Resona")]})
        device = cells["device_name"].iloc[0]
        figure.suptitle(f"What models cost on {device}", x=0.01, ha="left")
    words = [f"{mark(cell['mixer']).name} {cell['variant']}, {cell['task']}, {cell['length']:,} tokens: "
             f"{cell['ms']:.3g} ms, {cell['gb']:.3g} GiB" for cell in cells.to_dict("records")]
    return describe(figure, f"Milliseconds and memory against the length of the prompt. {'; '.join(words)}.")


def speed_and_state(rows: pd.DataFrame) -> Figure:
    """StateX: tokens a second against elements of recurrent state, one panel a task and length.

    Raises:
        ValueError: no such rows, or none with an expanded state.
    """
    cells = efficiency_cells(rows)
    expanded = cells.loc[cells["expanded_layers"] > 0, "mixer"]
    cells = cells[cells["mixer"].isin(expanded) & (cells["variant"] != "resona")]
    groups = [(key, part) for key, part in cells.groupby(["task", "length"], sort=False)
              if (part["expanded_layers"] > 0).any()]
    if not groups:
        raise ValueError("no measurement with an expanded state")
    mixers = in_order(expanded)
    with mpl.rc_context(theme()):
        figure = new_figure(2.9 * len(groups) + 1.9, 3.0)
        grid = figure.subplots(1, len(groups), squeeze=False)[0]
        for ((task, length), part), axes in zip(groups, grid, strict=True):
            for mixer, line in part.groupby("mixer", sort=False):
                look = mark(mixer)
                line = line.sort_values("state_size")
                axes.plot(line["state_size"], line["tokens_per_s"], color=look.colour, linewidth=1.2)
                for cell in line.to_dict("records"):
                    axes.plot(cell["state_size"], cell["tokens_per_s"], marker=look.marker, color=look.colour,
                              markersize=7, markerfacecolor=look.colour if cell["expanded_layers"] else "none")
            axes.set_xscale("log", base=2)
            axes.set(title=f"{task}, {length:,} tokens", xlabel="state elements",
                     ylim=(0, 1.1 * part["tokens_per_s"].max()))
            axes.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep="", places=1))
            axes.yaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
            sns.despine(ax=axes)
        grid[0].set_ylabel("tokens a second")
        grey = {"color": "#4d4d4d", "marker": "o", "linestyle": "none", "markersize": 6}
        legend(figure, {"Model": model_handles(mixers),
                        "State": [Line2D([], [], label="as it is", markerfacecolor="none", **grey),
                                  Line2D([], [], label="expanded", **grey)]})
        figure.suptitle("What a larger state costs in speed", x=0.01, ha="left")
    words = [f"{mark(cell['mixer']).name}, {cell['task']} at {cell['length']:,} tokens, "
             f"{int(cell['expanded_layers'])} layers expanded: {cell['state_size']:,.0f} elements, "
             f"{cell['tokens_per_s']:.4g} tokens a second" for _, part in groups for cell in part.to_dict("records")]
    return describe(figure, f"Speed against the size of the recurrent state. {'; '.join(words)}.")


def _line(axes: Axes, part: pd.DataFrame, column: str, mixer: str, source: str) -> None:
    part = part.dropna(subset=column).sort_values("length")
    look, style = mark(mixer), {"markeredgecolor": mark(mixer).colour, **SOURCES[source]}
    axes.plot(part["length"], part[column], color=look.colour, marker=look.marker, **style)


def _lengths(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}")
    axes.set_xlabel("tokens of the prompt")
    sns.despine(ax=axes)
