"""How language models learn: training and validation loss against steps, one panel a backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lrm_recall.figures.display import describe
from lrm_recall.figures.lm_rows import VARIANT_NAMES, lm_rows, variants_in
from lrm_recall.figures.style import VARIANTS, in_order, legend, mark, new_figure, theme

_COLUMNS = 3  # panels in a row


def lm_curves(rows: pd.DataFrame, profile: str, resona: Mapping[str, Any] | None = None) -> Figure:
    """Loss in nats a token: training as a line, validation as marks; seeds as mean and a band of one sd.

    Args:
        rows: result rows. profile: whose. resona: the Resona options to draw, see `lm_rows`.

    Raises:
        ValueError: no such rows.
    """
    runs = drawn_runs(rows, profile, resona)
    entries = pd.DataFrame([
        {"mixer": run["mixer"], "variant": run["variant"], "seed": run["seed"], "step": entry["step"],
         "kind": "loss" if "loss" in entry else "valid_loss", "loss": entry.get("loss", entry.get("valid_loss"))}
        for run in runs.to_dict("records") for entry in run["history"]])  # fmt: skip
    with mpl.rc_context(theme()):
        figure, panels = panels_of(runs)
        for mixer, axes in panels.items():
            for variant, look in looks(runs).items():
                here = entries[(entries["mixer"] == mixer) & (entries["variant"] == variant)]
                sns.lineplot(data=here[here["kind"] == "loss"], x="step", y="loss", errorbar="sd", ax=axes,
                             color=look["color"], linestyle=look["linestyle"], linewidth=1)  # fmt: skip
                valid = here[here["kind"] == "valid_loss"].groupby("step")["loss"].mean()
                axes.plot(valid.index, valid, **(look | {"linestyle": "none"}))
            axes.set(xlabel="", ylabel="", title=mark(mixer).name)
            sns.despine(ax=axes)
        finish(figure, panels, runs, "step", "nats a token")
        figure.suptitle("Loss while training: line; on the validation split: marks", x=0.01, ha="left")
    last = "; ".join(f"{mark(run['mixer']).name}, {VARIANT_NAMES[run['variant']]}: validation {run['valid_loss']:.3f}"
                     for run in runs.sort_values("seed").drop_duplicates(["mixer", "variant"]).to_dict("records"))
    return describe(figure, f"Training and validation loss in nats a token against steps, a panel for each backbone. "
                            f"Of the chosen weights, {last}.")


def drawn_runs(rows: pd.DataFrame, profile: str, resona: Mapping[str, Any] | None) -> pd.DataFrame:
    """The runs of a profile on windows of one article.

    Raises:
        ValueError: there are none.
    """
    runs = lm_rows(rows, resona)
    runs = runs[(runs["profile"] == profile) & ~runs["packed"].astype(bool)]
    if runs.empty:
        raise ValueError(f"no language-model rows of profile {profile!r}")
    return runs


def looks(runs: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """How the variants that are there are drawn."""
    return {variant: dict(VARIANTS[list(VARIANT_NAMES).index(variant)]) for variant in variants_in(runs)}


def panels_of(runs: pd.DataFrame) -> tuple[Figure, dict[str, mpl.axes.Axes]]:
    """A figure with a panel for each backbone."""
    mixers = in_order(runs["mixer"])
    columns = min(_COLUMNS, len(mixers))
    lines = -(-len(mixers) // columns)
    figure = new_figure(2.35 * columns + 1.9, 2.0 * lines + 0.7)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for axes in grid[len(mixers):]:
        axes.set_visible(False)
    return figure, dict(zip(mixers, grid, strict=False))


def finish(figure: Figure, panels: Mapping[str, mpl.axes.Axes], runs: pd.DataFrame, x: str, y: str) -> None:
    """Axis labels on the outer panels, and the legend."""
    drawn = list(panels.values())
    columns = min(_COLUMNS, len(drawn))
    for index, axes in enumerate(drawn):
        if index % columns == 0:
            axes.set_ylabel(y)
        if index + columns >= len(drawn):
            axes.set_xlabel(x)
            axes.tick_params(labelbottom=True)
    legend(figure, {"Variant": [Line2D([], [], label=VARIANT_NAMES[variant], **look)
                                for variant, look in looks(runs).items()]})  # fmt: skip
