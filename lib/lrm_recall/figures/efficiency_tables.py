"""Resona's Tables 5, 6 and 7 (prefill, decoding, memory) beside ours; what StateX and training cost."""

from __future__ import annotations

import pandas as pd

from lrm_recall.figures.efficiency_cells import efficiency_cells
from lrm_recall.figures.style import MODELS, mark
from lrm_recall.figures.tables import NOTHING, markdown
from lrm_recall.figures.verdicts import VERDICTS, cost_verdict
from lrm_recall.paper import paper_values

# table -> what it shows, of which task, in which column and unit
TABLES = {
    5: ("Reading a prompt", "prefill", "ms", "ms"),
    6: ("Decoding after a prompt", "decode", "ms", "ms"),
    7: ("Peak memory of reading a prompt", "prefill", "gb", "GiB"),
}


def paper_cost_table(rows: pd.DataFrame, number: int) -> pd.DataFrame:
    """Every cell of Table 5, 6 or 7, and our lengths that the paper does not have.

    Args:
        rows: see `efficiency_cells`.
        number: of the table.

    Returns:
        mixer, model, variant ("base", "resona"), length; `paper`, the printed value; `ours`, at whatever scale it
        was measured; paper_ratio and our_ratio of Resona to the model alone; scale ("paper", "toy" or empty); verdict,
        empty for a cell that the paper does not have. A printed value and one of another scale are never compared.
    """
    _, task, column, _ = TABLES[number]
    cells = efficiency_cells(rows)
    cells = cells[(cells["task"] == task) & (cells["expanded_layers"] == 0)]
    ours = cells[["mixer", "variant", "length", column, "at_paper_scale"]].rename(columns={column: "ours"})
    table = _printed(number).merge(ours, on=["mixer", "variant", "length"], how="outer")
    table["scale"] = table["at_paper_scale"].map({True: "paper", False: "toy"}).fillna("")
    for values, ratio in (("paper", "paper_ratio"), ("ours", "our_ratio")):
        base = table[table["variant"] == "base"].set_index(["mixer", "length"])[values]
        alone = pd.Series(base.reindex(pd.MultiIndex.from_frame(table[["mixer", "length"]])).values, table.index)
        table[ratio] = (table[values] / alone).where(table["variant"] == "resona")
    table["verdict"] = [_verdict(cell) for cell in table.to_dict("records")]
    table["model"] = [mark(mixer).name for mixer in table["mixer"]]
    table = table.assign(order=table["mixer"].map(list(MODELS).index)).sort_values(["order", "length", "variant"])
    return table[["mixer", "model", "variant", "length", "paper", "ours", "paper_ratio", "our_ratio", "scale",
                  "verdict"]].reset_index(drop=True)


def paper_cost_markdown(table: pd.DataFrame, number: int) -> str:
    """The cells that ran, for a reader: one line a model and length, base and Resona beside each other."""
    title, _, _, unit = TABLES[number]
    ran = table[table["ours"].notna()]
    lines = []
    for (_, length), pair in ran.groupby(["mixer", "length"], sort=False):
        cells = {cell["variant"]: cell for cell in pair.to_dict("records")}
        any_cell = next(iter(cells.values()))
        line = {"model": any_cell["model"], "tokens": f"{length:,}"}
        for variant, heading in (("base", ""), ("resona", " + Resona")):
            cell = cells.get(variant, {})
            line |= {f"ours{heading}, {unit}": _number(cell.get("ours")),
                     f"paper{heading}, {unit}": _number(cell.get("paper")) if cell.get("scale") == "paper" else NOTHING}
        resona = cells.get("resona", {})
        line |= {"our ratio": _ratio(resona.get("our_ratio")), "paper's ratio": _ratio(resona.get("paper_ratio"))}
        lines.append(line)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in _counts(table).items())
    scales = {"paper": "at the paper's scale", "toy": "at toy scale, not the paper's"}
    scale = ", ".join(scales[kind] for kind in sorted(set(ran["scale"])))
    return (f"Table {number}. {title} ({scale}):\n\n{markdown(pd.DataFrame(lines))}\n\n"
            f"Of the {int(table['paper'].notna().sum())} cells of Table {number}: {counts}.")


