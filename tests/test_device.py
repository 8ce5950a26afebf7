"""A device that is not there is one clear error before a sweep starts."""

import pytest
import torch

from lrm_recall.train.device import DeviceLostError, own_stream, usable_device


def test_cpu_is_always_there():
    assert usable_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:99", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_missing_device(name):
    with pytest.raises(ValueError, match=f"device '{name}' is not available here; allowed: cpu"):
        usable_device(name)


def test_on_a_cpu_an_error_is_no_lost_device():
    with pytest.raises(ZeroDivisionError), own_stream(torch.device("cpu")):
        _ = 1 / 0
    assert DeviceLostError.breaks_process  # what lrm_recall.execution looks for
