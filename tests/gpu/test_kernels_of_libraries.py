"""Every mixer through the libraries' kernels, against its own torch form in fp32 on the same weights."""

import warnings

import pytest
import torch
from closeness import assert_close

from lrm_recall.context import Context
from lrm_recall.mixers.find import mixer_class
from lrm_recall.ops.dispatch import BACKEND_VARIABLE

D = 128
MIXERS = {
    "gla": {"num_heads": 2},
    "deltanet": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "head_dim": 32},
    "retnet": {"num_heads": 2},
    "rwkv4": {},
    "rwkv5": {"head_dim": 32},
    "h3": {"d_state": 16, "head_dim": 2},
    "mamba": {},
    "mamba2": {"head_dim": 32, "state_size": 32},
}
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2}  # the libraries' float32 products run in tf32


def run(mixer, x, padding, pieces=None):
    mask = None if padding == 0 else torch.arange(x.shape[1], device="cuda").expand(x.shape[:2]) >= torch.tensor(
        [[padding], [0]], device="cuda")
    if pieces is None:
        return mixer(x, None if mask is None else Context(mask=mask))
    cache, parts, past = {}, [], 0
    for piece in x.split(pieces, 1):
        real = None if mask is None else mask[:, past : past + piece.shape[1]]
        parts.append(mixer(piece, Context(mask=real, past_length=past, cache=cache)))
        past += piece.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", [1, 37, 300])
@pytest.mark.parametrize("padding", [0, 5])
def test_forward_and_gradients(name, dtype, T, padding, monkeypatch):
    torch.manual_seed(0)
    mixer = mixer_class(name)(D, **MIXERS[name]).cuda()
    mixer.init_weights(0.05)
    mixer = mixer.to(dtype)
    x = torch.randn(2, T, D, device="cuda").to(dtype).requires_grad_()
    results = {}
    for form in ("library", "torch"):
        monkeypatch.setenv(BACKEND_VARIABLE, "torch" if form == "torch" else "auto")
        layer = mixer if form == "library" else mixer.float()
        inputs = x if form == "library" else x.float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what a kernel cannot take runs in torch
            y = run(layer, inputs, min(padding, T - 1))
            weight = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
            parameters = [p for p in layer.parameters() if p.requires_grad]
            gradients = torch.autograd.grad((y.float() * weight).sum(), [x, *parameters], allow_unused=True)
        results[form] = [y, *gradients]
    # Of one token, RMSNorm takes out how much was read: some gradients cancel, and bf16 leaves their rounding.
    compared = 1 if T == 1 and dtype == torch.bfloat16 else len(results["torch"])
    for i, (actual, expected) in enumerate(list(zip(*results.values(), strict=True))[:compared]):
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert_close(actual.float(), expected.float(), TOLERANCE[dtype], f"result {i}", 1e-3)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("padding", [0, 5])
@torch.no_grad()
def test_prefill_then_token_by_token(name, padding):
    torch.manual_seed(0)
    mixer = mixer_class(name)(D, **MIXERS[name]).cuda()
    x = torch.randn(2, 90, D, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        full = run(mixer, x, padding)
        pieces = run(mixer, x, padding, [80, *[1] * 10])
    assert_close(pieces[:, padding:], full[:, padding:], 5e-3)


@torch.no_grad()
def test_a_head_too_wide_for_a_kernel_runs_in_torch_and_says_so():
    mixer = mixer_class("deltanet")(512, num_heads=1).cuda().bfloat16()
    with pytest.warns(RuntimeWarning, match="at most 256 key channels per head, got 512"):
        mixer(torch.randn(1, 80, 512, device="cuda", dtype=torch.bfloat16))


@torch.no_grad()
def test_a_long_prompt_in_groups_of_channels(monkeypatch):
    """Mamba's scan of a prompt that is read in groups: the same numbers, and states that keep nothing alive."""
    from lrm_recall.ops.libraries import mamba_ssm

    torch.manual_seed(0)
    mixer = mixer_class("mamba")(D).cuda().bfloat16()
    x = torch.randn(2, 4100, D, device="cuda").bfloat16()
    caches = [{}, {}]
    whole = mixer(x, Context(cache=caches[0]))
    monkeypatch.setattr(mamba_ssm, "_LARGE", 1)
    monkeypatch.setattr(mamba_ssm, "_GROUP", 96)
    grouped = mixer(x, Context(cache=caches[1]))
    assert torch.equal(grouped, whole)
    for cache in caches:
        assert cache["state"].untyped_storage().nbytes() == 4 * cache["state"].numel()
    assert torch.equal(caches[0]["state"], caches[1]["state"])
