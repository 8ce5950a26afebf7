"""From rows of MQAR runs to cells of a figure: the newest setup, the chosen learning rate, the seeds averaged.

A cell is one profile, mixer, variant, length, number of pairs and model dimension. Its runs differ in
learning rate and seed alone. Three rules:

1. Rows of a cell that differ in anything else (budget, code, Resona options): those like the newest row
   count, the rest is history.
2. The learning rate is chosen by `lrm_recall.train.select`: validation accuracy, never the test set.
3. Seeds: mean and sample standard deviation of the chosen runs; one seed has no standard deviation (NaN).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lrm_recall.figures.verdicts import PAPER_EPOCHS, ZOOLOGY_TRAIN
from lrm_recall.train.select import select
from lrm_recall.train.synthetic_runs import EXAMPLES

CELL = ("profile", "mixer", "variant", "length", "pairs", "d_model")
SCALE = ("num_train", "num_test", "max_epochs", "num_layers", "vocab_size", "chunk_size", "top_k")

_NAMES = {  # column of the rows -> column here
    **{name: name for name in ("profile", "seed", "created", "history", "runtime_s")},
    **{f"config.{name}": name for name in ("mixer", "d_model", "learning_rate", "num_train", "num_test",
                                           "max_epochs", "num_layers", "vocab_size")},
    "config.input_length": "length", "config.num_kv_pairs": "pairs",
    **{f"metrics.{name}": name for name in ("accuracy", "sequence_accuracy", "valid_accuracy", "epochs",
                                            "state_size", "parameters")},
}
RESONA_OPTIONS = ("chunk_size", "top_k", "encoder", "encoder_dim", "gate", "alpha", "num_heads", "memory_norm")
_WHOLE = ("length", "pairs", "d_model", "num_train", "num_test", "max_epochs", "num_layers", "vocab_size")
_OPTION_NAMES = {f"config.resona.{name}": name for name in RESONA_OPTIONS}  # absent when no row has Resona
_VARIES = ("config.learning_rate", "config.seed")  # between the runs of one setup
_BASE_PLACE = ["profile", "config.mixer", "config.input_length", "config.num_kv_pairs", "config.d_model"]


def variant_of(layers: object) -> str:
    """"base", or "resona" and the layers: (0,) to "resona0", (0, 2) to "resona0+2"."""
    return "resona" + "+".join(map(str, layers)) if isinstance(layers, tuple) else "base"


def with_zoologys_examples(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, base models that were trained with zoology's 100,000 examples in place of the same with fewer.

    Table 11's base models come out with those at length 64 (README, "examples of MQAR"). Their rows are of the
    experiment EXAMPLES; here they come back as rows of "mqar", and those of their profile, mixer, length and width that
    were trained with less are left out.
    """
    if "experiment" not in rows or not (rows["experiment"] == EXAMPLES).any():
        return rows
    enough = (rows["config.num_train"] >= ZOOLOGY_TRAIN) & (rows["config.max_epochs"] >= PAPER_EPOCHS)
    full = rows[(rows["experiment"] == EXAMPLES) & (rows["status"] == "ok") & enough]
    places = pd.MultiIndex.from_frame(rows[_BASE_PLACE])
    replaced = places.isin(pd.MultiIndex.from_frame(full[_BASE_PLACE])) & (rows["experiment"] == "mqar") & ~enough
    if "config.resona.layers" in rows:
        replaced &= rows["config.resona.layers"].isna()
    return pd.concat([rows[~replaced], full.assign(experiment="mqar")], ignore_index=True)


