"""RMS norms of a few rows, against torch."""

import pytest
import torch
from closeness import assert_close

from lrm_kernels.row_norm import MOST_ROWS, row_norm, row_norm_reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 1, 100), (2, 1, 1), (2, 1, 4, 48)])
@pytest.mark.parametrize("gate", [None, "behind", "before"])
def test_row_norm(device, dtype, shape, gate):
    torch.manual_seed(sum(shape))
    width = torch.Size(shape[2:]).numel()
    x, weight = torch.randn(shape).to(device, dtype), torch.rand(shape[-1]).to(device, dtype)
    wider = torch.randn(*shape[:2], width + 10).to(device, dtype)  # the gate is a slice of a projection
    options = {"gate": wider[..., :width].unflatten(-1, shape[2:]), "gate_first": gate == "before"} if gate else {}
    actual = row_norm(x, weight, 1e-5, **options)
    assert actual.dtype == dtype
    assert_close(actual.float(), row_norm_reference(x, weight, 1e-5, **options).float(), TOLERANCE[dtype])


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_adds_to_the_residual_stream(device, stream):
    x, residual = torch.randn(2, 1, 40).to(device, torch.bfloat16), torch.randn(2, 1, 40).to(device, stream)
    weight = torch.rand(40).to(device, torch.bfloat16)
    y, total = row_norm(x, weight, 1e-5, residual=residual)
    assert y.dtype == torch.bfloat16 and total.dtype == stream
    # Triton's interpreter cuts to bf16 where a GPU rounds
    assert_close(total.float(), x.float() + residual.float(), 1e-6 if stream == torch.float32 else 1e-2)
    assert_close(y.float(), row_norm_reference(x, weight, 1e-5, residual=residual).float(), 1e-2)


def test_rows_take_turns_in_the_groups_of_a_weight(device):
    x, gate, weight = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 3, 8), torch.rand(24)
    actual = row_norm(x.to(device), weight.to(device), 1e-5, gate=gate.to(device), gate_first=True).cpu()
    for group in range(3):
        part = weight[8 * group : 8 * group + 8]
        expected = row_norm_reference(x[:, :, group], part, 1e-5, gate=gate[:, :, group], gate_first=True)
        assert_close(actual[:, :, group], expected)


def test_refuses_many_rows(device):
    with pytest.raises(ValueError, match=f"at most {MOST_ROWS} rows, got {MOST_ROWS + 1}"):
        row_norm(torch.zeros(MOST_ROWS + 1, 4, device=device), torch.ones(4, device=device), 1e-5)
