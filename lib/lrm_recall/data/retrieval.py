"""Which chunks each position looks into, found once, before training (Resona, section 4.2.2).

    finder = ChunkFinder(tf_idf(prepared), chunk_size=64, top_k=1)
    sequences = with_chunk_indices(Packed(prepared, "train", 1024), finder, prepared)
    sequences[0]["chunk_indices"]                        # [T, k] int64, -1 for none
    model(ids, labels=ids, chunk_indices=indices)        # every Resona layer reads these instead of searching

The paper does the search offline "to create masks, in order to save computation during training" and names no encoder
for it. It must be one that training does not change, or the indices would grow stale; see `retrieval_encoders` for the
two here. The indices lie beside the tokens, memory-mapped, in the folder of the corpus, under a hash of the sequences'
ids and of the finder: other sequences never get them.

Symbols: T positions of a sequence, U chunk_size, N = T // U complete chunks, k top_k.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lrm_recall.code_hash import code_hash
from lrm_recall.data.errors import DataError
from lrm_recall.data.prepared import KEY_LENGTH, Prepared
from lrm_recall.data.retrieval_encoders import Encoder
from lrm_recall.data.store import check_sha256, locked, published, sha256
from lrm_recall.resona.search import NO_CHUNK, visible_chunks

_FILES = ("indices.npy", "ends.npy")
_MANIFEST = "manifest.json"
_CODE = ("lrm_recall.data.retrieval_encoders", "lrm_recall.resona.search")


@dataclass(frozen=True, kw_only=True)
class ChunkFinder:
    """Finds the chunks of every position of a sequence.

    Attributes:
        encoder: scores chunks; frozen.
        chunk_size: U, that of the model's Resona layers.
        top_k: k; a layer takes whatever number it is handed.
        within_articles: look into no chunk that another article has a token in, where the sequence says what is what.

    Raises:
        DataError: a size below 1.
    """

    encoder: Encoder
    chunk_size: int
    top_k: int = 1
    within_articles: bool = True

    def __post_init__(self) -> None:
        for name in ("chunk_size", "top_k"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, got {getattr(self, name)}")

    def identity(self) -> dict[str, Any]:
        """All that decides the indices of a sequence."""
        return {"encoder": self.encoder.identity(), "chunk_size": self.chunk_size, "top_k": self.top_k,
                "within_articles": self.within_articles}  # fmt: skip

    def find(self, ids: Tensor, articles: Tensor | None = None) -> Tensor:
        """The chunks of largest score that lie wholly before each position, best first.

        Args:
            ids: [T] int64.
            articles: [T] int64, the article of each token.

        Returns:
            [T, k] int64, NO_CHUNK (-1) where there are fewer, or none that the encoder finds anything in.
        """
        length, num_chunks = len(ids), len(ids) // self.chunk_size
        indices = torch.full((length, self.top_k), NO_CHUNK)
        found = min(self.top_k, num_chunks)
        if not found:
            return indices
        scores = self.encoder.scores(ids, self.chunk_size)  # [T, N]
        visible = visible_chunks(torch.arange(length), self.chunk_size)  # [T]
        hidden = torch.arange(num_chunks) >= visible[:, None]  # [T, N]
        if articles is not None and self.within_articles:
            # an article is one run of tokens: a chunk that begins in it and ends before t lies in it wholly
            hidden |= articles[: num_chunks * self.chunk_size : self.chunk_size] != articles[:, None]
        best, chosen = scores.masked_fill(hidden, -torch.inf).topk(found, dim=-1)  # [T, found]
        indices[:, :found] = chosen.masked_fill(best == -torch.inf, NO_CHUNK)
        return indices


class WithChunkIndices(Dataset):
    """Sequences with the chunks of each position: item i of `sequences` and its "chunk_indices" [t, k] int64."""

    def __init__(self, sequences: Dataset, path: Path):
        self.sequences, self.path = sequences, path
        self.manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        for name in _FILES:
            check_sha256(path / name, self.manifest["sha256"][name], f"delete {path} to have it made again")

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.sequences[index]
        index %= len(self)
        first, end = (int(self._ends[index - 1]) if index else 0), int(self._ends[index])
        return {**item, "chunk_indices": torch.from_numpy(self._indices[first:end].astype(np.int64))}

    def check_fits(self, chunk_size: int) -> None:
        """Raise DataError unless the indices count chunks of the size that a model's Resona layers have."""
        if (found := self.manifest["key"]["finder"]["chunk_size"]) != chunk_size:
            raise DataError(f"these indices count chunks of {found} tokens, and the model's have {chunk_size}")

    def __getstate__(self) -> dict[str, Any]:  # another process maps the file itself
        return {name: value for name, value in self.__dict__.items() if name not in ("_indices", "_ends")}

    @functools.cached_property
    def _indices(self) -> np.ndarray:
        return np.load(self.path / _FILES[0], mmap_mode="r")  # [tokens of all sequences, k]

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.load(self.path / _FILES[1])  # [sequences]


