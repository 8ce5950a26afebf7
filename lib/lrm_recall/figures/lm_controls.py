"""Controls of the language-model runs: retrieval that cannot help, other mixers, what leaks between articles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import pandas as pd

from lrm_recall.figures.lm_rows import VARIANT_NAMES, lm_cells, losses_by_seed, nats_below
from lrm_recall.figures.style import in_order, mark


def retrieval_control(rows: pd.DataFrame, profile: str, resona: Mapping[str, Any], mixer: str) -> pd.DataFrame:
    """The base, Resona, Resona that is made to read random chunks, and Resona trained with no weight (alpha 1).

    Args:
        rows: result rows. profile: whose. mixer: of which backbone. resona: the options in use.

    Returns:
        backbone, model, retrieval, test PPL (by token), nats below base (at the same seeds), seeds; lines that did not
        run are left out.
    """
    in_use = losses_by_seed(rows, profile, resona).get(mixer, {})
    without = losses_by_seed(rows, profile, {**resona, "alpha": 1.0}).get(mixer, {})
    base = in_use.get("base")
    lines = [("Base model", "none", base), ("+ Resona", "the chunks that it finds", in_use.get("resona")),
             ("the same weights", "random chunks of the past", in_use.get("random")),
             ("+ Resona, alpha 1", "trained without any weight", without.get("resona"))]  # fmt: skip
    return pd.DataFrame([
        {"backbone": mark(mixer).name, "model": model, "retrieval": retrieval, "test PPL": math.exp(losses.mean()),
         "nats below base": math.nan if losses is base else nats_below(losses, base)[0], "seeds": len(losses)}
        for model, retrieval, losses in lines if losses is not None
    ], columns=["backbone", "model", "retrieval", "test PPL", "nats below base", "seeds"])  # fmt: skip


def ablation_table(
    rows: pd.DataFrame, profile: str, resona: Mapping[str, Any], changes: Mapping[str, Sequence[Any]]
) -> pd.DataFrame:
    """One line a backbone and change of one Resona option, beside the options in use at the same seeds.

    Args:
        rows: result rows. profile: whose. resona: the options in use.
        changes: option -> values that were tried in its place.

    Returns:
        backbone, option, value, test PPL, `in use, same seeds` (test PPL), nats below in use, sd (of that difference,
        over seeds), nats below base, seeds; changes that did not run at a seed of the options in use are left out.
    """
    lines, in_use = [], losses_by_seed(rows, profile, resona)
    tried = [(option, value, losses_by_seed(rows, profile, {**resona, option: value}))
             for option, values in changes.items() for value in values]  # fmt: skip
    for mixer, (option, value, found) in product(in_order(in_use), tried):
        ours, changed = in_use[mixer].get("resona"), found.get(mixer, {}).get("resona")
        if ours is None or changed is None:
            continue
        below, sd, shared = nats_below(changed, ours)
        if not shared:
            continue
        lines.append({
            "backbone": mark(mixer).name, "option": option, "value": str(value),
            "test PPL": math.exp(changed[shared].mean()), "in use, same seeds": math.exp(ours[shared].mean()),
            "nats below in use": below, "sd": sd,
            "nats below base": nats_below(changed[shared], in_use[mixer].get("base"))[0], "seeds": len(shared),
        })  # fmt: skip
    return pd.DataFrame(lines, columns=["backbone", "option", "value", "test PPL", "in use, same seeds",
                                        "nats below in use", "sd", "nats below base", "seeds"])  # fmt: skip


def changed_table(
    rows: pd.DataFrame, changed: pd.DataFrame, profile: str, resona: Mapping[str, Any],
    options: Mapping[str, Mapping[str, Any]],
) -> pd.DataFrame:  # fmt: skip
    """Backbones with other options of their mixer, beside the same as they are: does Resona's gain depend on those?

    Args:
        rows, changed: result rows, those of the mixers as they are and those with other options
            (`lm_rows.with_mixer_args`).
        profile: whose. resona: the options in use. options: mixer -> what was changed.

    Returns:
        backbone, mixer (its options in words), test PPL of each variant that ran, and by how many nats a token Resona
        is below each of the others, its standard deviation and number of seeds; a backbone as it is, then changed.
        Seeds count where a variant has run with and without Resona, in the backbone as it is and changed.
    """
    sides = [losses_by_seed(each, profile, resona) for each in (rows, changed)]
    mixers = in_order([mixer for mixer in options if mixer in sides[1]])
    ran = {name for side in sides for mixer in mixers for name in side.get(mixer, {})}
    variants = [name for name in VARIANT_NAMES if name in ran]
    lines = []
    for mixer in mixers:
        words = ", ".join(f"{name} {value}" for name, value in options[mixer].items())
        both = [side.get(mixer, {}) for side in sides]
        seeds = {name: _shared_seeds(both, {"base", "resona", name} & {*variants}) for name in variants}
        for found, how in zip(both, ("as in Table 2", words), strict=True):
            found = {name: losses.reindex(seeds[name]) for name, losses in found.items() if name in variants}
            line = {"backbone": mark(mixer).name, "mixer": how}
            line |= {VARIANT_NAMES[name]: math.exp(found[name].mean()) if name in found else math.nan
                     for name in variants}
            for other, name in (("base", "base"), ("sp", "size-matched")):
                if other in variants and "resona" in found:
                    nats, sd, shared = nats_below(found["resona"], found.get(other))
                    line |= {f"nats below {name}": nats, f"below {name}: sd": sd, f"below {name}: seeds": len(shared)}
            lines.append(line)
    return pd.DataFrame(lines)


def _shared_seeds(sides: Sequence[Mapping[str, pd.Series]], variants: Iterable[str]) -> list[int]:
    """The seeds with which every one of the variants has run on every side."""
    ran = [set(side[name].index) if name in side else set() for side in sides for name in variants]
    return sorted(set.intersection(*ran))


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
    """Tokens a second of training, by backbone and variant, as measured in the runs themselves; of several seeds the
    fastest."""
    cells = lm_cells(rows, resona)
    cells = cells[(cells["profile"] == profile) & ~cells["packed"].astype(bool)]
    lines = [
        {"backbone": mark(mixer).name,
         **{f"{VARIANT_NAMES[variant]}: tokens/s": f"{cell['tokens_per_s'].mean():,.0f}"
            for variant, cell in cells[cells["mixer"] == mixer].groupby("variant")}}
        for mixer in in_order(cells["mixer"])]  # fmt: skip
    return pd.DataFrame(lines)
