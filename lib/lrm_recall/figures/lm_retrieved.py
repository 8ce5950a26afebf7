"""Which chunks a trained model retrieves in one article: a map of who reads whom, and some of the texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lrm_recall.figures.display import describe
from lrm_recall.figures.lm_curves import drawn_runs
from lrm_recall.figures.style import mark, new_figure, theme


def lm_retrieved(
    rows: pd.DataFrame, profile: str, mixer: str, resona: Mapping[str, Any] | None = None
) -> Figure:
    """One panel a Resona layer: the share of each chunk's positions (row) that read an earlier chunk (column).

    Args:
        rows: result rows. profile: whose. mixer: of which backbone; the first seed counts.
        resona: the Resona options, see `lm_rows`.

    Raises:
        ValueError: no run of that backbone with Resona.
    """
    run = _run(rows, profile, mixer, resona)
    layers = run["retrieval_layers"]
    with mpl.rc_context(theme()):
        figure = new_figure(2.5 * len(layers) + 1.2, 3.0)
        grid = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
        for layer, axes in zip(layers, grid, strict=True):
            shares = np.array(layer["shares"])  # [N, N]
            hidden = np.triu(np.ones_like(shares, dtype=bool))
            image = axes.imshow(np.ma.masked_array(shares, hidden), cmap="Blues", vmin=0, vmax=1)
            axes.set_facecolor("#ececec")
            axes.set(title=f"layer {layer['layer']}", xlabel="chunk that is read")
            axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True, nbins=6))
            axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True, nbins=6))
            axes.grid(False)
        grid[0].set_ylabel("chunk that asks")
        figure.colorbar(image, ax=list(grid), label="share of its positions", shrink=0.8)
        size = int(run["retrieval_chunk_size"])
        figure.suptitle(f"{mark(mixer).name} + Resona in “{run['retrieval_title']}”, {size} tokens a chunk", x=0.01,
                        ha="left")  # fmt: skip
    return describe(figure, f"What {mark(mixer).name} with Resona retrieves in the article {run['retrieval_title']!r}. "
                            + " ".join(_in_words(layer) for layer in layers)
                            + " Grey: chunks that are not in the past.")


def retrieved_texts(
    rows: pd.DataFrame, profile: str, mixer: str, resona: Mapping[str, Any] | None = None, count: int = 4
) -> pd.DataFrame:
    """The chunks whose retrieval the last Resona layer trusts most: what asks, what is read, share and weight.

    Args and raises as `lm_retrieved`; count: how many.
    """
    run = _run(rows, profile, mixer, resona)
    layer, texts = run["retrieval_layers"][-1], run["retrieval_texts"]
    shares, weights = np.array(layer["shares"]), np.array(layer["weights"])
    read = shares.argmax(axis=1)
    trust = weights * shares.max(axis=1)
    asking = [int(n) for n in np.argsort(-trust, kind="stable") if shares[n].any()][:count]
    return pd.DataFrame({
        "chunk that asks": [_quoted(texts[n]) for n in asking],
        "chunk that most of its positions read": [_quoted(texts[read[n]]) for n in asking],
        "how far back": [f"{n - int(read[n])} chunks" for n in asking],
        "share of positions": [float(shares[n].max()) for n in asking],
        "weight": [float(weights[n]) for n in asking],
    })


def _run(rows: pd.DataFrame, profile: str, mixer: str, resona: Mapping[str, Any] | None) -> dict[str, Any]:
    runs = drawn_runs(rows, profile, resona)
    runs = runs[(runs["mixer"] == mixer) & (runs["variant"] == "resona")].sort_values("seed")
    if runs.empty:
        raise ValueError(f"no run of {mixer!r} with Resona in profile {profile!r}")
    return runs.iloc[0].to_dict()


def _in_words(layer: Mapping[str, Any]) -> str:
    shares, weights = np.array(layer["shares"]), np.array(layer["weights"])
    asking = shares.sum(axis=1) > 0
    back = np.arange(len(shares)) - shares.argmax(axis=1)
    previous = float((back[asking] == 1).mean())
    return (f"Layer {layer['layer']}: {previous:.0%} of the chunks mostly read the one before them; mean weight of "
            f"what is found {weights[asking].mean():.2f}.")


def _quoted(text: str) -> str:
    return " ".join(text.split())
