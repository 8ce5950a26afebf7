"""Controls of the language-model runs: retrieval that cannot help, and what leaks between packed articles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lrm_recall.figures.lm_rows import VARIANT_NAMES, lm_cells
from lrm_recall.figures.style import in_order, mark


def retrieval_control(rows: pd.DataFrame, profile: str, resona: Mapping[str, Any], mixer: str) -> pd.DataFrame:
    """The base, Resona, Resona that is made to read random chunks, and Resona trained with no weight (alpha 1).

    Args:
        rows: result rows. profile: whose. mixer: of which backbone. resona: the options in use.

    Returns:
        model, retrieval, test PPL (by token); lines that did not run are left out.
    """
    def cells(options: Mapping[str, Any]) -> pd.DataFrame:
        found = lm_cells(rows, options)
        return found[(found["profile"] == profile) & ~found["packed"].astype(bool) & (found["mixer"] == mixer)]

    lines = []
    in_use, without = cells(resona), cells({**resona, "alpha": 1.0})
    for cell in in_use[in_use["variant"] == "base"].to_dict("records"):
        lines.append((VARIANT_NAMES["base"], "none", math.exp(cell["test_loss"])))
    for cell in in_use[in_use["variant"] == "resona"].to_dict("records"):
        lines.append(("+ Resona", "the chunks that it finds", math.exp(cell["test_loss"])))
        lines.append(("the same weights", "random chunks of the past", cell["random_chunks_ppl"]))
    for cell in without[without["variant"] == "resona"].to_dict("records"):
        lines.append(("+ Resona, alpha 1", "trained without any weight", math.exp(cell["test_loss"])))
    return pd.DataFrame([(mark(mixer).name, *line) for line in lines],
                        columns=["backbone", "model", "retrieval", "test PPL"])  # fmt: skip


def ablation_table(
    rows: pd.DataFrame, profile: str, resona: Mapping[str, Any], mixer: str, changes: Mapping[str, Sequence[Any]]
) -> pd.DataFrame:
    """One line a change of one Resona option, the options in use first: test PPL and nats a token below the base.

    Args:
        rows: result rows. profile: whose. mixer: of which backbone. resona: the options in use.
        changes: option -> values that were tried in its place.

    Returns:
        option, value, test PPL, sd (nats, over seeds), nats below base, seeds; lines that did not run are left out.
    """
    lines = []
    for option, value in [("in use", ""), *((name, each) for name, values in changes.items() for each in values)]:
        cells = lm_cells(rows, resona if option == "in use" else {**resona, option: value})
        cells = cells[(cells["profile"] == profile) & ~cells["packed"].astype(bool) & (cells["mixer"] == mixer)]
        losses = cells.set_index("variant")["test_loss"]
        if "resona" in losses:
            cell = cells[cells["variant"] == "resona"].iloc[0]
            lines.append((option, str(value), math.exp(losses["resona"]), cell["sd"],
                          losses.get("base", math.nan) - losses["resona"], int(cell["seeds"])))
    return pd.DataFrame(lines, columns=["option", "value", "test PPL", "sd", "nats below base", "seeds"])


def leak_table(rows: pd.DataFrame, profile: str, resona: Mapping[str, Any]) -> pd.DataFrame:
    """What another article in front of an article does to its loss, for both ways of cutting text into sequences.

    Returns:
        backbone, model, trained on, alone and behind (nats a token over the first window of each test article), leak
        (behind - alone), test PPL of the whole split.
    """
    cells = lm_cells(rows, resona)
    cells = cells[cells["profile"] == profile]
    both = cells[cells.duplicated(["mixer", "variant"], keep=False)]
    order = {mixer: place for place, mixer in enumerate(in_order(both["mixer"]))}
    both = both.assign(place=both["mixer"].map(order)).sort_values(["place", "variant", "packed"])
    return pd.DataFrame([
        {"backbone": mark(cell["mixer"]).name, "model": VARIANT_NAMES[cell["variant"]],
         "trained on": "packed articles" if cell["packed"] else "one article a sequence",
         "alone": cell["alone_loss"], "behind another": cell["behind_loss"],
         "leak": cell["behind_loss"] - cell["alone_loss"], "test PPL": math.exp(cell["test_loss"])}
        for cell in both.to_dict("records")])  # fmt: skip


def speed_table(rows: pd.DataFrame, profile: str, resona: Mapping[str, Any]) -> pd.DataFrame:
    """Tokens a second of training, by backbone and variant, as measured in the runs themselves."""
    cells = lm_cells(rows, resona)
    cells = cells[(cells["profile"] == profile) & ~cells["packed"].astype(bool)]
    lines = [
        {"backbone": mark(mixer).name,
         **{f"{VARIANT_NAMES[variant]}: tokens/s": f"{cell['tokens_per_s'].mean():,.0f}"
            for variant, cell in cells[cells["mixer"] == mixer].groupby("variant")}}
        for mixer in in_order(cells["mixer"])]  # fmt: skip
    return pd.DataFrame(lines)
