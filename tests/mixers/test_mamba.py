"""Mamba against transformers' own MambaMixer on the same weights, and its options."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from closeness import assert_close
from packaging.version import Version
from transformers import DynamicCache, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer, MambaModel

from lrm_recall.context import Context
from lrm_recall.mixers.mamba import Mamba

reference = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="the reference is the pinned transformers' Mamba"
)

D = 16
OPTIONS = {
    "default": {},
    "small": {"state_size": 3, "conv_kernel": 3, "time_step_rank": 2},
    "no convolution bias": {"use_conv_bias": False, "expand": 3},
    "biases": {"use_bias": True, "conv_kernel": 2, "state_size": 1},
}


def make_pair(name):
    """Theirs with random parameters throughout, and ours with the same."""
    torch.manual_seed(0)
    options = OPTIONS[name]
    config = MambaConfig(hidden_size=D, num_hidden_layers=1, **options)
    theirs, ours = MambaMixer(config, layer_idx=0), Mamba(D, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours, config


@pytest.fixture(params=list(OPTIONS))
def pair(request):
    return make_pair(request.param)


@reference
@pytest.mark.parametrize("T", [1, 7, 37])
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


@reference
@pytest.mark.parametrize("prompt", [1, 5, 21])
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


@reference
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "biases"])  # theirs lets in_proj's bias through
def test_left_padding(name):
    theirs, ours, _ = make_pair(name)
    x, mask = torch.randn(2, 20, D), torch.ones(2, 20, dtype=torch.bool)
    mask[0, :7] = False
    expected, actual = theirs(x, attention_mask=mask.long()), ours(x, Context(mask=mask))
    assert_close(actual[mask], expected[mask])


@reference
@pytest.mark.parametrize("scheme", ["random", "constant"])
def test_initial_weights(scheme):
    """Drawn as transformers draws them, number for number; out_proj is left to the model, like every projection."""
    options = {"time_step_init_scheme": scheme, "time_step_scale": 0.5, "time_step_rank": 4}
    theirs = MambaModel(MambaConfig(hidden_size=D, num_hidden_layers=1, **options))
    ours = Mamba(D, **options)
    for parameter in theirs.layers[0].mixer.parameters():
        parameter._is_hf_initialized = False
    torch.manual_seed(1)
    theirs._init_weights(theirs.layers[0].mixer)
    torch.manual_seed(1)
    ours.init_weights(0.02)
    for name in ("A_log", "D", "dt_proj.weight", "dt_proj.bias", "conv1d.weight", "conv1d.bias"):
        assert_close(ours.get_parameter(name), theirs.layers[0].mixer.get_parameter(name), 1e-6, name)
    dt = F.softplus(ours.dt_proj.bias)
    assert dt.min() > 0.00099 and dt.max() < 0.101


def test_it_is_its_formula():
    """Algorithm 2, token by token and channel by channel."""
    torch.manual_seed(0)
    mixer, x = Mamba(4, state_size=2, conv_kernel=3), torch.randn(1, 6, 4)
    torch.nn.init.normal_(mixer.A_log)
    u, gate = mixer.in_proj(x)[0].chunk(2, -1)
    u = torch.stack([(mixer.conv1d.weight[:, 0] * F.pad(u, (0, 0, 2, 0))[t : t + 3].T).sum(-1) for t in range(6)])
    u = F.silu(u + mixer.conv1d.bias)  # [T, E]
    dt, B, C = mixer.x_proj(u).split((1, 2, 2), -1)
    dt = torch.log(1 + mixer.dt_proj(dt).exp())  # [T, E]
    y = torch.zeros(6, 8)
    for e in range(8):
        for n in range(2):
            state = 0.0
            for t in range(6):
                state = (-mixer.A_log[e, n].exp() * dt[t, e]).exp() * state + dt[t, e] * B[t, n] * u[t, e]
                y[t, e] += state * C[t, n]
    y = (y + mixer.D * u) * gate * gate.sigmoid()
    assert_close(mixer(x)[0], mixer.out_proj(y))


def test_it_has_the_parameters_of_the_public_130m_checkpoint():
    with torch.device("meta"):
        mixer = Mamba(768)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "in_proj.weight": (3072, 768),
        "conv1d.weight": (1536, 1, 4),
        "conv1d.bias": (1536,),
        "x_proj.weight": (80, 1536),
        "dt_proj.weight": (1536, 48),
        "dt_proj.bias": (1536,),
        "A_log": (1536, 16),
        "D": (1536,),
        "out_proj.weight": (768, 1536),
    }
    assert mixer.state_size() == 1536 * 16


def test_init_weights_fills_what_came_without_values():
    with torch.device("meta"):
        mixer = Mamba(8)
    mixer.to_empty(device="cpu")
    for parameter in mixer.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    mixer.init_weights(0.02)
    left = {name for name, p in mixer.named_parameters() if p.isnan().any()}
    assert left == {"in_proj.weight", "x_proj.weight", "out_proj.weight"}  # the model's, like every plain projection


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand": 0}, "expand must be at least 1, got 0"),
        ({"state_size": 0}, "state_size must be at least 1, got 0"),
        ({"conv_kernel": 0}, "conv_kernel must be at least 1, got 0"),
        ({"time_step_rank": 0}, "time_step_rank must be at least 1, got 0"),
        ({"time_step_min": 0.2}, "got 0.2, 0.1 and 0.0001"),
        ({"time_step_floor": 0.0}, "got 0.001, 0.1 and 0.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba(D, **options)
