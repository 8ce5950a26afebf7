"""How often chunks found before training hold the answer to a question: the table of docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lrm_recall.rows import Row


def retrieval_hits_table(rows: Sequence[Row]) -> pd.DataFrame:
    """One line a corpus and chunk size, one column a window: shares of questions whose answer the best chunk holds, and
    in brackets one of the best four.

    Args:
        rows: of `bench/retrieval_hits.py`; of equal ones the last counts.
    """
    lines: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        if row["experiment"] != "bench_retrieval_hits":
            continue
        config, metrics = row["config"], row["metrics"]
        line = lines.setdefault((config["corpus"], config["chunk_size"]), {
            "corpus, chunk size": f"{config['corpus']}, {config['chunk_size']}", "questions": f"{metrics['questions']}",
            "chance": f"{metrics['chance']:.2f}",
        })  # fmt: skip
        line[f"w = {config['window']}"] = f"{metrics['best']:.2f} ({metrics['best_four']:.2f})"
    return pd.DataFrame(list(lines.values()))
