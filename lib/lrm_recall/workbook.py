"""The command line: `lrm-recall run`, `list`, `check`, `sweep`, `results`, `data`, `evaluate`.

    lrm-recall run                                      every notebook at the profile smoke
    lrm-recall run 01_synthetic --profile laptop        one notebook at another scale
    lrm-recall run 01_synthetic -p seeds='[0, 1]'       one parameter changed; values are YAML
    lrm-recall list                                     notebooks, their parameters and profiles
    lrm-recall check                                    pairs, stripped outputs, parameter files
    lrm-recall sweep synthetic --profile paper          the runs of a notebook alone, see lrm_recall.sweep_command
    lrm-recall results merge FILE...                    rows of several machines into one file
    lrm-recall data prepare wikitext103                 corpora of real text, see lrm_recall.data.command
    lrm-recall evaluate --model_args pretrained=DIR ... scores by lm-evaluation-harness, see lrm_recall.evaluate.harness

Everything given is checked before anything runs. Exit code 0: done, and what the notebooks promise is there;
1: a notebook failed, or `check` found something; 2: a mistake in what was asked, nothing has been done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat

from lrm_recall.data.command import add_parser as add_data_parser
from lrm_recall.notebooks import title, unpaired, unstripped
from lrm_recall.options import did_you_mean
from lrm_recall.parameters import (
    RUNNER,
    Parameter,
    ParameterError,
    check_folder,
    check_values,
    declared_parameters,
    read_assignments,
    read_yaml,
)
from lrm_recall.results_command import add_parser as add_results_parser
from lrm_recall.sweep_command import add_parser as add_sweep_parser

if TYPE_CHECKING:
    from lrm_recall.runner import Job

# Seconds that one cell may take: finite everywhere, and short where somebody waits.
CELL_TIMEOUT_S = {"smoke": 600, "laptop": 2 * 3600}
OTHER_CELL_TIMEOUT_S = 24 * 3600


class UsageError(ValueError):
    """A request that cannot be carried out; one line for each problem."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["evaluate"]:  # all that follows is the harness's own
        from lrm_recall.evaluate.harness import main as evaluate

        return evaluate(words[1:])
    options = _parser().parse_args(words)
    try:
        return options.command(Workbook(_find_root(Path.cwd())), options)
    except (UsageError, ParameterError) as error:
        for line in str(error).splitlines():
            print(f"lrm-recall: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lrm-recall: interrupted; the rows stored so far are kept", file=sys.stderr)
        return 130


