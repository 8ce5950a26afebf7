"""Hymba (arXiv 2411.13676): attention heads and Mamba heads side by side, on one projection of the input.

    y = out_proj((norm1(attention(q, k, v)) + norm2(mamba(x, gate))) / 2),    q, k, v, x, gate = in_proj(input)

(Section 2.1, equation 3; the learned scales are the norms' weights.) Parameter names as in NVlabs/hymba's barebones
block, but for its lists of one (`mamba.x_proj.0` and the like), which are plain here. The meta tokens that the paper
puts before every sequence belong to a model, not to a mixer, and are left out; so is the sharing of keys and values
between layers.

B batch, T tokens, D hidden size, E inner channels of either branch, H attention heads, G heads of keys and values,
K channels per head, N state channels, W taps of the short convolution
"""

from __future__ import annotations

from torch import Tensor, nn

from lrm_recall.context import Context
from lrm_recall.mixers.attention import attend, cached_tokens
from lrm_recall.mixers.base import Mixer
from lrm_recall.mixers.mamba import SelectiveSSM
from lrm_recall.norms import RMSNorm

_NORM_EPS = 1e-6


class Hymba(Mixer):
    """A Hymba layer; option names as in the barebones block.

    Args:
        hidden_size: D.
        attention: False leaves the Mamba branch alone, as in a layer where Resona takes the attention's place (Resona,
            table 4); the options of the attention heads are then without effect.
        mamba_expand: E / D, for both branches.
        num_attention_heads: H.
        num_key_value_heads: G.
        attention_window_size: tokens before itself that a query reads; None for all of them, a global layer.
        use_positional_embedding: rotary positions.
        rope_base: of their wavelengths.
        conv_kernel_size: W.
        time_step_rank: rank of the time step's projection.
        ssm_state_size: N.

    Raises:
        ValueError: the heads do not divide E, or leave an odd number of channels to rotate; num_key_value_heads does
            not divide them; a size, the window or the base is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        attention: bool = True,
        mamba_expand: int = 2,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 4,
        attention_window_size: int | None = 1024,
        use_positional_embedding: bool = True,
        rope_base: float = 10000.0,
        conv_kernel_size: int = 3,
        time_step_rank: int = 8,
        ssm_state_size: int = 16,
    ) -> None:
        super().__init__()
        for option, value in (
            ("mamba_expand", mamba_expand),
            ("conv_kernel_size", conv_kernel_size),
            ("time_step_rank", time_step_rank),
            ("ssm_state_size", ssm_state_size),
        ):
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        inner = mamba_expand * hidden_size
        if num_attention_heads < 1 or inner % num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide mamba_expand * hidden_size: got {num_attention_heads} heads, "
                f"mamba_expand={mamba_expand}, hidden_size={hidden_size}"
            )
        if num_key_value_heads < 1 or num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide the {num_attention_heads} heads, got {num_key_value_heads}"
            )
        if attention_window_size is not None and attention_window_size < 0:
            raise ValueError(f"attention_window_size must be at least 0, got {attention_window_size}")
        self.attention, self.inner_size = attention, inner
        self.head_dim, self.num_kv_heads = inner // num_attention_heads, num_key_value_heads
        if use_positional_embedding and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even number of channels per head, got {self.head_dim}")
        if rope_base <= 0:
            raise ValueError(f"rope_base must be positive, got {rope_base}")
        self.window = None if attention_window_size is None else attention_window_size + 1  # with the token itself
        self.rope_theta = rope_base if use_positional_embedding else None

        kv_dim = self.num_kv_heads * self.head_dim
        self.sizes = (inner, kv_dim, kv_dim, inner, inner) if attention else (inner, inner)  # q, k, v; x, gate
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes))
        if attention:
            self.pre_avg_layernorm1 = RMSNorm(inner, eps=_NORM_EPS)
        self.mamba = SelectiveSSM(
            inner,
            state_size=ssm_state_size,
            conv_kernel=conv_kernel_size,
            time_step_rank=time_step_rank,
            norm_eps=_NORM_EPS,
        )
        self.pre_avg_layernorm2 = RMSNorm(inner, eps=_NORM_EPS)
        self.out_proj = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D]. The cache holds what `attend` and `SelectiveSSM.ssm` keep."""
        context = context or Context()
        *qkv, x, gate = self.in_proj(x).split(self.sizes, dim=-1)  # [B, T, E or G * K]
        y = self.pre_avg_layernorm2(self.mamba.ssm(x, gate, context))  # [B, T, E]
        if self.attention:
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv)  # [B, T, H or G, K]
            o = attend(q, k, v, context, window=self.window, rope_theta=self.rope_theta)  # [B, T, H, K]
            y = (self.pre_avg_layernorm1(o.flatten(-2)) + y) / 2
        return self.out_proj(y)

    def state_size(self, sequence_length: int | None = None) -> int:
        """E * N, and the keys and values of the tokens within the window; the convolution's is not counted."""
        state = self.inner_size * self.mamba.d_state
        if self.attention:
            state += 2 * self.num_kv_heads * self.head_dim * cached_tokens(self.window, sequence_length)
        return state

    def init_weights(self, std: float) -> None:
        self.mamba.init_ssm()


MIXER = Hymba
