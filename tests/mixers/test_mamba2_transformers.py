"""Our Mamba2 against transformers' own Mamba2Mixer on the same weights."""

import pytest
import torch
import transformers
from closeness import assert_close
from packaging.version import Version
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, Mamba2Model

from lrm_recall.context import Context
from lrm_recall.mixers.mamba2 import Mamba2

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="the reference is the pinned transformers' Mamba2"
)

D = 16
OPTIONS = {
    "one group": {"head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 16},
    "two groups": {"head_dim": 4, "state_size": 8, "n_groups": 2, "conv_kernel": 3, "chunk_size": 8},
    "no convolution bias": {"head_dim": 16, "state_size": 4, "n_groups": 1, "use_conv_bias": False, "expand": 3},
    "biases": {"head_dim": 8, "state_size": 4, "n_groups": 1, "use_bias": True, "layer_norm_epsilon": 1e-3},
}


def make_pair(name):
    """Theirs with random parameters throughout, and ours with the same."""
    torch.manual_seed(0)
    options = OPTIONS[name]
    heads = options.get("expand", 2) * D // options["head_dim"]
    config = Mamba2Config(hidden_size=D, num_heads=heads, num_hidden_layers=1, **options)
    theirs, ours = Mamba2Mixer(config, layer_idx=0), Mamba2(D, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, config


@pytest.fixture(params=list(OPTIONS))
def pair(request):
    return make_pair(request.param)


@pytest.mark.parametrize("T", [1, 7, 16, 37])
def test_forward_and_gradients(pair, T):
    theirs, ours, _ = pair
    x, weight = torch.randn(2, T, D), torch.randn(2, T, D)
    results = []
    for mixer in (theirs, ours):
        inputs = {"x": x.clone().requires_grad_(), **dict(mixer.named_parameters())}
        y = mixer(inputs["x"])
        gradients = torch.autograd.grad(y, list(inputs.values()), weight, allow_unused=T == 1)
        results.append((y, dict(zip(inputs, gradients, strict=True))))
    (expected, expected_gradients), (actual, gradients) = results
    assert_close(actual, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        if T == 1 and name == "A_log":  # one token from an empty state does not decay
            assert gradient is None or gradient.abs().max() < 1e-6
        else:
            assert_close(gradient, expected_gradients[name], 5e-5, name)


@pytest.mark.parametrize("prompt", [1, 5, 16, 21])
def test_cached_decoding(pair, prompt):
    theirs, ours, config = pair
    x = torch.randn(2, prompt + 4, D)
    with torch.no_grad():
        their_cache, our_cache, past = DynamicCache(config=config), {}, 0
        for piece in x.split([prompt, 1, 1, 1, 1], dim=1):
            expected = theirs(piece, cache_params=their_cache)
            actual = ours(piece, Context(past_length=past, cache=our_cache))
            assert_close(actual, expected)
            past += piece.shape[1]
        assert_close(our_cache["state"], their_cache.get_recurrent_state(0, state_idx=0))


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "biases"])  # theirs lets in_proj's bias through
def test_left_padding(name):
    theirs, ours, _ = make_pair(name)
    x, mask = torch.randn(2, 20, D), torch.ones(2, 20, dtype=torch.bool)
    mask[0, :7] = False
    expected, actual = theirs(x, attention_mask=mask.long()), ours(x, Context(mask=mask))
    assert_close(actual[mask], expected[mask])


def test_initial_weights():
    """Drawn as transformers draws them, number for number; out_proj is left to the model, like every projection."""
    _, ours, config = make_pair("one group")
    model = Mamba2Model(config)
    theirs = model.layers[0].mixer
    for parameter in theirs.parameters():
        parameter._is_hf_initialized = False
    torch.manual_seed(1)
    model._init_weights(theirs)
    torch.manual_seed(1)
    ours.init_weights(0.02)
    for name in ("A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias", "norm.weight"):
        assert_close(ours.get_parameter(name), theirs.get_parameter(name), 1e-6, name)
    dt = torch.nn.functional.softplus(ours.dt_bias)
    assert dt.min() > 0.00099 and dt.max() < 0.101
