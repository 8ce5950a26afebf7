"""What a run starts from: its initial weights, and torch's threads on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lrm_recall.config import RecurrentLMConfig
from lrm_recall.model import RecurrentLM

_initialising = threading.Lock()  # torch's initialisers draw from one global stream


def initial_model(config: RecurrentLMConfig, seed: int) -> RecurrentLM:
    """The model with the initial weights of this seed, on the CPU; the caller's random state is left as it was."""
    with _initialising, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return RecurrentLM(config)


@contextmanager
def torch_threads(number: int, device: torch.device) -> Iterator[None]:
    """On a CPU, work with this many threads of torch, and give back the old number.

    The number belongs to the whole process, so runs in several threads must agree on it. A GPU does not care.
    """
    if device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
