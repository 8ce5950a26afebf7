"""An augmentation that a language model writes: any causal model of `transformers`, by name.

The paper takes Llama-3.1-70B and gives no prompt; the one here asks for questions whose answers must be looked up.
What has been written is kept, an article a row of a database (SQLite), under all that decides it: model, revision,
prompt, bounds and text. A run that was killed goes on with the article at which it was stopped, in the same batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lrm_recall.data.articles import Article
from lrm_recall.data.errors import DataError
from lrm_recall.data.store import cache_root, sha256
from lrm_recall.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = (
    "{text}\n\nWrite questions about the text above that somebody can answer only who has just read it: about its "
    "names, places, dates and numbers, from all of its parts. Put the answer behind each question, in the words of "
    "the text.\n\nQuestion:"
)
_PLACE = "{text}"
_DECIDES = (".json", ".safetensors", ".txt", ".model")  # files of a directory that decide what its model writes
_WAIT_S = 60  # for another process that writes into the same database


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """Text that a model writes behind each article.

    Attributes:
        model: a repository of the hub, or a directory; safetensors alone are read, and no code of the repository.
        revision: a commit of the repository; None for the newest that is known, which the result then names.
        prompt: `{text}` stands for the article; handed over as a message where the tokenizer has a chat template.
        max_new_tokens: longest addition.
        max_article_tokens: how much of an article the model reads.
        batch_size: articles at a time; decides nothing but speed and rounding.
        dtype: of the parameters; "auto" for that of the files.
        device: "auto" spreads a model over all GPUs (accelerate); None for a GPU where there is one.

    Raises:
        ValueError: a prompt without a place for the article, or a bound below 1.
    """

    kind: ClassVar[str] = "written"
    model: str
    revision: str | None = None
    prompt: str = PROMPT
    max_new_tokens: int = 256
    max_article_tokens: int = 2048
    batch_size: int = 8
    dtype: str = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        if self.prompt.count(_PLACE) != 1:
            raise ValueError(f"written: the prompt must hold {_PLACE} once, where the article goes, got "
                             f"{self.prompt!r:.80}")
        for name in ("max_new_tokens", "max_article_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"written: {name} must be at least 1, got {getattr(self, name)}")

    def identity(self) -> dict[str, Any]:
        """All that decides the additions; of a repository its commit, of a directory its files."""
        return {
            "kind": self.kind, "model": self.model, **self._origin, "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens, "max_article_tokens": self.max_article_tokens, "dtype": self.dtype,
        }  # fmt: skip

    @property
    def database(self) -> Path:
        """Where the additions of this model, prompt and bounds are kept."""
        name = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]
        return cache_root() / "written" / f"{name}.sqlite"

    def extend(self, articles: Sequence[Article]) -> list[str]:
        """What the model writes behind each article: from the database, or now, a batch at a time.

        Raises:
            DataError: the model or its tokenizer cannot be had, or the database cannot be written.
        """
        keys = [hashlib.sha256(article.text.encode()).hexdigest() for article in articles]
        with self._opened() as database:
            known = dict(row for key in keys
                         for row in database.execute("SELECT key, text FROM written WHERE key = ?", (key,)))
            missing = {key: article for key, article in zip(keys, articles, strict=True) if key not in known}
            by_length = sorted(missing, key=lambda key: len(missing[key].text))  # rows of a batch are padded little
            for start in range(0, len(by_length), self.batch_size):
                batch = by_length[start : start + self.batch_size]
                texts = self._write([missing[key].text for key in batch])
                rows = list(zip(batch, texts, strict=True))
                with database:  # committed when the block ends: what a killed process has written stands
                    database.executemany("INSERT OR REPLACE INTO written VALUES (?, ?)", rows)
                known.update(rows)
        return [known[key] for key in keys]

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            self.database.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.database, timeout=_WAIT_S)) as database:
                database.execute("CREATE TABLE IF NOT EXISTS written (key TEXT PRIMARY KEY, text TEXT NOT NULL)")
                yield database
        except (sqlite3.Error, OSError) as error:
            raise DataError(f"cannot keep what the model writes in {self.database}: {error}; what it holds is "
                            "whole") from error

    @cached_property
    def _origin(self) -> dict[str, str]:
        """The commit of a repository, or the SHA-256 of a directory's files."""
        path = Path(self.model).expanduser()
        if path.is_dir():
            if self.revision is not None:
                raise DataError(f"the model {self.model} is a directory, which has no revision {self.revision!r}")
            files = sorted(file for file in path.iterdir() if file.suffix in _DECIDES)
            content = "".join(f"{file.name} {sha256(file)}\n" for file in files)
            return {"files": hashlib.sha256(content.encode()).hexdigest()}
        from huggingface_hub import resolve_revision

        return {"revision": self._had(lambda: resolve_revision(self.model, revision=self.revision).resolved)}

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self.model, self._origin.get("revision"))
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise DataError(f"the tokenizer of {self.model} has neither padding nor an end of text")
        return tokenizer

    @cached_property
    def _model(self) -> PreTrainedModel:
        import torch
        from transformers import AutoModelForCausalLM

        import lrm_recall.model  # noqa: F401  so that a model of ours is known to transformers

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        spread = {"device_map": "auto"} if device == "auto" else {}
        model = self._had(lambda: AutoModelForCausalLM.from_pretrained(
            self.model, revision=self._origin.get("revision"), dtype=self.dtype, use_safetensors=True,
            trust_remote_code=False, **spread,
        ))
        return (model if spread else model.to(device)).eval()

    def _had(self, get: Callable[[], Any]) -> Any:
        try:
            return get()
        except Exception as error:  # of transformers, the hub's client, the network: dozens of kinds
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"cannot get the model {self.model} ({type(error).__name__}: {reason})") from error

    def _write(self, texts: Sequence[str]) -> list[str]:
        """The most probable continuation of each prompt."""
        import torch

        tokenizer, model = self._tokenizer, self._model
        prompts = [self._prompt(text) for text in texts]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False,
                           add_special_tokens=tokenizer.chat_template is None).to(model.device)  # fmt: skip
        with torch.inference_mode():
            ids = model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1,
                pad_token_id=tokenizer.pad_token_id,
            )  # [B, prompt + new]
        new = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _prompt(self, text: str) -> str:
        tokenizer = self._tokenizer
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > self.max_article_tokens:
            text = tokenizer.decode(ids[: self.max_article_tokens])
        prompt = self.prompt.replace(_PLACE, text)
        if tokenizer.chat_template is None:
            return prompt
        message = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
