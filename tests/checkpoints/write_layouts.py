"""Writes layouts/*.json: what flash-linear-attention's own classes save, without the values.

CI has no triton, so no FLA; the tests make checkpoints with random values from these files. Run it where both can be
imported (no GPU is needed), after a new version of FLA:

    pip install --no-deps --target /tmp/fla triton fla-core flash-linear-attention einops
    PYTHONPATH=/tmp/fla python tests/checkpoints/write_layouts.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import fla.models
from safetensors import safe_open

HERE = Path(__file__).parent / "layouts"
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
MODELS = {  # file: class, options; names and shapes that a default would hide are set
    "gla": ("GLA", {"num_heads": 2}),
    "gla_tied": ("GLA", {"num_heads": 2, "intermediate_size": 48, "tie_word_embeddings": True}),
    "delta_net": ("DeltaNet", {"num_heads": 2}),
    "delta_net_gated": ("DeltaNet", {"num_heads": 2, "use_gate": True, "use_beta": False, "use_short_conv": False}),
    "gated_deltanet": ("GatedDeltaNet", {"num_heads": 2, "head_dim": 8}),
    "gated_deltanet_grouped": ("GatedDeltaNet", {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "use_gate": False}),
    "retnet": ("RetNet", {"num_heads": 2}),
    "retnet_grouped": ("RetNet", {"num_heads": 4, "num_kv_heads": 2, "use_output_gate": False}),
    "mamba": ("Mamba", {"state_size": 8}),
    "mamba_biased": ("Mamba", {"state_size": 8, "use_bias": True, "use_conv_bias": False, "dt_rank": 3}),
    "mamba2": ("Mamba2", {"state_size": 8, "head_dim": 8}),
    "mamba2_grouped": ("Mamba2", {"state_size": 8, "head_dim": 8, "n_groups": 2, "use_bias": True}),
}


def describe(name: str, options: dict) -> dict:
    """The config.json and the header of the safetensors of a small model."""
    config = getattr(fla.models, f"{name}Config")(**SIZE, **options)
    with tempfile.TemporaryDirectory() as directory:
        getattr(fla.models, f"{name}ForCausalLM")(config).save_pretrained(directory)
        saved = json.loads((Path(directory) / "config.json").read_text())
        with safe_open(Path(directory) / "model.safetensors", framework="pt") as file:
            headers = {name: file.get_slice(name) for name in sorted(file.keys())}
            tensors = {
                name: " ".join(map(str, [header.get_dtype(), *header.get_shape()])) for name, header in headers.items()
            }
    return {"fla": fla.__version__, "config": saved, "tensors": tensors}


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for file, (name, options) in MODELS.items():
        (HERE / f"{file}.json").write_text(json.dumps(describe(name, options), indent=1) + "\n")
