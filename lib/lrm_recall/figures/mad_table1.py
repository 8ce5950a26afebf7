"""Resona, Table 1 (the MAD tasks), the paper's values beside ours, with a verdict for each of its 63 cells.

A score is mad-lab's: the macro accuracy of each of a task's settings, at the learning rate and weight decay that
validation chooses, averaged over the settings; here in percent, as the paper prints it. The paper does not say that it
averages over settings, but its memorization does not fit the base setting alone, which every model solves. Plain
accuracy and that of whole sequences stand in the table's CSV.

Verdicts, in the words of `lrm_recall.figures.verdicts`, differences in points of percent:

reproduced      at the paper's own scale (`scale_gaps`), within 5 of the printed value; with Resona, the difference from
                our own base model also has the paper's direction
trend only      not that, but: a base model is within 10; with Resona, the difference from our base model, trained in
                the same settings with the same budget, has the paper's direction (a difference of up to 1 is none, and
                more of a gain than the paper's is no fault)
not reproduced  we ran it and neither holds
not run         no row, rows of no setting of the benchmark, or a row with Resona without the base row that its
                difference needs
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import pandas as pd

from lrm_recall.figures.mqar_cells import variant_of
from lrm_recall.figures.mqar_table11 import verdict_counts
from lrm_recall.figures.style import mark
from lrm_recall.figures.tables import NOTHING, markdown
from lrm_recall.figures.verdicts import NOT_REPRODUCED, NOT_RUN, REPRODUCED, TREND_ONLY
from lrm_recall.paper import paper_values
from lrm_recall.tasks.mad import LEARNING_RATES, TASKS, WEIGHT_DECAYS, benchmark
from lrm_recall.train.select import select

AVERAGE = "average"
TASK_NAMES = dict(zip((*TASKS, AVERAGE), ("Comp.", "ICR", "Noisy ICR", "Fuzzy ICR", "SC", "Mem.", "Average"),
                      strict=True))  # fmt: skip
MIXERS = ("attention", "mamba", "mamba2", "rwkv5", "hyena")  # in the order of Table 1

PAPER_WIDTH, PAPER_EPOCHS, PAPER_BATCH, PAPER_TEST = 128, 200, 128, 1_280  # section 4.2.1, mad-lab, appendix A.3
PAPER_BLOCKS = (2, 4)  # both readings of "4-hybrid block", see lrm_recall.train.mad
PAPER_CHUNK_SIZE, PAPER_TOP_K = 6, 1
REPRODUCED_WITHIN, TREND_WITHIN, NO_DIFFERENCE = 5.0, 10.0, 1.0

_SETTING = ("vocab_size", "seq_len", "num_train_examples", "frac_noise", "num_tokens_to_copy")  # what mad-lab varies
_SCORES = {"macro_accuracy": "macro", "accuracy": "plain", "sequence_accuracy": "sequence"}
_VARIES = ("config.learning_rate", "config.weight_decay", "config.seed")  # between the runs of one setup
_PAPER_TRIALS = set(product(LEARNING_RATES, WEIGHT_DECAYS))
_LACKS_RATES = f"{len(LEARNING_RATES)} learning rates and {len(WEIGHT_DECAYS)} weight decays"
_PLACE = ["mixer", "variant"]
_OURS = [*_SCORES.values()]
_SCALES = ("paper", "toy")


def mad_table1(rows: pd.DataFrame, profile: str, variant: str = "resona1") -> pd.DataFrame:
    """Every cell of Table 1, and our cells of models that the paper does not have.

    Args:
        rows: result rows (`lrm_recall.results.load_profiles`).
        profile: whose rows are ours.
        variant: which of our variants stands beside the paper's +RESONA: it does not say which blocks retrieve.

    Returns:
        mixer, model, variant ("base" or `variant`), task (a name of TASKS, or "average"), paper (percent); ours in
        macro_paper, plain_paper, sequence_paper where a cell was run at the paper's scale and in macro_toy ... where it
        was not (percent; the two never share a column); settings (how many were run), seeds, scale (in words),
        verdict, empty for a cell that the paper does not have.
    """
    cells = mad_cells(rows)
    cells = cells[(cells["profile"] == profile) & cells["variant"].isin(["base", variant])].drop(columns="profile")
    table = _paper_cells(variant).merge(_with_average(cells), on=[*_PLACE, "task"], how="outer")
    table["settings"] = table["settings"].fillna(0).astype(int)
    table["seeds"] = table["seeds"].fillna(0).astype(int)
    ran = table["settings"] > 0
    table["gaps"] = [gaps if did else [] for gaps, did in zip(table["gaps"], ran, strict=True)]
    kind = ["" if not did else "toy" if gaps else "paper" for gaps, did in zip(table["gaps"], ran, strict=True)]
    table = table.assign(scale_kind=kind, model=[mark(mixer).name for mixer in table["mixer"]])
    table["scale"] = [f"{profile}: {cell['words']}" if cell["settings"] else "" for cell in table.to_dict("records")]
    table["verdict"] = _verdicts(table)
    for each in _SCALES:
        for name in _OURS:
            table[f"{name}_{each}"] = table[name].where(table["scale_kind"] == each)
    order = [*MIXERS, *sorted(set(table["mixer"]) - set(MIXERS))]
    table = table.assign(place=table["mixer"].map(order.index), column=table["task"].map(list(TASK_NAMES).index))
    table = table.sort_values(["place", "variant", "column"]).reset_index(drop=True)
    return table[["mixer", "model", "variant", "task", "paper",
                  *(f"{name}_{each}" for each in _SCALES for name in _OURS), "settings", "seeds", "scale", "verdict"]]


def mad_table1_markdown(table: pd.DataFrame) -> str:
    """The table for a reader, one line a model and variant: paper / ours and the verdict, a table a scale.

    Args:
        table: what `mad_table1` returns.
    """
    parts = []
    for kind in _SCALES:
        ran = table[table[f"macro_{kind}"].notna()]
        if len(ran):
            title = "At the paper's scale" if kind == "paper" else "At toy scale, not the paper's"
            parts.append(f"{title} ({'; '.join(dict.fromkeys(ran['scale']))}), paper / ours, macro accuracy in percent:"
                         f"\n\n{markdown(_wide(ran, kind))}")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdict_counts(table).items())
    parts.append(f"Of the {int(table['paper'].notna().sum())} cells of Table 1: {counts}.")
    return "\n\n".join(parts)


def mad_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a profile, mixer, variant and task: the mean over the settings that were run.

    Of each setting those runs count that have the configuration, code and data of its newest run; of those, the
    learning rate and weight decay that `lrm_recall.train.select` chooses by validation. Settings outside the benchmark
    count only where no setting of it was run.

    Args:
        rows: result rows of any experiment.

    Returns:
        profile, mixer, variant, task, macro, plain, sequence (percent), settings (how many), known (whether they are of
        the benchmark), seeds (the fewest of a setting), gaps (what keeps the cell from the paper's scale), words (the
        scale), setup (what a base model must share with it to be compared).
    """
    names = ["profile", *_PLACE, "task", *_OURS, "settings", "known", "seeds", "gaps", "words", "setup"]
    if rows.empty or not (rows["experiment"] == "mad").any():
        return pd.DataFrame(columns=names)
    runs = rows[(rows["experiment"] == "mad") & (rows["status"] == "ok")].reset_index(drop=True)
    layers = runs.get("config.resona.layers", pd.Series(None, index=runs.index, dtype=object))
    runs = runs.assign(mixer=runs["config.mixer"], task=runs["config.task.task"], variant=layers.map(variant_of),
                       setting=[_setting(run) for run in runs.to_dict("records")])
    place = ["profile", *_PLACE, "task"]
    runs = _newest_setup(runs, [*place, "setting"])
    cells = [dict(zip(place, key, strict=True)) | _cell(part) for key, part in runs.groupby(place, sort=False)]
    return pd.DataFrame(cells, columns=names)


