"""Which layout a checkpoint has, by what its config.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrm_recall.checkpoints import fla, hugging_face, state_spaces
from lrm_recall.checkpoints.layout import Layout
from lrm_recall.config import RecurrentLMConfig

# fields that fla writes into the config.json of a Mamba, and transformers, with the same model_type, does not
_ONLY_FLA = {"fuse_cross_entropy", "fuse_norm", "norm_eps"}


def find_layout(source: Mapping[str, Any]) -> tuple[Layout, dict[str, Any]]:
    """The layout of a config.json, and its fields as that layout's rules name them.

    Raises:
        ValueError: none has its model_type, or it has none and is not of state-spaces' kind either.
    """
    model_type = source.get("model_type")
    if model_type is None and {"d_model", "n_layer"} <= source.keys():
        flat = state_spaces.flatten(source)
        return (state_spaces.MAMBA2 if flat.get("ssm_cfg.layer") == "Mamba2" else state_spaces.MAMBA), flat
    by_fla = {layout.model_type: layout for layout in fla.LAYOUTS}
    by_transformers = {layout.model_type: layout for layout in (hugging_face.MAMBA, hugging_face.MAMBA2)}
    if model_type in by_transformers and not _ONLY_FLA & source.keys():
        return by_transformers[model_type], dict(source)
    if model_type in by_fla:
        return by_fla[model_type], dict(source)
    if model_type == RecurrentLMConfig.model_type:
        raise ValueError("this is a checkpoint of this library: load it with RecurrentLM.from_pretrained")
    raise ValueError(f"config.json has model_type {model_type!r}; supported: {', '.join(by_fla)} (FLA), "
                     f"{', '.join(by_transformers)} (transformers), and state-spaces' Mamba files, which have none but "
                     "d_model and n_layer")
