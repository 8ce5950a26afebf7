"""A prepared corpus: a folder of the cache with an Arrow file a split, and a manifest that says what they are."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrm_recall.data.errors import DataError
from lrm_recall.data.store import cache_root, check_sha256, sha256

if TYPE_CHECKING:
    from datasets import DatasetDict

MANIFEST = "manifest.json"
KEY_LENGTH = 16


class Prepared:
    """A tokenised corpus on disk, every file checked by its SHA-256.

    Attributes:
        path: its folder.
        manifest: what it is: corpus, source, revision, tokenizer, counts of each split.

    Raises:
        DataError: a file is missing or is not the one that was written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.manifest = read_manifest(path)
        for name, split in self.manifest["splits"].items():
            check_sha256(path / f"{name}.arrow", split["sha256"], remedy(path))

    def __repr__(self) -> str:
        return f"Prepared({self.manifest['corpus']!r}, source={self.source!r}, revision={self.revision!r})"

    @property
    def source(self) -> str:
        """Which source was used: "hub:owner/name/config" or "offline:name"."""
        return self.manifest["source"]

    @property
    def revision(self) -> str:
        """Names the content: 16 hex digits of a SHA-256 over all titles, texts and ids of all splits."""
        return self.manifest["digest"][:KEY_LENGTH]

    @property
    def separator(self) -> int | None:
        """The id that ends a text (GPT-2: 50256), put between articles; None if the tokenizer has none."""
        return self.manifest["tokenizer"]["end_of_text"]

    @property
    def vocab_size(self) -> int:
        """Number of ids: the least vocab_size of a model."""
        return self.manifest["tokenizer"]["tokens"]

    @functools.cached_property
    def splits(self) -> DatasetDict:
        """The splits, memory-mapped: columns title, text, words, input_ids; a row an article."""
        from datasets import Dataset, DatasetDict

        names = self.manifest["splits"]
        return DatasetDict({name: Dataset.from_file(str(self.path / f"{name}.arrow")) for name in names})

    def provenance(self) -> dict[str, Any]:
        """What a row of results says of its data: `source` and `revision` first, the fields that a row needs."""
        manifest = self.manifest
        return {
            "source": self.source,
            "revision": self.revision,
            "corpus": manifest["corpus"],
            "source_revision": manifest["source_revision"],
            "tokenizer": manifest["tokenizer"],
            "augmentation": manifest.get("augmentation"),
            "splits": {
                name: {count: split[count] for count in ("articles", "tokens", "words", "longest")}
                for name, split in manifest["splits"].items()
            },
            "dropped": manifest["dropped"],
        }


def folder(corpus: str, key: Mapping[str, Any]) -> Path:
    """Where a corpus is kept that `key`, all that decides the result, describes."""
    return _root() / f"{corpus}-{_hash(key)[:KEY_LENGTH]}"


def folders() -> list[Path]:
    """The folders of all prepared corpora."""
    return sorted(path.parent for path in _root().glob(f"*/{MANIFEST}") if "." not in path.parent.name)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus's folder, itself checked; the files beside it are not.

    Raises:
        DataError: it is missing or damaged.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        expected = manifest.pop("sha256")
    except OSError:
        raise DataError(f"{file} is missing; {remedy(path)}") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DataError(f"{file} is not a manifest of ours; {remedy(path)}") from None
    if _hash(manifest) != expected:
        raise DataError(f"{file} has the wrong checksum; {remedy(path)}")
    return manifest


def write_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a folder whose files are complete."""
    splits = {name: {**split, "sha256": sha256(path / f"{name}.arrow")} for name, split in content["splits"].items()}
    digest = _hash({name: split["digest"] for name, split in splits.items()})
    manifest = {**content, "splits": splits, "digest": digest}
    text = json.dumps({**manifest, "sha256": _hash(manifest)}, indent=1, ensure_ascii=False)
    (path / MANIFEST).write_text(text + "\n", encoding="utf-8")


def remedy(path: Path) -> str:
    """What to do about a folder that is damaged."""
    return f"make it again with `lrm-recall data prepare --fresh`, or delete {path}"


def _root() -> Path:
    return cache_root() / "prepared"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