def scale_gaps(runs: pd.DataFrame) -> list[str]:
    """What keeps the runs of a cell, as `mad_cells` has them, from being at the paper's scale; empty when they are.

    Width, depth, batch and the settings of the benchmark must be the paper's, epochs and test examples at least as
    many; the learning rates and weight decays tried must include mad-lab's, unless one of them reached the target in
    validation; Resona has the paper's chunks and k.
    """
    base = runs["variant"].iloc[0] == "base"
    wanted_settings = _benchmark(runs["task"].iloc[0])
    wanted = {
        f"hidden size {PAPER_WIDTH}": (runs["config.d_model"] == PAPER_WIDTH).all(),
        f"{' or '.join(map(str, PAPER_BLOCKS))} blocks": runs["config.num_blocks"].isin(PAPER_BLOCKS).all(),
        f"all {len(wanted_settings)} settings": wanted_settings <= set(runs["setting"]),
        f"{PAPER_EPOCHS} epochs": (runs["config.max_epochs"] >= PAPER_EPOCHS).all(),
        f"batches of {PAPER_BATCH}": (runs["config.batch_size"] == PAPER_BATCH).all(),
        f"{PAPER_TEST:,} test examples": (runs["config.task.num_test_examples"] >= PAPER_TEST).all(),
        _LACKS_RATES: all(
            (part["metrics.valid_accuracy"] >= part["config.target_accuracy"]).any() or _trials(part) >= _PAPER_TRIALS
            for _, part in runs.groupby("setting")),
        f"chunk_size {PAPER_CHUNK_SIZE}": base or (runs["config.resona.chunk_size"] == PAPER_CHUNK_SIZE).all(),
        f"top_k {PAPER_TOP_K}": base or (runs["config.resona.top_k"] == PAPER_TOP_K).all(),
    }  # fmt: skip
    return [gap for gap, met in wanted.items() if not met]


