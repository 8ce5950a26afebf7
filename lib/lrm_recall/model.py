"""One language model for every mixer: embeddings, blocks of mixer and SwiGLU, head.

    h = embeddings(ids)
    for each block:  h = h + mixer(norm(h));  h = h + mlp(norm(h))
    logits = head(norm(h))

Symbols: B batch, T positions of this call, D hidden_size, F intermediate_size, V vocab_size.
A layer that retrieves has its mixer wrapped in Resona; the initial embeddings h_0 travel to it as `context.memory`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lrm_recall.cache import RecurrentCache
from lrm_recall.config import RecurrentLMConfig
from lrm_recall.context import Context
from lrm_recall.decode import Decoder
from lrm_recall.mixers.base import Mixer
from lrm_recall.mixers.find import mixer_class
from lrm_recall.norms import LayerNorm, RMSNorm
from lrm_recall.ops.linear import plain, swiglu
from lrm_recall.ops.loss import IGNORED, cross_entropy
from lrm_recall.resona.layer import Resona
from lrm_recall.resona.memory import DenseMemory, Memory, TokenMemory

_MLP_PIECE = 16384  # tokens of a prompt that go through an MLP at a time: enough for its products to run at full speed


class SwiGLU(nn.Module):
    """Channel mixing of a block: down(silu(gate(x)) * up(x)); parameter names as in FLA's checkpoints."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] to [B, T, D]; a long prompt in pieces, since nothing here looks beyond its own position."""
        if torch.is_grad_enabled() or x.shape[1] <= _MLP_PIECE:
            return self._whole(x)
        y = torch.empty_like(x)
        for part, result in zip(x.split(_MLP_PIECE, 1), y.split(_MLP_PIECE, 1), strict=True):
            result.copy_(self._whole(part))
        return y

    def _whole(self, x: Tensor) -> Tensor:
        layers = self.gate_proj, self.up_proj, self.down_proj
        if plain(*layers):
            return swiglu(x, *(layer.weight for layer in layers))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # [B, T, D] -> [B, T, F] -> [B, T, D]


def make_norm(config: RecurrentLMConfig) -> nn.Module:
    """The normalisation that the configuration names, over D."""
    norm = RMSNorm if config.norm == "rmsnorm" else LayerNorm
    return norm(config.hidden_size, eps=config.norm_eps)


def make_mixer(config: RecurrentLMConfig, layer: int) -> Mixer:
    """The mixer of one layer, without Resona."""
    return mark_outputs(mixer_class(config.mixer)(config.hidden_size, **config.mixer_options(layer)))


def mark_outputs(module: nn.Module) -> nn.Module:
    """Mark the projections that write to the residual stream: they start smaller, the more layers there are (GPT-2)."""
    for name, child in module.named_modules():
        if name.rpartition(".")[2] in ("o_proj", "out_proj", "down_proj"):
            child.writes_residual = True
    return module


