"""H3 (Hungry Hungry Hippos, arXiv 2212.14052, section 3.1), with zoology's parameter names.

    y = output(q * diagonal_ssm(shift_ssm(k) * v))

The shift SSM remembers the last N keys, the diagonal one remembers what was multiplied. With head_dim above 1 the
product of keys and values is an outer product within each head, whose side of the keys the queries sum over.

B batch, T tokens, D hidden size, H heads, K and V the key and value channels of a head, both head_dim, N d_state

Between the projections everything lies in memory with the tokens last, as `long_conv` wants it: no transposition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from lrm_recall.context import Context
from lrm_recall.mixers.base import Mixer
from lrm_recall.ops.conv import long_conv
from lrm_recall.ops.diagonal_ssm import diagonal_ssm

_TIME_STEP_MIN, _TIME_STEP_MAX = 0.001, 0.1


class ShiftSSM(nn.Module):
    """A state that moves up by one at every step, s[t, n] = s[t-1, n-1] + B[n] u[t], and is read by C.

    Its impulse response is as long as the state, so it is a filter of N taps, and the last inputs stand for the state.
    """

    def __init__(self, channels: int, d_state: int) -> None:
        super().__init__()
        self.B = nn.Parameter(torch.empty(channels, d_state))
        self.C = nn.Parameter(torch.empty(1, channels, d_state))
        self.init_weights()

    def forward(self) -> Tensor:
        """The filter, [N, channels]: tap l is the sum over n of B[n] C[n + l]."""
        dtype = torch.promote_types(self.B.dtype, torch.float32)
        N = self.B.shape[1]
        B, C = (torch.fft.rfft(p.to(dtype), n=2 * N) for p in (self.B, self.C[0]))  # [channels, N+1]
        return torch.fft.irfft(B.conj() * C, n=2 * N)[:, :N].T

    def init_weights(self) -> None:
        """B writes to the first element; C as torch initialises a convolution of N taps."""
        init.copy_(self.B, (torch.arange(self.B.shape[1]) == 0).expand_as(self.B))
        bound = self.C.shape[-1] ** -0.5
        init.uniform_(self.C, -bound, bound)


class DiagonalSSM(nn.Module):
    """S4D-Lin (arXiv 2206.11893, sections 3 and 4), discretised by the bilinear rule. Pairs of reals are complex."""

    in_fp32 = True  # frequencies are many times pi, whose neighbours are one number in bfloat16

    def __init__(self, channels: int, d_state: int) -> None:
        super().__init__()
        pairs = d_state // 2
        self.C = nn.Parameter(torch.empty(1, channels, pairs, 2))
        self.log_dt = nn.Parameter(torch.empty(channels))
        self.B = nn.Parameter(torch.empty(channels, pairs, 2))
        self.inv_A_real = nn.Parameter(torch.empty(channels, pairs))
        self.A_imag = nn.Parameter(torch.empty(channels, pairs))
        self.init_weights()

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """decay, write and read of `diagonal_ssm`, each [channels, N/2] complex128."""
        A = torch.complex(-self.inv_A_real.double().exp(), self.A_imag.double())
        B, C = torch.view_as_complex(self.B.double()), torch.view_as_complex(self.C[0].double())
        dt = self.log_dt.double().exp().unsqueeze(-1)  # [channels, 1]
        denominator = 1 - dt * A / 2
        return (1 + dt * A / 2) / denominator, B * dt / denominator, C

    def init_weights(self) -> None:
        """A[n] = -1/2 + i pi n, B = 1, C complex normal, time steps log-uniform."""
        init.normal_(self.C, std=0.5**0.5)
        init.uniform_(self.log_dt, math.log(_TIME_STEP_MIN), math.log(_TIME_STEP_MAX))
        init.copy_(self.B, self.B.new_tensor((1.0, 0.0)).expand_as(self.B))
        init.constant_(self.inv_A_real, math.log(0.5))
        init.copy_(self.A_imag, (math.pi * torch.arange(self.A_imag.shape[1])).expand_as(self.A_imag))


class H3(Mixer):
    """An H3 layer; option names as in zoology.

    zoology's l_max is not among them: it cuts filters off at a length that no sequence of its experiments exceeds, and
    a recurrence has no such length.

    Args:
        hidden_size: D.
        d_state: N, real numbers in the state of each SSM.
        head_dim: K and V.

    Raises:
        ValueError: head_dim does not divide D, or d_state is not even and positive.
    """

    def __init__(self, hidden_size: int, *, d_state: int = 64, head_dim: int = 1) -> None:
        super().__init__()
        if head_dim < 1 or hidden_size % head_dim:
            raise ValueError(f"head_dim must divide hidden_size: got head_dim={head_dim}, hidden_size={hidden_size}")
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state must be even and at least 2, for states in conjugate pairs, got {d_state}")
        self.hidden_size, self.head_dim, self.d_state = hidden_size, head_dim, d_state
        heads = hidden_size // head_dim
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.ssm_k_kernel = nn.ModuleDict({"kernel": ShiftSSM(hidden_size, d_state)})
        self.ssm_k_D = nn.Parameter(torch.randn(hidden_size))
        self.kernel = nn.ModuleDict({"kernel": DiagonalSSM(heads, d_state)})
        self.D = nn.Parameter(torch.randn(heads))
        self.output_linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D].

        The cache holds `shift_state` [B, N - 1, D], the last keys, and `state` [B, K, V, H, N/2, 2] in fp32.
        """
        context = context or Context()
        cache, K = context.cache, self.head_dim
        B, T, _ = x.shape
        q, k, v = (_tokens_last(layer, x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if context.mask is not None:
            k = k.masked_fill(~context.mask.unsqueeze(-1), 0)
        k = self._shift(k, cache)
        # The outer product of keys and values is a batch of sequences, with one filter a head.
        q, k, v = (y.permute(2, 0, 1).unflatten(0, (-1, K)) for y in (q, k, v))  # [H, K or V, B, T]
        kv = (k.unsqueeze(2) * v.unsqueeze(1)).flatten(1, 3)  # [H, K*V*B, T]

        state = None
        if cache and "state" in cache:
            state = torch.view_as_complex(cache["state"]).permute(1, 2, 0, 3, 4).flatten(0, 2)  # [K*V*B, H, N/2]
        y, state = diagonal_ssm(
            kv.permute(1, 2, 0), *self.kernel["kernel"](), self.D,
            initial_state=state, output_final_state=cache is not None,
        )  # [K*V*B, T, H], [K*V*B, H, N/2]
        if cache is not None:
            cache["state"] = torch.view_as_real(state).unflatten(0, (K, K, B)).permute(2, 0, 1, 3, 4, 5).contiguous()
        y = y.permute(2, 0, 1).unflatten(1, (K, K, B))  # [H, K, V, B, T]
        y = (y * q.unsqueeze(2)).sum(1)  # [H, V, B, T]
        y = y.transpose(0, 1).flatten(0, 1).flatten(1).T  # [B*T, V*H]
        return self.output_linear(y).unflatten(0, (B, T))

    def _shift(self, k: Tensor, cache: dict[str, Tensor] | None) -> Tensor:
        """The shift SSM with its skip connection: k [B, T, D] to the same."""
        B, T, D = k.shape
        taps = self.ssm_k_kernel["kernel"]()  # [N, D]
        taps = torch.cat((taps[:1] + self.ssm_k_D, taps[1:]))
        if cache is not None:
            before = cache["shift_state"] if "shift_state" in cache else k.new_zeros(B, self.d_state - 1, D)
            k = torch.cat((before, k), dim=1)  # [B, N-1+T, D]
            cache["shift_state"] = k[:, T:].clone()  # a view would keep all of k
        return long_conv(k, taps, outputs=T)

    def state_size(self, sequence_length: int | None = None) -> int:
        """N - 1 keys, and N numbers for every element of the outer products, whatever the length."""
        return self.hidden_size * (self.d_state - 1) + self.hidden_size * self.head_dim * self.d_state

    def init_weights(self, std: float) -> None:
        self.ssm_k_kernel["kernel"].init_weights()
        self.kernel["kernel"].init_weights()
        init.normal_(self.ssm_k_D)
        init.normal_(self.D)


def _tokens_last(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), [B, T, D]; in memory [D, B, T], which the matrix product of a linear layer writes as easily.

    Not for a single token, nor where there is a hook, or an adapter or a quantiser in the layer's place.
    """
    if x.shape[1] == 1 or type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return layer(x)
    rows = torch.addmm(layer.bias.unsqueeze(-1), layer.weight, x.flatten(0, 1).T)  # [D, B*T]
    return rows.unflatten(1, x.shape[:2]).permute(1, 2, 0)


MIXER = H3
