"""The nine zero-shot tasks of Resona's Table 8, as tasks of lm-evaluation-harness.

The table's heads are those of paper/values.csv: `head` is its condition, `metrics` maps its metrics to the harness's.

Two things that the table does not say can be read off its numbers. AVG is the mean of the thirteen accuracies, acc and
acc_norm alike (a test computes it for all six rows). Wiki. is Table 2's perplexity, to the last digit; the harness's
own task divides by words and reads WikiText-2, whose test split is WikiText-103's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrm_recall.options import check_names

_ACC = {"accuracy": "acc"}
_BOTH = {"accuracy": "acc", "accuracy_norm": "acc_norm"}
_PARQUET = "pubmed_qa_labeled_fold0_source/{}/*.parquet"


@dataclass(frozen=True)
class HarnessTask:
    """One task of the harness.

    Attributes:
        name: in the harness.
        head: of its columns in the table.
        metrics: the table's metric, as values.csv calls it -> the harness's.
        repo: data set on the hub that the harness reads, and its configuration `config`.
        revision: the commit that it is pinned to here, where one is known to have the files that the harness wants.
        overrides: further fields of the task's configuration that are set here.
    """

    name: str
    head: str
    metrics: Mapping[str, str]
    repo: str
    config: str | None = None
    revision: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def configuration(self, file: Path | None = None) -> dict[str, Any]:
        """What a group of the harness holds for this task: its name, and what is set otherwise than there.

        Args:
            file: JSON Lines with the documents to score, which have the fields of the hub's; None: those of the hub.
        """
        if file is not None:
            return {"task": self.name, "dataset_path": "json", "dataset_name": None, "training_split": None,
                    "validation_split": None, "test_split": "test",
                    "dataset_kwargs": {"data_files": {"test": str(file)}}}  # fmt: skip
        pinned = {"dataset_kwargs": {"revision": self.revision}} if self.revision else {}
        return {"task": self.name, **pinned, **self.overrides}


_ARC = {"repo": "allenai/ai2_arc", "revision": "210d026faf9955653af8916fad021475a3f00453"}
_PUBMEDQA_PARQUET = "13a7d15476092370cbabb6475390e7e69b74d2f2"
TABLE8 = (
    HarnessTask("wikitext", "Wiki.", {"ppl": "word_perplexity"}, "EleutherAI/wikitext_document_level",
                "wikitext-2-raw-v1", "647234772b9554e208af6c826f23b99e3cac88c8"),
    HarnessTask("arc_challenge", "ARC-C", _BOTH, config="ARC-Challenge", **_ARC),
    HarnessTask("arc_easy", "ARC-E", _BOTH, config="ARC-Easy", **_ARC),
    HarnessTask("hellaswag", "Hella.", _BOTH, "Rowan/hellaswag", None, "218ec52e09a7e7462a5400043bb9a69a41d06b76"),
    HarnessTask("openbookqa", "OBQA", _BOTH, "allenai/openbookqa", "main", "388097ea7776314e93a529163e0fea805b8a6454"),
    HarnessTask("piqa", "PIQA", _BOTH, "baber/piqa", None, "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1"),
    # The repository's main branch is a script, which no `datasets` from 4 on runs; this commit is the hub's own
    # conversion of what the script gives.
    HarnessTask("pubmedqa", "PM", _ACC, "bigbio/pubmed_qa", "pubmed_qa_labeled_fold0_source", _PUBMEDQA_PARQUET, {
        "dataset_name": None,
        "dataset_kwargs": {
            "revision": _PUBMEDQA_PARQUET,
            "data_files": {split: _PARQUET.format(split) for split in ("train", "validation", "test")},
        },
    }),
    # not pinned: no commit is known to hold `problems` as the text that the harness parses
    HarnessTask("race", "RACE", _ACC, "EleutherAI/race", "high"),
    HarnessTask("winogrande", "Wino.", _ACC, "allenai/winogrande", "winogrande_xl",
                "01e74176c63542e6b0bcb004dcdea22d94fb67b5"),
)  # fmt: skip
GROUP = "table8"  # what `lrm-recall evaluate --tasks` takes for all of them


def group(names: Sequence[str] | None = None, files: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Tasks of the table as one group of the harness; `lm_eval.simple_evaluate(tasks=[group()])` runs them.

    Args:
        names: of the tasks, as the harness calls them; None: all nine.
        files: name -> documents to take in the place of the hub's (see `HarnessTask.configuration`).

    Raises:
        ValueError: a name that no task of the table has.
    """
    known = {task.name: task for task in TABLE8}
    names = list(known) if names is None else names
    check_names("tasks", names, known)
    return {"group": GROUP, "task": [known[name].configuration((files or {}).get(name)) for name in names]}


def table8_row(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """A row of Table 8 from what the harness gives, for the tasks that it ran: the metrics of a row of results.

    Args:
        results: `simple_evaluate(...)["results"]`: task -> "metric,filter" -> value.

    Returns:
        Head of the table -> metric, both as values.csv calls them -> value; with AVG once all accuracies are in.
    """
    row = {
        task.head: {metric: float(results[task.name][f"{name},none"]) for metric, name in task.metrics.items()}
        for task in TABLE8 if task.name in results
    }  # fmt: skip
    accuracies = [value for values in row.values() for metric, value in values.items() if metric != "ppl"]
    if len(accuracies) == sum(len(task.metrics) for task in TABLE8 if "ppl" not in task.metrics):
        row["AVG"] = {"accuracy": sum(accuracies) / len(accuracies)}
    return row