class Workbook:
    """The notebooks and parameter files under one folder."""

    def __init__(self, root: Path):
        self.root = root

    @property
    def notebooks(self) -> list[str]:
        """Names of all notebooks, in their order."""
        return sorted(path.stem for path in (self.root / "notebooks").glob("*.ipynb"))

    @property
    def profiles(self) -> list[str]:
        """Names of all profiles."""
        return sorted(path.name for path in (self.root / "params").iterdir() if path.is_dir())

    def source(self, name: str) -> Path:
        return self.root / "notebooks" / f"{name}.ipynb"

    def read(self, name: str) -> nbformat.NotebookNode:
        try:
            return nbformat.read(self.source(name), as_version=4)
        except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError):
            raise UsageError(f"notebooks/{name}.ipynb is not a Jupyter notebook") from None

    def notebooks_of(self, profile: str) -> list[str]:
        """The notebooks that a profile has a parameter file for."""
        return [name for name in self.notebooks if self._file(name, profile).is_file()]

    def profiles_of(self, name: str) -> list[str]:
        """The profiles with a parameter file for a notebook."""
        return [profile for profile in self.profiles if self._file(name, profile).is_file()]

    def values(self, name: str, profile: str, declared: Mapping[str, Parameter]) -> dict[str, Any]:
        """What the profile's parameter file sets, checked. A profile need not have one for every notebook."""
        path = self._file(name, profile)
        shown = _shown(path, self.root)
        if not path.is_file():
            raise ParameterError([f"{shown} does not exist; an empty file keeps the notebook's own values"])
        return check_values(read_yaml(path, shown), declared, shown)

    def parameters(self, name: str, profile: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every parameter of a notebook: its own values, over them the profile's, over them those `given` with -p.

        Raises:
            UsageError, ParameterError: no such profile or parameter, or a value of another type.
        """
        _known("profile", profile, self.profiles)
        declared = declared_parameters(self.read(name), name)
        own = {parameter.name: parameter.default for parameter in declared.values()}
        return own | self.values(name, profile, declared) | check_values(given, declared, f"{name}: -p")

    def _file(self, name: str, profile: str) -> Path:
        return self.root / "params" / profile / f"{name}.yaml"


def _run(workbook: Workbook, options: argparse.Namespace) -> int:
    from lrm_recall.runner import NotebookFailed, run_job

    failures = 0
    for job in _jobs(workbook, options):
        try:
            print(_shown(run_job(job), workbook.root))
        except NotebookFailed as error:
            failures += 1
            print(f"lrm-recall: {error}", file=sys.stderr)
    return 1 if failures else 0


def _jobs(workbook: Workbook, options: argparse.Namespace) -> list[Job]:
    """What to run, everything checked.

    Raises:
        UsageError, ParameterError: for the first notebook that cannot be run as asked.
    """
    from lrm_recall.runner import Job, kernel_problem

    _known("profile", options.profile, workbook.profiles)
    if not workbook.notebooks:
        raise UsageError(f"there are no notebooks in {workbook.root / 'notebooks'}")
    asked = [_notebook_name(word, workbook) for word in options.notebooks]
    names = asked or workbook.notebooks_of(options.profile) or workbook.notebooks  # of which the first has no file
    output_dir = (options.output or workbook.root / "outputs" / options.profile).resolve()
    results_dir = (options.results or workbook.root / "outputs" / "results").resolve()
    for option, folder in (("--output", output_dir), ("--results", results_dir)):
        check_folder(folder, option)
    from_runner = {
        "profile": options.profile,
        "results_dir": _shown(results_dir, workbook.root),
        "output_dir": _shown(output_dir, workbook.root),
        "fresh": options.fresh,
    }
    given = read_assignments(options.parameters)
    jobs = []
    for name in dict.fromkeys(names):
        notebook = workbook.read(name)
        if problem := kernel_problem(notebook):
            raise UsageError(f"{name}: {problem}")
        declared = declared_parameters(notebook, name)
        if options.fresh and "fresh" not in declared:
            raise UsageError(f"{name}: --fresh needs a notebook that declares the parameter fresh")
        values = workbook.values(name, options.profile, declared)
        values |= check_values(given, declared, f"{name}: -p")
        values |= {key: value for key, value in from_runner.items() if key in declared}
        timeout = options.timeout or CELL_TIMEOUT_S.get(options.profile, OTHER_CELL_TIMEOUT_S)
        jobs.append(Job(workbook.source(name), values, output_dir, workbook.root, timeout, options.fresh))
    return jobs


def _list(workbook: Workbook, options: argparse.Namespace) -> int:
    for name in workbook.notebooks:
        notebook = workbook.read(name)
        print(f"{name}  {title(notebook)}  [{', '.join(workbook.profiles_of(name))}]")
        for parameter in declared_parameters(notebook, name).values():
            if parameter.name not in RUNNER:
                print(f"    {parameter}")
    return 0


def _check(workbook: Workbook, options: argparse.Namespace) -> int:
    problems = list(_problems(workbook))
    for problem in problems:
        print(f"lrm-recall: {problem}", file=sys.stderr)
    if not problems:
        print(f"{len(workbook.notebooks)} notebooks, {len(workbook.profiles)} profiles: all in order")
    return 1 if problems else 0


def _problems(workbook: Workbook) -> Iterator[str]:
    """All that `check` finds, a line each."""
    yield from unpaired(workbook.root / "notebooks")
    for name in workbook.notebooks:
        try:
            notebook = workbook.read(name)
            yield from unstripped(notebook, name)
            declared = declared_parameters(notebook, name)
        except (UsageError, ParameterError) as error:
            yield from str(error).splitlines()
            continue
        for profile in workbook.profiles_of(name):
            try:
                workbook.values(name, profile, declared)
            except ParameterError as error:
                yield from error.problems
    for profile in workbook.profiles:
        if not workbook.notebooks_of(profile):
            yield f"params/{profile} has no parameter file of any notebook; an empty file keeps a notebook's own values"
    for path in sorted((workbook.root / "params").glob("*/*")):
        if path.suffix != ".yaml" or path.stem not in workbook.notebooks:
            yield f"{_shown(path, workbook.root)} belongs to no notebook"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrm-recall", description="Run the notebooks of the workbook.")
    commands = parser.add_subparsers(required=True, metavar="command")
    run = commands.add_parser("run", help="execute notebooks and prove that their results are there")
    run.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="such as 01_synthetic; default: all")
    run.add_argument("--profile", default="smoke", help="folder of params/ with the values (default: smoke)")
    run.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE",
                     help="set one parameter")  # fmt: skip
    run.add_argument("--fresh", action="store_true", help="do stored runs again")
    run.add_argument("--results", type=Path, metavar="DIR", help="rows (default: outputs/results)")
    run.add_argument("--output", type=Path, metavar="DIR", help="notebooks (default: outputs/PROFILE)")
    run.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="longest time for one cell")
    run.set_defaults(command=_run)
    show = commands.add_parser("list", help="notebooks with their parameters and profiles")
    show.set_defaults(command=_list)
    check = commands.add_parser("check", help="notebooks paired and stripped, parameter files valid")
    check.set_defaults(command=_check)
    add_sweep_parser(commands)
    add_results_parser(commands)
    add_data_parser(commands)
    commands.add_parser("evaluate", help="a model's scores by lm-evaluation-harness (docs/evaluation.md)")
    return parser


def _seconds(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of seconds above 0")
    return int(text)


def _find_root(start: Path) -> Path:
    """The folder with notebooks/ and params/: `start`, the nearest above it, or the checkout of this file."""
    for folder in (start, *start.parents, Path(__file__).resolve().parents[2]):
        if (folder / "notebooks").is_dir() and (folder / "params").is_dir():
            return folder
    raise UsageError(f"neither {start} nor a folder above it has notebooks/ and params/")


def _notebook_name(word: str, workbook: Workbook) -> str:
    """A notebook's name from `01_synthetic`, `01_synthetic.ipynb` or `notebooks/01_synthetic.ipynb`."""
    name = word.removesuffix(".ipynb").removesuffix(".py").removeprefix("notebooks/")
    _known("notebook", name, workbook.notebooks)
    return name


def _known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UsageError(f"unknown {what} {name!r}{did_you_mean(name, known)}; there are: {', '.join(known)}")


def _shown(path: Path, root: Path) -> str:
    """A path relative to `root` where it lies there: executed notebooks are committed."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


if __name__ == "__main__":
    raise SystemExit(main())
