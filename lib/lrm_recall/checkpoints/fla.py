"""The layouts of flash-linear-attention (the fla-hub checkpoints), versions 0.1 to 0.6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrm_recall.checkpoints.fields import REQUIRED, TIME_STEP_RANK, Equals, Ignored, Maps, Only, Rules
from lrm_recall.checkpoints.layout import Layout
from lrm_recall.checkpoints.names import Names


def _mlp_width(intermediate_size: int | None, source: Mapping[str, Any]) -> int:
    """Of fla's GatedMLP: given, or 2/3 of hidden_ratio * hidden_size, rounded up to a multiple of 256."""
    if intermediate_size is not None:
        return intermediate_size
    ratio = 4 if source["hidden_ratio"] is None else source["hidden_ratio"]
    return -(-int(source["hidden_size"] * ratio * 2 / 3) // 256) * 256


_MODEL: Rules = {  # of every layout
    "vocab_size": Maps(REQUIRED, field="vocab_size"),
    "hidden_size": Maps(REQUIRED, field="hidden_size"),
    "num_hidden_layers": Maps(REQUIRED, field="num_hidden_layers"),
    "initializer_range": Maps(0.02, field="initializer_range"),
    "tie_word_embeddings": Maps(False, field="tie_word_embeddings"),
    "use_cache": Maps(True, field="use_cache"),
    "bos_token_id": Maps(1, field="bos_token_id"),
    "eos_token_id": Maps(2, field="eos_token_id"),
    "fuse_cross_entropy": Ignored(),
    "fuse_linear_cross_entropy": Ignored(),
    "use_l2warp": Ignored(),  # a term of the loss in training
}

_BLOCK: Rules = {  # of the layouts whose blocks have an MLP
    **_MODEL,
    "pad_token_id": Maps(None, field="pad_token_id"),
    "intermediate_size": Maps(None, field="intermediate_size", convert=_mlp_width),
    "hidden_ratio": Ignored(4),  # read by intermediate_size
    "norm_eps": Maps(1e-6, field="norm_eps", option="norm_eps"),
    "hidden_act": Only(("swish",)),
    "attn": Only((None,)),  # softmax attention in some layers
    "attnres_block_size": Only((None,)),
    "attn_mode": Ignored(),
    "max_position_embeddings": Ignored(),
    "fuse_norm": Ignored(),
    "fuse_swiglu": Ignored(),
}
_BLOCK_NAMES = Names(parts={"mixer_norm": "attn_norm", "mixer": "attn"})
_BLOCK_FIELDS = {"mlp": "swiglu", "norm": "rmsnorm", "residual_in_fp32": False}

GLA = Layout(
    title="FLA's GLA",
    mixer="gla",
    model_type="gla",
    architecture="GLAForCausalLM",
    names=_BLOCK_NAMES,
    fields=_BLOCK_FIELDS,
    options={"gate_logit_normalizer": 16, "gate_low_rank_dim": 16},
    rules={
        **_BLOCK,
        "num_heads": Maps(4, option="num_heads"),
        "expand_k": Maps(0.5, option="expand_k"),
        "expand_v": Maps(1.0, option="expand_v"),
        "num_kv_heads": Equals("num_heads", lambda source: source["num_heads"]),
        "feature_map": Only((None,)),
        "clamp_min": Only((None,)),
        "use_short_conv": Only((False,)),
        "use_output_gate": Only((True,)),
        "elementwise_affine": Only((True,)),
        "fuse_norm": Only((True,)),  # else the gated norm is called g_norm
        "use_gk": Only((True,)),
        "use_gv": Only((False,)),
        "conv_size": Ignored(),
        "share_conv_kernel": Ignored(),
    },
)

DELTA_NET = Layout(
    title="FLA's DeltaNet",
    mixer="deltanet",
    model_type="delta_net",
    architecture="DeltaNetForCausalLM",
    names=_BLOCK_NAMES,
    fields=_BLOCK_FIELDS,
    rules={
        **_BLOCK,
        "num_heads": Maps(16, option="num_heads"),
        "expand_k": Maps(1.0, option="expand_k"),
        "expand_v": Maps(1.0, option="expand_v"),
        "use_gate": Maps(False, option="use_gate"),
        "use_beta": Maps(True, option="use_beta"),
        "use_short_conv": Maps(True, option="use_short_conv"),
        "conv_size": Maps(4, option="conv_size"),
        "qk_norm": Maps("l2", option="qk_norm"),
        "qk_activation": Maps("silu", option="qk_activation"),
        "allow_neg_eigval": Maps(False, option="allow_neg_eigval"),
        "use_output_norm": Only((True,)),
        "norm_first": Only((False,)),  # True moved the norms into the layers
        "share_conv_kernel": Only((False,)),
    },
)

GATED_DELTANET = Layout(
    title="FLA's Gated DeltaNet",
    mixer="gated_deltanet",
    model_type="gated_deltanet",
    architecture="GatedDeltaNetForCausalLM",
    names=_BLOCK_NAMES,
    fields=_BLOCK_FIELDS,
    rules={
        **_BLOCK,
        "num_heads": Maps(6, option="num_heads"),
        "num_v_heads": Maps(None, option="num_v_heads"),
        "head_dim": Maps(256, option="head_dim"),
        "expand_v": Maps(2.0, option="expand_v"),
        "use_gate": Maps(True, option="use_gate"),
        "use_short_conv": Maps(True, option="use_short_conv"),
        "conv_size": Maps(4, option="conv_size"),
        "allow_neg_eigval": Maps(False, option="allow_neg_eigval"),
        "output_gate_activation": Only(("swish", "silu")),
        "norm_first": Only((False,)),
    },
)

RETNET = Layout(
    title="FLA's RetNet",
    mixer="retnet",
    model_type="retnet",
    architecture="RetNetForCausalLM",
    names=_BLOCK_NAMES,
    fields=_BLOCK_FIELDS,
    rules={
        **_BLOCK,
        "hidden_ratio": Ignored(2),
        "num_heads": Maps(8, option="num_heads"),
        "expand_k": Maps(1.0, option="expand_k"),
        "expand_v": Maps(2.0, option="expand_v"),
        "num_kv_heads": Maps(None, option="num_kv_heads"),
        "use_output_gate": Maps(True, option="use_output_gate"),
        "feature_map": Only((None,)),
        "use_short_conv": Ignored(),  # fla's block does not hand it to the layer
        "elementwise_affine": Only((True,)),
        "fuse_norm": Only((True,)),  # else the gated norm is called g_norm
        "conv_size": Ignored(),
        "share_conv_kernel": Ignored(),
    },
)

_MAMBA_NAMES = Names(
    stem="backbone",
    parts={"mixer_norm": "norm", "norm": "norm_f"},
    former={"backbone.embedding.weight": "backbone.embeddings.weight"},
)
_MAMBA_FIELDS = {"mlp": "none", "norm": "rmsnorm"}
_MAMBA: Rules = {  # of both Mambas
    **_MODEL,
    "pad_token_id": Maps(0, field="pad_token_id"),
    "expand": Maps(2, option="expand"),
    "conv_kernel": Maps(4, option="conv_kernel"),
    "use_bias": Maps(False, option="use_bias"),
    "use_conv_bias": Maps(True, option="use_conv_bias"),
    "dt_min": Maps(0.001, option="time_step_min"),
    "dt_max": Maps(0.1, option="time_step_max"),
    "dt_init_floor": Maps(1e-4, option="time_step_floor"),
    "hidden_act": Only(("silu", "swish")),
    "fuse_norm": Ignored(),
    "rescale_prenorm_residual": Ignored(),
}
_MAMBA_ALIASES = {
    "layer_norm_epsilon": "norm_eps",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
}

MAMBA = Layout(
    title="FLA's Mamba",
    mixer="mamba",
    model_type="mamba",
    architecture="MambaForCausalLM",
    names=_MAMBA_NAMES,
    fields=_MAMBA_FIELDS,
    aliases={
        **_MAMBA_ALIASES,
        "time_step_rank": "dt_rank",
        "time_step_scale": "dt_scale",
        "time_step_init_scheme": "dt_init_scheme",
        "dt_floor": "dt_init_floor",
    },
    rules={
        **_MAMBA,
        "state_size": Maps(16, option="state_size"),
        "norm_eps": Maps(1e-5, field="norm_eps"),
        "residual_in_fp32": Maps(False, field="residual_in_fp32"),
        "intermediate_size": Equals("expand * hidden_size", lambda source: source["expand"] * source["hidden_size"]),
        "dt_rank": TIME_STEP_RANK,
        "dt_scale": Maps(1.0, option="time_step_scale"),
        "dt_init_scheme": Maps("random", option="time_step_init_scheme"),
    },
)

MAMBA2 = Layout(
    title="FLA's Mamba2",
    mixer="mamba2",
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    names=_MAMBA_NAMES,
    fields=_MAMBA_FIELDS,
    aliases={**_MAMBA_ALIASES, "time_step_limit": "dt_limit", "rms_norm": "rmsnorm"},
    rules={
        **_MAMBA,
        "state_size": Maps(128, option="state_size"),
        "head_dim": Maps(64, option="head_dim"),
        "n_groups": Maps(1, option="n_groups"),
        "chunk_size": Maps(256, option="chunk_size"),
        "norm_eps": Maps(1e-5, field="norm_eps", option="layer_norm_epsilon"),
        "residual_in_fp32": Maps(True, field="residual_in_fp32"),
        "num_heads": Equals(
            "expand * hidden_size / head_dim",
            lambda source: source["expand"] * source["hidden_size"] / source["head_dim"],
        ),
        "dt_limit": Only(((0.0, float("inf")),)),
        "rmsnorm": Only((True,)),
        "norm_before_gate": Only((False,)),
        "D_has_hdim": Only((False,)),
        "A_init_range": Ignored(),
        "conv_init": Ignored(),
        "time_step_rank": Ignored(),
    },
)

LAYOUTS = (GLA, DELTA_NET, GATED_DELTANET, RETNET, MAMBA, MAMBA2)