def _cell(runs: pd.DataFrame) -> dict[str, Any]:
    """What the runs of one profile, mixer, variant and task come to."""
    of_benchmark = runs["setting"].isin(_benchmark(runs["task"].iloc[0]))
    runs = runs[of_benchmark] if of_benchmark.any() else runs
    settings = _chosen(runs).groupby("setting", sort=False)
    means = settings[[f"metrics.{name}" for name in _SCORES]].mean().mean()
    total = len(_benchmark(runs["task"].iloc[0]))
    which = f"{len(settings)} of {total} settings" if of_benchmark.any() else "a setting outside the benchmark"
    epochs, blocks, width = (int(runs[f"config.{name}"].max()) for name in ("max_epochs", "num_blocks", "d_model"))
    words = f"{which}, at most {epochs} epochs, {blocks} blocks of width {width}"
    gaps = scale_gaps(runs)
    fewest = min(len(_trials(part) & _PAPER_TRIALS) for _, part in runs.groupby("setting", dropna=False))
    rates = f", {fewest} of {len(_PAPER_TRIALS)} learning rates and decays" if fewest and _LACKS_RATES in gaps else ""
    return {
        **{ours: 100 * means[f"metrics.{name}"] for name, ours in _SCORES.items()},
        "settings": len(settings),
        "known": bool(of_benchmark.any()),
        "seeds": int(settings["seed"].nunique().min()),
        "gaps": gaps,
        "words": words + rates,
        "setup": repr((words, sorted(runs["setting"].unique(), key=repr))),
    }


