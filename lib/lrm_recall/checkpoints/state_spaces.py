"""The layouts of the original files of state-spaces (mamba-130m, mamba2-130m): no model_type, options in `ssm_cfg`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrm_recall.checkpoints.fields import REQUIRED, TIME_STEP_RANK, Ignored, Maps, Only, Rules
from lrm_recall.checkpoints.layout import Layout
from lrm_recall.checkpoints.names import Names


def flatten(source: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json with the entries of `ssm_cfg` as fields of their own, such as "ssm_cfg.d_state".

    Raises:
        ValueError: `ssm_cfg` is not a mapping.
    """
    flat = dict(source)
    options = flat.pop("ssm_cfg", None) or {}
    if not isinstance(options, Mapping):
        raise ValueError(f"config.json: ssm_cfg must be a mapping of names to values, got {options!r}")
    return {**flat, **{f"ssm_cfg.{name}": value for name, value in options.items()}}


def _padded(vocab_size: int, source: Mapping[str, Any]) -> int:
    """The rows of the embeddings: vocab_size, up to a multiple of pad_vocab_size_multiple."""
    multiple = source["pad_vocab_size_multiple"]
    return -(-vocab_size // multiple) * multiple


def _norm(rms_norm: bool, source: Mapping[str, Any]) -> str:
    return "rmsnorm" if rms_norm else "layernorm"


_NAMES = Names(stem="backbone", parts={"embeddings": "embedding", "mixer_norm": "norm", "norm": "norm_f"})
_FIELDS = {"mlp": "none", "norm_eps": 1e-5}
_BOTH: Rules = {
    "vocab_size": Maps(REQUIRED, field="vocab_size", convert=_padded),
    "pad_vocab_size_multiple": Ignored(8),  # read by vocab_size
    "d_model": Maps(REQUIRED, field="hidden_size"),
    "n_layer": Maps(REQUIRED, field="num_hidden_layers"),
    "rms_norm": Maps(True, field="norm", convert=_norm),
    "residual_in_fp32": Maps(True, field="residual_in_fp32"),
    "tie_embeddings": Maps(True, field="tie_word_embeddings"),
    "d_intermediate": Only((0,)),  # an MLP in each block
    "attn_layer_idx": Only(((), None)),  # layers of softmax attention
    "attn_cfg": Ignored(),  # of those layers
    "fused_add_norm": Ignored(),
    "ssm_cfg.d_conv": Maps(4, option="conv_kernel"),
    "ssm_cfg.expand": Maps(2, option="expand"),
    "ssm_cfg.bias": Maps(False, option="use_bias"),
    "ssm_cfg.conv_bias": Maps(True, option="use_conv_bias"),
    "ssm_cfg.dt_min": Maps(0.001, option="time_step_min"),
    "ssm_cfg.dt_max": Maps(0.1, option="time_step_max"),
    "ssm_cfg.dt_init_floor": Maps(1e-4, option="time_step_floor"),
}

MAMBA = Layout(
    title="state-spaces' Mamba",
    mixer="mamba",
    names=_NAMES,
    fields=_FIELDS,
    rules={
        **_BOTH,
        "ssm_cfg.layer": Only(("Mamba1",)),
        "ssm_cfg.d_state": Maps(16, option="state_size"),
        "ssm_cfg.dt_rank": TIME_STEP_RANK,
        "ssm_cfg.dt_scale": Maps(1.0, option="time_step_scale"),
        "ssm_cfg.dt_init": Maps("random", option="time_step_init_scheme"),
        "ssm_cfg.use_fast_path": Ignored(),
    },
)

MAMBA2 = Layout(
    title="state-spaces' Mamba2",
    mixer="mamba2",
    names=_NAMES,
    fields=_FIELDS,
    options={"layer_norm_epsilon": 1e-5},
    rules={
        **_BOTH,
        "ssm_cfg.layer": Only(("Mamba2",)),
        "ssm_cfg.d_state": Maps(128, option="state_size"),
        "ssm_cfg.headdim": Maps(64, option="head_dim"),
        "ssm_cfg.ngroups": Maps(1, option="n_groups"),
        "ssm_cfg.chunk_size": Maps(256, option="chunk_size"),
        "ssm_cfg.d_ssm": Only((None,)),  # else a part of the channels is an MLP
        "ssm_cfg.rmsnorm": Only((True,)),
        "ssm_cfg.norm_before_gate": Only((False,)),
        "ssm_cfg.D_has_hdim": Only((False,)),
        "ssm_cfg.dt_limit": Only(((0.0, float("inf")),)),
        "ssm_cfg.A_init_range": Ignored(),
        "ssm_cfg.conv_init": Ignored(),
        "ssm_cfg.use_mem_eff_path": Ignored(),
    },
)
