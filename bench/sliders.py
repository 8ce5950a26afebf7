"""From a slider's move to its redrawn figure, for every control of the walkthroughs, in one run.

Each walkthrough is run with INTERACTIVE = True in a Jupyter kernel of its own, in a folder that is thrown away. Then
every slider that it has made is moved as JupyterLab moves one: a message with the new value goes to the kernel, and the
clock stops when the PNG of the new figure comes back. What a browser adds (it decodes and paints the PNG) is measured
in tests/browser. A slider goes up and down its whole range; of several tries the one with the lowest median counts, so
that another program's busy moment does not. Rows go to outputs/results/bench.<profile>.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager

from lrm_recall.code_hash import code_hash
from lrm_recall.provenance import core_count, machine
from lrm_recall.results import ResultStore, make_row, profile_path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ("11_walkthrough_alpha_mixing", "12_walkthrough_head_merging")
CODE = tuple(f"lrm_recall.{name}" for name in (
    "figures.widgets", "figures.alpha_forgetting", "figures.alpha_mixing", "figures.alpha_search",
    "figures.head_merging", "figures.head_merging_capacity", "teach.alpha_forgetting", "teach.alpha_mixing",
    "teach.alpha_search", "teach.head_merging",
))  # fmt: skip
TARGET_MS = 150.0  # median, from move to figure
TIMEOUT_S = 120.0


class NotebookFailed(RuntimeError):
    """A walkthrough raised, or did not show what it should."""


@dataclass(frozen=True)
class Slider:
    """A slider as the kernel announced it.

    Attributes:
        comm: the id under which the kernel hears of it.
        name: notebook's number, the number of the interactive figure in it, and the control's label.
        field, values: the field of its state that a move sets, and all that it can be set to.
        start: which of the values it stands at.
    """

    comm: str
    name: str
    field: str
    values: list[Any]
    start: int


def run_notebook(client: BlockingKernelClient, name: str) -> list[Slider]:
    """Run every code cell with INTERACTIVE = True and return the sliders that were made.

    Raises:
        NotebookFailed: a cell raised, or no cell made a slider.
    """
    models: dict[str, dict[str, Any]] = {}  # comm -> the widget's state

    def listen(message: dict[str, Any]) -> None:
        if message["msg_type"] in ("comm_open", "comm_msg"):
            state = models.setdefault(message["content"]["comm_id"], {})
            state |= message["content"]["data"].get("state", {})

    for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            source = cell.source.replace("INTERACTIVE: bool = False", "INTERACTIVE: bool = True")
            reply = client.execute_interactive(source, output_hook=listen, timeout=TIMEOUT_S)["content"]
            if reply["status"] != "ok":
                raise NotebookFailed(f"{name}: {reply['ename']}: {reply['evalue']}")
    found = list(sliders(models, name.partition("_")[0]))
    if not found:
        raise NotebookFailed(f"{name} made no slider")
    return found


def sliders(models: dict[str, dict[str, Any]], notebook: str) -> Iterator[Slider]:
    """The sliders of every interactive box among the widgets' states, box by box."""
    boxes = [state for state in models.values() if "widget-interact" in state.get("_dom_classes", ())]
    for figure, box in enumerate(boxes, start=1):
        for child in box["children"]:
            comm = child.removeprefix("IPY_MODEL_")
            state = models[comm]
            if not state["_model_name"].endswith("SliderModel"):
                continue  # the output below the sliders
            if "_options_labels" in state:
                field, values = "index", list(range(len(state["_options_labels"])))
            else:
                count = round((state["max"] - state["min"]) / state["step"]) + 1
                field, values = "value", [state["min"] + i * state["step"] for i in range(count)]
            start = min(range(len(values)), key=lambda i: abs(values[i] - state[field]))
            yield Slider(comm, f"{notebook}, figure {figure}: {state['description']}", field, values, start)


def up_and_down(slider: Slider) -> Iterator[Any]:
    """From the value after the one where it stands up to the last, down to the first, up again, and so on."""
    circle = [*slider.values, *slider.values[-2:0:-1]]
    return itertools.cycle([*circle[slider.start + 1:], *circle[: slider.start + 1]])