class Block(GradientCheckpointingLayer):
    """One layer: token mixing, then (unless `mlp` is "none") channel mixing, each on a normalised residual stream."""

    def __init__(self, config: RecurrentLMConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = make_norm(config)
        self.mixer = make_mixer(config, layer)
        if layer in config.resona_layers:
            self.mixer = mark_outputs(Resona(self.mixer, config.hidden_size, **config.resona_options))
        if config.mlp == "swiglu":
            self.mlp_norm = make_norm(config)
            self.mlp = mark_outputs(SwiGLU(config.hidden_size, config.intermediate_size))
        else:
            self.mlp = None

    def forward(self, h: Tensor, context: Context) -> Tensor:
        """Add to the residual stream h [B, T, D], kept in float32 or not, what the mixer and the MLP make of it."""
        x, stream = self.branch(h, context)
        return stream + x if stream is h or torch.is_grad_enabled() else stream.add_(x)

    def branch(self, h: Tensor, context: Context, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `forward`, but what comes last is not added: that, and the stream. `x` is what the layer before left."""
        normed, h = (self.mixer_norm(h), h) if x is None else self.mixer_norm.add(x, h)
        x = self.mixer(normed.to(self.mixer_norm.weight.dtype), context)
        if self.mlp is None:
            return x, h
        x, h = self.mlp_norm.add(x, h)
        return self.mlp(x), h


class RecurrentPreTrainedModel(PreTrainedModel):
    """What RecurrentModel and RecurrentLM share: configuration, initialisation, saving and loading."""

    config_class = RecurrentLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _is_stateful = True  # a recurrent state cannot be rolled back, so no assisted generation

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that lacks tensors of the model is refused, not filled up at random.

        Raises:
            ValueError: tensors of the model are missing, as in a checkpoint of another architecture.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors of this model, the first {missing[0]!r}: it "
                             "is of another architecture or configuration")
        return (model, info) if output_loading_info else model

    @classmethod
    def is_custom_code(cls) -> bool:
        """Not in transformers' sense: it would pass over every module without parameters of its own, a mixer too.

        It does so for models whose `_init_weights` might draw loaded tensors anew; ours calls its functions only.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            depth = 2 * self.config.num_hidden_layers if getattr(module, "writes_residual", False) else 1
            init.normal_(module.weight, mean=0.0, std=std / depth**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            wide = self.config.embedding_range
            init.normal_(module.weight, mean=0.0, std=std if wide is None else wide)
        elif isinstance(module, (RMSNorm, LayerNorm)):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Mixer):
            module.init_weights(std)


class RecurrentModel(RecurrentPreTrainedModel):
    """Embeddings and blocks, without the head."""

    def __init__(self, config: RecurrentLMConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        chunk_indices: Tensor | dict[int, Tensor] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Run the blocks; arguments as for `RecurrentLM.forward`."""
        del return_dict  # always an output object
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        if input_ids is not None and (input_ids.dim() != 2 or not input_ids.shape[1]):
            raise ValueError(f"input_ids must be [batch, length] with length 1 or more, got {tuple(input_ids.shape)}")
        self._check_chosen_layers(chunk_indices)
        embeds = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T] -> [B, T, D]
        use_cache = past_key_values is not None or (self.config.use_cache and not self.training
                                                    if use_cache is None else use_cache)
        cache = past_key_values
        if use_cache and cache is None:
            cache = RecurrentCache(self.config.num_hidden_layers)
        length = embeds.shape[1]
        past_length = 0 if cache is None else cache.length
        mask, offset = self._padding(attention_mask, length, cache)
        memory = self._memory(input_ids, embeds, cache, offset) if self.config.resona else None

        h = embeds.float() if self.config.residual_in_fp32 else embeds
        hidden_states = [h] if output_hidden_states else None
        x = None  # in a decoding step of fixed buffers each layer's last addition is left to the next layer's norm
        for index, block in enumerate(self.layers):
            chosen = chunk_indices.get(index) if isinstance(chunk_indices, dict) else chunk_indices
            context = Context(mask, offset, past_length, None if cache is None else cache.layers[index], memory, chosen)
            if isinstance(past_length, Tensor):
                x, h = block.branch(h, context, x)
            else:
                h = block(h, context)
            if hidden_states is not None:
                hidden_states.append(h)
        if cache is not None:
            cache.length = past_length + length
        return BaseModelOutputWithPast(
            last_hidden_state=(self.norm(h) if x is None else self.norm.add(x, h)[0]).to(self.norm.weight.dtype),
            past_key_values=cache,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
        )

    def _check_chosen_layers(self, chunk_indices: Tensor | dict[int, Tensor] | None) -> None:
        """Refuse precomputed chunks that no layer would read."""
        layers = self.config.resona_layers
        named = chunk_indices if isinstance(chunk_indices, dict) else layers
        if chunk_indices is not None and (not layers or any(layer not in layers for layer in named)):
            raise ValueError(f"chunk_indices are for the Resona layers of this model, {layers}, got them for "
                             f"{list(named) or 'every one'}")

    def _padding(
        self, attention_mask: Tensor | None, length: int, cache: RecurrentCache | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mask [B, T] of the new positions, the left padding [B] of each row so far; None where there is none."""
        past_length = 0 if cache is None else cache.length
        if attention_mask is None:
            return None, None if cache is None else cache.offset
        if attention_mask.dim() != 2 or attention_mask.shape[1] not in (length, past_length + length):
            raise ValueError(f"attention_mask must be [batch, {past_length + length}] (or cover the {length} new "
                             f"positions alone), got {tuple(attention_mask.shape)}")
        mask = attention_mask[:, -length:].bool()  # [B, T]
        if bool(mask.all()):
            return None, None if cache is None else cache.offset
        begun = mask.cumsum(dim=1) > 0  # [B, T] at or after the first real token
        new_padding = (~begun).sum(dim=1)  # [B]
        if bool((begun & ~mask).any()) and cache is not None:
            raise ValueError("with a cache, rows must be padded on the left: attention_mask has a 0 after a 1")
        if past_length and bool((new_padding > 0).any()):
            started = torch.ones_like(new_padding) if cache.offset is None else (cache.offset < past_length)
            if bool((started.bool() & (new_padding > 0)).any()):
                raise ValueError("attention_mask pads a row that has already begun in the cache")
        offset = new_padding if cache is None or cache.offset is None else cache.offset + new_padding
        if cache is not None:
            cache.offset = offset
        return mask, offset

    def _memory(
        self, input_ids: Tensor | None, embeds: Tensor, cache: RecurrentCache | None, offset: Tensor | None
    ) -> Memory:
        """What Resona layers retrieve from: the embeddings of this call, or the ids of every call so far."""
        if cache is None:
            return DenseMemory(embeds, offset)
        if input_ids is None:
            raise ValueError("a Resona model keeps token ids in its cache, so with a cache it needs input_ids; call it "
                             "with use_cache=False to run on inputs_embeds")
        ids = cache.append_ids(input_ids)  # [B, L]
        return DenseMemory(embeds, offset) if ids is input_ids else TokenMemory(ids, self.embeddings, offset)


class RecurrentLM(RecurrentPreTrainedModel, GenerationMixin):
    """A causal language model over any mixer of this library.

    Example:
        >>> config = RecurrentLMConfig(mixer="gla", hidden_size=64, resona={"layers": [0], "chunk_size": 2})
        >>> logits = RecurrentLM(config)(torch.randint(0, config.vocab_size, (1, 16))).logits  # [1, 16, V]
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    accepts_loss_kwargs = True  # Trainer hands num_items_in_batch, so that accumulated steps average over all tokens

    def __init__(self, config: RecurrentLMConfig) -> None:
        super().__init__(config)
        self.model = RecurrentModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.cuda_graph = True  # decode through a CUDA graph, where `lrm_recall.decode.can_capture` allows it
        self._decoder = Decoder()
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own RecurrentCache when `generate` asks for one

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        chunk_indices: Tensor | dict[int, Tensor] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Next-token logits.

        Args:
            input_ids: [B, T] int64 token ids; or inputs_embeds: [B, T, D] in their place.
            attention_mask: [B, T] or, with a cache, [B, past + T]; 0 marks padding, on one side of a row only, and on
                the left only with a cache.
            past_key_values: the cache that an earlier call returned; it is continued and changed in place.
            labels: [B, T] int64, shifted inside (position t predicts label t + 1); -100 is ignored.
            use_cache: return a cache; by default yes in evaluation and no in training.
            logits_to_keep: positions whose logits are wanted: the last n, or those of an index tensor; 0 for all.
            chunk_indices: [B, T, k] int64 chunks found beforehand (section 4.2.2), for every Resona layer or in a dict
                by layer; -1 for none.
            output_hidden_states: also return the residual stream before the first and after each block.
            num_items_in_batch: labelled tokens over all accumulated steps (Trainer passes it).

        Returns:
            logits [B, T or kept, V], loss (with labels), past_key_values (with use_cache), hidden_states.

        Raises:
            ValueError: both or neither kind of input, a mask of another shape or with holes, a cache with embeddings
                as input in a Resona model, chunks that would show a position its future.
        """
        extras = (attention_mask, inputs_embeds, labels, chunk_indices, output_hidden_states)
        if self.cuda_graph and past_key_values is not None and all(extra is None for extra in extras):
            logits = self._decoder.step(self, input_ids, past_key_values)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
            past_key_values=past_key_values, use_cache=use_cache, chunk_indices=chunk_indices,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])  # [B, T, D] -> [B, kept, V]
        loss = None
        if labels is not None:
            shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # [B, T]
            losses = cross_entropy(logits.flatten(0, 1), shifted.flatten())  # [B * T]
            loss = losses.sum() / ((shifted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, without the mask once the prompt is read: the cache knows where each row began."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        if cache is not None and cache.length and ids is not None and ids.shape[1] == 1:
            inputs.pop("attention_mask", None)
        return inputs

    @classmethod
    def from_checkpoint(cls, name_or_path: str | Path, **options: Any) -> RecurrentLM:
        """A model from a public checkpoint of FLA, transformers or state-spaces; see `lrm_recall.checkpoints.load`."""
        from lrm_recall.checkpoints import load  # which builds models itself

        return load(name_or_path, **options)

    def to_fla(self, directory: str | Path, **options: Any) -> None:
        """Write a checkpoint that flash-linear-attention can load; see `lrm_recall.checkpoints.to_fla`."""
        from lrm_recall.checkpoints import to_fla

        to_fla(self, directory, **options)

    def state_size(self, sequence_length: int | None = None) -> int:
        """Elements of recurrent state that one sequence carries, over all layers (StateX, section 3.1)."""
        return sum(block.mixer.state_size(sequence_length) for block in self.model.layers)


AutoConfig.register(RecurrentLMConfig.model_type, RecurrentLMConfig, exist_ok=True)
AutoModelForCausalLM.register(RecurrentLMConfig, RecurrentLM, exist_ok=True)
