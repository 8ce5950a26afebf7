"""Which code runs an op; the GPU is played by a number that says it is there."""

import subprocess
import sys
import warnings

import pytest
import torch

from lrm_recall import backends
from lrm_recall.ops import dispatch
from lrm_recall.ops.dispatch import LIBRARY_OF, Library, Unsupported, dispatched, fusion


class OnGPU(float):
    is_cuda = True


@pytest.fixture(autouse=True)
def forget():
    yield
    dispatch.find_adapter.cache_clear()
    dispatch._warn_once.cache_clear()


@pytest.fixture
def adapters(monkeypatch, tmp_path):
    """A library whose module of adapters holds what the test writes there."""

    def install(source):
        (tmp_path / "some_adapters.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(__import__("sys").modules, "some_adapters", raising=False)
        monkeypatch.setitem(LIBRARY_OF, "twice", Library("some-kernels", "some_adapters"))
        return dispatched("twice", lambda x, by=2: ("torch", x * by))

    return install


GOOD = "def twice(x, by=2): return ('library', x * by)\n"
NARROW = (
    "from lrm_recall.ops.dispatch import Unsupported\n"
    "def twice(x, by=2): raise Unsupported('it takes at most 256 key channels, got 1024')\n"
)


def test_a_cpu_tensor_runs_in_torch_whatever_is_installed(adapters, monkeypatch):
    twice = adapters(GOOD)
    assert twice(torch.ones(()))[0] == "torch"
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "library")
    assert twice(torch.ones(()))[0] == "torch"


def test_a_gpu_tensor_runs_in_the_library(adapters):
    assert adapters(GOOD)(OnGPU(3), by=3) == ("library", 9)


def test_torch_can_be_forced(adapters, monkeypatch):
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "torch")
    assert adapters(GOOD)(OnGPU(3)) == ("torch", 6)


def test_a_missing_library_warns_once_and_names_the_command(adapters):
    twice = adapters("import a_package_that_nobody_has\n")
    with pytest.warns(RuntimeWarning, match="twice runs in torch.*slower.*pip install some-kernels"):
        assert twice(OnGPU(3)) == ("torch", 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert twice(OnGPU(4)) == ("torch", 8)


def test_a_shape_that_the_kernel_cannot_take_warns_and_says_why(adapters):
    with pytest.warns(RuntimeWarning, match="some-kernels cannot take this call: it takes at most 256 key channels"):
        assert adapters(NARROW)(OnGPU(3)) == ("torch", 6)


@pytest.mark.parametrize("source", [NARROW, "import a_package_that_nobody_has\n"])
def test_forcing_the_library_makes_a_fallback_an_error(adapters, source, monkeypatch):
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "library")
    with pytest.raises(RuntimeError, match="LRM_RECALL_BACKEND=library, but for twice some-kernels can"):
        adapters(source)(OnGPU(3))


def test_an_error_of_the_kernel_is_not_swallowed(adapters):
    with pytest.raises(ZeroDivisionError):
        adapters("def twice(x): return 1 / 0\n")(OnGPU(3))


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="must be one of auto, torch, library, got 'cuda'"):
        dispatch.backend()


def test_fusions_are_for_a_gpu_only():
    assert fusion("mamba2_inner", torch.ones(1)) is None


def test_every_op_that_a_library_runs_has_its_adapter_and_its_torch_form():
    """Read from the sources: the libraries themselves cannot be imported on a CPU."""
    import ast
    import importlib.util
    from pathlib import Path

    folder = Path(importlib.util.find_spec("lrm_recall.ops").submodule_search_locations[0])
    for op, library in {**LIBRARY_OF, **dispatch.FUSIONS}.items():
        tree = ast.parse((folder / "libraries" / f"{library.adapters.rpartition('.')[2]}.py").read_text())
        assert op in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, op
    sources = "".join(path.read_text() for path in [*folder.glob("*.py"), *folder.parent.glob("resona/*.py")])
    for op in LIBRARY_OF:
        assert f'{op} = dispatched("{op}", ' in sources, op


def test_an_adapter_takes_the_arguments_of_its_torch_form():
    import ast
    import importlib
    import importlib.util
    import inspect
    import pkgutil
    from pathlib import Path

    import lrm_recall.ops as ops
    from lrm_recall.resona import gate, integrate, search

    folder = Path(importlib.util.find_spec("lrm_recall.ops").submodule_search_locations[0])
    defined = {}
    for path in (folder / "libraries").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                arguments = node.args
                defined[node.name] = [a.arg for a in [*arguments.args, *arguments.kwonlyargs]]
    modules = [importlib.import_module(f"lrm_recall.ops.{m.name}") for m in pkgutil.iter_modules(ops.__path__)
               if m.name != "libraries"] + [search, integrate, gate]
    for op in LIBRARY_OF:
        run = next(vars(module)[op] for module in modules if op in vars(module))
        parameters = inspect.signature(run).parameters.values()
        expected = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
        assert defined[op] == expected, op


class TestBackends:
    def test_on_a_cpu_everything_is_torch(self):
        table = backends("cpu")
        assert set(table["runs"]) == {"torch"} and set(table.index) == set(LIBRARY_OF)
        assert table.attrs["autotune"] == "quick"

    def test_says_what_is_missing_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr("lrm_recall.what_runs.find_adapter", lambda op: (None, "fla cannot be imported"))
        table = backends("cuda")
        assert set(table["runs"]) == {"torch"} and table.loc["gla", "why"] == "fla cannot be imported"

    def test_says_that_torch_was_asked_for(self, monkeypatch):
        monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "torch")
        assert backends("cuda").loc["ssd", "why"] == "LRM_RECALL_BACKEND=torch"

    def test_refuses_another_device(self):
        with pytest.raises(ValueError, match="device must be cpu or cuda, got 'tpu'"):
            backends("tpu")


def test_unsupported_is_not_an_error_that_others_catch():
    assert not issubclass(Unsupported, (ValueError, RuntimeError))


def test_an_op_that_enters_itself_is_in_the_table():
    script = "import lrm_recall; print(lrm_recall.backends('cpu').index.tolist())"  # a process that has made no model
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "attention_step" in done.stdout
