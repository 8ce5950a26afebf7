"""What the mixer of an expanded layer starts from (StateX, section 4.3 and appendix A.4).

Pure functions from the tensors of the old mixer and of a freshly initialised larger one to those of the expanded one.

Symbols: H heads, N d_state, G n_groups, P head_dim, I = H P intermediate size, D hidden size, E = new N / old N.
Mamba2's `in_proj` rows stand as [z: I | x: I | B: G N | C: G N | dt: H] and its convolution's channels as [x | B | C],
so a larger N opens room at the end of each group's B and of its C, not at the end of the matrix.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
NewRows = Literal["zero_B", "zero_C", "zero_both", "fresh"]


def merged_heads(old: Tensors, num_heads: int) -> Tensors:
    """GLA, inheriting: every projection as it is; the norm weight that H heads shared, once a head.

    Args:
        old: state dict of a GLA mixer with `num_heads` heads.
    """
    return {**old, "g_norm_swish_gate.weight": old["g_norm_swish_gate.weight"].repeat(num_heads)}  # [V] -> [H V]


def widened_state(old: Tensors, fresh: Tensors, n_groups: int, *, inherit: bool, new_rows: NewRows) -> Tensors:
    """Mamba2: the tensors of a mixer whose d_state grew by E.

    Args:
        old, fresh: state dicts of the mixer before, and of a freshly initialised one after.
        inherit: keep the old A, B, C and dt_bias, so that only the new rows of B and C need a start; otherwise take
            all of A, B, C and dt_bias from `fresh` (the paper's choice).
        new_rows: with `inherit`, which of the new rows start at zero. Zeros in B or in C alone keep the function and
            can learn; zeros in both keep it but get no gradient; "fresh" changes it.
    """
    heads = old["A_log"].shape[0]
    inner = old["out_proj.weight"].shape[1]
    rows = {"in_proj": 2 * inner, "conv1d": inner}  # where B begins
    tensors = dict(fresh)
    for name, old_tensor in old.items():
        module = name.split(".")[0]
        if module in rows:
            tail = heads if module == "in_proj" else 0  # rows of dt stand behind C
            tensors[name] = _widen(old_tensor, fresh[name], rows[module], tail, n_groups,
                                   inherit=inherit, zero=_zeroed(new_rows, name))
        elif inherit or name not in ("A_log", "dt_bias"):
            tensors[name] = old_tensor
    return tensors


def _zeroed(new_rows: NewRows, name: str) -> tuple[bool, bool]:
    """Whether the new rows of (B, C) in this tensor start at zero; the taps stay fresh, so that both can learn."""
    if name == "conv1d.weight":
        return False, False
    return new_rows in ("zero_B", "zero_both"), new_rows in ("zero_C", "zero_both")


def _widen(
    old: Tensor, fresh: Tensor, start: int, tail: int, n_groups: int, *, inherit: bool, zero: tuple[bool, bool]
) -> Tensor:
    """Rows before `start` and the last `tail` from old; B and C between them, group by group."""
    result = fresh.clone()
    result[:start] = old[:start]
    if tail:
        result[-tail:] = old[-tail:]
    if not inherit:
        return result
    old_bc = old[start : old.shape[0] - tail].unflatten(0, (2, n_groups, -1))  # [2 G N, ...] -> [2, G, N, ...]
    new_bc = result[start : result.shape[0] - tail].unflatten(0, (2, n_groups, -1))  # [2, G, E N, ...], a view
    state = old_bc.shape[2]
    new_bc[:, :, :state] = old_bc
    for which, zeroed in enumerate(zero):
        if zeroed:
            new_bc[which, :, state:] = 0
    return result


def reset_norm(norm: torch.nn.Module) -> None:
    """The block's norm back to its start: GLA's re-initialisation covers it (appendix A.4)."""
    with torch.no_grad():
        norm.weight.fill_(1.0)
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()
