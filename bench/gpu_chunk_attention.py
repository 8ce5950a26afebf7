"""`chunk_attention` beside what a user would pick instead, on a GPU: `make bench-gpu`.

One run, bf16, batch 1, 16 heads of 128, T 65,536 queries, N 1,024 chunks of U 64, k 4 different chunks each, drawn at
random among those before the query. Every side gets the same choices; medians of Triton's do_bench. Sides: ours with a
weight a chunk (Resona's gate) and with one softmax; causal attention over all T (SDPA); FlexAttention with the block
mask of the choices; torch's products by chunk (lrm_recall.resona.grouped); and flash-linear-attention's NSA kernel,
which wants 16 query heads to a key head, so that it and ours are also run with one key head. Rows go to
outputs/results/bench.<profile>.jsonl.

What was predicted before the first run, per forward pass, in GB. Each of q, out, K and V is 0.27:
    floor                          q, out, K, V once: 1.07, which takes 0.36 ms at 3 TB/s; the products 0.2 ms
    query by query                 each query reads its 256 tokens, 256 KB in K and V of each head: 137 through the
                                   L2 cache, 25 ms
    by chunk, all heads at once    1.07, and partial outputs written and read, 1.07 each: 3.2, 1.15 ms at 2.8 TB/s;
                                   1.07 GB of scratch
    by chunk, one head at a time   partials of one head are 67 MB, in one scratch that all heads use. What the 50 MB L2
                                   keeps of it never reaches memory: 1.07 to 3.2. Through the L2 cache go q 1.07,
                                   K and V 0.6, partials 2.1, out 0.27: 4 GB, 0.75 ms at 5.5 TB/s. 32 launches of 3 us
    head by head, two halves of T  scratch of 34 MB, which fits, but K and V are read twice (+ 0.54) and launched twice
                                   as often; and the backward pass would have to add up two gradients of K and V
    added up by atomics            no partials, but 540 M additions in fp32, and another result in every run
Chosen: by chunk, few heads at a time; `--sweep` finds how many. About 0.9 to 1.2 ms. Backward: q and d_out gathered,
dq as partials, K, V and their gradients once: 5 products of 137 GFLOP in place of 2, and 4 to 6 GB: 2 to 2.8 ms.
What an H100 said: 1.9 and 3.3 ms. The kernels alone, head by head, take 1.2 ms for the partials and 0.5 for the merge,
which runs at 2.6 TB/s: nothing of a head's partials stays in the L2 cache, and 32 launches cost more than they save. So
four heads at a time. Between this and the floor stand 2.1 GB of partials.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from lrm_kernels import autotune, chunk_attention_tiles
from lrm_kernels.chunk_attention import chunk_attention
from lrm_kernels.chunk_attention_tiles import BACKWARD, FORWARD, Tiles
from lrm_recall.code_hash import code_hash
from lrm_recall.efficiency.timing import copy_bandwidth
from lrm_recall.provenance import machine
from lrm_recall.resona import integrate
from lrm_recall.results import ResultStore, make_row, profile_path

ROOT = Path(__file__).resolve().parents[1]
HEADS, HEAD_DIM, CHUNK, TOP_K = 16, 128, 64, 4
FLEX_QUERIES = 128  # queries in a block of FlexAttention's mask
BUDGET_MS = 300.0  # of the repeats of one measurement
SWEPT = {  # (queries, tokens, warps, stages), part, heads at once
    "forward": (
        [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3),
         (128, 64, 4, 2)],
        [256, 512, 2048], [1, 2, 4, 16],
    ),
    "backward": (
        [(64, 64, 8, 2), (64, 64, 8, 3), (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2), (32, 64, 8, 3),
         (128, 64, 8, 2), (64, 32, 4, 2)],
        [512, 1024, 4096], [1, 2, 4, 16],
    ),
}  # fmt: skip


def choose(length: int, top_k: int) -> Tensor:
    """k different chunks of the visible ones for each query, at random: [1, T, k], -1 where too few are visible."""
    chunks = length // CHUNK
    indices = torch.full((1, length, top_k), -1, device="cuda")
    for start in range(0, length, 8192):
        visible = torch.arange(start, min(start + 8192, length), device="cuda") // CHUNK
        scores = torch.rand(len(visible), chunks, device="cuda")
        scores.masked_fill_(torch.arange(chunks, device="cuda") >= visible[:, None], -1.0)
        best, chosen = scores.topk(top_k, dim=-1)
        indices[0, start : start + 8192] = chosen.masked_fill_(best < 0, -1)
    return indices


def measure(run: Callable[[], object], budget_ms: float = BUDGET_MS) -> dict[str, float]:
    """Median milliseconds, and peak MB beyond what was held before (the result included).

    Triton's `do_bench`: calls follow one another without waiting, as in a model, so that the launches of a call, some
    twenty of ours, are hidden behind the one before; caches are cleared between two.
    """
    run()  # compiles
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    peak = torch.cuda.max_memory_allocated() - held
    return {"ms": do_bench(run, warmup=25, rep=budget_ms, return_mode="median"), "peak_mb": peak / 2**20}


def both(function: Callable[..., Tensor], leaves: list[Tensor]) -> dict[str, dict[str, float]]:
    """Forward and backward of `function(*leaves)`, by itself each."""
    with torch.no_grad():
        result = {"forward": measure(lambda: function(*leaves))}
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    d_out = torch.randn_like(out)
    result["backward"] = measure(lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True))
    return result


def flex(indices: Tensor, length: int) -> Callable[..., Tensor]:
    """FlexAttention, compiled, over the chosen chunks alone; inputs [1, T, H, d] as ours."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    chunks = length // CHUNK
    chosen = torch.zeros(length, chunks + 1, dtype=torch.bool, device="cuda")
    chosen.scatter_(1, indices[0] % (chunks + 1), True)  # no chunk is the last column
    chosen = chosen[:, :chunks].contiguous()
    blocks = chosen.view(-1, FLEX_QUERIES, chunks).any(1)  # [T, N] -> [T / FLEX_QUERIES, N]
    mask = BlockMask.from_kv_blocks(
        blocks.sum(-1, dtype=torch.int32)[None, None],
        blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)[None, None],
        BLOCK_SIZE=(FLEX_QUERIES, CHUNK), mask_mod=lambda b, h, q, kv: chosen[q, kv // CHUNK],
        seq_lengths=(length, length),
    )  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [1, T, H, d] -> [1, H, T, d]
        return compiled(q, k, v, block_mask=mask, kernel_options={"BLOCK_M": FLEX_QUERIES, "BLOCK_N": CHUNK})

    return run


