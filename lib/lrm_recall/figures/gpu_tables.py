"""The tables of docs/gpu.md, from the rows that bench/gpu_*.py stored: `python -m lrm_recall.figures.gpu_tables`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from lrm_recall.figures.efficiency_tables import paper_cost_table, training_cost_table
from lrm_recall.figures.tables import NOTHING, markdown
from lrm_recall.results import ResultStore, frame, profile_path
from lrm_recall.rows import Row

_TASKS = {"train": "training step", "prefill": "prefill", "generate": "129 tokens by `generate`"}
_TOP_K = 4  # of notebook 05
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_TRAINERS = {"ours": "ours, fp32", "ours tf32": "ours, tf32", "ours bf16": "ours, bf16",
             "ours, no graph": "ours, kernel by kernel"}  # fmt: skip
_SIDES = tuple(_TRAINERS)
_STEP_SIDES = {"base": "alone", "resona": "with Resona, beside the mixer",
               "resona, one stream": "with Resona, behind the mixer"}  # fmt: skip


def models_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Ours beside flash-linear-attention's class: milliseconds, peak memory, ratios; the newest run of each pair."""
    pairs: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        config = row["config"]
        if row["experiment"] == "bench_gpu_models" and config["task"] in _TASKS and config["autotune"] == "quick":
            pairs.setdefault((config["model"], config["task"], config["length"]), {})[config["side"]] = row
    lines = []
    for (model, task, length), sides in sorted(pairs.items(), key=lambda item: _order(item[0])):
        if len(sides) < 2:  # cut off between the two
            continue
        ours, theirs = sides["ours"]["metrics"], sides["fla"]["metrics"]
        lines.append({
            "model, 1.3B": model, "task": _TASKS[task], "tokens": f"{length:,}",
            "ours, ms": f"{ours['ms']:.0f}", "FLA, ms": f"{theirs['ms']:.0f}",
            "ratio": f"{ours['ms'] / theirs['ms']:.3f}",
            "ours, MB": f"{ours['peak_mb']:,.0f}", "FLA, MB": f"{theirs['peak_mb']:,.0f}",
            "memory ratio": f"{ours['peak_mb'] / theirs['peak_mb']:.3f}",
        })  # fmt: skip
    return pd.DataFrame(lines)


def decoding_table(rows: Sequence[Row]) -> pd.DataFrame:
    """128 steps after a prompt of 2K, the prompt's own time taken off; the floor is reading the weights 128 times."""
    lines = {}
    for row in rows:
        if row["experiment"] == "bench_gpu_models" and row["config"]["task"] == "generate":
            lines.setdefault(row["config"]["model"], {})[row["config"]["side"]] = row["metrics"]
    return pd.DataFrame([
        {"model, 1.3B": model, "ours, ms": f"{sides['ours']['decode_ms']:.0f}",
         "FLA, ms": f"{sides['fla']['decode_ms']:.0f}",
         "floor, ms": f"{sides['ours']['floor_ms']:.0f}",
         "times faster": f"{sides['fla']['decode_ms'] / sides['ours']['decode_ms']:.0f}"}
        for model, sides in sorted(lines.items()) if len(sides) == 2
    ])  # fmt: skip


def tuning_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Our models with one configuration a kernel, and with the configurations that were measured."""
    found: dict[tuple, dict[str, float]] = {}
    for row in rows:
        config = row["config"]
        if row["experiment"] == "bench_gpu_models" and config["task"] in _TASKS and config["side"] == "ours":
            key = config["model"], config["task"], config["length"]
            found.setdefault(key, {})[config["autotune"]] = row["metrics"]["ms"]
    return pd.DataFrame([
        {"model, 1.3B": model, "task": _TASKS[task], "tokens": f"{length:,}", "quick, ms": f"{ms['quick']:.0f}",
         "shipped, ms": f"{ms['shipped']:.0f}", "shipped / quick": f"{ms['shipped'] / ms['quick']:.2f}"}
        for (model, task, length), ms in sorted(found.items(), key=lambda item: _order(item[0]))
        if {"quick", "shipped"} <= ms.keys()
    ])  # fmt: skip


def resona_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Reading a prompt with Resona beside the same model alone, and the paper's Tables 5 and 7 beside both."""
    ours = frame([row for row in rows if row["experiment"] == "efficiency" and row["config"]["task"] == "prefill"
                  and (row["config"]["resona"] or {"top_k": _TOP_K})["top_k"] == _TOP_K])  # not what somebody tried
    tables = {number: paper_cost_table(ours, number) for number in (5, 7)}
    lines = []
    memory = _pairs(tables[7])
    for (model, length), (alone, resona) in _pairs(tables[5]).items():
        less, more = memory[model, length]
        lines.append({
            "model, 1.3B": model, "tokens": f"{length:,}", "alone, ms": f"{alone['ours']:.0f}",
            "with Resona, ms": f"{resona['ours']:.0f}", "ratio": f"{resona['our_ratio']:.2f}",
            "paper's ratio": f"{resona['paper_ratio']:.2f}",
            "more memory, GiB": f"{more['ours'] - less['ours']:.2f}", "paper's": f"{more['paper'] - less['paper']:.1f}",
        })  # fmt: skip
    return pd.DataFrame(lines)


