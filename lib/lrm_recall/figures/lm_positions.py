"""Perplexity by position in the sequence: whether a model makes use of what it has read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lrm_recall.figures.display import describe
from lrm_recall.figures.lm_curves import drawn_runs, finish, looks, panels_of
from lrm_recall.figures.lm_rows import VARIANT_NAMES
from lrm_recall.figures.style import mark, theme


def lm_positions(rows: pd.DataFrame, profile: str, resona: Mapping[str, Any] | None = None) -> Figure:
    """Perplexity on the test split against the tokens that stand before, one panel a backbone.

    Buckets double in width; a mark stands at the middle of its bucket on the logarithmic axis. Seeds: mean and a band.

    Args and raises as `lm_curves`.
    """
    runs = drawn_runs(rows, profile, resona)
    points = pd.DataFrame([
        {"mixer": run["mixer"], "variant": run["variant"], "seed": run["seed"],
         "before": math.sqrt(max(bucket["start"], 4) * bucket["end"]), "ppl": math.exp(min(bucket["loss"], 700))}
        for run in runs.to_dict("records") for bucket in run["test_positions"]])  # fmt: skip
    with mpl.rc_context(theme()):
        figure, panels = panels_of(runs)
        for mixer, axes in panels.items():
            for variant, look in looks(runs).items():
                here = points[(points["mixer"] == mixer) & (points["variant"] == variant)]
                sns.lineplot(data=here, x="before", y="ppl", errorbar="sd", ax=axes, **look)
            axes.set(xscale="log", xlabel="", ylabel="", title=mark(mixer).name)
            axes.xaxis.set_major_locator(mpl.ticker.LogLocator(base=4, numticks=8))
            axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%d"))
            axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
            sns.despine(ax=axes)
        finish(figure, panels, runs, "tokens before, in the window", "perplexity by token")
        figure.suptitle("Perplexity on the test split by position in the sequence", x=0.01, ha="left")
    ends = []
    for run in runs.sort_values("seed").drop_duplicates(["mixer", "variant"]).to_dict("records"):
        first, last = (math.exp(min(run["test_positions"][i]["loss"], 700)) for i in (0, -1))
        ends.append(f"{mark(run['mixer']).name}, {VARIANT_NAMES[run['variant']]}: {first:.1f} to {last:.1f}")
    return describe(figure, "Perplexity by token against the number of tokens before it in its window, a panel for "
                            f"each backbone. From the first bucket to the last, {'; '.join(ends)}.")
