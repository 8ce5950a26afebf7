"""From a set of parameters to the MQAR runs of a sweep (Resona, Figure 5 and Table 11), and what each will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from lrm_recall.options import check_names
from lrm_recall.train.axes import check_axes, every_option, resona_layers
from lrm_recall.train.synthetic import MQARRun
from lrm_recall.train.trials import at, check_trials

# zoology's sweep for its Figure 2, np.logspace(-4, -2, 4), to three digits
LEARNING_RATES = (1e-4, 4.64e-4, 2.15e-3, 1e-2)

PAPER_RESONA = {"chunk_size": 2, "top_k": 1}  # appendix A.3, for MQAR

# Microseconds on one core (AMD EPYC with AVX-512, V = 8192), forward and backward, at hidden size 64
_LAYER_US = {"baseconv": 1.7, "attention": 3.2, "gla": 3.9, "mamba2": 9.3}  # of one layer, a token
_OTHER_LAYER_US = 4.0
_RETRIEVAL_US = 4.0  # of one Resona layer, a token
_ANSWER_US = 50.0  # of the output layer and its loss, a question


def mqar_runs(
    *,
    mixers: Sequence[str],
    lengths: Mapping[int, int],
    d_models: Sequence[int],
    variants: Sequence[str] = ("base", "resona0", "resona2"),
    learning_rates: Sequence[float] = LEARNING_RATES,
    seeds: Sequence[int] = (0,),
    resona: Mapping[str, Any] | None = None,
    mixer_args: Mapping[str, Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[MQARRun]:
    """Every combination, as a list of runs.

    Args:
        mixers: names of mixers. As in zoology's Figure 2, `baseconv` has 3 taps in even layers and as many as the
            sequence in odd ones, `hyena` filters of the sequence's length, `h3` as many states and heads of 2
            channels, and `rwkv4` initial decays by layer. `gated_deltanet` gets the heads of a DeltaNet with two.
        lengths: input length to number of key-value pairs, such as {64: 4, 128: 8}.
        d_models: hidden sizes.
        variants: "base", or "resona" and the layers that retrieve: "resona0", "resona2", "resona0+2".
        learning_rates: swept; `lrm_recall.train.select` chooses.
        seeds: repetitions.
        resona: options of the Resona layers that differ from `PAPER_RESONA` and the defaults of `Resona`.
        mixer_args: options by mixer, for those that need other values than their defaults.
        settings: any other field of MQARRun, the same for all runs, such as {"max_epochs": 8}.

    Raises:
        ValueError: an unknown name or variant, an empty list, or a run that cannot be.
    """
    axes = {"mixers": mixers, "lengths": lengths, "d_models": d_models, "variants": variants,
            "learning_rates": learning_rates, "seeds": seeds}
    check_axes(axes)
    retrieval = every_option(PAPER_RESONA, resona)
    options, settings = dict(mixer_args or {}), dict(settings or {})
    check_names("mixer_args", options, mixers)
    swept = {"mixer", "input_length", "num_kv_pairs", "d_model", "resona", "learning_rate", "seed", "mixer_args",
             "layer_overrides"}
    check_names("settings", settings, MQARRun.__dataclass_fields__.keys() - swept)
    num_layers = settings.get("num_layers", MQARRun.num_layers)
    if not isinstance(num_layers, int):
        raise ValueError(f"num_layers must be an integer, got {num_layers!r}")
    trials = [{"learning_rate": rate, "seed": seed} for rate, seed in product(learning_rates, seeds)]
    runs = []
    for mixer, (length, pairs), d_model, variant in product(mixers, lengths.items(), d_models, variants):
        layers = resona_layers(variant)
        cell = MQARRun(
            mixer=mixer,
            d_model=d_model,
            input_length=length,
            num_kv_pairs=pairs,
            resona=None if layers is None else {"layers": layers, **retrieval},
            **trials[0],
            **_mixer_fields(mixer, dict(options.get(mixer, {})), length, d_model, num_layers),
            **settings,
        )
        if not runs:
            check_trials(cell, trials)
        runs += [at(cell, trial) for trial in trials]
    return runs


def expected_seconds(run: MQARRun) -> float:
    """Roughly how long a run takes on one core if it never stops early: the `cost` of a sweep's `Experiment`.

    At these sizes reading and writing takes as long as arithmetic, so the time grows with D + 32 rather than D^2.
    """
    layers = run.num_layers * _LAYER_US.get(run.mixer, _OTHER_LAYER_US)
    retrieval = 0.0 if run.resona is None else len(run.resona["layers"]) * _RETRIEVAL_US
    token_us = (layers + retrieval) * (run.d_model + 32) / 96
    question_us = _ANSWER_US * (run.d_model + 50) / 114 * run.vocab_size / 8192
    example_us = run.input_length * token_us + run.num_kv_pairs * question_us
    return 1e-6 * run.max_epochs * run.num_train * example_us


def _mixer_fields(
    mixer: str, options: dict[str, Any], input_length: int, d_model: int, num_layers: int
) -> dict[str, Any]:
    """mixer_args and layer_overrides of a run: what depends on its sizes or on the layer, then the given options."""
    sized: dict[str, Any] = {
        "baseconv": {"max_length": input_length},
        "hyena": {"l_max": input_length},
        "h3": {"d_state": input_length, "head_dim": 2},
        "gated_deltanet": {"num_heads": 2, "head_dim": d_model // 2, "expand_v": 1.0},
    }.get(mixer, {})
    by_layer: dict[str, Any] = {}
    if mixer == "baseconv":
        by_layer = {str(layer): {"kernel_size": 3 if layer % 2 == 0 else -1} for layer in range(num_layers)}
    elif mixer == "rwkv4":
        by_layer = {str(layer): {"layer_idx": layer} for layer in range(num_layers)}
    return {"mixer_args": {**sized, **options}, "layer_overrides": by_layer}