def resona_decoding_table(rows: Sequence[Row]) -> pd.DataFrame:
    """128 steps with Resona beside the same model alone, and the paper's Table 6 beside both."""
    ours = frame([row for row in rows if row["experiment"] == "efficiency" and row["config"]["task"] == "decode"])
    return pd.DataFrame([
        {"model, 1.3B": model, "tokens before": f"{length:,}", "alone, ms": f"{alone['ours']:.0f}",
         "with Resona, ms": f"{resona['ours']:.0f}", "ratio": f"{resona['our_ratio']:.2f}",
         "paper, alone, ms": f"{alone['paper']:,.0f}", "paper, with Resona, ms": f"{resona['paper']:,.0f}",
         "paper's ratio": f"{resona['paper_ratio']:.2f}"}
        for (model, length), (alone, resona) in _pairs(paper_cost_table(ours, 6)).items()
    ])  # fmt: skip


def resona_step_table(rows: Sequence[Row]) -> pd.DataFrame:
    """What a Resona layer adds to a decoded token, its retrieval beside the mixer and behind it; the newest rows."""
    found = {(row["config"]["length"], row["config"]["side"]): row["metrics"]
             for row in rows if row["experiment"] == "bench_gpu_resona_decode"}  # fmt: skip
    return pd.DataFrame([
        {"tokens before": f"{length:,}", "GLA, 1.3B": _STEP_SIDES[side],
         "the graph, us": f"{metrics['replay_us']:,.0f}", "ratio": f"{metrics['replay_us_ratio']:.3f}",
         "128 tokens, ms": f"{metrics['decode_ms']:.0f}",
         "least to most": f"{metrics['decode_ms_least']:.0f} to {metrics['decode_ms_most']:.0f}",
         "ratio of these": f"{metrics['decode_ms_ratio']:.3f}"}
        for (length, side), metrics in sorted(found.items())
    ])  # fmt: skip


def sanitizer_table(rows: Sequence[Row]) -> pd.DataFrame:
    """What compute-sanitizer found in our kernels; the newest row of each tool."""
    newest = {row["config"]["tool"]: row for row in rows if row["experiment"] == "bench_gpu_sanitize"}
    return pd.DataFrame([
        {"tool": tool, "tests": row["metrics"]["tests"], "errors": row["metrics"]["errors"],
         "seconds": f"{row['runtime_s']:.0f}"} for tool, row in sorted(newest.items())
    ])  # fmt: skip


def throughput_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Training a GLA: tokens a second of each way to do it, and how many times those of flash-linear-attention's."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        config = row["config"]
        if row["experiment"] == "bench_gpu_lm" and "replayed" in config:  # those before said nothing of it
            place = config["model"], config["length"], config["autotune"]
            found.setdefault(place, {})[config["side"]] = row
    sides = list(dict.fromkeys(side for measured in found.values() for side in measured))
    lines = []
    for (model, length, tuning), measured in sorted(found.items()):
        cells = {side: f"{metrics['tokens_per_s']:,.0f} ({metrics['ratio_to_fla']:.2f}x)"
                 for side, metrics in ((side, row["metrics"]) for side, row in measured.items())}
        lines.append({"model": model, "tokens": f"{length:,}", "autotuning": tuning,
                      **{side.replace("fla", "FLA"): cells.get(side, "–") for side in sides}})  # fmt: skip
    return pd.DataFrame(lines)


def resona_training_table(rows: Sequence[Row]) -> pd.DataFrame:
    """A training step with Resona beside the same model alone."""
    return training_cost_table(frame([row for row in rows if row["experiment"] == "efficiency"]))


