"""Cross-entropy of next-token logits, without an fp32 copy of them on a GPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lrm_recall.ops.dispatch import dispatched

IGNORED = -100  # a label that counts for nothing


def cross_entropy_torch(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each position, zero where the label is IGNORED.

    Args:
        logits: [M, V]. On a GPU their storage is overwritten by their gradient in the backward pass.
        labels: [M] int64.

    Returns:
        [M] fp32.
    """
    return F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED)


cross_entropy = dispatched("cross_entropy", cross_entropy_torch)
