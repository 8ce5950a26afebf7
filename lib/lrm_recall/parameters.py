"""The parameters of a notebook: what its `parameters` cell declares, and whether given values fit.

The cell holds annotated assignments alone, each with a comment that says what it is for:

    learning_rates: list[float] = [1.0e-3, 3.0e-3]  # tried for every model; the best by validation counts

Values come from params/<profile>/<notebook>.yaml and from the command line. papermill would warn of an
unknown name and hand on text where a number is wanted; here each mistake is one clear line, before anything
runs.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from lrm_recall.options import did_you_mean

TYPES = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "dict": dict}
RUNNER = {  # parameters that the runner sets in every notebook that declares them
    "profile": str,
    "results_dir": str,
    "output_dir": str,
    "fresh": bool,
}


_NUMBER = r"([-+]?)(?=[.\d])(\d*)\.?(\d*)(?:[eE]([-+]?)(\d+))?"


class ParameterError(ValueError):
    """Parameters that cannot be used: one line for each problem."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def check_folder(path: Path, option: str) -> None:
    """Refuse a folder for results that cannot be one, before there are results to lose.

    Raises:
        ParameterError: `path`, or the nearest thing above it that exists, is a file.
    """
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ParameterError([f"{option} {path}: {there} is a file, not a folder"])


@dataclass(frozen=True)
class Parameter:
    """One declared parameter: its name, type, default value and comment."""

    name: str
    annotation: str
    default: Any
    comment: str

    def __str__(self) -> str:
        return f"{self.name}: {self.annotation} = {self.default!r}  # {self.comment}"

    def problem(self, value: Any) -> str | None:
        """What keeps `value` from being this parameter; None when it fits."""
        try:
            self.read(value)
        except ValidationError as error:
            for part in error.errors():
                if part["type"] in ("float_type", "int_type") and (number := _as_yaml_number(part["input"])):
                    place = "".join(f"[{step}]" for step in part["loc"] if isinstance(step, int))
                    return f"{self.name}{place}: YAML reads {part['input']} as text; write {number}"
            return f"{self.name} must be {self.annotation}, not {value!r:.60} ({type(value).__name__})"
        return None

    def read(self, value: Any) -> Any:
        """`value` as the declared type: exactly that type, but a whole number does for a float.

        Raises:
            pydantic.ValidationError: when it is of another type.
        """
        config = ConfigDict(strict=True, allow_inf_nan=False)
        return TypeAdapter(_type_of(self.annotation), config=config).validate_python(value)


def declared_parameters(notebook: Mapping[str, Any], name: str) -> dict[str, Parameter]:
    """The parameters that a notebook declares, by name, in their order.

    Args:
        notebook: the notebook in nbformat 4.
        name: how errors call it.

    Raises:
        ParameterError: unless exactly one cell is tagged `parameters` and holds annotated assignments alone,
            with literal values of the annotated types.
    """
    cells = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise ParameterError([f"{name}: {len(cells)} cells are tagged 'parameters'; there must be one"])
    source = cells[0]["source"]
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError([f"{name}: the parameters cell is not Python: line {error.lineno}"]) from None
    comments = _comments(source)
    declared: dict[str, Parameter] = {}
    problems = []
    for statement in statements:
        parameter = _parameter(statement, comments.get(statement.end_lineno or 0, ""))
        if isinstance(parameter, str):
            problems.append(f"{name}: the parameters cell, line {statement.lineno}: {parameter}")
        elif parameter.name in declared:
            problems.append(f"{name}: the parameters cell declares {parameter.name} twice")
        else:
            declared[parameter.name] = parameter
    if problems:
        raise ParameterError(problems)
    return declared


def check_values(values: Mapping[str, Any], declared: Mapping[str, Parameter], where: str) -> dict[str, Any]:
    """`values` as the declared types.

    Raises:
        ParameterError: for a name that is not declared or that only the runner sets, or a value of another
            type; each line begins with `where`.
    """
    problems, read = [], {}
    open_to_all = [name for name in declared if name not in RUNNER]
    for name, value in values.items():
        if name in RUNNER:
            problems.append(f"{where}: {name} is set by the command line, not as a parameter")
        elif name not in declared:
            hint = did_you_mean(str(name), open_to_all)
            problems.append(f"{where}: unknown parameter {name!r}{hint}; allowed: {', '.join(open_to_all)}")
        elif problem := declared[name].problem(value):
            problems.append(f"{where}: {problem}")
        else:
            read[name] = declared[name].read(value)
    if problems:
        raise ParameterError(problems)
    return read


def read_yaml(path: Path, shown: str) -> dict[str, Any]:
    """A parameter file: names and values; an empty file has none. Errors call it `shown`.

    Raises:
        ParameterError: when it is not YAML, not a mapping, or gives a name twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ParameterError([f"{shown}: line {line}: {error.problem}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError([f"{shown}: not YAML: {' '.join(str(error).split())}"]) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ParameterError([f"{shown}: holds a {type(values).__name__}, not names with values"])
    return values


def read_assignments(words: Sequence[str]) -> dict[str, Any]:
    """The values of `-p name=value`, read as YAML like those of a parameter file.

    Raises:
        ParameterError: when a word is not name=value, or its value not YAML.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ParameterError([f"-p {word}: must be name=value"])
        try:
            values[name] = yaml.load(text, Loader=_UniqueKeys)
        except yaml.YAMLError as error:
            raise ParameterError([f"-p {word}: not YAML: {' '.join(str(error).split())}"]) from None
    return values


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a name given twice is an error: SafeLoader would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                problem = f"{key} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(str(key))
        return super().construct_mapping(node, deep)


def _parameter(statement: ast.stmt, comment: str) -> Parameter | str:
    """The parameter that a statement of the cell declares, or what is wrong with it."""
    if not (
        isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value
    ):
        return "only `name: type = value  # comment` is allowed here"
    name, annotation = statement.target.id, ast.unparse(statement.annotation)
    try:
        parameter = Parameter(name, annotation, ast.literal_eval(statement.value), comment)
    except ValueError:
        return f"the value of {name} must be written out, not computed"
    try:
        kind = _type_of(annotation)
    except (NameError, TypeError, SyntaxError):
        return f"the type of {name} must be made of {', '.join(TYPES)} and None, not {annotation}"
    if name in RUNNER and kind is not RUNNER[name]:
        return f"{name} is set by the runner and must be {RUNNER[name].__name__}, not {annotation}"
    if not comment:
        return f"{name} needs a comment that says what it is for"
    return parameter.problem(parameter.default) or parameter


def _type_of(annotation: str) -> Any:
    return eval(annotation, {"__builtins__": {}}, TYPES)  # no names but these, in a cell that will run anyway


def _comments(source: str) -> dict[int, str]:
    """Comment at the end of each line, by line number."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def _as_yaml_number(value: Any) -> str | None:
    """How YAML 1.1 wants the number that a text means ("1e-3" -> "1.0e-3"); None when it means none."""
    match = re.fullmatch(_NUMBER, value) if isinstance(value, str) else None
    if match is None:
        return None
    sign, whole, fraction, exponent_sign, exponent = match.groups()
    number = f"{sign}{whole or 0}" + (f".{fraction or 0}" if exponent or "." in value else "")
    return f"{number}e{exponent_sign or '+'}{exponent}" if exponent else number
