"""One row of results: what it holds, what names it, and what makes it valid.

A row is a plain dict, so that it reads the same from Python, pandas, `jq` or a diff:

    key, experiment, config, seed, data {source, revision}, code, profile,
    status "ok" | "failed", error, metrics, history, runtime_s, peak_memory_mb, machine, created

The key is a hash of everything that decides the result (experiment, config, seed, data revision, code) and of
nothing else: the profile that asked for a run, and the machine that did it, do not change what the run is.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

Row = dict[str, Any]

# Field -> the JSON types it may have. The order is the order of the fields in a stored line.
FIELDS: dict[str, tuple[type, ...]] = {
    "key": (str,),
    "experiment": (str,),
    "config": (dict,),
    "seed": (int,),
    "data": (dict,),
    "code": (str,),
    "profile": (str,),
    "status": (str,),
    "error": (str, type(None)),
    "metrics": (dict,),
    "history": (list,),
    "runtime_s": (int, float),
    "peak_memory_mb": (int, float),
    "machine": (dict,),
    "created": (str,),
}
STATUSES = ("ok", "failed")
KEY_LENGTH = 16
_KEY = re.compile(f"[0-9a-f]{{{KEY_LENGTH}}}")


def run_key(experiment: str, config: Mapping[str, Any], seed: int, data_revision: str, code: str) -> str:
    """Name of a run: the first 16 hex digits of sha256 over its canonical JSON.

    Numbers that Python holds equal give the same key (1 and 1.0), tuples are lists, and the order of a dict's
    keys does not matter.

    Raises:
        ValueError: when `config` holds something that JSON cannot, NaN and infinity included.
    """
    content = {"experiment": experiment, "config": config, "seed": seed, "data": data_revision, "code": code}
    text = json.dumps(_canonical(content, ""), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def make_row(
    *,
    experiment: str,
    config: Mapping[str, Any],
    seed: int,
    data: Mapping[str, str],
    code: str,
    profile: str,
    machine: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    history: Sequence[Any] = (),
    error: str | None = None,
    runtime_s: float = 0.0,
    peak_memory_mb: float = 0.0,
) -> Row:
    """Build a valid row; an `error` makes it a failed one. `data` is {"source": ..., "revision": ...}.

    Raises:
        ValueError: when a field has a wrong type, lacks a part, or holds a number that is not finite.
    """
    row = {
        "key": run_key(experiment, config, seed, data.get("revision", ""), code),
        "experiment": experiment,
        "config": plain(config),
        "seed": seed,
        "data": dict(data),
        "code": code,
        "profile": profile,
        "status": "ok" if error is None else "failed",
        "error": error,
        "metrics": plain(metrics or {}),
        "history": plain(history),
        "runtime_s": runtime_s,
        "peak_memory_mb": peak_memory_mb,
        "machine": plain(machine),
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    if problem := row_problem(row):
        raise ValueError(f"not a valid row: {problem}")
    return row


def row_problem(row: object) -> str | None:
    """What is wrong with `row`, in a few words; None when it is a valid row."""
    if not isinstance(row, dict):
        return f"it is a JSON {type(row).__name__}, not an object"
    if missing := [name for name in FIELDS if name not in row]:
        return f"it lacks {', '.join(missing)}"
    if unknown := [str(name) for name in row if name not in FIELDS]:
        return f"it has unknown fields: {', '.join(unknown)}"
    for name, types in FIELDS.items():
        if not isinstance(row[name], types) or (isinstance(row[name], bool) and bool not in types):
            return f"{name} is {row[name]!r:.60}, not {' or '.join(t.__name__ for t in types)}"
    if not _KEY.fullmatch(row["key"]):
        return f"key is {row['key']!r:.60}, not {KEY_LENGTH} hex digits"
    if row["status"] not in STATUSES:
        return f"status is {row['status']!r:.60}, not one of {', '.join(STATUSES)}"
    if (row["status"] == "ok") != (row["error"] is None):
        return f"status is {row['status']} but error is {row['error']!r:.60}"
    if missing := [name for name in ("source", "revision") if not isinstance(row["data"].get(name), str)]:
        return f"data lacks {', '.join(missing)}"
    if bad := next(not_finite(row), None):
        return f"{bad} is not a finite number"
    return None


def not_finite(value: object, path: str = "") -> Iterator[str]:
    """Paths ("metrics.test_loss", "history[3].loss") of every NaN or infinity inside `value`."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from not_finite(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from not_finite(item, f"{path}[{index}]")


def plain(value: Any, path: str = "") -> Any:
    """`value` in the types that JSON gives back: dict with str keys, list, str, int, float, bool, None.

    NumPy and zero-dimensional torch numbers become Python's own; nothing else is converted by guesswork.

    Raises:
        ValueError: for any other type, naming where in `value` it is.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        if bad := [name for name in value if not isinstance(name, str)]:
            raise ValueError(f"{path or 'a row'} has the key {bad[0]!r}; JSON keys are text")
        return {name: plain(item, f"{path}.{name}" if path else name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    raise ValueError(f"{path or 'a row'} holds {value!r:.60} ({type(value).__name__}), which JSON cannot")


def newest(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows by key, the last of each key; a failure never hides an earlier success of the same run."""
    by_key: dict[str, Row] = {}
    for row in rows:
        earlier = by_key.get(row["key"])
        if earlier is None or row["status"] == "ok" or earlier["status"] == "failed":
            by_key.pop(row["key"], None)  # the order is that of the rows that count
            by_key[row["key"]] = row
    return by_key


def _canonical(value: Any, path: str) -> Any:
    """`plain`, with every whole float as an int: 1 == 1.0 must not be two runs, nor 0.0 and -0.0."""
    value = plain(value, path)
    if isinstance(value, dict):
        return {name: _canonical(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item, path) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
