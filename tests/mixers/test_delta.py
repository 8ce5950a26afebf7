"""DeltaNet and Gated DeltaNet against their formulas written out, the names of public checkpoints, and bad options."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close

from lrm_recall.context import Context
from lrm_recall.mixers.deltanet import DeltaNet
from lrm_recall.mixers.gated_deltanet import GatedDeltaNet

T = 9


def random_weights(mixer, seed=0):
    """Every parameter far from where initialisation would leave it, so that none goes unnoticed."""
    torch.manual_seed(seed)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return mixer, {name.removesuffix(".weight"): p.detach() for name, p in mixer.named_parameters()}


def convolved(x, name, weights):
    """Projection and, if the layer has one, causal convolution of x [T, D], before any activation."""
    y = x @ weights[f"{name}_proj"].T
    if (kernel := weights.get(f"{name}_conv1d")) is None:
        return y
    W, rows = kernel.shape[-1], []
    for t in range(T):
        rows.append(sum(kernel[:, 0, W - 1 - lag] * y[t - lag] for lag in range(min(W, t + 1))))
    return torch.stack(rows)


def loop(q, k, v, decay, beta):
    """One head: q, k [T, K], v [T, V], decay and beta [T] to [T, V]."""
    state, outputs = torch.zeros(q.shape[-1], v.shape[-1], dtype=v.dtype), []
    for t in range(T):
        erased = torch.eye(q.shape[-1], dtype=v.dtype) - beta[t] * torch.outer(k[t], k[t])
        state = decay[t] * erased @ state + beta[t] * torch.outer(k[t], v[t])
        outputs.append(q[t] @ state / q.shape[-1] ** 0.5)
    return torch.stack(outputs)


def normed(o, weight, eps):
    return o / (o.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def l2(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "relu": lambda x: x.clamp(min=0),
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "identity": lambda x: x,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_activation": "relu", "allow_neg_eigval": True},
        {"qk_activation": "elu", "qk_norm": "sum", "use_gate": True, "conv_size": 2},
        {"qk_activation": "identity", "qk_norm": "sum", "use_beta": False},
        {"use_short_conv": False, "use_gate": True, "expand_k": 0.5, "expand_v": 2.0},
        {"use_short_conv": False, "qk_activation": "elu", "use_beta": False, "allow_neg_eigval": True},
    ],
)
def test_deltanet_is_its_formula(options):
    mixer, weights = random_weights(DeltaNet(16, num_heads=2, norm_eps=1e-3, **options).double())
    x = torch.randn(1, T, 16, dtype=torch.float64)
    activation = ACTIVATIONS[options.get("qk_activation", "silu")]
    q, k = (activation(convolved(x[0], name, weights)) for name in "qk")
    v = ACTIVATIONS["silu"](convolved(x[0], "v", weights))
    beta = torch.sigmoid(x[0] @ weights["b_proj"].T) if "b_proj" in weights else torch.ones(T, 2).double()
    beta = beta * (2 if options.get("allow_neg_eigval") else 1)
    heads = []
    for h in range(2):
        key, query, value = (u.chunk(2, -1)[h] for u in (k, q, v))
        if options.get("qk_norm") == "sum":
            query, key = (u / u.abs().sum(-1, keepdim=True) for u in (query, key))
        else:
            query, key = l2(query), l2(key)
        o = normed(loop(query, key, value, torch.ones(T), beta[:, h]), weights["o_norm"], 1e-3)
        if options.get("use_gate"):
            o = o * F.silu(x[0] @ weights["g_proj"].chunk(2)[h].T)
        heads.append(o)
    assert_close(mixer(x)[0], torch.cat(heads, -1) @ weights["o_proj"].T, 1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_v_heads": 4, "expand_v": 1.5, "allow_neg_eigval": True},
        {"use_gate": False, "conv_size": 2, "num_v_heads": 6},
        {"use_short_conv": False},
    ],
)
def test_gated_deltanet_is_its_formula(options):
    mixer, weights = random_weights(GatedDeltaNet(16, head_dim=4, num_heads=2, norm_eps=1e-3, **options))
    x = torch.randn(1, T, 16)
    q, k, v = (F.silu(convolved(x[0], name, weights)) for name in "qkv")
    H = options.get("num_v_heads", 2)
    beta = torch.sigmoid(x[0] @ weights["b_proj"].T) * (2 if options.get("allow_neg_eigval") else 1)
    dt = torch.log1p(torch.exp(x[0] @ weights["a_proj"].T + weights["dt_bias"]))
    decay = torch.exp(-torch.exp(weights["A_log"]) * dt)
    heads = []
    for h in range(H):
        shared = h * 2 // H  # the first heads of values share the first head of queries and keys
        query, key, value = l2(q.chunk(2, -1)[shared]), l2(k.chunk(2, -1)[shared]), v.chunk(H, -1)[h]
        o = normed(loop(query, key, value, decay[:, h], beta[:, h]), weights["o_norm"], 1e-3)
        if options.get("use_gate", True):
            o = o * F.silu(x[0] @ weights["g_proj"].chunk(H)[h].T)
        heads.append(o)
    assert_close(mixer(x)[0], torch.cat(heads, -1) @ weights["o_proj"].T)


def shapes(make):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in make().named_parameters()}


def test_deltanet_has_the_parameters_of_the_public_1_3b_checkpoint():
    square, convolution = (2048, 2048), (2048, 1, 4)
    assert shapes(lambda: DeltaNet(2048)) == {
        "q_proj.weight": square, "k_proj.weight": square, "v_proj.weight": square, "b_proj.weight": (16, 2048),
        "q_conv1d.weight": convolution, "k_conv1d.weight": convolution, "v_conv1d.weight": convolution,
        "o_norm.weight": (128,), "o_proj.weight": square,
    }  # fmt: skip


def test_gated_deltanet_has_flas_parameters():
    assert shapes(lambda: GatedDeltaNet(2048, num_v_heads=12)) == {
        "q_proj.weight": (1536, 2048), "k_proj.weight": (1536, 2048), "v_proj.weight": (6144, 2048),
        "g_proj.weight": (6144, 2048), "a_proj.weight": (12, 2048), "b_proj.weight": (12, 2048),
        "A_log": (12,), "dt_bias": (12,),
        "q_conv1d.weight": (1536, 1, 4), "k_conv1d.weight": (1536, 1, 4), "v_conv1d.weight": (6144, 1, 4),
        "o_norm.weight": (512,), "o_proj.weight": (2048, 6144),
    }  # fmt: skip


def test_what_an_option_turns_off_leaves_no_parameter():
    bare = shapes(lambda: DeltaNet(16, num_heads=2, use_beta=False, use_short_conv=False))
    assert set(bare) == {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_norm.weight", "o_proj.weight"}
    assert "g_proj.weight" not in shapes(lambda: GatedDeltaNet(16, use_gate=False))


def test_state_size_is_that_of_the_state():
    """The convolutions' windows are not counted, as for Mamba2."""
    for mixer in (DeltaNet(16, num_heads=2, expand_v=2.0), GatedDeltaNet(16, head_dim=4, num_heads=2, num_v_heads=4)):
        cache = {}
        mixer(torch.randn(1, 5, 16), Context(cache=cache))
        assert mixer.state_size() == cache["state"].numel()
        assert {name: tuple(cache[name].shape) for name in cache if name != "state"} == {
            f"{name}_conv": (1, 3, getattr(mixer, f"{name}_proj").out_features) for name in "qkv"
        }


