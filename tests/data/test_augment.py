"""Augmentation: from the article's own text alone, after splitting, bounded, once; a model's words survive a kill."""

import functools
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpus_files import needs, new_cache, small_corpus, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lrm_recall.data import DataError, Packed, corpus, prepare
from lrm_recall.data.articles import Article
from lrm_recall.data.augment import augment, read_augmentation
from lrm_recall.data.augment_recap import ANSWER, BLANK, QUESTION, Recap, make_cloze, sentences
from lrm_recall.data.augment_written import PROMPT, Written

ROOT = Path(__file__).resolve().parents[2]
TEXT = (
    "The film was directed by Tim Burton and released in 1994. It stars Johnny Depp as a director of low renown. "
    "The film was made in Los Angeles with little money. However much it cost, nobody has told us so far."
)


def articles(count: int) -> list[dict]:
    """Articles with a name of their own in each of three sentences."""
    return [
        {"title": f"Article {i}",
         "text": f"The first bridge of Town{i}a was built by Anna{i} Miller long ago. It stood for many years until "
                 f"the flood of {1000 + i} came and took it. Another was opened in the presence of King{i} Charles."}
        for i in range(count)
    ]  # fmt: skip


def added(prepared, augmented, split: str) -> list[str]:
    """What was put behind each article."""
    found = []
    for old, new in zip(prepared.splits[split], augmented.splits[split], strict=True):
        assert new["title"] == old["title"] and new["text"].startswith(old["text"])
        found.append(new["text"][len(old["text"]) :].lstrip("\n"))
    return found


def filled(recap: str) -> list[tuple[str, str]]:
    """The sentences of a recap with their gaps filled, and what fills them."""
    pairs = re.findall(rf"{QUESTION}(.*)\n{ANSWER}(.*)", recap)
    return [(question.replace(BLANK, answer), answer) for question, answer in pairs]


# ---------------------------------------------------------------------------------------------------- recap


def test_what_is_asked_of_a_text():
    gaps = [make_cloze(sentence, TEXT) for sentence in sentences(TEXT)]
    assert [gap and gap.answer for gap in gaps] == ["Tim Burton", "Johnny Depp", "Los Angeles", None]
    assert gaps[0].question == f"The film was directed by {BLANK} and released in 1994."


def test_a_sentence_over_two_lines_is_one_and_a_piece_of_a_line_is_none():
    text = "A heading of Some Importance in Its Place\nA bridge was built\nin the town of York. More on it is to come"
    assert sentences(text) == ["A bridge was built in the town of York."]


WORDS = ["the", "a", "river", "Paris", "York", "King", "Anna", "1994", "was", "of", "in", "ran", "(so)", '"it"', "e.g.",
         "end.", "3.5", "end!", "Why?", "\n"]  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(words=st.lists(st.sampled_from(WORDS), min_size=5, max_size=120), questions=st.integers(1, 5),
       share=st.floats(0.05, 1), seed=st.integers(0, 9))  # fmt: skip
def test_a_recap_says_nothing_that_the_article_does_not_and_keeps_its_bounds(words, questions, share, seed):
    article = Article("Anything", " ".join(words))
    (recap,) = Recap(questions=questions, share=share, seed=seed).extend([article])
    whole = " ".join(article.text.split())
    pairs = filled(recap)
    assert len(pairs) <= questions and len(recap) <= share * len(article.text)
    assert recap.count(QUESTION) == recap.count(ANSWER) == len(pairs)
    for sentence, answer in pairs:
        assert " ".join(sentence.split()) in whole
        assert article.text.count(answer) == 1


def test_the_chosen_splits_are_extended_and_the_others_stay_to_the_byte(tmp_path, monkeypatch):
    prepared = prepare(small_corpus(tmp_path, monkeypatch, rows=articles(60)))
    augmented = augment(prepared, Recap(questions=2, share=1.0))
    for split in ("validation", "test"):
        assert (augmented.path / f"{split}.arrow").read_bytes() == (prepared.path / f"{split}.arrow").read_bytes()
    recaps = added(prepared, augmented, "train")
    assert all(len(filled(recap)) == 2 for recap in recaps)
    manifest = augmented.manifest
    assert manifest["augmentation"] == {"kind": "recap", "questions": 2, "share": 1.0, "seed": 0,
                                        "base": prepared.revision, "extended_articles": {"train": 48}}
    assert augmented.source == f"{prepared.source} + recap of train"
    assert manifest["splits"]["train"]["tokens"] > prepared.manifest["splits"]["train"]["tokens"]
    assert augmented.revision != prepared.revision
    assert Packed(augmented, "train", 64)[0]["input_ids"].shape == (64,)


