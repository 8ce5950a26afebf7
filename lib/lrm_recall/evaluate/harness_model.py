"""Models of this library as a model of lm-evaluation-harness, registered under the name `lrm-recall`.

    lm_eval.simple_evaluate(model="lrm-recall", model_args={"pretrained": "runs/gla", "tokenizer": "gpt2"}, tasks=...)
    lm_eval.simple_evaluate(model=HarnessLM(model, tokenizer=tokenizer), tasks=...)

The harness's class for transformers models does the work: it cuts, pads, batches and sums. What differs here is how a
model is found, that scores are taken in float32, and that scoring keeps no cache. Padding is left to the model:
scoring pads on the right, where a causal model needs no mask; generation on the left, where ours takes the mask.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lrm_recall.checkpoints.source import find_directory, read_config
from lrm_recall.config import RecurrentLMConfig
from lrm_recall.data.tokenizer import check_vocabulary, load_tokenizer
from lrm_recall.model import RecurrentLM
from lrm_recall.options import accepted_options, did_you_mean

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


@register_model("lrm-recall")
class HarnessLM(HFLM):
    """A RecurrentLM under the harness.

    Args:
        pretrained: a directory or a repository of the hub, with a model that this library saved or a checkpoint that
            `RecurrentLM.from_checkpoint` reads; or a model that is at hand, whose device and dtype then stand.
        tokenizer: "gpt2", a directory or a repository; None for the files beside the model. Or a tokenizer.
        revision: commit of the repository.
        dtype: of the parameters, such as "bfloat16"; None for that of the files.
        device: None for a GPU where there is one.
        resona: options of Resona layers to put beside a checkpoint's mixers, as a mapping or its JSON.
        trust_pickle: read a checkpoint's pytorch_model.bin where it has no safetensors.
        local_files_only: do not ask the hub.
        batch_size: rows at a time, or "auto"; `max_batch_size` is the most that "auto" tries.
        max_length: tokens that the model reads at once; longer texts are scored in windows of it.
        max_gen_toks: tokens that are generated where the task does not say.
        softmax_dtype: of the log probabilities.
        logits_cache: score continuations of one token, after one context, together.
        prefix_token_id: stands before a text without a context; None for the tokenizer's begin or end of text.
        add_bos_token: whether a begin of text is put before every text; None for what the tokenizer does.

    Raises:
        ValueError: the model has no tokenizer or one that does not fit it, an option that its kind does not take, or
            several processes.
        FileNotFoundError: there is no such model.
    """

    def __init__(
        self,
        pretrained: str | RecurrentLM,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        resona: dict[str, Any] | str | None = None,
        trust_pickle: bool = False,
        local_files_only: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int = 2048,
        max_gen_toks: int = 256,
        softmax_dtype: str = "float32",
        logits_cache: bool = True,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("the model lrm-recall runs in one process; start one a model and GPU, without a launcher")
        if isinstance(pretrained, RecurrentLM):
            model, name = pretrained, pretrained.name_or_path or "a model at hand"
        else:
            name = str(pretrained)
            model = load_model(
                name, revision=revision, dtype=dtype, device=device, resona=resona, trust_pickle=trust_pickle,
                local_files_only=local_files_only,
            )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = _load_tokenizer(name, tokenizer, revision)
        check_vocabulary(len(tokenizer), model.config.vocab_size, tokenizer.name_or_path or type(tokenizer).__name__)
        if tokenizer.eos_token_id is None:
            raise ValueError("the harness needs an end of text, before texts without a context and behind answers, and "
                             f"the tokenizer of {name} has none")
        self._max_gen_toks = max_gen_toks
        with _without_warnings():  # that options of a model given as an object are ignored: they are not
            super().__init__(
                model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, max_batch_size=max_batch_size,
                max_length=max_length, softmax_dtype=softmax_dtype, logits_cache=logits_cache,
                prefix_token_id=prefix_token_id, add_bos_token=add_bos_token,
            )
        self.pretrained, self.revision = name, revision  # what the harness writes into its results

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> HarnessLM:
        """A model from --model_args and the harness's own options.

        Raises:
            ValueError: there is no such option, or no model is named.
        """
        added = {name: value for name, value in (additional_config or {}).items() if value is not None}
        options = {**arg_dict, **added}
        allowed = ["pretrained", *accepted_options(cls)]
        for name in options:
            if name not in allowed:
                raise ValueError(f"the model lrm-recall has no option {name!r}{did_you_mean(name, allowed)}; allowed: "
                                 f"{', '.join(allowed)}")
        if "pretrained" not in options:
            raise ValueError("no model is named: set pretrained=PATH_OR_NAME in --model_args")
        return cls(**options)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> HarnessLM:
        """As `create_from_arg_obj`, from "name=value,name=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of the ids [B, T], padded on the right; no states are kept."""
        with torch.no_grad():
            return self.model(inps, use_cache=False).logits


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    resona: dict[str, Any] | str | None = None,
    trust_pickle: bool = False,
    local_files_only: bool = False,
) -> RecurrentLM:
    """A model of ours, or a public checkpoint, in evaluation mode; arguments as for `HarnessLM`.

    Raises:
        ValueError, FileNotFoundError: as for `HarnessLM`.
    """
    resona = _decode(resona)
    dtype = None if dtype == "auto" else dtype
    device = device or default_device()
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} is asked for, and torch sees no GPU here")
    directory = find_directory(name, revision=revision, trust_pickle=trust_pickle, local_files_only=local_files_only)
    if read_config(directory).get("model_type") != RecurrentLMConfig.model_type:
        return RecurrentLM.from_checkpoint(
            directory, dtype=dtype, device=device, trust_pickle=trust_pickle, resona=resona
        )
    if resona is not None:
        raise ValueError(f"resona is for checkpoints of other libraries; {name} is a model of ours, which says itself "
                         "where it retrieves")
    only_safetensors = None if trust_pickle else True
    model = RecurrentLM.from_pretrained(directory, dtype=dtype or "auto", use_safetensors=only_safetensors)
    return model.to(device).eval()


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _decode(resona: dict[str, Any] | str | None) -> dict[str, Any] | None:
    if not isinstance(resona, str):
        return resona
    try:
        return json.loads(resona)
    except ValueError:
        raise ValueError(f'resona must be a JSON object such as {{"layers": [0]}}, got {resona!r}') from None


def _load_tokenizer(name: str, tokenizer: str | None, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that is asked for, or that lies beside the model.

    Raises:
        ValueError: there is none beside the model, or the one that is asked for cannot be had.
    """
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    directory = Path(name).expanduser()
    if directory.is_dir() and not any((directory / file).is_file() for file in _TOKENIZER_FILES):
        raise ValueError(f"{name} has no tokenizer beside the model; set tokenizer=gpt2 (what `lrm-recall data` takes "
                         "unless it is told otherwise), or tokenizer=DIRECTORY")
    return load_tokenizer(name, revision)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