def state_cost_table(rows: pd.DataFrame) -> pd.DataFrame:
    """StateX: every model as it is and expanded, with its state, speed and memory, and ratios to the model as it is."""
    cells = efficiency_cells(rows)
    cells = cells[cells["variant"] != "resona"]
    wide = cells[cells["mixer"].isin(cells.loc[cells["expanded_layers"] > 0, "mixer"])]
    wide = wide[wide.groupby(["mixer", "task", "length"])["expanded_layers"].transform("max") > 0]
    lines = []
    for (mixer, task, length), group in wide.groupby(["mixer", "task", "length"], sort=False):
        base = group[group["expanded_layers"] == 0]
        for cell in group.to_dict("records"):
            lines.append({
                "model": mark(mixer).name, "task": task, "tokens": int(length),
                "layers expanded": int(cell["expanded_layers"]), "state, elements": int(cell["state_size"]),
                "tokens a second": f"{cell['tokens_per_s']:,.0f}", "peak GiB": f"{cell['gb']:.2f}",
                "time, ratio": float("nan") if base.empty else round(cell["ms"] / base["ms"].iloc[0], 3),
            })  # fmt: skip
    return pd.DataFrame(lines)


def training_cost_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A training step with Resona beside the same model alone."""
    cells = efficiency_cells(rows)
    cells = cells[(cells["task"] == "train") & (cells["expanded_layers"] == 0)]
    lines = []
    for (mixer, _, length), group in cells.groupby(["mixer", "hidden_size", "length"], sort=False):
        sides = {cell["variant"]: cell for cell in group.to_dict("records")}
        if {"base", "resona"} <= sides.keys():
            base, resona = sides["base"], sides["resona"]
            lines.append({
                "model": f"{mark(mixer).name}, {base['parameters'] / 1e6:,.0f}M", "tokens": int(length),
                "base, ms": f"{base['ms']:.1f}", "with Resona, ms": f"{resona['ms']:.1f}",
                "time, ratio": round(resona["ms"] / base["ms"], 3), "base, GiB": f"{base['gb']:.2f}",
                "with Resona, GiB": f"{resona['gb']:.2f}",
            })  # fmt: skip
    return pd.DataFrame(lines)


def cold_start_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds to the first forward and backward in a process that finds nothing compiled."""
    parts = {"import_s": "imports", "build_s": "building", "forward_s": "first forward", "backward_s": "first backward"}
    columns = ["model", "device", *(f"{name}, s" for name in parts.values())]
    if rows.empty:
        return pd.DataFrame(columns=columns)
    rows = rows[(rows["status"] == "ok") & (rows["config.task"] == "cold start")]
    newest = rows.sort_values("created", kind="stable").drop_duplicates("config.mixer", keep="last")
    return pd.DataFrame([
        {"model": mark(row["config.mixer"]).name, "device": row["config.device_name"],
         **{f"{name}, s": f"{row[f'metrics.{key}']:.2f}" for key, name in parts.items()}}
        for row in newest.to_dict("records")
    ], columns=columns)  # fmt: skip


def _printed(number: int) -> pd.DataFrame:
    mixer_of = {m.name: mixer for mixer, m in MODELS.items()}
    values = paper_values("resona", number)
    return pd.DataFrame({"mixer": values["model"].map(mixer_of), "variant": values["variant"],
                         "length": values["prefill"], "paper": values["value"]})


def _verdict(cell: dict) -> str:
    if pd.isna(cell["paper"]):
        return ""
    ours, our_ratio, paper_ratio = (
        None if pd.isna(cell[name]) else cell[name] for name in ("ours", "our_ratio", "paper_ratio")
    )
    return cost_verdict(ours, cell["paper"], our_ratio=our_ratio, paper_ratio=paper_ratio,
                        at_paper_scale=cell["scale"] == "paper")


def _counts(table: pd.DataFrame) -> dict[str, int]:
    counts = table["verdict"].value_counts()
    return {verdict: int(counts.get(verdict, 0)) for verdict in VERDICTS}


def _number(value: float | None) -> str:
    if value is None or pd.isna(value):
        return NOTHING
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return NOTHING if value is None or pd.isna(value) else f"{value:.2f}"
