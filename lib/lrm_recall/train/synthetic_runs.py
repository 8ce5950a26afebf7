"""What notebook 01 trains, and `lrm-recall sweep synthetic` with it: from the notebook's parameters to runs.

Both ask here, so that they ask for the same keys: what the one has stored the other does not train again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from lrm_recall.sweep import Experiment
from lrm_recall.tasks.mad import MADTask, benchmark
from lrm_recall.train import grid, mad, mad_grid, synthetic
from lrm_recall.train.mad import MADRun, run_mad
from lrm_recall.train.synthetic import MQARRun, run_mqar

GROUP = "synthetic"  # of the rows: outputs/results/synthetic.<profile>.jsonl
# Experiments of base models that differ from those of the figures, and are kept out of these by their names
EMBEDDING, EXAMPLES = "mqar-embedding", "mqar-examples"
BENCHMARKS = ("base", "all")  # of MAD: each task's base setting, or all that a MAD score is the mean of


class SyntheticRuns(NamedTuple):
    """The runs of notebook 01, by what they are for."""

    main: list[MQARRun]  # Figure 5 and Table 11
    ablation: list[MQARRun]  # what the paper leaves open: encoder, gate, normalised memory, crossed
    control: list[MQARRun]  # retrieval that cannot help: without weight in the output, or without the value in a chunk
    narrow: list[MQARRun]  # base models with other initial embeddings
    examples: list[MQARRun]  # base models with more examples
    mad: list[MADRun]  # Table 1


def synthetic_runs(parameters: Mapping[str, Any]) -> SyntheticRuns:
    """Every run that these parameters ask for.

    Args:
        parameters: the parameters of notebook 01 by name, others beside them or not. Without `mad_tasks` there are no
            runs of MAD.

    Raises:
        KeyError: a parameter is not there.
        ValueError: parameters of runs that cannot be.
    """
    _check(parameters)
    p, corner = parameters, ablated_corner(parameters)
    crossed = product(p["ablated_encoders"], p["ablated_gates"], p["ablated_memory_norms"])
    return SyntheticRuns(
        main=mqar_grid(p),
        ablation=[run for encoder, gate, memory_norm in crossed
                  for run in mqar_grid(p, **corner, encoder=encoder, gate=gate, memory_norm=memory_norm)],
        control=mqar_grid(p, **corner) + mqar_grid(p, **corner, alpha=1.0) + mqar_grid(p, **corner, chunk_size=1),
        narrow=mqar_grid(p, mixers=p["control_mixers"], lengths=p["lengths"][:1], variants=["base"],
                         embedding_range=p["control_embedding"]),
        examples=[run for examples, epochs in p["control_examples"] for run in mqar_grid(
            {**p, "num_train": examples, "max_epochs": epochs}, variants=["base"])],
        mad=mad_grid_of(p) if p.get("mad_tasks") else [],
    )


def _check(parameters: Mapping[str, Any]) -> None:
    """Refuse what no run looks at by itself: how runs are started, and lines of another length than they must have.

    Raises:
        ValueError: such a parameter; or more chunks to look into than the longest input has, which would train alike,
            only slower.
    """
    for name, least in (("workers", 1), ("budget", 0)):
        value = parameters.get(name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    lines = {"lengths": ["input length", "key-value pairs", "batch size"], "control_examples": ["examples", "epochs"]}
    for name, numbers in lines.items():
        for line in parameters[name]:
            if len(line) != len(numbers):
                raise ValueError(f"a line of {name} must be [{', '.join(numbers)}], got {line}")
    chunk_size, top_k = parameters["chunk_size"], parameters["top_k"]
    longest = max((line[0] for line in parameters["lengths"]), default=None)
    if longest is not None and chunk_size >= 1 and top_k > (most := max(1, longest // chunk_size)):
        raise ValueError(f"top_k must be at most {most}, the chunks of {chunk_size} in an input of {longest}, "
                         f"got {top_k}")


def synthetic_experiments(device: str) -> dict[str, Experiment]:
    """The experiments that the runs belong to, by name: "mqar", EMBEDDING, EXAMPLES and "mad"."""
    mqar = {"run": partial(run_mqar, device=device), "modules": synthetic.code_modules, "cost": grid.expected_seconds,
            "data": {"source": "lrm_recall.tasks.mqar", "revision": "generated"}}
    return {
        **{name: Experiment(name, **mqar) for name in ("mqar", EMBEDDING, EXAMPLES)},
        "mad": Experiment("mad", partial(run_mad, device=device), {"source": "lrm_recall.tasks.mad",
                          "revision": "generated"}, mad.code_modules, mad_grid.expected_seconds),
    }  # fmt: skip


def by_experiment(runs: SyntheticRuns) -> dict[str, list]:
    """The runs of each experiment."""
    return {"mqar": runs.main + runs.ablation + runs.control, EMBEDDING: runs.narrow, EXAMPLES: runs.examples,
            "mad": runs.mad}


def resona_options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The options of Resona that the parameters set for MQAR."""
    names = ("chunk_size", "top_k", "encoder", "gate", "alpha", "num_heads", "memory_norm")
    return {name: parameters[name] for name in names}


