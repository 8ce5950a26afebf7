"""The hash of the code that a run depends on: what changes it and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrm_recall.code_hash import code_hash, code_only, import_closure

FILES = {
    "lrm_recall/__init__.py": "VERSION = 1\n",
    "lrm_recall/train/__init__.py": "from lrm_recall.unrelated import nothing\n",
    "lrm_recall/train/synthetic.py": (
        '"""Trains."""\n'
        "from __future__ import annotations\n"
        "import math, lrm_recall.model as model\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    from lrm_recall.unrelated import Nothing\n"
        "def run():\n"
        "    '''Runs.'''\n"
        "    from lrm_kernels import scan  # when first used\n"
        "    return model.forward(scan.speed)\n"
    ),
    "lrm_recall/model.py": "from .mixers import base\ndef forward(x):\n    return base.twice(x)\n",
    "lrm_recall/mixers/__init__.py": "",
    "lrm_recall/mixers/base.py": "def twice(x):\n    return 2 * x\n",
    "lrm_recall/mixers/gla.py": "from ..mixers.base import twice\nMIXER = twice\n",
    "lrm_recall/unrelated.py": "nothing = 0\n",
    "lrm_kernels/__init__.py": "from lrm_recall import VERSION\n",
    "lrm_kernels/scan.py": "speed = 1\n",
}
ENTRY = ["lrm_recall.train.synthetic"]


@pytest.fixture
def root(tmp_path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def change(root: Path, name: str, old: str, new: str) -> bool:
    """Whether replacing `old` by `new` in a file changes the hash of ENTRY."""
    before = code_hash(ENTRY, [root])
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new, 1))
    return code_hash(ENTRY, [root]) != before


def test_the_closure_holds_what_is_imported_and_no_more(root):
    assert set(import_closure(ENTRY, [root])) == {
        "lrm_recall.train.synthetic", "lrm_recall.model", "lrm_recall.mixers.base", "lrm_kernels.scan"
    }  # fmt: skip


def test_what_cannot_decide_a_result_can_be_left_out(root):
    (root / "lrm_recall/checkpoints").mkdir()
    for name, text in {"__init__": "from lrm_recall.checkpoints.load import load\n",
                       "load": "from lrm_recall.mixers.gla import MIXER\nload = MIXER\n"}.items():
        (root / f"lrm_recall/checkpoints/{name}.py").write_text(text)
    (root / "lrm_recall/checkpoints_of_training.py").write_text("every = 100\n")
    (root / "lrm_recall/model.py").write_text(FILES["lrm_recall/model.py"] + "def load():\n"
                                              "    from lrm_recall.checkpoints import load\n"
                                              "    from lrm_recall.checkpoints_of_training import every\n")
    without = import_closure([*ENTRY, "-lrm_recall.checkpoints"], [root])
    left_out = {"lrm_recall.checkpoints.load", "lrm_recall.mixers.gla"}
    assert set(import_closure(ENTRY, [root])) - set(without) == left_out
    before = code_hash([*ENTRY, "-lrm_recall.checkpoints"], [root])
    (root / "lrm_recall/checkpoints/load.py").write_text("load = None\n")
    assert code_hash([*ENTRY, "-lrm_recall.checkpoints"], [root]) == before
    (root / "lrm_recall/checkpoints_of_training.py").write_text("every = 200\n")
    assert code_hash([*ENTRY, "-lrm_recall.checkpoints"], [root]) != before


def test_a_package_counts_when_something_is_imported_from_it(root):
    assert set(import_closure(["lrm_kernels"], [root])) == {"lrm_kernels", "lrm_recall"}
    (root / "lrm_recall/model.py").write_text("from lrm_recall.train import nothing\n")
    closure = import_closure(["lrm_recall.model"], [root])
    assert set(closure) == {"lrm_recall.model", "lrm_recall.train", "lrm_recall.unrelated"}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("lrm_recall/train/synthetic.py", "  # when first used", "\n    # Said otherwise."),
        ("lrm_recall/train/synthetic.py", '"""Trains."""', '"""Trains,\n\n# and says so.\n"""\n'),
        ("lrm_recall/train/synthetic.py", "'''Runs.'''", "'''Läuft.\n\n    '''   # ünd"),
        ("lrm_recall/mixers/base.py", "def twice(x):\n", "\n\n# New.\ndef twice(x):   \n    'Twice x.'\n\n"),
        ("lrm_recall/unrelated.py", "0", "1"),
        ("lrm_recall/__init__.py", "1", "2"),
        ("lrm_recall/mixers/gla.py", "twice\n", "twice  \n"),
    ],
)
def test_what_keeps_the_hash(root, name, old, new):
    assert not change(root, name, old, new)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("lrm_recall/train/synthetic.py", "return", "return -"),
        ("lrm_recall/mixers/base.py", "2", "3"),
        ("lrm_recall/mixers/base.py", "x):\n", "x):\n    '''Twice.'''; x += 1\n"),
        ("lrm_kernels/scan.py", "1", "2"),
        ("lrm_recall/model.py", "from .mixers import base", "from .mixers import gla as base"),
    ],
)
def test_what_changes_the_hash(root, name, old, new):
    assert change(root, name, old, new)


def test_modules_found_by_name_are_the_callers_to_name(root):
    assert code_hash(ENTRY, [root]) != code_hash([*ENTRY, "lrm_recall.mixers.gla"], [root])
    assert code_hash([*ENTRY, "lrm_recall.mixers.base"], [root]) == code_hash(ENTRY, [root])


@pytest.mark.parametrize("modules", [["lrm_recall.mixers.glah"], ["numpy"]])
def test_a_module_that_does_not_exist_is_an_error(root, modules):
    with pytest.raises(ValueError, match=f"no module '{modules[0]}'"):
        code_hash(modules, [root])


def test_a_broken_import_says_where_it_is(root):
    (root / "lrm_recall/model.py").write_text("import lrm_recall.gone\n")
    with pytest.raises(ValueError, match=r"no module 'lrm_recall.gone' \(named by lrm_recall.model\)"):
        code_hash(ENTRY, [root])


def test_strings_are_code_even_with_blank_lines_and_hashes():
    source = 'x = """a  \n\n# b\n"""  # c\ny = f"#{x}  # {1}"\n'
    assert code_only(source) == 'x = """a  \n\n# b\n"""\ny = f"#{x}  # {1}"'
    assert code_only(source.replace("\n\n", "\n")) != code_only(source)


def test_the_real_package_has_a_hash():
    closure = import_closure(["lrm_recall.train.synthetic", "lrm_recall.mixers.gla"])
    assert {"lrm_recall.model", "lrm_recall.mixers.gla", "lrm_recall.tasks.mqar"} <= set(closure)
    assert not {"lrm_recall.sweep", "lrm_recall.results", "lrm_recall.mixers.mamba2"} & set(closure)
    assert len(code_hash(closure)) == 16
