"""The command line: real notebooks executed, every mistake one line, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jupytext
import nbformat
import pytest
from sweep_runs import QuickRun, alive

from lrm_recall import promises, runner
from lrm_recall.promises import MIME, broken_promises, promise
from lrm_recall.results import ResultStore
from lrm_recall.rows import make_row
from lrm_recall.terminal import NotebookLines
from lrm_recall.workbook import main

HERE = Path(__file__).parent
NOTEBOOK = '''\
# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A demonstration

# %% tags=["parameters"]
count: int = 2  # how many runs
behaviour: str = "keep"  # what becomes of the promise
learning_rate: float = 1.0e-3  # of nothing
log: str = ""  # where runs say that they began
profile: str = "smoke"  # set by the runner
results_dir: str = "outputs/results"  # set by the runner
output_dir: str = "outputs/smoke"  # set by the runner
fresh: bool = False  # set by the runner

# %%
import sys
import time
from pathlib import Path

import sweep_runs

from lrm_recall.promises import promise
from lrm_recall.results import ResultStore, profile_path
from lrm_recall.sweep import plan_sweep, run_sweep

print(sys.executable)

# %%
if behaviour == "raise":
    raise RuntimeError("two\\nlines")
if behaviour == "silent":
    sys.exit(0)
store = ResultStore(profile_path(results_dir, "demo", profile))
seconds = 60.0 if behaviour == "sleep" else 0.0
specs = [sweep_runs.QuickRun(seed, sleep_s=seconds, log=log) for seed in range(count)]
plan = plan_sweep(specs, sweep_runs.experiment(), store, fresh=fresh)
run_sweep(specs, sweep_runs.experiment(), store, profile=profile, workers=2, fresh=fresh)
figure = Path(output_dir) / "figures" / "demo.svg"
figure.parent.mkdir(parents=True, exist_ok=True)
figure.write_text("" if behaviour == "lie" else "figure")
promise(store, plan.keys, [figure])
'''


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A workbook with one notebook and the profiles smoke and laptop; the current folder."""
    for folder in ("notebooks", "params/smoke", "params/laptop"):
        (tmp_path / folder).mkdir(parents=True)
    write_notebook(tmp_path, NOTEBOOK)
    (tmp_path / "params/smoke/01_demo.yaml").touch()
    (tmp_path / "params/laptop/01_demo.yaml").write_text("count: 3\n")
    monkeypatch.chdir(tmp_path)
    path = [HERE, HERE.parent / "lib", HERE.parent / "kernels"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, path)))
    return tmp_path


def write_notebook(root: Path, text: str, name: str = "01_demo") -> None:
    (root / "notebooks" / f"{name}.py").write_text(text)
    jupytext.write(jupytext.reads(text, fmt="py:percent"), root / "notebooks" / f"{name}.ipynb")


def files(root: Path) -> set[str]:
    """Everything that running can have made."""
    return {str(path.relative_to(root)) for path in (root / "outputs").rglob("*") if path.is_file()}


# --- runs


