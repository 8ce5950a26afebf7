"""bench/gpu_sanitize.py with a program in the sanitizer's place: what counts as clean, and what as nothing checked."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu_sanitize.py"


@pytest.fixture
def sanitize(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("gpu_sanitize", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_sanitize.py", "--tools", "memcheck", "--logs", str(tmp_path)])
    return module


def says(tmp_path, monkeypatch, text):
    """Put a compute-sanitizer that prints `text` first on the PATH."""
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nprintf '{text}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


@pytest.mark.parametrize("errors", [0, 3])
def test_errors_are_counted_and_stored(sanitize, tmp_path, monkeypatch, errors):
    says(tmp_path, monkeypatch, f"5 passed in 1s\\n========= ERROR SUMMARY: {errors} errors\\n")
    assert sanitize.main() == (1 if errors else 0)
    (row,) = (tmp_path / "outputs" / "results" / "bench.smoke.jsonl").read_text().splitlines()
    assert json.loads(row)["metrics"] == {"errors": errors, "tests": 5}


@pytest.mark.parametrize("text", [
    "5 passed in 1s\\n", "========= ERROR SUMMARY: 0 errors\\n", "No device\\n",
    "1 failed, 5 passed in 1s\\n========= ERROR SUMMARY: 0 errors\\n",
    "5 passed, 1 error in 1s\\n========= ERROR SUMMARY: 0 errors\\n"])
def test_nothing_checked_is_no_success(sanitize, tmp_path, monkeypatch, capsys, text):
    says(tmp_path, monkeypatch, text)
    assert sanitize.main() == 1
    assert "no summary" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_errors_of_racecheck_are_errors(sanitize):
    log = "7 passed in 1s\n========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
    assert sanitize.read(log) == {"errors": 1, "tests": 7}
