"""A device that is not there is one clear error before a sweep starts."""

import pytest
import torch

from lrm_recall.train.device import usable_device


def test_cpu_is_always_there():
    assert usable_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:99", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_missing_device(name):
    with pytest.raises(ValueError, match=f"device '{name}' is not available here; allowed: cpu"):
        usable_device(name)
