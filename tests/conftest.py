"""Small models of every kind, shared by the tests."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # our kernels run on a CPU too; read when Triton is first imported

from lrm_recall import RecurrentLM, RecurrentLMConfig

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("kernels/*")  # `make test-kernels` installs it
if not torch.cuda.is_available():
    collect_ignore_glob.append("gpu/*")

torch.set_num_threads(1)  # the suite runs in several processes

VOCAB = 64
SMALL_ARGS = {
    "gla": {"num_heads": 2},
    "mamba2": {"head_dim": 8, "state_size": 8, "chunk_size": 8},
    "baseconv": {},
    "attention": {"num_heads": 2},
}
SMALL_OVERRIDES = {"baseconv": {"1": {"kernel_size": -1, "max_length": 128}}}  # a short and a long convolution
RESONA = {
    "none": None,
    "default": {"layers": [0], "chunk_size": 2},  # place, null_chunk, top-1: as in the results
    "mean": {"layers": [0, 1], "chunk_size": 3, "encoder": "mean"},
    "linear": {"layers": [1], "chunk_size": 2, "top_k": 2, "encoder": "linear", "alpha": "learned", "num_heads": 2},
    "no gate": {"layers": [0], "chunk_size": 2, "top_k": 2, "encoder": "place", "gate": "none", "memory_norm": False},
}


def make_model(mixer: str, resona: str = "none", *, seed: int = 0, **fields) -> RecurrentLM:
    """A two-layer model in evaluation mode, its weights large enough that nothing hides in rounding."""
    torch.manual_seed(seed)
    config = RecurrentLMConfig(**{
        "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "mixer": mixer,
        "mixer_args": SMALL_ARGS[mixer], "layer_overrides": SMALL_OVERRIDES.get(mixer, {}), "resona": RESONA[resona],
        "initializer_range": 0.3, **fields,
    })
    return RecurrentLM(config).eval()


@pytest.fixture(params=sorted(SMALL_ARGS))
def mixer(request) -> str:
    return request.param


@pytest.fixture(params=list(RESONA))
def resona(request) -> str:
    return request.param


@pytest.fixture
def model(mixer, resona) -> RecurrentLM:
    return make_model(mixer, resona)


@pytest.fixture
def device() -> str:
    """Where our kernels are tested: on a GPU, or interpreted on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
