"""Chunks found beforehand: causal, as a slow oracle finds them, stored once, and what a model does with them."""

import math
import pickle

import numpy as np
import pytest
import torch
from conftest import make_model
from corpus_files import article_lines, needs, new_cache, small_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.data import Articles, DataError, Packed, corpus, prepare
from lrm_recall.data.retrieval import ChunkFinder, with_chunk_indices
from lrm_recall.data.retrieval_compare import compare
from lrm_recall.data.retrieval_encoders import MeanEmbedding, TfIdf, tf_idf

VOCAB = 12
IDS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)
ENCODERS = st.sampled_from(["tf_idf", "mean_embedding"])


def make_encoder(kind: str, window: int, vocab: int = VOCAB, **options):
    generator = torch.Generator().manual_seed(0)
    if kind == "tf_idf":
        return TfIdf(torch.rand(vocab, generator=generator).clamp_min(0.1), window)
    return MeanEmbedding(torch.randn(vocab, 6, generator=generator), window, **options)


def prepared_corpus(tmp_path, monkeypatch, **options):
    return prepare(small_corpus(tmp_path, monkeypatch, **options))


@settings(deadline=None, max_examples=80)
@given(ids=IDS, kind=ENCODERS, window=st.integers(1, 5), chunk_size=st.integers(1, 6), top_k=st.integers(1, 4),
       data=st.data())  # fmt: skip
def test_no_position_learns_of_its_future(ids, kind, window, chunk_size, top_k, data):
    finder = ChunkFinder(encoder=make_encoder(kind, window), chunk_size=chunk_size, top_k=top_k)
    ids = torch.tensor(ids)
    cut = data.draw(st.integers(0, len(ids) - 1))
    indices = finder.find(ids)
    assert indices.shape == (len(ids), top_k) and indices.dtype == torch.int64
    ends = (indices + 1) * chunk_size  # of each chunk; 0 for none
    assert bool((ends <= torch.arange(len(ids))[:, None]).all())
    assert all(len(set(row[row >= 0].tolist())) == int((row >= 0).sum()) for row in indices)
    other = torch.cat([ids[: cut + 1], (ids[cut + 1 :] + 1) % VOCAB])
    assert torch.equal(finder.find(other)[: cut + 1], indices[: cut + 1])


