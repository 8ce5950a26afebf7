"""Resona, Figure 5: accuracy on MQAR against model dimension, base models above, Resona below them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrm_recall.figures.display import describe
from lrm_recall.figures.mqar_cells import chosen_runs, with_zoologys_examples
from lrm_recall.figures.mqar_table11 import printed_cells
from lrm_recall.figures.style import (
    OTHER_PROFILES,
    SOURCES,
    in_order,
    legend,
    mark,
    model_handles,
    new_figure,
    source_handle,
    theme,
    variant_name,
)

_WIDTH, _BASE_HEIGHT, _RESONA_HEIGHT = 2.6, 2.5, 1.05  # of a panel, in inches; Resona's lines are mostly flat


class Layer(NamedTuple):
    """What one source contributes to every panel."""

    source: str  # of style.SOURCES
    label: str
    runs: pd.DataFrame  # mixer, variant, length, d_model, accuracy


def mqar_figure5(rows: pd.DataFrame, profile: str, resona: Mapping[str, Any] | None = None) -> Figure:
    """Small multiples: one column a sequence length, one row a variant, one line a model.

    Filled markers on solid lines are the profile's own rows (mean over seeds, a bar of one standard deviation
    where there are several), small ones on dotted lines the committed rows of other profiles, rings on dashed
    lines the paper's Table 11 for the models drawn: a dot inside its ring is a value met. Base models are those with
    zoology's examples where these have run; no line joins models that have seen different numbers of examples.

    Args:
        rows: result rows of any number of profiles.
        profile: whose rows are this run's own.
        resona: the Resona options to draw, see `mqar_cells.mqar_runs`.

    Raises:
        ValueError: the profile has no MQAR rows.
    """
    runs = chosen_runs(with_zoologys_examples(rows), resona)
    own = runs[runs["profile"] == profile]
    if own.empty:
        raise ValueError(f"no MQAR rows of profile {profile!r} to draw; there are rows of: "
                         f"{', '.join(sorted(runs['profile'].unique())) or 'none'}")
    layers = [Layer("own", f"this run ({profile}):\n{_scale(own)}", own)]
    for name in OTHER_PROFILES:
        others = runs[runs["profile"] == name]
        if name != profile and len(others):
            layers.append(Layer(name, f"committed rows ({name}):\n{_scale(others)}", others))
    printed = _printed_values(pd.concat([layer.runs for layer in layers]))
    if len(printed):
        layers.append(Layer("printed", "the paper, Table 11", printed))
    with mpl.rc_context(theme()):
        figure = _draw(layers)
    return describe(figure, _alt(layers, profile))


def _scale(runs: pd.DataFrame) -> str:
    """"20,000 examples, up to 16 epochs" (ranges where cells differ), "3 seeds" where there are several."""
    examples, epochs = (_span(runs[name]) for name in ("num_train", "max_epochs"))
    seeds = runs["seed"].nunique()
    return f"{examples} examples,\nup to {epochs} epochs" + (f", {seeds} seeds" if seeds > 1 else "")


def _base_examples(own: pd.DataFrame, length: int) -> str:
    """How many examples the base models of a panel have seen, where panels differ in that."""
    base = own[own["variant"] == "base"]
    here = base.loc[base["length"] == length, "num_train"]
    return f"\nbase: {_span(here)} examples" if len(here) and base["num_train"].nunique() > 1 else ""


def _span(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _printed_values(runs: pd.DataFrame) -> pd.DataFrame:
    """Table 11's values for the models, variants, lengths and dimensions that the runs have."""
    values = printed_cells().rename(columns={"paper": "accuracy"})
    among = [values[name].isin(runs[name]) for name in ("mixer", "length", "d_model", "variant")]
    return values[pd.concat(among, axis=1).all(axis=1)]


