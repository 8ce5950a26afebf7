"""Score the models that a sweep trained in tasks of Resona's Table 8: a row a model, done once.

    scoring = zero_shot_experiment("offline", tasks=["openbookqa", "piqa"])
    rows, what = score_models(zero_shot_runs(trained, ["openbookqa", "piqa"]), scoring, store, profile="laptop")

A model is scored where it was trained: its weights lie in the cache there (`lrm_recall.train.lm_checkpoints`), and the
store of language models holds its row alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lrm_recall.data.corpora import SOURCES
from lrm_recall.data.errors import DataError
from lrm_recall.data.hub import no_answer
from lrm_recall.evaluate.harness_tasks import TABLE8
from lrm_recall.evaluate.offline_tasks import LABEL, REVISION, check_offline, offline_documents
from lrm_recall.results import ResultStore
from lrm_recall.rows import Row
from lrm_recall.sweep import Experiment, plan_sweep, run_sweep
from lrm_recall.train.lm_checkpoints import model_folder
from lrm_recall.train.lm_zero_shot import ZeroShotRun, check_tasks, code_modules, score_model

if TYPE_CHECKING:
    from lrm_recall.train.language_model import LMRun

EXPERIMENT = "table8"  # and the group of the store


def zero_shot_runs(trained: Mapping[str, LMRun], tasks: Sequence[str], limit: int | None = None) -> list[ZeroShotRun]:
    """A run for each trained model, which reads as many tokens at once as it was trained on.

    Args:
        trained: key of a row -> the run that trained the model.
        tasks, limit: as for ZeroShotRun; the order of the tasks does not matter.

    Raises:
        ValueError: no task, or one that Table 8 does not have.
    """
    check_tasks(tasks)
    ordered = [task.name for task in TABLE8 if task.name in tasks]
    return [ZeroShotRun(trained=key, mixer=run.mixer, variant=run.variant, seed=run.seed, tasks=ordered,
                        max_length=run.length, limit=limit) for key, run in trained.items()]  # fmt: skip


def zero_shot_experiment(source: str, tasks: Sequence[str], device: str = "cpu") -> Experiment:
    """What the runs of a sweep share; all documents come from one source. Asks the hub only for "auto".

    Args:
        source: "hub"; "offline", what packages of PyPI carry; or "auto": the hub when it answers.
        tasks: those of the runs.
        device: "cpu" or "cuda".

    Raises:
        ValueError: an unknown source or task, or no task.
        DataError: a task needs the hub, which is not to be asked or does not answer.
    """
    check_tasks(tasks)
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    asked = [task for task in TABLE8 if task.name in tasks]
    reason = no_answer(asked[0].repo, asked[0].revision or "main") if source == "auto" else None
    chosen = "offline" if source == "offline" or reason else "hub"
    if chosen == "offline":
        try:
            check_offline(tasks)
        except DataError as error:
            raise DataError(f"{error}{f'; the hub does not answer ({reason})' if reason else ''}") from None
    pins = REVISION if chosen == "offline" else ",".join(f"{t.name}@{(t.revision or 'main')[:8]}" for t in asked)
    data = {"source": LABEL if chosen == "offline" else "hub", "revision": f"{pins} lm_eval {_version()}"}
    return Experiment(EXPERIMENT, partial(score_model, source=chosen, device=device), data=data, modules=code_modules)


def score_models(
    runs: Sequence[ZeroShotRun],
    experiment: Experiment,
    store: ResultStore,
    *,
    fresh: bool = False,
    retry_failed: bool = False,
    deadline: float | None = None,
    **options: Any,
) -> tuple[list[Row], str]:
    """Score what is not stored and can be scored here; the rows, and in words how many models have scores, and why the
    others have none.

    Args:
        fresh, retry_failed, deadline, options: as for `run_sweep`.
    """
    plan = plan_sweep(runs, experiment, store, fresh=fresh, retry_failed=retry_failed)
    in_time = deadline is None or time.monotonic() < deadline
    reasons = {key: _why_not(plan.specs[key], in_time) for key in plan.missing}
    if None in reasons.values() and (problem := _no_documents(experiment, runs)):
        reasons = {key: reason or problem for key, reason in reasons.items()}
    here = [run for key, run in plan.specs.items() if reasons.get(key) is None]
    rows = run_sweep(here, experiment, store, fresh=fresh, retry_failed=retry_failed, deadline=deadline, **options)
    counts = Counter(reason for reason in reasons.values() if reason)
    counts["failed"] = sum(row["status"] != "ok" for row in rows)
    counts["no time left"] += len(here) - len(rows)
    left = "".join(f"; {count} not: {why}" for why, count in counts.items() if count)
    scored = len(rows) - counts["failed"]
    return rows, f"{scored} of {len(plan.specs)} models have scores of this code and harness{left}"


def _why_not(run: ZeroShotRun, in_time: bool) -> str | None:
    """What is missing here to score this model; None: nothing."""
    if importlib.util.find_spec("lm_eval") is None:
        return "lm-evaluation-harness is not installed (make .venv/.eval)"
    if not model_folder(run.trained).is_dir():
        return f"no weights in {model_folder(run.trained).parent}; those of a stored row are where it was trained"
    return None if in_time else "no time left"


def _no_documents(experiment: Experiment, runs: Sequence[ZeroShotRun]) -> str | None:
    """Why the documents cannot be had, asked before work starts; None: they can. A package is fetched."""
    tasks = {task for run in runs for task in run.tasks}
    if experiment.data["source"] == LABEL:
        try:
            offline_documents(tasks)
        except DataError as error:
            return str(error)
        return None
    first = next(task for task in TABLE8 if task.name in tasks)
    reason = no_answer(first.repo, first.revision or "main")
    return f"the hub does not answer ({reason})" if reason else None


def _version() -> str:
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return "none"
