"""Resona put beside the mixers of a loaded checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checkpoint_files import fla_checkpoint

from lrm_recall import RecurrentLM, Resona, expand_state
from lrm_recall.checkpoints import load

RESONA = {"layers": [1], "chunk_size": 2, "encoder": "linear", "alpha": "learned", "num_heads": 2}
IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("layout", ["gla_tied", "mamba2"])
def test_only_resona_is_new(tmp_path, layout):
    fla_checkpoint(tmp_path, layout)
    plain, model = load(tmp_path), load(tmp_path, resona=RESONA)
    assert isinstance(model.model.layers[1].mixer, Resona) and not isinstance(model.model.layers[0].mixer, Resona)
    before = {f"{name.replace('layers.1.mixer.', 'layers.1.mixer.mixer.')}": tensor
              for name, tensor in plain.state_dict().items()}
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    new = after.keys() - before.keys()
    assert new and all(name.startswith("model.layers.1.mixer.") for name in new)
    assert all(after[name].isfinite().all() and after[name].device.type == "cpu" for name in new)
    assert not model.training
    assert model.config.resona == RESONA and plain.config.resona is None
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, plain(IDS).logits)


def test_initialised_as_in_a_new_model(tmp_path):
    fla_checkpoint(tmp_path, "gla", torch.bfloat16)
    model = load(tmp_path, resona=RESONA)
    layer = model.model.layers[1].mixer
    new = RecurrentLM(model.config).model.layers[1].mixer
    assert model.dtype == torch.bfloat16 and layer.q_proj.weight.dtype == torch.bfloat16
    for name in ("q_proj", "o_proj"):  # o_proj writes to the residual stream, and starts smaller
        spread, expected = (getattr(module, name).weight.float().std().item() for module in (layer, new))
        assert spread == pytest.approx(expected, rel=0.15)


def test_saved_and_loaded_again(tmp_path):
    fla_checkpoint(tmp_path / "fla", "gla")
    model = load(tmp_path / "fla", resona=RESONA)
    model.save_pretrained(tmp_path / "own")
    again = RecurrentLM.from_pretrained(tmp_path / "own")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("resona", [{"layers": [2]}, {"layers": []}, {"layers": [0], "chunk": 2}, {}, [0], "all"])
def test_options_that_cannot_be(tmp_path, resona):
    fla_checkpoint(tmp_path, "gla")
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ValueError, match="resona"):
        load(tmp_path, resona=resona)


@pytest.mark.parametrize("layout", ["gla", "mamba2"])
def test_what_is_copied_from_the_page_runs(tmp_path, layout):
    page = (Path(__file__).resolve().parents[2] / "docs" / "gpu.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "save_pretrained" in block]
    fla_checkpoint(tmp_path / "fla", layout)
    plain = load(tmp_path / "fla")
    scope = {"RecurrentLM": RecurrentLM, "expand_state": expand_state, "checkpoint": tmp_path / "fla",
             "folder": tmp_path / "ours", "ids": torch.arange(40).view(1, 40)}  # fmt: skip
    exec(compile(block, "docs/gpu.md", "exec"), scope)
    assert scope["loss"].isfinite() and scope["tokens"].shape[1] > 40
    assert scope["model"].config.resona["layers"] == [0] and scope["model"].state_size() > plain.state_size()


def test_with_alpha_1_it_is_the_old_model(tmp_path):
    fla_checkpoint(tmp_path, "gla")
    with torch.no_grad():
        assert torch.equal(load(tmp_path, resona={**RESONA, "alpha": 1.0})(IDS).logits, load(tmp_path)(IDS).logits)
