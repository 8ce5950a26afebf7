"""How the models of Figure 5 learn: validation accuracy after each epoch, base and Resona in one panel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lrm_recall.figures.display import describe
from lrm_recall.figures.mqar_cells import chosen_runs
from lrm_recall.figures.style import VARIANTS, in_order, legend, mark, new_figure, theme, variant_name


def mqar_curves(
    rows: pd.DataFrame, profile: str, resona: Mapping[str, Any] | None = None, d_model: int | None = None
) -> Figure:
    """One column a model, one row a length, one line a variant: validation accuracy against epochs.

    Only the run with the chosen learning rate is drawn; several seeds give their mean and a band of one
    standard deviation. A line ends where training stopped early.

    Args:
        rows: result rows.
        profile: whose rows.
        resona: the Resona options to draw, see `mqar_cells.mqar_runs`.
        d_model: the model dimension to draw; None for the largest.

    Raises:
        ValueError: no such rows.
    """
    runs = chosen_runs(rows, resona)
    runs = runs[runs["profile"] == profile]
    dimension = runs["d_model"].max() if d_model is None else d_model
    runs = runs[runs["d_model"] == dimension]
    if runs.empty:
        raise ValueError(f"no MQAR rows of profile {profile!r} with d_model {d_model or 'of any size'}")
    epochs = _epochs(runs)
    with mpl.rc_context(theme()):
        figure = _draw(epochs)
        figure.suptitle(f"Validation accuracy while training, model dimension {dimension}", x=0.01, ha="left")
    return describe(figure, _alt(runs, dimension))


def _epochs(runs: pd.DataFrame) -> pd.DataFrame:
    """Histories as one row an epoch: mixer, variant, length, seed, epoch, valid_accuracy."""
    return pd.DataFrame([
        {**{name: run[name] for name in ("mixer", "variant", "length", "seed")},
         "epoch": entry["epoch"], "valid_accuracy": entry["valid_accuracy"]}
        for run in runs.to_dict("records") for entry in run["history"]])


def _draw(epochs: pd.DataFrame) -> Figure:
    mixers, lengths = in_order(epochs["mixer"]), sorted(epochs["length"].unique())
    variants = sorted(epochs["variant"].unique())
    looks = {variant: VARIANTS[index % len(VARIANTS)] for index, variant in enumerate(variants)}
    figure = new_figure(2.1 * len(mixers) + 1.7, 1.7 * len(lengths) + 0.8)
    grid = figure.subplots(len(lengths), len(mixers), sharex=True, sharey=True, squeeze=False)
    for length, line in zip(lengths, grid, strict=True):
        for mixer, axes in zip(mixers, line, strict=True):
            here = epochs[(epochs["length"] == length) & (epochs["mixer"] == mixer)]
            for variant, look in looks.items():
                sns.lineplot(data=here[here["variant"] == variant], x="epoch", y="valid_accuracy",
                             errorbar="sd", ax=axes, **look)
            axes.set(ylim=(-0.05, 1.07), yticks=[0, 0.5, 1], xlabel="", ylabel="",
                     title=f"{mark(mixer).name}, length {length}")
            axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True, nbins=5))
            sns.despine(ax=axes)
        line[0].set_ylabel("accuracy")
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    legend(figure, {"Variant": [Line2D([], [], label=variant_name(variant), **look)
                                for variant, look in looks.items()]})
    return figure


def _alt(runs: pd.DataFrame, dimension: int) -> str:
    first = runs.sort_values("seed").drop_duplicates(["mixer", "length", "variant"])
    lines = [f"{mark(run['mixer']).name}, length {run['length']}, {variant_name(run['variant'])}: "
             f"{run['valid_accuracy']:.3f} after {int(run['epochs'])} epochs" for run in first.to_dict("records")]
    return (f"Validation accuracy against epochs at model dimension {dimension}, one panel for each model and "
            f"length. {'; '.join(lines)}.")
