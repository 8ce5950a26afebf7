"""Gated DeltaNet (arXiv 2412.06464), with the parameter names of fla's checkpoints.

B batch, T tokens, D hidden size, H heads, K and V key and value channels per head, W taps of the short convolutions
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from lrm_recall.mixers.deltanet import DeltaMixer
from lrm_recall.ops.gated_delta_rule import gated_delta_rule

# The largest initial decay rate, and the range of the initial time steps, as in Mamba2.
_MAX_A, _MIN_DT, _MAX_DT = 16.0, 0.001, 0.1


class GatedDeltaNet(DeltaMixer):
    """A Gated DeltaNet layer (section 3.4); option names as in fla's GatedDeltaNetConfig.

    Args:
        hidden_size: D.
        head_dim: K.
        expand_v: V / K.
        num_heads: heads of queries and keys.
        num_v_heads: H, a multiple of it, neighbours sharing queries and keys; the same number by default.
        use_gate: gate the output with a projection of the input.
        use_short_conv: convolve queries, keys and values.
        conv_size: W; without effect where there is no convolution.
        allow_neg_eigval: let beta reach 2 instead of 1, for eigenvalues of the transition down to -1
            (arXiv 2411.12537).
        norm_eps: of the RMSNorm on each head's output.

    Raises:
        ValueError: head_dim, conv_size or num_heads is not positive, head_dim * expand_v is not a positive whole
            number, or num_heads does not divide num_v_heads.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        head_dim: int = 256,
        expand_v: float = 2.0,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        use_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        for option, value in (("head_dim", head_dim), ("num_heads", num_heads)):
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        if num_v_heads < 1 or num_v_heads % num_heads:
            raise ValueError(f"num_heads must divide num_v_heads, got {num_heads} and {num_v_heads}")
        head_v_dim = round(head_dim * expand_v)
        if head_v_dim < 1 or not math.isclose(head_v_dim, head_dim * expand_v):
            raise ValueError(
                f"head_dim * expand_v must be a positive whole number: got head_dim={head_dim}, expand_v={expand_v}"
            )
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            num_v_heads=num_v_heads,
            head_k_dim=head_dim,
            head_v_dim=head_v_dim,
            use_gate=use_gate,
            use_short_conv=use_short_conv,
            conv_size=conv_size,
            allow_neg_eigval=allow_neg_eigval,
            norm_eps=norm_eps,
        )
        self.a_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_v_heads))
        self._init_decay()

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, x: Tensor, padding: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.num_v_heads > self.num_heads:
            shared_by = self.num_v_heads // self.num_heads
            q, k = q.repeat_interleave(shared_by, dim=2), k.repeat_interleave(shared_by, dim=2)  # [B, T, H, K]
        dt = F.softplus(self.a_proj(x).float() + self.dt_bias.float())  # [B, T, H]
        log_decay = -self.A_log.float().exp() * dt
        if padding is not None:
            log_decay = log_decay.masked_fill(padding, 0)
        return gated_delta_rule(q, k, v, log_decay, beta, **options)

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        self._init_decay()

    @torch.no_grad()
    def _init_decay(self) -> None:
        """As in Mamba2: decay rates uniform up to 16, time steps log-uniform from 0.001 to 0.1."""
        H = self.num_v_heads
        rate = torch.empty(H, dtype=torch.float32).uniform_(0, _MAX_A)
        init.copy_(self.A_log, rate.clamp(min=torch.finfo(rate.dtype).tiny).log())  # a rate of 0 would have no log
        dt = torch.empty(H, dtype=torch.float32).uniform_(math.log(_MIN_DT), math.log(_MAX_DT)).exp()
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


MIXER = GatedDeltaNet
