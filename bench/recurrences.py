"""The recurrences side by side with what one would use instead, in one run: `make bench`.

Every recurrence, chunked against the token-by-token oracle; the whole Mamba2 layer against transformers' torch path on
the same weights, at its default chunk size and at ours; a Hyena layer against itself with one FFT over the sequence, as
zoology and mad-lab have it, which lets rounding of later tokens reach earlier ones. Repeats are interleaved, so that a
busy moment hits every variant; medians are reported. Peak memory is what one pass adds to a process of its own. The
floor is the operations of the chunked form's products (the causal half of each square, backward twice the forward) over
the speed of a large matrix product measured in the same run; 0 where the work is not products. Rows go to
outputs/results/bench.<profile>.jsonl.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers looks for kernels on the hub; here it must not
import psutil
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, softplus
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from lrm_recall.code_hash import code_hash
from lrm_recall.mixers import hyena as hyena_module
from lrm_recall.mixers.mamba2 import Mamba2
from lrm_recall.ops.delta_rule import delta_rule_chunked, delta_rule_recurrent
from lrm_recall.ops.gated_delta_rule import gated_delta_rule_chunked, gated_delta_rule_recurrent
from lrm_recall.ops.gla import gla_chunked, gla_recurrent
from lrm_recall.ops.retention import multi_scale_log_decay, retention_chunked, retention_recurrent
from lrm_recall.ops.rwkv4 import rwkv4_chunked, rwkv4_recurrent
from lrm_recall.ops.rwkv5 import rwkv5_chunked, rwkv5_recurrent
from lrm_recall.ops.selective_scan import selective_scan_chunked, selective_scan_recurrent
from lrm_recall.ops.ssd import ssd_chunked, ssd_recurrent
from lrm_recall.provenance import machine
from lrm_recall.results import ResultStore, make_row, profile_path

ROOT = Path(__file__).resolve().parents[1]
BATCH, LENGTH, HIDDEN = 1, 2048, 512
GLA = {"heads": 4, "key": 64, "value": 128}  # GLA(512): expand_k 0.5, expand_v 1
SSD = {"heads": 16, "head": 64, "state": 128}  # Mamba2(512): expand 2, one group
DELTA = {"heads": 4, "key": 128, "value": 128}  # DeltaNet and Gated DeltaNet
RETENTION = {"heads": 8, "key": 64, "value": 128}  # RetNet(512)
RWKV5 = {"heads": 8, "key": 64, "value": 64}
SCAN = {"channels": 1024, "state": 16}  # Mamba(512): expand 2
HYENA = {"batch": 8, "hidden_size": 128}  # as zoology's MQAR models
CHUNK = 64  # the default of the chunked forms whose work is products
SHAPES = {"gla": GLA, "delta": DELTA, "gated_delta": DELTA, "retention": RETENTION, "rwkv5": RWKV5,
          "rwkv4": {"channels": HIDDEN}, "scan": SCAN, "hyena": HYENA}  # fmt: skip
CODE = ("lrm_recall.ops.gla", "lrm_recall.ops.ssd", "lrm_recall.mixers.mamba2", "lrm_recall.mixers.hyena",
        "lrm_recall.ops.gated_delta_rule", "lrm_recall.ops.retention", "lrm_recall.ops.rwkv4", "lrm_recall.ops.rwkv5",
        "lrm_recall.ops.selective_scan")  # fmt: skip
RECURRENCES = ("gla", "ssd", "delta", "gated_delta", "retention", "rwkv5", "rwkv4", "scan")
TARGETS = [  # (variant, what it is held against, by how much it must be faster)
    *((f"{name} chunked", f"{name} recurrent", 10.0) for name in RECURRENCES),
    ("hyena ours", "hyena one FFT", 1 / 1.5),
    ("mamba2 ours", "mamba2 transformers, chunk 256", 1.0),
    ("mamba2 ours", "mamba2 transformers, chunk 64", 1.0),
]


@dataclass
class Variant:
    """One thing to time: `forward()` gives a tensor that depends on `parameters`; `operations` of its products."""

    forward: Callable[[], Tensor]
    parameters: list[Tensor]
    operations: float

    def run(self, backward: bool) -> Tensor:
        if not backward:
            with torch.no_grad():
                return self.forward()
        y = self.forward()
        torch.autograd.grad(y, self.parameters, torch.ones_like(y))
        return y


def gla(form: Callable) -> Variant:
    H, K, V = GLA.values()
    q, k, v = (torch.randn(BATCH, LENGTH, H, width) for width in (K, K, V))
    log_decay = logsigmoid(torch.randn(BATCH, LENGTH, H, K)) / 16
    inputs = [x.requires_grad_() for x in (q, k, v, log_decay)]
    operations = BATCH * LENGTH * H * (CHUNK * (K + V) + 4 * K * V)
    return Variant(lambda: form(*inputs)[0], inputs, operations)


def delta(form: Callable, gated: bool) -> Variant:
    H, K, V = DELTA.values()
    q, k = (normalize(torch.randn(BATCH, LENGTH, H, K), dim=-1) for _ in range(2))
    v, beta = torch.randn(BATCH, LENGTH, H, V), torch.rand(BATCH, LENGTH, H)
    decay = [-softplus(torch.randn(BATCH, LENGTH, H) - 3)] if gated else []
    inputs = [x.requires_grad_() for x in (q, k, v, *decay, beta)]
    return Variant(lambda: form(*inputs)[0], inputs, BATCH * LENGTH * H * (CHUNK * (3 * K + 2 * V) + 6 * K * V))


def retention(form: Callable) -> Variant:
    H, K, V = RETENTION.values()
    inputs = [torch.randn(BATCH, LENGTH, H, width, requires_grad=True) for width in (K, K, V)]
    operations = BATCH * LENGTH * H * (CHUNK * (K + V) + 4 * K * V)
    return Variant(lambda: form(*inputs, multi_scale_log_decay(H))[0], inputs, operations)


def rwkv5(form: Callable) -> Variant:
    H, K, V = RWKV5.values()
    r, k, v = (torch.randn(BATCH, LENGTH, H, width) for width in (K, K, V))
    inputs = [x.requires_grad_() for x in (r, k, v, -torch.randn(H, K).exp() / 8, torch.randn(H, K))]
    return Variant(lambda: form(*inputs)[0], inputs, BATCH * LENGTH * H * (CHUNK * (K + V) + 4 * K * V))


def rwkv4(form: Callable) -> Variant:
    k, v = torch.randn(2, BATCH, LENGTH, HIDDEN).unbind()
    inputs = [x.requires_grad_() for x in (torch.randn(HIDDEN), torch.randn(HIDDEN), k, v)]
    return Variant(lambda: form(*inputs)[0], inputs, 0.0)


def scan(form: Callable) -> Variant:
    E, N = SCAN.values()
    x, dt = torch.randn(BATCH, LENGTH, E), torch.empty(BATCH, LENGTH, E).uniform_(0.001, 0.1)
    B, C = torch.randn(2, BATCH, LENGTH, N).unbind()
    inputs = [y.requires_grad_() for y in (x, dt, -torch.arange(1.0, N + 1).repeat(E, 1), B, C, torch.ones(E))]
    return Variant(lambda: form(*inputs)[0], inputs, 0.0)


def one_fft(x: Tensor, kernel: Tensor, *, outputs: int) -> Tensor:
    """The long convolution as one FFT over the whole sequence."""
    T = x.shape[1]
    spectrum = torch.fft.rfft(x.mT, n=2 * T) * torch.fft.rfft(kernel[:T].T, n=2 * T)  # [B, D, T + 1]
    return torch.fft.irfft(spectrum, n=2 * T)[..., T - outputs : T].mT


def hyena(convolution: Callable) -> Variant:
    layer = hyena_module.MIXER(HYENA["hidden_size"], l_max=LENGTH)
    x = torch.randn(HYENA["batch"], LENGTH, HYENA["hidden_size"], requires_grad=True)

    def forward() -> Tensor:
        ours, hyena_module.long_conv = hyena_module.long_conv, convolution
        try:
            return layer(x)
        finally:
            hyena_module.long_conv = ours

    return Variant(forward, [x, *layer.parameters()], 0.0)


def ssd(form: Callable) -> Variant:
    H, P, N = SSD.values()
    x, dt = torch.randn(BATCH, LENGTH, H, P), torch.empty(BATCH, LENGTH, H).uniform_(0.001, 0.1)
    B, C = torch.randn(2, BATCH, LENGTH, 1, N).unbind()
    inputs = [y.requires_grad_() for y in (x, dt, -torch.arange(1.0, H + 1), B, C, torch.ones(H))]
    return Variant(lambda: form(*inputs)[0], inputs, ssd_operations())


def ssd_operations() -> float:
    H, P, N = SSD.values()
    return BATCH * LENGTH * (CHUNK * (N + H * P) + 4 * H * P * N)


def mamba2(their_chunk_size: int | None) -> Variant:
    """Our layer, or transformers' with that chunk size; the weights are the same whichever is asked for."""
    config = Mamba2Config(
        hidden_size=HIDDEN, num_heads=SSD["heads"], head_dim=SSD["head"], state_size=SSD["state"], n_groups=1,
        num_hidden_layers=1, chunk_size=their_chunk_size or CHUNK,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, layer_idx=0)
    ours = Mamba2(HIDDEN, head_dim=SSD["head"], state_size=SSD["state"], chunk_size=CHUNK)
    ours.load_state_dict(theirs.state_dict())
    layer = theirs if their_chunk_size else ours
    x = torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True)
    projections = 2 * BATCH * LENGTH * (ours.in_proj.weight.numel() + ours.out_proj.weight.numel())
    return Variant(lambda: layer(x), [x, *layer.parameters()], projections + ssd_operations())