def mqar_runs(
    rows: pd.DataFrame, resona: Mapping[str, Any] | None = None, cell: Sequence[str] = CELL
) -> pd.DataFrame:
    """Every successful MQAR run that counts, one a row (rule 1).

    Args:
        rows: the table of `lrm_recall.results.frame` or `load_profiles`.
        resona: keep runs with Resona only where they have these options, say {"encoder": "mean"}; runs
            without Resona stay. None will do where all runs of a cell have the same options.
        cell: what makes a cell; an ablation adds the Resona options that it varies.

    Returns:
        The columns of the rows, and beside them those of CELL and SCALE, learning_rate, the metrics and
        Resona's options by their own names (missing where there is no Resona); empty when there is no such
        run.

    Raises:
        ValueError: a column is missing, or a cell has runs with different Resona options, as where an ablation
            was run: which of them are meant must be said.
    """
    if rows.empty:
        names = [*_NAMES, *_NAMES.values(), *RESONA_OPTIONS, "variant"]
        return pd.DataFrame(columns=list(dict.fromkeys(names)))
    lacking = [name for name in (*_NAMES, "experiment", "status", "code", "data.revision") if name not in rows.columns]
    if lacking:
        raise ValueError(f"the rows lack the columns {', '.join(lacking)}")
    rows = rows[(rows["experiment"] == "mqar") & (rows["status"] == "ok")]
    rows = rows.reindex(columns=list(dict.fromkeys([*rows.columns, "config.resona.layers", *_OPTION_NAMES])))
    runs = rows.assign(**{name: rows[column] for column, name in (_NAMES | _OPTION_NAMES).items()},
                       variant=rows["config.resona.layers"].map(variant_of).astype(object))
    runs = runs.astype(dict.fromkeys(_WHOLE, int))  # floats where rows of MAD, which lack the column, stood beside them
    for name, value in (resona or {}).items():
        same = runs[name].map(lambda found, value=value: found == value).astype(bool)
        runs = runs[(runs["variant"] == "base") | same]
    _check_one_setting(runs, list(cell))
    return _newest_setup(runs, list(cell))


def chosen_runs(
    rows: pd.DataFrame, resona: Mapping[str, Any] | None = None, cell: Sequence[str] = CELL
) -> pd.DataFrame:
    """The runs that have their cell's learning rate, one a cell and seed (rules 1 and 2).

    Args and raises as `mqar_runs`, whose columns this has; `learning_rates` is the tuple that the choice was
    among, every one tried with every seed.
    """
    runs, cell = mqar_runs(rows, resona, cell), list(cell)
    seeds_of_rate = runs.groupby([*cell, "learning_rate"], dropna=False)["seed"].nunique().reset_index(name="tried")
    complete = seeds_of_rate["tried"] == seeds_of_rate.groupby(cell, dropna=False)["tried"].transform("max")
    swept = seeds_of_rate[complete].groupby(cell, dropna=False)["learning_rate"].agg(tuple)
    chosen = select(runs).merge(swept.rename("learning_rates").reset_index(), on=cell)
    return chosen.sort_values([*cell, "seed"]).reset_index(drop=True)


def mqar_cells(
    rows: pd.DataFrame, resona: Mapping[str, Any] | None = None, cell: Sequence[str] = CELL
) -> pd.DataFrame:
    """One row a cell (rules 1 to 3).

    Args and raises as `mqar_runs`.

    Returns:
        The columns of `cell` and SCALE, then accuracy, sd, sequence_accuracy, sequence_sd, seeds (how many),
        epochs (mean), learning_rates, state_size, parameters.
    """
    runs = chosen_runs(rows, resona, cell)
    runs = runs.astype({name: float for name in ("accuracy", "sequence_accuracy", "epochs")})
    first = [name for name in (*SCALE, "state_size", "parameters") if name not in cell]
    return runs.groupby(list(cell), as_index=False, sort=False, dropna=False).agg(
        **{name: (name, "first") for name in first},
        accuracy=("accuracy", "mean"), sd=("accuracy", "std"),
        sequence_accuracy=("sequence_accuracy", "mean"), sequence_sd=("sequence_accuracy", "std"),
        seeds=("seed", "nunique"), epochs=("epochs", "mean"),
        learning_rates=("learning_rates", "first"))


def _check_one_setting(runs: pd.DataFrame, cell: list[str]) -> None:
    """Raise ValueError when a cell has runs with different options of Resona."""
    options = [name for name in RESONA_OPTIONS if name not in cell]
    settings = runs[runs["variant"] != "base"].drop_duplicates([*cell, *options])
    for _, here in settings.groupby(cell, dropna=False):
        varied = [name for name in options if here[name].nunique(dropna=False) > 1]
        if varied:
            raise ValueError(f"{here['mixer'].iloc[0]} {here['variant'].iloc[0]} of profile "
                             f"{here['profile'].iloc[0]!r} has rows with different {', '.join(varied)}; "
                             "say which Resona options are meant")


def _newest_setup(runs: pd.DataFrame, cell: list[str]) -> pd.DataFrame:
    """Rule 1: of each cell the runs with the configuration, code and data of its newest run."""
    columns = sorted(name for name in runs.columns if name.startswith("config.") and name not in _VARIES)
    columns += ["code", "data.revision"]
    setup = [repr(values) for values in runs[columns].itertuples(index=False, name=None)]
    runs = runs.assign(setup=setup).sort_values("created", kind="stable")
    newest = runs.groupby(cell, dropna=False)["setup"].transform("last")
    return runs[runs["setup"] == newest].drop(columns="setup")
