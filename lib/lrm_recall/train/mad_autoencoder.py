"""The model of MAD's compression task: an encoder, and a decoder that sees nothing but its last position.

As mad-lab's `AutoEncoder` (model/auto_encoder.py): what the encoder holds at the last position is added to a fixed
embedding of each place of the sequence, and a small MLP says which token stood there. One difference: the encoder's
final norm stands before the sum, so that the two have about the same size at the start of training.

B batch, L input length, P questions of an example, D hidden size, V vocabulary size
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lrm_recall.model import RecurrentModel
from lrm_recall.norms import RMSNorm
from lrm_recall.train.batches import Split


class LastPositionDecoder(nn.Module):
    """From the last position's hidden state to the tokens of the whole sequence.

    Args:
        hidden_size: D, an even number of 4 or more.
        vocab_size: V.
        length: L.
        seed: of the initial weights; no global random state is used.

    Raises:
        ValueError: an odd or too small hidden size.
    """

    def __init__(self, hidden_size: int, vocab_size: int, length: int, seed: int) -> None:
        super().__init__()
        if hidden_size < 4 or hidden_size % 2:
            raise ValueError(f"hidden_size must be an even number of 4 or more, got {hidden_size}")
        draws = torch.Generator().manual_seed(seed)
        self.register_buffer("places", sinusoids(length, hidden_size), persistent=False)
        self.mlp = nn.Sequential(
            RMSNorm(hidden_size), _linear(hidden_size, hidden_size, draws), nn.GELU(),
            RMSNorm(hidden_size), _linear(hidden_size, hidden_size, draws), nn.GELU(),
        )  # fmt: skip
        self.unembed = nn.Sequential(RMSNorm(hidden_size), _linear(hidden_size, vocab_size, draws))

    def forward(self, encoding: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, P, V] of the tokens at positions [B, P] int64, from the encoding [B, D] alone."""
        x = encoding[:, None] + self.places[positions]  # [B, 1, D] + [B, P, D]
        return self.unembed(self.mlp(x))  # [B, P, D] -> [B, P, V]


class AutoEncoder(nn.Module):
    """Blocks of a RecurrentLM as the encoder, and a LastPositionDecoder.

    Args:
        encoder: the blocks.
        length: L, of every sequence.
        seed: of the decoder's initial weights.
    """

    def __init__(self, encoder: RecurrentModel, length: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = LastPositionDecoder(encoder.config.hidden_size, encoder.config.vocab_size, length, seed)

    def forward(self, inputs: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, P, V] of the tokens at positions [B, P] of inputs [B, L]."""
        hidden = self.encoder(input_ids=inputs, use_cache=False).last_hidden_state  # [B, L, D]
        return self.decoder(hidden[:, -1], positions)

    def state_size(self, sequence_length: int | None = None) -> int:
        """Elements of recurrent state that one sequence carries, over all layers."""
        return sum(block.mixer.state_size(sequence_length) for block in self.encoder.layers)


def logits_of_decoder(model: AutoEncoder, batch: Split) -> Tensor:
    """Logits of the questions alone, as `fit` wants them: [B * P, V]."""
    return model(batch.inputs, batch.positions).flatten(0, 1)  # [B, P, V] -> [B * P, V]


def sinusoids(length: int, size: int) -> Tensor:
    """Embeddings of places 0 ... length - 1 [length, size]: sines, then cosines, of wavelengths up to 2 pi 10,000."""
    rates = torch.exp(torch.arange(size // 2) * (-math.log(10_000) / (size // 2 - 1)))  # [size / 2]
    angles = torch.arange(length)[:, None] * rates  # [length, size / 2]
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _linear(inputs: int, outputs: int, draws: torch.Generator) -> nn.Linear:
    """A linear layer with mad-lab's initial weights, drawn from `draws` alone."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.normal_(layer.weight, std=0.02, generator=draws)
    nn.init.zeros_(layer.bias)
    return layer
