"""Causal depthwise convolutions: a short one with a state, and a long one.

B batch, T tokens, D channels, W taps of the short filter, L length of the long one
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrm_recall.ops.dispatch import dispatched


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


def short_conv_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution: y[t] = bias + sum over w of weight[:, w] * x[t - W + 1 + w].

    Args:
        x: [B, T, D].
        weight: [D, W], the last tap on the token itself.
        bias: [D].
        state: [B, W - 1, D], the inputs before x; zeros by default.
        activation: "silu" to apply it to y, or None.

    Returns:
        y [B, T, D], and the last W - 1 inputs, the state to continue from. Differentiable once.
    """
    before = weight.shape[1] - 1
    x = F.pad(x, (0, 0, before, 0)) if state is None else torch.cat((state, x), dim=1)  # [B, W-1+T, D]
    y = _ShortConv.apply(x, weight, bias)
    return F.silu(y) if activation == "silu" else y, x[:, x.shape[1] - before :].clone()  # a view would keep all of x


short_conv = dispatched("short_conv", short_conv_torch)


class _LongConv(torch.autograd.Function):
    """Channels first, so that the transforms run over rows; T = N * S. Autograd would do twice the work backwards."""

    @staticmethod
    def forward(ctx, u: Tensor, kernel: Tensor, taps: int, S: int) -> Tensor:
        ctx.save_for_backward(u, kernel)
        ctx.taps, ctx.S = taps, S
        return _by_blocks(u, kernel, taps, S)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        u, kernel = ctx.saved_tensors
        grad, T = grad.contiguous(), u.shape[-1]
        grad_u = _by_blocks(grad.flip(-1), kernel, ctx.taps, ctx.S).flip(-1)  # the same convolution, from the end
        grad_kernel = None
        if ctx.needs_input_grad[1]:  # every tap reads every position, so one transform of the whole sequence will do
            spectrum = (torch.fft.rfft(u, n=2 * T).conj() * torch.fft.rfft(grad, n=2 * T)).sum(1)  # [D, T+1]
            grad_kernel = torch.fft.irfft(spectrum, n=2 * T)[:, :T]
        return grad_u, grad_kernel, None, None


def _by_blocks(u: Tensor, kernel: Tensor, taps: int, S: int) -> Tensor:
    """u [D, B, N*S] convolved with kernel [D, N*S], N a power of two; the kernel is zero after `taps`."""
    D, B, T = u.shape
    # Row j of the Toeplitz matrix, input j's part in every output, is the filter moved j to the right.
    shifted = F.pad(kernel[:, :S], (S - 1, 0)).unfold(-1, S, 1).flip(1)  # [D, S, S]
    y = (u.view(D, -1, S) @ shifted).view(D, B, T)
    while S < T:
        R = min(S, taps)  # how far the filter reaches over the border between the halves
        earlier = u.view(D, B, -1, 2, S)[..., 0, S - R :]  # [D, B, N/2, R]
        spectrum = torch.fft.rfft(earlier, n=2 * R).mul_(torch.fft.rfft(kernel[:, None, None, : 2 * R]))
        # The wrap-around falls on the first half.
        y.view(D, B, -1, 2, S)[..., 1, :R] += torch.fft.irfft(spectrum, n=2 * R)[..., R:]
        S *= 2
    return y


def _rows(x: Tensor, length: int) -> Tensor:
    """x [..., T] as contiguous rows, with zeros up to the length."""
    missing = length - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x.contiguous()


def long_conv_torch(
    x: Tensor, kernel: Tensor, *, outputs: int | None = None, block_size: int | None = None
) -> Tensor:
    """Causal convolution with a filter as long as the sequence: y[t] = sum over s of kernel[s] * x[t - s].

    One FFT over the sequence would let rounding errors of later inputs reach earlier outputs, and gradients too. Here
    each block of S tokens is a product with a triangular Toeplitz matrix; then blocks are paired, and pairs paired
    again, and the later half of every pair adds what it sees of the earlier half, through an FFT. So no output depends
    on a later input, not even by rounding.

    Args:
        x: [B, T, D]; with the strides of a contiguous [D, B, T] nothing is transposed, and the result has them too.
        kernel: [L, D]; taps after the T-th are not used, and missing ones are zero.
        outputs: how many outputs are wanted, the last ones; all T by default. One takes no FFT.
        block_size: S, at most. Up to the default, 128 on a CPU and 512 on a GPU, the matrix product is about as fast as
            the FFT.

    Returns:
        [B, outputs, D] in x's dtype, computed in fp32 (fp64 for fp64). Differentiable once.
    """
    T = x.shape[1]
    outputs = T if outputs is None else outputs
    block_size = (512 if x.is_cuda else 128) if block_size is None else block_size
    x_dtype, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, kernel = x.to(dtype), kernel[:T].to(dtype)
    taps = kernel.shape[0]
    if outputs == 1:
        return (x[:, T - taps :] * kernel.flip(0)).sum(1, keepdim=True).to(x_dtype)  # [B, 1, D]
    N = 1 << (-(-T // block_size) - 1).bit_length()  # blocks, a power of two
    S = min(block_size, -(-T // (8 * N)) * 8)  # no longer than N blocks must be, and a length that suits the FFT
    u, kernel = _rows(x.permute(2, 0, 1), N * S), _rows(kernel.T, N * S)  # [D, B, N*S], [D, N*S]
    with torch.autocast(x.device.type, enabled=False):  # it would take the products to bfloat16
        y = _LongConv.apply(u, kernel, taps, S)  # [D, B, N*S]
    return y[..., T - outputs : T].permute(1, 2, 0).to(x_dtype)


long_conv = dispatched("long_conv", long_conv_torch)
