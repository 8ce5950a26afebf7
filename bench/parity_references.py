"""Our BaseConv, H3, Hyena and RWKV5 against zoology's and mad-lab's own layers with the same weights, on a CPU.

    git clone https://github.com/HazyResearch/zoology /tmp/zoology    # d88d6f5
    git clone https://github.com/athms/mad-lab /tmp/mad-lab           # 0f49a45
    pip install einops opt_einsum scipy                               # what they import
    python bench/parity_references.py --zoology /tmp/zoology --mad /tmp/mad-lab --profile laptop

Neither is a package, so single files are imported. mad-lab's RWKV5 is a CUDA kernel in bf16: here a loop plays the
kernel, forward only, and its rounding to bf16 is what the comparison shows. Rows go to
outputs/results/parity.<profile>.jsonl.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.utils.cpp_extension
import yaml
from torch import Tensor, nn

from lrm_recall.code_hash import code_hash
from lrm_recall.mixers.find import mixer_class
from lrm_recall.provenance import machine
from lrm_recall.results import ResultStore, make_row, profile_path

ROOT = Path(__file__).resolve().parents[1]
BATCH, LENGTH, HIDDEN = 4, 512, 128


def package(name: str, folder: Path) -> None:
    """Make a folder importable as a package without running its __init__, which imports everything."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def zoology(root: Path) -> dict[str, Callable[[], tuple[nn.Module, nn.Module, Callable]]]:
    sys.path.insert(0, str(root))
    package("zoology", root / "zoology")
    package("zoology.mixers", root / "zoology" / "mixers")

    def pair(file: str, cls: str, mixer: str, theirs: dict, ours: dict) -> Callable:
        def make() -> tuple[nn.Module, nn.Module, Callable]:
            layer = getattr(importlib.import_module(f"zoology.mixers.{file}"), cls)(HIDDEN, l_max=LENGTH, **theirs)
            return layer, mixer_class(mixer)(HIDDEN, **ours), lambda state: state
        return make

    long = {"kernel_size": -1, "max_length": LENGTH}
    return {
        "baseconv, 3 taps": pair("base_conv", "BaseConv", "baseconv", {"kernel_size": 3}, {"kernel_size": 3}),
        "baseconv, long": pair("base_conv", "BaseConv", "baseconv", {"kernel_size": -1}, long),
        "hyena": pair("hyena", "Hyena", "hyena", {}, {"l_max": LENGTH}),
        "h3, d_state 32, head_dim 2": pair("h3.h3", "H3", "h3", *[{"d_state": 32, "head_dim": 2}] * 2),
        "h3, d_state 64, head_dim 1": pair("h3.h3", "H3", "h3", *[{"d_state": 64, "head_dim": 1}] * 2),
    }


def mad(root: Path) -> dict[str, Callable[[], tuple[nn.Module, nn.Module, Callable]]]:
    layers = root / "mad" / "model" / "layers"
    package("mad", root / "mad")
    package("mad.model", root / "mad" / "model")
    package("mad.model.layers", layers)
    for part in ("featurization", "ops", "rwkv"):
        package(f"mad.model.layers.{part}", layers / part)

    def hyena() -> tuple[nn.Module, nn.Module, Callable]:
        options = yaml.safe_load((root / "configs" / "layers" / "hyena.yml").read_text())
        options |= {"dim": HIDDEN, "max_length": LENGTH}
        theirs = importlib.import_module("mad.model.layers.hyena").HyenaOperator(**options)
        ours = mixer_class("hyena")(HIDDEN, l_max=LENGTH, filter_order=4, inner_factor=4, proj_groups=4)
        return theirs, ours, lambda state: swap_gates(state, 4 * HIDDEN)

    def rwkv5() -> tuple[nn.Module, nn.Module, Callable]:
        real, torch.utils.cpp_extension.load = torch.utils.cpp_extension.load, lambda **_: LoopKernel
        try:
            module = importlib.import_module("mad.model.layers.rwkv.rwkv5")
            module.load = torch.utils.cpp_extension.load
            theirs = module.time_mixer_rwkv5_wrapped_bf16(dim=HIDDEN, dim_att=HIDDEN)
        finally:
            torch.utils.cpp_extension.load = real
        return theirs, mixer_class("rwkv5")(HIDDEN), lambda state: state

    return {"hyena": hyena, "rwkv5, their bf16 kernel as a loop": rwkv5}


