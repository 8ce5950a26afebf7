"""Score the models that a sweep trained on tasks of Resona's Table 8: a row a model, done once.

    tasks = ["openbookqa", "piqa"]
    runs = zero_shot_runs(plan_sweep(trained, experiment(prepared), store).specs, tasks)
    rows, left = score_models(runs, zero_shot_experiment("offline", tasks), scores, profile="laptop")

A model is scored where it was trained: its weights lie in the cache there (`lrm_recall.train.lm_checkpoints`), and the
store holds its row alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lrm_recall.data.corpora import SOURCES
from lrm_recall.data.errors import DataError
from lrm_recall.data.hub import no_answer
from lrm_recall.evaluate.harness_tasks import TABLE8, group, table8_row
from lrm_recall.evaluate.offline_tasks import LABEL, OFFLINE_TASKS, REVISION, check_offline, offline_documents
from lrm_recall.options import check_names, check_options
from lrm_recall.results import ResultStore
from lrm_recall.rows import Row
from lrm_recall.sweep import Experiment, plan_sweep, run_sweep
from lrm_recall.train.lm_checkpoints import model_folder

if TYPE_CHECKING:
    from lrm_recall.train.language_model import LMRun

EXPERIMENT = "table8"  # and the group of the store
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
        _check_tasks(self.tasks)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or None for all documents, got {self.limit}")


def zero_shot_runs(
    trained: Mapping[str, LMRun], tasks: Sequence[str], limit: int | None = None
) -> list[ZeroShotRun]:
    """A run for each trained model, which reads as many tokens at once as it was trained on.

    Args:
        trained: key -> the run that trained it, as `plan_sweep(...).specs`.
        tasks, limit: as for ZeroShotRun.

    Raises:
        ValueError: no task, or one that Table 8 does not have.
    """
    return [ZeroShotRun(trained=key, mixer=run.mixer, variant=run.variant, seed=run.seed, tasks=list(tasks),
                        max_length=run.length, limit=limit) for key, run in trained.items()]  # fmt: skip


def zero_shot_experiment(source: str, tasks: Sequence[str], device: str = "cpu") -> Experiment:
    """What the runs of a sweep share; all documents come from one source.

    Args:
        source: "hub"; "offline", what packages of PyPI carry; or "auto": the hub when it answers.
        tasks: those of the runs.
        device: "cpu" or "cuda".

    Raises:
        ValueError: an unknown source or task, or no task.
        DataError: the hub is asked for and does not answer, or a task needs it and it is not to be asked.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    _check_tasks(tasks)
    first = next(task for task in TABLE8 if task.name in tasks)
    reason = None if source == "offline" else no_answer(first.repo, first.revision or "main")
    if source == "hub" and reason:
        raise DataError(f"the hub does not answer ({reason}); without it there are: {', '.join(OFFLINE_TASKS)}")
    if source == "hub" or (source == "auto" and reason is None):
        pins = ",".join(f"{task.name}@{(task.revision or 'main')[:8]}" for task in TABLE8)
        chosen, data = "hub", {"source": "hub", "revision": pins}
    else:
        check_offline(tasks)
        chosen, data = "offline", {"source": LABEL, "revision": REVISION}
    return Experiment(EXPERIMENT, partial(score_model, source=chosen, device=device), data=data, modules=code_modules)


def score_models(
    runs: Sequence[ZeroShotRun], experiment: Experiment, store: ResultStore, **options: Any
) -> tuple[list[Row], str]:
    """The rows of what is scored, now or before, and in words what cannot be scored here.

    Args:
        options: of `run_sweep`.

    Raises:
        DataError: packages are to carry the documents, and cannot be had.
    """
    plan = plan_sweep(runs, experiment, store)
    reasons = {key: _why_not(plan.specs[key]) for key in plan.missing}
    if experiment.data["source"] == LABEL and None in reasons.values():
        offline_documents({task for run in runs for task in run.tasks})  # fetched before work starts
    rows = run_sweep([run for key, run in plan.specs.items() if not reasons.get(key)], experiment, store, **options)
    counts = Counter(reason for reason in reasons.values() if reason)
    return rows, "; ".join(f"{count} of {len(plan.specs)} models not scored: {why}" for why, count in counts.items())


def score_model(run: ZeroShotRun, source: str = "offline", device: str = "cpu") -> dict[str, Any]:
    """The scores of one model.

    Returns:
        metrics: head of the table -> metric, both as values.csv calls them -> value, and "questions": how many there
            were; AVG where all tasks ran. runtime_s: wall-clock seconds.
    """
    import lm_eval

    from lrm_recall.evaluate.harness_model import HarnessLM

    begin = time.perf_counter()
    files = offline_documents(run.tasks) if source == "offline" else {}
    with _quiet():
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
    no_matter = ("checkpoints", "data", "sweep", "results", "rows", "train.lm_checkpoints")
    return ["lrm_recall.train.lm_zero_shot", "lrm_recall.evaluate.harness_model", f"lrm_recall.mixers.{run.mixer}",
            *retrieval, *(f"-lrm_recall.{name}" for name in no_matter)]  # fmt: skip


def _check_tasks(names: Sequence[str]) -> None:
    check_names("tasks", names, [task.name for task in TABLE8])
    if not names:
        raise ValueError("tasks is empty: name at least one task of Table 8")


def _why_not(run: ZeroShotRun) -> str | None:
    """What is missing here to score this model; None: nothing."""
    if importlib.util.find_spec("lm_eval") is None:
        return "lm-evaluation-harness is not installed (make .venv/.eval)"
    if not model_folder(run.trained).is_dir():
        return "their weights are on the machine that trained them"
    return None


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
