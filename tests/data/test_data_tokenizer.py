"""Tokenizers: GPT-2's ids whatever it is made from, and tokenizers that cannot be used."""

import base64

import pytest
import regex
from corpus_files import needs, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.data import DataError, load_tokenizer
from lrm_recall.data import tokenizer as module
from lrm_recall.data.tokenizer import check_vocabulary, identity

KNOWN = {
    "Hello world": [15496, 995],
    " Hello world": [18435, 995],
    "Hello, my dog is cute": [15496, 11, 616, 3290, 318, 13779],
    "The quick brown fox jumps over the lazy dog": [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290],
    "<|endoftext|>": [50256],
}
# The pattern by which GPT-2 cuts a text before its byte pairs are merged (Radford et al. 2019, the released encoder).
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


@pytest.fixture(scope="module")
def gpt2():
    needs("gpt2")
    return load_tokenizer()


@pytest.fixture(scope="module")
def ranks(gpt2):
    lines = module._WHISPER.fetch(module._RANKS).read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def merged(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding from the ranks alone."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks[left + right], i) for i, (left, right) in enumerate(zip(parts, parts[1:], strict=False))
                 if left + right in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_known_encodings(gpt2):
    assert {text: gpt2(text)["input_ids"] for text in KNOWN} == KNOWN
    assert (len(gpt2), gpt2.eos_token_id) == (50257, 50256)
    assert gpt2.origin.startswith(("hub:openai-community/gpt2@", "ranks:openai-whisper=="))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_is_encoded_as_the_ranks_say_and_comes_back(gpt2, ranks, text):
    ids = gpt2(text, split_special_tokens=True)["input_ids"]
    assert ids == [token for word in WORDS.findall(text) for token in merged(word.encode(), ranks)]
    assert gpt2.decode(ids, clean_up_tokenization_spaces=False) == text


def test_another_vocabulary_is_not_taken_for_gpt2s(monkeypatch):
    monkeypatch.setattr(module, "_gpt2_files", lambda: None)
    monkeypatch.setattr(module, "_vocabulary", lambda path: ({"a": 0, "<|endoftext|>": 1}, []))
    monkeypatch.setattr(module.Package, "fetch", lambda package, member: None)
    with pytest.raises(DataError, match="does not have GPT-2's vocabulary"):
        load_tokenizer()


def test_a_tokenizer_in_a_directory(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(path))
    assert (len(tokenizer), tokenizer.origin) == (300, f"directory:{path}")
    before = identity(str(path), None)
    (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text() + " ")
    assert identity(str(path), None) != before
    with pytest.raises(DataError, match="is a directory, which has no revision 'main'"):
        identity(str(path), "main")


def test_a_tokenizer_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot get the tokenizer nobody/nothing: there is no such directory"):
        load_tokenizer("nobody/nothing")


def test_a_directory_without_a_vocabulary(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(DataError, match="has no vocabulary|cannot get the tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_vocabulary_that_does_not_fit_the_model():
    check_vocabulary(300, 300, "x")
    check_vocabulary(300, None, "x")
    with pytest.raises(DataError, match="x has 300 tokens, more than the model's vocab_size 299; set vocab_size"):
        check_vocabulary(300, 299, "x")
