"""What four heads can store and what one merged head can (StateX, section 4.1), as linear algebra on small tensors.

A layer of H heads keeps one state of K x V per head, and every pair it reads is added to it: S_h += k_h v_h^T. Asked
with a key, a head answers k_h^T S_h. Written into one large matrix, the H states are blocks on its diagonal; a single
head with the same vectors, laid end to end, fills the whole matrix, H times as many numbers.

    B independent repetitions, N pairs, H heads, K and V key and value channels per head
    keys [B, N, H, K], values [B, N, H, V], state [B, H, K, V]

All states here come from `ops.gla.gla_recurrent`, the oracle of the GLA layer.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lrm_recall.ops.gla import gla_recurrent, gla_step

Keys = Literal["best", "random"]


def make_keys(kind: Keys, num_pairs: int, num_heads: int, key_dim: int, *, repeats: int = 1, seed: int = 0) -> Tensor:
    """Keys [B, N, H, K] fp32 for N pairs.

    Args:
        kind: "best": in every head orthogonal while N <= K, and as evenly spread as possible beyond (columns of one
            orthogonal matrix: a tight frame); with N = H K the merged keys are orthogonal too. "random": Gaussian,
            each head's key of length 1.
        num_pairs, num_heads, key_dim: N, H, K.
        repeats: B.
        seed: of the draw.

    Raises:
        ValueError: an unknown kind.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        keys = torch.randn(repeats, num_pairs, num_heads, key_dim, generator=generator)
        return keys / keys.norm(dim=-1, keepdim=True)
    if kind != "best":
        raise ValueError(f"kind must be 'best' or 'random', got {kind!r}")
    orthogonal = torch.linalg.qr(torch.randn(repeats, num_pairs, num_pairs, generator=generator)).Q  # [B, N, N]
    if key_dim > num_pairs:  # room to spare: the channels that are left stay empty
        orthogonal = torch.nn.functional.pad(orthogonal, (0, key_dim - num_pairs))  # [B, N, K]
    columns = torch.arange(num_heads * key_dim) % orthogonal.shape[-1]
    return orthogonal[..., columns].unflatten(-1, (num_heads, key_dim))  # [B, N, H K] -> [B, N, H, K]


def make_values(num_pairs: int, num_heads: int, value_dim: int, *, repeats: int = 1, seed: int = 1) -> Tensor:
    """Gaussian values [B, N, H, V] fp32; the same numbers, in the same places, however many heads share them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(repeats, num_pairs, num_heads * value_dim, generator=generator)  # [B, N, H V]
    return values.unflatten(-1, (num_heads, value_dim))


def merge(x: Tensor) -> Tensor:
    """The vectors of H heads laid end to end as those of one: [..., H, X] to [..., 1, H X]."""
    return x.flatten(-2).unsqueeze(-2)


def write(keys: Tensor, values: Tensor) -> Tensor:
    """State [B, H, K, V] after every pair was read once and nothing was forgotten (GLA, equation 2, alpha = 1)."""
    return gla_recurrent(keys, keys, values, torch.zeros_like(keys), scale=1.0)[1]


def read(state: Tensor, keys: Tensor) -> Tensor:
    """What the state answers to each key: [B, N, H, V]."""
    return torch.einsum("bnhk,bhkv->bnhv", keys, state)


def recall_error(answers: Tensor, values: Tensor) -> Tensor:
    """Share of the values [B, N, H, V] that the answers miss, [B], 0 to 1.

    Each head's answers are first scaled as well as one number can: the layer's norm takes lengths away anyway.
    """
    answers, values = answers.transpose(1, 2).flatten(2), values.transpose(1, 2).flatten(2)  # [B, H, N V]
    fit = (answers * values).sum(-1).square() / answers.square().sum(-1).clamp_min(1e-20)  # [B, H]
    return (1 - fit.sum(-1) / values.square().sum((-2, -1))).clamp_min(0.0)


def error_limit(num_pairs: int, key_dim: int) -> float:
    """The least share missed by ANY state of any head with K key channels, for N values that share nothing.

    Whatever the state S, the answers are keys @ S, and keys [N, K] spans K of the N directions: the other N - K are
    lost. So nothing is lost up to K pairs, and 1 - K / N of the values beyond.
    """
    return max(0.0, 1 - key_dim / num_pairs)


def measured_error(kind: Keys, num_pairs: int, num_heads: int, channels: tuple[int, int], repeats: int = 32) -> float:
    """Write N pairs with H heads that share (key, value) channels, read them back: the mean share missed.

    Raises:
        ValueError: H does not divide the channels.
    """
    key_dim, value_dim = (split_channels(width, num_heads) for width in channels)
    keys = make_keys(kind, num_pairs, num_heads, key_dim, repeats=repeats)
    values = make_values(num_pairs, num_heads, value_dim, repeats=repeats)
    return recall_error(read(write(keys, values), keys), values).mean().item()


def split_channels(width: int, num_heads: int) -> int:
    """Channels per head; ValueError where heads do not divide them."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads must divide the {width} channels, got {num_heads}")
    return width // num_heads


