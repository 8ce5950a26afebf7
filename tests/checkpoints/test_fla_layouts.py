"""Checkpoints as flash-linear-attention's classes write them: strict loading, and writing them back unchanged."""

from __future__ import annotations

import json
import re

import pytest
import torch
from checkpoint_files import FLA, change_config, change_tensors, files, fla_checkpoint

from lrm_recall.checkpoints import fla, hugging_face, load, state_spaces, to_fla
from lrm_recall.checkpoints.fields import REQUIRED, Equals, Maps, Only
from lrm_recall.checkpoints.find import find_layout
from lrm_recall.mixers.find import mixer_class
from lrm_recall.options import accepted_options

COMMON = {"torch_dtype": "bfloat16", "transformers_version": "4.40.2", "architectures": ["Any"]}
LAYOUTS = [*fla.LAYOUTS, hugging_face.MAMBA, hugging_face.MAMBA2, state_spaces.MAMBA, state_spaces.MAMBA2]


@pytest.mark.parametrize("layout", FLA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_written_back_unchanged(tmp_path, layout, dtype):
    tensors = fla_checkpoint(tmp_path / "fla", layout, dtype)
    model = load(tmp_path / "fla")
    assert model.dtype == dtype and not model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert model(torch.arange(9)[None]).logits.isfinite().all()
    to_fla(model, tmp_path / "back")
    back = files(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


@pytest.mark.parametrize("layout", FLA)
def test_configuration_written_back(tmp_path, layout):
    fla_checkpoint(tmp_path / "fla", layout)
    model = load(tmp_path / "fla")
    to_fla(model, tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    saved = json.loads((tmp_path / "fla" / "config.json").read_text())
    for name in written.keys() - {"intermediate_size", "dtype"}:  # the width is written out where fla computes it
        assert written[name] == saved[name], name
    assert load(tmp_path / "back").config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.title)
def test_layout_names_options_of_its_mixer(layout):
    known = accepted_options(mixer_class(layout.mixer))
    mapped = {rule.option for rule in layout.rules.values() if isinstance(rule, Maps) and rule.option}
    assert mapped | layout.options.keys() <= known.keys()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.title)
def test_every_field_with_one_supported_value_is_checked(layout):
    least = {name: 512 for name, rule in layout.rules.items() if isinstance(rule, Maps) and rule.default is REQUIRED}
    assert layout.config({**least, **COMMON}).hidden_size == 512
    checked = [name for name, rule in layout.rules.items() if isinstance(rule, (Only, Equals))]
    assert checked
    for name in checked:
        with pytest.raises(ValueError, match=re.escape(name)):
            layout.config({**least, **COMMON, name: "another value"})


@pytest.mark.parametrize(
    ("ratio", "hidden_size", "width"), [(4, 2048, 5632), (2, 2048, 2816), (4, 100, 512), (None, 2048, 5632)]
)
def test_mlp_width_as_fla_computes_it(ratio, hidden_size, width):
    source = {"model_type": "gla", "vocab_size": 64, "hidden_size": hidden_size, "num_hidden_layers": 2,
              "hidden_ratio": ratio, "intermediate_size": None, "num_heads": 2}
    layout, source = find_layout(source)
    assert layout.config(source).intermediate_size == width


def test_joined_mlp_projections_of_early_versions(tmp_path):
    tensors = fla_checkpoint(tmp_path, "gla")
    joined = {}
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        joined[f"{mlp}.gate_proj.weight"] = torch.cat(
            [tensors[f"{mlp}.gate_proj.weight"], tensors[f"{mlp}.up_proj.weight"]]
        )
        joined[f"{mlp}.up_proj.weight"] = None
    expected = load(tmp_path).state_dict()
    change_tensors(tmp_path, **joined)
    model = load(tmp_path).state_dict()
    assert all(torch.equal(model[name], tensor) for name, tensor in expected.items())


def test_field_names_of_early_versions(tmp_path):
    present = {"dt_min", "dt_max", "dt_init_floor", "dt_limit", "norm_eps", "rmsnorm"}
    fla_checkpoint(tmp_path, "mamba2", drop=present, time_step_min=0.01, time_step_max=0.2, time_step_floor=1e-3,
                   rms_norm=True, time_step_limit=[0.0, float("inf")], time_step_rank=2, layer_norm_epsilon=1e-4)
    config = load(tmp_path).config
    assert config.norm_eps == config.mixer_args["layer_norm_epsilon"] == 1e-4
    assert (config.mixer_args["time_step_min"], config.mixer_args["time_step_max"]) == (0.01, 0.2)
    change_config(tmp_path, norm_eps=1e-5)
    with pytest.raises(ValueError, match="norm_eps twice"):
        load(tmp_path)


def test_dtype_and_device(tmp_path):
    fla_checkpoint(tmp_path, "gla")
    assert load(tmp_path, dtype="bfloat16").dtype == load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(tmp_path, device="meta").device.type == "meta"
    for wrong in ("int8", "bf17", torch.int8, 16):
        with pytest.raises(ValueError, match="dtype must be a floating-point dtype"):
            load(tmp_path, dtype=wrong)


def test_parameters_own_their_memory(tmp_path):
    tensors = fla_checkpoint(tmp_path, "gla")
    model = load(tmp_path)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:  # in place, so that a mapped tensor would see it
        file.write(bytes(path.stat().st_size))
    assert torch.equal(model.model.embeddings.weight, tensors["model.embeddings.weight"])
    assert all(p.untyped_storage().nbytes() == p.nbytes and p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "own")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in files(tmp_path / "own").items())
