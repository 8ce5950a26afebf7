"""Resona, Table 11 (best accuracy on MQAR), paper's values beside ours, with a verdict for each cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from lrm_recall.figures.mqar_cells import mqar_cells, with_zoologys_examples
from lrm_recall.figures.style import MODELS, mark
from lrm_recall.figures.tables import NOTHING, markdown, mean_sd
from lrm_recall.figures.verdicts import (
    LACKS_RATES,
    NOT_RUN,
    PAPER_LEARNING_RATES,
    PAPER_POSITIONS_A_PAIR,
    VERDICTS,
    base_verdict,
    paper_scale_gaps,
    resona_verdict,
)
from lrm_recall.paper import paper_values

_TITLES = {
    "paper": "At the paper's scale",
    "unfinished": "At the paper's scale, with learning rates still to be tried",
    "toy": "At toy scale, not the paper's",
}
_PLACE = ["mixer", "length", "pairs", "d_model"]  # of a cell in the table, its variant left out
_OURS = ["accuracy", "sd", "sequence_accuracy", "sequence_sd"]


def mqar_table11(rows: pd.DataFrame, profile: str, resona: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Every cell of Table 11, and our cells of models that the paper does not have.

    Base models are those with zoology's examples, where these have run (`with_zoologys_examples`); a line with Resona
    is judged beside the base model of its own budget.

    Args:
        rows: result rows (`lrm_recall.results.load_profiles`).
        profile: whose rows are ours.
        resona: the Resona options that count as ours, see `mqar_cells`.

    Returns:
        mixer, model, variant ("base", "resona0", "resona2"), length, pairs, d_model; `paper`, the printed
        accuracy; ours, in accuracy_paper, sd_paper ... where a cell was run at the paper's scale and in
        accuracy_toy, sd_toy ... where it was not, in accuracy_unfinished ... where learning rates are all that is
        still to be tried: they never share a column (accuracy is per labelled position, sequence_accuracy the whole
        output); seeds; num_train; scale, in words; verdict, empty for a cell that the paper does not have.
    """
    table = _beside_the_paper(mqar_cells(with_zoologys_examples(rows), resona), profile)
    table["verdict"] = _verdicts(table, _beside_the_paper(mqar_cells(rows, resona), profile))
    for kind in _TITLES:
        for name in _OURS:
            table[f"{name}_{kind}"] = table[name].where(table["scale_kind"] == kind)
    table = table.assign(order=table["mixer"].map(list(MODELS).index))
    table = table.sort_values(["order", "length", "d_model", "variant"]).reset_index(drop=True)
    return table[["mixer", "model", "variant", "length", "pairs", "d_model", "paper",
                  *(f"{name}_{kind}" for kind in _TITLES for name in _OURS), "seeds", "num_train", "scale", "verdict"]]


def verdict_counts(table: pd.DataFrame) -> dict[str, int]:
    """How many of the paper's cells have each verdict, in the order of VERDICTS."""
    counts = table["verdict"].value_counts()
    return {verdict: int(counts.get(verdict, 0)) for verdict in VERDICTS}


def results_table_markdown(table: pd.DataFrame) -> str:
    """The cells that ran as markdown for a reader: one line a model, length and dimension; one table a scale.

    Args:
        table: what `mqar_table11` returns.
    """
    parts = []
    for kind, title in _TITLES.items():
        ran = table[table[f"accuracy_{kind}"].notna()]
        if len(ran):
            scales = "; ".join(dict.fromkeys(ran["scale"]))
            parts.append(f"{title} ({scales}):\n\n{markdown(_wide(ran, kind))}")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdict_counts(table).items())
    parts.append(f"Of the {int(table['paper'].notna().sum())} cells of Table 11: {counts}.")
    return "\n\n".join(parts)


