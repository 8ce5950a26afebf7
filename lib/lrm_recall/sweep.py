"""Sweeps: of all the runs asked for, do those that are not stored yet, and store each the moment it ends.

A run is described by a frozen dataclass (its fields are the row's config; it has a `seed`) and done by an
importable function that takes it and returns {"metrics": {...}} and, if it likes, "history", "runtime_s" and
"peak_memory_mb". A run that raises, returns NaN or loses its process is stored as failed, with the reason,
and stops none of the others; it is tried again only on request.

    data = {"source": "generated", "revision": "1"}
    experiment = Experiment("mqar", run_mqar, data, modules=code_modules)
    print(plan_sweep(specs, experiment, store))  # lists what is missing; nothing is run
    rows = run_sweep(specs, experiment, store, profile="smoke", workers=2)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrm_recall.code_hash import code_hash
from lrm_recall.execution import Outcome, Run, dask_client, execute_here, execute_on
from lrm_recall.progress import SweepProgress, duration
from lrm_recall.results import ResultStore
from lrm_recall.rows import Row, make_row, not_finite, plain, run_key

_RESULT = ("metrics", "history", "runtime_s", "peak_memory_mb")


@dataclass(frozen=True)
class Experiment:
    """What all runs of a sweep share.

    Attributes:
        name: the row's `experiment`, for example "mqar".
        run: the function that does one run, or a functools.partial of it. Workers import it, so it must live
            at the top of a module.
        data: {"source": ..., "revision": ...} of what the runs train and test on.
        modules: from a run's description, the modules whose code (with all they import from our packages)
            decides its result; those found by name at run time must be among them ("lrm_recall.mixers.gla").
        cost: from a run's description, roughly how many seconds it takes; None when nobody knows.
    """

    name: str
    run: Run
    data: Mapping[str, str]
    modules: Callable[[Any], Sequence[str]]
    cost: Callable[[Any], float] | None = None

    def __post_init__(self) -> None:
        function = self.run.func if isinstance(self.run, functools.partial) else self.run
        module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
        if module in (None, "__main__") or "<" in name:
            raise ValueError(f"run must be a function at the top of a module, not {module}.{name}")
        if missing := {"source", "revision"} - set(self.data):
            raise ValueError(f"data lacks {', '.join(sorted(missing))}: {dict(self.data)}")


@dataclass(frozen=True)
class Plan:
    """What a sweep would do; `print(plan)` lists it.

    Attributes:
        experiment: its name.
        specs: every run asked for, once, by key.
        codes: code hash of each.
        stored: keys of the runs that are done.
        failed: reason by key, of the runs that failed before and are not to be tried again.
        missing: keys of the runs to do.
        cost: expected seconds of each missing run; None without hints.
    """

    experiment: str
    specs: dict[str, Any]
    codes: dict[str, str] = field(repr=False)
    stored: list[str]
    failed: dict[str, str]
    missing: list[str]
    cost: dict[str, float] | None

    @property
    def keys(self) -> list[str]:
        """Keys of every run asked for: what a notebook promises."""
        return list(self.specs)

    def __str__(self) -> str:
        parts = [f"{len(self.stored)} stored", f"{len(self.missing)} to do"]
        if self.failed:
            parts.append(f"{len(self.failed)} failed earlier")
        if self.missing and self.cost is not None:
            parts.append(f"about {duration(sum(self.cost.values()))} of work")
        shown = _distinctive(self.specs)
        lines = [f"{self.experiment}: {len(self.specs)} runs, {', '.join(parts)}"]
        lines += [f"  to do   {key}  {shown[key]}" for key in self.missing]
        lines += [f"  failed  {key}  {reason}" for key, reason in self.failed.items()]
        return "\n".join(lines)


def plan_sweep(
    specs: Iterable[Any],
    experiment: Experiment,
    store: ResultStore,
    *,
    retry_failed: bool = False,
    fresh: bool = False,
) -> Plan:
    """Find which runs are missing from `store`; nothing is run or written.

    Args:
        retry_failed: count runs that failed before as missing.
        fresh: count every run as missing; its new row will take the place of the stored one.

    Raises:
        ValueError: when a description is not a dataclass with an integer `seed`, or holds what JSON cannot.
        StoreError: when the store's file is corrupt.
    """
    by_key: dict[str, Any] = {}
    codes: dict[str, str] = {}
    hash_of = functools.cache(code_hash)  # many runs share their modules; files may change between two sweeps
    for spec in specs:
        code = hash_of(tuple(experiment.modules(spec)))
        key = run_key(experiment.name, _config(spec), spec.seed, experiment.data["revision"], code)
        by_key[key], codes[key] = spec, code
    lacking = list(by_key) if fresh else store.missing(by_key)
    failures = {} if fresh or retry_failed else {row["key"]: row["error"] for row in store.failures()}
    missing = [key for key in lacking if key not in failures]
    waiting = set(lacking)
    return Plan(
        experiment=experiment.name,
        specs=by_key,
        codes=codes,
        stored=[key for key in by_key if key not in waiting],
        failed={key: failures[key] for key in lacking if key in failures},
        missing=missing,
        cost={key: experiment.cost(by_key[key]) for key in missing} if experiment.cost else None,
    )


def run_sweep(
    specs: Iterable[Any],
    experiment: Experiment,
    store: ResultStore,
    *,
    profile: str,
    workers: int | str = 1,
    retry_failed: bool = False,
    fresh: bool = False,
    progress: bool = True,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Do the missing runs; return the row of every run asked for, in the order of `specs`, duplicates once.

    Rows of failed runs are among them (`row["status"]`), and one warning sums them up.

    Args:
        workers: 1 runs here, in this process; more starts that many processes of one thread each; an address
            ("tcp://127.0.0.1:8786") hands the runs to the Dask cluster there. A script that asks for
            processes needs the usual `if __name__ == "__main__":`; a notebook does not.
        retry_failed, fresh: as in `plan_sweep`.
        on_row: called with each new row, once it is on disk.

    Raises:
        ValueError: as `plan_sweep`, or for `workers` below 1.
        ConnectionError: when no Dask scheduler answers at the address.
        StoreError: when the store's file is corrupt. In each of these cases nothing is run.
    """
    if isinstance(workers, int) and workers < 1:
        raise ValueError(f"workers is {workers}; it must be 1 or more, or the address of a Dask scheduler")
    plan = plan_sweep(specs, experiment, store, retry_failed=retry_failed, fresh=fresh)
    store.repair()
    new: dict[str, Row] = {}
    if plan.missing:
        with contextlib.closing(_do(plan, experiment, profile, workers, progress)) as rows:
            for row in rows:
                store.append(row)
                new[row["key"]] = row
                if on_row is not None:
                    on_row(row)
    latest = {row["key"]: row for row in [*store.failures(), *store.rows()]} | new
    asked = [latest[key] for key in plan.specs]
    _warn_of_failures(asked, len(plan.failed))
    return asked


