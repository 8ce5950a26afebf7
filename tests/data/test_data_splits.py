"""Splits by article: nothing of a test or validation split is in training."""

import random

import pytest
from corpus_files import needs
from hypothesis import given
from hypothesis import strategies as st

from lrm_recall.data import DataError
from lrm_recall.data.articles import Article
from lrm_recall.data.offline import PACKAGED
from lrm_recall.data.splits import fingerprints, head, split_articles, without

OPTIONS = {"validation": 0.1, "test": 0.2, "seed": 0, "max_articles": None}
ARTICLES = [Article(f"t{i}", f"text number {i}") for i in range(100)]


def shared(splits: dict[str, list[Article]]) -> set[str]:
    """What training has in common with the other splits: titles and beginnings of texts."""
    train = {mark for article in splits["train"] for mark in fingerprints(article)}
    held_out = (article for name, articles in splits.items() if name != "train" for article in articles)
    return train & {mark for article in held_out for mark in fingerprints(article)}


@given(
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=4, max_size=40),
    st.floats(0, 0.3), st.floats(0, 0.3), st.integers(0, 9),
)
def test_no_article_and_no_text_is_in_two_splits(texts, validation, test, seed):
    articles = [Article(f"t{i}", text) for i, text in enumerate(texts)]
    try:
        splits = split_articles(articles, validation=validation, test=test, seed=seed, max_articles=None)
    except DataError:
        return  # too few different texts
    assert shared(splits) == set()
    assert sorted(article for split in splits.values() for article in split) == sorted(articles)
    assert ("test" in splits, "validation" in splits) == (test > 0, validation > 0)


def test_shares_order_and_seed():
    splits = split_articles(ARTICLES, **OPTIONS)
    assert {name: len(split) for name, split in splits.items()} == {"train": 70, "validation": 10, "test": 20}
    assert all(split == sorted(split, key=ARTICLES.index) for split in splits.values())
    assert split_articles(ARTICLES, **{**OPTIONS, "seed": 1})["test"] != splits["test"]


def test_the_order_of_the_source_does_not_decide():
    shuffled = random.Random(0).sample(ARTICLES, len(ARTICLES))
    first, second = (split_articles(articles, **OPTIONS) for articles in (ARTICLES, shuffled))
    assert {name: set(split) for name, split in first.items()} == {name: set(split) for name, split in second.items()}


def test_fewer_articles_are_a_part_of_all():
    few = split_articles(ARTICLES, **{**OPTIONS, "max_articles": 30})
    assert {name: len(split) for name, split in few.items()} == {"train": 21, "validation": 3, "test": 6}
    assert set(few["test"]) < set(split_articles(ARTICLES, **OPTIONS)["test"])


def test_the_same_text_in_other_words_is_recognised():
    assert head("The *Red*\n Fox, " * 40) == head("the red fox " * 40)
    assert head("a" * 199 + "b") != head("a" * 199 + "c")


def test_too_few_articles():
    with pytest.raises(DataError, match="2 articles are too few"):
        split_articles(ARTICLES[:2], **OPTIONS)


def test_the_hubs_training_split_leaves_out_what_is_held_out():
    dropped = []
    held_out = {*fingerprints(Article("t1", "other")), *fingerprints(Article("t", "text number 2"))}
    kept = list(without(ARTICLES[:4], held_out, lambda: dropped.append(1)))
    assert (kept, len(dropped)) == ([ARTICLES[0], ARTICLES[3]], 2)


def test_no_real_article_leaks():
    needs("hotpotqa")
    articles = list(PACKAGED["hotpotqa"].articles())
    splits = split_articles(articles, validation=0.02, test=0.02, seed=0, max_articles=None)
    assert shared(splits) == set()
    assert sum(map(len, splits.values())) == 66_581
    by_title = {article.title: name for name, split in splits.items() for article in split}
    assert len(by_title) == 66_581
