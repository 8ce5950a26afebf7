"""Articles to token ids: one Arrow file a split, written in batches, never held in memory whole.

Columns: title, text, words (separated by white space; what perplexity by word divides by), input_ids without any
special token: separators between articles are put in where sequences are made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lrm_recall.data.articles import Article
from lrm_recall.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # of the files; a change makes every corpus anew
_BATCH_ARTICLES, _BATCH_CHARACTERS = 1000, 1_000_000


def write_split(
    path: Path, articles: Iterable[Article], tokenizer: PreTrainedTokenizerBase, tick: Callable[[int, int], None]
) -> dict[str, int | str]:
    """Tokenise articles into an Arrow file.

    Args:
        tick: called with the number of articles and of characters after each batch.

    Returns:
        articles, tokens and words of the split, longest (in tokens), and digest: SHA-256 of titles, texts and ids,
        whatever Arrow's version and the size of a batch.
    """
    import pyarrow as pa
    from datasets import Features, List, Value

    small = len(tokenizer) <= 2**16
    features = Features({
        "title": Value("string"),
        "text": Value("string"),
        "words": Value("int32"),
        "input_ids": List(Value("uint16" if small else "int32")),
    })  # fmt: skip
    schema, ids_type = features.arrow_schema, pa.uint16() if small else pa.int32()
    digest = hashlib.sha256()
    counts: dict[str, int | str] = {"articles": 0, "tokens": 0, "words": 0, "longest": 0}
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for batch in _batches(articles):
            texts = [article.text for article in batch]
            # a text that holds the letters of a special token is text
            ids = tokenizer(
                texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
            )["input_ids"]
            words = [len(text.split()) for text in texts]
            sizes = np.fromiter(map(len, ids), np.int64, len(ids))
            if not sizes.all():
                title = batch[int(sizes.argmin())].title
                raise DataError(f"the tokenizer gives article {title!r} no token: its vocabulary is not for such text")
            flat = np.fromiter((token for row in ids for token in row), np.int32, int(sizes.sum()))
            offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
            little_endian = flat.astype("<i4")
            for article, first, end in zip(batch, offsets, offsets[1:], strict=False):
                digest.update(f"{article.title}\0{article.text}\0{end - first}\0".encode())
                digest.update(little_endian[first:end])
            rows = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat).cast(ids_type))
            titles = [article.title for article in batch]
            columns = [pa.array(titles), pa.array(texts), pa.array(words, pa.int32()), rows]
            stream.write_batch(pa.record_batch(columns, schema=schema))
            counts["articles"] += len(batch)
            counts["tokens"] += len(flat)
            counts["words"] += sum(words)
            counts["longest"] = max(counts["longest"], int(sizes.max()))
            tick(len(batch), sum(map(len, texts)))
    return {**counts, "digest": digest.hexdigest()}


def _batches(articles: Iterable[Article]) -> Iterator[list[Article]]:
    """Batches bounded in articles and in characters, so that memory is."""
    batch: list[Article] = []
    characters = 0
    for article in articles:
        batch.append(article)
        characters += len(article.text)
        if len(batch) == _BATCH_ARTICLES or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
