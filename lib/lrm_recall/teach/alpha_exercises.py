"""The exercises of the alpha-mixing walkthrough, checked: yes, no with a reason, or not yet.

A check never raises for a wrong solution; what a solution raises becomes its verdict.

Symbols: T positions, N chunks of U = chunk_size tokens, k chunks found for each position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrm_recall.resona.search import visible_chunks

_CASES = ((16, 4), (10, 3), (6, 1), (9, 2))  # lengths and chunk sizes that the mask is tried on


@dataclass(frozen=True)
class Verdict:
    """What a check found; prints as one line that begins with Yes, No or Not yet.

    Attributes:
        solved: whether the solution is right.
        text: the line.
        given, wanted: what the solution returned (None if that cannot be drawn) and what it should.
    """

    solved: bool
    text: str
    given: Tensor | None
    wanted: Tensor

    def __str__(self) -> str:
        return self.text


def mask_wanted(length: int, chunk_size: int) -> Tensor:
    """[T, N] bool: whether chunk n lies wholly before position t (section 3.2)."""
    visible = visible_chunks(torch.arange(length), chunk_size)  # [T]
    return torch.arange(length // chunk_size) < visible[:, None]  # [T, N]


def gate_wanted(scores: Tensor, null_score: Tensor, temperature: float) -> Tensor:
    """[T, k]: softmax of the k scores [T, k] and the null chunk's [T], times the temperature, without the null's."""
    return (torch.cat([scores, null_score[:, None]], dim=-1) * temperature).softmax(dim=-1)[:, :-1]


def check_causal_mask(solution: Callable[[int, int], Tensor]) -> Verdict:
    """Check `solution(length, chunk_size)` -> [T, N] bool against the causal rule, for several sizes."""
    shown = mask_wanted(*_CASES[0])
    drawn = None
    for case in _CASES:
        wanted = mask_wanted(*case)
        given, problem = _call(solution, case, wanted)
        if problem is None:
            drawn = given.bool() if drawn is None else drawn
            problem = _mask_problem(given.bool(), wanted, *case)
        if problem:
            return Verdict(False, problem, drawn, shown)
    return Verdict(True, "Yes: a chunk is seen from the first position after its last token, and never before.",
                   drawn, shown)


def check_null_chunk_gate(solution: Callable[[Tensor, Tensor, float], Tensor]) -> Verdict:
    """Check `solution(scores [T, k], null_score [T], temperature)` -> weights [T, k] against Resona's gate.

    What is drawn is the weight of a single chunk whose score goes from -1 to 1.
    """
    line = (torch.linspace(-1, 1, 81)[:, None], torch.full((81,), 0.2), 10.0)
    wanted = gate_wanted(*line)
    drawn, problem = _call(solution, line, wanted)
    if problem is None:
        generator = torch.Generator().manual_seed(0)
        case = (torch.rand(5, 3, generator=generator), torch.rand(5, generator=generator), 4.0)
        problem = _gate_problem(drawn, line) or _gate_of_several(solution, case)
    text = "Yes: the chunks share what the null chunk leaves, and a poor match gets next to nothing."
    return Verdict(problem is None, problem or text, drawn, wanted)


def _call(solution: Callable, arguments: tuple, wanted: Tensor) -> tuple[Tensor | None, str | None]:
    """What the solution returns if it has the right form, or what is wrong with that."""
    name = getattr(solution, "__name__", "your function")
    try:
        given = solution(*(argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments))
    except Exception as error:  # whatever a reader's code may raise
        return None, f"No: {name} raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if given is None:
        return None, f"Not yet: {name} returns nothing. Write it, and run this cell again."
    if not isinstance(given, Tensor):
        return None, f"No: {name} must return a torch tensor, not {type(given).__name__}."
    if given.shape != wanted.shape:
        hint = ""
        if given.dim() == 2 and given.shape[1] == wanted.shape[1] + 1:
            hint = " There is one column too many: an incomplete last chunk is no chunk, and the null chunk's own " \
                   "weight is not returned."
        return None, f"No: {name} must return a tensor {list(wanted.shape)} here, not {list(given.shape)}.{hint}"
    return given, None


def _mask_problem(given: Tensor, wanted: Tensor, length: int, chunk_size: int) -> str | None:
    """The first wrong cell of a mask [T, N], in words."""
    wrong = (given != wanted).nonzero()
    if not len(wrong):
        return None
    position, chunk = wrong[0].tolist()
    tokens = f"chunk {chunk} (tokens {chunk * chunk_size} to {(chunk + 1) * chunk_size - 1})"
    where = f"with {length} positions and chunks of {chunk_size}, position {position}"
    if given[position, chunk]:
        return f"No: {where} sees {tokens}, which does not lie wholly before it: the future leaks."
    return f"No: {where} does not see {tokens}, which lies wholly before it."


def _gate_problem(given: Tensor, arguments: tuple[Tensor, Tensor, float]) -> str | None:
    """What is wrong with the weights [T, k] of a gate, in words."""
    scores, null_score, temperature = arguments
    if not bool(torch.isfinite(given).all()):
        return "No: some weights are not finite."
    if torch.allclose(given, gate_wanted(*arguments), atol=1e-5):
        return None
    if torch.allclose(given.sum(dim=-1), torch.ones(len(given)), atol=1e-5):
        return "No: the weights of the chunks sum to one, so the null chunk gets no share; a position cannot abstain."
    if torch.allclose(given, gate_wanted(scores, null_score, 1.0), atol=1e-5):
        return "No: the temperature is missing: cosines lie in [-1, 1] and are multiplied by it before the softmax."
    return "No: the weights are not the softmax over the scores and the null chunk's, times the temperature."


def _gate_of_several(solution: Callable, arguments: tuple[Tensor, Tensor, float]) -> str | None:
    given, problem = _call(solution, arguments, arguments[0])
    return problem or _gate_problem(given, arguments)
