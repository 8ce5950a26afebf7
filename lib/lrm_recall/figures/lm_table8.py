"""Resona, Table 8 (zero-shot scores of the pretrained models), the paper's values beside ours.

Ours are of the models of Table 2, as `lrm_recall.train.lm_scores` scores them. Until there are such rows every cell
is `not run`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from lrm_recall.figures.lm_rows import VARIANT_NAMES, lm_rows
from lrm_recall.figures.style import MODELS
from lrm_recall.figures.tables import markdown
from lrm_recall.figures.verdicts import NOT_REPRODUCED, NOT_RUN, TREND_ONLY, VERDICTS
from lrm_recall.paper import paper_values
from lrm_recall.train.lm_scores import EXPERIMENT

_ERRORS = 2  # standard errors of a difference that chance explains
_ALL = "AVG"


def table8_mixers() -> list[str]:
    """The backbones that the paper's Table 8 has."""
    return list(dict.fromkeys(_paper()["mixer"]))


def lm_table8(
    rows: pd.DataFrame, scores: pd.DataFrame, profile: str, resona: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """Every accuracy of Table 8: mixer, model, variant, task, metric, paper, ours (the mean over seeds), error (its
    standard error, over questions), seeds, source (of the questions), verdict.

    The paper's claim is that Resona loses nothing on tasks that need no recall. So a cell with Resona is `not
    reproduced` when it is below our own base by more than two standard errors of their difference, otherwise `trend
    only`, and a cell of a base or size-matched model has no verdict of its own. Parameters and perplexity, which are
    Table 2's, are left out.

    Args:
        rows, resona: as for `lrm_recall.figures.lm_rows.lm_rows`; scores count of the models that count there.
        scores: the rows of `lrm_recall.train.lm_scores`.
    """
    table = _paper()
    cells = _cells(rows, scores, profile, resona)
    for column in ("ours", "error", "seeds", "source"):
        table[column] = [cells.get(_key(line), {}).get(column) for line in table.to_dict("records")]
    table["verdict"] = [_verdict(line, cells) for line in table.to_dict("records")]
    return table


def table8_markdown(table: pd.DataFrame) -> str:
    """The table for a reader: a line a model and variant, a column a score that ran; or one sentence."""
    if table["ours"].isna().all():
        return (f"None of the {len(table)} accuracies of Table 8 has a row: not run. `zero_shot` names the tasks to "
                "score the models in that were trained here; `lrm-recall evaluate --tasks table8 --model_args "
                "pretrained=FOLDER` scores any model.")
    ran = table[table["ours"].notna()]
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for cell in ran.to_dict("records"):
        line = lines.setdefault((cell["model"], cell["variant"]),
                                {"model": cell["model"], "variant": VARIANT_NAMES[cell["variant"]]})  # fmt: skip
        name = cell["task"] + (" norm." if cell["metric"] == "accuracy_norm" else "")
        line[f"{name}: paper"] = f"{cell['paper']:.3f}"
        line[f"{name}: ours"] = f"{cell['ours']:.3f} ± {cell['error']:.3f}"
    behind = ran.loc[ran["verdict"] == NOT_REPRODUCED].to_dict("records")
    names = ", ".join(f"{cell['model']} in {cell['task']} ({cell['metric']})" for cell in behind)
    counts = ", ".join(f"{int((table['verdict'] == verdict).sum())} {verdict}" for verdict in VERDICTS)
    return "\n".join([
        markdown(pd.DataFrame(list(lines.values()))), "",
        f"Questions from {' and '.join(sorted(set(ran['source'])))}; ± is the standard error over questions. With "
        f"Resona below its base by more than two standard errors of the difference: {names or 'none'}.", "",
        f"Of the {len(table)} accuracies of Table 8: {counts}; {int((table['verdict'] == '').sum())} of base and "
        "size-matched models without a verdict.",
    ])  # fmt: skip


def _paper() -> pd.DataFrame:
    values = paper_values("resona", 8)
    values = values[values["metric"].str.startswith("accuracy")]
    mixer_of = {m.name: mixer for mixer, m in MODELS.items()}
    return pd.DataFrame({
        "mixer": values["model"].map(mixer_of), "model": values["model"], "variant": values["variant"],
        "task": values["task"], "metric": values["metric"], "paper": values["value"],
    }).reset_index(drop=True)  # fmt: skip


def _key(cell: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return cell["mixer"], cell["variant"], cell["task"], cell["metric"]


def _cells(
    rows: pd.DataFrame, scores: pd.DataFrame, profile: str, resona: Mapping[str, Any] | None
) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """ours, error, seeds and source of each cell that ran, and what was asked: source and number of questions. Of a
    model's scores in a task the newest count, of several models those that were asked what the newest was."""
    trained = lm_rows(rows, resona)
    trained = trained[(trained["profile"] == profile) & ~trained["packed"].astype(bool)]
    if scores.empty:
        return {}
    scored = scores[(scores["experiment"] == EXPERIMENT) & (scores["status"] == "ok")
                    & scores["config.trained"].isin(set(trained["key"])) & scores["config.limit"].isna()]  # fmt: skip
    found: dict[tuple[str, str, str, str], dict[str, tuple[float, float, tuple[str, float]]]] = {}
    for row in scored.sort_values("created", kind="stable").to_dict("records"):
        for (task, metric), accuracy in _accuracies(row).items():
            models = found.setdefault((row["config.mixer"], row["config.variant"], task, metric), {})
            models.pop(row["config.trained"], None)  # so that the newest stands last
            models[row["config.trained"]] = *accuracy, (row["data.source"], row.get(f"metrics.{task}.questions", 0))
    averaged = {}
    for cell, models in found.items():
        *_, (_, _, asked) = models.values()
        alike = [(value, error) for value, error, questions in models.values() if questions == asked]
        values, errors = zip(*alike, strict=True)
        error = sum(errors) / len(alike)  # all seeds are asked the same questions
        averaged[cell] = {"ours": sum(values) / len(alike), "error": error, "seeds": len(alike), "source": asked[0],
                          "asked": asked}  # fmt: skip
    return averaged


def _accuracies(row: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float, float]]:
    """Accuracy and its standard error by task and metric; that of AVG, a mean of accuracies, from theirs."""
    values: dict[tuple[str, str], float] = {}
    for name, value in row.items():
        parts = str(name).split(".")  # some heads end in a full stop
        if parts[0] == "metrics" and parts[-1].startswith("accuracy") and not pd.isna(value):
            values[".".join(parts[1:-1]), parts[-1]] = value
    errors = {(task, metric): math.sqrt(value * (1 - value) / row[f"metrics.{task}.questions"])
              for (task, metric), value in values.items() if task != _ALL}  # fmt: skip
    return {cell: (value, errors.get(cell, math.hypot(*errors.values()) / max(len(errors), 1)))
            for cell, value in values.items()}  # fmt: skip


def _verdict(line: dict, cells: Mapping[tuple[str, str, str, str], Mapping[str, Any]]) -> str:
    if pd.isna(line["ours"]):
        return NOT_RUN
    if line["variant"] != "resona":
        return ""
    base = cells.get(_key(line | {"variant": "base"}))
    if base is None or base["asked"] != cells[_key(line)]["asked"]:
        return NOT_RUN
    behind = base["ours"] - line["ours"]
    return NOT_REPRODUCED if behind > _ERRORS * math.hypot(base["error"], line["error"]) else TREND_ONLY
