"""From nothing to the first forward and backward: what a user waits for on a machine that never ran the model.

A process of its own with an empty Triton cache. `python -m lrm_recall.efficiency.cold_start` reads the model from its
standard input as JSON and writes the seconds to its standard output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch


def cold_start(config: dict[str, Any], length: int, dtype: str, device: torch.device) -> dict[str, float]:
    """Seconds of the first forward and backward over one sequence of `length` tokens, in a new process.

    Args:
        config: of a RecurrentLM, as its `to_dict` gives it.
        dtype: "float32" or "bfloat16".

    Returns:
        import_s, build_s, forward_s, backward_s; ms, the last two together in milliseconds.

    Raises:
        RuntimeError: the process has failed; with the end of what it said.
    """
    asked = json.dumps({"config": config, "length": length, "dtype": dtype, "device": str(device)})
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", __name__], input=asked, capture_output=True, text=True,
            env={**os.environ, "TRITON_CACHE_DIR": cache},
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the process of the cold start has failed: {done.stderr[-500:]}")
    seconds = json.loads(done.stdout.splitlines()[-1])
    return {**seconds, "ms": 1e3 * (seconds["forward_s"] + seconds["backward_s"])}


def _main() -> None:
    start = time.perf_counter()
    from lrm_recall.config import RecurrentLMConfig
    from lrm_recall.efficiency.timing import wait
    from lrm_recall.model import RecurrentLM

    asked = json.load(sys.stdin)
    device = torch.device(asked["device"])
    marks = [start, time.perf_counter()]

    def mark() -> None:
        wait(device)
        marks.append(time.perf_counter())

    torch.set_default_dtype(getattr(torch, asked["dtype"]))
    with device:
        model = RecurrentLM(RecurrentLMConfig(**asked["config"]))
        ids = torch.randint(asked["config"]["vocab_size"], (1, asked["length"]))  # [1, T]
    mark()
    loss = model(input_ids=ids, labels=ids).loss
    mark()
    loss.backward()
    mark()
    names = ("import_s", "build_s", "forward_s", "backward_s")
    print(json.dumps(dict(zip(names, (b - a for a, b in zip(marks, marks[1:], strict=False)), strict=True))))


if __name__ == "__main__":
    _main()
