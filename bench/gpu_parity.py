"""Our models against the libraries' own classes, on a GPU, with the same weights: `make bench-gpu`.

For each architecture the library's class is built with random weights and writes a checkpoint; ours is loaded from it.
Compared, in fp32 and bf16, by relative error over the whole tensor: logits, loss, every gradient (the worst is
reported), the tokens of a greedy generation. Beside it stands the error of each side against our torch form in fp32 on
the same weights, which shares no kernel with either. Rows go to outputs/results/parity.<profile>.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from torch import Tensor, nn

from lrm_kernels import autotune

autotune.apply()
from lrm_recall import RecurrentLM  # noqa: E402
from lrm_recall.checkpoints.find import find_layout  # noqa: E402
from lrm_recall.checkpoints.source import read_config  # noqa: E402
from lrm_recall.code_hash import code_hash  # noqa: E402
from lrm_recall.ops.dispatch import BACKEND_VARIABLE  # noqa: E402
from lrm_recall.provenance import machine  # noqa: E402
from lrm_recall.results import ResultStore, make_row, profile_path  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
VOCAB, HIDDEN, LAYERS = 512, 256, 2
BATCH, LENGTH, PROMPT, NEW_TOKENS = 2, 300, 100, 32  # an odd length on purpose
CODE = ("lrm_recall.model", "lrm_recall.checkpoints", "lrm_recall.ops.libraries.fla",
        "lrm_recall.ops.libraries.mamba_ssm", "lrm_recall.ops.libraries.causal_conv1d")  # fmt: skip


def fla_model(name: str) -> nn.Module:
    from fla import models as m

    shape = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    return {
        "gla": lambda: m.GLAForCausalLM(m.GLAConfig(num_heads=2, **shape)),
        "deltanet": lambda: m.DeltaNetForCausalLM(m.DeltaNetConfig(num_heads=2, **shape)),
        "gated_deltanet": lambda: m.GatedDeltaNetForCausalLM(
            m.GatedDeltaNetConfig(num_heads=2, head_dim=64, expand_v=2, **shape)
        ),
        "retnet": lambda: m.RetNetForCausalLM(m.RetNetConfig(num_heads=2, **shape)),
        "mamba": lambda: m.MambaForCausalLM(m.MambaConfig(residual_in_fp32=False, **shape)),
        "mamba2": lambda: m.Mamba2ForCausalLM(
            m.Mamba2Config(head_dim=64, num_heads=8, state_size=64, residual_in_fp32=False, **shape)
        ),
    }[name]()


def state_spaces_model(name: str) -> nn.Module:
    """mamba-ssm's own class, the one that wrote the state-spaces checkpoints."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    layer = {"mamba": {}, "mamba2": {"layer": "Mamba2", "headdim": 64, "d_state": 64}}[name]
    return MambaLMHeadModel(MambaConfig(d_model=HIDDEN, n_layer=LAYERS, vocab_size=VOCAB, ssm_cfg=layer))


def write(model: nn.Module, directory: Path) -> None:
    """A checkpoint as the library writes it."""
    if hasattr(model, "config") and hasattr(model.config, "to_dict"):
        model.save_pretrained(directory)
    else:
        model.save_pretrained(str(directory))  # mamba-ssm: config.json and a pickle


