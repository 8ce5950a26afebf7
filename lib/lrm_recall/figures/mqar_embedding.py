"""A control of the initial embeddings: are the base models bad because theirs are larger than zoology's?"""

from __future__ import annotations

import pandas as pd

from lrm_recall.figures.mqar_cells import mqar_cells
from lrm_recall.figures.style import mark
from lrm_recall.figures.tables import mean_sd

EXPERIMENT = "mqar-embedding"  # its own name keeps these rows out of Figure 5 and Table 11
_PLACE = ["mixer", "length", "pairs", "d_model"]


def embedding_table(rows: pd.DataFrame, profile: str) -> pd.DataFrame:
    """Accuracy of base models by the standard deviation of their initial embeddings.

    Args:
        rows: result rows, those of the experiment EXPERIMENT beside those of "mqar".
        profile: whose rows.

    Returns:
        model, length, pairs, d_model, then one column a standard deviation: mean ± sd over seeds, of the better
        learning rate in validation. Empty where no base model ran.
    """
    base = rows[(rows["profile"] == profile) & rows["experiment"].isin(["mqar", EXPERIMENT])]
    if "config.resona.layers" in base:
        base = base[base["config.resona.layers"].isna()]
    tables = []
    for width, part in base.groupby("config.embedding_range"):
        cells = mqar_cells(part.assign(experiment="mqar"))
        shown = [mean_sd(cell.accuracy, cell.sd, cell.seeds) for cell in cells.itertuples()]
        tables.append(cells[_PLACE].assign(width=f"embeddings {width:g}", accuracy=shown))
    if not tables:
        return pd.DataFrame(columns=["model", *_PLACE[1:]])
    table = pd.concat(tables).pivot(index=_PLACE, columns="width", values="accuracy").dropna().reset_index()
    return table.assign(mixer=[mark(mixer).name for mixer in table["mixer"]]).rename(
        columns={"mixer": "model"}).rename_axis(columns=None)
