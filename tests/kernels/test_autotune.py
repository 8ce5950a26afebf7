"""What the autotuning modes leave of a kernel's configurations; a mode is global, so each has a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from lrm_kernels import autotune

SCRIPT = """
import json, sys
from lrm_kernels import autotune
autotune.TUNED = __import__("pathlib").Path(sys.argv[1])
mode = autotune.apply()
import triton, triton.language as tl
from triton.runtime.errors import OutOfResources

@triton.autotune(configs=[triton.Config({"BLOCK": b}, num_warps=w, num_stages=s)
                          for b in (16, 64, 256) for w in (1, 4, 16) for s in (2, 5)], key=["n"])
@triton.jit
def kernel(x, n, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 1.0, mask=tl.arange(0, BLOCK) < n)

result = {"mode": mode, "configs": [autotune.describe(c) for c in kernel.configs], "name": autotune.kernel_name(kernel)}
if len(sys.argv) > 2:  # too much shared memory for the first two configurations that are tried
    class Greedy:
        def __init__(self, inner): self.inner, self.refused = inner, 0
        def run(self, *args, **kwargs):
            if self.refused < 2:
                self.refused += 1
                raise OutOfResources(1, 2, "shared memory")
            return "ran"
    kernel.fn = Greedy(kernel.fn)
    result["ran"] = kernel.run(None, 3, grid=(1,))
    result["after"] = [autotune.describe(c) for c in kernel.configs]
    result["spare"] = len(kernel.spare)
print(json.dumps(result))
"""


def run(tmp_path, mode, *arguments):
    environment = {**os.environ, autotune.VARIABLE: mode}
    script = tmp_path / "script.py"  # Triton compiles functions of files alone
    script.write_text(SCRIPT)
    result = subprocess.run([sys.executable, str(script), str(tmp_path), *arguments], capture_output=True, text=True,
                            env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_quick_leaves_the_configuration_nearest_to_four_warps_and_blocks_of_64(tmp_path):
    result = run(tmp_path, "quick")
    assert result["configs"] == [{"kwargs": {"BLOCK": 64}, "num_warps": 4, "num_stages": 2}]
    assert result["name"] == "kernel"


def test_full_leaves_all(tmp_path):
    assert len(run(tmp_path, "full")["configs"]) == 18


def test_too_little_shared_memory_for_the_first_tries_the_next(tmp_path):
    result = run(tmp_path, "quick", "greedy")
    assert result["ran"] == "ran" and result["spare"] == 15
    assert result["after"] != result["configs"] and len(result["after"]) == 1


def test_shipped_without_a_file_for_this_gpu_is_quick(tmp_path):
    result = run(tmp_path, "shipped")
    assert result["mode"] == "shipped" and result["configs"][0]["num_warps"] == 4 and len(result["configs"]) == 1


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv(autotune.VARIABLE, "fast")
    with pytest.raises(ValueError, match="must be one of quick, shipped, full, got 'fast'"):
        autotune.mode()
