"""Where a language-model run keeps its checkpoints while it trains, and its model when it is done.

    $LRM_RECALL_CACHE/checkpoints/<key>/checkpoint-<step>/   the Trainer's: weights as safetensors, optimiser, schedule,
                                                             random state, log; removed once the row is stored
    $LRM_RECALL_CACHE/models/<key>/                          the chosen weights (safetensors), config.json, tokenizer;
                                                             kept, for `lrm-recall evaluate` and whatever else reads one

<key> is the key of the run's row. A checkpoint counts from the moment that its marker is written, after everything else
in it: a process killed while it saves leaves one that is thrown away. The Trainer's files that are no safetensors are
its own, made here, and read with torch's `weights_only`, which builds tensors and plain values and runs no code.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from lrm_recall.data.store import cache_root, locked, published

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lrm_recall.model import RecurrentLM
    from lrm_recall.rows import Row

_MARKER = "complete"
_PREFIX = "checkpoint-"


class MarkComplete(TrainerCallback):
    """Mark each checkpoint of a Trainer once all of it is written."""

    def on_save(self, args, state, control, **_) -> None:
        if state.is_world_process_zero:
            (checkpoint(Path(args.output_dir), state.global_step) / _MARKER).touch()


def checkpoints_folder(key: str) -> Path:
    """Where the run with this key keeps its checkpoints."""
    return cache_root() / "checkpoints" / key


def checkpoint(folder: Path, step: int) -> Path:
    """The checkpoint of one step."""
    return folder / f"{_PREFIX}{step}"


def last_step(folder: Path) -> int:
    """The step of the newest complete checkpoint, 0 when there is none."""
    return max((_step(path.parent) for path in folder.glob(f"{_PREFIX}*/{_MARKER}")), default=0)


def drop_incomplete(folder: Path) -> None:
    """Remove checkpoints that were being written when their process died."""
    for path in folder.glob(f"{_PREFIX}*"):
        if not (path / _MARKER).is_file():
            shutil.rmtree(path)


def forget_checkpoints(row: Row) -> None:
    """Remove the checkpoints of a run whose row is stored: the `on_row` of a sweep. A failed run keeps them."""
    if row["status"] == "ok":
        shutil.rmtree(checkpoints_folder(row["key"]), ignore_errors=True)


def keep_model(model: RecurrentLM, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Store the trained model of a run, and its tokenizer, under its key, whole or not at all."""
    place = model_folder(key)
    with locked(place), published(place) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def trained_model(key: str) -> RecurrentLM | None:
    """The model that the run with this key trained; None where another machine did, or the cache was emptied."""
    from lrm_recall.model import RecurrentLM

    place = model_folder(key)
    return RecurrentLM.from_pretrained(place) if place.is_dir() else None


def model_folder(key: str) -> Path:
    """Where the trained model of the run with this key is kept, as transformers keeps one."""
    return cache_root() / "models" / key


def _step(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))
