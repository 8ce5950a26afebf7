"""The trainers that bench/gpu_synthetic.py compares ours with, each training its own model on our examples.

zoology is as published but for three things: logits are asked of its model, which otherwise returns hidden states to
its own trainer; autograd's anomaly detection, which its Mamba2 leaves switched on, is off; nothing is logged.

mad-lab is as its train.py has it (bf16 autocast, data loaders without workers, its PyTorch Lightning module, which
works out its metrics at every step), but for the data, which are ours, and for these: no logger, progress bar, summary
or checkpoints, and no end at an accuracy of 0.999. Layers that need something that this machine lacks are left out: see
`lacks`. The kernel of causal_conv1d takes other arguments today than when mad-lab was written; that package's own
functions with the old ones stand in.

Neither is a package, so `import_zoology` and `import_mad` come first.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import shutil
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.cpp_extension import CUDA_HOME

from lrm_recall.tasks.mad import mad_data
from lrm_recall.tasks.mqar import mqar, split_seed
from lrm_recall.train.mad import MADRun
from lrm_recall.train.synthetic import MQARRun

ZOOLOGY = {  # mixer: its class, and the block that it stands in
    "baseconv": ("base_conv.BaseConv", "TransformerBlock"),
    "mamba2": ("mamba2.Mamba2", "Mamba2Block"),
    "attention": ("attention.MHA", "TransformerBlock"),
}
MAD_LAB = {  # mixer: its layer, and what that one needs beside torch
    "hyena": ("hyena", ()),
    "rwkv5": ("rwkv5-time-mixer", ("nvcc", "ninja")),
    "mamba": ("mamba", ("selective_scan_cuda", "causal_conv1d")),
    "attention": ("mh-attention", ("flash_attn",)),
}


class Seconds(NamedTuple):
    """What was measured: training on every example once, and scoring the test set."""

    epoch: float
    score: float


def now() -> float:
    """Seconds on a clock that is read when the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(epoch: Callable[[], Any], score: Callable[[], Any], epochs: int) -> Seconds:
    """Medians of some epochs, each followed by scoring; the first, to warm up, is not among them."""
    times = []
    for _ in range(1 + epochs):
        start = now()
        epoch()
        middle = now()
        score()
        times.append((middle - start, now() - middle))
    return medians(times)


def medians(times: list[tuple[float, float]]) -> Seconds:
    """Of all but the first pair."""
    return Seconds(*(statistics.median(column) for column in zip(*times[1:], strict=True)))


def import_zoology(path: Path) -> None:
    """Make `zoology` importable without the packages that only its logging and its unused options need."""
    sys.path.insert(0, str(path))
    wandb, torchvision, ops = (types.ModuleType(name) for name in ("wandb", "torchvision", "torchvision.ops"))
    ops.StochasticDepth = lambda p, mode: nn.Identity()  # drop_path is 0
    torchvision.ops = ops
    for module in (wandb, torchvision, ops):
        sys.modules.setdefault(module.__name__, module)
    torch.autograd.set_detect_anomaly = lambda mode: contextlib.nullcontext()


def zoology(run: MQARRun, epochs: int) -> Seconds:
    """zoology's Trainer."""
    from zoology.config import ModelConfig
    from zoology.data.utils import DataSegment, _SyntheticDataset
    from zoology.model import LanguageModel
    from zoology.train import Trainer

    name, block = ZOOLOGY[run.mixer]
    length = run.input_length
    options = {"baseconv": {"l_max": length, "kernel_size": [3, -1, 3, -1]},
               "attention": {"dropout": 0.1, "num_heads": 1}}.get(run.mixer, {})  # fmt: skip
    model = LanguageModel(ModelConfig(
        d_model=run.d_model, n_layers=run.num_layers, block_type=block, vocab_size=run.vocab_size,
        max_position_embeddings=length if run.mixer == "attention" else 0,
        sequence_mixer={"name": f"zoology.mixers.{name}", "kwargs": options},
        state_mixer={"name": "torch.nn.Identity", "kwargs": {}},
    ))  # fmt: skip
    model.forward = functools.partial(model.forward, return_embeddings=False)
    loaders = {}
    for split, size in (("train", run.num_train), ("test", run.num_test)):
        data = mqar(vocab_size=run.vocab_size, num_examples=size, input_length=length, num_kv_pairs=run.num_kv_pairs,
                    generator=run.generator, seed=split_seed(run.seed, split))  # fmt: skip
        segment = DataSegment(data.inputs, data.labels, slices={})
        loaders[split] = torch.utils.data.DataLoader(_SyntheticDataset([segment], run.batch_size), batch_size=None)
    silent = types.SimpleNamespace(log=lambda metrics: None)
    device, rate = torch.device("cuda"), run.learning_rate
    trainer = Trainer(model, loaders["train"], loaders["test"], device=device, logger=silent, learning_rate=rate)
    model.to(device)  # what its `fit` does before the first epoch
    trainer.loss_fn = nn.CrossEntropyLoss()
    trainer.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=run.weight_decay)
    return timed(lambda: trainer.train_epoch(0), lambda: trainer.test(0), epochs)


