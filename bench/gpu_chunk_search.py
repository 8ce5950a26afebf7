"""The search for the best chunks beside a product and torch.topk, on a GPU: forward, backward, memory, the floor.

One run, random unit embeddings, the causal rule. The other side takes the T x N scores in blocks of rows, hides what a
query may not see, and lets torch.topk choose; the scores of the chosen chunks, through which gradients flow, are
gathered. Both give the same chunks and scores. The floor is what the bytes of inputs and outputs, or the operations of
the visible half of the product, take at the speeds that a copy and a large product reach in the same run. Rows go to
outputs/results/bench.<profile>.jsonl. With --sweep: how the kernel is best cut, on random scores and on scores that
rise from chunk to chunk, where all that is kept is replaced again and again; printed only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from lrm_kernels.chunk_search import Tiles, chunk_search, search_forward, tiles
from lrm_recall.code_hash import code_hash
from lrm_recall.efficiency.timing import copy_bandwidth
from lrm_recall.provenance import machine
from lrm_recall.results import ResultStore, make_row, profile_path

ROOT = Path(__file__).resolve().parents[1]
MAIN = (65536, 1024, 128, 4, torch.bfloat16)  # T, N, E, k, dtype
CASES = [
    MAIN,
    (65536, 1024, 128, 1, torch.bfloat16),
    (65536, 1024, 128, 16, torch.bfloat16),
    (131072, 2048, 128, 4, torch.bfloat16),
    (8192, 128, 128, 4, torch.bfloat16),
    (8192, 128, 2048, 4, torch.bfloat16),
    (65536, 1024, 2048, 4, torch.bfloat16),
    (65536, 1024, 128, 4, torch.float32),
]
SWEEP = {  # (E, k): cuts
    (128, 4): [
        Tiles(64, 64, 128, 4, 2, False),
        Tiles(64, 64, 128, 4, 3, False),
        Tiles(64, 32, 128, 4, 2, False),
        Tiles(64, 128, 128, 4, 2, False),
        Tiles(128, 64, 128, 8, 2, False),
        Tiles(128, 128, 128, 8, 2, False),
        Tiles(64, 64, 128, 4, 2, True),
        Tiles(64, 128, 128, 4, 2, True),
        Tiles(128, 64, 128, 8, 2, True),
    ],
    (128, 8): [Tiles(64, 64, 128, 4, 2, False), Tiles(64, 64, 128, 4, 2, True)],
    (128, 16): [Tiles(64, 64, 128, 4, 2, False), Tiles(64, 64, 128, 4, 2, True), Tiles(64, 128, 128, 4, 2, True)],
    (2048, 4): [
        Tiles(64, 64, 128, 4, 2, False),
        Tiles(64, 64, 64, 4, 3, False),
        Tiles(128, 128, 64, 8, 3, False),
        Tiles(128, 128, 64, 8, 4, False),
        Tiles(128, 256, 64, 8, 3, False),
    ],
}
SCORES_AT_ONCE = 1 << 24  # elements of the T x N scores that the other side holds at a time


def product_and_topk(queries: Tensor, chunks: Tensor, visible: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The same choice and scores through torch alone, in blocks of rows."""
    (batch, length, _), num_chunks = queries.shape, chunks.shape[1]
    order = torch.arange(num_chunks, device=queries.device)
    indices = []
    step = SCORES_AT_ONCE // num_chunks
    with torch.no_grad():
        for start in range(0, length, step):
            rows = slice(start, start + step)
            scores = torch.matmul(queries[:, rows], chunks.mT)  # [B, t, N]
            scores.masked_fill_(order >= visible[:, rows, None], -torch.inf)
            best, chosen = scores.topk(top_k, dim=-1)  # [B, t, k]
            indices.append(chosen.masked_fill_(best == -torch.inf, -1))
    indices = torch.cat(indices, dim=1)  # [B, T, k]
    first = num_chunks * torch.arange(batch, device=queries.device)[:, None, None]
    taken = chunks.flatten(0, 1).index_select(0, (indices.clamp(min=0) + first).flatten())  # [B * T * k, E]
    scores = torch.einsum("bte,btke->btk", queries, taken.view(*indices.shape, -1))
    return indices, scores.masked_fill(indices == -1, 0.0)