def test_nothing_of_a_test_article_is_in_training(tmp_path, monkeypatch):
    prepared = prepare(small_corpus(tmp_path, monkeypatch, rows=articles(60)))
    augmented = augment(prepared, Recap(questions=3, share=1.0), splits=("train", "validation", "test"))
    for split in ("train", "validation", "test"):
        for row, recap in zip(augmented.splits[split], added(prepared, augmented, split), strict=True):
            number = row["title"].split()[1]
            assert re.findall(r"(?:Town|Anna|King)(\d+)", recap) == [number] * len(re.findall("Town|Anna|King", recap))
    titles = {split: set(rows["title"]) for split, rows in augmented.splits.items()}
    assert titles["train"].isdisjoint(titles["test"] | titles["validation"])


def test_a_second_call_makes_nothing_and_other_options_make_another_corpus(tmp_path, monkeypatch):
    prepared = prepare(small_corpus(tmp_path, monkeypatch, rows=articles(60)))
    first = augment(prepared, Recap())
    twice = augment(first, Recap(seed=1))  # of an augmented corpus
    assert twice.source == f"{prepared.source} + recap of train + recap of train"
    assert augment(prepared, Recap(seed=1)).revision not in (first.revision, twice.revision)
    monkeypatch.setattr("lrm_recall.data.augment._make", lambda *_: pytest.fail("made again"))
    assert augment(prepared, Recap()).revision == first.revision


def test_real_paragraphs_of_wikipedia(tmp_path, monkeypatch):
    needs("gpt2", "squad")
    new_cache(tmp_path, monkeypatch)
    prepared = prepare(corpus("squad", max_articles=4, validation=0.25, test=0.25))
    augmented = augment(prepared, Recap(questions=20))
    for row, recap in zip(prepared.splits["train"], added(prepared, augmented, "train"), strict=True):
        pairs = filled(recap)
        assert len(pairs) == 20
        for sentence, answer in pairs:
            assert sentence in row["text"] and row["text"].count(answer) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [("recap", "must be a mapping with a kind"), ({"kind": "recaps"}, "did you mean 'recap'"),
     ({"kind": "recap", "question": 3}, "did you mean 'questions'"),
     ({"kind": "recap", "questions": "3"}, "must be int"), ({"kind": "recap", "questions": 0}, "at least 1, got 0"),
     ({"kind": "recap", "share": 1.5}, "at most 1, got 1.5"),
     ({"kind": "written"}, "'written' lacks model"),
     ({"kind": "written", "model": "m", "prompt": "Hi"}, "must hold {text} once"),
     ({"kind": "written", "model": "m", "batch_size": 0}, "batch_size must be at least 1, got 0")],
)  # fmt: skip
def test_bad_options(values, message):
    with pytest.raises(DataError, match=message):
        read_augmentation(values)


def test_bad_splits(tmp_path, monkeypatch):
    prepared = prepare(small_corpus(tmp_path, monkeypatch))
    for splits in (("trains",), (), "train"):
        with pytest.raises(DataError, match="splits must be some of train, validation, test"):
            augment(prepared, Recap(), splits=splits)


# ---------------------------------------------------------------------------------------------------- written


@functools.cache
def tiny_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return tiny_model().state_dict()


def tiny_model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_layer=1, n_head=2, n_embd=16, n_positions=512,
                                      initializer_range=0.5))  # fmt: skip


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """A language model of transformers, with its tokenizer, in a directory."""
    path = write_tokenizer(tmp_path / "model")
    model = tiny_model()
    model.load_state_dict(tiny_weights())
    model.save_pretrained(path)
    return path


def writer(folder: Path, **options) -> Written:
    return Written(**{"model": str(folder), "max_new_tokens": 8, "max_article_tokens": 60, **options})


