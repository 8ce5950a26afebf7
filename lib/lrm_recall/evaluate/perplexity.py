"""Perplexity of a language model on a split of a corpus: by token, by word, and by position in the sequence.

Every token of every article is scored exactly once, in disjoint windows of one article each. The first input of an
article is the separator (the tokenizer's end of text); the first input of a later window is the token before it, so a
token near a window's start has little context. The separator that ends an article is no text and is not scored unless
`separators` says so. These are the windows of lm-evaluation-harness (`loglikelihood_rolling`, one token of context),
and its word perplexity: exp(nats of all tokens / words), a word being what stands between white space of the raw text.
By-word values compare models with different tokenizers; by-token values do not.

Symbols: B batch, T inputs of a window, D hidden size, V vocabulary, k chunks a position looks into.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from lrm_recall.data.errors import DataError
from lrm_recall.data.retrieval import ChunkFinder, with_chunk_indices
from lrm_recall.ops.loss import IGNORED
from lrm_recall.resona.search import NO_CHUNK, visible_chunks

if TYPE_CHECKING:
    from lrm_recall.data.prepared import Prepared
    from lrm_recall.model import RecurrentLM

_LOGITS_AT_ONCE = 1 << 25  # elements of logits held at a time
_FIRST_BUCKET = 16  # positions in the first bucket; each later one begins where it has doubled


class ArticleWindows(Dataset):
    """Windows of one article each, every token a target exactly once.

    Item i is {"input_ids": [t] int64, "labels": [t] int64}, t at most `length`. Position p predicts label p + 1, as
    `RecurrentLM` shifts them; label 0, of the separator or of the token before the window, is IGNORED.

    Args:
        prepared, split: the corpus.
        length: T, most inputs of a window; it scores T - 1 tokens.
        separators: whether the separator that ends an article is a target too (to train), or not (to evaluate).
        behind: make the first window of each article alone, and put this many tokens of the article before it in front
            of it, unscored, then the separator: what packing would put there. None: all windows, nothing in front.

    Raises:
        DataError: unknown split, a length below 2, or a tokenizer without an end of text.
    """

    def __init__(self, prepared: Prepared, split: str, length: int, *, separators: bool = False,
                 behind: int | None = None):
        if split not in prepared.manifest["splits"]:
            raise DataError(f"{prepared.manifest['corpus']} has no split {split!r}; "
                            f"there are: {', '.join(prepared.manifest['splits'])}")
        if length < 2 or (behind or 0) < 0:
            raise DataError(f"length must be at least 2 and behind None or at least 0, got {length} and {behind}")
        if prepared.separator is None:
            raise DataError(f"the tokenizer {prepared.manifest['tokenizer']['name']} has no end of text to begin with")
        self.length, self._behind, self._separators = length, behind, separators
        self._separator = prepared.separator
        self._dataset = prepared.splits[split]
        sizes = np.diff(self._offsets()) + separators  # targets of each article
        windows = -(-sizes // (length - 1)) if behind is None else np.ones_like(sizes)
        self._ends = np.cumsum(windows)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        index %= len(self)
        article = int(np.searchsorted(self._ends, index, side="right"))
        start = (index - (int(self._ends[article - 1]) if article else 0)) * (self.length - 1)
        tokens = self._tokens(article)
        targets = tokens[start : start + self.length - 1]
        before = self._before(article, start, tokens)
        ids = torch.from_numpy(np.concatenate([before, targets]))  # [t]
        labels = ids.clone()
        labels[: len(before)] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def _before(self, article: int, start: int, tokens: np.ndarray) -> np.ndarray:
        """The unscored inputs in front of the token at `start`."""
        if start:
            return tokens[start - 1 : start]
        separator = np.array([self._separator])
        if not self._behind:
            return separator
        return np.concatenate([self._article((article - 1) % len(self._ends))[-self._behind :], separator])

    def _tokens(self, article: int) -> np.ndarray:
        tokens = self._article(article)
        return np.append(tokens, self._separator) if self._separators else tokens

    def _article(self, article: int) -> np.ndarray:
        return self._dataset.data.column("input_ids")[article].values.to_numpy().astype(np.int64)

    def _offsets(self) -> np.ndarray:
        chunks = self._dataset.data.column("input_ids").chunks
        sizes = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks])
        return np.concatenate([[0], np.cumsum(sizes)])


def collate(items: Sequence[dict[str, Tensor]], length: int = 0) -> dict[str, Tensor]:
    """Windows as one batch, {"input_ids", "labels"} [B, T]: short ones filled up on the right, with labels IGNORED.

    T is that of the longest, and at least `length`.

    No mask goes with it: what stands behind a row changes nothing before it in a causal model.
    """
    longest = max(length, *(len(item["input_ids"]) for item in items))

    def filled(name: str, value: int) -> Tensor:
        return torch.stack([F.pad(item[name], (0, longest - len(item[name])), value=value) for item in items])

    batch = {"input_ids": filled("input_ids", 0), "labels": filled("labels", IGNORED)}
    if "chunk_indices" in items[0]:  # [t, k] each, where chunks were found beforehand (lrm_recall.data.retrieval)
        chosen = [item["chunk_indices"] for item in items]
        chosen = [F.pad(indices, (0, 0, 0, longest - len(indices)), value=NO_CHUNK) for indices in chosen]
        batch["chunk_indices"] = torch.stack(chosen)  # [B, T, k]
    return batch


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a split.

    Attributes:
        loss: mean nats a token. by_token: its exponential.
        by_word: exp(nats of all tokens / words); None where only the first windows of articles are scored.
        tokens: how many were scored.
        positions: one dict a bucket of positions: start, end (the tokens of its article that a token has before it in
            its window, end left out), tokens, loss.
    """

    loss: float
    by_token: float
    by_word: float | None
    tokens: int
    positions: list[dict[str, float]]


