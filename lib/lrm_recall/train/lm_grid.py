"""From a set of parameters to the language-model runs of a sweep (Resona, Table 2), and what each will cost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from lrm_recall.data.prepared import Prepared
from lrm_recall.model import RecurrentLM
from lrm_recall.options import check_names, check_options, did_you_mean
from lrm_recall.sweep import Experiment
from lrm_recall.train.axes import check_axes, every_option
from lrm_recall.train.language_model import EXPERIMENT, LMRun, code_modules, run_lm
from lrm_recall.train.lm_checkpoints import forget_checkpoints

__all__ = ["GROUP", "Shape", "experiment", "expected_seconds", "forget_checkpoints", "lm_runs", "parameter_count",
           "read_runs", "usual_layers", "write_runs"]  # fmt: skip

GROUP = "language_model"  # of the store
VARIANTS = ("base", "sp", "resona")
_WIDTH_STEP = 8  # between the widths that size matching tries

# Seconds on one core (AMD EPYC with AVX-512): an operation of a product; what a layer adds, a token and channel; and
# what a Resona layer adds, a token and element of the chunks that it reads
_OPERATION_S = 1 / 130e9
_LAYER_S = {"retnet": 1.8e-7, "mamba": 2.1e-7, "hymba": 2.5e-7}
_OTHER_LAYER_S = 1.6e-7
_READ_S = 3.2e-9
_GPU_SPEED = 350  # cores that an H100 or H200 is worth at 25 million parameters, two runs sharing it


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of one backbone, as a parameter file gives it.

    Attributes:
        hidden_size, num_layers, mlp, intermediate_size, mixer_args: as in LMRun.
        matched_size: hidden size of the size-matched base model; None: the one whose number of parameters comes
            nearest to that of the model with Resona, the MLP wider in proportion.
        resona_mixer_args: options of the mixer that differ in the layers that retrieve; Hymba's attention goes there,
            whose mask the paper replaces by retrieval.
    """

    hidden_size: int
    num_layers: int
    mlp: Literal["swiglu", "none"] = "swiglu"
    intermediate_size: int | None = None
    mixer_args: dict[str, Any] = field(default_factory=dict)
    matched_size: int | None = None
    resona_mixer_args: dict[str, Any] = field(default_factory=dict)


