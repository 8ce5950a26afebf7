"""What each field of another library's config.json becomes here.

A layout lists every field that its config.json may have, each once, with one rule:

    Maps     it becomes a field of RecurrentLMConfig, an option of the mixer, or both
    Only     it changes what the model computes, and only these values are supported
    Equals   it repeats what other fields say
    Ignored  it changes nothing that is computed from given weights: initialisation, kernels, training, bookkeeping

Anything else in a config.json is refused: a field that nobody looked at may be the one that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lrm_recall.options import did_you_mean

REQUIRED = object()  # the default of a field that every config.json of the layout has


@dataclass(frozen=True)
class Maps:
    """A field with a counterpart here.

    Attributes:
        default: what its own library takes when config.json does not have it.
        field, option: its counterparts in RecurrentLMConfig and in the mixer.
        convert: from its value and the values of all fields to ours; the value itself when None.
        revert: from our value to its value; the value itself when None.
    """

    default: Any
    field: str | None = None
    option: str | None = None
    convert: Callable[[Any, Mapping[str, Any]], Any] | None = None
    revert: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Only:
    """A field that must have one of the allowed values; the first one is also what an absent field means."""

    allowed: tuple[Any, ...]

    @property
    def default(self) -> Any:
        return self.allowed[0]


@dataclass(frozen=True)
class Equals:
    """A field that must be absent, null, or what `compute` makes of the others; `formula` tells the reader."""

    formula: str
    compute: Callable[[Mapping[str, Any]], Any]
    default: Any = None


@dataclass(frozen=True)
class Ignored:
    """A field that does not change what is computed from given weights; a default only where another rule reads it."""

    default: Any = None


Rule = Maps | Only | Equals | Ignored
Rules = Mapping[str, Rule]

# the rank of Mamba's time step: "auto", a sixteenth of hidden_size, is None here
TIME_STEP_RANK = Maps(
    "auto",
    option="time_step_rank",
    convert=lambda rank, source: None if rank == "auto" else rank,
    revert=lambda rank: "auto" if rank is None else rank,
)


def read_fields(source: Mapping[str, Any], rules: Rules, title: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of RecurrentLMConfig and the mixer's options that a config.json stands for.

    Args:
        source: the decoded config.json.
        rules: those of its layout.
        title: how errors call the layout.

    Raises:
        ValueError: a field that the layout does not have, a missing one, or a value that is not supported.
    """
    for name in source:
        if name not in rules and name not in _BOOKKEEPING:
            raise ValueError(f"config.json has the field {name!r}, which {title} does not have"
                             f"{did_you_mean(name, rules)}; allowed: {', '.join(sorted(rules))}")
    values = {name: source.get(name, rule.default) for name, rule in rules.items()}
    if missing := [name for name, value in values.items() if value is REQUIRED]:
        raise ValueError(f"config.json lacks {', '.join(missing)}, which {title} needs")
    fields: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, rule in rules.items():
        value = values[name]
        if isinstance(rule, Maps):
            value = _compute(name, rule.convert, value, values) if rule.convert else value
            if rule.field:
                fields[rule.field] = value
            if rule.option:
                options[rule.option] = value
        elif isinstance(rule, Only) and not any(_same(value, allowed) for allowed in rule.allowed):
            allowed = " or ".join(repr(choice) for choice in rule.allowed)
            raise ValueError(f"config.json: {name} must be {allowed} to be loaded here ({title}), got {value!r}")
        elif isinstance(rule, Equals) and value is not None:
            expected = _compute(name, rule.compute, values)
            if not _same(value, expected):
                raise ValueError(f"config.json disagrees with itself: {name} must be {rule.formula} = {expected!r}, "
                                 f"got {value!r}")
    return fields, options


def write_fields(fields: Mapping[str, Any], options: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """The config.json of a layout for a model of ours: the reverse of `read_fields`.

    Fields with one supported value are left out: that is what their absence means.

    Raises:
        ValueError: the model has two values where the layout has one field.
    """
    written: dict[str, Any] = {}
    for name, rule in rules.items():
        if isinstance(rule, Maps):
            values = [fields[rule.field]] if rule.field else []
            values += [options[rule.option]] if rule.option else []
            if values[0] != values[-1]:
                raise ValueError(f"the layout has one field {name}, for {rule.field} = {values[0]!r} and the mixer's "
                                 f"{rule.option} = {values[-1]!r}")
            written[name] = rule.revert(values[0]) if rule.revert else values[0]
    return written


def _compute(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a field stands for; ValueError where the fields that it needs are of a wrong type, or zero."""
    try:
        return function(*arguments)
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"config.json: {name} cannot be made sense of with the other fields: {error}") from None


def _same(value: Any, allowed: Any) -> bool:
    """Equality in which JSON's lists are tuples, and 1 is not true."""
    if isinstance(value, (list, tuple)) and isinstance(allowed, (list, tuple)):
        return len(value) == len(allowed) and all(map(_same, value, allowed))
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


# what transformers writes into any config.json, whatever the model; generation's fields are from versions before 5
_BOOKKEEPING = frozenset({
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures", "auto_map",
    "chunk_size_feed_forward", "dtype", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "model_type",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers_version", "use_bfloat16",
})
