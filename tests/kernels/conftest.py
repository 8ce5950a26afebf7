"""Our Triton kernels, interpreted on a CPU where there is no GPU (tests/conftest.py asks for that)."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]  # `make test-kernels` installs it


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