def _chosen(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that have their setting's learning rate and weight decay, by the rule of `select`.

    That rule chooses among learning rates; so the pairs of both are numbered, the smaller ones first.
    """
    pairs = list(zip(runs["config.learning_rate"], runs["config.weight_decay"], strict=True))
    numbers = {pair: float(number) for number, pair in enumerate(sorted(set(pairs)))}
    numbered = runs.drop(columns="config.weight_decay").assign(
        **{"config.learning_rate": [numbers[pair] for pair in pairs]})  # fmt: skip
    return runs.loc[select(numbered).index]


def _newest_setup(runs: pd.DataFrame, place: list[str]) -> pd.DataFrame:
    """Of each place the runs with the configuration, code and data of its newest run."""
    columns = sorted(name for name in runs.columns if name.startswith("config.") and name not in _VARIES)
    columns += ["code", "data.revision"]
    setup = [repr(values) for values in runs[columns].itertuples(index=False, name=None)]
    runs = runs.assign(setup=setup).sort_values("created", kind="stable")
    newest = runs.groupby(place, dropna=False)["setup"].transform("last")
    return runs[runs["setup"] == newest].drop(columns="setup")


def _benchmark(task: str) -> set[tuple]:
    """The settings that a score of this task is the mean of."""
    return {_setting({f"config.task.{name}": getattr(each, name) for name in _SETTING}) for each in benchmark([task])}


def _setting(run: Mapping[str, Any]) -> tuple:
    """What tells one setting of a task from another; None for what a task does not have."""
    values = [run.get(f"config.task.{name}") for name in _SETTING]
    return tuple(None if pd.isna(value) else float(value) for value in values)


def _trials(runs: pd.DataFrame) -> set[tuple[float, float]]:
    return set(zip(runs["config.learning_rate"], runs["config.weight_decay"], strict=True))


def _with_average(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells, and of every mixer and variant that has all tasks their average."""
    averages = []
    for place, part in cells.groupby(_PLACE, sort=False):
        if set(part["task"]) == set(TASKS):
            averages.append({
                **dict(zip(_PLACE, place, strict=True)),
                **{name: part[name].mean() for name in _OURS},
                "task": AVERAGE,
                "settings": int(part["settings"].sum()),
                "known": bool(part["known"].all()),
                "seeds": int(part["seeds"].min()),
                "gaps": [gap for gaps in part["gaps"] for gap in gaps],
                "words": "all tasks",
                "setup": repr(sorted(part["setup"])),
            })
    return pd.concat([cells, pd.DataFrame(averages)], ignore_index=True) if averages else cells


def _paper_cells(variant: str) -> pd.DataFrame:
    """Table 1 as printed: mixer, variant, task, paper."""
    mixer_of = {mark(mixer).name: mixer for mixer in MIXERS}
    task_of = {name: task for task, name in TASK_NAMES.items()}
    values = paper_values("resona", 1)
    return pd.DataFrame({"mixer": values["model"].map(mixer_of), "task": values["task"].map(task_of),
                         "variant": values["variant"].replace("resona", variant), "paper": values["value"]})


def _verdicts(table: pd.DataFrame) -> list[str]:
    """The verdict of each line; a line with Resona is judged beside the base line of the same setup."""
    base = {(row["mixer"], row["task"]): row for row in table[table["variant"] == "base"].to_dict("records")}
    return [_verdict(cell, base.get((cell["mixer"], cell["task"]))) for cell in table.to_dict("records")]


def _verdict(cell: Mapping[str, Any], base: Mapping[str, Any] | None) -> str:
    if pd.isna(cell["paper"]):
        return ""
    if not cell["settings"] or not cell["known"]:
        return NOT_RUN
    off = abs(cell["macro"] - cell["paper"])
    close = cell["scale_kind"] == "paper" and off <= REPRODUCED_WITHIN
    if cell["variant"] == "base":
        trend = off <= TREND_WITHIN
    elif base is None or base["setup"] != cell["setup"]:
        return NOT_RUN
    else:
        trend = _direction(cell["macro"] - base["macro"]) >= _direction(cell["paper"] - base["paper"])
        close = close and trend
    return REPRODUCED if close else TREND_ONLY if trend else NOT_REPRODUCED


def _direction(difference: float) -> int:
    """-1, 0 or 1; a small difference is none."""
    return 0 if abs(difference) <= NO_DIFFERENCE + 1e-9 else int(math.copysign(1, difference))


def _wide(ran: pd.DataFrame, kind: str) -> pd.DataFrame:
    """One line a mixer and variant, one column a task."""
    lines = []
    for (_, variant), part in ran.groupby(["mixer", "variant"], sort=False):
        name = part["model"].iloc[0]
        line = {"model": name if variant == "base" else f"{name} + Resona {variant.removeprefix('resona')}"}
        by_task = {cell["task"]: cell for cell in part.to_dict("records")}
        lines.append(line | {title: _shown(by_task.get(task), kind) for task, title in TASK_NAMES.items()})
    return pd.DataFrame(lines)


def _shown(cell: Mapping[str, Any] | None, kind: str) -> str:
    """"76.7 / 74.0 trend only"."""
    if cell is None:
        return NOTHING
    paper = NOTHING if pd.isna(cell["paper"]) else f"{cell['paper']:.1f}"
    return f"{paper} / {cell[f'macro_{kind}']:.1f} {cell['verdict']}".rstrip()
