"""The interface of a token mixer: the part of a block that moves information between positions."""

from __future__ import annotations

from torch import Tensor, nn

from lrm_recall.context import Context


class Mixer(nn.Module):
    """A causal map from [B, T, D] to [B, T, D] that can carry a state between calls.

    A subclass lives in `lrm_recall/mixers/<name>.py`, which exposes it as `MIXER`; `<name>` is then a value of
    `RecurrentLMConfig.mixer`. Its constructor takes the hidden size and keyword options with defaults; the
    options' names and annotations are what the configuration is checked against.
    """

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Mix x [B, T, D] along T. With a cache in the context, continue from it and write it back."""
        raise NotImplementedError

    def state_size(self, sequence_length: int | None = None) -> int:
        """Elements of state that one sequence carries in this layer (StateX, section 3.1).

        Args:
            sequence_length: needed by mixers whose state grows with the sequence; others ignore it.

        Raises:
            ValueError: the state grows with the sequence and no length was given.
        """
        raise NotImplementedError

    def init_weights(self, std: float) -> None:
        """Initialise the parameters that are not plain linear or embedding weights.

        The model calls this after every `nn.Linear` and `nn.Embedding` got normal(0, std). Use the functions of
        `transformers.initialization`, which leave tensors that came from a checkpoint alone.
        """
