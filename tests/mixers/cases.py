"""The mixers, and variants of them, that test_contract.py holds to their promises: name, (mixer, options)."""

D = 16
MIXERS = {
    "gla": ("gla", {"num_heads": 2}),
    "gla, one head": ("gla", {"num_heads": 1, "expand_k": 1.0, "expand_v": 2.0, "gate_logit_normalizer": 1}),
    "mamba2": ("mamba2", {"head_dim": 8, "state_size": 4, "chunk_size": 16}),
    "mamba2, groups": ("mamba2", {"head_dim": 4, "state_size": 4, "n_groups": 2, "conv_kernel": 2, "use_bias": True}),
    "baseconv, short": ("baseconv", {"kernel_size": 3}),
    "baseconv, long": ("baseconv", {"kernel_size": -1, "max_length": 256}),
    "attention": ("attention", {"num_heads": 2}),
    "attention, no positions": ("attention", {"num_heads": 4, "rotary": False}),
    # attention with a window, Mamba, Hymba
    "attention, short window": ("attention", {"num_heads": 4, "num_kv_heads": 2, "window": 5, "bias": True}),
    "attention, wide window": ("attention", {"num_heads": 2, "num_kv_heads": 1, "window": 150, "rope_theta": 100.0}),
    "mamba": ("mamba", {"state_size": 4}),
    "mamba, wide": ("mamba", {"state_size": 16, "expand": 3, "conv_kernel": 2, "time_step_rank": 3, "use_bias": True}),
    "hymba": ("hymba", {"attention_window_size": 6}),
    "hymba, global": ("hymba", {"attention_window_size": None, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "hymba, attention replaced": ("hymba", {"attention": False, "ssm_state_size": 4}),
    # delta rule
    "deltanet": ("deltanet", {"num_heads": 2}),
    "deltanet, linear keys": ("deltanet", {"num_heads": 2, "expand_k": 0.5, "conv_size": 2,
                                           "qk_activation": "identity", "allow_neg_eigval": True}),
    "deltanet, no convolution": ("deltanet", {"num_heads": 1, "expand_v": 2.0, "use_beta": False, "use_gate": True,
                                              "use_short_conv": False, "qk_activation": "elu", "qk_norm": "sum"}),
    "gated_deltanet": ("gated_deltanet", {"head_dim": 8, "num_heads": 2}),
    "gated_deltanet, groups": ("gated_deltanet", {"head_dim": 4, "num_heads": 2, "num_v_heads": 4, "expand_v": 1.5,
                                                  "use_gate": False, "conv_size": 2, "allow_neg_eigval": True}),
    "gated_deltanet, no convolution": ("gated_deltanet", {"head_dim": 4, "num_heads": 1, "use_short_conv": False}),
    # RetNet, RWKV
    "retnet": ("retnet", {"num_heads": 2}),
    "retnet, convolutions": (
        "retnet",
        {"num_heads": 4, "num_kv_heads": 2, "expand_v": 1.0, "use_short_conv": True, "use_output_gate": False},
    ),
    "rwkv4": ("rwkv4", {}),
    "rwkv4, last layer": ("rwkv4", {"n_layer": 2, "layer_idx": 1}),
    "rwkv5": ("rwkv5", {"head_dim": 8}),
    "rwkv5, last layer": ("rwkv5", {"head_dim": 4, "dim_att": 24, "n_layer": 2, "layer_id": 1}),
    # H3, Hyena
    "h3": ("h3", {"d_state": 8}),
    "h3, heads": ("h3", {"d_state": 64, "head_dim": 2}),
    "hyena": ("hyena", {"l_max": 256, "filter_order": 8}),
    "hyena, wide": (
        "hyena", {"l_max": 140, "filter_order": 4, "inner_factor": 4, "proj_groups": 4, "short_filter_order": 2}
    ),
}
