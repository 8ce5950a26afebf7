"""The adapter to mamba-ssm's whole layer, with a stand-in for the library: what it hands over, and in which layout."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

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
def inner(monkeypatch):
    """`mamba_inner`, which returns what the library would have been given as its first argument."""
    for name, functions in NAMES.items():
        module = ModuleType(name)
        for function in functions:
            setattr(module, function, lambda first, *_, **__: first)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "lrm_recall.ops.libraries.mamba_ssm", raising=False)
    yield importlib.import_module("lrm_recall.ops.libraries.mamba_ssm").mamba_inner
    sys.modules.pop("lrm_recall.ops.libraries.mamba_ssm")


class Adapted(nn.Linear):
    """As an adapter in the place of a linear layer: its output is not that of its weight."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(("layer", "as_scan_reads"), [(nn.Linear(8, 12, bias=False), True), (nn.Linear(8, 12), False),
                                                      (Adapted(8, 12, bias=False), False)])  # fmt: skip
def test_the_projection_is_the_layers_own(inner, layer, as_scan_reads):
    x = torch.randn(3, 5, 8)
    others = [nn.Linear(2, 2) for _ in range(4)]
    given = inner(x, layer, *others, torch.ones(2), torch.ones(2))  # [B, 2E, T]
    torch.testing.assert_close(given, layer(x).mT)
    assert (given.stride(-1) == 1) == as_scan_reads