def inputs(T: int, N: int, E: int, dtype: torch.dtype, rising: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [1, T, E], chunks [1, N, E] and the number of chunks wholly before each query [1, T]."""
    generator = torch.Generator("cuda").manual_seed(0)
    queries, chunks = (torch.randn(1, length, E, generator=generator, device="cuda") for length in (T, N))
    if rising:  # all queries look nearly along the diagonal, and each chunk lies nearer to it than those before
        queries = queries + 100
        cosine = torch.linspace(0, 1, N, device="cuda")[:, None]
        across = F.normalize(chunks - chunks.mean(-1, keepdim=True), dim=-1)
        chunks = cosine * E**-0.5 + (1 - cosine**2).sqrt() * across
    visible = torch.arange(T, device="cuda")[None] // (T // N)
    return F.normalize(queries, dim=-1).to(dtype), F.normalize(chunks, dim=-1).to(dtype), visible


def milliseconds(run: Callable[[], object]) -> float:
    return do_bench(run, warmup=25, rep=100, return_mode="median")


def measure(search: Callable, queries: Tensor, chunks: Tensor, visible: Tensor, top_k: int) -> dict[str, float]:
    """Median milliseconds of forward and of backward, and the most MB that one forward and backward add."""
    leaves = [queries.detach().requires_grad_(), chunks.detach().requires_grad_()]
    with torch.no_grad():
        metrics = {"forward_ms": milliseconds(lambda: search(queries, chunks, visible, top_k))}
        metrics["forward_extra_mb"] = _extra_mb(lambda: search(queries, chunks, visible, top_k))
    scores = search(*leaves, visible, top_k)[1]
    weights = torch.randn_like(scores)
    metrics["backward_ms"] = milliseconds(lambda: torch.autograd.grad(scores, leaves, weights, retain_graph=True))
    metrics["training_extra_mb"] = _extra_mb(
        lambda: torch.autograd.grad(search(*leaves, visible, top_k)[1], leaves, weights)
    )
    return metrics


def _extra_mb(run: Callable[[], object]) -> float:
    """What one call holds at most beyond what was held before; its results are counted."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def floor(case: tuple, visible: Tensor, bandwidth: float, speed: dict[torch.dtype, float]) -> dict[str, float]:
    """Milliseconds of a forward pass that the bytes and the visible products alone would take."""
    T, N, E, top_k, dtype = case
    size = (T + N) * E * dtype.itemsize + T * 8 + T * top_k * (8 + 4)  # embeddings, counts, indices and scores
    operations = 2 * E * int(visible.clamp(max=N).sum())
    return {"bytes": float(size), "operations": float(operations),
            "floor_ms": 1e3 * max(size / bandwidth, operations / speed[dtype])}


def product_speed(dtype: torch.dtype) -> float:
    """Operations a second of a large product, fp32 in full fp32."""
    n = 8192 if dtype == torch.bfloat16 else 4096
    x = torch.randn(n, n, device="cuda", dtype=dtype)
    return 2 * n**3 / (1e-3 * milliseconds(lambda: x @ x))


def sweep() -> None:
    """Print the milliseconds of every cut."""
    for (E, top_k), cuts in SWEEP.items():
        data = [inputs(65536, 1024, E, torch.bfloat16, rising) for rising in (False, True)]
        print(f"T 65,536, N 1,024, E {E}, k {top_k}: ms on random scores, on rising ones")
        for sizes in cuts:
            try:
                ms = [milliseconds(partial(search_forward, *x, top_k, sizes)) for x in data]
                print(f"  {ms[0]:7.3f} {ms[1]:7.3f}  {sizes}", flush=True)
            except OutOfResources as failure:  # a cut that does not fit must not end the run
                print(f"  {failure}  {sizes}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--sweep", action="store_true", help="try several cuts of the kernel, and write no rows")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    if arguments.sweep:
        sweep()
        return 0

    here, code = machine(), code_hash(["lrm_kernels.chunk_search"])
    path = profile_path(ROOT / "outputs" / "results", "bench", arguments.profile)
    bandwidth = copy_bandwidth(torch.device("cuda"))
    torch.cuda.empty_cache()
    speed = {dtype: product_speed(dtype) for dtype in (torch.bfloat16, torch.float32)}
    print(f"copy {bandwidth / 1e12:.2f} TB/s; product {', '.join(f'{s / 1e12:.0f} TFLOP/s' for s in speed.values())}")
    print("     T     N     E   k  dtype       floor   ours    topk  ratio | backward: ours   topk | MB: ours    topk")
    for case in CASES:
        T, N, E, top_k, dtype = case
        queries, chunks, visible = inputs(T, N, E, dtype)
        bound = floor(case, visible, bandwidth, speed)
        result = {name: measure(search, queries, chunks, visible, top_k)
                  for name, search in (("ours", chunk_search), ("topk", product_and_topk))}
        a, b = result.values()
        print(f"{T:6} {N:5} {E:5} {top_k:3}  {str(dtype)[6:]:9} {bound['floor_ms']:7.3f} {a['forward_ms']:6.3f} "
              f"{b['forward_ms']:7.3f} {b['forward_ms'] / a['forward_ms']:6.1f} | {a['backward_ms']:14.3f} "
              f"{b['backward_ms']:6.3f} | {a['training_extra_mb']:8.1f} {b['training_extra_mb']:7.1f}", flush=True)
        for side, metrics in result.items():
            ResultStore(path).append(make_row(
                experiment="bench_gpu_chunk_search",
                config={"length": T, "chunks": N, "encoder_dim": E, "top_k": top_k, "dtype": str(dtype)[6:],
                        "side": side, **({"tiles": tiles(dtype, E, top_k)._asdict()} if side == "ours" else {})},
                seed=0, data={"source": "random", "revision": ""}, code=code, profile=arguments.profile,
                machine=here, metrics={**metrics, **bound},
                runtime_s=1e-3 * (metrics["forward_ms"] + metrics["backward_ms"]),
                peak_memory_mb=metrics["training_extra_mb"],
            ))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