@pytest.mark.parametrize(
    ("make", "K"),
    [
        (lambda: DeltaNet(16, num_heads=2), 8),
        (lambda: DeltaNet(16, num_heads=2, qk_activation="elu"), 8),  # its keys are not zero where the input is
        (lambda: GatedDeltaNet(16, head_dim=4, num_heads=2), 4),
    ],
)
def test_padding_leaves_the_state_as_it_was(make, K):
    mixer, _ = random_weights(make())
    state = torch.randn(1, 2, K, 8)
    cache = {"state": state}
    for length in (1, 5):
        mixer(torch.randn(1, length, 16), Context(mask=torch.zeros(1, length, dtype=torch.bool), cache=cache))
    assert torch.equal(cache["state"], state)
    assert all(cache[f"{name}_conv"].eq(0).all() for name in "qkv")


def test_initial_decays_are_those_of_mamba2():
    torch.manual_seed(0)
    mixer = GatedDeltaNet(16, head_dim=1, num_heads=4000)
    rate, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert rate.min() > 0 and rate.max() <= 16 and abs(rate.mean() - 8) < 0.5  # uniform
    assert dt.min() > 0.00099 and dt.max() < 0.101 and abs(dt.log().mean() - math.log(0.01)) < 0.1


@pytest.mark.parametrize("make", [lambda: DeltaNet(16, num_heads=2), lambda: GatedDeltaNet(16, head_dim=4)])
def test_init_weights_fills_what_came_without_values(make):
    """As transformers does after building a model on the meta device."""
    with torch.device("meta"):
        mixer = make()
    mixer.to_empty(device="cpu")
    for tensor in mixer.state_dict().values():
        tensor.fill_(float("nan"))
    mixer.init_weights(0.02)
    linear = {id(p) for m in mixer.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()}
    for name, tensor in mixer.named_parameters():
        assert id(tensor) in linear or tensor.isfinite().all(), name
    assert 0.01 < mixer.q_conv1d.weight.std() < 0.03


@pytest.mark.parametrize(
    ("mixer", "options", "message"),
    [
        (DeltaNet, {"num_heads": 3}, "num_heads=3, hidden_size=16, expand_k giving 16 channels"),
        (DeltaNet, {"num_heads": 8, "expand_v": 0.25}, "expand_v giving 4 channels"),
        (DeltaNet, {"num_heads": 2, "expand_k": 0.4}, "expand_k giving 6.4 channels"),
        (DeltaNet, {"num_heads": 0}, "num_heads=0"),
        (DeltaNet, {"num_heads": 2, "expand_v": -1.0}, "expand_v giving -16 channels"),
        (DeltaNet, {"conv_size": 0}, "conv_size must be at least 1, got 0"),
        (DeltaNet, {"qk_activation": "gelu"}, "qk_activation must be one of silu, relu, elu, identity, got 'gelu'"),
        (DeltaNet, {"qk_norm": "l1"}, "qk_norm must be one of l2, sum, got 'l1'"),
        (GatedDeltaNet, {"head_dim": 0}, "head_dim must be at least 1, got 0"),
        (GatedDeltaNet, {"num_heads": 0}, "num_heads must be at least 1, got 0"),
        (GatedDeltaNet, {"num_heads": 4, "num_v_heads": 6}, "num_heads must divide num_v_heads, got 4 and 6"),
        (GatedDeltaNet, {"num_v_heads": 0}, "num_heads must divide num_v_heads, got 6 and 0"),
        (GatedDeltaNet, {"head_dim": 4, "expand_v": 1.3}, "whole number: got head_dim=4, expand_v=1.3"),
        (GatedDeltaNet, {"expand_v": 0.0}, "whole number: got head_dim=256, expand_v=0.0"),
        (GatedDeltaNet, {"conv_size": 0}, "conv_size must be at least 1, got 0"),
    ],
)
def test_bad_options(mixer, options, message):
    with pytest.raises(ValueError, match=message):
        mixer(16, **options)