def search_table(rows: Sequence[Row]) -> pd.DataFrame:
    """`chunk_search` beside a product and torch.topk."""
    pairs: dict[tuple, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["experiment"] == "bench_gpu_chunk_search":
            config = row["config"]
            key = tuple(config[name] for name in ("length", "chunks", "encoder_dim", "top_k", "dtype"))
            pairs.setdefault(key, {})[config["side"]] = row["metrics"]
    return pd.DataFrame([
        {"queries": f"{length:,}", "chunks": f"{chunks:,}", "E": dim, "k": top_k, "dtype": _DTYPES[dtype],
         "floor, ms": f"{sides['ours']['floor_ms']:.3f}", "ours, ms": f"{sides['ours']['forward_ms']:.3f}",
         "product and topk, ms": f"{sides['topk']['forward_ms']:.3f}",
         "times faster": f"{sides['topk']['forward_ms'] / sides['ours']['forward_ms']:.0f}",
         "backward: ours, ms": f"{sides['ours']['backward_ms']:.2f}",
         "torch, ms": f"{sides['topk']['backward_ms']:.2f}"}
        for (length, chunks, dim, top_k, dtype), sides in pairs.items() if len(sides) == 2
    ])  # fmt: skip


def chunk_attention_table(rows: Sequence[Row]) -> pd.DataFrame:
    """`chunk_attention` beside what a user would pick instead, the same choices for all."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["experiment"] == "bench_gpu_chunk_attention" and row["status"] == "ok":
            found.setdefault(row["config"]["side"], {})[row["config"]["task"]] = row["metrics"]
    lines = []
    for side, tasks in found.items():
        forward, backward = tasks["forward"], tasks.get("backward")
        lines.append({
            "side": side, "forward, ms": f"{forward['ms']:.2f}", "floors": f"{forward['ms'] / forward['floor_ms']:.1f}",
            "backward, ms": NOTHING if backward is None else f"{backward['ms']:.2f}",
            "backward / forward": NOTHING if backward is None else f"{backward['ms'] / forward['ms']:.1f}",
        })  # fmt: skip
    return pd.DataFrame(lines)


def small_models_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Steps a second of our trainer of small models and of zoology's, on MQAR."""
    return _trainers(rows, None, "zoology", _SIDES)


def mad_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Steps a second of our trainer of small models and of mad-lab's, on MAD."""
    return _trainers(rows, "mad", "mad-lab", _SIDES)


def parity_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Relative errors of the same weights in our class and in the library's, and of both against our torch form."""
    found = {}
    for row in rows:
        config = row["config"]
        if row["experiment"] == "gpu_parity":
            found[config["model"], config["library"], config["dtype"]] = row["metrics"]
    lines = []
    for (model, library, dtype), metrics in sorted(found.items()):
        lines.append({
            "model": model, "library": library, "dtype": _DTYPES[dtype],
            "logits": _error(metrics, "logits, ours vs theirs"),
            "worst gradient": _gradient(metrics, "ours", "theirs"),
            "same tokens": _share(metrics.get("same tokens")),
            "ours against fp32 torch: logits": _error(metrics, "logits, ours vs oracle"),
            "gradient": _gradient(metrics, "ours", "oracle"),
            "theirs against it: logits": _error(metrics, "logits, theirs vs oracle"),
            "gradient ": _gradient(metrics, "theirs", "oracle"),
        })  # fmt: skip
    return pd.DataFrame(lines)


def references_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Relative errors against layers that run on a CPU."""
    return pd.DataFrame([
        {"layer": row["config"]["model"], "of": row["config"]["library"], "output": _error(row["metrics"], "output"),
         "gradient of the input": _error(row["metrics"], "gradient of x"),
         "worst gradient of a parameter": _error(row["metrics"], "worst gradient of a parameter")}
        for row in rows if row["experiment"] == "cpu_parity"
    ])  # fmt: skip


def statex_table(rows: Sequence[Row]) -> pd.DataFrame:
    """A training step of an expanded model at 64K tokens."""
    return pd.DataFrame([
        {"model, 1.3B": config["model"], "layers expanded": str(config["expanded_layers"]),
         "tokens": f"{config['length']:,}",
         "state, elements": f"{metrics['state']:,.0f}", "ms": f"{metrics['ms']:,.0f}",
         "peak GB": f"{metrics['peak_gb']:.1f}"}
        for config, metrics in ((row["config"], row["metrics"]) for row in rows if row["experiment"] == "bench_statex")
    ])  # fmt: skip


def cold_start_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Seconds to the first forward and backward of GLA 1.3B, with no kernel compiled before."""
    return pd.DataFrame([
        {"autotuning": row["config"]["autotune"], "first forward, s": f"{row['metrics']['forward_s']:.1f}",
         "first backward, s": f"{row['metrics']['backward_s']:.1f}", "both, s": f"{row['metrics']['first_step_s']:.1f}"}
        for row in rows if row["experiment"] == "bench_cold_start"
    ])  # fmt: skip


TABLES: dict[str, Callable[[Sequence[Row]], pd.DataFrame]] = {
    "models": models_table,
    "decoding": decoding_table,
    "tuning": tuning_table,
    "resona": resona_table,
    "resona decoding": resona_decoding_table,
    "resona step": resona_step_table,
    "resona training": resona_training_table,
    "search": search_table,
    "chunk attention": chunk_attention_table,
    "sanitizer": sanitizer_table,
    "small models": small_models_table,
    "mad": mad_table,
    "throughput": throughput_table,
    "parity": parity_table,
    "references": references_table,
    "statex": statex_table,
    "cold start": cold_start_table,
}


def fill(page: str, rows: Sequence[Row]) -> str:
    """The page with each table drawn anew between `<!-- table: name -->` and `<!-- end -->`."""
    def draw(place: re.Match) -> str:
        return f"{place[1]}\n{markdown(TABLES[place[2]](rows))}\n{place[3]}"

    return re.sub(r"(<!-- table: ([a-z ]+) -->)\n.*?(<!-- end -->)", draw, page, flags=re.DOTALL)


def _pairs(table: pd.DataFrame) -> dict[tuple[str, int], tuple[dict, dict]]:
    """Cells of a `paper_cost_table`, by model and length: the model alone, and with Resona where both were measured."""
    found = {}
    for place, part in table.groupby(["model", "length"], sort=False):
        cells = {cell["variant"]: cell for cell in part.to_dict("records")}
        if {"base", "resona"} <= cells.keys() and pd.notna(cells["resona"]["our_ratio"]):
            found[place] = cells["base"], cells["resona"]
    return found


def _trainers(rows: Sequence[Row], benchmark: str | None, reference: str, sides: Sequence[str]) -> pd.DataFrame:
    """A line for each mixer of which every side was measured: steps a second, and how many times the reference's."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        config = row["config"]
        if row["experiment"] != "bench_gpu_synthetic" or config["task"] != "train":
            continue
        if config.get("benchmark") == benchmark:
            found.setdefault(config["mixer"], {})[config["side"]] = row["metrics"]["steps_per_s"]
    return pd.DataFrame([
        {"mixer": mixer, reference: f"{steps[reference]:.1f}",
         **{_TRAINERS[side]: f"{steps[side]:.1f} ({steps[side] / steps[reference]:.1f}x)" for side in sides}}
        for mixer, steps in found.items() if {reference, *sides} <= steps.keys()
    ])  # fmt: skip


def _order(key: tuple[str, str, int]) -> tuple[str, int, int]:
    model, task, length = key
    return model, list(_TASKS).index(task), length


def _error(metrics: dict[str, float], name: str) -> str:
    value = metrics.get(name)
    return NOTHING if value is None else "0" if value == 0 else f"{value:.0e}"


def _gradient(metrics: dict[str, float], a: str, b: str) -> str:
    """The worst of all gradients; nothing where one side has computed only some of them."""
    count, complete = metrics.get(f"gradients, {a} vs {b}"), metrics.get("gradients, ours vs oracle")
    if count is None or (complete and count < 0.8 * complete):
        return NOTHING
    return _error(metrics, f"gradients, worst, {a} vs {b}")


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"


def stored_rows(results: Path) -> list[Row]:
    """The rows that docs/gpu.md shows."""
    files = (("bench", "h100"), ("efficiency", "h100"), ("parity", "h100"), ("parity", "laptop"))
    return [row for group, profile in files for row in ResultStore(profile_path(results, group, profile)).rows()]


def main() -> None:
    """Draw the tables of docs/gpu.md anew."""
    root = Path(__file__).resolve().parents[3]
    page = root / "docs" / "gpu.md"
    page.write_text(fill(page.read_text(), stored_rows(root / "outputs" / "results")))


if __name__ == "__main__":
    main()