def _draw(layers: list[Layer]) -> Figure:
    runs = pd.concat([layer.runs for layer in layers if layer.source != "printed"])
    lengths, variants = sorted(runs["length"].unique()), sorted(runs["variant"].unique())
    mixers, dimensions = in_order(runs["mixer"]), sorted(runs["d_model"].unique())
    heights = [_BASE_HEIGHT if variant == "base" else _RESONA_HEIGHT for variant in variants]
    figure = new_figure(_WIDTH * max(len(lengths), 1.4) + 2.4, sum(heights) + 0.9)
    grid = figure.subplots(len(variants), len(lengths), sharex=True, sharey=True, squeeze=False,
                           height_ratios=heights)
    for variant, line in zip(variants, grid, strict=True):
        for length, axes in zip(lengths, line, strict=True):
            for layer in layers:
                here = (layer.runs["variant"] == variant) & (layer.runs["length"] == length)
                _draw_layer(axes, layer.runs[here], layer.source, mixers, dimensions)
            axes.set(ylim=(-0.07, 1.12), yticks=[0, 0.5, 1.0], xlabel="", ylabel="")
            sns.despine(ax=axes)
        line[0].set_ylabel(variant_name(variant).replace(", ", ",\n"))
    for length, axes in zip(lengths, grid[0], strict=True):
        pairs = runs.loc[runs["length"] == length, "pairs"].iloc[0]
        axes.set_title(f"length {length}, {pairs} pairs{_base_examples(layers[0].runs, length)}")
    for axes in grid[-1]:
        axes.set_xlabel("model dimension")
    legend(figure, {"Model": model_handles(mixers),
                    "Source": [source_handle(layer.source, layer.label) for layer in layers]})
    figure.suptitle("Accuracy on multi-query associative recall (Resona, Figure 5)", x=0.01, ha="left")
    return figure


def _draw_layer(
    axes: Axes, runs: pd.DataFrame, source: str, mixers: list[str], dimensions: list[int]
) -> None:
    """One source's lines in one panel; models stand side by side, lest equal values hide each other."""
    if runs.empty:
        return
    style = dict(SOURCES[source])
    linestyle = style.pop("linestyle")
    sets = [runs] if source == "printed" else [part for _, part in runs.groupby("num_train")]
    for part in sets:  # a line for each: none joins models that have seen different numbers of examples
        sns.pointplot(
            data=part.astype({"accuracy": float}), x="d_model", y="accuracy", order=dimensions, hue="mixer",
            hue_order=mixers, palette=[mark(mixer).colour for mixer in mixers], dodge=0.11 * (len(mixers) - 1),
            markers=[mark(mixer).marker for mixer in mixers], linestyles=linestyle,
            errorbar="sd" if source == "own" else None, err_kws={"linewidth": 1.0}, legend=False, ax=axes,
            **style)


def _alt(layers: list[Layer], profile: str) -> str:
    """The figure in words, from its numbers: every own value, the range of what is drawn beside."""
    own = layers[0].runs.groupby(["length", "variant", "mixer", "d_model"])["accuracy"].mean()
    sentences = ["Accuracy on multi-query associative recall against model dimension; one column for each "
                 f"sequence length, one row for each variant. Own rows, profile {profile}:"]
    for (length, variant, mixer), values in own.groupby(level=["length", "variant", "mixer"]):
        points = ", ".join(f"{value:.3f} at {d_model}" for (*_, d_model), value in values.items())
        sentences.append(f"length {length}, {mark(mixer).name}, {variant_name(variant)}: {points};")
    for layer in layers[1:]:
        base = layer.runs["variant"] == "base"
        spread = [f"{words} {part.min():.3f} to {part.max():.3f}"
                  for words, part in (("base models", layer.runs["accuracy"][base]),
                                      ("with Resona", layer.runs["accuracy"][~base])) if len(part)]
        sentences.append(f"beside them {layer.label.partition(':')[0]}: {', '.join(spread)};")
    return " ".join(sentences).rstrip(";") + "."
