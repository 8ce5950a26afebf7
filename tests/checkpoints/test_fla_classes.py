"""FLA's own classes, where they can be imported (triton is needed, a GPU is not): they load what to_fla writes."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_files import FLA, LAYOUTS, files, fla_checkpoint

from lrm_recall.checkpoints import load, to_fla

pytest.importorskip("triton", exc_type=ImportError)
models = pytest.importorskip("fla.models", exc_type=ImportError)


@pytest.mark.parametrize("layout", FLA)
def test_fla_loads_what_is_written(tmp_path, layout):
    from transformers import AutoModelForCausalLM

    fla_checkpoint(tmp_path / "fla", layout)
    ours = load(tmp_path / "fla")
    to_fla(ours, tmp_path / "back")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(theirs).__module__.startswith("fla.models")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    written = files(tmp_path / "back")
    assert all(torch.equal(theirs.state_dict()[name], tensor) for name, tensor in written.items())


@pytest.mark.parametrize("layout", FLA)
def test_stored_layouts_are_those_of_the_installed_version(tmp_path, layout):
    saved = json.loads((LAYOUTS / f"{layout}.json").read_text())
    architecture = saved["config"]["architectures"][0]
    config = getattr(models, architecture.replace("ForCausalLM", "Config"))(**saved["config"])
    getattr(models, architecture)(config).save_pretrained(tmp_path)
    shapes = {name: [int(size) for size in header.split()[1:]] for name, header in saved["tensors"].items()}
    assert {name: list(tensor.shape) for name, tensor in files(tmp_path).items()} == shapes
    load(tmp_path)
