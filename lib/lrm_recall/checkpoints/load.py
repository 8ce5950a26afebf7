"""A RecurrentLM from a public checkpoint of another library.

Nothing is built from memory: config.json says what the model is, and every field of it is known or refused; the
tensors' names and shapes are compared before one is read; then each goes from its file straight into its place.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrm_recall.checkpoints.find import find_layout
from lrm_recall.checkpoints.match import EMBEDDINGS, HEAD, Part, expected_shapes, match
from lrm_recall.checkpoints.source import find_directory, read_config
from lrm_recall.checkpoints.stored import Stored, open_tensors
from lrm_recall.config import RecurrentLMConfig
from lrm_recall.model import RecurrentLM, mark_outputs
from lrm_recall.options import check_type
from lrm_recall.resona.layer import Resona


def load(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_pickle: bool = False,
    resona: dict[str, Any] | None = None,
    local_files_only: bool = False,
) -> RecurrentLM:
    """Load a checkpoint of flash-linear-attention, transformers or state-spaces; in evaluation mode.

    Supported are FLA's gla, delta_net, gated_deltanet, retnet, mamba and mamba2, transformers' mamba and mamba2, and
    state-spaces' own Mamba and Mamba2 files.

    Args:
        name_or_path: a directory with config.json and weights, or a repository of the Hugging Face hub.
        dtype: of all parameters, such as torch.bfloat16 or "bfloat16"; None for that of the stored embeddings.
        device: where the parameters go, one after the other; None for the CPU.
        revision: branch, tag or commit of the repository.
        trust_pickle: read pytorch_model.bin where there are no safetensors (with `weights_only`, nevertheless).
        resona: layers to put beside the loaded mixers, such as {"layers": [0], "chunk_size": 64}; their parameters are
            new, and all others come from the checkpoint.
        local_files_only: do not ask the hub, use what was fetched before.

    Raises:
        FileNotFoundError: no such directory or repository, or files of it are missing.
        ValueError: a layout or a field of config.json that is not supported, options of Resona that cannot be,
            tensors that are missing, unexpected or of another shape, pickles that are not trusted, a device that is
            not there.
    """
    device = _usable("cpu" if device is None else device)  # before gigabytes are fetched
    dtype = _floating_dtype(dtype)
    directory = find_directory(
        name_or_path, revision=revision, trust_pickle=trust_pickle, local_files_only=local_files_only
    )
    layout, source = find_layout(read_config(directory))
    config = layout.config(source)
    if resona is not None:
        _check_resona(config, resona)
    stored = open_tensors(directory, trust_pickle=trust_pickle)
    with torch.device("meta"):
        model = RecurrentLM(config)
    places = match(expected_shapes(model), stored.shapes, layout)
    if dtype is None:
        dtype = next(stored.dtypes[name] for name, parts in places.items() if parts[0].name == EMBEDDINGS)
    _fill(model, stored, places, dtype, device)
    if resona is not None:
        _add_resona(model, resona)
    return model.eval()


def _fill(
    model: RecurrentLM, stored: Stored, places: dict[str, list[Part]], dtype: torch.dtype, device: torch.device
) -> None:
    """Put every stored tensor into its place in a model on the meta device."""
    for name, tensor in stored.read():
        for part in places[name]:
            _place(model, part.name, tensor if part.rows is None else tensor[part.rows], dtype, device)
    if model.config.tie_word_embeddings:
        embeddings = model.get_input_embeddings().weight
        if any(part.name == HEAD for parts in places.values() for part in parts) and not torch.equal(
            model.lm_head.weight, embeddings
        ):
            raise ValueError("config.json ties the head to the embeddings, but the files hold a head of its own, "
                             f"{HEAD}, with other values")
        model.lm_head.weight = embeddings


def _place(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Make a copy of `tensor` the parameter called `name`."""
    # what was read is a view of the mapped file: it would change, or crash, when somebody writes the file
    tensor = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def _check_resona(config: RecurrentLMConfig, resona: dict[str, Any]) -> None:
    """Raise ValueError unless a model of this configuration can have these Resona layers."""
    check_type(resona, dict[str, Any], "resona", "a mapping of options or None")
    changed = copy.deepcopy(config)
    changed.resona = resona
    changed.check()


def _add_resona(model: RecurrentLM, resona: dict[str, Any]) -> None:
    """Wrap the mixers of the named layers in Resona, with fresh parameters beside the loaded ones."""
    config = model.config
    config.resona = copy.deepcopy(resona)
    reference = model.get_input_embeddings().weight
    for layer in config.resona_layers:
        block = model.model.layers[layer]
        with torch.device(reference.device):
            wrapped = mark_outputs(Resona(nn.Identity(), config.hidden_size, **config.resona_options))
        wrapped = wrapped.to(reference.dtype)
        wrapped.apply(model._init_weights)
        wrapped.mixer = block.mixer
        block.mixer = wrapped


def _floating_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that is meant."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise ValueError(f"dtype must be a floating-point dtype such as torch.bfloat16 or 'bfloat16', got {dtype!r}")
    return named


def _usable(device: torch.device | str) -> torch.device:
    """The device that is meant, if tensors can be made there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {str(device)!r} is not available here") from None
