"""Resona, Table 2 (perplexity on WikiText-103), the paper's values beside ours, with a verdict for each line.

The verdicts. The paper makes two claims, and both are about differences: a model with Resona has a lower perplexity
than its base, and than a base of its own size. Differences are counted in nats a token, ln(perplexity).

reproduced      at the paper's own scale: the perplexity is within 5 % of the printed one.
trend only      not that, but the paper's statement about the line holds, by 0.005 nats (half a per cent of the
                perplexity) and, where both ran with several seeds, by more than the difference's standard deviation:
                + Resona            lower than the base and than the size-matched one (where the table has one)
                size-matched base   no higher than the base by more than that
not reproduced  we ran it and it does not hold, or one of its two differences does not.
not run         no row, or not the rows that a difference needs.

A base model at toy scale has no verdict: the perplexity of another model on another text is no claim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lrm_recall.figures.lm_rows import VARIANT_NAMES, lm_cells, losses_by_seed, nats_below
from lrm_recall.figures.style import MODELS, mark
from lrm_recall.figures.tables import NOTHING, markdown
from lrm_recall.figures.verdicts import NOT_REPRODUCED, NOT_RUN, REPRODUCED, TREND_ONLY, VERDICTS
from lrm_recall.paper import paper_values

LEAST_NATS = 0.005
PAPER_TOLERANCE = 0.05  # of the perplexity
PAPER_STEPS, PAPER_CORPUS, PAPER_SOURCE = 8000, "wikitext103", "hub:"
# Appendix A.4: layers, hidden size of the base, and of the size-matched model
PAPER_SHAPES = {"gla": (24, 600, 640), "deltanet": (24, 600, 640), "retnet": (24, 600, 640), "mamba": (48, 600, 640),
                "hymba": (24, 512, 512)}  # fmt: skip
_PAPER_MODELS = {"GLA": "gla", "DeltaNet": "deltanet", "RetNet": "retnet", "Mamba": "mamba", "Hymba(64)": "hymba"}
_PAPER_VARIANTS = {"base": "base", "sp": "sp", "resona": "resona", "resona_sp": "resona"}


def lm_table2(rows: pd.DataFrame, profile: str, resona: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Every line of Table 2, and our lines that the paper does not have.

    Args:
        rows: result rows (`lrm_recall.results.load_profiles`).
        profile: whose rows are ours.
        resona: the Resona options that count as ours, see `lm_rows`.

    Returns:
        mixer, model, variant; paper_params (millions) and paper_ppl; parameters; ppl_paper and sd_paper where a line
        was run at the paper's scale, ppl_toy and sd_toy where it was not (sd in nats a token); word_ppl; seeds; scale,
        in words; gain_base and gain_sp, nats a token below our base and our size-matched model at the same seeds; gaps,
        what keeps the line from the paper's scale; verdict.
    """
    cells = lm_cells(rows, resona)
    ours = cells[(cells["profile"] == profile) & ~cells["packed"].astype(bool)]
    table = _paper_lines().merge(ours, on=["mixer", "variant"], how="outer")
    table["seeds"] = table["seeds"].fillna(0).astype(int)
    table["gaps"] = ["; ".join(paper_scale_gaps(line)) if line["seeds"] else "" for line in table.to_dict("records")]
    at_paper = (table["seeds"] > 0) & (table["gaps"] == "")
    toy = (table["seeds"] > 0) & ~at_paper
    ppl = table["test_loss"].map(math.exp, na_action="ignore")
    for kind, where in (("paper", at_paper), ("toy", toy)):
        table[f"ppl_{kind}"], table[f"sd_{kind}"] = ppl.where(where), table["sd"].where(where)
    losses = losses_by_seed(rows, profile, resona)
    for other in ("base", "sp"):
        table[[f"gain_{other}", f"gain_sd_{other}"]] = _gains(table, losses, other)
    table["scale"] = [_scale_words(line, profile) for line in table.to_dict("records")]
    there = set(zip(table["mixer"], table["variant"], strict=True))
    table["verdict"] = [_verdict(line, there) for line in table.to_dict("records")]
    table = table.assign(
        model=[mark(mixer).name for mixer in table["mixer"]],
        line=[(list(MODELS).index(mixer), list(VARIANT_NAMES).index(variant))
              for mixer, variant in zip(table["mixer"], table["variant"], strict=True)],
    ).sort_values("line")  # fmt: skip
    names = ["mixer", "model", "variant", "paper_params", "paper_ppl", "parameters", "ppl_paper", "sd_paper", "ppl_toy",
             "sd_toy", "test_word_ppl", "seeds", "scale", "gain_base", "gain_sp", "gaps", "verdict"]
    return table[names].rename(columns={"test_word_ppl": "word_ppl"}).reset_index(drop=True)


def paper_scale_gaps(line: Mapping[str, Any]) -> list[str]:
    """What keeps a line from being at the paper's scale; empty when it is.

    Text, shape and steps must be the paper's. Length and batch are not published. The paper also has a large language
    model extend every article; rows say so in the name of their corpus once it is done.
    """
    layers, width, matched = PAPER_SHAPES.get(line["mixer"], (None, None, None))
    corpus, _, augmentation = str(line["corpus"]).partition("-")
    wanted = {
        f"{PAPER_CORPUS} from the hub": corpus == PAPER_CORPUS and str(line["source"]).startswith(PAPER_SOURCE),
        "articles extended by a language model": augmentation == "written",
        f"{layers} layers": line["num_layers"] == layers,
        f"hidden size {matched if line['variant'] == 'sp' else width}":
            line["hidden_size"] == (matched if line["variant"] == "sp" else width),
        f"{PAPER_STEPS:,} steps": line["steps"] >= PAPER_STEPS,
    }  # fmt: skip
    return [gap for gap, met in wanted.items() if not met]