def test_a_run_leaves_a_signed_notebook_and_its_rows(root, capsys):
    log = root / "log"
    laptop = ["--profile", "laptop", "-p", f"log={log}"]
    assert main(["run", "01_demo", *laptop, "-p", "learning_rate=5.0e-4"]) == 0
    out, err = capsys.readouterr()
    assert out == "outputs/laptop/01_demo.ipynb\n"
    assert "quick: 3/3" in err and err.count("\n") < 10  # a bar overwrites itself
    made = ["laptop/01_demo.ipynb", "laptop/figures/demo.svg", "results/demo.laptop.jsonl"]
    assert files(root) == {f"outputs/{name}" for name in made}
    rows = ResultStore("outputs/results/demo.laptop.jsonl").rows()
    assert [row["profile"] for row in rows] == ["laptop"] * 3
    notebook = nbformat.read("outputs/laptop/01_demo.ipynb", as_version=4)
    signed = notebook.metadata["lrm_recall"]
    assert signed["parameters"]["count"] == 3 and signed["parameters"]["learning_rate"] == 5e-4
    assert signed["parameters"]["results_dir"] == "outputs/results" and signed["parameters"]["fresh"] is False
    assert signed["provenance"]["cores"] >= 1 and signed["provenance"]["versions"]["papermill"]
    assert notebook.metadata["papermill"]["output_path"] == "outputs/laptop/01_demo.ipynb"
    streams = [o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"]
    assert streams[0].text.strip() == sys.executable
    assert "\r" not in json.dumps(notebook), "a progress bar has left more than its last state"
    began = log.read_text()

    assert main(["run", *laptop]) == 0  # everything is stored
    assert log.read_text() == began
    (root / "outputs/laptop/01_demo.ipynb").unlink()
    folders = ["--results", str(root / "r"), "--output", str(root / "o")]
    assert main(["run", *laptop, "--fresh", *folders]) == 0
    assert len(log.read_text().splitlines()) == 2 * len(began.splitlines())
    assert (root / "r/demo.laptop.jsonl").is_file() and (root / "o/01_demo.ipynb").is_file()


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        ("raise", "cell [4] failed: RuntimeError: two lines (see outputs/smoke/01_demo.failed.ipynb)"),
        ("lie", "outputs/smoke/figures/demo.svg is promised but empty (see "),
        ("silent", "it promises nothing, so nothing shows that it worked"),
        ("sleep", "a cell took longer than 3 s (--timeout)"),
    ],
)  # fmt: skip
def test_a_failed_run_keeps_the_good_notebook(root, capsys, behaviour, told):
    good = root / "outputs/smoke/01_demo.ipynb"
    good.parent.mkdir(parents=True)
    good.write_text("the good one")
    timeout = "3" if behaviour == "sleep" else "60"
    assert main(["run", "-p", f"behaviour={behaviour}", "--timeout", timeout]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lrm-recall")]
    assert line.startswith(f"lrm-recall: 01_demo: {told}")
    assert good.read_text() == "the good one"
    failed = nbformat.read("outputs/smoke/01_demo.failed.ipynb", as_version=4)
    assert failed.metadata["lrm_recall"]["parameters"]["behaviour"] == behaviour
    assert not (root / "outputs/smoke/01_demo.running.ipynb").exists()


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_a_runner_that_is_killed(root, kill):
    log = root / "log"
    command = [sys.executable, "-m", "lrm_recall.workbook", "run", "-p", "behaviour=sleep"]
    command += ["-p", f"log={log}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
    )
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    workers = [int(line.split()[1]) for line in log.read_text().splitlines()]
    process.send_signal(kill)
    told = process.communicate(timeout=30)[0]
    assert process.returncode == (130 if kill == signal.SIGINT else -signal.SIGKILL)
    if kill == signal.SIGINT:
        assert told.endswith("lrm-recall: interrupted; the rows stored so far are kept\n")
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    assert not (root / "outputs/smoke/01_demo.ipynb").exists()


# --- mistakes: exit code 2, one line, nothing written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--profile", "lap"], "unknown profile 'lap' (did you mean 'laptop'?); there are: laptop"),
        (["run", "02_demo"], "unknown notebook '02_demo' (did you mean '01_demo'?); there are: 01_demo"),
        (["run", "-p", "cuont=3"], "01_demo: -p: unknown parameter 'cuont' (did you mean 'count'?); al"),
        (["run", "-p", "learning_rate=1e-3"], "01_demo: -p: learning_rate: YAML reads 1e-3 as text; write"),
        (["run", "-p", "count=many"], "01_demo: -p: count must be int, not 'many' (str)"),
        (["run", "-p", "count"], "-p count: must be name=value"),
        (["run", "--results", __file__], f"--results {__file__}: {__file__} is a file, not a folder"),
        (["run", "--output", f"{__file__}/out"], f"--output {__file__}/out: {__file__} is a file, not a folder"),
        (["run", "-p", "profile=laptop"], "01_demo: -p: profile is set by the command line, not as a para"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(root, capsys, words, message):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"lrm-recall: {message}") and err.count("\n") == 1
    assert not (root / "outputs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1", ": unknown parameter 'lr'; allowed: count, behaviour, learning_rate, log"),
        ("learning_rate: 1e-3", ": learning_rate: YAML reads 1e-3 as text; write 1.0e-3"),
        ("count: [1]", ": count must be int, not [1] (list)"),
        ("count: 1\ncount: 2", ": line 2: count is given twice"),
        (None, " does not exist; an empty file keeps the notebook's own values"),
    ],
)
def test_a_bad_parameter_file_is_one_line(root, capsys, text, message):
    path = root / "params/smoke/01_demo.yaml"
    path.unlink() if text is None else path.write_text(text)
    assert main(["run"]) == 2
    assert capsys.readouterr().err == f"lrm-recall: params/smoke/01_demo.yaml{message}\n"
    assert not (root / "outputs").exists()


