"""Controls of the base models: are their initial embeddings, or their few examples, what they are bad for?"""

from __future__ import annotations

import pandas as pd

from lrm_recall.figures.mqar_cells import mqar_cells, mqar_runs
from lrm_recall.figures.style import mark
from lrm_recall.figures.tables import mean_sd
from lrm_recall.train.synthetic_runs import EMBEDDING, EXAMPLES

# What differs, and its words in a table
CONTROLS = {
    EMBEDDING: ("config.embedding_range", "embeddings {:g}"),
    EXAMPLES: ("config.num_train", "{:,.0f} examples"),
}
_PLACE = ["mixer", "length", "pairs", "d_model"]
_TRIAL = [*_PLACE, "learning_rate", "seed"]


def base_control(rows: pd.DataFrame, profile: str, experiment: str) -> pd.DataFrame:
    """Accuracy of base models by what the control changes, at the learning rates and seeds that both sides have.

    Args:
        rows: result rows, those of the control's experiment beside those of "mqar"; of each the newest setup counts.
        profile: whose rows.
        experiment: one of CONTROLS.

    Returns:
        model, length, pairs, d_model, rates (how many learning rates they share), then one column a value: mean ± sd
        over seeds, of the best learning rate in validation. Empty where no base model ran with either value.
    """
    column, words = CONTROLS[experiment]
    base = rows[(rows["profile"] == profile) & (rows["status"] == "ok")]
    if "config.resona.layers" in base:
        base = base[base["config.resona.layers"].isna()]
    sides = [mqar_runs(base[base["experiment"] == side].assign(experiment="mqar")) for side in ("mqar", experiment)]
    if sides[0].empty or sides[1].empty:
        return pd.DataFrame(columns=["model", *_PLACE[1:]])
    trials = [pd.MultiIndex.from_frame(side[_TRIAL]) for side in sides]
    runs = pd.concat([side[mine.isin(theirs)] for side, mine, theirs in zip(sides, trials, trials[::-1], strict=True)])
    if runs.empty:
        return pd.DataFrame(columns=["model", *_PLACE[1:]])
    rates = runs.groupby(_PLACE)["learning_rate"].nunique().rename("rates").reset_index()
    tables = []
    for value, part in runs.groupby(column):
        cells = mqar_cells(part)
        shown = [mean_sd(cell.accuracy, cell.sd, cell.seeds) for cell in cells.itertuples()]
        tables.append(cells[_PLACE].assign(value=words.format(value), accuracy=shown))
    table = pd.concat(tables).pivot(index=_PLACE, columns="value", values="accuracy")[
        [words.format(value) for value in sorted(runs[column].unique())]]  # by number, not by word
    table = rates.merge(table.dropna().reset_index(), on=_PLACE)
    return table.assign(mixer=[mark(mixer).name for mixer in table["mixer"]]).rename(
        columns={"mixer": "model"}).rename_axis(columns=None)
