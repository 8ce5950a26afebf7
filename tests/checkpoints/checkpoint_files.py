"""Making checkpoints of other libraries, small and with random values, for the tests."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYOUTS = Path(__file__).parent / "layouts"
FLA = sorted(path.stem for path in LAYOUTS.glob("*.json"))
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def fla_checkpoint(
    directory: Path, layout: str, dtype: torch.dtype | None = None, *, drop: Collection[str] = (), **changes: Any
) -> dict[str, Tensor]:
    """Write what FLA's class would save (layouts/<layout>.json), with random values; returns the tensors.

    Args:
        dtype: of the tensors, instead of FLA's.
        drop: fields that config.json does not have.
        changes: fields that it has beside FLA's, or with other values.
    """
    saved = json.loads((LAYOUTS / f"{layout}.json").read_text())
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, header in saved["tensors"].items():
        stored, *shape = header.split()
        tensors[name] = torch.randn([int(size) for size in shape], generator=generator).to(dtype or DTYPES[stored])
    config = {**saved["config"], **changes}
    write(directory, {name: value for name, value in config.items() if name not in drop}, tensors)
    return tensors


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write config.json and one file of safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_tensors(directory: Path, **tensors: Tensor | None) -> None:
    """Add, replace or (None) remove tensors of a checkpoint; "__" in a name stands for "."."""
    path = directory / "model.safetensors"
    stored = load_file(path)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del stored[name]
        else:
            stored[name] = tensor
    save_file(stored, path)


def change_config(directory: Path, **fields: Any) -> None:
    """Set fields of a checkpoint's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def files(directory: Path) -> dict[str, Tensor]:
    """All tensors in the safetensors of a directory."""
    paths = sorted(directory.glob("*.safetensors"))
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}
