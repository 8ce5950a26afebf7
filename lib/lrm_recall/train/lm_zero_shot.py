"""Score one trained model in tasks of Resona's Table 8, by lm-evaluation-harness.

    run = ZeroShotRun(trained="083b27a3ed749c25", mixer="gla", variant="resona", seed=0, tasks=["piqa"], max_length=512)
    score_model(run)["metrics"]["PIQA"]["accuracy_norm"]
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lrm_recall.evaluate.harness_tasks import TABLE8, group, table8_row
from lrm_recall.evaluate.offline_tasks import offline_documents
from lrm_recall.options import check_names, check_options
from lrm_recall.train.lm_checkpoints import model_folder
from lrm_recall.train.start import torch_threads

_BATCH = 16  # texts that a model reads at once


@dataclass(frozen=True, kw_only=True)
class ZeroShotRun:
    """One model to score; plain JSON through `dataclasses.asdict`.

    Attributes:
        trained: key of the row of the run that trained it.
        mixer, variant, seed: of that run.
        tasks: of Table 8, as the harness calls them.
        max_length: tokens that the model reads at once; of longer texts the last.
        limit: the first documents of each task alone; None: all.
    """

    trained: str
    mixer: str
    variant: Literal["base", "sp", "resona"]
    seed: int
    tasks: list[str]
    max_length: int
    limit: int | None = None

    def __post_init__(self) -> None:
        check_options(type(self), asdict(self), "ZeroShotRun")
        check_tasks(self.tasks)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or None for all documents, got {self.limit}")


def check_tasks(names: Sequence[str]) -> None:
    """Raise ValueError unless these are tasks of Table 8, at least one, each once."""
    check_names("tasks", names, [task.name for task in TABLE8])
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must name at least one task of Table 8, and each once, got {list(names)}")


def score_model(run: ZeroShotRun, source: str = "offline", device: str = "cpu") -> dict[str, Any]:
    """The scores of one model.

    Args:
        source: of the documents, "hub" or "offline".

    Returns:
        metrics: head of the table -> metric, both as values.csv calls them -> value, and "questions": how many there
            were; AVG where all tasks ran. runtime_s: wall-clock seconds.
    """
    import lm_eval

    from lrm_recall.evaluate.harness_model import HarnessLM

    begin = time.perf_counter()
    files = offline_documents(run.tasks) if source == "offline" else {}
    with _quiet(), torch_threads(1, torch.device(device)):  # as a worker has them: more would wait for each other
        model = HarnessLM(str(model_folder(run.trained)), device=device, batch_size=_BATCH, max_length=run.max_length)
        found = lm_eval.simple_evaluate(model, tasks=[group(run.tasks, files)], task_manager=_tasks(),
                                        limit=run.limit, bootstrap_iters=0)  # fmt: skip
    metrics: dict[str, dict[str, float]] = table8_row(found["results"])
    for task in TABLE8:
        if task.name in run.tasks:
            metrics[task.head]["questions"] = found["n-samples"][task.name]["effective"]
    return {"metrics": metrics, "runtime_s": time.perf_counter() - begin}


def code_modules(run: ZeroShotRun) -> list[str]:
    """Modules whose code decides a score; how the model came about is in its own row, whose key the run holds."""
    retrieval = ["lrm_recall.resona.layer"] if run.variant == "resona" else []
    no_matter = ("checkpoints", "data", "train.lm_checkpoints")
    return ["lrm_recall.train.lm_zero_shot", "lrm_recall.evaluate.harness_model", f"lrm_recall.mixers.{run.mixer}",
            *retrieval, *(f"-lrm_recall.{name}" for name in no_matter)]  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's bars and its line for every text that is cut: a sweep shows how far it is."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logger.setLevel(level)


@functools.cache
def _tasks() -> Any:
    """The harness's own tasks, of the table's folders alone: to find all takes ten seconds."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.__file__).parent / "tasks"
    folders = {folder / task.name.partition("_")[0] for task in TABLE8}
    return TaskManager(include_path=sorted(folders), include_defaults=False)
