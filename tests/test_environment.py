"""environment.yml, pyproject.toml, constraints.txt and the Makefile say the same thing."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
PIP = next(entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_environment_installs_this_project_and_names_no_dependency_of_its_own():
    conda = [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]
    assert [re.split("[=<>]", entry)[0] for entry in conda] == ["python", "pip"]
    assert [line for line in PIP if not line.startswith("-")] == []
    assert "-e .[dev]" in PIP and "-c constraints.txt" in PIP


def test_environment_python_is_allowed():
    python = next(entry for entry in ENVIRONMENT["dependencies"] if str(entry).startswith("python="))
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["requires-python"])


def test_every_dependency_is_pinned_within_its_range():
    pins = {canonical(name): version for name, version in CONSTRAINTS.items()}
    for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        requirement = Requirement(line)
        assert pins[canonical(requirement.name)] in requirement.specifier, line


def test_torch_is_pinned_and_the_code_takes_older():
    assert CONSTRAINTS["torch"] == "2.13.0"
    assert "2.11" in next(Requirement(line) for line in PROJECT["dependencies"] if line.startswith("torch")).specifier


def test_makefile_and_environment_use_the_same_torch_index():
    index = next(line for line in PIP if line.startswith("--extra-index-url"))
    assert index in (ROOT / "Makefile").read_text()
