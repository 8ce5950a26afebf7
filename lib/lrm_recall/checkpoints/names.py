"""How tensors are called in a checkpoint; inside a mixer and an MLP the names are the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Names:
    """Their names for the parts of a RecurrentLM; a part that is not listed keeps its name.

    Attributes:
        stem: of everything but the head; ours is "model".
        parts: their names for `embeddings` and `norm` of the stem, and for `mixer_norm` and `mixer` of a layer.
        former: names that older files of the same layout have, to the ones that they have now.
    """

    stem: str = "model"
    parts: Mapping[str, str] = field(default_factory=dict)
    former: Mapping[str, str] = field(default_factory=dict)

    def theirs(self, ours: str) -> str:
        """Their name of a tensor of ours, such as "model.layers.3.mixer_norm.weight"."""
        steps = ours.split(".")
        if steps[0] == "model":
            steps[0] = self.stem
            part = 3 if steps[1] == "layers" else 1
            steps[part] = self.parts.get(steps[part], steps[part])
        return ".".join(steps)
