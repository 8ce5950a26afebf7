"""Sequences: every token of every article once, in order, and where the articles begin."""

import pickle

import numpy as np
import pytest
import torch
from corpus_files import article_lines, small_corpus, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lrm_recall.data import Articles, DataError, Packed, boundaries, prepare

END = 0  # <end>, the first special token of the tokenizer in corpus_files


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # batches of a few articles, so that the file has several chunks
        patch.setattr("lrm_recall.data.tokenise._BATCH_ARTICLES", 7)
        rows = [{**row, "text": row["text"][: 10 + 37 * i]} for i, row in enumerate(article_lines(40))]
        return prepare(small_corpus(tmp_path_factory.mktemp("corpus"), patch, rows))


@pytest.fixture(scope="module")
def stream(prepared):
    """All tokens of train with separators, and the article of each."""
    rows = [[*row, END] for row in prepared.splits["train"]["input_ids"]]
    return sum(rows, []), [i for i, row in enumerate(rows) for _ in row]


def joined(sequences, field: str = "input_ids") -> list[int]:
    return torch.cat([sequence[field] for sequence in sequences]).tolist()


def all_of(dataset) -> list[dict]:
    return [dataset[i] for i in range(len(dataset))]


@settings(deadline=None)
@given(length=st.integers(2, 400))
def test_packed_sequences_are_the_stream_cut(prepared, stream, length):
    packed = Packed(prepared, "train", length)
    whole = len(packed) * length
    assert len(stream[0]) - length < whole <= len(stream[0])
    assert (joined(all_of(packed)), joined(all_of(packed), "articles")) == (stream[0][:whole], stream[1][:whole])
    assert {(item["input_ids"].dtype, tuple(item["input_ids"].shape)) for item in all_of(packed)} == {
        (torch.int64, (length,))
    }


@settings(deadline=None)
@given(length=st.integers(2, 400))
def test_the_last_sequence_may_be_kept(prepared, stream, length):
    packed = Packed(prepared, "train", length, keep_last=True)
    assert joined(all_of(packed)) == stream[0]
    assert all(len(item["input_ids"]) == length for item in all_of(packed)[:-1])


def test_a_seed_changes_the_order_of_the_articles_alone(prepared, stream):
    first, again, other = (Packed(prepared, "train", 50, seed=seed, keep_last=True) for seed in (0, 0, 1))
    assert joined(all_of(first)) == joined(all_of(again)) != joined(all_of(other))
    articles = np.array(joined(all_of(first), "articles"))
    tokens = np.array(joined(all_of(first)))
    assert [token for i in range(articles.max() + 1) for token in tokens[articles == i]] == stream[0]


def test_boundaries_are_where_separators_end(prepared):
    for item in all_of(Packed(prepared, "train", 64)):
        edges = boundaries(item["articles"])
        assert edges.dtype == torch.int32
        assert (edges[0], edges[-1]) == (0, 64)
        ends = (torch.nonzero(item["input_ids"] == END).flatten() + 1).tolist()
        assert edges[1:].tolist() == (ends if ends and ends[-1] == 64 else [*ends, 64])


def test_articles_whole(prepared, stream):
    sequences = Articles(prepared, "train", 2000)
    assert len(sequences) == prepared.manifest["splits"]["train"]["articles"]
    assert (joined(all_of(sequences)), joined(all_of(sequences), "articles")) == stream


@settings(deadline=None)
@given(longest=st.integers(2, 500))
def test_long_articles_split_and_cut(prepared, stream, longest):
    split = all_of(Articles(prepared, "train", longest, too_long="split"))
    assert (joined(split), joined(split, "articles")) == stream
    cut = all_of(Articles(prepared, "train", longest, too_long="cut"))
    whole = all_of(Articles(prepared, "train", 2000))
    assert all(torch.equal(a["input_ids"], b["input_ids"][:longest]) for a, b in zip(cut, whole, strict=True))


def test_a_sequence_longer_than_allowed(prepared):
    with pytest.raises(DataError, match=r"article 'Article \d+' of train has \d+ tokens, more than max_length 20; set"):
        Articles(prepared, "train", 20)


def test_indices(prepared):
    for dataset in (Packed(prepared, "train", 30), Articles(prepared, "train", 2000)):
        assert torch.equal(dataset[-1]["input_ids"], dataset[len(dataset) - 1]["input_ids"])
        for index in (len(dataset), -len(dataset) - 1):
            with pytest.raises(IndexError):
                dataset[index]


def test_a_copy_sends_no_tokens_and_workers_give_the_same(prepared):
    packed = Packed(prepared, "train", 30)
    data = pickle.dumps(packed)
    assert len(data) < prepared.splits["train"].data.nbytes / 2
    assert joined(all_of(pickle.loads(data))) == joined(all_of(packed))
    loader = DataLoader(packed, batch_size=4, num_workers=1)
    assert torch.cat([batch["input_ids"] for batch in loader]).flatten().tolist() == joined(all_of(packed))


@pytest.mark.parametrize(("arguments", "message"), [
    (("training", 8), r"small has no split 'training'; there are: train, validation, test"),
    (("train", 1), r"length must be at least 2 and at most the [\d,]+ tokens of train, got 1"),
    (("train", 10**9), "got 1000000000"),
])  # fmt: skip
def test_sequences_that_cannot_be(prepared, arguments, message):
    with pytest.raises(DataError, match=message):
        Packed(prepared, *arguments)


def test_other_mistakes(prepared):
    with pytest.raises(DataError, match=r"separator must be in \[0, 300\), got 300"):
        Packed(prepared, "train", 8, separator=300)
    with pytest.raises(DataError, match="too_long must be one of error, split, cut, got 'drop'"):
        Articles(prepared, "train", 8, too_long="drop")
    with pytest.raises(DataError, match="max_length must be at least 2, got 1"):
        Articles(prepared, "train", 1)


def test_a_tokenizer_without_an_end_of_text(tmp_path, monkeypatch):
    tokenizer = str(write_tokenizer(tmp_path / "other", unk_token="<end>"))
    prepared = prepare(small_corpus(tmp_path, monkeypatch, tokenizer=tokenizer))
    assert prepared.separator is None
    with pytest.raises(DataError, match="has no end of text; give the id of a separator"):
        Packed(prepared, "train", 8)
    assert len(Packed(prepared, "train", 8, separator=5)) > 1