def table2_markdown(table: pd.DataFrame) -> str:
    """The lines that ran as markdown for a reader, one table a scale, and the count of verdicts."""
    parts = []
    for kind, title in (("paper", "At the paper's scale"), ("toy", "At toy scale, not the paper's")):
        ran = table[table[f"ppl_{kind}"].notna()]
        if len(ran):
            scales = "; ".join(dict.fromkeys(ran["scale"]))
            parts.append(f"{title} ({scales}):\n\n{markdown(_for_readers(ran, kind))}")
    printed = table[table["paper_ppl"].notna()]
    counts = printed["verdict"].value_counts()
    words = ", ".join(f"{int(counts.get(verdict, 0))} {verdict}" for verdict in VERDICTS)
    bases = int((printed["verdict"] == "").sum())
    bare = f"; {bases} base models at toy scale without a verdict" if bases else ""
    parts.append(f"Of the {len(printed)} lines of Table 2: {words}{bare}.")
    return "\n\n".join(parts)


def _paper_lines() -> pd.DataFrame:
    """Table 2 as printed: mixer, variant, paper_params, paper_ppl."""
    values = paper_values("resona", 2)
    values = values.assign(mixer=values["model"].map(_PAPER_MODELS), variant=values["variant"].map(_PAPER_VARIANTS))
    wide = values.pivot(index=["mixer", "variant"], columns="metric", values="value").reset_index()
    return wide.rename(columns={"params": "paper_params", "ppl": "paper_ppl"}).rename_axis(columns=None)


def _gains(
    table: pd.DataFrame, losses: Mapping[str, Mapping[str, pd.Series]], other: str
) -> list[tuple[float, float]]:  # fmt: skip
    """How many nats a token each line lies below the other variant of its model, at the seeds that both ran with, and
    the standard deviation of that; positive is better."""
    gains = []
    for line in table.to_dict("records"):
        found = losses.get(line["mixer"], {})
        own = found.get(line["variant"], pd.Series(dtype=float))
        gains.append(nats_below(own, None if line["variant"] == other else found.get(other))[:2])
    return gains


def _verdict(line: Mapping[str, Any], there: set[tuple[str, str]]) -> str:
    """The verdict of a line; `there` are the mixers and variants of the table."""
    if pd.isna(line["paper_ppl"]):
        return ""
    if not line["seeds"]:
        return NOT_RUN
    if not line["gaps"] and abs(line["ppl_paper"] / line["paper_ppl"] - 1) <= PAPER_TOLERANCE:
        return REPRODUCED
    if line["variant"] == "base":
        return NOT_REPRODUCED if not line["gaps"] else ""
    others = ["base"] if line["variant"] == "sp" or (line["mixer"], "sp") not in there else ["base", "sp"]
    gains = {other: line[f"gain_{other}"] for other in others}
    noise = {other: np.fmax(LEAST_NATS, line[f"gain_sd_{other}"]) for other in others}  # one seed has no deviation
    least = {other: -noise[other] if line["variant"] == "sp" else noise[other] for other in others}
    if any(gain <= least[other] for other, gain in gains.items()):  # what has not run could not mend it
        return NOT_REPRODUCED
    return NOT_RUN if any(pd.isna(gain) for gain in gains.values()) else TREND_ONLY


def _scale_words(line: Mapping[str, Any], profile: str) -> str:
    if not line["seeds"]:
        return ""
    budget = f"{line['tokens'] / 1e6:.2g}M tokens in {line['steps']:,.0f} steps"
    return f"{profile}: {line['corpus']} from {line['source']}, {budget}"


def _for_readers(ran: pd.DataFrame, kind: str) -> pd.DataFrame:
    lines = ran.to_dict("records")

    def signed(value: float) -> str:
        return NOTHING if pd.isna(value) else f"{value:+.3f}"

    def ours(line: Mapping[str, Any]) -> str:
        spread = "" if line["seeds"] < 2 else f" (± {line[f'sd_{kind}']:.3f} nats, {line['seeds']} seeds)"
        return f"{line[f'ppl_{kind}']:.2f}{spread}"

    return pd.DataFrame({
        "model": [line["model"] for line in lines],
        "variant": [VARIANT_NAMES[line["variant"]] for line in lines],
        "paper: M": [NOTHING if pd.isna(line["paper_params"]) else f"{line['paper_params']:.0f}" for line in lines],
        "paper: PPL": [NOTHING if pd.isna(line["paper_ppl"]) else f"{line['paper_ppl']:.3f}" for line in lines],
        "ours: M": [f"{line['parameters'] / 1e6:.2f}" for line in lines],
        "ours: PPL by token": [ours(line) for line in lines],
        "by word": [f"{line['word_ppl']:,.1f}" for line in lines],
        "nats below base": [signed(line["gain_base"]) for line in lines],
        "below size-matched": [signed(line["gain_sp"]) for line in lines],
        "verdict": [line["verdict"] or NOTHING for line in lines],
    })
