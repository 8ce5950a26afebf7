"""Hash of the code that a run depends on: a stored result is reused exactly as long as its code stands.

What counts: the given modules and everything of our packages that they import, directly or through others,
found by reading the sources and never by importing them. What does not: comments, docstrings and blank lines;
imports that only a type checker sees; modules found by name at run time (the caller names those, for example
"lrm_recall.mixers.gla"); other people's packages. A package's `__init__` counts when something is imported
from the package itself, not when it is only passed on the way to a submodule.

The hash is taken over source text, not over syntax trees, whose printed form differs between Python versions.

Code that was changed without changing results keeps its name: `same_code.json` says which hashes stand for the same
results, and which stored rows were computed again to the last digit to show it (`lrm_recall.same_code`).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import io
import json
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("lrm_recall", "lrm_kernels")
SAME_CODE = Path(__file__).with_name("same_code.json")  # {hash: {"as": an earlier hash, "rows": [keys]}}


def code_hash(modules: Iterable[str], roots: Sequence[Path] | None = None) -> str:
    """The name of the code of `modules` and of all they import from our packages: that of `source_hash`, or the earlier
    one that gives the same results.

    Args:
        modules: full names, such as "lrm_recall.train.synthetic"; "-lrm_recall.checkpoints" leaves that module, or all
            of that package, out, with what only it imports: something that is imported but cannot decide the result.
        roots: folders that hold the packages (`lib`, `kernels`); default: wherever this Python finds them.

    Raises:
        ValueError: when a module, or one that it imports, does not exist.
    """
    digest = source_hash(modules, roots)
    return same_code().get(digest, {"as": digest})["as"]


@functools.cache
def same_code() -> dict[str, dict[str, Any]]:
    """What `same_code.json` holds."""
    return json.loads(SAME_CODE.read_text(encoding="utf-8")) if SAME_CODE.is_file() else {}


def source_hash(modules: Iterable[str], roots: Sequence[Path] | None = None) -> str:
    """First 16 hex digits of sha256 over the code; arguments as for `code_hash`."""
    digest = hashlib.sha256()
    for name, path in sorted(import_closure(modules, roots).items()):
        digest.update(f"\0{name}\0{code_only(_source(path))}".encode())
    return digest.hexdigest()[:16]


def import_closure(modules: Iterable[str], roots: Sequence[Path] | None = None) -> dict[str, Path]:
    """Source file of each of `modules` and of all they import from our packages, by full name."""
    roots = list(roots) if roots is not None else _installed_roots()
    modules = list(modules)
    left_out = tuple(name[1:] for name in modules if name.startswith("-"))
    found: dict[str, Path] = {}
    waiting = [(name, "the list of modules") for name in modules if not name.startswith("-")]
    while waiting:
        name, origin = waiting.pop()
        if name in found or f"{name}.".startswith(tuple(f"{out}." for out in left_out)):
            continue
        path = _find(name, roots)
        if path is None:
            places = ", ".join(map(str, roots))
            raise ValueError(f"there is no module {name!r} (named by {origin}) under {places}")
        found[name] = path
        for imported in _imports(_source(path), name, path.name == "__init__.py", roots):
            waiting.append((imported, name))
    return found


def code_only(source: str) -> str:
    """`source` without comments, docstrings, blank lines and trailing blanks."""
    lines = source.split("\n")
    in_string: set[int] = set()  # rows whose end lies inside a string: their blanks are data
    cuts = list(_docstrings(source, lines))
    opened: list[int] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        row, start = token.start
        if kind == "COMMENT":
            cuts.append((row, start, len(lines[row - 1])))
        elif kind == "STRING":
            in_string.update(range(row, token.end[0]))
        elif kind in ("FSTRING_START", "TSTRING_START"):  # from Python 3.12 and 3.14; one STRING before
            opened.append(row)
        elif kind in ("FSTRING_END", "TSTRING_END"):
            in_string.update(range(opened.pop(), token.end[0]))
    for row, start, end in sorted(cuts, reverse=True):
        lines[row - 1] = lines[row - 1][:start] + lines[row - 1][end:]
        in_string.discard(row)
    kept = (line if row in in_string else line.rstrip() for row, line in enumerate(lines, start=1))
    return "\n".join(line for row, line in enumerate(kept, start=1) if line or row in in_string)


def _docstrings(source: str, lines: list[str]) -> Iterator[tuple[int, int, int]]:
    """(row, first column, end column) of each line of each docstring; columns count characters."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0] if node.body else None
        if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
            continue
        text = first.value
        if not isinstance(text.value, str) or text.end_lineno is None or text.end_col_offset is None:
            continue
        for row in range(text.lineno, text.end_lineno + 1):
            line = lines[row - 1].encode()  # ast counts bytes
            start = len(line[: text.col_offset].decode()) if row == text.lineno else 0
            end = len(line[: text.end_col_offset].decode()) if row == text.end_lineno else len(lines[row - 1])
            yield row, start, end


def _imports(source: str, module: str, is_package: bool, roots: Sequence[Path]) -> Iterator[str]:
    """Full names of the modules of our packages that `source` imports, anywhere in it."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting.extend(node.orelse)
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            source_name = _absolute(node, module, is_package)
            if not _is_ours(source_name):
                continue
            for alias in node.names:
                submodule = f"{source_name}.{alias.name}"
                yield submodule if _find(submodule, roots) else source_name


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """Full name of what follows `from`, the dots of a relative import resolved."""
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, node.module] if node.module else base)


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in PACKAGES


def _find(name: str, roots: Sequence[Path]) -> Path | None:
    if not _is_ours(name):
        return None
    for root in roots:
        path = root.joinpath(*name.split("."))
        for candidate in (path.with_name(path.name + ".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def _installed_roots() -> list[Path]:
    roots = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # of a top-level package: looks, imports nothing
        if spec is not None and spec.submodule_search_locations:
            roots.extend(Path(place).parent for place in spec.submodule_search_locations)
    return roots


def _source(path: Path) -> str:
    with tokenize.open(path) as file:
        return file.read()
