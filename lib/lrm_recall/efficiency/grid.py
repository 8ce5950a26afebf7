"""From a set of parameters to the measurements of notebook 05, model by model, so that each is built once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lrm_recall.efficiency.run import CPU, EfficiencyRun
from lrm_recall.provenance import core_count, cpu_name

_MODEL_FIELDS = ("num_layers", "mlp", "mixer_args")


def this_device(device: str) -> str:
    """What the name of a device stands for here: "NVIDIA H100 80GB HBM3", or "CPU: AMD EPYC 9B14, 2 threads"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{CPU}{cpu_name()}, {min(core_count(), torch.get_num_threads())} threads"


def shallowest_middle_deepest(num_layers: int) -> list[int]:
    """The layers that retrieve in the paper's efficiency models, counted from 0."""
    return sorted({0, num_layers // 2, num_layers - 1})


def retrieval_runs(
    tasks: Mapping[str, Sequence[int]], *, models: Mapping[str, Mapping[str, Any]], resona: Mapping[str, Any],
    shape: Mapping[str, Any], without: Sequence[str] = (),
) -> list[EfficiencyRun]:  # fmt: skip
    """Every model, alone and with Resona at its shallowest, middle and deepest layer, at every length of every task.

    Args:
        tasks: "prefill", "decode" or "train" to lengths.
        models: mixer to its num_layers, mlp and mixer_args.
        resona: options of the Resona layers.
        shape: the other fields of EfficiencyRun, the same for all.
        without: mixers that are measured alone.

    Raises:
        ValueError: an unknown name, or a measurement that cannot be.
    """
    runs = []
    for mixer, model in models.items():
        fields = {"mixer": mixer, **_model_fields(mixer, model), **shape}
        layers = {"layers": shallowest_middle_deepest(fields["num_layers"])}
        for options in [None] if mixer in without else [None, {**layers, **resona}]:
            runs += [EfficiencyRun(task=task, length=length, resona=options, **fields)
                     for task, lengths in tasks.items() for length in lengths]
    return runs


def state_runs(
    tasks: Mapping[str, Sequence[int]], *, models: Mapping[str, Mapping[str, Any]], expanded: Sequence[int],
    shape: Mapping[str, Any],
) -> list[EfficiencyRun]:  # fmt: skip
    """Every model as it is and with a larger state (StateX) in some and in all of its layers.

    Args:
        tasks, models, shape: as for `retrieval_runs`; models "gla" or "mamba2".
        expanded: numbers of layers to expand; the unchanged model and all layers come by themselves.
    """
    runs = []
    for mixer, model in models.items():
        fields = {"mixer": mixer, **_model_fields(mixer, model), **shape}
        for layers in sorted({0, *expanded, fields["num_layers"]}):
            runs += [EfficiencyRun(task=task, length=length, expanded_layers=layers, **fields)
                     for task, lengths in tasks.items() for length in lengths]
    return runs


def _model_fields(mixer: str, model: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := set(model) - set(_MODEL_FIELDS):
        raise ValueError(f"model {mixer!r} has an unknown field {sorted(unknown)[0]!r}; allowed: "
                         f"{', '.join(_MODEL_FIELDS)}")
    if "num_layers" not in model:
        raise ValueError(f"model {mixer!r} needs num_layers")
    return dict(model)
