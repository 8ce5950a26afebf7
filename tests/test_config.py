"""A wrong configuration is one clear error, before anything is built."""

import json

import pytest
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

from lrm_recall import RecurrentLM, RecurrentLMConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer": "glaa"}, "unknown mixer 'glaa' .did you mean 'gla'"),
        ({"mixer_args": {"heads": 2}}, "mixer 'gla' has no option 'heads'"),
        ({"mixer_args": {"num_heads": "2"}}, "'num_heads' must be int, got '2'"),
        ({"mixer_args": {"expand_k": "1e-3"}}, "'expand_k' must be float, got '1e-3'"),
        ({"layer_overrides": {"4": {"num_heads": 1}}}, "layer_overrides names layer 4; this model has layers 0 to 3"),
        ({"layer_overrides": {"0": {"head": 1}}}, "layer_overrides of layer 0.* has no option 'head'"),
        ({"resona": {"layers": [4]}}, "resona names layer 4; this model has layers 0 to 3"),
        ({"resona": {"layers": [-1]}}, "resona names layer -1"),
        ({"resona": {"chunk_size": 2}}, "resona must name its layers"),
        ({"resona": {"layers": [0], "top_k": 0}}, "top_k must be at least 1, got 0"),
        ({"resona": {"layers": [0], "topk": 1}}, "did you mean 'top_k'"),
        ({"resona": {"layers": [0], "num_heads": 7}}, "num_heads 7 does not divide the hidden size 128"),
        ({"resona": {"layers": [0], "encoder": "max"}}, "'encoder' must be"),
        ({"hidden_sise": 64}, "no field 'hidden_sise' .did you mean 'hidden_size'"),
        ({"mlp": "gelu"}, "mlp must be one of swiglu, none, got 'gelu'"),
        ({"norm": "batch"}, "norm must be one of rmsnorm, layernorm"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    ],
)
def test_clear_error(fields, message):
    with pytest.raises(ValueError, match=message):
        RecurrentLMConfig(**fields)


def test_a_head_count_that_does_not_divide():
    with pytest.raises(ValueError, match="num_heads=3"):
        RecurrentLM(RecurrentLMConfig(hidden_size=64, num_hidden_layers=1, mixer_args={"num_heads": 3}))


def test_integer_layers_become_strings_for_json():
    config = RecurrentLMConfig(layer_overrides={1: {"num_heads": 1}})
    assert config.mixer_options(1) == {"num_heads": 1} and config.mixer_options(0) == {}
    assert json.loads(config.to_json_string())["layer_overrides"] == {"1": {"num_heads": 1}}


def test_a_checkpoint_of_another_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    with pytest.raises(ValueError, match="llama"):
        RecurrentLM.from_pretrained(tmp_path)


def test_a_checkpoint_whose_tensors_do_not_fit(tmp_path):
    small = RecurrentLMConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, mixer_args={"num_heads": 2})
    RecurrentLM(small).save_pretrained(tmp_path)
    RecurrentLMConfig(**{**small.to_dict(), "hidden_size": 32}).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        RecurrentLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"norm_eps": "1e-3"}, "norm_eps must be float, got '1e-3'"), ({"vocab_size": "50"}, "vocab_size must be int"),
     ({"hidden_size": "1e2"}, "hidden_size must be int"), ({"mixer": 3}, "mixer must be str, got 3"),
     ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be bool"), ({"mixer_args": [1]}, "mixer_args must be"),
     ({"layer_overrides": {"0": 3}}, "layer_overrides must be"), ({"layer_overrides": {"01": {}}}, "names layer '01'"),
     ({"layer_overrides": {"²": {}}}, "names layer '²'"), ({"resona": {"layers": ["0"]}}, "resona names layer '0'"),
     ({"resona": {"layers": [True]}}, "resona names layer True"),
     ({"resona": {"layers": [0, 0]}}, "names a layer twice"),
     ({"mixer": "mamba2", "mixer_args": {"chunk_size": 48}}, "chunk_size must be a power of two, got 48")],
)
def test_types_and_keys_are_checked_before_anything_is_built(fields, message):
    with pytest.raises(ValueError, match=message):
        RecurrentLMConfig(**fields)


def test_tensors_of_another_architecture_are_not_filled_up_at_random(tmp_path):
    theirs = Mamba2Config(hidden_size=16, num_heads=4, head_dim=8, state_size=8, n_groups=1, vocab_size=16,
                          num_hidden_layers=1)
    Mamba2ForCausalLM(theirs).save_pretrained(tmp_path)
    ours = RecurrentLMConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, mixer="mamba2", mlp="none",
                             mixer_args={"head_dim": 8, "state_size": 8})
    with pytest.raises(ValueError, match="lacks .* tensors of this model"):
        RecurrentLM.from_pretrained(tmp_path, config=ours)


def test_auto_classes_know_the_architecture(tmp_path):
    small = RecurrentLMConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, mixer_args={"num_heads": 2})
    RecurrentLM(small).save_pretrained(tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), RecurrentLM)
