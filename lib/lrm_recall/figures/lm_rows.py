"""From rows of language-model runs to what a table or figure draws: the newest setup, the seeds averaged.

A cell is one profile, mixer, variant (base, sp, resona) and way of cutting text into sequences. Rows of a cell that
differ in anything but the seed (shape, budget, corpus, code, Resona options): those like the newest row count, the rest
is history. Perplexities are averaged as losses, in nats, whose standard deviation is that over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from lrm_recall.results import frame
from lrm_recall.train.lm_grid import usual_layers

EXPERIMENT = "language_model"
CELL = ("profile", "mixer", "variant", "packed")
VARIANT_NAMES = {"base": "Base model", "sp": "Size-matched base", "resona": "+ Resona"}

_CONFIG = ("mixer", "variant", "packed", "hidden_size", "num_layers", "vocab_size", "length", "steps", "batch_size")
_METRICS = ("test_loss", "test_ppl", "test_word_ppl", "valid_loss", "best_step", "parameters", "tokens", "tokens_per_s",
            "mfu", "alone_loss", "behind_loss", "random_chunks_ppl", "test_positions")  # fmt: skip
_OTHER = {"key": "key", "profile": "profile", "seed": "seed", "created": "created", "history": "history",
          "code": "code", "data.source": "source", "data.corpus": "corpus",
          "peak_memory_mb": "peak_memory_mb"}  # fmt: skip
RETRIEVAL = ("title", "chunk_size", "texts", "layers")


def lm_rows(rows: pd.DataFrame, resona: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Every successful run that counts, one a row.

    Args:
        rows: the table of `lrm_recall.results.frame` or `load_profiles`.
        resona: keep runs with Resona only where they have these options, and, unless `layers` is one of them, where
            they retrieve in the layers of the paper; runs without Resona stay. None: keep all.

    Returns:
        key, CELL, seed, the fields and metrics of a run by their own names, and retrieval_title ... retrieval_layers;
        empty when there is no such run.
    """
    columns = {f"config.{name}": name for name in _CONFIG} | {f"metrics.{name}": name for name in _METRICS} | _OTHER
    columns |= {f"metrics.retrieval.{name}": f"retrieval_{name}" for name in RETRIEVAL}
    if "experiment" not in rows or not len(rows):
        return pd.DataFrame(columns=list(columns.values()))
    ran = rows[(rows["experiment"] == EXPERIMENT) & (rows["status"] == "ok")]
    ran = ran.reindex(columns=list(dict.fromkeys([*ran.columns, *columns])))
    if resona is not None:
        ran = ran[(ran["config.variant"] != "resona") | _retrieves_so(ran, resona)]
    named = ran.rename(columns=columns)
    named = named.loc[:, ~named.columns.duplicated()]
    return _newest_setup(named)[list(dict.fromkeys(columns.values()))].reset_index(drop=True)


