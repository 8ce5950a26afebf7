"""A checkpoint that flash-linear-attention can load, from a model that is still what FLA knows."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from lrm_recall.checkpoints import fla
from lrm_recall.checkpoints.fields import Maps, write_fields
from lrm_recall.checkpoints.layout import Layout
from lrm_recall.checkpoints.match import expected_shapes
from lrm_recall.config import RecurrentLMConfig
from lrm_recall.mixers.find import mixer_class
from lrm_recall.model import RecurrentLM
from lrm_recall.options import accepted_options


def to_fla(model: RecurrentLM, directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Write config.json and safetensors that FLA's AutoModelForCausalLM loads.

    Args:
        model: one whose layers are all FLA's: no Resona layers, no merged heads or widened states.
        directory: must not exist, or be empty; it appears complete or not at all.
        max_shard_size: above it the tensors go to several files.

    Raises:
        ValueError: something in the model that FLA's configuration cannot express.
        FileExistsError: the directory exists and is not empty.
    """
    directory = Path(directory).expanduser()
    config = fla_config(model)
    layout = _layout(model.config.mixer)
    tensors = model.state_dict()
    tensors = {layout.names.theirs(name): tensors[name].detach().contiguous() for name in expected_shapes(model)}
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        (unfinished / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_torch_state_dict(tensors, unfinished, max_shard_size=max_shard_size)
        os.replace(unfinished, directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def fla_config(model: RecurrentLM) -> dict[str, Any]:
    """FLA's config.json for a model.

    Raises:
        ValueError: something in the model that it cannot express.
    """
    config = model.config
    layout = _layout(config.mixer)
    if config.resona_layers:
        raise ValueError(f"FLA has no Resona layers; this model has them in layers {config.resona_layers}")
    options = _common_options(config)
    _check_constants(layout, config.to_dict(), options)
    with torch.device("meta"):
        described = expected_shapes(type(model)(config))
    if described != expected_shapes(model):
        raise ValueError("the model's tensors are not those that its configuration describes")
    fields = write_fields(config.to_dict(), options, layout.rules)
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return {"model_type": layout.model_type, "architectures": [layout.architecture], "dtype": dtype, **fields}


def _common_options(config: RecurrentLMConfig) -> dict[str, Any]:
    """The mixer's options, defaults included, refused where layers differ."""
    defaults = _defaults(config.mixer)
    layers = [{**defaults, **config.mixer_options(layer)} for layer in range(config.num_hidden_layers)]
    for name, first in layers[0].items():
        if others := {layer: options[name] for layer, options in enumerate(layers) if options[name] != first}:
            layer, value = next(iter(others.items()))
            raise ValueError(f"FLA has the same options in every layer; here {name} is {first!r} in layer 0 and "
                             f"{value!r} in layer {layer}, as after merging heads or widening the state")
    return layers[0]


def _layout(mixer: str) -> Layout:
    """FLA's layout of a mixer."""
    layouts = {layout.mixer: layout for layout in fla.LAYOUTS}
    if mixer not in layouts:
        raise ValueError(f"FLA's models are written for mixers {', '.join(layouts)}; this model has {mixer!r}")
    return layouts[mixer]


def _defaults(mixer: str) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in accepted_options(mixer_class(mixer)).items()}


def _check_constants(layout: Layout, fields: dict[str, Any], options: dict[str, Any]) -> None:
    """Refuse values that every model of the layout has otherwise, and options that it does not know."""
    for have, must, what in ((fields, layout.fields, ""), (options, layout.options, "mixer option ")):
        for name, value in must.items():
            if have[name] != value:
                raise ValueError(f"{layout.title} always has {what}{name} = {value!r}; this model has {have[name]!r}")
    mapped = {rule.option for rule in layout.rules.values() if isinstance(rule, Maps)}
    defaults = _defaults(layout.mixer)
    for name in options.keys() - mapped - layout.options.keys():
        if options[name] != defaults[name]:
            raise ValueError(f"{layout.title} has no counterpart of the mixer's option {name} = {options[name]!r}")
