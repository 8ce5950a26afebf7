"""Causal depthwise convolutions: a short one with a state, and a long one.

B batch, T tokens, D channels, W taps of the short filter, L length of the long one
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ShortConv(torch.autograd.Function):
    """Each tap as one fused multiply-add over the whole sequence, in the [B, T, D] layout that the mixers use.

    On a CPU conv1d needs the transposed layout, and its depthwise backward pass is several times slower than this.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        W = weight.shape[1]
        T = x.shape[1] - W + 1
        y = x[:, W - 1 :] * weight[:, W - 1]  # [B, T, D]
        if bias is not None:
            y += bias
        for w in range(W - 1):
            y.addcmul_(x[:, w : w + T], weight[:, w])
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        W, T = weight.shape[1], grad.shape[1]
        grad_x = torch.zeros_like(x)
        grad_weight = torch.empty_like(weight)
        for w in range(W):
            grad_x[:, w : w + T].addcmul_(grad, weight[:, w])
            grad_weight[:, w] = (grad * x[:, w : w + T]).sum((0, 1))
        return grad_x, grad_weight, grad.sum((0, 1)) if ctx.needs_input_grad[2] else None


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution: y[t] = bias + sum over w of weight[:, w] * x[t - W + 1 + w].

    Args:
        x: [B, T, D].
        weight: [D, W], the last tap on the token itself.
        bias: [D].
        state: [B, W - 1, D], the inputs before x; zeros by default.

    Returns:
        y [B, T, D], and the last W - 1 inputs, the state to continue from. Differentiable once.
    """
    before = weight.shape[1] - 1
    x = F.pad(x, (0, 0, before, 0)) if state is None else torch.cat((state, x), dim=1)  # [B, W-1+T, D]
    return _ShortConv.apply(x, weight, bias), x[:, x.shape[1] - before :]


def long_conv(x: Tensor, kernel: Tensor, *, block_size: int = 128) -> Tensor:
    """Causal convolution with a filter as long as the sequence: y[t] = sum over s of kernel[s] * x[t - s].

    One FFT over the sequence would let rounding errors of later inputs reach earlier outputs, and gradients too. Here
    each block of S tokens is a product with a triangular Toeplitz matrix; then blocks are paired, and pairs paired
    again, and the later half of every pair adds what it sees of the earlier half, through an FFT. So no output depends
    on a later input, not even by rounding.

    Args:
        x: [B, T, D].
        kernel: [L, D], of which the first T taps are used; L >= T.
        block_size: S, at most. Up to the default the matrix product is about as fast as the FFT.

    Returns:
        [B, T, D] in x's dtype, computed in fp32 (fp64 for fp64).
    """
    B, T, D = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    S = min(T, block_size)
    N = 1 << (-(-T // S) - 1).bit_length()  # blocks, a power of two
    kernel = F.pad(kernel[:T].to(dtype).T, (0, N * S - T))  # [D, N*S]
    u = F.pad(x.to(dtype).permute(2, 0, 1), (0, N * S - T))  # [D, B, N*S], channels first: the FFTs run over rows

    # Row j of the Toeplitz matrix, input j's part in every output, is the filter moved j to the right.
    shifted = F.pad(kernel[:, :S], (S - 1, 0)).unfold(-1, S, 1).flip(1)  # [D, S, S]
    y = u.reshape(D, B * N, S) @ shifted  # [D, B*N, S]
    while u.shape[-1] > S:
        earlier = u.view(D, B, -1, 2, S)[..., 0, :]  # [D, B, N/2, S]
        spectrum = torch.fft.rfft(earlier, n=2 * S) * torch.fft.rfft(kernel[:, None, None, : 2 * S])
        seen = torch.fft.irfft(spectrum, n=2 * S)[..., S:]  # [D, B, N/2, S]; the wrap-around falls on the first half
        y = y.view(D, B, -1, 2, S)
        y = torch.cat((y[..., 0, :], y[..., 1, :] + seen), dim=-1)  # [D, B, N/2, 2*S]
        S *= 2
    return y.view(D, B, -1)[..., :T].permute(1, 2, 0).to(x.dtype)
