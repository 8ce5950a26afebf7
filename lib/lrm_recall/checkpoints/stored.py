"""The tensors of a checkpoint: their shapes and dtypes first, without reading them, then one after the other."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrm_recall.checkpoints.source import PICKLE, SAFETENSORS, weight_files

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Stored(Protocol):
    """Tensors in files.

    Attributes:
        shapes, dtypes: of every tensor.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, on the CPU, one after the other."""
        ...


def open_tensors(directory: Path, *, trust_pickle: bool) -> Stored:
    """The tensors in a checkpoint's directory; safetensors if there are any.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: only pickles and these are not trusted, a file that cannot be read, a tensor in two files or of a
            dtype that no weight has here.
    """
    if paths := weight_files(directory, SAFETENSORS):
        return Safetensors(paths)
    paths = weight_files(directory, PICKLE)
    if paths and trust_pickle:
        return Pickles(paths)
    if paths:
        raise ValueError(f"{directory} has its weights in {paths[0].name} alone, a pickle, which can run code when it "
                         "is read: pass trust_pickle=True if you trust whoever made it, or convert it to safetensors")
    hint = "" if trust_pickle else f" ({PICKLE} is only looked for with trust_pickle=True)"
    raise FileNotFoundError(f"{directory} has neither {SAFETENSORS} nor {SAFETENSORS}.index.json{hint}")


class Safetensors:
    """Tensors in safetensors files; their headers tell the shapes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
            _check_once(self.shapes, headers, path)
            for name, header in headers.items():
                if header.get_dtype() not in _FLOATS:
                    raise _not_a_float(path, name, header.get_dtype())
                self.shapes[name], self.dtypes[name] = tuple(header.get_shape()), _FLOATS[header.get_dtype()]

    def read(self) -> Iterator[tuple[str, Tensor]]:
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)


class Pickles:
    """Tensors in files of torch.save, which may hold tensors and plain containers only; read lazily where possible."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.tensors: dict[str, Tensor] = {}
        for path in paths:
            try:
                # files of torch.save before 1.6 are not archives, and cannot be mapped
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            except Exception as error:  # pickle's errors are of any kind
                reason = str(error).strip().split("\n")[0]
                raise ValueError(f"{path} cannot be read as tensors alone: {reason}") from None
            if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
                raise ValueError(f"{path} must hold a mapping of names to tensors")
            _check_once(self.tensors, tensors, path)
            for name, tensor in tensors.items():
                if tensor.dtype not in _FLOATS.values():
                    raise _not_a_float(path, name, tensor.dtype)
            self.tensors.update(tensors)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self.tensors.items()}

    def read(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.tensors.items()


def _check_once(known: dict, more: dict, path: Path) -> None:
    if twice := sorted(known.keys() & more.keys()):
        raise ValueError(f"{path} holds {twice[0]}, which another file of the checkpoint holds too")


def _not_a_float(path: Path, name: str, dtype: str | torch.dtype) -> ValueError:
    return ValueError(f"{path} holds {name} as {dtype}; weights must be one of {', '.join(map(str, _FLOATS.values()))}")