def with_mixer_args(rows: pd.DataFrame, profile: str, options: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The rows without those of a profile's runs whose mixer has other options.

    Args:
        rows: result rows. profile: whose; rows of other profiles stay. options: mixer -> its options, all of them;
            rows of mixers that are not there are left out too.
    """
    if rows.empty:
        return rows
    ours = (rows["profile"] == profile) & (rows["experiment"] == EXPERIMENT)
    keep = ~ours
    for mixer, wanted in options.items():
        keep |= ours & (rows["config.mixer"] == mixer) & _has_options(rows, wanted)
    return rows[keep]


def lm_cells(rows: pd.DataFrame, resona: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """One row a cell: test_loss and sd (nats a token), test_ppl and test_word_ppl (of the mean), seeds, and the rest;
    tokens_per_s of the fastest seed, since runs may have shared their device.

    Args as `lm_rows`.
    """
    runs = lm_rows(rows, resona)
    numbers = ["test_loss", "test_word_ppl", "alone_loss", "behind_loss", "random_chunks_ppl"]
    runs = runs.astype(dict.fromkeys([*numbers, "tokens_per_s"], float))
    first = ("hidden_size", "num_layers", "vocab_size", "length", "steps", "batch_size", "parameters", "tokens",
             "source", "corpus")  # fmt: skip
    return runs.groupby(list(CELL), as_index=False, sort=False, dropna=False).agg(
        **{name: (name, "first") for name in first},
        sd=("test_loss", "std"), seeds=("seed", "nunique"), tokens_per_s=("tokens_per_s", "max"),
        **{name: (name, "mean") for name in numbers},
    )  # fmt: skip


def losses_by_seed(
    rows: pd.DataFrame, profile: str, resona: Mapping[str, Any] | None
) -> dict[str, dict[str, pd.Series]]:  # fmt: skip
    """Test losses by seed, by mixer and variant that ran; "random" are those of Resona when it reads random chunks."""
    runs = lm_rows(rows, resona)
    runs = runs[(runs["profile"] == profile) & ~runs["packed"].astype(bool)]
    found: dict[str, dict[str, pd.Series]] = {}
    for (mixer, variant), part in runs.groupby(["mixer", "variant"]):
        part = part.set_index("seed")
        found.setdefault(mixer, {})[variant] = part["test_loss"].astype(float)
        read = part["random_chunks_ppl"].astype(float).dropna()
        if variant == "resona" and len(read):
            found[mixer]["random"] = read.map(math.log)
    return found


def nats_below(losses: pd.Series, others: pd.Series | None) -> tuple[float, float, list[int]]:
    """By how much losses are below others in the mean over the seeds that both have; the sd of that; those seeds."""
    shared = [] if others is None else sorted(set(losses.index) & set(others.index))
    difference = (others[shared] - losses[shared]) if shared else pd.Series(dtype=float)
    return difference.mean(), difference.std(), shared


def variants_in(runs: pd.DataFrame) -> list[str]:
    """The variants that are there, in the order of Table 2."""
    return [variant for variant in VARIANT_NAMES if (runs["variant"] == variant).any()]


def _retrieves_so(rows: pd.DataFrame, resona: Mapping[str, Any]) -> pd.Series:
    """Which rows have these options of Resona, and the paper's layers unless those are among them."""
    wanted = {name: [tuple(value) if isinstance(value, list) else value] * len(rows)  # as `frame` keeps lists
              for name, value in resona.items()}  # fmt: skip
    if resona.get("layers") is None:
        wanted["layers"] = [tuple(usual_layers(int(depth))) for depth in rows["config.num_layers"]]
    found = [rows.get(f"config.resona.{name}", pd.Series(index=rows.index)) for name in wanted]
    same = [there == values for there, values in zip(zip(*found, strict=True), zip(*wanted.values(), strict=True),
                                                     strict=True)]  # fmt: skip
    return pd.Series(same, index=rows.index, dtype=bool)


def _has_options(rows: pd.DataFrame, wanted: Mapping[str, Any]) -> pd.Series:
    """Which rows have these options of their mixer, and no others."""
    stored = frame([{"config": {"mixer_args": wanted}}])  # named and shaped as rows are
    columns = {*stored.columns, *(name for name in rows.columns if name.startswith("config.mixer_args"))}
    same = pd.Series(True, index=rows.index)
    for name in columns:
        value = stored[name].iloc[0] if name in stored else None
        found = rows[name] if name in rows else pd.Series(None, index=rows.index)
        same &= found.isna() if value is None else found.map(lambda each, value=value: each == value).astype(bool)
    return same


def _newest_setup(runs: pd.DataFrame) -> pd.DataFrame:
    """Of each cell the runs with the configuration, code and data of its newest run."""
    varies = {"seed", "config.seed"}
    columns = sorted(name for name in runs.columns if name.startswith("config.") and name not in varies)
    columns += [*(name for name in _CONFIG if name not in CELL), "code", "data.revision"]
    setup = [repr(values) for values in runs[columns].itertuples(index=False, name=None)]
    runs = runs.assign(setup=setup).sort_values("created", kind="stable")
    newest = runs.groupby(list(CELL), dropna=False)["setup"].transform("last")
    return runs[runs["setup"] == newest]
