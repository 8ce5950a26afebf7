"""From a set of parameters to the MAD runs of a sweep (Resona, Table 1), and what each will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from lrm_recall.options import check_names
from lrm_recall.tasks.mad import LEARNING_RATES, WEIGHT_DECAYS, MADTask
from lrm_recall.train.axes import check_axes, every_option, resona_layers
from lrm_recall.train.mad import MADRun
from lrm_recall.train.trials import at, check_trials

PAPER_RESONA = {"chunk_size": 6, "top_k": 1}  # appendix A.3, for MAD

# mad-lab's layers (configs/layers/*.yml). It has no Mamba2: that one keeps the defaults of transformers and mamba_ssm.
MIXER_ARGS: dict[str, dict[str, Any]] = {
    "attention": {"num_heads": 16},
    "mamba": {"state_size": 4},
    "rwkv5": {"head_dim": 16},
    "hyena": {"filter_order": 4, "inner_factor": 4, "proj_groups": 4},
}

# Microseconds on one core (AMD EPYC with AVX-512), forward and backward, at hidden size 128
_BLOCK_US = {"attention": 25.0, "mamba": 25.0, "mamba2": 32.0, "rwkv5": 21.0, "hyena": 55.0}  # of one block, a token
_OTHER_BLOCK_US = 30.0
_RETRIEVAL_US = 12.0  # of one Resona layer, a token
_ANSWER_US = 1.0  # of the output layer and its loss, a question, for every 16 tokens of the vocabulary


def mad_runs(
    *,
    mixers: Sequence[str],
    tasks: Sequence[MADTask],
    variants: Sequence[str] = ("base", "resona1"),
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    seeds: Sequence[int] = (12345,),
    resona: Mapping[str, Any] | None = None,
    mixer_args: Mapping[str, Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[MADRun]:
    """Every combination, as a list of runs.

    Args:
        mixers: names of mixers, in mad-lab's shapes (`MIXER_ARGS`).
        tasks: settings of tasks, as `lrm_recall.tasks.mad.benchmark` lists them.
        variants: "base", or "resona" and the blocks that retrieve, counted from 0: "resona1", "resona0+1".
        learning_rates, weight_decays: swept together; the best pair in validation counts.
        seeds: repetitions; mad-lab's one is 12345.
        resona: options of the Resona layers that differ from `PAPER_RESONA` and the defaults of `Resona`.
        mixer_args: options by mixer, over those of `MIXER_ARGS`.
        settings: any other field of MADRun, the same for all runs, such as {"max_epochs": 20}.

    Raises:
        ValueError: an unknown name or variant, an empty list, or a run that cannot be.
    """
    axes = {"mixers": mixers, "tasks": tasks, "variants": variants, "learning_rates": learning_rates,
            "weight_decays": weight_decays, "seeds": seeds}
    check_axes(axes)
    retrieval = every_option(PAPER_RESONA, resona)
    options, settings = dict(mixer_args or {}), dict(settings or {})
    check_names("mixer_args", options, mixers)
    swept = {"mixer", "task", "resona", "learning_rate", "weight_decay", "seed", "mixer_args"}
    check_names("settings", settings, MADRun.__dataclass_fields__.keys() - swept)
    trials = [{"learning_rate": rate, "weight_decay": decay, "seed": seed}
              for rate, decay, seed in product(learning_rates, weight_decays, seeds)]  # fmt: skip
    runs = []
    for mixer, task, variant in product(mixers, tasks, variants):
        layers = resona_layers(variant)
        cell = MADRun(
            mixer=mixer,
            mixer_args={**MIXER_ARGS.get(mixer, {}), **_length(mixer, task), **options.get(mixer, {})},
            task=task,
            resona=None if layers is None else {"layers": layers, **retrieval},
            **trials[0],
            **settings,
        )
        if not runs:
            check_trials(cell, trials)
        runs += [at(cell, trial) for trial in trials]
    return runs


def expected_seconds(run: MADRun) -> float:
    """Roughly how long a run takes on one core if it never stops early: the `cost` of a sweep's `Experiment`."""
    task, width = run.task, (run.d_model + 32) / 160
    blocks = run.num_blocks * _BLOCK_US.get(run.mixer, _OTHER_BLOCK_US)
    retrieval = 0.0 if run.resona is None else len(run.resona["layers"]) * _RETRIEVAL_US
    questions = task.input_length  # at most: recall asks at every position in training
    example_us = width * (task.input_length * (blocks + retrieval) + questions * _ANSWER_US * task.vocab_size / 16)
    return 1e-6 * run.max_epochs * task.num_train_examples * example_us


def _length(mixer: str, task: MADTask) -> dict[str, int]:
    """The option of a mixer that must be told the input length."""
    name = {"hyena": "l_max", "baseconv": "max_length"}.get(mixer)
    return {} if name is None else {name: task.input_length}
