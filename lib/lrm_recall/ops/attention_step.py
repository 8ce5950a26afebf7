"""One decoded token of causal softmax attention, its keys and values in buffers of fixed capacity.

B rows that are decoded together, H query heads, G heads of keys and values, K channels per head, C slots of a buffer
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrm_recall.ops.dispatch import LIBRARY_OF, OWN, dispatched
from lrm_recall.ops.rotary import cos_sin, rotate

# Entered here and not in dispatch.py: no training reaches this op, and a change there would make every run anew.
LIBRARY_OF["attention_step"] = OWN


def attention_step_torch(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor, offset: Tensor, *,
    rope_theta: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one token to itself and to the tokens in the buffers, to which it is added in place.

    Args:
        q: [B, H, K]. k, v: [B, G, K], G dividing H.
        keys, values: [B, G, C, K]; keys rotated. Slots that are not filled must hold finite numbers.
        length: [] int64, slots that are filled: the column of the new token, below C.
        offset: [B] int64, left padding of every row, which is not read.
        rope_theta: base of the wavelengths of rotary positions, for the new query and key; None for none.

    Returns:
        [B, H, K].
    """
    q, k = q.unsqueeze(1), k.unsqueeze(1)  # [B, 1, H or G, K]
    if rope_theta is not None:
        angles = cos_sin((length - offset).unsqueeze(1), q.shape[-1], rope_theta)
        q, k = rotate(q, *angles), rotate(k, *angles)
    keys.index_copy_(2, length.view(1), k.transpose(1, 2).to(keys.dtype))
    values.index_copy_(2, length.view(1), v.unsqueeze(2).to(values.dtype))
    slot = torch.arange(keys.shape[2], device=keys.device)
    visible = (slot <= length) & (slot >= offset.clamp(max=length).unsqueeze(1))  # [B, C]; itself always
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys.to(q.dtype), values.to(q.dtype), visible[:, None, None],
        enable_gqa=q.shape[2] != keys.shape[1],
    )  # [B, H, 1, K]  # fmt: skip
    return o.squeeze(2)


attention_step = dispatched("attention_step", attention_step_torch)
