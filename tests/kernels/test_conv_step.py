"""One token of a short convolution, against torch: output, and the window moved on in place."""

import pytest
import torch
from closeness import assert_close

from lrm_kernels.conv_step import conv_step, conv_step_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "D", "W"), [(1, 1, 1), (2, 300, 4), (3, 256, 2), (1, 40, 7)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_several_tokens_in_turn(device, dtype, B, D, W, bias, silu):
    torch.manual_seed(B + D + W)
    wider = torch.randn(5, B, D + 3).to(device, dtype)  # the token is a slice of a projection
    window, weight = torch.randn(B, W - 1, D).to(device, dtype), torch.randn(D, W).to(device, dtype)
    b = torch.randn(D).to(device, dtype) if bias else None
    expected_window = window.clone()
    for token in wider:
        x = token[:, :D]
        expected, expected_window = conv_step_reference(x, expected_window, weight, b, silu=silu)
        y = conv_step(x, window, weight, b, silu=silu)
        assert y.dtype == dtype
        assert_close(y.float(), expected.float(), 1e-6 if dtype == torch.float32 else 1e-2)
        assert torch.equal(window, expected_window)


def test_refuses_a_view(device):
    with pytest.raises(ValueError, match="contiguous"):
        conv_step(torch.zeros(1, 4, device=device), torch.zeros(1, 4, 3, device=device).mT, torch.zeros(4, 4))
