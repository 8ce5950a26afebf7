"""The configuration of a RecurrentLM: one JSON file says which mixer each layer has, where Resona sits, which states
are expanded."""

from __future__ import annotations

import inspect
from dataclasses import field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from lrm_recall.mixers.find import mixer_class
from lrm_recall.options import check_options, check_type, did_you_mean
from lrm_recall.resona.layer import Resona


@strict
class RecurrentLMConfig(PreTrainedConfig):
    """Shape of a language model with interchangeable token mixers.

    Everything that a model needs to be rebuilt stands here, so that a model with Resona layers or expanded states is
    saved and loaded like any other transformers model. Wrong names, types, layer indices and head counts raise
    ValueError when the configuration is made.
    """

    model_type = "lrm_recall"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 8192
    hidden_size: int = 128
    num_hidden_layers: int = 4
    mixer: str = "gla"  # a module of lrm_recall.mixers
    mixer_args: dict[str, Any] = field(default_factory=dict)  # its options, for every layer
    layer_overrides: dict[str, dict[str, Any]] = field(default_factory=dict)  # such as {"0": {"num_heads": 1}}
    resona: dict[str, Any] | None = None  # {"layers": [0], "chunk_size": 64, ...}: options of Resona; None for none
    mlp: str = "swiglu"  # or "none": a block of the mixer alone, as in Mamba2 and in zoology's MQAR models
    intermediate_size: int | None = None  # of the SwiGLU; None: 8/3 hidden_size, up to a multiple of 256 (as FLA)
    norm: str = "rmsnorm"  # or "layernorm"
    norm_eps: float = 1e-6
    initializer_range: float = 0.02  # std of weights; of those that write to the residual stream, over sqrt(2 layers)
    embedding_range: float | None = None  # std of the embeddings; None: initializer_range
    residual_in_fp32: bool = False  # the stream between blocks in float32 whatever the weights are (Mamba2)
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = [name for name in kwargs if name not in _FROM_TRANSFORMERS and not name.startswith("_")]
        if unknown:
            own = [name for name in type(self).__annotations__ if not name.startswith("_")]
            raise ValueError(f"RecurrentLMConfig has no field {unknown[0]!r}{did_you_mean(unknown[0], own)}; "
                             f"allowed: {', '.join(own)}")
        if isinstance(self.layer_overrides, dict):  # JSON has no other keys than text
            self.layer_overrides = {str(layer): options for layer, options in self.layer_overrides.items()}
        for name, hint in inspect.get_annotations(RecurrentLMConfig, eval_str=True).items():
            check_type(getattr(self, name), hint, name, RecurrentLMConfig.__annotations__[name])
        super().__post_init__(**kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 256) * 256
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> RecurrentLMConfig:
        """As in transformers, but a configuration of another architecture is refused, not reinterpreted."""
        found = config_dict.get("model_type")
        if found != cls.model_type:
            raise ValueError(f"this is a checkpoint of model type {found!r}, not of {cls.model_type!r}")
        return super().from_dict(config_dict, **kwargs)

    def check(self) -> None:
        """Raise ValueError for what the types of the fields alone do not refuse, the values of options included."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, allowed in (("mlp", ("swiglu", "none")), ("norm", ("rmsnorm", "layernorm"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        cls = mixer_class(self.mixer)
        check_options(cls, self.mixer_args, f"mixer {self.mixer!r}")
        for layer, options in self.layer_overrides.items():
            self._check_layer(int(layer) if layer == str(_number(layer)) else layer, "layer_overrides")
            check_options(cls, options, f"mixer {self.mixer!r} (layer_overrides of layer {layer})")
        with torch.device("meta"):  # costs nothing, and each mixer knows best which values it takes
            for layer in {-1, *map(int, self.layer_overrides)}:
                cls(self.hidden_size, **self.mixer_options(layer))
        if self.resona is not None:
            self._check_resona()

    def _check_resona(self) -> None:
        options = dict(self.resona)
        layers = options.pop("layers", None)
        if not isinstance(layers, list) or not layers:
            raise ValueError(f"resona must name its layers, such as {{'layers': [0]}}, got layers={layers!r}")
        for layer in layers:
            self._check_layer(layer, "resona")
        if len(set(layers)) < len(layers):
            raise ValueError(f"resona names a layer twice: {layers}")
        Resona.check_options(self.hidden_size, options)

    def _check_layer(self, layer: Any, where: str) -> None:
        if type(layer) is not int or not 0 <= layer < self.num_hidden_layers:
            raise ValueError(f"{where} names layer {layer!r}; this model has layers 0 to {self.num_hidden_layers - 1}")

    def mixer_options(self, layer: int) -> dict[str, Any]:
        """The options of one layer's mixer: those of every layer, then its own."""
        return {**self.mixer_args, **self.layer_overrides.get(str(layer), {})}

    @property
    def resona_layers(self) -> list[int]:
        """Indices of the layers that retrieve; empty without Resona."""
        return list(self.resona["layers"]) if self.resona else []

    @property
    def resona_options(self) -> dict[str, Any]:
        """Constructor options of the Resona layers, their places left out."""
        return {name: value for name, value in (self.resona or {}).items() if name != "layers"}


def _number(text: str) -> int | None:
    """The number that a key of JSON spells, None for anything else."""
    return int(text) if text.isdecimal() else None


# what PreTrainedConfig itself writes to config.json or takes beside its fields
_FROM_TRANSFORMERS = {"model_type", "torch_dtype", "name_or_path", "attn_implementation", "output_attentions",
                      "num_labels", "auto_map", "experts_implementation", "quantization_config", "per_layer_config"}