def move(client: BlockingKernelClient, slider: Slider, value: Any) -> float:
    """Set a slider and wait for the figure: milliseconds.

    Raises:
        NotebookFailed: no figure came, but an error or nothing.
    """
    data = {"method": "update", "state": {slider.field: value}, "buffer_paths": []}
    message = client.session.msg("comm_msg", {"comm_id": slider.comm, "data": data})
    start, taken = time.perf_counter(), None
    client.shell_channel.send(message)
    while True:
        answer = client.get_iopub_msg(timeout=TIMEOUT_S)
        if answer["parent_header"].get("msg_id") != message["header"]["msg_id"]:
            continue
        if answer["msg_type"] == "display_data" and "image/png" in answer["content"]["data"]:
            taken = 1e3 * (time.perf_counter() - start)
        if answer["msg_type"] == "status" and answer["content"]["execution_state"] == "idle":
            break  # the next move is not made to wait for the end of this one
    if taken is None:
        raise NotebookFailed(f"{slider.name}: no figure came when it was set to {value}")
    return taken


def time_slider(client: BlockingKernelClient, slider: Slider, moves: int, tries: int) -> dict[str, float]:
    """Median and worst milliseconds of the best of several tries, and the median of the worst of them."""
    route, rounds = up_and_down(slider), []
    for _ in range(tries):
        rounds.append([move(client, slider, value) for value in itertools.islice(route, moves)])
    best = min(rounds, key=statistics.median)
    return {"median_ms": statistics.median(best), "slowest_ms": max(best),
            "worst_try_median_ms": max(map(statistics.median, rounds))}


def time_all(moves: int, tries: int) -> dict[str, dict[str, float]]:
    """The times of every slider of every walkthrough, by the slider's name."""
    metrics: dict[str, dict[str, float]] = {}
    for name in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder) / "notebooks"
            work.mkdir()
            manager = KernelManager(transport="ipc", ip=f"{folder}/kernel")  # its sockets are files
            manager.start_kernel(cwd=str(work))
            client = manager.client()
            client.start_channels()
            try:
                client.wait_for_ready(timeout=TIMEOUT_S)
                for slider in run_notebook(client, name):
                    metrics[slider.name] = time_slider(client, slider, moves, tries)
            finally:
                client.stop_channels()
                manager.shutdown_kernel(now=True)
    return metrics


def print_table(metrics: dict[str, dict[str, float]]) -> bool:
    """One line a control; True when every median is below the target."""
    print(f"{'ms from move to figure':36}{'median':>9}{'slowest':>9}{'median of the worst try':>25}")
    for name, m in metrics.items():
        missed = "" if m["median_ms"] < TARGET_MS else "  (MISSED)"
        print(f"{name:36}{m['median_ms']:9.0f}{m['slowest_ms']:9.0f}{m['worst_try_median_ms']:25.0f}{missed}")
    return all(m["median_ms"] < TARGET_MS for m in metrics.values())


def store(metrics: dict[str, dict[str, float]], profile: str, moves: int, tries: int, seconds: float) -> Path:
    path = profile_path(ROOT / "outputs" / "results", "bench", profile)
    code, here = code_hash(CODE), machine()
    for name, m in metrics.items():
        row = make_row(
            experiment="bench_sliders",
            config={"control": name, "moves": moves, "tries": tries, "cores": core_count()},
            seed=0,
            data={"source": "notebooks", "revision": ""},
            code=code,
            profile=profile,
            machine=here,
            metrics=m,
            runtime_s=seconds,
            peak_memory_mb=0.0,
        )  # fmt: skip
        ResultStore(path).append(row)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--moves", type=int, default=50, help="of each slider in a try")
    parser.add_argument("--tries", type=int, default=3, help="the one with the lowest median counts")
    arguments = parser.parse_args()
    start = time.perf_counter()
    metrics = time_all(arguments.moves, arguments.tries)
    met = print_table(metrics)
    print(f"each median of {arguments.moves} moves is to be below {TARGET_MS:g} ms: {'met' if met else 'MISSED'}")
    path = store(metrics, arguments.profile, arguments.moves, arguments.tries, time.perf_counter() - start)
    print(f"rows added to {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
