"""Resona, Table 8 (zero-shot scores of the pretrained models), the paper's values beside ours.

Ours come from rows of the experiment "table8", one for each model: config.mixer and config.variant as in the rows of
language models, and metrics by the table's heads, such as {"ARC-C": {"accuracy": 0.19, "accuracy_norm": 0.25}}. Until
there are such rows every cell is `not run`.
"""

from __future__ import annotations

import pandas as pd

from lrm_recall.figures.lm_rows import VARIANT_NAMES
from lrm_recall.figures.style import MODELS
from lrm_recall.figures.tables import markdown
from lrm_recall.figures.verdicts import NOT_REPRODUCED, NOT_RUN, TREND_ONLY
from lrm_recall.paper import paper_values

EXPERIMENT = "table8"
_TOLERANCE = 0.02  # of an accuracy: two standard errors of a task with 2,500 questions


def lm_table8(rows: pd.DataFrame, profile: str) -> pd.DataFrame:
    """Every cell of Table 8: model, variant, task, metric, paper, ours, verdict.

    The paper's claim is that Resona loses nothing on tasks that need no recall. So a cell with Resona is `trend only`
    when it is no more than 0.02 below our own base, `not reproduced` when it is, and a cell of a base or size-matched
    model has no verdict of its own. Parameters and perplexity, which are Table 2's, are left out.
    """
    values = paper_values("resona", 8)
    values = values[values["metric"].str.startswith("accuracy")]
    mixer_of = {m.name: mixer for mixer, m in MODELS.items()}
    table = pd.DataFrame({
        "mixer": values["model"].map(mixer_of), "model": values["model"], "variant": values["variant"],
        "task": values["task"], "metric": values["metric"], "paper": values["value"],
    }).reset_index(drop=True)  # fmt: skip
    ours = _ours(rows, profile)
    table["ours"] = [ours.get((line.mixer, line.variant, line.task, line.metric)) for line in table.itertuples()]
    table["verdict"] = [_verdict(line, ours) for line in table.to_dict("records")]
    return table


def table8_markdown(table: pd.DataFrame) -> str:
    """The table for a reader: a line a model and variant when something ran, otherwise one sentence."""
    if table["ours"].isna().all():
        return (f"None of the {len(table)} accuracies of Table 8 has a row: not run. "
                "`lrm-recall evaluate --tasks table8 --model_args pretrained=FOLDER` scores a trained model; the "
                "folder of each run is models/<key of its row> in the cache.")
    ran = table[table["ours"].notna()]
    return markdown(pd.DataFrame({
        "model": ran["model"], "variant": ran["variant"].map(VARIANT_NAMES), "task": ran["task"],
        "metric": ran["metric"], "paper": ran["paper"].map("{:.4f}".format), "ours": ran["ours"].map("{:.4f}".format),
        "verdict": ran["verdict"],
    }))  # fmt: skip


def _ours(rows: pd.DataFrame, profile: str) -> dict[tuple[str, str, str, str], float]:
    if "experiment" not in rows:
        return {}
    scored = rows[(rows["experiment"] == EXPERIMENT) & (rows["status"] == "ok") & (rows["profile"] == profile)]
    found = {}
    for row in scored.to_dict("records"):
        for name, value in row.items():
            parts = str(name).split(".")
            if parts[0] == "metrics" and len(parts) > 2 and not pd.isna(value):
                task = ".".join(parts[1:-1])  # some heads end in a full stop
                found[row["config.mixer"], row["config.variant"], task, parts[-1]] = value
    return found


def _verdict(line: dict, ours: dict[tuple[str, str, str, str], float]) -> str:
    if pd.isna(line["ours"]):
        return NOT_RUN
    if line["variant"] != "resona":
        return ""
    base = ours.get((line["mixer"], "base", line["task"], line["metric"]))
    if base is None:
        return NOT_RUN
    return TREND_ONLY if line["ours"] >= base - _TOLERANCE else NOT_REPRODUCED