def usual_layers(num_layers: int) -> list[int]:
    """Where Resona goes unless `layers` says so: in the first, the middle and the last layer (appendix A.4)."""
    return sorted({0, num_layers // 2, num_layers - 1})


def lm_runs(
    *,
    mixers: Sequence[str],
    shapes: Mapping[str, Mapping[str, Any]],
    variants: Sequence[str] = VARIANTS,
    seeds: Sequence[int] = (0,),
    resona: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any],
) -> list[LMRun]:
    """Every combination, as a list of runs.

    Args:
        mixers: names of mixers.
        shapes: by mixer, the fields of `Shape`.
        variants: "base"; "sp", the base made wider until it has as many parameters as the model with Resona, left out
            where the base is the nearest already (Hymba, whose attention Resona replaces); "resona".
        seeds: repetitions.
        resona: options of the Resona layers that differ from the defaults of `Resona`; `layers` too, if not the first,
            the middle and the last.
        settings: the fields of LMRun that all runs share: corpus, length, steps, batch_size, ...

    Raises:
        ValueError: an unknown name, variant or setting, an empty list, a mixer without a shape, or a run that cannot
            be.
    """
    check_axes({"mixers": mixers, "variants": variants, "seeds": seeds})
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(f"a variant is one of {', '.join(VARIANTS)}, got {variant!r}")
    ours = {*Shape.__dataclass_fields__, "mixer", "layer_overrides", "variant", "resona", "seed"}
    check_names("settings", settings, LMRun.__dataclass_fields__.keys() - ours)
    retrieval = every_option(resona)
    runs = []
    for mixer, variant in product(mixers, variants):
        if mixer not in shapes:
            raise ValueError(f"shapes has no {mixer!r}{did_you_mean(mixer, shapes)}; it has: {', '.join(shapes)}")
        check_options(Shape, dict(shapes[mixer]), f"shapes: {mixer}")
        run = _run(mixer, variant, Shape(**shapes[mixer]), retrieval, dict(settings))
        if run is not None:
            runs += [replace(run, seed=seed) for seed in seeds]
    return runs


def parameter_count(run: LMRun) -> int:
    """Parameters of a run's model, counted without making it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in RecurrentLM(run.to_model_config()).parameters())


def expected_seconds(run: LMRun, device: str = "cpu") -> float:
    """Roughly how long a run takes on one core, or on a GPU: the `cost` of a sweep's `Experiment`."""
    tokens = run.steps * run.batch_size * run.length
    mixing = _LAYER_S.get(run.mixer, _OTHER_LAYER_S) * run.hidden_size * run.num_layers
    reading = 0.0
    if run.resona is not None:
        elements = run.resona["chunk_size"] * run.resona["top_k"] * run.hidden_size
        reading = _READ_S * len(run.resona["layers"]) * elements
    seconds = tokens * (6 * parameter_count(run) * _OPERATION_S + mixing + reading)
    return seconds / (1 if device == "cpu" else _GPU_SPEED)


def experiment(prepared: Prepared, device: str = "cpu") -> Experiment:
    """What the runs on one corpus share: how they are done, and where their data come from."""
    return Experiment(
        EXPERIMENT, partial(run_lm, device=device), data=prepared.provenance(), modules=code_modules,
        cost=partial(expected_seconds, device=device),
    )  # fmt: skip


def write_runs(runs: Iterable[LMRun], path: Path) -> Path:
    """Write runs as JSON Lines, for `lrm_recall.train.lm_command`; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs), encoding="utf-8")
    return path


def read_runs(path: Path) -> list[LMRun]:
    """The runs of a file that `write_runs` wrote.

    Raises:
        ValueError: there is no such file, or a line that is no run.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            check_options(LMRun, values, "LMRun")
            runs.append(LMRun(**values))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return runs


def _run(
    mixer: str, variant: str, shape: Shape, retrieval: Mapping[str, Any], settings: dict[str, Any]
) -> LMRun | None:
    """One variant of one backbone, with the first seed; None for a size-matched one that is the base itself."""
    chunks = settings.pop("chunks", "search")
    base = LMRun(
        mixer=mixer, hidden_size=shape.hidden_size, num_layers=shape.num_layers, mlp=shape.mlp,
        intermediate_size=shape.intermediate_size, mixer_args=shape.mixer_args, **settings,
    )  # fmt: skip
    if variant == "base":
        return base
    layers = retrieval.get("layers") or usual_layers(shape.num_layers)
    overrides = {str(layer): shape.resona_mixer_args for layer in layers} if shape.resona_mixer_args else {}
    with_resona = replace(
        base, variant="resona", layer_overrides=overrides, resona={**retrieval, "layers": list(layers)}, chunks=chunks
    )
    if variant == "resona":
        return with_resona
    matched = _matched(base, with_resona, shape.matched_size)
    return None if matched.hidden_size == base.hidden_size else matched


def _matched(base: LMRun, with_resona: LMRun, width: int | None) -> LMRun:
    """The base run at that width, or made wider, MLP in proportion, until it has the parameters of the other."""
    if width is not None:
        return replace(base, variant="sp", hidden_size=width)
    inner = base.to_model_config().intermediate_size

    def wider(width: int) -> LMRun:
        in_proportion = round(inner * width / base.hidden_size / _WIDTH_STEP) * _WIDTH_STEP
        return replace(base, variant="sp", hidden_size=width, intermediate_size=in_proportion)

    target = parameter_count(with_resona)
    best, width = replace(base, variant="sp"), base.hidden_size
    while parameter_count(best) < target:
        width += _WIDTH_STEP
        try:
            candidate = wider(width)
        except ValueError:  # a width that the heads do not divide
            continue
        if abs(parameter_count(candidate) - target) > abs(parameter_count(best) - target):
            break
        best = candidate
    return best