def test_a_kernel_that_is_not_there_is_one_line(root, capsys, monkeypatch):
    write_notebook(root, NOTEBOOK.replace("name: python3", "name: julia"))
    assert main(["run"]) == 2
    assert "01_demo: it asks for the kernel 'julia', and only 'python3', this" in capsys.readouterr().err
    write_notebook(root, NOTEBOOK)
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    assert main(["run"]) == 2
    assert f"there is no Jupyter kernel in {sys.prefix}: install ipykernel there" in capsys.readouterr().err
    assert not (root / "outputs").exists()


def test_one_bad_notebook_stops_all_before_any_runs(root, capsys):
    write_notebook(root, NOTEBOOK.replace('fresh: bool = False  # set by the runner\n', ""), "02_other")
    (root / "params/smoke/02_other.yaml").touch()
    assert main(["run", "--fresh"]) == 2
    assert "02_other: --fresh needs a notebook that declares the parameter fresh" in capsys.readouterr().err
    (root / "notebooks/02_other.ipynb").write_text("{")
    assert main(["run"]) == 2
    assert capsys.readouterr().err == "lrm-recall: notebooks/02_other.ipynb is not a Jupyter notebook\n"
    assert not (root / "outputs").exists()


def test_a_profile_may_be_of_some_notebooks_only(root, capsys):
    write_notebook(root, NOTEBOOK, "02_other")
    (root / "params/smoke/02_other.yaml").touch()
    assert main(["check"]) == 0 and main(["run", "--profile", "laptop"]) == 0
    assert [path.name for path in (root / "outputs/laptop").glob("*.ipynb")] == ["01_demo.ipynb"]
    assert main(["run", "02_other", "--profile", "laptop"]) == 2
    assert "params/laptop/02_other.yaml does not exist; an empty file keeps" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["", "walk", "run --timeout 0", "run --timeout 1h", "run --porfile smoke"])
def test_words_that_mean_nothing_exit_with_2(root, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert "lrm-recall" in capsys.readouterr().err


# --- list and check


def test_list_shows_parameters_and_profiles(root, capsys):
    assert main(["list"]) == 0
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head == "01_demo  A demonstration  [laptop, smoke]"
    assert first == "    count: int = 2  # how many runs"


def test_the_summary_counts_the_verdicts_of_every_profile(root, capsys):
    assert main(["results", "summary"]) == 2
    assert "has no table of a notebook yet" in capsys.readouterr().err
    for profile, verdict in (("laptop", "trend only"), ("mine", "not run"), ("smoke", "reproduced")):
        (root / "outputs" / profile).mkdir(parents=True)
        cells = f"mixer,paper,verdict\ngla,0.5,{verdict}\ngla,,\ngla,0.1,not run\n"
        (root / "outputs" / profile / "mqar_table11.csv").write_text(cells)
    with (root / "outputs/laptop/mqar_table11.csv").open("a") as file:
        file.write("gla,0.3,\n")  # ran, at a scale at which it is no claim
    (root / "outputs/laptop/lm_table2.csv").write_text("\n")  # nothing ran
    assert main(["results", "summary"]) == 0
    out = capsys.readouterr().out
    assert out == (root / "outputs/summary.md").read_text()
    assert [line for line in out.splitlines() if line.startswith("| Resona")] == [
        "| Resona, 11 | recall of keys and values (MQAR) | laptop | 3 | 0 | 1 | 0 | 1 | 1 |"]
    assert "Not run yet: Resona 1, 2, " in out and "11" not in out.rpartition("Not run yet")[2]
    (root / "outputs/laptop/lm_table2.csv").write_text("a,b\n1,2\n")
    assert main(["results", "summary"]) == 2
    assert "lm_table2.csv is no table with the paper's values" in capsys.readouterr().err


def edit_notebook(root: Path, change) -> None:
    path = root / "notebooks/01_demo.ipynb"
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def _output(notebook):
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="hello")]


def _widgets(notebook):
    notebook.metadata["widgets"] = {}


def _drift(notebook):
    notebook.cells[2].source += "\nprint()"