VARIANTS: dict[str, Callable[[], Variant]] = {
    "gla recurrent": partial(gla, gla_recurrent),
    "gla chunked": partial(gla, partial(gla_chunked, chunk_size=CHUNK, output_final_state=False)),
    "ssd recurrent": partial(ssd, ssd_recurrent),
    "ssd chunked": partial(ssd, partial(ssd_chunked, chunk_size=CHUNK, output_final_state=False)),
    "delta recurrent": partial(delta, delta_rule_recurrent, False),
    "delta chunked": partial(delta, partial(delta_rule_chunked, output_final_state=False), False),
    "gated_delta recurrent": partial(delta, gated_delta_rule_recurrent, True),
    "gated_delta chunked": partial(delta, partial(gated_delta_rule_chunked, output_final_state=False), True),
    "retention recurrent": partial(retention, retention_recurrent),
    "retention chunked": partial(retention, partial(retention_chunked, output_final_state=False)),
    "rwkv5 recurrent": partial(rwkv5, rwkv5_recurrent),
    "rwkv5 chunked": partial(rwkv5, partial(rwkv5_chunked, output_final_state=False)),
    "rwkv4 recurrent": partial(rwkv4, rwkv4_recurrent),
    "rwkv4 chunked": partial(rwkv4, partial(rwkv4_chunked, output_final_state=False)),
    "scan recurrent": partial(scan, selective_scan_recurrent),
    "scan chunked": partial(scan, partial(selective_scan_chunked, output_final_state=False)),
    "hyena one FFT": partial(hyena, one_fft),
    "hyena ours": partial(hyena, hyena_module.long_conv),
    "mamba2 transformers, chunk 256": partial(mamba2, 256),
    "mamba2 transformers, chunk 64": partial(mamba2, 64),
    "mamba2 ours": partial(mamba2, None),
}


