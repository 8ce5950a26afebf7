"""state-spaces' original files: config.json with d_model and ssm_cfg, weights in a pickle.

mamba_ssm cannot be imported without a GPU, but its parameters are those of transformers' Mamba, whose logits are
compared: only the embeddings are called otherwise, and their rows are padded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import write
from closeness import assert_close
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from lrm_recall.checkpoints import load

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 8}
CONFIG = {"d_model": 32, "n_layer": 2, "vocab_size": 61, "rms_norm": True, "residual_in_fp32": True,
          "fused_add_norm": True, "pad_vocab_size_multiple": 8}
SSM = {"mamba": {"d_state": 8}, "mamba2": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 2}}
IDS = torch.randint(0, 61, (2, 21), generator=torch.Generator().manual_seed(1))


def make(kind: str) -> tuple[PreTrainedModel, dict[str, Any], dict[str, Tensor]]:
    """transformers' model, the config.json and the tensors of the same model as state-spaces saves it: tied."""
    torch.manual_seed(0)
    if kind == "mamba":
        model = MambaForCausalLM(MambaConfig(**SIZE, tie_word_embeddings=True))
    else:
        heads = {"num_heads": 8, "head_dim": 8, "n_groups": 2}
        model = Mamba2ForCausalLM(Mamba2Config(**SIZE, **heads, tie_word_embeddings=True))
    tensors = {name.replace("embeddings", "embedding"): tensor for name, tensor in model.state_dict().items()}
    return model.eval(), {**CONFIG, "ssm_cfg": SSM[kind]}, tensors


def write_pickle(directory: Path, config: dict[str, Any], tensors: Any, **how: Any) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    torch.save(tensors, directory / "pytorch_model.bin", **how)


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}], ids=["archive", "old format"])
@pytest.mark.parametrize("kind", SSM)
def test_same_logits_from_a_trusted_pickle(tmp_path, kind, how):
    theirs, config, tensors = make(kind)
    write_pickle(tmp_path, config, tensors, **how)
    with pytest.raises(ValueError, match="pickle.*trust_pickle=True"):
        load(tmp_path)
    ours = load(tmp_path, trust_pickle=True)
    assert ours.config.vocab_size == 64 and ours.lm_head.weight is ours.model.embeddings.weight
    with torch.no_grad():
        assert_close(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("kind", SSM)
def test_same_logits_from_safetensors(tmp_path, kind):
    theirs, config, tensors = make(kind)
    del tensors["lm_head.weight"]
    write(tmp_path, config, tensors)
    (tmp_path / "pytorch_model.bin").write_text("not read where there are safetensors")
    with torch.no_grad():
        assert_close(load(tmp_path, trust_pickle=True)(IDS).logits, theirs(IDS).logits)


def test_sharded_pickle(tmp_path):
    theirs, config, tensors = make("mamba2")
    names = sorted(tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for shard, held in shards.items():
        torch.save({name: tensors[name].clone() for name in held}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with torch.no_grad():
        assert_close(load(tmp_path, trust_pickle=True)(IDS).logits, theirs(IDS).logits)


def test_layer_norm(tmp_path):
    _, config, tensors = make("mamba2")
    tensors |= {name.replace("weight", "bias"): torch.randn_like(tensor) for name, tensor in tensors.items()
                if name.endswith((".norm.weight", "norm_f.weight")) and ".mixer." not in name}
    write_pickle(tmp_path, {**config, "rms_norm": False}, tensors)
    model = load(tmp_path, trust_pickle=True)
    assert model.config.norm == "layernorm"
    assert torch.equal(model.model.layers[1].mixer_norm.bias, tensors["backbone.layers.1.norm.bias"])


class Runs:
    """Something that a pickle would run."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize(
    "content", [Runs(), {"weight": Runs()}, [1, 2], b"broken"], ids=["object", "mapping", "list", "no pickle"]
)
def test_a_pickle_of_anything_but_tensors(tmp_path, content):
    _, config, _ = make("mamba2")
    write_pickle(tmp_path, config, content)
    if isinstance(content, bytes):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as tensors alone|must hold a mapping of names to tensors"):
        load(tmp_path, trust_pickle=True)


@pytest.mark.parametrize(("change", "match"), [
    ({"attn_layer_idx": [1]}, "attn_layer_idx must be"),
    ({"d_intermediate": 64}, "d_intermediate must be 0"),
    ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer must be 'Mamba1'"),
    ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 32}}, "ssm_cfg.d_ssm must be None"),
    ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.0, 0.1]}}, "ssm_cfg.dt_limit must be"),
    ({"ssm_cfg": {"layer": "Mamba2", "d_sate": 8}}, "'ssm_cfg.d_sate'.*did you mean 'ssm_cfg.d_state'"),
    ({"ssm_cfg": [1]}, "ssm_cfg must be a mapping"),
])
def test_what_is_not_supported_is_named(tmp_path, change, match):
    _, config, tensors = make("mamba2")
    write_pickle(tmp_path, {**config, **change}, tensors)
    with pytest.raises(ValueError, match=match):
        load(tmp_path, trust_pickle=True)