def printed_cells() -> pd.DataFrame:
    """Table 11 as printed: mixer, variant, length, pairs, d_model, paper."""
    mixer_of = {m.name: mixer for mixer, m in MODELS.items()}
    values = paper_values("resona", 11)
    return pd.DataFrame({
        "mixer": values["model"].map(mixer_of), "variant": values["variant"], "length": values["L"],
        "pairs": values["L"] // PAPER_POSITIONS_A_PAIR, "d_model": values["d_model"], "paper": values["value"]})


def _beside_the_paper(cells: pd.DataFrame, profile: str) -> pd.DataFrame:
    """The printed cells and a profile's own, those that both have in one line, with what scale ours are of."""
    ours = cells[cells["profile"] == profile].drop(columns="profile")
    table = printed_cells().merge(ours, on=[*_PLACE, "variant"], how="outer")
    gaps = [paper_scale_gaps(cell) if cell["seeds"] > 0 else [] for cell in table.to_dict("records")]
    scale = [_kind(gap) if seeds > 0 else "" for seeds, gap in zip(table["seeds"], gaps, strict=True)]
    table = table.assign(scale_kind=scale, seeds=table["seeds"].fillna(0).astype(int),
                         model=[mark(mixer).name for mixer in table["mixer"]])
    return table.assign(scale=[_scale_words(cell, profile) for cell in table.to_dict("records")])


def _kind(gaps: list[str]) -> str:
    """Which of _TITLES a cell belongs under."""
    return "paper" if not gaps else "unfinished" if gaps == [LACKS_RATES] else "toy"


def _scale_words(cell: Mapping[str, Any], profile: str) -> str:
    """"laptop: 20,000 examples, at most 16 epochs", empty for a cell that did not run.

    How many learning rates were tried is part of it where others are still to be: a model that is solved at the first
    is not trained again.
    """
    if not cell["seeds"]:
        return ""
    words = f"{profile}: {int(cell['num_train']):,} examples, at most {int(cell['max_epochs'])} epochs"
    if cell["scale_kind"] != "unfinished":
        return words
    return f"{words}, {len(cell['learning_rates'])} of {len(PAPER_LEARNING_RATES)} learning rates"


def _verdicts(table: pd.DataFrame, same_budget: pd.DataFrame) -> list[str]:
    """The verdict of each line; a line with Resona is judged beside the base line of the same scale, of `same_budget`.
    """
    base = same_budget[same_budget["variant"] == "base"]
    base = base.set_index([*_PLACE, "scale"])["accuracy"].dropna().to_dict()
    paper_base = table[table["variant"] == "base"].set_index(_PLACE)["paper"].to_dict()
    return [_verdict(cell, base, paper_base) for cell in table.to_dict("records")]


def _verdict(cell: Mapping[str, Any], base: Mapping[tuple, float], paper_base: Mapping[tuple, float]) -> str:
    if pd.isna(cell["paper"]):
        return ""
    if not cell["seeds"] or cell["scale_kind"] == "unfinished":
        return NOT_RUN
    place = tuple(cell[name] for name in _PLACE)
    at_paper_scale = cell["scale_kind"] == "paper"
    if cell["variant"] == "base":
        return base_verdict(cell["accuracy"], cell["paper"], pairs=cell["pairs"],
                            at_paper_scale=at_paper_scale)
    return resona_verdict(cell["accuracy"], cell["paper"], our_base=base.get((*place, cell["scale"])),
                          paper_base=paper_base[place], at_paper_scale=at_paper_scale)


def _wide(ran: pd.DataFrame, kind: str) -> pd.DataFrame:
    """One line a place, for each variant the paper's value, ours and the verdict."""
    places = ran[_PLACE].drop_duplicates()
    wide = pd.DataFrame({"model": [mark(mixer).name for mixer in places["mixer"]],
                         "L, pairs": [f"{p.length}, {p.pairs}" for p in places.itertuples()],
                         "d_model": [str(d_model) for d_model in places["d_model"]]})
    for variant in sorted(ran["variant"].unique()):
        cells = places.merge(ran[ran["variant"] == variant], on=_PLACE, how="left")
        title = variant if variant == "base" else f"+Resona {variant.removeprefix('resona')}"
        if variant == "base" and ran["num_train"].nunique() > 1:
            wide[f"{title}: examples"] = [NOTHING if pd.isna(many) else f"{many:,.0f}" for many in cells["num_train"]]
        wide[f"{title}: paper"] = [NOTHING if pd.isna(value) else f"{value:.3f}" for value in cells["paper"]]
        wide[f"{title}: ours"] = [mean_sd(cell[f"accuracy_{kind}"], cell[f"sd_{kind}"], cell["seeds"])
                                  for cell in cells.to_dict("records")]
        wide[f"{title}: verdict"] = [verdict if isinstance(verdict, str) and verdict else NOTHING
                                     for verdict in cells["verdict"]]
    return wide