def make(name: str) -> Variant:
    torch.manual_seed(0)  # variants of one problem get the same inputs
    return VARIANTS[name]()


def time_all(repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of every variant, forward and forward with backward, and its error against the first."""
    variants = {name: make(name) for name in VARIANTS}
    metrics: dict[str, dict[str, float]] = {name: {} for name in VARIANTS}
    references: dict[str, Tensor] = {}
    for name, variant in variants.items():  # warm up, and check that the variants of a problem agree
        y = variant.run(backward=True).detach()
        reference = references.setdefault(name.split()[0], y)
        metrics[name]["error"] = ((y - reference).norm() / reference.norm()).item()
    for backward in (False, True):
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for _ in range(repeats if backward else 3 * repeats):
            for name, variant in variants.items():
                start = time.perf_counter()
                variant.run(backward)
                times[name].append(1e3 * (time.perf_counter() - start))
        for name in VARIANTS:
            metrics[name]["forward_backward_ms" if backward else "forward_ms"] = statistics.median(times[name])
    peak = matmul_peak(repeats)
    for name, variant in variants.items():
        metrics[name]["forward_floor_ms"] = 1e3 * variant.operations / peak
        metrics[name]["forward_backward_floor_ms"] = 3e3 * variant.operations / peak
    return metrics


def matmul_peak(repeats: int) -> float:
    """Operations a second of a large fp32 matrix product: the best of the repeats."""
    a, seconds = torch.randn(1536, 1536), []
    for _ in range(3 * repeats):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return 2 * a.shape[0] ** 3 / min(seconds)


def measure_memory(name: str) -> dict[str, float]:
    """Megabytes that a forward, then a forward with backward, add to this process at their peak."""
    variant = make(name)
    torch.mm(torch.randn(256, 256), torch.randn(256, 256))  # what the maths library sets up once is not the variant's
    before, peaks = psutil.Process().memory_info().rss, {}
    for backward in (False, True):
        variant.run(backward)
        peaks["forward_backward_mb" if backward else "forward_mb"] = max(peak_memory() - before, 0) / 2**20
    return peaks


def peak_memory() -> int:
    """Bytes that this process has held at most. On Linux getrusage would count the process that started it, too."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def memory_in_subprocess(name: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--threads", "1", "--memory-of", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_table(metrics: dict[str, dict[str, float]]) -> None:
    print(f"{'':32}{'forward':^30}{'forward and backward':^30}{'':>10}")
    print(f"{'':32}" + 2 * f"{'ms':>9}{'floor':>9}{'MB':>9}   " + f"{'error':>9}")
    for name, m in metrics.items():
        forward = f"{m['forward_ms']:9.1f}{m['forward_floor_ms']:9.1f}{m['forward_mb']:9.0f}   "
        both = f"{m['forward_backward_ms']:9.1f}{m['forward_backward_floor_ms']:9.1f}{m['forward_backward_mb']:9.0f}   "
        print(f"{name:32}{forward}{both}{m['error']:9.0e}")


def print_targets(metrics: dict[str, dict[str, float]]) -> bool:
    """How many times faster in each pass; True when forward with backward meets every target."""
    met = True
    for name, other, target in TARGETS:
        line = []
        for passes, field in (("forward", "forward_ms"), ("forward and backward", "forward_backward_ms")):
            ratio = metrics[other][field] / metrics[name][field]
            line.append(f"{passes} {ratio:.1f}x" + ("" if ratio >= target else " (MISSED)"))
        met &= ratio >= target
        print(f"{name} over {other}, to be at least {target:g}x: {', '.join(line)}")
    return met


def store(metrics: dict[str, dict[str, float]], profile: str, seconds: float) -> Path:
    path = profile_path(ROOT / "outputs" / "results", "bench", profile)
    code, here = code_hash(CODE), machine()
    for name, m in metrics.items():
        problem, _, variant = name.partition(" ")
        row = make_row(
            experiment="bench_recurrences",
            config={
                "problem": problem, "variant": variant, "batch": BATCH, "length": LENGTH, "hidden_size": HIDDEN,
                "shape": SHAPES.get(problem, SSD), "threads": torch.get_num_threads(),
            },
            seed=0,
            data={"source": "random", "revision": ""},
            code=code,
            profile=profile,
            machine=here,
            metrics=m,
            runtime_s=seconds,
            peak_memory_mb=m["forward_backward_mb"],
        )  # fmt: skip
        ResultStore(path).append(row)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--repeats", type=int, default=3, help="of forward with backward; three times as many forward")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--memory-of", metavar="VARIANT", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments.memory_of)))
        return 0

    start = time.perf_counter()
    metrics = time_all(arguments.repeats)
    with ThreadPoolExecutor(2) as pool:
        for name, peaks in zip(VARIANTS, pool.map(memory_in_subprocess, VARIANTS), strict=True):
            metrics[name] |= peaks
    print(f"batch {BATCH}, length {LENGTH}, hidden {HIDDEN}, fp32, {torch.get_num_threads()} threads")
    print_table(metrics)
    met = print_targets(metrics)
    print(f"rows added to {store(metrics, arguments.profile, time.perf_counter() - start)}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
