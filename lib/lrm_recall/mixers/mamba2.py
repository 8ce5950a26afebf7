"""Mamba2 (arXiv 2405.21060), with the parameter and option names of transformers' Mamba2.

B batch, T tokens, D hidden size, E inner channels, H heads, P channels per head, N state channels, G groups of heads
that share B and C, W taps of the short convolution
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from lrm_recall.context import Context
from lrm_recall.mixers._rates import Rates
from lrm_recall.mixers.base import Mixer
from lrm_recall.norms import RMSNormGated
from lrm_recall.ops.conv import short_conv
from lrm_recall.ops.dispatch import fusion
from lrm_recall.ops.linear import project
from lrm_recall.ops.ssd import ssd


class Mamba2(Mixer):
    """A Mamba2 layer (figure 6, sequential block); option names as in transformers' Mamba2Config.

    Args:
        hidden_size: D.
        state_size: N, the channels of B and C.
        expand: E / D.
        head_dim: P; the heads are then E / P.
        n_groups: G.
        conv_kernel: W.
        chunk_size: tokens in a chunk of the recurrence's matrix form, a power of two; no effect on the result.
        use_bias: biases on in_proj and out_proj.
        use_conv_bias: bias on the convolution.
        layer_norm_epsilon: of the gated RMSNorm before out_proj.
        time_step_min, time_step_max, time_step_floor: the initial time steps are drawn log-uniformly between the
            first two, and are at least the third.

    Raises:
        ValueError: head_dim does not divide E, n_groups does not divide the heads, or a time step is out of order.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int = 128,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        conv_kernel: int = 4,
        chunk_size: int = 64,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        layer_norm_epsilon: float = 1e-5,
        time_step_min: float = 0.001,
        time_step_max: float = 0.1,
        time_step_floor: float = 1e-4,
    ) -> None:
        super().__init__()
        inner = expand * hidden_size
        if head_dim < 1 or inner < head_dim or inner % head_dim:
            raise ValueError(
                f"head_dim must divide expand * hidden_size: got head_dim={head_dim}, expand={expand}, "
                f"hidden_size={hidden_size}"
            )
        self.num_heads = inner // head_dim
        if n_groups < 1 or self.num_heads % n_groups:
            raise ValueError(f"n_groups must divide the {self.num_heads} heads, got {n_groups}")
        for option, value in (("expand", expand), ("state_size", state_size), ("conv_kernel", conv_kernel)):
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        if chunk_size < 1 or chunk_size & (chunk_size - 1):
            raise ValueError(f"chunk_size must be a power of two, got {chunk_size}")
        if not 0 < time_step_min <= time_step_max or time_step_floor <= 0:
            raise ValueError(
                "time steps must satisfy 0 < time_step_min <= time_step_max and time_step_floor > 0, got "
                f"{time_step_min}, {time_step_max} and {time_step_floor}"
            )
        self.inner_size, self.head_dim, self.n_groups, self.d_state = inner, head_dim, n_groups, state_size
        self.chunk_size = chunk_size
        self.time_step_min, self.time_step_max = time_step_min, time_step_max
        self.time_step_floor = time_step_floor

        conv_dim = inner + 2 * n_groups * state_size
        self.in_proj = nn.Linear(hidden_size, inner + conv_dim + self.num_heads, bias=use_bias)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, conv_kernel, groups=conv_dim, bias=use_conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = RMSNormGated(inner, group_size=inner // n_groups, eps=layer_norm_epsilon, norm_before_gate=False)
        self.out_proj = nn.Linear(inner, hidden_size, bias=use_bias)
        self.rates = Rates()
        self.init_weights(std=0.0)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D]. The cache holds `conv` [B, W - 1, E + 2GN] and `state` [B, H, P, N] fp32."""
        context = context or Context()
        cache = context.cache
        (projected,) = project(x, self.in_proj)  # [B, T, 2E + 2GN + H]
        A = self.rates(self.A_log)
        if cache is None and context.mask is None and (inner := fusion("mamba2_inner", x)):
            return inner(projected, self.conv1d, self.dt_bias, A, self.D, self.norm, self.out_proj,
                         head_dim=self.head_dim, n_groups=self.n_groups)
        groups = self.n_groups * self.d_state
        gate, xBC, dt = projected.split((self.inner_size, self.inner_size + 2 * groups, self.num_heads), dim=-1)
        padding = None if context.mask is None else ~context.mask.unsqueeze(-1)  # [B, T, 1]
        if padding is not None:
            xBC = xBC.masked_fill(padding, 0)  # what a convolution sees before its first input
        weight = self.conv1d.weight.squeeze(1)  # [E + 2GN, W]
        conv_state, state = (cache.get("conv"), cache.get("state")) if cache else (None, None)
        xBC, conv_state = short_conv(xBC, weight, self.conv1d.bias, conv_state, activation="silu")
        z, B, C = xBC.split((self.inner_size, groups, groups), dim=-1)
        if padding is not None:
            z = z.masked_fill(padding, 0)  # which writes nothing into the state
        z = z.unflatten(-1, (self.num_heads, self.head_dim))  # [B, T, H, P]
        B, C = (y.unflatten(-1, (self.n_groups, self.d_state)) for y in (B, C))  # [B, T, G, N]
        y, state = ssd(
            z, dt, A, B, C, self.D, self.dt_bias,
            initial_state=state, chunk_size=self.chunk_size, output_final_state=cache is not None,
        )  # [B, T, H, P]
        if cache is not None:
            cache["conv"], cache["state"] = conv_state, state
        return project(self.norm(y.flatten(-2), gate), self.out_proj)[0]

    def state_size(self, sequence_length: int | None = None) -> int:
        """H * P * N, whatever the length (StateX, section 3.3, which does not count the convolution's window)."""
        return self.num_heads * self.head_dim * self.d_state

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """As transformers does: A = 1..H, D = 1, time steps log-uniform. Both projections are the model's to fill."""
        init.copy_(self.A_log, torch.arange(1, self.num_heads + 1, dtype=torch.float32).log())
        init.ones_(self.D)
        low, high = math.log(self.time_step_min), math.log(self.time_step_max)
        dt = torch.empty(self.num_heads, dtype=torch.float32).uniform_(low, high).exp().clamp(min=self.time_step_floor)
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        if self.conv1d.bias is not None:
            init.zeros_(self.conv1d.bias)
        init.ones_(self.norm.weight)


MIXER = Mamba2
