"""Our kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race, no barrier that some threads miss.

Runs the first case of every test in tests/kernels (small odd shapes, forward and backward) under each of the tools,
side by side. PyTorch hands out memory tensor by tensor, without its cache, so that memcheck sees where each one ends.
A row a tool goes to outputs/results/bench.<profile>.jsonl. A few minutes; needs a GPU and the sanitizer of CUDA.

    python bench/gpu_sanitize.py --profile h100
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "synccheck")
CODE = [f"lrm_kernels.{path.stem}" for path in sorted((ROOT / "kernels" / "lrm_kernels").glob("[a-z]*.py"))]
_FOUND = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error)")
_PASSED, _FAILED = re.compile(r"(\d+) passed"), re.compile(r"\d+ (?:failed|errors? in)")


class FirstCases:
    """A pytest plugin: of every test function of a kernel the first case; none of those that draw their shapes."""

    def pytest_collection_modifyitems(self, items: list) -> None:
        first = {}
        for item in items:
            if item.get_closest_marker("hypothesis") is None and item.path.stem != "test_autotune":
                first.setdefault((item.path, item.originalname), item)
        items[:] = first.values()


def run_tests(chosen: str) -> int:
    """Run the cases in this process; what `main` starts under the sanitizer."""
    import pytest

    options = ["-o", "addopts=", "-q", "-x", "-p", "no:cacheprovider", str(ROOT / "tests" / "kernels")]
    return pytest.main([*options, *(["-k", chosen] if chosen else [])], plugins=[FirstCases()])


def start(tool: str, sanitizer: str, log: Path, chosen: str) -> subprocess.Popen:
    """The tests under one tool, in a process of its own; what it prints goes to `log`."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sanitizer, "--tool", tool, "--target-processes", "all", "--print-limit", "20",
               sys.executable, str(Path(__file__).resolve()), "--inside", "--tests", chosen]  # fmt: skip
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)


def read(log: str) -> dict[str, int]:
    """Errors that the tool found, and tests that passed under it.

    Raises:
        ValueError: it has no summary, or not every test has passed: too little was checked.
    """
    summaries, passed = _FOUND.findall(log), _PASSED.search(log)
    if not summaries or passed is None or _FAILED.search(log):
        raise ValueError(f"no summary of the sanitizer, or tests that did not pass; the end of both:\n{log[-2000:]}")
    return {"errors": sum(int(a or b) for a, b in summaries), "tests": int(passed[1])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--tests", default="", metavar="EXPRESSION", help="only these, as pytest -k takes them")
    parser.add_argument("--logs", type=Path, default=ROOT / "build", help="folder for what the tools print")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        return run_tests(arguments.tests)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        parser.error("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")

    from lrm_recall.code_hash import code_hash
    from lrm_recall.provenance import machine
    from lrm_recall.results import ResultStore, make_row, profile_path

    store = ResultStore(profile_path(ROOT / "outputs" / "results", "bench", arguments.profile))
    arguments.logs.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    logs = {tool: arguments.logs / f"sanitizer_{tool}.log" for tool in arguments.tools}
    running = {tool: start(tool, sanitizer, log, arguments.tests) for tool, log in logs.items()}
    bad = 0
    while running:
        tool = next((tool for tool, process in running.items() if process.poll() is not None), None)
        if tool is None:
            time.sleep(0.1)
            continue
        code = running.pop(tool).returncode
        try:
            metrics = read(logs[tool].read_text(errors="replace"))
            if code and not metrics["errors"]:
                raise ValueError(f"it ended with code {code}, though nothing was found")
        except ValueError as error:
            print(f"{tool}: {error}", file=sys.stderr)
            bad += 1
            continue
        took = time.monotonic() - begun
        bad += metrics["errors"] > 0
        print(f"{tool:10} {metrics['tests']:4} tests  {metrics['errors']:3} errors  {took:4.0f} s", flush=True)
        store.append(make_row(
            experiment="bench_gpu_sanitize", config={"tool": tool, "tests": arguments.tests}, seed=0,
            data={"source": "random", "revision": ""}, code=code_hash(CODE), profile=arguments.profile,
            machine=machine(), metrics=metrics, runtime_s=took,
        ))  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
