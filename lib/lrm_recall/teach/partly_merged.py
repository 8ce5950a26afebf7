"""A GLA layer whose heads are merged one ingredient at a time: what does merging change before any training?

Merging with inherited parameters (StateX, sections 4.1 and 5.4) changes three things at once:
    scale         (H K)**-0.5 takes the place of K**-0.5;
    norm          one root mean square over H V channels takes the place of one for each head's V;
    cross terms   a query also meets what the other heads' keys have written.
With none of them the layer is the old one, with all of them it is `statex.merge_heads(..., start="inherit")`.

B batch, T tokens, D hidden size, H heads, K and V key and value channels per head
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrm_recall.context import Context
from lrm_recall.mixers.gla import GLA
from lrm_recall.model import RecurrentLM
from lrm_recall.ops.gla import gla_chunked
from lrm_recall.teach.head_merging import merge

INGREDIENTS = ("scale", "norm", "cross terms")


class PartlyMerged(nn.Module):
    """The layer with some ingredients of a merge, in the shapes of a Mixer; no cache.

    Args:
        layer: the layer to start from; its parameters are shared, not copied.
        ingredients: of INGREDIENTS.

    Raises:
        ValueError: an unknown ingredient.
    """

    def __init__(self, layer: GLA, ingredients: Collection[str]) -> None:
        super().__init__()
        if unknown := set(ingredients) - set(INGREDIENTS):
            raise ValueError(f"ingredients are {', '.join(INGREDIENTS)}, got {', '.join(sorted(unknown))}")
        self.layer, self.ingredients = layer, frozenset(ingredients)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D]; the context's mask and cache are not read."""
        layer, heads = self.layer, self.layer.num_heads
        decay = F.logsigmoid(layer.gk_proj(x)) / layer.gate_logit_normalizer
        q, k, v, decay = (y.unflatten(-1, (heads, -1)) for y in (layer.q_proj(x), layer.k_proj(x), layer.v_proj(x),
                                                                 decay))  # [B, T, H, K or V]
        scale = (layer.head_k_dim * (heads if "scale" in self.ingredients else 1)) ** -0.5
        if "cross terms" in self.ingredients:
            q, k, v, decay = (merge(y) for y in (q, k, v, decay))  # [B, T, 1, H K or H V]
        o = gla_chunked(q, k, v, decay, scale=scale, output_final_state=False)[0].flatten(-2)  # [B, T, H V]
        o = o.unflatten(-1, (1, -1) if "norm" in self.ingredients else (heads, -1))  # [B, T, 1, H V] or [B, T, H, V]
        o = F.rms_norm(o, (o.shape[-1],), eps=layer.g_norm_swish_gate.eps).flatten(-2)  # [B, T, H V]
        weight = layer.g_norm_swish_gate.weight.repeat(heads)  # [V] -> [H V]
        return layer.o_proj(o * weight * F.silu(layer.g_proj(x)))


def with_ingredients(model: RecurrentLM, ingredients: Collection[str]) -> RecurrentLM:
    """A copy of a GLA model of one layer that is merged in these respects alone."""
    changed = copy.deepcopy(model)
    changed.model.layers[0].mixer = PartlyMerged(changed.model.layers[0].mixer, ingredients)
    return changed


@torch.no_grad()
def output_change(model: RecurrentLM, x: Tensor, ingredients: Collection[str]) -> float:
    """How far the layer's output moves, as a share of its length, for the model's input x [B, T, D]."""
    block = model.model.layers[0]
    normed = block.mixer_norm(x)
    before, after = block.mixer(normed), PartlyMerged(block.mixer, ingredients)(normed)
    return ((after - before).norm() / before.norm()).item()
