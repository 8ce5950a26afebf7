"""Checkpoints that transformers' own Mamba and Mamba2 write: the same logits, the same tokens."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_files import change_config, change_tensors, files
from closeness import assert_close
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from lrm_recall.checkpoints import load

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 8, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0}
KINDS = {
    "mamba": (MambaConfig, MambaForCausalLM, {}),
    "mamba biased": (MambaConfig, MambaForCausalLM, {"use_bias": True, "use_conv_bias": False, "time_step_rank": 3}),
    "mamba2": (Mamba2Config, Mamba2ForCausalLM, {"num_heads": 8, "head_dim": 8, "n_groups": 2}),
    "mamba2 biased": (Mamba2Config, Mamba2ForCausalLM, {"num_heads": 4, "head_dim": 16, "n_groups": 1, "use_bias": True,
                                                        "layer_norm_epsilon": 1e-3}),
}
IDS = torch.randint(3, 64, (2, 21), generator=torch.Generator().manual_seed(1))


def make(kind: str, **changes) -> PreTrainedModel:
    """A small model whose random weights are large enough that an error in any of them shows in the logits."""
    torch.manual_seed(0)
    config, model, options = KINDS[kind]
    model = model(config(**{**SIZE, **options, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "dt_bias")):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_and_tokens(tmp_path, kind, tied):
    theirs = make(kind, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    assert ("lm_head.weight" in files(tmp_path)) == (not tied)
    ours = load(tmp_path)
    assert (ours.lm_head.weight is ours.model.embeddings.weight) == tied
    with torch.no_grad():
        assert_close(ours(IDS).logits, theirs(IDS).logits)
        greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        tokens = theirs.generate(IDS, **greedy)
        assert torch.equal(ours.generate(IDS, **greedy), tokens) and tokens.shape == (2, 33)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_sharded_and_in_bf16(tmp_path, kind):
    theirs = make(kind).bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = load(tmp_path)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours.model.layers[1].mixer.in_proj.weight, theirs.backbone.layers[1].mixer.in_proj.weight)
    with torch.no_grad():
        assert_close(load(tmp_path, dtype=torch.float32)(IDS).logits, theirs.float()(IDS).logits)


def test_fields_left_by_the_conversion_of_mamba_130m(tmp_path):
    theirs = make("mamba", tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    source = json.loads((tmp_path / "config.json").read_text())
    source.pop("tie_word_embeddings")  # not written then, and tied
    source |= {"_name_or_path": "state-spaces/mamba-130m-hf", "d_inner": 64, "d_model": 32, "fused_add_norm": True,
               "n_layer": 2, "pad_vocab_size_multiple": 8, "rms_norm": True, "ssm_cfg": {}, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(source))
    stored = files(tmp_path)
    change_tensors(tmp_path, backbone__embeddings__weight=None,
                   backbone__embedding__weight=stored["backbone.embeddings.weight"])
    with torch.no_grad():
        assert_close(load(tmp_path)(IDS).logits, theirs(IDS).logits)
    change_config(tmp_path, n_layer=3)
    with pytest.raises(ValueError, match="n_layer must be num_hidden_layers = 2, got 3"):
        load(tmp_path)


def test_residual_stream_in_float32(tmp_path):
    make("mamba2", residual_in_fp32=True).save_pretrained(tmp_path)
    assert load(tmp_path).config.residual_in_fp32
    make("mamba2", residual_in_fp32=False).save_pretrained(tmp_path)
    assert not load(tmp_path).config.residual_in_fp32