def import_mad(path: Path) -> None:
    """Make `mad` importable."""
    sys.path.insert(0, str(path))
    os.environ["TUNE_ORIG_WORKING_DIR"] = str(path)  # where it looks for its configs and for RWKV5's kernel


def lacks(mixer: str) -> list[str]:
    """What mad-lab's layer needs and this machine does not have."""
    return [name for name in MAD_LAB[mixer][1] if not (_command(name) or _importable(name))]


def mad_lab(run: MADRun, epochs: int) -> Seconds:
    """mad-lab's PLModelWrap and PyTorch Lightning's Trainer."""
    if missing := lacks(run.mixer):
        raise RuntimeError(f"mad-lab's {MAD_LAB[run.mixer][0]} needs {', '.join(missing)}")
    import pytorch_lightning as pl
    from pytorch_lightning.plugins.environments import LightningEnvironment
    from torch.utils.data import DataLoader

    with flash_attn():
        from mad.configs import MADConfig, MADModelConfig
        from mad.data.dataset import MemoryDataset
        from mad.model import PLModelWrap
    if run.mixer == "mamba":
        adapt_causal_conv1d()
    config = MADConfig(task=run.task.task, vocab_size=run.task.vocab_size, seq_len=run.task.seq_len,
                       batch_size=run.batch_size, lr=run.learning_rate, weight_decay=run.weight_decay)  # fmt: skip
    layers = [MAD_LAB[run.mixer][0], "swiglu"] * run.num_blocks
    model = MADModelConfig(layers=layers, dim=run.d_model, vocab_size=config.vocab_size).build_model_from_registry()
    loaders = {}
    for split, data in mad_data(run.task, run.seed)._asdict().items():
        dataset = MemoryDataset(config.instance_fn, {}, verbose=False)
        dataset.inputs, dataset.targets = data.inputs.numpy(), data.targets.numpy()
        loaders[split] = DataLoader(dataset, config.batch_size, shuffle=split == "train",
                                    num_workers=config.num_data_workers)  # fmt: skip

    marks: list[list[float]] = []  # of every epoch: it begins, its training is done, its scoring is done

    class Clock(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            marks.append([now()])

        def on_validation_start(self, trainer: Any, module: Any) -> None:
            if not trainer.sanity_checking:
                marks[-1].append(now())

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            if not trainer.sanity_checking:
                marks[-1].append(now())

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as its train.py
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that loaders have no workers and bf16 is an old name
            pl.Trainer(
                max_epochs=1 + epochs, accelerator=config.accelerator if torch.cuda.is_available() else "cpu",
                devices=config.devices, precision=config.precision, callbacks=[Clock()], logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                plugins=[LightningEnvironment()],  # one process, whatever MPI is installed
            ).fit(PLModelWrap(model=model, mad_config=config), loaders["train"], loaders["test"])  # fmt: skip
    finally:
        torch.set_float32_matmul_precision(precision)
    return medians([(middle - start, end - middle) for start, middle, end in marks])


@contextlib.contextmanager
def flash_attn() -> Iterator[None]:
    """A name to import where it is not installed: mad-lab's attention derives from a class of it."""
    if _importable("flash_attn"):
        yield
        return
    names = ("flash_attn", "flash_attn.modules", "flash_attn.modules.mha")
    sys.modules.update({name: types.ModuleType(name) for name in names})
    sys.modules[names[-1]].MHA = nn.Module  # no layer is made of it: see `lacks`
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def adapt_causal_conv1d() -> None:
    """Give mad-lab's Mamba the functions of causal_conv1d that take the arguments its kernels once took."""
    from causal_conv1d import cpp_functions

    scan = importlib.import_module("mad.model.layers.ops.mamba_ssm.selective_scan_interface")
    scan.causal_conv1d_cuda = types.SimpleNamespace(
        causal_conv1d_fwd=cpp_functions.causal_conv1d_fwd_function,
        causal_conv1d_bwd=cpp_functions.causal_conv1d_bwd_function,
    )


def _command(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=Path(CUDA_HOME or "", "bin"))


def _importable(name: str) -> bool:
    return find_spec(name) is not None