def _do(plan: Plan, experiment: Experiment, profile: str, workers: int | str, show: bool) -> Iterator[Row]:
    """Do the missing runs of `plan`; yield the row of each as it ends."""
    order = plan.missing
    if isinstance(workers, int):
        workers = min(workers, len(order))
    if workers != 1 and plan.cost is not None:  # longest first: none is left to one worker at the end
        order = sorted(order, key=plan.cost.__getitem__, reverse=True)
    todo = {key: plan.specs[key] for key in order}
    with contextlib.ExitStack() as stack:
        if workers == 1:
            at_a_time, outcomes = 1, execute_here(experiment.run, todo)
        else:
            client = stack.enter_context(dask_client(workers))
            at_a_time, outcomes = sum(client.nthreads().values()), execute_on(client, experiment.run, todo)
        bar = stack.enter_context(SweepProgress(experiment.name, todo, plan.cost, at_a_time, show))
        for key, outcome in outcomes:
            row = _row(experiment, plan.specs[key], plan.codes[key], profile, outcome)
            bar.finished(key, row["runtime_s"], failed=row["status"] == "failed")
            yield row


def _row(experiment: Experiment, spec: Any, code: str, profile: str, outcome: Outcome) -> Row:
    """The row of a run that has ended; a result that cannot be stored, such as NaN, makes it a failed one."""
    make = functools.partial(
        make_row,
        experiment=experiment.name,
        config=_config(spec),
        seed=spec.seed,
        data=experiment.data,
        code=code,
        profile=profile,
        machine=outcome.machine,
    )
    error = outcome.error
    if error is None:
        try:
            return make(**{"runtime_s": outcome.runtime_s, **_checked(outcome.result)})
        except ValueError as problem:
            error = str(problem)
    return make(runtime_s=outcome.runtime_s, error=error)


def _checked(result: Any) -> dict[str, Any]:
    """What a run returned, as parts of a row.

    Raises:
        ValueError: when it has another shape, or holds what JSON cannot, NaN and infinity included.
    """
    if not isinstance(result, Mapping) or "metrics" not in result or set(result) - set(_RESULT):
        raise ValueError(f"a run returns a dict with metrics and at most {_RESULT[1:]}, not {result!r:.200}")
    parts = plain(result)
    if bad := next(not_finite(parts), None):
        raise ValueError(f"{bad} is not a finite number: the run has diverged")
    return parts


def _config(spec: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(spec) or isinstance(spec, type):
        raise ValueError(f"a run is described by an instance of a dataclass, not by {spec!r:.80}")
    seed = getattr(spec, "seed", None)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"the description of a run needs an integer field `seed`: {spec!r:.200}")
    return plain(dataclasses.asdict(spec))


def _distinctive(specs: Mapping[str, Any]) -> dict[str, str]:
    """Of each run the fields that are not the same in all runs; of an only run all fields."""
    configs = {key: _config(spec) for key, spec in specs.items()}
    first = next(iter(configs.values()), {})
    same = {name for name in first if all(config.get(name) == first[name] for config in configs.values())}
    hidden = same if len(configs) > 1 else set()
    return {
        key: ", ".join(f"{name}={value!r}" for name, value in config.items() if name not in hidden)
        for key, config in configs.items()
    }


def _warn_of_failures(rows: Sequence[Row], earlier: int) -> None:
    failed = [row for row in rows if row["status"] == "failed"]
    if not failed:
        return
    old = f", {earlier} of them earlier (retry_failed=True tries those again)" if earlier else ""
    first = f"{failed[0]['key']}: {failed[0]['error']}"
    warnings.warn(f"{len(failed)} of {len(rows)} runs failed{old}; the first, {first}", stacklevel=3)
