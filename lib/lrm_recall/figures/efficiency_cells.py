"""From rows of measurements to cells: the newest measurement of each, and what stands beside it."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lrm_recall.figures.style import MODELS

PAPER_HIDDEN_SIZE, PAPER_PARAMETERS = 2048, (1.2e9, 1.6e9)  # Tables 5 to 7 say "1.3B"
PAPER_DEVICES = ("A100", "H100", "H200")  # the paper names none; its base models' times are those of this class
_PLACE = ["mixer", "variant", "expanded_layers", "task", "length"]
_CONFIG = ("mixer", "expanded_layers", "task", "length", "hidden_size", "num_layers", "dtype", "new_tokens",
           "checkpointing", "device_name")
_METRICS = ("ms", "tokens_per_s", "peak_mb", "parameters", "state_size", "floor_ms")


def efficiency_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """The newest successful measurement of every model, variant, task and length.

    Args:
        rows: the rows of one set of runs on one machine, as `lrm_recall.results.frame` makes them from what a sweep
            returns; a whole file may hold other options and other machines.

    Returns:
        mixer, variant ("base", "resona", "expanded"), and the fields and metrics of the run by their own names;
        `gb`, peak memory in GiB; `at_paper_scale`, whether model and device are of the paper's kind.

    Raises:
        ValueError: no such rows, or rows of several devices.
    """
    rows = rows[rows["status"] == "ok"].sort_values("created", kind="stable") if len(rows) else rows
    if rows.empty:
        raise ValueError("no measurement has succeeded")
    if rows["config.device_name"].nunique() > 1:
        raise ValueError(f"measurements of several devices: {', '.join(sorted(set(rows['config.device_name'])))}")
    with_resona = rows.get("config.resona.layers", pd.Series(index=rows.index, dtype=object)).notna()
    expanded = rows["config.expanded_layers"] > 0
    table = pd.DataFrame({
        **{name: rows[f"config.{name}"] for name in _CONFIG},
        **{name: rows.get(f"metrics.{name}") for name in _METRICS},
        "variant": expanded.map({True: "expanded", False: "base"}).mask(with_resona, "resona"),
    })  # fmt: skip
    table = table.drop_duplicates([*_PLACE, "hidden_size", "num_layers", "dtype"], keep="last")
    table["gb"] = table["peak_mb"] * 1e6 / 2**30
    table["at_paper_scale"] = [_at_paper_scale(cell) for cell in table.to_dict("records")]
    return table.assign(order=table["mixer"].map(list(MODELS).index)).sort_values(
        ["order", "variant", "expanded_layers", "task", "length"]).drop(columns="order").reset_index(drop=True)


def _at_paper_scale(cell: dict[str, Any]) -> bool:
    low, high = PAPER_PARAMETERS
    return (cell["hidden_size"] == PAPER_HIDDEN_SIZE and low <= cell["parameters"] <= high
            and cell["dtype"] == "bfloat16" and any(name in cell["device_name"] for name in PAPER_DEVICES))