def with_chunk_indices(
    sequences: Dataset, finder: ChunkFinder, prepared: Prepared, *, progress: bool = False
) -> WithChunkIndices:
    """Sequences with their indices: those beside the corpus's tokens, or found now.

    Two processes that ask at once find them once; a killed one leaves nothing.

    Args:
        sequences: items with "input_ids" [t] int64 and, where there are several in one, "articles" [t].
        finder: what finds them.
        prepared: the corpus that the sequences are of; its folder keeps the indices, and they go when it goes.
        progress: show a bar on stderr.

    Raises:
        DataError: no sequence, a full disk, a damaged file.
    """
    if not len(sequences):
        raise DataError(f"there are no sequences of {prepared.manifest['corpus']} to find chunks for")
    digest, ends = _read(sequences)
    key = {"sequences": digest, "finder": finder.identity(), "code": code_hash(_CODE)}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]
    place = prepared.path / "retrieval" / name
    if not (place / _MANIFEST).is_file():
        with locked(place):
            if not (place / _MANIFEST).is_file():
                _make(sequences, ends, finder, key, place, progress)
    return WithChunkIndices(sequences, place)


def _read(sequences: Dataset) -> tuple[str, np.ndarray]:
    """SHA-256 of the sequences' ids and articles, and where each ends among all their tokens."""
    digest, sizes = hashlib.sha256(), []
    for index in range(len(sequences)):
        item = sequences[index]
        sizes.append(len(item["input_ids"]))
        for name in ("input_ids", "articles"):
            if name in item:
                digest.update(f"{name} {sizes[-1]} ".encode() + item[name].numpy().astype("<i8").tobytes())
    return digest.hexdigest(), np.cumsum(sizes, dtype=np.int64)


def _make(
    sequences: Dataset, ends: np.ndarray, finder: ChunkFinder, key: dict[str, Any], place: Path, progress: bool
) -> None:
    """Write the folder of indices. Needs its lock."""
    start = time.monotonic()
    longest = int(np.diff(ends, prepend=0).max())
    dtype = np.int16 if longest // finder.chunk_size <= np.iinfo(np.int16).max else np.int32
    found = 0
    with published(place) as partial:
        indices = np.lib.format.open_memmap(
            partial / _FILES[0], mode="w+", dtype=dtype, shape=(int(ends[-1]), finder.top_k)
        )
        bar = tqdm(total=len(ends), desc="chunk indices", unit=" sequences", file=sys.stderr, disable=not progress,
                   leave=False)  # fmt: skip
        with bar:
            for index, end in enumerate(ends):
                item = sequences[index]
                chosen = finder.find(item["input_ids"], item.get("articles")).numpy()
                indices[end - len(chosen) : end] = chosen
                found += int((chosen[:, 0] != NO_CHUNK).sum())
                bar.update()
        indices.flush()
        np.save(partial / _FILES[1], ends)
        manifest = {
            "key": key,
            "tokens": int(ends[-1]),
            "found": found / int(ends[-1]),  # share of positions that have a chunk
            "seconds": round(time.monotonic() - start, 1),
            "sha256": {name: sha256(partial / name) for name in _FILES},
        }
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