def alone(folder: Path, text: str) -> str:
    """What the model writes behind one article, by the plain loop."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), GPT2LMHeadModel.from_pretrained(folder).eval()
    read = tokenizer.decode(tokenizer(text)["input_ids"][:60])
    ids = tokenizer(PROMPT.replace("{text}", read), return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(8):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_a_batch_of_articles_gets_what_each_would_get_alone(tmp_path, monkeypatch, model_folder):
    prepared = prepare(small_corpus(tmp_path, monkeypatch, rows=articles(12) + [{"title": "S", "text": "Short one."}]))
    augmented = augment(prepared, writer(model_folder, batch_size=3))
    texts = prepared.splits["train"]["text"]
    assert added(prepared, augmented, "train") == [alone(model_folder, text) for text in texts]
    assert len(set(added(prepared, augmented, "train"))) > 1
    assert augmented.manifest["augmentation"]["files"] == writer(model_folder).identity()["files"]


def test_what_was_written_is_not_written_again(tmp_path, monkeypatch, model_folder):
    prepared = prepare(small_corpus(tmp_path, monkeypatch, rows=articles(12)))
    first = augment(prepared, writer(model_folder))
    monkeypatch.setattr(Written, "_write", lambda *_: pytest.fail("written again"))
    assert augment(prepared, writer(model_folder, batch_size=2), fresh=True).revision == first.revision
    with pytest.raises(pytest.fail.Exception, match="written again"):
        augment(prepared, writer(model_folder, max_new_tokens=9))


SCRIPT = """
import os, signal, sys
from pathlib import Path
from lrm_recall.data.augment import augment
from lrm_recall.data.augment_written import Written
from lrm_recall.data.prepared import Prepared
left, write = int(sys.argv[3]), Written._write
def count(self, texts):
    global left
    left -= 1
    return write(self, texts) if left else os.kill(os.getpid(), signal.SIGKILL)
Written._write = count
model = Written(model=sys.argv[2], max_new_tokens=8, max_article_tokens=60, batch_size=2)
augment(Prepared(Path(sys.argv[1])), model)
"""


def run_until_batch(number: int, prepared, folder: Path) -> int:
    """The exit code of a process that is killed when its batch of this number comes up."""
    path = os.pathsep.join(str(ROOT / part) for part in ("lib", "kernels"))
    command = [sys.executable, "-c", SCRIPT, str(prepared.path), str(folder), str(number)]
    return subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch, model_folder):
    prepared = prepare(small_corpus(tmp_path, monkeypatch, rows=articles(15)))
    batches = -(-prepared.manifest["splits"]["train"]["articles"] // 2)
    assert run_until_batch(4, prepared, model_folder) == -signal.SIGKILL
    with sqlite3.connect(writer(model_folder).database) as database:
        assert database.execute("SELECT count(*) FROM written").fetchone() == (6,)
    write, written = Written._write, []
    monkeypatch.setattr(Written, "_write", lambda self, texts: written.append(len(texts)) or write(self, texts))
    augmented = augment(prepared, writer(model_folder, batch_size=2))
    assert len(written) == batches - 3
    texts = prepared.splits["train"]["text"]
    assert added(prepared, augmented, "train") == [alone(model_folder, text) for text in texts]
    leftovers = [path.name for path in augmented.path.parent.iterdir() if ".partial" in path.name]
    assert leftovers == []


def test_a_chat_template_frames_the_prompt(tmp_path, monkeypatch, model_folder):
    config = json.loads((model_folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "<{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}>"
    (model_folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert writer(model_folder, prompt="Of {text}.")._prompt("word") == "<user: Of word.>"


@pytest.mark.parametrize("change", ["no such model", "pickle", "revision", "full disk"])
def test_a_model_that_cannot_be_had_or_kept_leaves_nothing(tmp_path, monkeypatch, model_folder, change):
    prepared = prepare(small_corpus(tmp_path, monkeypatch, rows=articles(12)))
    options = {"revision": "abc"} if change == "revision" else {}
    if change == "pickle":
        (model_folder / "model.safetensors").unlink()
        torch.save(tiny_weights(), model_folder / "pytorch_model.bin")
    if change == "full disk":
        (tmp_path / "cache" / "written").write_text("a file where the folder should be")
    folder = tmp_path / "nothing" if change == "no such model" else model_folder
    message = {"revision": "no revision", "full disk": "cannot keep"}.get(change, "cannot get the model")
    with pytest.raises(DataError, match=message):
        augment(prepared, writer(folder, **options))
    assert [path.name for path in (tmp_path / "cache" / "prepared").iterdir() if path.suffix != ".lock"] == [
        prepared.path.name
    ]
