"""The claim of Figure 5 as a sentence that rows make true or false: where the base model fails, Resona recalls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from lrm_recall.figures.mqar_cells import mqar_cells
from lrm_recall.figures.style import in_order, mark
from lrm_recall.figures.verdicts import RECALLED, SOLVED

_PLACE = ["mixer", "length", "pairs", "d_model"]


def mqar_claim(rows: pd.DataFrame, profile: str, resona: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Every cell whose base model fails (below 0.9), with the accuracy of its variants.

    Args:
        rows: result rows.
        profile: whose rows.
        resona: the Resona options that count, see `mqar_cells.mqar_runs`.

    Returns:
        model, length, pairs, d_model, base, one column a variant with Resona (NaN where it did not run), and
        holds: whether every variant that ran recalls (0.99 or more). Cells without a variant are left out.
    """
    cells = mqar_cells(rows, resona)
    cells = cells[cells["profile"] == profile]
    wide = cells.pivot(index=_PLACE, columns="variant", values="accuracy").reset_index()
    variants = [name for name in wide.columns if name not in (*_PLACE, "base")]
    wide = wide.reindex(columns=[*_PLACE, "base", *variants])
    failing = wide[(wide["base"] < SOLVED) & wide[variants].notna().any(axis=1)]
    order = {mixer: index for index, mixer in enumerate(in_order(failing["mixer"]))}
    failing = failing.sort_values(_PLACE, key=lambda column: column.replace(order))
    table = failing.assign(model=[mark(mixer).name for mixer in failing["mixer"]],
                           holds=(failing[variants].isna() | (failing[variants] >= RECALLED)).all(axis=1))
    return table[["model", *_PLACE[1:], "base", *variants, "holds"]].reset_index(drop=True)


def claim_in_words(claim: pd.DataFrame) -> str:
    """"In 10 of the 12 cells where the base model is below 0.9, every variant ... reaches 0.99; not in: ..."."""
    if claim.empty:
        return f"No base model that ran is below {SOLVED}, so there is nothing for Resona to mend."
    missed = [f"{cell['model']} at length {cell['length']}, dimension {cell['d_model']}"
              for cell in claim[~claim["holds"]].to_dict("records")]
    sentence = (f"In {int(claim['holds'].sum())} of the {len(claim)} cells where the base model is below {SOLVED}, "
                f"every variant of Resona, trained with the same budget, reaches {RECALLED}")
    return f"{sentence}; not in: {'; '.join(missed)}." if missed else f"{sentence}."
