"""Controls of the base models: are their initial embeddings, or their few examples, what they are bad for?"""

from __future__ import annotations

import pandas as pd

from lrm_recall.figures.mqar_cells import mqar_cells, mqar_runs
from lrm_recall.figures.mqar_table11 import printed_cells
from lrm_recall.figures.style import mark
from lrm_recall.figures.tables import mean_sd
from lrm_recall.train.synthetic_runs import EMBEDDING, EXAMPLES

# What differs, and its words in a table
CONTROLS = {
    EMBEDDING: (["config.embedding_range"], "embeddings {:g}"),
    EXAMPLES: (["config.num_train", "config.max_epochs"], "{:,.0f} examples {:.0f} times"),
}
_PLACE = ["mixer", "length", "pairs", "d_model"]
_TRIAL = [*_PLACE, "learning_rate", "seed"]


def base_control(rows: pd.DataFrame, profile: str, experiment: str) -> pd.DataFrame:
    """Accuracy of base models by what the control changes, at the learning rates and seeds that both sides have.

    Args:
        rows: result rows, those of the control's experiment beside those of "mqar", of which the newest setup counts.
        profile: whose rows.
        experiment: one of CONTROLS.

    Returns:
        One line a model and setup of the control: model, length, pairs, d_model, rates (how many learning rates both
        sides have), "in use" and "accuracy" (the runs of "mqar"), "control" and "its accuracy", each the mean ± sd over
        seeds of the best learning rate in validation, and "paper" (Table 11). Empty where no base model ran with both.
    """
    columns, words = CONTROLS[experiment]
    base = rows[(rows["profile"] == profile) & (rows["status"] == "ok")]
    if "config.resona.layers" in base:
        base = base[base["config.resona.layers"].isna()]
    used = mqar_runs(base[base["experiment"] == "mqar"])
    setups = base[base["experiment"] == experiment].groupby(columns) if experiment in set(base["experiment"]) else ()
    lines = []
    for setup, those in setups:
        sides = [used, mqar_runs(those.assign(experiment="mqar"))]
        trials = [pd.MultiIndex.from_frame(side[_TRIAL]) for side in sides]
        both = [side[mine.isin(theirs)] for side, mine, theirs in zip(sides, trials, trials[::-1], strict=True)]
        if both[0].empty:
            continue
        found = both[0].groupby(_PLACE)
        line = found["learning_rate"].nunique().rename("rates").reset_index()
        line["in use"] = [words.format(*values) for values in found[columns].first().itertuples(index=False)]
        lines.append(line.merge(_accuracy(both[0], "accuracy"), on=_PLACE)
                     .assign(control=words.format(*setup)).merge(_accuracy(both[1], "its accuracy"), on=_PLACE))
    if not lines:
        return pd.DataFrame(columns=["model", *_PLACE[1:]])
    table = pd.concat(lines).sort_values(_PLACE, kind="stable")  # the setups by number, as they come
    table.insert(0, "model", [mark(mixer).name for mixer in table["mixer"]])
    printed = printed_cells()
    printed = printed[printed["variant"] == "base"].drop(columns="variant")
    return table.merge(printed, on=_PLACE, how="left").drop(columns="mixer")


def _accuracy(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    """The words for each model's accuracy, in a column of that name."""
    cells = mqar_cells(runs)
    return cells[_PLACE].assign(**{name: [mean_sd(cell.accuracy, cell.sd, cell.seeds) for cell in cells.itertuples()]})
