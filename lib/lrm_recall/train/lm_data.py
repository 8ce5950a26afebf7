"""What a language-model run trains on: its corpus, prepared, as sequences in an order that its seed decides.

Two ways to cut text into sequences:

articles   windows of one article each (the paper joins an article into one sample): nothing of another article is ever
           in sight. Short articles make short sequences, filled up to the longest of their batch.
packed     articles one after the other, cut to one length: no filling, but no mixer of this library can reset its state
           inside a sequence yet, and Resona may retrieve from an earlier article. `lrm_recall.evaluate.perplexity`
           measures what that does (`behind`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lrm_recall.data.augment import augment, read_augmentation
from lrm_recall.data.corpora import read_corpus
from lrm_recall.data.errors import DataError
from lrm_recall.data.preparation import prepare
from lrm_recall.data.prepared import Prepared
from lrm_recall.data.retrieval import ChunkFinder, with_chunk_indices
from lrm_recall.data.retrieval_encoders import tf_idf
from lrm_recall.data.sequences import Packed
from lrm_recall.data.tokenizer import fingerprint, load_tokenizer
from lrm_recall.evaluate.perplexity import ArticleWindows
from lrm_recall.ops.loss import IGNORED
from lrm_recall.train.axes import every_option
from lrm_recall.train.lm_tokenizer import own_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepared_corpus(
    corpus: Mapping[str, Any] | str,
    vocab_size: int,
    own: bool,
    augmentation: Mapping[str, Any] | None = None,
    *,
    progress: bool = False,
) -> Prepared:
    """The corpus that a parameter file names, tokenised for a model with this vocabulary.

    Args:
        corpus: a name, or a mapping with a name and options.
        own: use a tokenizer with `vocab_size` tokens trained on the corpus itself instead of the corpus' tokenizer.
        augmentation: what extends the training articles (`lrm_recall.data.augment`); None for nothing. The other splits
            stay as they are.
        progress: show a bar.

    Raises:
        DataError: as `lrm_recall.data.prepare` and `own_tokenizer`.
    """
    chosen = read_corpus(corpus)
    if own:
        chosen = read_corpus({**_values(corpus), "tokenizer": str(own_tokenizer(chosen, vocab_size))})
    prepared = prepare(chosen, vocab_size=vocab_size, progress=progress)
    return prepared if augmentation is None else augment(prepared, read_augmentation(augmentation), progress=progress)


def tokenizer_of(prepared: Prepared) -> PreTrainedTokenizerBase:
    """The tokenizer that a corpus was prepared with.

    Raises:
        DataError: it cannot be had, or has become another one.
    """
    known = prepared.manifest["tokenizer"]
    tokenizer = load_tokenizer(known["name"], known["origin"].partition("@")[2] or None)
    if fingerprint(tokenizer) != known["sha256"]:
        raise DataError(f"the tokenizer {known['name']} is no longer the one that {prepared.path.name} was made with")
    return tokenizer


def chunk_finder(chunks: str, resona: Mapping[str, Any] | None, prepared: Prepared) -> ChunkFinder | None:
    """What finds the chunks of every position before training; None where the model searches itself.

    Args:
        chunks: "search" or "tf_idf".
        resona: options of the model's Resona layers.
    """
    if chunks == "search":
        return None
    options = every_option(resona)
    return ChunkFinder(encoder=tf_idf(prepared), chunk_size=options["chunk_size"], top_k=options["top_k"])


class TrainingSequences(Dataset):
    """Every sequence that training reads, in the order in which it does: `count` of them, epoch after epoch.

    Each epoch is a permutation of its own; seed and index alone decide an item, so a run that goes on from step n reads
    what it would have read. Item: {"input_ids", "labels"} [t] int64, label 0 IGNORED, and with a finder "chunk_indices"
    [t, k].
    """

    def __init__(
        self, prepared: Prepared, length: int, *, packed: bool, count: int, seed: int, finder: ChunkFinder | None = None
    ):
        if packed:
            self._sequences: Dataset = Packed(prepared, "train", length, seed=seed)
        else:
            self._sequences = ArticleWindows(prepared, "train", length, separators=True)
        if finder is not None:
            self._sequences = with_chunk_indices(self._sequences, finder, prepared)
        self._count, self._seed = count, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, len(self._sequences))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._sequences))
        item = self._sequences[int(self._order[place])]
        if "labels" in item:
            return item
        labels = item["input_ids"].clone()
        labels[0] = IGNORED
        return {**{name: values for name, values in item.items() if name != "articles"}, "labels": labels}

    @property
    def epoch_length(self) -> int:
        """Sequences in one epoch."""
        return len(self._sequences)


def _values(corpus: Mapping[str, Any] | str) -> dict[str, Any]:
    return {"name": corpus} if isinstance(corpus, str) else dict(corpus)