FAULTS = {
    "notebooks/01_demo.ipynb is not stripped: cell 2 holds output": lambda root: edit_notebook(root, _output),
    "01_demo.ipynb is not stripped: its metadata holds 'widgets'": lambda root: edit_notebook(root, _widgets),
    "notebooks/01_demo.ipynb and 01_demo.py differ": lambda root: edit_notebook(root, _drift),
    "01_demo.py is missing (jupytext --sync": lambda root: (root / "notebooks/01_demo.py").unlink(),
    "count must be int": lambda root: (root / "params/laptop/01_demo.yaml").write_text("count: x"),
    "params/laptop has no parameter file of any notebook": lambda root: (root / "params/laptop/01_demo.yaml").unlink(),
    "params/smoke/09_gone.yaml belongs to no": lambda root: (root / "params/smoke/09_gone.yaml").touch(),
}


@pytest.mark.parametrize(("message", "change"), FAULTS.items(), ids=list(FAULTS))
def test_check_finds_each_fault(root, capsys, change, message):
    assert main(["check"]) == 0
    assert capsys.readouterr().out == "1 notebooks, 2 profiles: all in order\n"
    change(root)
    assert main(["check"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lrm-recall: ") and message in line


# --- promises


@pytest.fixture
def kept(tmp_path) -> tuple[ResultStore, dict, Path]:
    """A store with one row and one failure, and a figure."""
    store = ResultStore(tmp_path / "demo.smoke.jsonl")
    common = {"experiment": "quick", "data": {"source": "", "revision": ""}, "code": "", "profile": "smoke"}
    rows = [
        make_row(**common, config=vars(QuickRun(seed)), seed=seed, machine={}, error=error)
        for seed, error in ((0, None), (1, "RuntimeError: no"))
    ]
    for row in rows:
        store.append(row)
    figure = tmp_path / "figure.svg"
    figure.write_text("figure")
    return store, {row["status"]: row["key"] for row in rows}, figure


def executed(*contents: dict):
    outputs = [nbformat.v4.new_output("display_data", data={MIME: content}) for content in contents]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=outputs)])


def test_promises_are_checked_one_by_one(kept, tmp_path):
    store, keys, figure = kept
    earlier, later = datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(hours=1)

    def broken(begun=earlier, fresh=False, **content):
        content = {"store": "demo.smoke.jsonl", "keys": [], "files": []} | content
        return broken_promises(executed(content), tmp_path, begun, fresh)

    assert broken(keys=[keys["ok"]], files=["figure.svg"], fresh=True) == []
    assert broken(keys=[keys["ok"]], begun=later) == []  # a stored row may be older than the run that uses it
    assert "older than this fresh run" in broken(keys=[keys["ok"]], begun=later, fresh=True)[0]
    assert broken(files=["figure.svg"], begun=later) == ["figure.svg is promised but older than this run"]
    assert broken(files=["gone.svg"]) == ["gone.svg is promised but not there"]
    assert broken(keys=["f" * 16])[0].startswith(f"row {'f' * 16} is promised but not in ")
    assert broken(keys=[keys["failed"]])[0].endswith("the run failed: RuntimeError: no")
    assert len(broken(keys=["f" * 16, keys["failed"]], files=["gone.svg"])) == 3
    assert "promises nothing" in broken_promises(executed(), tmp_path, earlier, False)[0]


def test_a_promise_must_promise_something(kept):
    store, keys, figure = kept
    nothing = ({}, {"store": store}, {"keys": ["a"]}, {"store": store, "keys": "abc"}, {"files": "a.svg"})
    for arguments in nothing:
        with pytest.raises(ValueError):
            promise(**arguments)


def test_a_promise_is_an_output(kept, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    store, keys, figure = kept
    promise(store, [keys["ok"], keys["ok"]], [figure])
    (data,) = shown
    assert promises.promises_of(executed(data[MIME])) == [
        {"store": str(store.path), "keys": [keys["ok"]], "files": [str(figure)]}
    ]
    assert data["text/plain"] == f"promised: 1 rows in {store.path}, 1 files"


# --- the terminal


def test_bars_in_a_log_file_are_rare_and_lines_are_whole(capsys):
    lines = NotebookLines(period=3600)
    lines.write("hello\nwor")
    lines.write("ld\n")
    for step in range(1000):
        lines.write(f"\r{step}/1000")
    lines.write("\r1000/1000\nlast")
    lines.close()
    assert capsys.readouterr().err == "hello\nworld\n1000/1000\nlast\n"


def test_bars_show_their_newest_state_when_it_is_time(capsys):
    lines = NotebookLines(period=0)
    lines.write("\r1/3\r2/3")
    lines.write("\r2/3")
    lines.write("\r3/3\n")
    lines.close()
    assert capsys.readouterr().err == "2/3\n3/3\n"
