"""Where a checkpoint's files are: in a directory, or on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
_PATTERNS = {  # nothing else of a repository is fetched, so no code and, unless it is trusted, no pickle
    SAFETENSORS: ["config.json", "model*.safetensors", "model.safetensors.index.json"],
    PICKLE: ["config.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"],
}


def find_directory(
    name_or_path: str | Path, *, revision: str | None, trust_pickle: bool, local_files_only: bool
) -> Path:
    """The directory with a checkpoint's files, fetched from the hub unless it is here already.

    Raises:
        FileNotFoundError: neither a directory here nor a repository of the hub.
        ValueError: a revision of a directory.
    """
    local = Path(name_or_path).expanduser()
    if local.is_dir():
        if revision is not None:
            raise ValueError(f"{local} is a directory here, which has no revision {revision!r}")
        return local
    if local.exists() or local.is_absolute() or str(name_or_path).startswith((".", "~")):
        raise FileNotFoundError(f"{name_or_path} is not a directory with a checkpoint's files")

    def fetch(kind: str) -> Path:
        return Path(snapshot_download(
            str(name_or_path), revision=revision, allow_patterns=_PATTERNS[kind], local_files_only=local_files_only
        ))

    try:
        directory = fetch(SAFETENSORS)
        if trust_pickle and weight_files(directory, SAFETENSORS) is None:
            directory = fetch(PICKLE)
    except Exception as error:  # of the hub's client, of its HTTP library, of the network: there are dozens of kinds
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"no directory {str(name_or_path)!r} here, and the hub did not give a checkpoint of that name"
            f"{f' at revision {revision!r}' if revision else ''} ({type(error).__name__}: {reason})"
        ) from None
    return directory


def read_config(directory: Path) -> dict[str, Any]:
    """The decoded config.json of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no config.json, so it is not a checkpoint")
    try:
        source = decode(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(source, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(source).__name__}")
    return source


def decode(text: str) -> Any:
    """The JSON of a config.json, in which transformers 5 writes infinity as {"__float__": "Infinity"}."""

    def special_float(pairs: dict[str, Any]) -> Any:
        return float(pairs["__float__"]) if pairs.keys() == {"__float__"} else pairs

    return json.loads(text, object_hook=special_float)


def weight_files(directory: Path, kind: str) -> list[Path] | None:
    """The files with the weights of one kind, SAFETENSORS or PICKLE; None if there are none.

    Raises:
        ValueError: the index of the shards cannot be read or names a file outside of the directory.
        FileNotFoundError: the index names a file that is not there.
    """
    if (directory / kind).is_file():
        return [directory / kind]
    index = directory / f"{kind}.index.json"
    if not index.is_file():
        return None
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        plain = all(Path(shard).name == shard for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} must hold a weight_map from tensors to file names") from None
    if not plain:
        raise ValueError(f"{index} must name files beside it, got {', '.join(shards)}")
    paths = [directory / shard for shard in shards]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{index} names {', '.join(missing)}, which {directory} does not have")
    return paths

