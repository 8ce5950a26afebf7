"""StateX (section 4): a pre-trained model with a larger recurrent state in a few of its layers.

GLA: all heads of a layer become one. The state of H heads is H blocks of K x V on the diagonal of one (H K) x (H V)
matrix; one head uses the whole matrix, H times as much, with the same parameters (section 4.1), but for the norm
weight that the heads shared, which is repeated.
Mamba2: keys and queries (B and C) grow from N to E N channels, less than 1 % more parameters (section 4.2).
The result is an ordinary RecurrentLM: its configuration says which layers differ, so it saves and loads as usual.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lrm_recall.model import RecurrentLM, make_mixer
from lrm_recall.resona.layer import Resona
from lrm_recall.statex.choose import choose_layers
from lrm_recall.statex.initialise import NewRows, Tensors, merged_heads, reset_norm, widened_state

Start = Literal["reinitialise", "inherit"]


@dataclass(frozen=True)
class Size:
    """Parameters (tied ones once) and elements of recurrent state of a model."""

    parameters: int
    state: int

    @classmethod
    def of(cls, model: RecurrentLM, sequence_length: int | None = None) -> Size:
        """Count a model, on any device, meta included.

        Args:
            sequence_length: for mixers whose state grows with the sequence, such as attention.
        """
        return cls(sum(p.numel() for p in model.parameters()), model.state_size(sequence_length))

    def growth(self, after: Size) -> str:
        """One line for a reader: both counts, and how much larger `after` is.

        Example: "state 12.58M -> 18.87M (1.50x), parameters 1.366B -> 1.366B (+6,144)".
        """
        return (f"state {_short(self.state)} -> {_short(after.state)} ({after.state / self.state:.2f}x), "
                f"parameters {_short(self.parameters)} -> {_short(after.parameters)} "
                f"({after.parameters - self.parameters:+,})")


def _short(count: int) -> str:
    """A count to four digits: 12.58M, 1.366B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)


def expand_state(model: RecurrentLM, m: int = 4, *, start: Start = "reinitialise") -> RecurrentLM:
    """The model with a larger state in m evenly spread layers, as the paper does it for its mixer.

    Args:
        model: a RecurrentLM of mixer "gla" or "mamba2"; it is left as it is.
        m: layers to expand (section 4.4).
        start: "reinitialise" the token mixing of those layers (section 4.3), or "inherit" it (section 5.4).

    Raises:
        ValueError: another mixer, m out of range, an unknown start.
    """
    layers = choose_layers(model.config.num_hidden_layers, m)
    if model.config.mixer == "gla":
        return merge_heads(model, layers, start=start)
    if model.config.mixer == "mamba2":
        return widen_state(model, layers, start=start)
    raise ValueError(f"StateX expands mixers 'gla' and 'mamba2', this model has {model.config.mixer!r}")


def merge_heads(model: RecurrentLM, layers: Sequence[int], *, start: Start = "reinitialise") -> RecurrentLM:
    """GLA with all heads of some layers merged into one; no new parameters beside the norm's (section 4.1).

    Args:
        model: a RecurrentLM of mixer "gla"; it is left as it is.
        layers: indices of the layers to merge.
        start: "reinitialise" the whole token mixing with its norm, or "inherit" it.

    Raises:
        ValueError: another mixer, a layer out of range or twice, an unknown start.
    """
    _check(model, "gla", layers, start)

    def tensors(old: nn.Module, fresh: nn.Module) -> Tensors:
        return merged_heads(old.state_dict(), old.num_heads) if start == "inherit" else fresh.state_dict()

    expanded = _rebuild(model, layers, lambda old: {"num_heads": 1}, tensors)
    if start == "reinitialise":
        for layer in layers:
            reset_norm(expanded.model.layers[layer].mixer_norm)
    return expanded


def widen_state(
    model: RecurrentLM,
    layers: Sequence[int],
    factor: int = 4,
    *,
    start: Start = "reinitialise",
    new_rows: NewRows = "zero_B",
) -> RecurrentLM:
    """Mamba2 with d_state `factor` times larger in some layers (section 4.2).

    Args:
        model: a RecurrentLM of mixer "mamba2"; it is left as it is.
        layers: indices of the layers to widen.
        factor: E, 2 or more; the paper uses 4 (d_state 128 to 512).
        start: "reinitialise" A, B, C and dt_bias, or "inherit" them.
        new_rows: with "inherit", which new rows start at zero: "zero_B" or "zero_C" keep the function and learn,
            "zero_both" (the paper's words) keeps it and never learns, "fresh" changes it.

    Raises:
        ValueError: another mixer, a layer out of range or twice, a factor below 2, an unknown start or new_rows.
    """
    _check(model, "mamba2", layers, start)
    if factor < 2:
        raise ValueError(f"factor must be at least 2, got {factor}")
    if new_rows not in ("zero_B", "zero_C", "zero_both", "fresh"):
        raise ValueError(f"new_rows must be zero_B, zero_C, zero_both or fresh, got {new_rows!r}")

    def tensors(old: nn.Module, fresh: nn.Module) -> Tensors:
        return widened_state(old.state_dict(), fresh.state_dict(), old.n_groups,
                             inherit=start == "inherit", new_rows=new_rows)

    return _rebuild(model, layers, lambda old: {"state_size": factor * old.d_state}, tensors)


def _rebuild(
    model: RecurrentLM,
    layers: Sequence[int],
    options: Callable[[nn.Module], dict[str, Any]],
    tensors: Callable[[nn.Module, nn.Module], Tensors],
) -> RecurrentLM:
    """A copy of the model whose mixers of some layers are built anew with other options and given tensors."""
    expanded = copy.deepcopy(model)
    config = expanded.config
    for layer in layers:
        block = expanded.model.layers[layer]
        holder = block.mixer if isinstance(block.mixer, Resona) else block  # Resona stays; its mixer grows
        old = holder.mixer
        changed = {**config.layer_overrides.get(str(layer), {}), **options(old)}
        config.layer_overrides = {**config.layer_overrides, str(layer): changed}
        reference = next(old.parameters())
        with torch.device(reference.device):
            fresh = make_mixer(config, layer)
        fresh = fresh.to(reference.dtype)
        fresh.apply(expanded._init_weights)
        fresh.load_state_dict(tensors(old, fresh))
        holder.mixer = fresh.train(old.training)
    config.check()
    return expanded


def _check(model: RecurrentLM, mixer: str, layers: Sequence[int], start: str) -> None:
    if model.config.mixer != mixer:
        raise ValueError(f"this surgery is for mixer {mixer!r}, the model has {model.config.mixer!r}")
    if start not in ("reinitialise", "inherit"):
        raise ValueError(f"start must be 'reinitialise' or 'inherit', got {start!r}")
    count = model.config.num_hidden_layers
    wrong = [layer for layer in layers if not 0 <= layer < count] or [n for n in layers if list(layers).count(n) > 1]
    if wrong or not layers:
        raise ValueError(f"layers must be distinct numbers from 0 to {count - 1}, got {list(layers)}")
