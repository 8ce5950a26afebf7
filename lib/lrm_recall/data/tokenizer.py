"""Tokenizers: GPT-2's byte-level BPE, or any tokenizer of `transformers` by name.

GPT-2's comes from the hub (pinned) when it is here already or the hub answers. Otherwise it is built from the ranks of
its 50,256 tokens, which the source distribution of openai-whisper carries: same ids, same ids for every text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrm_recall.data.errors import DataError
from lrm_recall.data.fetch import Package
from lrm_recall.data.hub import no_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GPT2 = "gpt2"
_GPT2_REPO, _GPT2_REVISION = "openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"
_GPT2_FINGERPRINT = "71cca498f566a6fce90612118ffe70ec265ffdc746e7e6743a2253d346af4d30"
_RANKS = "whisper/assets/gpt2.tiktoken"
_WHISPER = Package(
    "openai-whisper==20250625",
    "37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96",
    {_RANKS: "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"},
)
_END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(name: str = GPT2, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer; its attribute `origin` says where it came from.

    Args:
        name: "gpt2", a repository of the hub, or a directory.
        revision: a commit of the repository; default: what `identity` resolves.

    Raises:
        DataError: it cannot be had.
    """
    if name == GPT2 and revision in (None, _GPT2_REVISION):
        return _gpt2()
    from transformers import AutoTokenizer

    revision = identity(name, revision).get("revision")
    try:
        place = name if revision else Path(name).expanduser()
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision or "main")
    except Exception as error:  # of transformers, the hub's client, the network: dozens of kinds
        raise _unavailable(name, revision, error) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # transformers makes one without any file
        raise DataError(f"the tokenizer {name} has no vocabulary: its files are missing")
    tokenizer.origin = f"directory:{name}" if revision is None else f"hub:{name}@{revision}"
    return tokenizer


def identity(name: str, revision: str | None) -> dict[str, Any]:
    """What decides the ids, without loading the tokenizer: part of the cache's key.

    Raises:
        DataError: neither a directory, nor a repository that the hub or its cache here knows.
    """
    if name == GPT2 and revision in (None, _GPT2_REVISION):
        return {"name": GPT2, "revision": _GPT2_REVISION}
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise DataError(f"the tokenizer {name} is a directory, which has no revision {revision!r}")
        digest = hashlib.sha256()
        for file in sorted(path.glob("*.*")):
            if file.suffix in (".json", ".txt", ".model", ".tiktoken"):
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
        return {"name": name, "files": digest.hexdigest()}
    from huggingface_hub import resolve_revision

    try:
        return {"name": name, "revision": resolve_revision(name, revision=revision).resolved}
    except Exception as error:  # as above
        raise _unavailable(name, revision, error) from error


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary: equal for tokenizers with equal tokens and ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def check_vocabulary(tokens: int, vocab_size: int | None, name: str) -> None:
    """Raise DataError unless every id of a tokenizer with this many tokens fits the model; None: no model yet."""
    if vocab_size is not None and tokens > vocab_size:
        raise DataError(f"the tokenizer {name} has {tokens:,} tokens, more than the model's vocab_size {vocab_size:,}; "
                        f"set vocab_size to {tokens} or more, or take another tokenizer")


def _gpt2() -> PreTrainedTokenizerBase:
    from transformers import GPT2Tokenizer

    if files := _gpt2_files():
        vocab = json.loads(files[0].read_text(encoding="utf-8"))
        lines = files[1].read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        origin = f"hub:{_GPT2_REPO}@{_GPT2_REVISION}"
    else:
        vocab, merges = _vocabulary(_WHISPER.fetch(_RANKS))
        origin = f"ranks:{_WHISPER.requirement}"
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges)
    if fingerprint(tokenizer) != _GPT2_FINGERPRINT:
        raise DataError(f"the GPT-2 tokenizer from {origin} does not have GPT-2's vocabulary")
    tokenizer.origin = origin
    return tokenizer


def _gpt2_files() -> tuple[Path, Path] | None:
    """GPT-2's vocabulary and merges from the hub or its cache here; None when they cannot be had."""
    from huggingface_hub import hf_hub_download

    for local_files_only in (True, False):
        if not local_files_only and no_answer(_GPT2_REPO, _GPT2_REVISION, "model"):
            return None
        try:
            vocab, merges = (
                Path(hf_hub_download(_GPT2_REPO, name, revision=_GPT2_REVISION, local_files_only=local_files_only))
                for name in ("vocab.json", "merges.txt")
            )
        except Exception:  # not here, or the download broke off: the ranks give the same ids
            continue
        return vocab, merges
    return None


def _vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's vocabulary and merges from a file of ranks: a line a token, base64 of its bytes and its rank.

    A token's rank is its id and, but for the 256 single bytes, the order in which it was merged. Its two parts are
    what the merges before it make of its bytes.
    """
    lines = (line.split() for line in path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letters = _byte_letters()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            left, right = _parts(token, ranks)
            merges.append(("".join(letters[byte] for byte in left), "".join(letters[byte] for byte in right)))
    vocab[_END_OF_TEXT] = len(vocab)
    return vocab, merges


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts whose merge is `token`: byte-pair encoding of its bytes that stops before the last merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        _, best = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _byte_letters() -> dict[int, str]:
    """GPT-2 writes a byte as a letter: the printable ones of Latin-1 as themselves, the others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _unavailable(name: str, revision: str | None, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200]
    where = f" at revision {revision}" if revision else ""
    return DataError(f"cannot get the tokenizer {name}{where}: there is no such directory, and the hub did not give it "
                     f"({type(error).__name__}: {reason})")