def nsa(indices: Tensor) -> Callable[..., Tensor]:
    """flash-linear-attention's NSA over the chosen chunks: queries [1, T, H, d], keys and values [1, T, heads, d]."""
    from fla.ops.nsa.parallel import parallel_nsa

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = indices.unsqueeze(2).expand(-1, -1, k.shape[2], -1).contiguous()  # [1, T, heads, k]
        return parallel_nsa(q, k, v, block_indices=own, block_counts=TOP_K, block_size=CHUNK)

    return run


def dense(backend: SDPBackend) -> Callable[..., Tensor]:
    """Causal attention over everything by one of SDPA's backends; inputs [1, T, H, d]."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)

    return run


def sides(length: int) -> dict[str, Callable[[], dict[str, dict[str, float]]]]:
    """What is measured, by name; each call gives {"forward": ..., "backward": ...}."""
    indices = choose(length, TOP_K)
    uniform = torch.randint(length // CHUNK, indices.shape, device="cuda")
    q, k, v = (torch.randn(1, length, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    weights = torch.rand(1, length, TOP_K, device="cuda", dtype=torch.bfloat16)
    keys, values = (x.unflatten(1, (-1, CHUNK)) for x in (k, v))  # [1, T, H, d] -> [1, N, U, H, d]
    one_k, one_v = (x[:, :, :1].contiguous() for x in (k, v))  # [1, T, 1, d]
    per_head = indices.repeat_interleave(HEADS, dim=1)  # [1, T H, k]: the heads as queries of one head

    def ours(q: Tensor, k: Tensor, v: Tensor, w: Tensor | None = None, chosen: Tensor = indices) -> Tensor:
        return chunk_attention(q, k, v, chosen, w)

    def ours_one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunk_attention(q.flatten(1, 2).unsqueeze(2), k, v, per_head)

    def by_chunk(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return integrate.chunk_attention_torch(q, k, v, indices, w)

    def forward_only(function: Callable[..., Tensor], *inputs: Tensor) -> dict[str, dict[str, float]]:
        with torch.no_grad():
            return {"forward": measure(lambda: function(*inputs))}

    return {
        "ours": lambda: both(ours, [q, keys, values, weights]),
        "ours, one softmax": lambda: both(ours, [q, keys, values]),
        "ours, all chunks alike": lambda: both(
            lambda *x: ours(*x, chosen=uniform), [q, keys, values, weights]),
        "sdpa flash, all of the past": lambda: both(dense(SDPBackend.FLASH_ATTENTION), [q, k, v]),
        "sdpa cudnn, all of the past": lambda: both(dense(SDPBackend.CUDNN_ATTENTION), [q, k, v]),
        "flex attention": lambda: forward_only(flex(indices, length), q, k, v),
        "torch, by chunk": lambda: forward_only(by_chunk, q, keys, values, weights),
        "fla nsa": lambda: both(nsa(indices), [q, k, v]),
        "fla nsa, one key head": lambda: both(nsa(indices), [q, one_k, one_v]),
        "ours, one key head": lambda: both(
            ours_one_head, [q, *(x.unflatten(1, (-1, CHUNK)) for x in (one_k, one_v))]),
    }  # fmt: skip


def floors(length: int, key_heads: int, bandwidth: float) -> dict[str, dict[str, float]]:
    """Bytes that must be moved, operations of the products, and the milliseconds of those bytes."""
    row = length * HEAD_DIM * 2
    product = 2.0 * length * TOP_K * CHUNK * HEADS * HEAD_DIM
    result = {}
    for task, tensors, products in (("forward", (2, 2), 2), ("backward", (3, 4), 5)):  # of queries' size, of keys'
        size = row * (tensors[0] * HEADS + tensors[1] * key_heads)
        result[task] = {"bytes": float(size), "operations": products * product, "floor_ms": 1e3 * size / bandwidth}
    return result


def our_inputs(length: int) -> tuple[list[Tensor], Tensor]:
    """Queries, keys, values and weights, asking for gradients; the choices."""
    shapes = [(1, length, HEADS, HEAD_DIM), *[(1, length // CHUNK, CHUNK, HEADS, HEAD_DIM)] * 2, (1, length, TOP_K)]
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    return leaves, choose(length, TOP_K)


def print_kernels(length: int) -> None:
    """Where the time of our forward and backward goes, by kernel."""
    (*leaves, weights), indices = our_inputs(length)
    for profiled in (False, True):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            out = chunk_attention(*leaves, indices, weights)
            torch.autograd.grad(out, [*leaves, weights], torch.ones_like(out))
            torch.cuda.synchronize()
        if profiled:
            print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60))


def sweep(length: int) -> None:
    """Every combination of SWEPT, fastest first; those that do not fit the GPU are left out."""
    (*leaves, weights), indices = our_inputs(length)
    key = (2, HEAD_DIM)
    for task, table in (("forward", FORWARD), ("backward", BACKWARD)):
        default, scratch, rows = table[key], chunk_attention_tiles.SCRATCH_BYTES, []
        out = chunk_attention(*leaves, indices, weights)
        d_out = torch.ones_like(out)

        def run(task: str = task, out: Tensor = out, d_out: Tensor = d_out) -> None:
            if task == "backward":
                torch.autograd.grad(out, leaves, d_out, retain_graph=True)
            else:
                with torch.no_grad():
                    chunk_attention(*leaves, indices, weights)

        for (queries, tokens, warps, stages), part, heads in itertools.product(*SWEPT[task]):
            table[key] = Tiles(queries, tokens, part, warps, stages)
            chunk_attention_tiles.SCRATCH_BYTES = heads * length * TOP_K * -(-CHUNK // tokens) * HEAD_DIM * 2
            try:
                rows.append((measure(run, budget_ms=30.0)["ms"], heads, table[key]))
            except Exception as failure:  # too much shared memory, mostly
                print(f"{task} {table[key]}: {type(failure).__name__} {str(failure)[:100]}", flush=True)
        table[key], chunk_attention_tiles.SCRATCH_BYTES = default, scratch
        print(f"{task}; the default is {default}, scratch {scratch >> 20} MB")
        for ms, heads, tiles in sorted(rows, key=lambda row: row[0])[:25]:
            print(f"  {ms:7.3f} ms  {heads:2} heads  {tiles}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--length", type=int, default=65536, help="queries, a multiple of 128 (default: 65536)")
    parser.add_argument("--sides", nargs="+", help="only those whose name begins with one of these")
    parser.add_argument("--sweep", action="store_true", help="try the constants of SWEPT, store nothing")
    parser.add_argument("--kernels", action="store_true", help="the time of each of our kernels, store nothing")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    if arguments.length % FLEX_QUERIES or arguments.length < TOP_K * CHUNK:
        parser.error(f"--length must be a multiple of {FLEX_QUERIES} from {TOP_K * CHUNK} on, got {arguments.length}")
    autotune.apply()
    torch.manual_seed(0)
    if arguments.sweep:
        sweep(arguments.length)
    if arguments.kernels:
        print_kernels(arguments.length)
    if arguments.sweep or arguments.kernels:
        return 0

    here, code = machine(), code_hash(["lrm_kernels.chunk_attention", "lrm_recall.resona.integrate"])
    bandwidth = copy_bandwidth(torch.device("cuda"))
    path = profile_path(ROOT / "outputs" / "results", "bench", arguments.profile)
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    for side, run in sides(arguments.length).items():
        if arguments.sides and not side.startswith(tuple(arguments.sides)):
            continue
        reason, result, start = None, {"forward": {}}, time.perf_counter()
        try:
            result = run()
        except Exception as failure:  # a side that cannot take the shape says why, in its row
            reason = f"{type(failure).__name__}: {failure}"[:300]
            print(f"{side:30} {reason}", flush=True)
        torch.cuda.empty_cache()
        floor = floors(arguments.length, 1 if side.endswith("one key head") else HEADS, bandwidth)
        for task, metrics in result.items():
            if metrics:
                metrics |= floor[task]
                floors_taken = metrics["ms"] / metrics["floor_ms"]
                print(f"{side:30} {task:9} {metrics['ms']:9.3f} ms = {floors_taken:6.1f} floors, "
                      f"{metrics['peak_mb']:7.0f} MB", flush=True)
            ResultStore(path).append(make_row(
                experiment="bench_gpu_chunk_attention",
                config={"side": side, "task": task, "length": arguments.length, "heads": HEADS, "head_dim": HEAD_DIM,
                        "chunk_size": CHUNK, "top_k": TOP_K, "dtype": "bfloat16", "autotune": autotune.mode()},
                seed=0, data={"source": "random", "revision": ""}, code=code, profile=arguments.profile, machine=here,
                metrics=metrics, runtime_s=time.perf_counter() - start,
                peak_memory_mb=metrics.get("peak_mb", 0.0), error=reason,
            ))  # fmt: skip
    print(f"rows added to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
