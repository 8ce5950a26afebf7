"""Sweeps: of all the runs asked for, do those that are not stored yet, and store each the moment it ends.

A run is described by a frozen dataclass (its fields are the row's config; it has a `seed`) and done by an
importable function that takes it and returns {"metrics": {...}} and, if it likes, "history", "runtime_s" and
"peak_memory_mb". A run that raises, returns NaN or loses its process is stored as failed, with the reason,
and stops none of the others; it is tried again only on request. Sweeps may share a store: each run is done by one
of them, and its row serves all.

    data = {"source": "generated", "revision": "1"}
    experiment = Experiment("mqar", run_mqar, data, modules=code_modules)
    print(plan_sweep(specs, experiment, store))  # lists what is missing; nothing is run
    rows = run_sweep(specs, experiment, store, profile="smoke", workers=2)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lrm_recall.claims import Claims
from lrm_recall.code_hash import code_hash
from lrm_recall.execution import Outcome, Run, SchedulerLost, dask_client, execute_here, execute_on
from lrm_recall.progress import SweepProgress, duration
from lrm_recall.results import ResultStore
from lrm_recall.rows import Row, make_row, not_finite, plain, run_key

if TYPE_CHECKING:
    from distributed import Client

_RESULT = ("metrics", "history", "runtime_s", "peak_memory_mb")
_PATIENCE_S = 0.5  # between two looks at what other sweeps are doing


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


class Turns(Protocol):
    """Decides during a sweep which of its missing runs are done when."""

    def __call__(self, key: str) -> bool | None:
        """Whether the run may be done now; None if it need not be done at all."""

    def rank(self, key: str) -> int:
        """Where time is short: of which importance the run is, 0 for what is done first."""

    def note(self, row: Row) -> None:
        """Take notice of the row of a run that has ended, here or in another sweep."""


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

    def only(self, keys: Collection[str]) -> Plan:
        """The plan of these runs alone."""
        held = frozenset(keys)

        def part(values: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in values.items() if key in held}

        return dataclasses.replace(
            self, specs=part(self.specs), codes=part(self.codes), failed=part(self.failed),
            stored=[key for key in self.stored if key in held], missing=[key for key in self.missing if key in held],
            cost=None if self.cost is None else part(self.cost),
        )  # fmt: skip

    def __str__(self) -> str:
        parts = [f"{len(self.stored)} stored", f"{len(self.missing)} to do"]
        if self.failed:
            parts.append(f"{len(self.failed)} failed earlier")
        if self.missing and self.cost is not None:
            parts.append(f"about {duration(sum(self.cost.values()))} of work")
        shown = _distinctive(self.specs)
        lines = [f"{self.experiment}: {len(self.specs)} runs, {', '.join(parts)}"]
        hints = self.cost or {}
        lines += [f"  to do   {key}  {f'{duration(hints[key])}, ' if key in hints else ''}{shown[key]}"
                  for key in self.missing]
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


def deadline_after(budget: float | None) -> float | None:
    """The `deadline` of a sweep that may take `budget` seconds from now; None sets none.

    Raises:
        ValueError: a negative budget.
    """
    if budget is not None and budget < 0:
        raise ValueError(f"budget must be at least 0, got {budget}")
    return None if budget is None else time.monotonic() + budget


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
    deadline: float | None = None,
    on_row: Callable[[Row], None] | None = None,
    turns: Turns | None = None,
) -> list[Row]:
    """Do the missing runs; return the row of every run asked for, in the order of `specs`, duplicates once.

    Rows of failed runs are among them (`row["status"]`), and one warning sums them up. A run that another sweep on this
    store has in hand is left to it, and waited for.

    Args:
        workers: 1 runs here, in this process; more starts that many processes of one thread each; an address
            ("tcp://127.0.0.1:8786") hands the runs to the Dask cluster there. A script that asks for
            processes needs the usual `if __name__ == "__main__":`; a notebook does not.
        retry_failed, fresh: as in `plan_sweep`.
        deadline: a time of `time.monotonic()` after which no run is started, nor before it one that would end later,
            at the pace of those of its size that have ended; the cheapest go first, in the ranks that `turns` gives.
            Those under way are finished, and those not started have no row in what is returned.
        on_row: called with each new row, once it is on disk.
        turns: which runs may be done when; a run that need not be done has no row in what is returned. None for all
            at once.

    Raises:
        ValueError: as `plan_sweep`, or for `workers` below 1.
        ConnectionError: when no Dask scheduler answers at the address.
        StoreError: when the store's file is corrupt. In each of these cases nothing is run.
        SchedulerLost: when the Dask scheduler goes away during the sweep. The runs that it had in hand stay missing.
        OSError: when a row cannot be written. Those written before stay.
    """
    if isinstance(workers, int) and workers < 1:
        raise ValueError(f"workers is {workers}; it must be 1 or more, or the address of a Dask scheduler")
    before = _latest(store)  # ahead of the plan: a row that lands between the two is in neither, and not done again
    plan = plan_sweep(specs, experiment, store, retry_failed=retry_failed, fresh=fresh)
    store.repair()
    new: dict[str, Row] = {}
    if plan.missing:
        queue = _Queue(plan, store, before, _order(plan, workers, deadline, turns), deadline, turns)
        with contextlib.closing(queue), contextlib.closing(_do(queue, experiment, profile, workers, progress)) as rows:
            for row in rows:
                store.append(row)
                queue.stored(row)
                if on_row is not None:
                    on_row(row)
        new = queue.rows
    latest = _latest(store) | new
    asked = [latest[key] for key in plan.specs if key in latest]
    _warn_of_failures(asked, len(plan.failed))
    return asked


def shard_of(groups: Mapping[Any, float], index: int, count: int) -> set[Any]:
    """The groups of one of `count` machines that share nothing, so that all have about as much to do.

    The same on every machine that asks with the same groups: the most expensive group goes first, each to whoever has
    least so far.

    Args:
        groups: expected seconds of each group of runs that should stay together.
        index: which machine, from 0.

    Raises:
        ValueError: index is not from 0 to count - 1.
    """
    if not 0 <= index < count:
        raise ValueError(f"there are shards 0 to {count - 1}, not {index}")
    load = [0.0] * count
    mine = set()
    for group, seconds in sorted(groups.items(), key=lambda item: -item[1]):
        least = load.index(min(load))
        load[least] += seconds
        if least == index:
            mine.add(group)
    return mine


class _Queue:
    """The missing runs of a plan, handed out one by one: each in its turn, not those that another sweep has, and none
    that would end after the deadline.

    To an executor it is what a mapping from keys to descriptions would be, through `items` alone, which may be called
    again: it gives what can be done now and has not been given.

    Attributes:
        order: keys of the missing runs, the first to do first.
        waiting: keys not handed out yet.
        stuck: whether the last look found that none of them can be done, nor is in another sweep's hands: there is no
            time for them, or they wait for runs that there is no time for.
        rows: the row of each run that has ended since the plan, here or in another sweep.
    """

    def __init__(self, plan: Plan, store: ResultStore, before: Mapping[str, Row], order: list[str],
                 deadline: float | None, turns: Turns | None):  # fmt: skip
        self.plan, self.order, self.waiting = plan, order, list(order)
        self.rows: dict[str, Row] = {}
        self.stuck = False
        self._store, self._before, self._deadline, self._turns = store, before, deadline, turns
        self._claims = Claims(store.path)
        self._news: list[Row] = []
        self._unneeded: list[str] = []
        self._costs = plan.cost or dict.fromkeys(plan.missing, 1.0)
        self._took: list[tuple[float, float]] = []  # cost and seconds of the runs that have ended well

    def items(self) -> Iterator[tuple[str, Any]]:
        """Key and description of every run that can be done now, claimed the moment it is asked for."""
        while (key := self._next()) is not None:
            yield key, self.plan.specs[key]

    def _next(self) -> str | None:
        """The first run that can be done now, claimed; None where there is none."""
        place, elsewhere = 0, False
        while place < len(self.waiting):
            key = self.waiting[place]
            if not self._in_time(key):
                place += 1
                continue
            turn = True if self._turns is None else self._turns(key)
            if turn is None:
                self._unneeded.append(self.waiting.pop(place))
                continue
            if not turn or not self._claims.take(key):
                elsewhere |= turn
                place += 1
                continue
            self.waiting.pop(place)
            row = _latest(self._store).get(key)
            if row == self._before.get(key):
                return key
            self.stored(row)
            self._news.append(row)
            place = 0  # it may be another's turn now
        self.stuck = not elsewhere
        return None

    def _in_time(self, key: str) -> bool:
        """Whether the run, begun now, would end before the deadline, if it takes as long for its cost as those of half
        its cost and more have taken in the median: small ones spend their time on what all have to do. One alone, which
        may have compiled for all others, says nothing."""
        if self._deadline is None:
            return True
        cost = self._costs[key]
        paces = [seconds / each for each, seconds in self._took if 2 * each >= cost > 0]
        expected = cost * statistics.median(paces) if len(paces) > 1 else 0.0
        return time.monotonic() + expected < self._deadline

    def stored(self, row: Row) -> None:
        """Note that `row` is in the store."""
        self.rows[row["key"]] = row
        if row["status"] == "ok":
            self._took.append((self._costs[row["key"]], row["runtime_s"]))
        if self._turns is not None:
            self._turns.note(row)
        self._claims.release(row["key"])

    def news(self) -> list[Row]:
        """Rows of other sweeps that have been found since the last call."""
        news, self._news = self._news, []
        return news

    def unneeded(self) -> list[str]:
        """Runs that have turned out not to be needed since the last call."""
        keys, self._unneeded = self._unneeded, []
        return keys

    def close(self) -> None:
        """Leave to other sweeps what has not been done."""
        self._claims.close()


def _latest(store: ResultStore) -> dict[str, Row]:
    """The row that counts of each key, failed ones included."""
    return {row["key"]: row for row in [*store.failures(), *store.rows()]}


def _order(plan: Plan, workers: int | str, deadline: float | None, turns: Turns | None) -> list[str]:
    """Keys of the missing runs, the first to do first."""
    cost = plan.cost or dict.fromkeys(plan.missing, 0.0)
    if deadline is not None:  # short of time: the most rows that it has room for, of those that count most
        return sorted(plan.missing, key=lambda key: (0 if turns is None else turns.rank(key), cost[key]))
    if workers == 1:
        return plan.missing
    return sorted(plan.missing, key=lambda key: -cost[key])  # longest first: none is left to one worker at the end


def _do(queue: _Queue, experiment: Experiment, profile: str, workers: int | str, show: bool) -> Iterator[Row]:
    """Do the runs of `queue`; yield the row of each as it ends."""
    plan = queue.plan
    if isinstance(workers, int):
        workers = min(workers, len(queue.order))
    with contextlib.ExitStack() as stack:
        if workers == 1:
            at_a_time, execute = 1, execute_here
        else:
            client = stack.enter_context(dask_client(workers))
            at_a_time, execute = sum(client.nthreads().values()), functools.partial(_execute_connected, client)
        bar = stack.enter_context(SweepProgress(experiment.name, queue.order, plan.cost, at_a_time, show))
        while queue.waiting:
            for key, outcome in execute(experiment.run, queue):
                row = _row(experiment, plan.specs[key], plan.codes[key], profile, outcome)
                bar.finished(key, row["runtime_s"], failed=row["status"] == "failed")
                yield row
                bar.unneeded(queue.unneeded())
            for row in queue.news():
                bar.finished(row["key"], row["runtime_s"], failed=row["status"] == "failed")
            if queue.stuck:
                return
            if queue.waiting:
                time.sleep(_PATIENCE_S)


def _execute_connected(client: Client, run: Run, queue: _Queue) -> Iterator[tuple[str, Outcome]]:
    """`execute_on`, whatever Dask says when it finds its scheduler gone turned into SchedulerLost."""
    try:
        yield from execute_on(client, run, queue)
    except OSError as error:
        if error.errno is not None:  # of a file: those of Dask's connections have no number
            raise
        raise SchedulerLost("the connection to the Dask scheduler broke; start again to do what is missing") from error


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
    """Of each run the fields, nested ones by their path, that differ between runs; of an only run all of them."""
    configs = {key: _flat(_config(spec) | _variant(spec)) for key, spec in specs.items()}
    seen: dict[str, set[str]] = {}
    for config in configs.values():
        for name, value in config.items():
            seen.setdefault(name, set()).add(repr(value))
    hidden = {name for name, values in seen.items() if len(values) == 1} if len(configs) > 1 else set()
    return {
        key: ", ".join(f"{name}={value!r}" for name, value in config.items() if name not in hidden)
        for key, config in configs.items()
    }


def _variant(spec: Any) -> dict[str, str]:
    return {"variant": spec.variant} if hasattr(spec, "variant") else {}


def _flat(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested fields by their path: resona.top_k."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {path + name: value}
    return flat


def _warn_of_failures(rows: Sequence[Row], earlier: int) -> None:
    failed = [row for row in rows if row["status"] == "failed"]
    if not failed:
        return
    old = f", {earlier} of them earlier (retry_failed=True tries those again)" if earlier else ""
    first = f"{failed[0]['key']}: {failed[0]['error']}"
    warnings.warn(f"{len(failed)} of {len(rows)} runs failed{old}; the first, {first}", stacklevel=3)
