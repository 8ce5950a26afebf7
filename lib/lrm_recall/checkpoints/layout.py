"""A layout: everything that must be known about one kind of checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lrm_recall.checkpoints.fields import Rules, read_fields
from lrm_recall.checkpoints.names import Names
from lrm_recall.config import RecurrentLMConfig


@dataclass(frozen=True)
class Layout:
    """One kind of checkpoint.

    Attributes:
        title: how errors call it.
        mixer: the mixer of every layer.
        rules: what each field of its config.json becomes.
        names: how its tensors are called.
        fields, options: what every checkpoint of this layout has, though its config.json does not say so.
        aliases: names that config.json had in older versions, to the present ones.
        architecture: the class that FLA's AutoModelForCausalLM would make of it; None if FLA cannot read it.
        model_type: as in config.json; None if it has none.
    """

    title: str
    mixer: str
    rules: Rules
    names: Names
    fields: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    architecture: str | None = None
    model_type: str | None = None

    def config(self, source: Mapping[str, Any]) -> RecurrentLMConfig:
        """The configuration of the model that a config.json of this layout describes.

        Raises:
            ValueError: an unknown field, a value that is not supported, or one that no model can have.
        """
        present: dict[str, Any] = {}
        for name, value in source.items():
            name = self.aliases.get(name, name)
            if name in present and present[name] != value:
                raise ValueError(f"config.json gives {name} twice, under an older name too: {present[name]!r} and "
                                 f"{value!r}")
            present[name] = value
        fields, options = read_fields(present, self.rules, self.title)
        try:
            config = RecurrentLMConfig(
                mixer=self.mixer, mixer_args={**self.options, **options}, **self.fields, **fields
            )
        except ValueError as error:
            raise ValueError(f"config.json of {self.title}: {error}") from None
        if config.pad_token_id is not None and not -config.vocab_size <= config.pad_token_id < config.vocab_size:
            raise ValueError(f"config.json of {self.title}: pad_token_id must be a token below vocab_size "
                             f"{config.vocab_size}, got {config.pad_token_id}")
        return config
