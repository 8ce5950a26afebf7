"""A wrong configuration is one clear error, before anything is built."""

import json

import pytest

from lrm_recall import RecurrentLM, RecurrentLMConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer": "glaa"}, "unknown mixer 'glaa' .did you mean 'gla'"),
        ({"mixer_args": {"heads": 2}}, "mixer 'gla' has no option 'heads'"),
        ({"mixer_args": {"num_heads": "2"}}, "'num_heads' must be int, got '2'"),
        ({"mixer_args": {"expand_k": "1e-3"}}, "'expand_k' must be float, got '1e-3'"),
        ({"layer_overrides": {"4": {"num_heads": 1}}}, "layer_overrides names layer '4'; this model has layers 0 to 3"),
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
    with pytest.raises(Exception, match=message):
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
    with pytest.raises(Exception, match="(?i)size|shape"):
        RecurrentLM.from_pretrained(tmp_path)
