"""Perplexity: every token once, whatever the windows and batches; by word and by position; what packing leaks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_ARGS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_small import VOCAB, prepare_small, small_cache

from lrm_recall import RecurrentLM, RecurrentLMConfig
from lrm_recall.data import DataError
from lrm_recall.evaluate.perplexity import ArticleWindows, collate, perplexity
from lrm_recall.ops.loss import IGNORED

RESONA = {"layers": [1], "chunk_size": 4, "top_k": 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield prepare_small(small_cache(tmp_path_factory.mktemp("ppl"), patch))


def make_model(mixer: str = "gla", resona: dict | None = None) -> RecurrentLM:
    torch.manual_seed(0)
    return RecurrentLM(RecurrentLMConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, intermediate_size=24, mixer=mixer,
        mixer_args=SMALL_ARGS[mixer], resona=resona, initializer_range=0.3,
    )).eval()  # fmt: skip


def by_hand(model, prepared, split, length, separators=False):
    """Nats and tokens of a split, window by window, through the model's own loss."""
    nats = tokens = 0
    for ids in prepared.splits[split]["input_ids"]:
        stream = [prepared.separator, *ids, *([prepared.separator] if separators else [])]
        for start in range(0, len(stream) - 1, length - 1):
            window = torch.tensor([stream[start : start + length]])
            with torch.no_grad():
                logits = model(input_ids=window, use_cache=False).logits
            nats += F.cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum").item()
            tokens += window.shape[1] - 1
    return nats, tokens


@pytest.mark.parametrize("separators", [False, True])
@pytest.mark.parametrize("mixer, resona", [("gla", None), ("gla", RESONA), ("attention", None)])
def test_equals_a_direct_computation(prepared, mixer, resona, separators):
    model = make_model(mixer, resona)
    scored = perplexity(model, prepared, "test", 32, batch_size=5, separators=separators)
    nats, tokens = by_hand(model, prepared, "test", 32, separators)
    split = prepared.manifest["splits"]["test"]
    assert scored.tokens == tokens == split["tokens"] + (split["articles"] if separators else 0)
    assert scored.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert scored.by_token == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert scored.by_word == pytest.approx(math.exp(nats / split["words"]), rel=1e-4)


def test_the_batch_changes_nothing(prepared):
    model = make_model(resona=RESONA)
    one, many = (perplexity(model, prepared, "test", 32, batch_size=size) for size in (1, 7))
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    for ours, theirs in zip(many.positions, one.positions, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_positions_are_parts_of_the_whole(prepared):
    scored = perplexity(make_model(), prepared, "test", 100)
    assert [(bucket["start"], bucket["end"]) for bucket in scored.positions] == [(0, 16), (16, 32), (32, 64), (64, 99)]
    assert sum(bucket["tokens"] for bucket in scored.positions) == scored.tokens
    nats = sum(bucket["tokens"] * bucket["loss"] for bucket in scored.positions)
    assert nats / scored.tokens == pytest.approx(scored.loss, rel=1e-9)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(prepared):
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    scored = perplexity(model, prepared, "test", 32)
    assert scored.by_token == pytest.approx(VOCAB, rel=1e-5)
    assert all(bucket["loss"] == pytest.approx(math.log(VOCAB), rel=1e-6) for bucket in scored.positions)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(2, 300), separators=st.booleans(), split=st.sampled_from(["train", "validation", "test"]))
def test_every_token_is_a_target_once_in_its_order(prepared, length, separators, split):
    windows = ArticleWindows(prepared, split, length, separators=separators)
    targets, starts = [], 0
    for i in range(len(windows)):
        item = windows[i]
        assert 2 <= len(item["input_ids"]) <= length and item["labels"][0] == IGNORED
        assert torch.equal(item["labels"][1:], item["input_ids"][1:])
        before = prepared.separator if not targets or starts else targets[-1]
        assert item["input_ids"][0] in (before, prepared.separator)
        targets += item["labels"][1:].tolist()
    ends = [prepared.separator] if separators else []
    assert targets == [token for ids in prepared.splits[split]["input_ids"] for token in [*ids, *ends]]


def test_windows_of_one_article_begin_with_the_token_before_them(prepared):
    windows = ArticleWindows(prepared, "train", 16)
    ids = prepared.splits["train"]["input_ids"][0]
    assert windows[0]["input_ids"].tolist() == [prepared.separator, *ids[:15]]
    assert windows[1]["input_ids"].tolist() == ids[14:30]


def test_behind_puts_the_article_before_in_front_and_scores_the_same_tokens(prepared):
    alone, behind = (ArticleWindows(prepared, "test", 24, behind=tokens) for tokens in (0, 6))
    articles = prepared.splits["test"]["input_ids"]
    assert len(alone) == len(behind) == len(articles)
    for i in range(len(alone)):
        ours = behind[i]["labels"]
        assert ours[ours != IGNORED].tolist() == alone[i]["labels"][1:].tolist()
        assert behind[i]["input_ids"][:7].tolist() == [*articles[i - 1][-6:], prepared.separator]


def test_behind_shows_what_the_state_carries_over(prepared):
    """A recurrent state and Resona carry another article over; a model that sees its token alone does not."""
    for model, leaks in ((make_model("gla"), True), (make_model("gla", RESONA), True), (make_model("attention"), True),
                         (forgetful(), False)):  # fmt: skip
        alone, behind = (perplexity(model, prepared, "test", 24, behind=tokens).loss for tokens in (0, 6))
        assert (abs(alone - behind) > 1e-4) is leaks
    assert perplexity(model, prepared, "test", 24, behind=6).by_word is None


def forgetful() -> RecurrentLM:
    model = make_model("gla")
    for block in model.model.layers:
        torch.nn.init.zeros_(block.mixer.o_proj.weight)
    return model


def test_random_chunks_change_what_resona_reads_and_nothing_else(prepared):
    model = make_model(resona=RESONA)
    found, drawn, again = (perplexity(model, prepared, "test", 32, chunks=chunks)
                           for chunks in ("found", "random", "random"))
    assert drawn == again and abs(found.loss - drawn.loss) > 1e-5
    off = make_model(resona=RESONA | {"alpha": 1.0})
    assert perplexity(off, prepared, "test", 32).loss == pytest.approx(
        perplexity(off, prepared, "test", 32, chunks="random").loss, rel=1e-6)


def test_random_chunks_need_resona(prepared):
    with pytest.raises(ValueError, match="this one has none"):
        perplexity(make_model(), prepared, "test", 32, chunks="random")


def test_a_hopeless_model_still_fits_a_row(prepared):
    model = make_model()
    torch.nn.init.normal_(model.lm_head.weight, std=1e4)
    assert math.isfinite(perplexity(model, prepared, "test", 32).by_word)


def test_bf16_is_close(prepared):
    model = make_model(resona=RESONA)
    exact, rounded = (perplexity(model, prepared, "test", 32, bf16=bf16).loss for bf16 in (False, True))
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("change, says", [
    ({"split": "dev"}, "no split 'dev'; there are: train"),
    ({"length": 1}, "length must be at least 2"),
    ({"behind": -1}, "behind None or at least 0"),
])  # fmt: skip
def test_bad_input_is_refused(prepared, change, says):
    with pytest.raises(DataError, match=says):
        ArticleWindows(prepared, **({"split": "test", "length": 8} | change))
    with pytest.raises(IndexError):
        ArticleWindows(prepared, "test", 8)[100_000]


def test_collate_fills_up_on_the_right(prepared):
    items = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (3, 5)]
    batch = collate(items)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[0, 1, 2, IGNORED, IGNORED], [0, 1, 2, 3, 4]]
