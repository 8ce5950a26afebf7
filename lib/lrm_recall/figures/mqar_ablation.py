"""Which of Resona's open settings recall and which do not: a table and a figure, for ablations and controls.

The paper leaves the encoders, the gate and the scale of the memory open; these are the settings to vary. A
control is the same comparison with a setting that must fail, such as chunks that hold a key without its value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrm_recall.figures.display import describe
from lrm_recall.figures.mqar_cells import CELL, RESONA_OPTIONS, mqar_cells
from lrm_recall.figures.style import mark, new_figure, theme, variant_name
from lrm_recall.figures.tables import markdown, mean_sd
from lrm_recall.figures.verdicts import RECALLED

VARIED = ("encoder", "gate", "memory_norm")
_RESULTS = ("accuracy", "sd", "sequence_accuracy", "seeds", "epochs", "base_accuracy", "recalls")
_PRINTS_AS_ONE = 0.9995  # 1.000 in three decimals, as the paper has it


def ablation_table(
    rows: pd.DataFrame, profile: str, resona: Mapping[str, Any], varied: Sequence[str] = VARIED
) -> pd.DataFrame:
    """Accuracy for each combination of the varied options, all other options being the given ones.

    Args:
        rows: result rows.
        profile: whose rows.
        resona: the options that the rest of the notebook uses; those not varied must match.
        varied: Resona options.

    Returns:
        model, length, pairs, d_model, variant, the varied options, accuracy, sd, sequence_accuracy, seeds, epochs,
        base_accuracy (same cell without Resona, NaN where it did not run) and recalls: "1.000", "0.99 or more" or
        "no". Cells in which nothing was varied are left out.

    Raises:
        ValueError: `varied` names no option of Resona.
    """
    unknown = [name for name in varied if name not in RESONA_OPTIONS]
    if unknown:
        raise ValueError(f"Resona has no option {unknown[0]!r} to vary; it has: {', '.join(RESONA_OPTIONS)}")
    fixed = {name: value for name, value in resona.items() if name in RESONA_OPTIONS and name not in varied}
    cells = mqar_cells(rows[rows["profile"] == profile], fixed, [*CELL, *varied])
    place = ["mixer", "length", "pairs", "d_model"]
    base = cells[cells["variant"] == "base"].set_index(place)["accuracy"].rename("base_accuracy")
    cells = cells[cells["variant"] != "base"]
    cells = cells[cells.groupby([*place, "variant"])["accuracy"].transform("size") > 1]
    table = cells.merge(base.reset_index(), on=place, how="left").sort_values([*place, "variant", *varied])
    table = table.assign(model=[mark(mixer).name for mixer in table["mixer"]],
                         recalls=[_recalls(accuracy) for accuracy in table["accuracy"]],
                         **table[list(varied)].convert_dtypes())  # the base rows' gaps had made floats of integers
    return table[["model", *place[1:], "variant", *varied, *_RESULTS]].reset_index(drop=True)


def ablation_markdown(table: pd.DataFrame) -> str:
    """`ablation_table` for a reader: one markdown table for each model, length and dimension.

    Args:
        table: what `ablation_table` returns.
    """
    parts = []
    varied = [name for name in table.columns if name not in ("model", *CELL, *_RESULTS)]
    for (model, length, pairs, d_model), cells in table.groupby(["model", "length", "pairs", "d_model"], sort=False):
        base = cells["base_accuracy"].iloc[0]
        beside = f"; the base model has {base:.3f}" if pd.notna(base) else ""
        shown = cells[["variant", *varied]].assign(**{
            "accuracy": [mean_sd(c.accuracy, c.sd, c.seeds) for c in cells.itertuples()],
            "whole output": cells["sequence_accuracy"], "epochs": [f"{epochs:g}" for epochs in cells["epochs"]],
            "recalls": cells["recalls"]})
        title = f"{model}, length {length} with {pairs} pairs, dimension {d_model}{beside}:"
        parts.append(f"{title}\n\n{markdown(shown)}")
    return "\n\n".join(parts)


def mqar_ablation(
    rows: pd.DataFrame, profile: str, resona: Mapping[str, Any], varied: Sequence[str] = VARIED
) -> Figure:
    """`ablation_table` as dots: one panel a cell, one line a combination, the base model's accuracy as a rule.

    Args as `ablation_table`.

    Raises:
        ValueError: as `ablation_table`, or no cell has two combinations.
    """
    table = ablation_table(rows, profile, resona, varied)
    if table.empty:
        raise ValueError(f"no cell of profile {profile!r} has rows with different {', '.join(varied)}")
    used = {name: resona.get(name) for name in varied}
    table = table.assign(setting=[_setting(cell, varied) + ("\n(used here)" if _is(cell, used) else "")
                                  for cell in table.to_dict("records")])
    with mpl.rc_context(theme()):
        panels = list(table.groupby(["model", "length", "d_model", "variant"], sort=False))
        settings = list(dict.fromkeys(table["setting"]))
        figure = new_figure(2.6 * len(panels) + 2.0, 0.3 * len(settings) + 1.3)
        grid = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axes, ((model, length, d_model, variant), cells) in zip(grid, panels, strict=True):
            _draw(axes, cells, settings)
            axes.set_title(f"{model} {variant_name(variant)}\nlength {length}, dimension {d_model}")
        figure.suptitle("Which settings of Resona recall", x=0.01, ha="left")
    return describe(figure, _alt(table))


def _draw(axes: Axes, cells: pd.DataFrame, settings: list[str]) -> None:
    """One panel: a filled dot where a setting recalls, a hollow one where not, its value beside it."""
    sns.despine(ax=axes, left=True)
    axes.axvline(RECALLED, color="#5a5a5a", linewidth=0.9, linestyle="--", zorder=1)
    base = cells["base_accuracy"].iloc[0]
    if pd.notna(base):
        axes.axvline(base, color="#5a5a5a", linewidth=0.9, linestyle=":", zorder=1)
        axes.annotate("base", (base, -0.5), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    for cell in cells.to_dict("records"):
        y = settings.index(cell["setting"])
        axes.errorbar(cell["accuracy"], y, xerr=cell["sd"] if cell["seeds"] > 1 else None, fmt="o",
                      color="#0173b2", markersize=6, markerfacecolor="#0173b2" if cell["recalls"] != "no" else "white")
        text = mean_sd(cell["accuracy"], cell["sd"], cell["seeds"])
        axes.annotate(text, (1.06, y), va="center", fontsize=8, annotation_clip=False)
    axes.set(xlim=(-0.04, 1.04), xticks=[0, 0.5, 1], yticks=range(len(settings)), yticklabels=settings,
             ylim=(len(settings) - 0.5, -0.9), xlabel="accuracy")


def _is(cell: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    return all(cell[name] == value for name, value in options.items())


def _setting(cell: Mapping[str, Any], varied: Sequence[str]) -> str:
    """"encoder mean, gate null_chunk, no memory norm": a combination in words."""
    words = []
    for name in varied:
        value, spoken = cell[name], name.replace("_", " ")
        words.append(f"{'' if value else 'no '}{spoken}" if isinstance(value, bool) else f"{spoken} {value}")
    return ", ".join(words)


def _recalls(accuracy: float) -> str:
    if accuracy >= _PRINTS_AS_ONE:
        return "1.000"
    return f"{RECALLED} or more" if accuracy >= RECALLED else "no"


def _alt(table: pd.DataFrame) -> str:
    lines = [f"{cell['model']} {variant_name(cell['variant'])}, length {cell['length']}, {cell['setting']}: "
             f"{cell['accuracy']:.3f}" for cell in table.to_dict("records")]
    return f"Accuracy on multi-query associative recall for settings of Resona. {'; '.join(lines)}."
