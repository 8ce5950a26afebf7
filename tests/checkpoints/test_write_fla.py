"""to_fla writes what FLA can load, completely or not at all, and refuses what FLA cannot express."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_files import files, fla_checkpoint

from lrm_recall import RecurrentLM, RecurrentLMConfig, merge_heads, widen_state
from lrm_recall.checkpoints import load, to_fla


def small(mixer: str = "gla", **fields) -> RecurrentLM:
    options = {"gla": {"num_heads": 2}, "mamba2": {"state_size": 8, "head_dim": 8}}
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    if mixer == "mamba2":
        fields = {"mlp": "none", "norm_eps": 1e-5, **fields}
    return RecurrentLM(RecurrentLMConfig(mixer=mixer, **{"mixer_args": options.get(mixer, {}), **shape, **fields}))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("mixer", ["gla", "mamba2"])
def test_a_model_of_ours_comes_back(tmp_path, mixer, tied):
    model = small(mixer, tie_word_embeddings=tied, eos_token_id=[2, 3]).bfloat16()
    to_fla(model, tmp_path / "new" / "fla")
    assert ("lm_head.weight" in files(tmp_path / "new" / "fla")) == (not tied)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"fla"}
    back = load(tmp_path / "new" / "fla")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())
    for name in ("mixer", "mlp", "hidden_size", "norm_eps", "eos_token_id", "tie_word_embeddings"):
        assert getattr(back.config, name) == getattr(model.config, name), name


def test_sharded(tmp_path):
    tensors = fla_checkpoint(tmp_path / "fla", "gla")
    to_fla(load(tmp_path / "fla"), tmp_path / "back", max_shard_size="50KB")
    shards = list((tmp_path / "back").glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "back" / "model.safetensors.index.json").is_file()
    assert all(torch.equal(files(tmp_path / "back")[name], tensor) for name, tensor in tensors.items())
    assert load(tmp_path / "back").state_dict().keys() == load(tmp_path / "fla").state_dict().keys()


@pytest.mark.parametrize(("change", "match"), [
    (lambda model: merge_heads(model, [1]), "num_heads is 2 in layer 0 and 1 in layer 1"),
    (lambda model: small(resona={"layers": [1], "chunk_size": 2}), r"Resona layers.*\[1\]"),
    (lambda model: small(mlp="none"), "always has mlp = 'swiglu'; this model has 'none'"),
    (lambda model: small(norm="layernorm"), "always has norm = 'rmsnorm'"),
    (lambda model: small(residual_in_fp32=True), "always has residual_in_fp32 = False"),
    (lambda model: small(norm_eps=1e-5), "one field norm_eps, for norm_eps = 1e-05 and the mixer's norm_eps = 1e-06"),
    (lambda model: small(mixer_args={"gate_low_rank_dim": 8}), "always has mixer option gate_low_rank_dim = 16"),
    (lambda model: small("retnet", mixer_args={"num_heads": 2, "use_short_conv": True}),
     "has no counterpart of the mixer's option use_short_conv = True"),
    (lambda model: small("baseconv"), "FLA's models are written for mixers gla, .*; this model has 'baseconv'"),
    (lambda model: widen_state(small("mamba2"), [0]), "state_size is 32 in layer 0 and 8 in layer 1"),
    (lambda model: small("mamba2", mlp="swiglu"), "always has mlp = 'none'"),
])
def test_what_fla_cannot_express(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        to_fla(change(small()), tmp_path / "fla")
    assert not list(tmp_path.iterdir())


def test_rank_of_the_time_step(tmp_path):
    to_fla(small("mamba", mlp="none", mixer_args={"state_size": 8}), tmp_path / "auto")
    to_fla(small("mamba", mlp="none", mixer_args={"state_size": 8, "time_step_rank": 3}), tmp_path / "three")
    ranks = [json.loads((tmp_path / name / "config.json").read_text())["dt_rank"] for name in ("auto", "three")]
    assert ranks == ["auto", 3]
    assert [load(tmp_path / name).model.layers[0].mixer.time_step_rank for name in ("auto", "three")] == [2, 3]


def test_every_layer_merged_alike(tmp_path):
    to_fla(merge_heads(small(), [0, 1]), tmp_path / "fla")
    assert json.loads((tmp_path / "fla" / "config.json").read_text())["num_heads"] == 1


def test_tensors_that_the_configuration_does_not_describe(tmp_path):
    model = small()
    model.model.layers[0].mixer.o_proj.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(ValueError, match="not those that its configuration describes"):
        to_fla(model, tmp_path / "fla")


def test_existing_targets(tmp_path):
    (tmp_path / "empty").mkdir()
    to_fla(small(), tmp_path / "empty")
    before = files(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
        to_fla(small(), tmp_path / "empty")
    assert all(torch.equal(files(tmp_path / "empty")[name], tensor) for name, tensor in before.items())
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FileExistsError):
        to_fla(small(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error("the disk is full")

    monkeypatch.setattr("lrm_recall.checkpoints.write.save_torch_state_dict", fail)
    with pytest.raises(error):
        to_fla(small(), tmp_path / "fla")
    assert not list(tmp_path.iterdir())