def block_diagonal(state: Tensor) -> Tensor:
    """The states [H, K, V] of all heads as one matrix [H K, H V], zero off the diagonal."""
    return torch.block_diag(*state)


def block_mask(num_heads: int, key_dim: int, value_dim: int) -> Tensor:
    """[H K, H V] bool, True where a key channel and a value channel belong to the same head."""
    return torch.block_diag(*torch.ones(num_heads, key_dim, value_dim)).bool()


def masked_merged(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """One merged head that may not use its cross terms: the identity of the walkthrough.

    Args:
        q, k, log_decay: [B, T, H, K], as four heads would take them.
        v: [B, T, H, V].

    Returns:
        o [B, T, H, V], equal to `gla_recurrent` with H heads. Two things make it so: the mask, and the four heads' own
        scale K**-0.5, where a merged head would take (H K)**-0.5.
    """
    H, K, V = *k.shape[-2:], v.shape[-1]
    mask = block_mask(H, K, V)
    queries, keys, values, decay = (merge(x) for x in (q, k, v, log_decay))  # [B, T, 1, H K or H V]
    state, outputs = torch.zeros(len(q), 1, H * K, H * V), []
    for t in range(q.shape[1]):
        _, state = gla_step(queries[:, t], keys[:, t], values[:, t], decay[:, t], state)
        outputs.append(K**-0.5 * (queries[:, t].unsqueeze(-2) @ (state * mask)).squeeze(-2))  # [B, 1, H V]
    return torch.stack(outputs, dim=1).unflatten(-1, (H, V)).squeeze(2)  # [B, T, 1, H V] -> [B, T, H, V]


def compare_controls(channels: tuple[int, int], num_heads: int, num_pairs: int) -> dict[str, float]:
    """The share missed by four ways to keep the same pairs, best keys throughout.

    "heads": H heads; "merged": one head, the same vectors; "masked": the merged state without its cross terms;
    "copied": a state of the merged size whose keys are the first head's, H times over: more numbers, no new
    directions to write in.
    """
    key_dim, value_dim = (split_channels(width, num_heads) for width in channels)
    keys, values = make_keys("best", num_pairs, num_heads, key_dim), make_values(num_pairs, num_heads, value_dim)
    state, mask = write(merge(keys), merge(values)), block_mask(num_heads, key_dim, value_dim)
    copied = merge(keys[:, :, :1].expand_as(keys))
    return {
        "heads": recall_error(read(write(keys, values), keys), values).item(),
        "merged": recall_error(read(state, merge(keys)), merge(values)).item(),
        "masked": recall_error(read(state * mask, merge(keys)), merge(values)).item(),
        "copied": recall_error(read(write(copied, merge(values)), copied), merge(values)).item(),
    }


def check_mask(mask: Tensor | None, num_heads: int, key_dim: int, value_dim: int) -> str:
    """What to tell a reader about the mask of the exercise: one sentence that begins with "not yet" or "right"."""
    wanted = block_mask(num_heads, key_dim, value_dim)
    if mask is None:
        return "not yet: there is no mask"
    if not isinstance(mask, Tensor) or mask.shape != wanted.shape:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        return f"not yet: a tensor of {list(wanted.shape)} is wanted (H K rows, H V columns), this is {found}"
    wrong = int((mask.bool() != wanted).sum())
    return f"not yet: {wrong} of {wanted.numel()} entries differ" if wrong else "right: every entry is as it should be"
