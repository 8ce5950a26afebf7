"""The layouts of transformers' own Mamba and Mamba2 (state-spaces/mamba-130m-hf and its like)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrm_recall.checkpoints.fields import REQUIRED, TIME_STEP_RANK, Equals, Ignored, Maps, Only, Rules
from lrm_recall.checkpoints.layout import Layout
from lrm_recall.checkpoints.names import Names


def _inner_size(source: Mapping[str, Any]) -> int:
    return source["expand"] * source["hidden_size"]


_NAMES = Names(
    stem="backbone",
    parts={"mixer_norm": "norm", "norm": "norm_f"},
    former={"backbone.embedding.weight": "backbone.embeddings.weight"},
)
_FIELDS = {"mlp": "none", "norm": "rmsnorm"}
_BOTH: Rules = {
    "vocab_size": Maps(REQUIRED, field="vocab_size"),
    "hidden_size": Maps(REQUIRED, field="hidden_size"),
    "num_hidden_layers": Maps(REQUIRED, field="num_hidden_layers"),
    "initializer_range": Maps(0.1, field="initializer_range"),
    "residual_in_fp32": Maps(True, field="residual_in_fp32"),
    "use_cache": Maps(True, field="use_cache"),
    "bos_token_id": Maps(0, field="bos_token_id"),
    "expand": Maps(2, option="expand"),
    "conv_kernel": Maps(4, option="conv_kernel"),
    "use_bias": Maps(False, option="use_bias"),
    "use_conv_bias": Maps(True, option="use_conv_bias"),
    "time_step_min": Maps(0.001, option="time_step_min"),
    "time_step_max": Maps(0.1, option="time_step_max"),
    "time_step_floor": Maps(1e-4, option="time_step_floor"),
    "hidden_act": Only(("silu", "swish")),
    "rms_norm": Only((True,)),
    "intermediate_size": Equals("expand * hidden_size", _inner_size),
    "rescale_prenorm_residual": Ignored(),
    # what the conversion of the original files left behind
    "d_model": Equals("hidden_size", lambda source: source["hidden_size"]),
    "d_inner": Equals("expand * hidden_size", _inner_size),
    "n_layer": Equals("num_hidden_layers", lambda source: source["num_hidden_layers"]),
    "ssm_cfg": Ignored(),
    "fused_add_norm": Ignored(),
    "pad_vocab_size_multiple": Ignored(),
}

MAMBA = Layout(
    title="transformers' Mamba",
    mixer="mamba",
    model_type="mamba",
    names=_NAMES,
    fields=_FIELDS,
    rules={
        **_BOTH,
        "state_size": Maps(16, option="state_size"),
        "layer_norm_epsilon": Maps(1e-5, field="norm_eps"),
        "pad_token_id": Maps(0, field="pad_token_id"),
        "eos_token_id": Maps(0, field="eos_token_id"),
        "tie_word_embeddings": Maps(True, field="tie_word_embeddings"),
        "time_step_rank": TIME_STEP_RANK,
        "time_step_scale": Maps(1.0, option="time_step_scale"),
        "time_step_init_scheme": Maps("random", option="time_step_init_scheme"),
        "use_mambapy": Ignored(),
        "use_associative_scan": Ignored(),
    },
)

MAMBA2 = Layout(
    title="transformers' Mamba2",
    mixer="mamba2",
    model_type="mamba2",
    names=_NAMES,
    fields=_FIELDS,
    rules={
        **_BOTH,
        "state_size": Maps(128, option="state_size"),
        "head_dim": Maps(64, option="head_dim"),
        "n_groups": Maps(8, option="n_groups"),
        "chunk_size": Maps(256, option="chunk_size"),
        "layer_norm_epsilon": Maps(1e-5, field="norm_eps", option="layer_norm_epsilon"),
        "pad_token_id": Maps(1, field="pad_token_id"),
        "eos_token_id": Maps(2, field="eos_token_id"),
        "tie_word_embeddings": Maps(False, field="tie_word_embeddings"),
        "num_heads": Equals("expand * hidden_size / head_dim", lambda source: _inner_size(source) / source["head_dim"]),
        "time_step_limit": Only(((0.0, float("inf")),)),
        # in files converted from other formats; transformers' layer reads none of them and gates before it normalises
        "norm_before_gate": Ignored(),
        "time_step_rank": Ignored(),
        "time_step_scale": Ignored(),
        "time_step_init_scheme": Ignored(),
    },
)
