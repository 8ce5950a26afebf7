"""Which stored tensor becomes which parameter: strictly one for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lrm_recall.checkpoints.layout import Layout
from lrm_recall.model import RecurrentLM

Shape = tuple[int, ...]
EMBEDDINGS, HEAD = "model.embeddings.weight", "lm_head.weight"
_NAMED = 3  # tensors of each kind that an error names


@dataclass(frozen=True)
class Part:
    """A parameter's name, and the rows of the stored tensor that it takes; None for all."""

    name: str
    rows: slice | None = None


def expected_shapes(model: RecurrentLM) -> dict[str, Shape]:
    """Shapes of a model's tensors by name; the head is not one of them where it is the embeddings."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def match(expected: Mapping[str, Shape], stored: Mapping[str, Shape], layout: Layout) -> dict[str, list[Part]]:
    """The parameters that each stored tensor becomes.

    Args:
        expected: shapes by our names.
        stored: shapes by the names in the files.

    Raises:
        ValueError: a stored tensor that is missing, unexpected or of another shape.
    """
    wanted = {layout.names.theirs(name): (name, shape) for name, shape in expected.items()}
    if HEAD not in wanted and HEAD in stored:  # tied, and saved nevertheless
        wanted[HEAD] = (HEAD, expected[EMBEDDINGS])
    former = {old: new for old, new in layout.names.former.items() if new not in stored}
    present = {former.get(name, name): name for name in stored}
    parts = _take_joined(wanted, present, stored)
    missing = [theirs for theirs in wanted if theirs not in present]
    unexpected = [stored_name for theirs, stored_name in present.items() if theirs not in wanted]
    reshaped = [
        f"{theirs} is {list(stored[present[theirs]])} and should be {list(shape)}"
        for theirs, (_, shape) in wanted.items() if theirs in present and stored[present[theirs]] != shape
    ]
    if missing or unexpected or reshaped:
        found = [_some(missing, "missing"), _some(unexpected, "unexpected"), _some(reshaped, "of another shape")]
        raise ValueError(f"the tensors are not those that config.json describes ({layout.title}): "
                         f"{'; '.join(filter(None, found))}")
    parts.update({present[theirs]: [Part(name)] for theirs, (name, _) in wanted.items()})
    return parts


def _take_joined(
    wanted: dict[str, tuple[str, Shape]], present: dict[str, str], stored: Mapping[str, Shape]
) -> dict[str, list[Part]]:
    """The MLP projections that FLA had in one tensor, gate above up, before 2025-02-09; taken out of both mappings."""
    parts = {}
    for gate in list(wanted):
        up = gate.replace(".gate_proj.", ".up_proj.")
        if up == gate or up in present or gate not in present:
            continue
        name, (rows, columns) = wanted[gate]
        if stored[present[gate]] == (2 * rows, columns):
            del wanted[gate]
            parts[present.pop(gate)] = [Part(name, slice(0, rows)), Part(wanted.pop(up)[0], slice(rows, None))]
    return parts


def _some(names: Sequence[str], kind: str) -> str:
    """A count, and the first names; empty without any."""
    if not names:
        return ""
    more = ", ..." if len(names) > _NAMED else ""
    return f"{len(names)} {kind} ({', '.join(names[:_NAMED])}{more})"