@torch.no_grad()
def perplexity(
    model: RecurrentLM,
    prepared: Prepared,
    split: str,
    length: int,
    *,
    batch_size: int = 8,
    separators: bool = False,
    behind: int | None = None,
    chunks: Literal["found", "random"] = "found",
    finder: ChunkFinder | None = None,
    bf16: bool = False,
) -> Perplexity:
    """Score a split, see the top of this page; the model is left in evaluation mode, on its device.

    Args:
        length: most tokens that a window holds, the first input included.
        batch_size: windows at a time; changes nothing but the speed.
        separators, behind: as for `ArticleWindows`.
        chunks: "random" has every Resona layer read chunks drawn at random among those it may see, in the place of
            those that it finds: a control.
        finder: finds the chunks that the layers read; None: they search themselves.
        bf16: autocast to bfloat16, as in training.

    Raises:
        DataError: as `ArticleWindows`.
        ValueError: random chunks for a model without Resona.
    """
    if chunks == "random" and not model.config.resona_layers:
        raise ValueError("random chunks are for a model with Resona layers; this one has none")
    windows: Dataset = ArticleWindows(prepared, split, length, separators=separators, behind=behind)
    if finder is not None and chunks == "found":
        windows = with_chunk_indices(windows, finder, prepared)
    device = model.device
    nats = torch.zeros(length + (behind or 0) - 1, dtype=torch.float64)  # of each place in a window
    counts = torch.zeros_like(nats)
    model.eval()
    for number, batch in enumerate(_batches(windows, batch_size)):
        ids = batch["input_ids"]  # [B, T]
        chosen = batch.get("chunk_indices") if chunks == "found" else _random_chunks(ids, model, seed=number)
        options = {} if chosen is None else {"chunk_indices": chosen.to(device)}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden = model.model(input_ids=ids.to(device), use_cache=False, **options).last_hidden_state  # [B, T, D]
            losses = _losses(model, hidden[:, :-1], batch["labels"][:, 1:].to(device)).cpu()  # [B, T - 1]
        place = slice(losses.shape[1])
        nats[place] += losses.double().sum(0)
        counts[place] += (batch["labels"][:, 1:] != IGNORED).sum(0)
    nats, counts = nats[behind or 0 :], counts[behind or 0 :]
    tokens, total = int(counts.sum()), nats.sum().item()
    return Perplexity(
        loss=total / tokens,
        by_token=_exp(total / tokens),
        by_word=_exp(total / prepared.manifest["splits"][split]["words"]) if behind is None else None,
        tokens=tokens,
        positions=_buckets(nats, counts),
    )


def _exp(loss: float) -> float:
    """The perplexity of a loss; of one that no double can hold the largest that it can, so that a row stays JSON."""
    return math.exp(min(loss, 700.0))


def _batches(windows: Dataset, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """All windows, those of like length together."""
    items: list[dict[str, Any]] = sorted(windows, key=lambda item: len(item["input_ids"]))
    for start in range(0, len(items), batch_size):
        yield collate(items[start : start + batch_size])


def _losses(model: RecurrentLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Nats of each label [B, T], zero where it is IGNORED, without the logits of all positions at once."""
    step = max(1, _LOGITS_AT_ONCE // (len(hidden) * model.config.vocab_size))
    pieces = zip(hidden.split(step, dim=1), labels.split(step, dim=1), strict=True)
    losses = [
        F.cross_entropy(model.lm_head(h).float().flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="none")
        .view(y.shape)
        for h, y in pieces
    ]  # fmt: skip
    return torch.cat(losses, dim=1)


def _random_chunks(ids: Tensor, model: RecurrentLM, seed: int) -> Tensor:
    """For each position of ids [B, T] chunks [B, T, k] drawn among those wholly before it, NO_CHUNK where none is."""
    layer = model.model.layers[model.config.resona_layers[0]].mixer
    generator = torch.Generator().manual_seed(seed)
    visible = visible_chunks(torch.arange(ids.shape[1]), layer.chunk_size)  # [T]
    share = torch.rand(*ids.shape, layer.top_k, generator=generator)  # [B, T, k]
    drawn = (share * visible[:, None]).long()
    return torch.where(visible[:, None] > 0, drawn, torch.tensor(NO_CHUNK))


def _buckets(nats: Tensor, counts: Tensor) -> list[dict[str, float]]:
    edges = [0, _FIRST_BUCKET]
    while edges[-1] < len(nats):
        edges.append(2 * edges[-1])
    buckets = []
    for start, end in zip(edges, edges[1:], strict=False):
        tokens = int(counts[start:end].sum())
        if tokens:
            loss = nats[start:end].sum().item() / tokens
            buckets.append({"start": start, "end": min(end, len(nats)), "tokens": tokens, "loss": loss})
    return buckets
