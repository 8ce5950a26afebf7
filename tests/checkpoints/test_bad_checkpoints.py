"""What cannot be loaded is refused in one clear error that names it, before a model is returned."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_files import change_config, change_tensors, files, fla_checkpoint
from safetensors.torch import save_file

from lrm_recall import RecurrentLM, RecurrentLMConfig
from lrm_recall.checkpoints import load


@pytest.fixture
def directory(tmp_path):
    fla_checkpoint(tmp_path, "gla")
    return tmp_path


def refuse(directory, match: str, error: type[Exception] = ValueError, **arguments) -> None:
    """Loading fails, in one line."""
    with pytest.raises(error, match=match) as raised:
        load(directory, **arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("fields", "match"), [
    ({"model_type": "llama"}, "model_type 'llama'; supported: gla, delta_net, gated_deltanet, retnet, mamba, mamba2"),
    ({"model_type": None}, "model_type None"),
    ({"use_short_conv": True}, "use_short_conv must be False"),
    ({"attn": {"layers": [1], "num_heads": 2}}, "attn must be None"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'swish' .*, got 'gelu'"),
    ({"use_output_gate": 1}, "use_output_gate must be True .*, got 1"),
    ({"num_kv_heads": 1}, "num_kv_heads must be num_heads = 2, got 1"),
    ({"quantization_config": {"bits": 4}}, "'quantization_config', which FLA's GLA does not have"),
    ({"expand_kk": 1}, "'expand_kk', which FLA's GLA does not have .did you mean 'expand_k'"),
    ({"num_heads": 3}, "num_heads must divide"),
    ({"num_heads": "2"}, "num_heads"),
    ({"hidden_size": None}, "intermediate_size cannot be made sense of"),
    ({"hidden_size": None, "intermediate_size": 48}, "hidden_size must be int, got None"),
    ({"vocab_size": 0}, "vocab_size must be at least 1"),
    ({"pad_token_id": 64}, "pad_token_id must be a token below vocab_size 64, got 64"),
])
def test_configuration(directory, fields, match):
    change_config(directory, **fields)
    refuse(directory, match)


def test_lacking_field(tmp_path):
    fla_checkpoint(tmp_path, "gla", drop={"vocab_size", "hidden_size"})
    refuse(tmp_path, "lacks vocab_size, hidden_size")


@pytest.mark.parametrize(("fields", "match"), [
    ({"expand_k": 1.0}, r"layers.0.attn.q_proj.weight is \[16, 32\] and should be \[32, 32\]"),
    ({"num_hidden_layers": 3}, r"14 missing \(model.layers.2.attn_norm.weight, "),
    ({"num_hidden_layers": 1}, r"14 unexpected \(model.layers.1"),
    ({"vocab_size": 65}, r"embeddings.weight is \[64, 32\] and should be \[65, 32\]"),
    ({"intermediate_size": 128}, r"gate_proj.weight is \[256, 32\] and should be \[128, 32\]"),
    ({"num_heads": 4}, r"g_norm_swish_gate.weight is \[16\] and should be \[8\]"),
])
def test_configuration_that_disagrees_with_the_tensors(directory, fields, match):
    change_config(directory, **fields)
    refuse(directory, match)


@pytest.mark.parametrize(("tensors", "match"), [
    ({"model__layers__0__attn__o_proj__weight": None}, r"1 missing \(model.layers.0.attn.o_proj.weight\)"),
    ({"lm_head__weight": None}, r"1 missing \(lm_head.weight\)"),
    ({"model__layers__0__mlp__up_proj__weight": None}, r"1 missing \(model.layers.0.mlp.up_proj.weight\)"),
    ({"model__layers__1__attn__q_proj__bias": torch.zeros(16)}, r"1 unexpected \(model.layers.1.attn.q_proj.bias\)"),
    ({"model__norm__weight": torch.ones(31)}, r"1 of another shape \(model.norm.weight is \[31\] and should be \[32\]"),
    ({"model__norm__weight": torch.ones(32, dtype=torch.int8)}, "holds model.norm.weight as I8; weights must be"),
])
def test_tensors(directory, tensors, match):
    change_tensors(directory, **tensors)
    refuse(directory, match)


def test_tied_but_saved(tmp_path):
    tensors = fla_checkpoint(tmp_path, "gla_tied")
    embeddings = tensors["model.embeddings.weight"]
    change_tensors(tmp_path, lm_head__weight=embeddings.clone())
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embeddings.weight
    change_tensors(tmp_path, lm_head__weight=embeddings + 1)
    refuse(tmp_path, "ties the head to the embeddings, but the files hold a head of its own")


def test_old_and_new_name_of_one_tensor(tmp_path):
    tensors = fla_checkpoint(tmp_path, "mamba2")
    change_tensors(tmp_path, backbone__embedding__weight=tensors["backbone.embeddings.weight"].clone())
    refuse(tmp_path, r"1 unexpected \(backbone.embedding.weight\)")


def test_a_checkpoint_of_this_library(tmp_path):
    RecurrentLM(RecurrentLMConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1)).save_pretrained(tmp_path)
    refuse(tmp_path, "load it with RecurrentLM.from_pretrained")


def test_missing_files(directory):
    (directory / "model.safetensors").unlink()
    refuse(directory, "neither model.safetensors nor model.safetensors.index.json .pytorch_model", FileNotFoundError)
    refuse(directory, "neither model.safetensors nor", FileNotFoundError, trust_pickle=True)
    (directory / "config.json").unlink()
    refuse(directory, "has no config.json", FileNotFoundError)
    refuse(directory / "nowhere", "is not a directory", FileNotFoundError)
    (directory / "file").write_text("")
    refuse(directory / "file", "is not a directory", FileNotFoundError)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"], ids=["cut off", "a list", "binary"])
def test_broken_configuration(directory, text):
    (directory / "config.json").write_text(text)
    refuse(directory, "config.json (is not JSON|must hold a JSON object)")


def test_broken_safetensors(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuse(directory, "is not a whole safetensors file")


@pytest.mark.parametrize(("index", "error", "match"), [
    ({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, FileNotFoundError, "names two.safetensors"),
    ({"weight_map": {"a": "../one.safetensors"}}, ValueError, "must name files beside it"),
    ({"weight_map": ["one.safetensors"]}, ValueError, "must hold a weight_map"),
    ({}, ValueError, "must hold a weight_map"),
    ([], ValueError, "must hold a weight_map"),
])
def test_broken_index(directory, index, error, match):
    (directory / "model.safetensors").rename(directory / "one.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(directory, match, error)


def test_a_tensor_in_two_shards(directory):
    (directory / "model.safetensors").rename(directory / "one.safetensors")
    stored = files(directory)
    save_file({"lm_head.weight": stored["lm_head.weight"]}, directory / "two.safetensors")
    index = {"weight_map": {"lm_head.weight": "two.safetensors", "model.norm.weight": "one.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(directory, "holds lm_head.weight, which another file of the checkpoint holds too")


@pytest.mark.parametrize("name", ["fla-hub/gla-1.3B-100B", "no such name", "a/b/c"])
@pytest.mark.parametrize("local_files_only", [False, True])
def test_a_name_that_the_hub_does_not_give(name, local_files_only, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuse(name, f"no directory '{name}' here, and the hub did not give", FileNotFoundError,
           local_files_only=local_files_only)
    refuse(name, "at revision 'main'", FileNotFoundError, revision="main", local_files_only=True)


def test_a_device_that_is_not_there_is_told_before_anything_is_fetched(tmp_path):
    refuse(tmp_path / "nowhere", "device 'cuda:77' is not available here", device="cuda:77")


def test_revision_of_a_directory(directory):
    refuse(directory, "which has no revision 'main'", revision="main")


def test_what_is_asked_of_the_hub(directory, monkeypatch):
    """Pickles are fetched only if they are trusted, and there are no safetensors; code never."""
    asked = []

    def snapshot_download(name, **arguments):
        asked.append((name, arguments))
        return str(directory)

    monkeypatch.setattr("lrm_recall.checkpoints.source.snapshot_download", snapshot_download)
    load("someone/model", revision="v1", trust_pickle=True)
    assert asked == [("someone/model", {"revision": "v1", "local_files_only": False, "allow_patterns": [
        "config.json", "model*.safetensors", "model.safetensors.index.json"]})]
    (directory / "model.safetensors").rename(directory / "other")
    refuse("someone/model", "neither", FileNotFoundError)
    refuse("someone/model", "neither", FileNotFoundError, trust_pickle=True)
    patterns = [pattern for _, arguments in asked[1:-1] for pattern in arguments["allow_patterns"]]
    assert not any(".bin" in pattern for pattern in patterns)
    assert "pytorch_model*.bin" in asked[-1][1]["allow_patterns"]