class LoopKernel:
    """What mad-lab's CUDA kernel computes: o[t] = r[t] (S + u k[t] v[t]), S = w S + k[t] v[t]."""

    @staticmethod
    def forward(B: int, T: int, C: int, H: int, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, y: Tensor):
        r, k, v = (x.float().view(B, T, H, -1) for x in (r, k, v))
        state = r.new_zeros(B, H, C // H, C // H)
        for t in range(T):
            write = k[:, t, :, :, None] * v[:, t, :, None, :]  # [B, H, K, K]
            o = (r[:, t, :, :, None] * (state + u.float().view(1, H, -1, 1) * write)).sum(-2)
            state = w.view(1, H, -1, 1) * state + write
            y[:, t] = o.flatten(1)


def swap_gates(state: dict[str, Tensor], inner: int) -> dict[str, Tensor]:
    """mad-lab's Hyena as zoology's: its two gates change places, and its inner channels their order."""
    weight = state["in_proj.weight"]
    rows = (2 * inner - 1 - torch.arange(weight.shape[0])) % weight.shape[0]
    result = {"in_proj.weight": weight[rows], "in_proj.bias": state["in_proj.bias"][rows]}
    for name, x in state.items():
        if name.startswith("short_filter."):
            first, second, values = x.split(inner)
            result[name] = torch.cat((second.flip(0), first.flip(0), values.flip(0)))
        elif name.startswith("long_conv."):
            ours = name.replace("long_conv.filter.", "filter_fn.").replace("long_conv.", "filter_fn.")
            last = ours == "filter_fn.bias" or ours.endswith("implicit_filter.6.weight")
            result[ours] = x.flip(0) if last else x.flip(-1) if ours.endswith("deltas") else x
    return result | {"out_proj.weight": state["out_proj.weight"].flip(1), "out_proj.bias": state["out_proj.bias"]}


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def compare(make: Callable, gradients: bool) -> dict[str, float]:
    torch.manual_seed(0)
    theirs, ours, rename = make()
    ours.load_state_dict(rename(theirs.state_dict()))
    x = torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True)
    y, z = theirs(x), ours(x)
    metrics = {"output": error(z, y)}
    if gradients:
        weight = torch.randn_like(y)
        (metrics["gradient of x"],) = map(error, torch.autograd.grad(z, x, weight, retain_graph=True),
                                          torch.autograd.grad(y, x, weight, retain_graph=True))
        found = []
        for layer, result in ((ours, z), (theirs, y)):
            learned = [(name, p) for name, p in layer.named_parameters() if p.requires_grad]
            names, parameters = zip(*learned, strict=True)
            found.append(dict(zip(names, torch.autograd.grad(result, parameters, weight), strict=True)))
        mine, their = found[0], rename(found[1])
        metrics["worst gradient of a parameter"] = max(error(mine[name], their[name]) for name in mine)
    return metrics


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--zoology", type=Path, required=True, help="a clone of HazyResearch/zoology")
    parser.add_argument("--mad", type=Path, required=True, help="a clone of athms/mad-lab")
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    arguments = parser.parse_args()
    for clone, file in ((arguments.zoology, "zoology/mixers/hyena.py"), (arguments.mad, "mad/model/layers/hyena.py")):
        if not (clone / file).is_file():
            parser.error(f"{clone} is not a clone of it: there is no {file}")
    path = profile_path(ROOT / "outputs" / "results", "parity", arguments.profile)
    here, code = machine(), code_hash([f"lrm_recall.mixers.{name}" for name in ("baseconv", "hyena", "h3", "rwkv5")])
    for library, cases in (("zoology", zoology(arguments.zoology)), ("mad-lab", mad(arguments.mad))):
        for name, make in cases.items():
            start = time.perf_counter()
            metrics = compare(make, gradients="rwkv5" not in name)
            print(library, name, {key: f"{value:.1e}" for key, value in metrics.items()})
            ResultStore(path).append(make_row(
                experiment="cpu_parity", config={"model": name, "library": library, "dtype": "float32",
                                                 "batch": BATCH, "length": LENGTH, "hidden_size": HIDDEN},
                seed=0, data={"source": "random", "revision": ""}, code=code, profile=arguments.profile, machine=here,
                metrics=metrics, runtime_s=time.perf_counter() - start,
            ))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
