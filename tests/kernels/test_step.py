"""One decoded token, against torch: output, and the state changed in place."""

import pytest
import torch
from closeness import assert_close
from torch.nn.functional import normalize

from lrm_kernels.step import fits, step, step_reference

RULES = {  # the shapes of log_decay and beta
    "no decay": (None, False),
    "decay by key": ("key", False),
    "decay by head": ("head", False),
    "delta rule": (None, True),
    "gated delta rule": ("head", True),
}


def drawn(device, dtype, B, H, K, V, rule):
    torch.manual_seed(B + H + K + V)
    q, k = normalize(torch.randn(2, B, H, K), dim=-1).to(device, dtype)
    v, state = torch.randn(B, H, V).to(device, dtype), torch.randn(B, H, K, V, device=device)
    decay, delta = RULES[rule]
    log_decay = None if decay is None else -3 * torch.rand((B, H, K) if decay == "key" else (B, H), device=device)
    return q, k, v, state, {"log_decay": log_decay, "beta": torch.rand(B, H, device=device) if delta else None}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "H", "K", "V"), [(1, 1, 1, 1), (2, 3, 16, 24), (1, 2, 100, 33), (1, 1, 1024, 5)])
def test_step(device, rule, dtype, B, H, K, V):
    q, k, v, state, terms = drawn(device, dtype, B, H, K, V, rule)
    expected, new_state = step_reference(q, k, v, state, scale=0.3, **terms)
    o = step(q, k, v, state, scale=0.3, **terms)
    assert o.dtype == dtype and o.shape == (B, H, V)
    assert_close(o.float(), expected.float(), 1e-5 if dtype == torch.float32 else 1e-2)
    assert_close(state, new_state)


def test_queries_and_keys_brought_to_unit_length(device):
    q, k, v, state, terms = drawn(device, torch.float32, 2, 3, 20, 8, "gated delta rule")
    expected, new_state = step_reference(q, k, v, state, scale=0.3, **terms)  # they are of unit length
    o = step(3 * q, 0.5 * k, v, state, scale=0.3, l2_norm=True, **terms)
    assert_close(o, expected)
    assert_close(state, new_state)


def test_takes_slices_of_a_projection(device):
    q, k, v, state, terms = drawn(device, torch.float32, 2, 3, 8, 8, "decay by key")
    joined = torch.cat([x.flatten(1) for x in (q, k, v)], dim=-1)  # [B, 3 * H * K]
    views = [x.unflatten(-1, (3, 8)) for x in joined.split(24, dim=-1)]
    expected, new_state = step_reference(q, k, v, state, **terms)
    assert_close(step(*views, state, **terms), expected)
    assert_close(state, new_state)


def test_refuses_what_it_cannot_change_in_place(device):
    q, k, v, state, _ = drawn(device, torch.float32, 1, 1, 4, 4, "no decay")
    with pytest.raises(ValueError, match="contiguous float32"):
        step(q, k, v, state.mT)
    with pytest.raises(ValueError, match="contiguous float32"):
        step(q, k, v, state.bfloat16())
    assert fits(1024) and not fits(1025)
    with pytest.raises(ValueError, match="at most 1024 key channels, got 2048"):
        step(q, k, v, torch.zeros(1, 1, 2048, 4, device=device))
