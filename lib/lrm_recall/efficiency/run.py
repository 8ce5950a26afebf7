"""One measurement of a model's cost: what it is, and taking it (Resona, Tables 5 to 7; StateX, section 3.3).

A measurement is a frozen `EfficiencyRun`; `measure(run)` builds the model with random weights, which cost what trained
ones do, and returns plain numbers. The machine's device is part of the run: a stored time of another one is no answer.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from lrm_recall.config import RecurrentLMConfig
from lrm_recall.efficiency.cold_start import cold_start
from lrm_recall.efficiency.timing import copy_bandwidth, decode, prefill, timed, train_step
from lrm_recall.model import RecurrentLM
from lrm_recall.options import check_options
from lrm_recall.statex.surgery import expand_state
from lrm_recall.train.memory import peak_mb, reset_peak

CPU = "CPU: "  # how the name of a device begins that is none
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class EfficiencyRun:
    """What is measured; plain JSON through `dataclasses.asdict`.

    Raises:
        ValueError: wrong names and types, sizes below one, whatever the model's own configuration refuses.
    """

    task: Literal["prefill", "decode", "train", "cold start"]
    device_name: str  # what it runs on, see `grid.this_device`
    # the model
    mixer: str
    mixer_args: dict[str, Any] = field(default_factory=dict)
    hidden_size: int
    num_layers: int
    mlp: Literal["none", "swiglu"] = "swiglu"
    vocab_size: int = 32_000
    resona: dict[str, Any] | None = None  # {"layers": [0], "chunk_size": 64, ...}
    expanded_layers: int = 0  # StateX: layers with a larger state
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # the measurement
    length: int  # tokens of the prompt, or of the training sequence
    new_tokens: int = 128  # decoded after the prompt
    checkpointing: bool = False  # training: activations of a layer are computed again in its backward
    repeats: int = 5  # timed runs; the median counts
    seed: int = 0  # of weights and tokens

    def __post_init__(self) -> None:
        check_options(type(self), asdict(self), "EfficiencyRun")
        for name in ("length", "new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.expanded_layers <= self.num_layers:
            raise ValueError(f"expanded_layers must lie in 0 to {self.num_layers}, got {self.expanded_layers}")
        self.to_model_config()

    @property
    def variant(self) -> str:
        """"base", "resona" or "expanded"."""
        return "resona" if self.resona else "expanded" if self.expanded_layers else "base"

    def to_model_config(self) -> RecurrentLMConfig:
        """The model before its state is expanded."""
        return RecurrentLMConfig(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, num_hidden_layers=self.num_layers,
            mixer=self.mixer, mixer_args=self.mixer_args, mlp=self.mlp, resona=self.resona,
        )  # fmt: skip


def measure(run: EfficiencyRun, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Take one measurement.

    Returns:
        metrics: ms (median of the repeats), ms_least, ms_most; tokens_per_s (of the prompt, of the new tokens, of the
            training sequence); peak_mb (weights included; on a CPU the whole process, see `train.memory`); parameters;
            state_size (elements that one sequence of the length carries). Decoding on a GPU also has floor_ms: every
            weight and the state read once for each token, at the bandwidth of a large copy; of attention the keys and
            values of all tokens so far.
            Of a cold start: seconds of the first forward and backward in a fresh process, see `cold_start`.
        peak_memory_mb: as peak_mb.
    """
    device = torch.device(device)
    if run.task == "cold start":
        return {"metrics": cold_start(run.to_model_config().to_dict(), run.length, run.dtype, device)}
    model = _model(run, device)
    generator = torch.Generator(device).manual_seed(run.seed)
    ids = torch.randint(run.vocab_size, (1, run.length), device=device, generator=generator)  # [1, T]
    work = {"prefill": prefill, "decode": decode, "train": train_step}[run.task]
    arguments = (model, ids, run.new_tokens) if run.task == "decode" else (model, ids)
    model.train(run.task == "train")
    reset_peak(device)
    seconds = timed(lambda: work(*arguments), device, run.repeats)
    ms = 1e3 * statistics.median(seconds)
    tokens = run.new_tokens if run.task == "decode" else run.length
    metrics = {
        "ms": ms, "ms_least": 1e3 * min(seconds), "ms_most": 1e3 * max(seconds), "tokens_per_s": 1e3 * tokens / ms,
        "peak_mb": peak_mb(device), "parameters": sum(p.numel() for p in model.parameters()),
        "state_size": model.state_size(run.length),
    }  # fmt: skip
    if run.task == "decode" and device.type == "cuda":
        read = sum(p.numel() * p.element_size() for p in model.parameters()) + _state_bytes(run, model)
        metrics["floor_ms"] = 1e3 * run.new_tokens * read / copy_bandwidth(device)
    return {"metrics": metrics, "peak_memory_mb": metrics["peak_mb"]}


def code_modules(run: EfficiencyRun) -> list[str]:
    """Modules whose code decides what a measurement gives: the argument of `code_hash`."""
    modules = ["lrm_recall.efficiency.run", f"lrm_recall.mixers.{run.mixer}", "-lrm_recall.checkpoints"]
    if run.resona:
        modules.append("lrm_recall.resona.layer")
    if not run.device_name.startswith(CPU):
        modules += [f"lrm_recall.ops.libraries.{name}" for name in ("own", "fla", "mamba_ssm", "causal_conv1d")]
    return modules


def _state_bytes(run: EfficiencyRun, model: RecurrentLM) -> int:
    """Bytes of state that a new token reads, in the mean: recurrences keep theirs in float32, attention its keys and
    values as the model is, and of a growing number of tokens."""
    element_size = _DTYPES[run.dtype].itemsize if run.mixer == "attention" else 4
    return element_size * model.state_size(run.length + run.new_tokens // 2)


def _model(run: EfficiencyRun, device: torch.device) -> RecurrentLM:
    """The model of a run; the one before it is kept as long as runs ask for the same."""
    asked = (run.to_model_config().to_json_string(), run.expanded_layers, run.dtype, run.checkpointing, run.seed,
             str(device))
    if asked not in _built:
        _built.clear()  # before another is made, for its memory
        gc.collect()
        if device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()  # up to 1 GB, which would count as the next model's
            torch.cuda.empty_cache()
        _built[asked] = _build(run, device)
    return _built[asked]


_built: dict[tuple, RecurrentLM] = {}


def _build(run: EfficiencyRun, device: torch.device) -> RecurrentLM:
    before = torch.get_default_dtype()
    torch.manual_seed(run.seed)
    try:
        torch.set_default_dtype(_DTYPES[run.dtype])
        with device:
            model = RecurrentLM(run.to_model_config())
            if run.expanded_layers:
                model = expand_state(model, run.expanded_layers)
    finally:
        torch.set_default_dtype(before)
    if run.checkpointing:
        model.gradient_checkpointing_enable()
    return model