CASES: dict[tuple[str, str], Callable[[], nn.Module]] = {
    **{(name, "flash-linear-attention"): (lambda name=name: fla_model(name))
       for name in ("gla", "deltanet", "gated_deltanet", "retnet", "mamba", "mamba2")},
    **{(name, "mamba-ssm"): (lambda name=name: state_spaces_model(name)) for name in ("mamba", "mamba2")},
}  # fmt: skip


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    if not actual.isfinite().all():
        return float("inf")
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def run(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients; the loss as everybody computes it, in fp32 from the logits."""
    model.train()
    logits = model(input_ids=ids).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    try:
        loss.backward()
    except (RuntimeError, AssertionError) as refusal:  # flash-linear-attention's issue 640
        print(f"    no gradients: {refusal}")
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach(), loss.detach(), gradients


@torch.no_grad()
def generate(model: nn.Module, prompt: Tensor) -> Tensor:
    model.eval()
    if hasattr(model, "generation_config"):
        return model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False,
                              attention_mask=torch.ones_like(prompt))
    return model.generate(prompt, max_length=prompt.shape[1] + NEW_TOKENS)


def compare(make: Callable[[], nn.Module], dtype: torch.dtype) -> dict[str, float]:
    torch.manual_seed(0)
    theirs = make()
    for parameter in theirs.parameters():  # so that no weight stands at a one or a zero that hides a fault
        parameter.data.add_(torch.randn_like(parameter) * 0.1 * parameter.data.float().abs().mean().clamp(min=0.01))
    theirs = theirs.to("cuda", dtype)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        write(theirs, directory)
        names = find_layout(read_config(directory))[0].names
        ours = RecurrentLM.from_checkpoint(directory, device="cuda", trust_pickle=True)
        oracle = RecurrentLM.from_checkpoint(directory, device="cuda", dtype=torch.float32, trust_pickle=True)
    results = {"ours": run(ours, ids)}
    os.environ[BACKEND_VARIABLE] = "torch"
    results["oracle"] = run(oracle, ids)
    del os.environ[BACKEND_VARIABLE]
    try:
        results["theirs"] = run(theirs, ids)
    except (RuntimeError, AssertionError) as refusal:  # a library may refuse a dtype
        print(f"    not comparable: {refusal}")
    metrics: dict[str, float] = {}
    pairs_of_sides = (("ours", "theirs"), ("ours", "oracle"), ("theirs", "oracle"))
    for a, b in (sides for sides in pairs_of_sides if set(sides) <= set(results)):
        (logits, loss, gradients), (their_logits, their_loss, their_gradients) = results[a], results[b]
        metrics[f"logits, {a} vs {b}"] = error(logits, their_logits)
        metrics[f"loss, {a} vs {b}"] = abs(loss.item() / their_loss.item() - 1)
        pairs = [(gradients[x], their_gradients[y]) for x, y in _pairs(names, a, b, results) if y in their_gradients]
        if pairs:
            metrics[f"gradients, worst, {a} vs {b}"] = max(error(x, y) for x, y in pairs)
            metrics[f"gradients, {a} vs {b}"] = len(pairs)
    prompt = ids[:, :PROMPT]
    mine = generate(ours, prompt)[:, PROMPT:]
    if "theirs" in results:
        metrics["same tokens"] = (mine == generate(theirs, prompt)[:, PROMPT:]).float().mean().item()
    ours.cuda_graph = False
    metrics["graph as plain loop"] = (generate(ours, prompt)[:, PROMPT:] == mine).float().mean().item()
    return metrics


def _pairs(names, a: str, b: str, results: dict) -> list[tuple[str, str]]:
    """Names of the same parameter on both sides."""
    ours = [name for name in results["oracle"][2]]
    sides = {"ours": lambda name: name, "oracle": lambda name: name, "theirs": names.theirs}
    return [(sides[a](name), sides[b](name)) for name in ours if sides[a](name) in results[a][2]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--only", nargs="+", help="names of mixers")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this comparison needs a CUDA device")
    path = profile_path(ROOT / "outputs" / "results", "parity", arguments.profile)
    here, code = machine(), code_hash(CODE)
    for (name, library), make in CASES.items():
        if arguments.only and name not in arguments.only:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            start, metrics, reason = time.perf_counter(), {}, None
            try:
                metrics = compare(make, dtype)
            except Exception as failure:  # noqa: BLE001 - one architecture must not hide the others
                reason = f"{type(failure).__name__}: {failure}"[:500]
                if os.environ.get("PARITY_DEBUG"):
                    raise
            print(name, library, str(dtype), reason or json.dumps(
                {key: float(f"{value:.2e}") for key, value in metrics.items()}), flush=True)
            ResultStore(path).append(make_row(
                experiment="gpu_parity",
                config={"model": name, "library": library, "dtype": str(dtype).removeprefix("torch."),
                        "hidden_size": HIDDEN, "layers": LAYERS, "batch": BATCH, "length": LENGTH},
                seed=0, data={"source": "random", "revision": ""}, code=code, profile=arguments.profile,
                machine=here, metrics=metrics, runtime_s=time.perf_counter() - start,
                peak_memory_mb=torch.cuda.max_memory_allocated() / 2**20, error=reason,
            ))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
