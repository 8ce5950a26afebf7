"""Mamba (arXiv 2312.00752), with the parameter and option names of transformers' Mamba.

B batch, T tokens, D hidden size, E inner channels, N state channels, R rank of the time step's projection, W taps of
the short convolution
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from lrm_recall.context import Context
from lrm_recall.mixers._rates import Rates
from lrm_recall.mixers.base import Mixer
from lrm_recall.norms import RMSNorm
from lrm_recall.ops.conv import short_conv
from lrm_recall.ops.dispatch import fusion
from lrm_recall.ops.linear import project
from lrm_recall.ops.selective_scan import selective_scan


class SelectiveSSM(nn.Module):
    """What stands between Mamba's two projections: convolution, selective scan and gate, over E channels (algorithm 2).

    Mamba is this with projections around it; Hymba has it as one of its branches.

    Args:
        inner_size: E.
        state_size: N.
        conv_kernel: W.
        time_step_rank: R.
        use_conv_bias: bias on the convolution.
        time_step_scale, time_step_init_scheme: the time step's projection starts constant at, or uniform up to,
            time_step_scale / sqrt(R).
        time_step_min, time_step_max, time_step_floor: the initial time steps are drawn log-uniformly between the
            first two, and are at least the third.
        norm_eps: of an RMSNorm on each of the time step's R channels, B and C, as in Hymba; None for no norms.

    Raises:
        ValueError: a size is not positive, or a time step is out of order.
    """

    def __init__(
        self,
        inner_size: int,
        *,
        state_size: int,
        conv_kernel: int,
        time_step_rank: int,
        use_conv_bias: bool = True,
        time_step_scale: float = 1.0,
        time_step_init_scheme: Literal["random", "constant"] = "random",
        time_step_min: float = 0.001,
        time_step_max: float = 0.1,
        time_step_floor: float = 1e-4,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        sizes = {"state_size": state_size, "conv_kernel": conv_kernel, "time_step_rank": time_step_rank}
        for option, value in sizes.items():
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        if not 0 < time_step_min <= time_step_max or time_step_floor <= 0:
            raise ValueError(
                "time steps must satisfy 0 < time_step_min <= time_step_max and time_step_floor > 0, got "
                f"{time_step_min}, {time_step_max} and {time_step_floor}"
            )
        self.inner_size, self.d_state, self.time_step_rank = inner_size, state_size, time_step_rank
        self.time_step_scale, self.time_step_init_scheme = time_step_scale, time_step_init_scheme
        self.time_step_min, self.time_step_max = time_step_min, time_step_max
        self.time_step_floor = time_step_floor

        self.conv1d = nn.Conv1d(inner_size, inner_size, conv_kernel, groups=inner_size, bias=use_conv_bias)
        self.x_proj = nn.Linear(inner_size, time_step_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(time_step_rank, inner_size)
        self.A_log = nn.Parameter(torch.empty(inner_size, state_size))
        self.D = nn.Parameter(torch.empty(inner_size))
        self.dt_layernorm = nn.Identity() if norm_eps is None else RMSNorm(time_step_rank, eps=norm_eps)
        self.B_layernorm = nn.Identity() if norm_eps is None else RMSNorm(state_size, eps=norm_eps)
        self.C_layernorm = nn.Identity() if norm_eps is None else RMSNorm(state_size, eps=norm_eps)
        self.rates = Rates()
        self.init_ssm()

    def ssm(self, x: Tensor, gate: Tensor, context: Context) -> Tensor:
        """x and gate [B, T, E] to [B, T, E]. The cache holds `conv` [B, W - 1, E] and `state` [B, E, N] fp32."""
        cache = context.cache
        padding = None if context.mask is None else ~context.mask.unsqueeze(-1)  # [B, T, 1]
        if padding is not None:
            x = x.masked_fill(padding, 0)  # what the convolution sees before a sequence
        conv_state, state = (cache.get("conv"), cache.get("state")) if cache else (None, None)
        weight = self.conv1d.weight.squeeze(1)  # [E, W]
        x, conv_state = short_conv(x, weight, self.conv1d.bias, conv_state, activation="silu")

        if padding is not None:
            x = x.masked_fill(padding, 0)  # which writes nothing into the state
        dt, B, C = project(x, self.x_proj)[0].split((self.time_step_rank, self.d_state, self.d_state), dim=-1)
        dt, B, C = self.dt_layernorm(dt), self.B_layernorm(B), self.C_layernorm(C)  # [B, T, R or N]
        weight = self.dt_proj.weight  # its bias is added by the scan, in fp32
        dt = (weight @ dt.mT).mT if x.is_cuda else F.linear(dt, weight)  # [B, T, E]; the GPU's scan reads along T
        y, state = selective_scan(
            x, dt, self.rates(self.A_log), B, C, self.D, gate, self.dt_proj.bias,
            initial_state=state, output_final_state=cache is not None,
        )  # [B, T, E]
        if cache is not None:
            cache["conv"], cache["state"] = conv_state, state
        return y

    @torch.no_grad()
    def init_ssm(self) -> None:
        """As transformers does: A = 1..N, D = 1, time steps log-uniform. x_proj and norms are the model's to fill."""
        init.copy_(self.A_log, torch.arange(1, self.d_state + 1, dtype=torch.float32).log().expand_as(self.A_log))
        init.ones_(self.D)
        bound = self.time_step_rank**-0.5 * self.time_step_scale
        if self.time_step_init_scheme == "constant":
            init.constant_(self.dt_proj.weight, bound)
        else:
            init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = math.log(self.time_step_min), math.log(self.time_step_max)
        dt = torch.empty(self.inner_size, dtype=torch.float32).uniform_(low, high).exp().clamp(min=self.time_step_floor)
        init.copy_(self.dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        if self.conv1d.bias is not None:
            init.zeros_(self.conv1d.bias)


class Mamba(SelectiveSSM, Mixer):
    """A Mamba layer (figure 3); option names as in transformers' MambaConfig.

    Args:
        hidden_size: D.
        state_size: N.
        expand: E / D.
        conv_kernel: W.
        time_step_rank: R; None for D / 16, rounded up (the config's "auto").
        use_bias: biases on in_proj and out_proj.
        use_conv_bias: bias on the convolution.
        time_step_scale, time_step_min, time_step_max, time_step_init_scheme, time_step_floor: initial time steps, as
            for `SelectiveSSM`.

    Raises:
        ValueError: a size is not positive, or a time step is out of order.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int = 16,
        expand: int = 2,
        conv_kernel: int = 4,
        time_step_rank: int | None = None,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        time_step_scale: float = 1.0,
        time_step_min: float = 0.001,
        time_step_max: float = 0.1,
        time_step_init_scheme: Literal["random", "constant"] = "random",
        time_step_floor: float = 1e-4,
    ) -> None:
        if expand < 1:
            raise ValueError(f"expand must be at least 1, got {expand}")
        super().__init__(
            expand * hidden_size,
            state_size=state_size,
            conv_kernel=conv_kernel,
            time_step_rank=math.ceil(hidden_size / 16) if time_step_rank is None else time_step_rank,
            use_conv_bias=use_conv_bias,
            time_step_scale=time_step_scale,
            time_step_init_scheme=time_step_init_scheme,
            time_step_min=time_step_min,
            time_step_max=time_step_max,
            time_step_floor=time_step_floor,
        )
        self.in_proj = nn.Linear(hidden_size, 2 * self.inner_size, bias=use_bias)
        self.out_proj = nn.Linear(self.inner_size, hidden_size, bias=use_bias)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D]. The cache holds `conv` [B, W - 1, E] and `state` [B, E, N] fp32."""
        context = context or Context()
        if context.cache is None and context.mask is None and (inner := fusion("mamba_inner", x)):
            A = self.rates(self.A_log)
            return inner(x, self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj, A, self.D)
        x, gate = project(x, self.in_proj)[0].chunk(2, dim=-1)  # [B, T, D] -> [B, T, E] each
        return project(self.ssm(x, gate, context), self.out_proj)[0]

    def state_size(self, sequence_length: int | None = None) -> int:
        """E * N, whatever the length; the convolution's window is not counted, as for Mamba2."""
        return self.inner_size * self.d_state

    def init_weights(self, std: float) -> None:
        self.init_ssm()


MIXER = Mamba