def ablated_corner(parameters: Mapping[str, Any]) -> dict[str, list]:
    """Where in the grid the ablation and the control stand: one mixer at the first length and width."""
    p = parameters
    return {"mixers": [p["ablated_mixer"]], "lengths": p["lengths"][:1], "d_models": p["d_models"][:1],
            "variants": ["base", *p["ablated_variants"]]}


def mqar_grid(
    parameters: Mapping[str, Any],
    *,
    mixers: list[str] | None = None,
    lengths: list[list[int]] | None = None,
    d_models: list[int] | None = None,
    variants: list[str] | None = None,
    embedding_range: float | None = None,
    **resona: Any,
) -> list[MQARRun]:
    """Every combination with every learning rate and seed.

    Args:
        parameters: of notebook 01.
        mixers, lengths, d_models, variants, embedding_range: in place of the parameters of these names.
        resona: in place of `resona_options`, such as alpha=1.0.
    """
    p = parameters
    mixers = p["mixers"] if mixers is None else mixers
    settings = {"num_train": p["num_train"], "num_valid": p["num_test"], "num_test": p["num_test"],
                "max_epochs": p["max_epochs"], "target_accuracy": p["target_accuracy"], "generator": "fast",
                "embedding_range": p["embedding_range"] if embedding_range is None else embedding_range,
                "precision": p["precision"]}
    return [run for length, pairs, batch_size in (p["lengths"] if lengths is None else lengths)
            for run in grid.mqar_runs(
                mixers=mixers,
                lengths={length: pairs},
                d_models=p["d_models"] if d_models is None else d_models,
                variants=p["variants"] if variants is None else variants,
                mixer_args={mixer: p["mixer_args"][mixer] for mixer in mixers if mixer in p["mixer_args"]},
                seeds=p["seeds"],
                learning_rates=p["learning_rates"],
                resona=resona_options(p) | resona,
                settings=settings | {"batch_size": batch_size},
            )]  # fmt: skip


def mad_grid_of(parameters: Mapping[str, Any]) -> list[MADRun]:
    """The runs of MAD that the parameters, whose names begin with mad_, ask for.

    Raises:
        ValueError: parameters of runs that cannot be.
    """
    p = {name.removeprefix("mad_"): value for name, value in parameters.items() if name.startswith("mad_")}
    settings = {"d_model": p["d_model"], "num_blocks": p["num_blocks"], "max_epochs": p["max_epochs"],
                "num_valid": p["num_test"], "target_accuracy": parameters["target_accuracy"]}
    if "precision" in parameters:
        settings["precision"] = parameters["precision"]
    tasks = _mad_tasks(p["tasks"], p["benchmark"], p["task_args"], p["num_test"])
    runs = mad_grid.mad_runs(
        mixers=p["mixers"],
        tasks=tasks,
        variants=p["variants"],
        learning_rates=p["learning_rates"],
        weight_decays=p["weight_decays"],
        seeds=p["seeds"],
        settings=settings,
    )
    return [run for run in runs if run.variant == "base" or run.mixer not in p["base_only"]]


def _mad_tasks(names: list[str], which: str, args: Mapping[str, Any], num_test: int) -> list[MADTask]:
    """The settings of the tasks, fuzzy recall's drawn by its fast generator: the same distribution in 1/50 the time."""
    if which not in BENCHMARKS:
        raise ValueError(f"mad_benchmark must be one of {', '.join(BENCHMARKS)}, got {which!r}")
    found = []
    for name in names:
        fast = {"generator": "fast"} if name == "fuzzy-in-context-recall" else {}
        settings = benchmark([name], num_test_examples=num_test, **args, **fast)
        found += settings if which == "all" else settings[:1]
    return found
