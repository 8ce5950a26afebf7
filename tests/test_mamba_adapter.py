"""The adapters to mamba-ssm, with a stand-in for the library: what they hand over, and in which layout."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from lrm_recall.ops.selective_scan import selective_scan_recurrent

INTERFACE = "mamba_ssm.ops.selective_scan_interface"
NAMES = {
    INTERFACE: ("mamba_inner_fn", "selective_scan_fn"),
    "mamba_ssm.ops.triton.layernorm_gated": ("rmsnorm_fn",),
    "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update",),
    "mamba_ssm.ops.triton.ssd_combined": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
    "lrm_kernels.matvec": ("MOST_ROWS",),
    "lrm_kernels.row_norm": ("row_norm",),
}


@pytest.fixture
def adapters(monkeypatch):
    """The module, with a library whose functions return what they are given as their first argument."""
    for name, functions in NAMES.items():
        module = ModuleType(name)
        for function in functions:
            setattr(module, function, lambda first, *_, **__: first)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "lrm_recall.ops.libraries.mamba_ssm", raising=False)
    yield importlib.import_module("lrm_recall.ops.libraries.mamba_ssm")
    sys.modules.pop("lrm_recall.ops.libraries.mamba_ssm")


class Adapted(nn.Linear):
    """As an adapter in the place of a linear layer: its output is not that of its weight."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(("layer", "as_scan_reads"), [(nn.Linear(8, 12, bias=False), True), (nn.Linear(8, 12), False),
                                                      (Adapted(8, 12, bias=False), False)])  # fmt: skip
def test_the_projection_is_the_layers_own(adapters, layer, as_scan_reads):
    x = torch.randn(3, 5, 8)
    others = [nn.Linear(2, 2) for _ in range(4)]
    given = adapters.mamba_inner(x, layer, *others, torch.ones(2), torch.ones(2))  # [B, 2E, T]
    torch.testing.assert_close(given, layer(x).mT)
    assert (given.stride(-1) == 1) == as_scan_reads


def scan_of_the_library(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
    """Of the library's arguments and layouts; the state is a view of a larger tensor, as its own is."""
    assert delta_softplus == (delta_bias is not None) and return_last_state
    gate = None if z is None else z.mT
    y, state = selective_scan_recurrent(u.mT, delta.mT, A, B.mT, C.mT, D, gate, delta_bias)
    return y.mT, torch.stack((state, state), -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("with_options", [True, False])
def test_a_long_prompt_is_scanned_in_groups_of_channels(adapters, monkeypatch, with_options):
    groups = []

    def scan(u, *arguments, **options):
        groups.append(u.shape[1])
        return scan_of_the_library(u, *arguments, **options)

    monkeypatch.setattr(adapters, "selective_scan_fn", scan)
    monkeypatch.setattr(adapters, "_GROUP", 4)
    B, T, E, N = 2, 7, 10, 3
    x, dt, gate = torch.randn(3, B, T, E)
    arguments = [x, dt.abs(), -torch.rand(E, N), torch.randn(B, T, N), torch.randn(B, T, N)]
    arguments += [torch.randn(E), gate, torch.randn(E)] if with_options else []
    with torch.no_grad():
        expected = adapters.selective_scan(*arguments)
        monkeypatch.setattr(adapters, "_LARGE", B * T * E)
        y, state = adapters.selective_scan(*arguments)
    assert groups == [10, 4, 4, 2]
    torch.testing.assert_close((y, state), expected)
    torch.testing.assert_close((y, state), selective_scan_recurrent(*arguments))
    for kept in (state, expected[1]):
        assert kept.untyped_storage().nbytes() == 4 * B * E * N, "a cache would keep more than the state"


def test_with_gradients_the_scan_is_one(adapters, monkeypatch):
    monkeypatch.setattr(adapters, "selective_scan_fn", scan_of_the_library)
    monkeypatch.setattr(adapters, "_LARGE", 0)
    monkeypatch.setattr(adapters, "_GROUP", None)  # not even asked for
    x, dt = torch.randn(1, 5, 6, requires_grad=True), torch.rand(1, 5, 6)
    others = [dt, -torch.rand(6, 3), torch.randn(1, 5, 3), torch.randn(1, 5, 3)]
    actual, expected = (torch.autograd.grad(form(x, *others)[0].square().sum(), x)
                        for form in (adapters.selective_scan, selective_scan_recurrent))
    torch.testing.assert_close(actual, expected)
    assert adapters.selective_scan(x, *others, output_final_state=False)[1] is None