def slow_scores(encoder, ids: list[int], chunk_size: int) -> list[list[float]]:
    """Scores by the definition, a pair of a position and a chunk at a time; nan where a vector is zero."""

    def bag(tokens):
        if isinstance(encoder, TfIdf):
            return [tokens.count(v) * float(encoder.idf[v]) for v in range(VOCAB)]
        return torch.stack([encoder.table[v] for v in tokens]).mean(0).tolist()

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    chunks = [bag(ids[n * chunk_size : (n + 1) * chunk_size]) for n in range(len(ids) // chunk_size)]
    return [[cosine(bag(ids[max(0, t - encoder.window + 1) : t + 1]), chunk) for chunk in chunks]
            for t in range(len(ids))]


@settings(deadline=None, max_examples=40)
@given(ids=IDS, kind=ENCODERS, window=st.integers(1, 5), chunk_size=st.integers(1, 6))
def test_the_best_chunk_is_the_one_of_largest_cosine(ids, kind, window, chunk_size):
    encoder = make_encoder(kind, window)
    found = ChunkFinder(encoder=encoder, chunk_size=chunk_size).find(torch.tensor(ids))[:, 0].tolist()
    for t, scores in enumerate(slow_scores(encoder, ids, chunk_size)):
        past = scores[: t // chunk_size]
        if isinstance(encoder, TfIdf):
            past = [score if score > 1e-12 else -math.inf for score in past]
        if not past or max(past) == -math.inf:
            assert found[t] == -1
        else:
            assert past[found[t]] == pytest.approx(max(past), abs=1e-5)


def test_no_chunk_of_another_article():
    encoder = make_encoder("mean_embedding", 1)
    ids = torch.zeros(12, dtype=torch.int64)
    articles = torch.tensor([4] * 5 + [9] * 7)
    found = ChunkFinder(encoder=encoder, chunk_size=2, top_k=1).find(ids, articles)[:, 0].tolist()
    assert found[:5] == [-1, -1, 0, 0, found[4]] and found[4] in (0, 1)
    assert found[5:8] == [-1] * 3  # chunk 2 holds tokens of both articles; chunk 3 is complete at 8
    assert found[8:10] == [3, 3] and set(found[10:]) <= {3, 4}
    across = ChunkFinder(encoder=encoder, chunk_size=2, within_articles=False).find(ids, articles)[:, 0]
    assert bool((across[2:] >= 0).all())


def test_rare_tokens_weigh_most_and_those_of_every_article_nothing(tmp_path, monkeypatch):
    rows = [{"title": f"T{i}", "text": f"{i} zz" + "q" * (i % 2)} for i in range(60)]
    prepared = prepared_corpus(tmp_path, monkeypatch, rows=rows)
    train = [set(ids) for ids in prepared.splits["train"]["input_ids"]]
    weights = tf_idf(prepared).idf
    for token in range(prepared.vocab_size):
        holding = len(train) if token == prepared.separator else sum(token in ids for ids in train)
        assert float(weights[token]) == pytest.approx(math.log((1 + len(train)) / (1 + holding)), abs=1e-6)
    assert weights.min() == 0 and weights.max() == pytest.approx(math.log(1 + len(train)))


def test_found_once_kept_beside_the_tokens_and_mapped(tmp_path, monkeypatch):
    prepared = prepared_corpus(tmp_path, monkeypatch)
    sequences = Packed(prepared, "train", 50, seed=0, keep_last=True)
    finder = ChunkFinder(encoder=tf_idf(prepared), chunk_size=4, top_k=2)
    first = with_chunk_indices(sequences, finder, prepared)
    assert first.path.parent == prepared.path / "retrieval" and isinstance(first._indices, np.memmap)
    for index in (0, 3, -1):
        item, plain = first[index], sequences[index]
        assert torch.equal(item["input_ids"], plain["input_ids"])
        assert torch.equal(item["chunk_indices"], finder.find(plain["input_ids"], plain["articles"]))
    monkeypatch.setattr(ChunkFinder, "find", lambda *_: pytest.fail("found again"))
    again = with_chunk_indices(sequences, finder, prepared)
    assert torch.equal(pickle.loads(pickle.dumps(again))[1]["chunk_indices"], first[1]["chunk_indices"])
    assert len(pickle.dumps(again._indices)) > 1000  # which a worker is not sent
    assert again.manifest["tokens"] == sum(len(sequences[i]["input_ids"]) for i in range(len(sequences)))
    for others, options in ((Packed(prepared, "train", 50, seed=1), finder), (sequences, ChunkFinder(
            encoder=finder.encoder, chunk_size=5))):  # fmt: skip
        with pytest.raises(pytest.fail.Exception, match="found again"):
            with_chunk_indices(others, options, prepared)


def test_articles_of_different_lengths(tmp_path, monkeypatch):
    rows = article_lines(30)
    for i, row in enumerate(rows):
        row["text"] = row["text"][: 60 + 11 * i]
    prepared = prepared_corpus(tmp_path, monkeypatch, rows=rows)
    sequences = Articles(prepared, "train", 10_000)
    finder = ChunkFinder(encoder=tf_idf(prepared, window=3), chunk_size=8)
    for plain, item in zip(sequences, with_chunk_indices(sequences, finder, prepared), strict=True):
        assert torch.equal(item["chunk_indices"], finder.find(plain["input_ids"]))


def test_a_damaged_file_is_named(tmp_path, monkeypatch):
    prepared = prepared_corpus(tmp_path, monkeypatch)
    sequences = Packed(prepared, "train", 50)
    finder = ChunkFinder(encoder=make_encoder("tf_idf", 2, 300), chunk_size=4)
    path = with_chunk_indices(sequences, finder, prepared).path / "indices.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="indices.npy has the wrong checksum.*made again"):
        with_chunk_indices(sequences, finder, prepared)


def test_a_killed_search_leaves_nothing(tmp_path, monkeypatch):
    prepared = prepared_corpus(tmp_path, monkeypatch)
    sequences = Packed(prepared, "train", 50)
    finder = ChunkFinder(encoder=make_encoder("tf_idf", 2, 300), chunk_size=4)
    find, calls = ChunkFinder.find, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return find(self, *args)

    monkeypatch.setattr(ChunkFinder, "find", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with_chunk_indices(sequences, finder, prepared)
    assert [path.suffix for path in (prepared.path / "retrieval").iterdir()] == [".lock"]
    assert len(with_chunk_indices(sequences, finder, prepared)) == len(sequences)


@pytest.mark.parametrize("options", [{"chunk_size": 0}, {"chunk_size": 4, "top_k": 0}])
def test_bad_sizes(options):
    with pytest.raises(DataError, match="at least 1, got 0"):
        ChunkFinder(encoder=make_encoder("tf_idf", 1), **options)
    with pytest.raises(DataError, match="at least 1, got 0"):
        make_encoder("tf_idf", 0)


# ---------------------------------------------------------------------------------------------------- with a model


@pytest.fixture
def sequences(tmp_path, monkeypatch):
    prepared = prepared_corpus(tmp_path, monkeypatch)
    return prepared, Packed(prepared, "train", 60)


def indexed(sequences, encoder, chunk_size: int = 2, **options):
    prepared, packed = sequences
    finder = ChunkFinder(encoder=encoder, chunk_size=chunk_size, within_articles=False, **options)
    return with_chunk_indices(packed, finder, prepared)


def test_the_models_own_embeddings_find_what_its_first_layer_searches_for(sequences):
    model = make_model("gla", "default", vocab_size=300)  # layer 0, untrained: RMSNorm, mean of the chunk, top 1
    items = indexed(sequences, MeanEmbedding(model.get_input_embeddings().weight))
    found = compare(model, items, count=4)
    assert found["overlap"] == {0: 1.0} and found["found"] == 1.0
    assert found["loss_difference"] == pytest.approx(0, abs=1e-6)
    assert 0 < found["overlap_by_chance"][0] < 0.5
    assert found["tokens"] == 4 * 59


def test_other_indices_change_the_loss_by_what_the_comparison_says(sequences):
    model = make_model("gla", "linear", vocab_size=300)  # layer 1, two chunks
    items = indexed(sequences, make_encoder("tf_idf", 2, 300), top_k=2)
    found = compare(model, items, count=3)
    with torch.no_grad():
        losses = [(model(item["input_ids"][None], labels=item["input_ids"][None]).loss,
                   model(item["input_ids"][None], labels=item["input_ids"][None],
                         chunk_indices=item["chunk_indices"][None]).loss) for item in (items[i] for i in range(3))]
    searched, given = (sum(map(float, each)) / 3 for each in zip(*losses, strict=True))
    assert found["loss_search"] == pytest.approx(searched) and found["loss_indices"] == pytest.approx(given)
    assert found["loss_difference"] == pytest.approx(given - searched, abs=1e-6) and abs(given - searched) > 1e-4
    assert 0 < found["overlap"][1] < 1


def test_labels_that_are_ignored_do_not_count(sequences):
    class Labelled(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            ids = sequences[1][index]["input_ids"]
            return {"input_ids": ids, "labels": torch.where(torch.arange(len(ids)) < 20, -100, ids)}

    model = make_model("gla", "default", vocab_size=300)
    items = indexed((sequences[0], Labelled()), make_encoder("tf_idf", 2, 300))
    assert compare(model, items)["tokens"] == 80
    with torch.no_grad():
        losses = [float(model(item["input_ids"][None], labels=item["labels"][None]).loss) for item in
                  (items[0], items[1])]
    assert compare(model, items)["loss_search"] == pytest.approx(sum(losses) / 2)


def test_a_model_without_search_or_with_other_chunks_is_refused(sequences):
    items = indexed(sequences, make_encoder("tf_idf", 2, 300))
    with pytest.raises(DataError, match="no Resona layers"):
        compare(make_model("gla", vocab_size=300), items)
    with pytest.raises(DataError, match="chunks of 2 tokens, and the model's have 3"):
        compare(make_model("gla", "mean", vocab_size=300), items)


def test_a_name_in_real_text_is_found_again(tmp_path, monkeypatch):
    """The last paragraph that mentions a rare name looks into the chunk that mentioned it first."""
    needs("gpt2", "squad")
    new_cache(tmp_path, monkeypatch)
    prepared = prepare(corpus("squad"))
    row = next(row for row in prepared.splits["train"] if row["title"] == "Ctenophora")
    ids = torch.tensor(row["input_ids"])
    finder = ChunkFinder(encoder=tf_idf(prepared), chunk_size=32)
    found = finder.find(ids)[:, 0]
    tokens, counts = ids[: len(ids) // 32 * 32].unique(return_counts=True)
    seldom = [int(token) for token in tokens[counts == 2] if finder.encoder.idf[token] > 2.5]
    pairs = [torch.nonzero(ids == token).flatten().tolist() for token in seldom]
    pairs = [pair for pair in pairs if len(pair) == 2 and pair[1] - pair[0] > 64]
    hits = sum(int(found[second]) == first // 32 for first, second in pairs)
    by_chance = sum(32 / second for _, second in pairs)
    assert len(pairs) > 20 and hits > 5 * by_chance
