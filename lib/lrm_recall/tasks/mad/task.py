"""One MAD task with its parameters, checked; what is left out is the setting of mad-lab's `configs/tasks`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lrm_recall.options import check_options, did_you_mean

_MAX_MOTIFS = 1 << 20  # distinct motifs of one size that are tabulated
_COMMON = ("task", "vocab_size", "seq_len", "num_train_examples", "num_test_examples", "as_released")
_NOISE = {"noise_vocab_size": 0, "frac_noise": 0.0}

# What each task can be told beyond _COMMON, and the base setting of everything it can be told.
_BASE: dict[str, dict[str, Any]] = {
    "compression": {"vocab_size": 16, "seq_len": 32, **_NOISE},
    "in-context-recall": {"vocab_size": 16, "seq_len": 128, "multi_query": True, **_NOISE},
    "noisy-in-context-recall": {"vocab_size": 32, "seq_len": 128, "multi_query": True, "noise_vocab_size": 16,
                                "frac_noise": 0.2},
    "fuzzy-in-context-recall": {"vocab_size": 16, "seq_len": 128, "multi_query": True, "k_motif_size": 3,
                                "v_motif_size": 3, "generator": "exact", **_NOISE},
    "selective-copying": {"vocab_size": 16, "seq_len": 256, "num_tokens_to_copy": 16},
    "memorization": {"vocab_size": 256, "seq_len": 32, "num_train_examples": 256, "kv_map_seed": None, **_NOISE},
}
TASKS = tuple(_BASE)  # in the order of Resona's Table 1

# Special tokens: the compression token; fuzzy recall's padding; copy and blank; the token after a key.
_SPECIAL = {"compression": 1, "in-context-recall": 0, "noisy-in-context-recall": 0, "fuzzy-in-context-recall": 1,
            "selective-copying": 2, "memorization": 1}


@dataclass(frozen=True, kw_only=True)
class MADTask:
    """Everything that decides a task's data besides the seed; plain JSON through `dataclasses.asdict`.

    A parameter left at None takes the task's base setting; it stays None if the task has no such parameter.

    Args:
        task: one of TASKS, the names of mad-lab.
        vocab_size: all tokens, with the special and the noise tokens.
        seq_len: mad-lab's length; the inputs' own is `input_length`.
        num_train_examples: 12,800 (memorization: 256).
        num_test_examples: mad-lab has 1,280 everywhere.
        noise_vocab_size: tokens that stand for nothing; counted in vocab_size.
        frac_noise: probability that noise stands instead of a pair (compression: instead of a token).
        multi_query: recall: score every repeated key (True), or only one at the end, after a special token.
        k_motif_size: fuzzy recall: most tokens of a key; test keys always have that many.
        v_motif_size: fuzzy recall: most tokens of a value.
        num_tokens_to_copy: selective copying.
        kv_map_seed: memorization: seed of the facts; None is the data's own, as mad-lab's MADConfig has it. (The
            argument of that name of mad-lab's generator never takes effect there.)
        generator: fuzzy recall: "exact" shuffles the tables of all motifs for each sequence, as mad-lab does;
            "fast" does not, which changes the stream but not the distribution (drawing uniformly from a
            shuffled table is drawing uniformly). 50 seconds against 1 at a vocabulary of 128.
        as_released: targets with the faults of mad-lab's code, listed in the package's docstring.

    Raises:
        ValueError: no such task or parameter, or no data exist; the message names the value and what is allowed.
    """

    task: str
    vocab_size: int | None = None
    seq_len: int | None = None
    num_train_examples: int | None = None
    num_test_examples: int = 1_280
    noise_vocab_size: int | None = None
    frac_noise: float | None = None
    multi_query: bool | None = None
    k_motif_size: int | None = None
    v_motif_size: int | None = None
    num_tokens_to_copy: int | None = None
    kv_map_seed: int | None = None
    generator: Literal["exact", "fast"] | None = None
    as_released: bool = False

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            near = did_you_mean(self.task, TASKS) if isinstance(self.task, str) else ""
            raise ValueError(f"there is no MAD task {self.task!r}{near}; there are {', '.join(TASKS)}")
        check_options(type(self), asdict(self), "MADTask")
        base = {"num_train_examples": 12_800, **_BASE[self.task]}
        for name, value in asdict(self).items():
            if value is None:
                object.__setattr__(self, name, base.get(name))
            elif name not in base and name not in _COMMON:
                raise ValueError(f"{self.task} has no {name}, got {value!r}; it has {', '.join(base)}")
        self._check_sizes()
        self._check_vocabulary()
        self._check_length()

    @property
    def input_length(self) -> int:
        """Length of an example: seq_len, or one less in multi-query recall, where no special token replaces the
        one that the shift by one position takes; memorization needs whole pairs."""
        if self.task in ("in-context-recall", "noisy-in-context-recall"):
            return self.seq_len - self.multi_query
        return self.seq_len - (self.task == "memorization" and self.seq_len % 2)

    @property
    def decodes_last_position(self) -> bool:
        """Whether a model must be built as an encoder and a decoder of its last position (mad-lab's AutoEncoder):
        compression, whose targets are its inputs, so that a model with an output at each position would copy."""
        return self.task == "compression"

    @property
    def num_ordinary_tokens(self) -> int:
        """Tokens 0 ... n - 1, neither noise (which follow them) nor special (which come last)."""
        single_query = self.multi_query is False  # a token announces the query
        return self.vocab_size - _SPECIAL[self.task] - single_query - (self.noise_vocab_size or 0)

    @property
    def num_keys(self) -> int:
        """Tokens 0 ... n - 1 that keys are made of; values are made of the other ordinary tokens."""
        return self.num_ordinary_tokens // 2

    @property
    def num_values(self) -> int:
        return self.num_ordinary_tokens - self.num_keys

    def _check_sizes(self) -> None:
        for name in ("num_train_examples", "num_test_examples", "k_motif_size", "v_motif_size", "num_tokens_to_copy"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.frac_noise is not None and not 0 <= self.frac_noise < 1:
            raise ValueError(f"frac_noise must lie in [0, 1), got {self.frac_noise}")
        if self.noise_vocab_size is not None and self.noise_vocab_size < (self.frac_noise > 0):
            least = "at least 1 with frac_noise above 0" if self.frac_noise > 0 else "0 or more"
            raise ValueError(f"noise_vocab_size must be {least}, got {self.noise_vocab_size}")
        if self.kv_map_seed is not None:
            check_seed(self.kv_map_seed, "kv_map_seed")

    def _check_vocabulary(self) -> None:
        if self.task in ("compression", "selective-copying"):
            needed, why = 1, "an ordinary token"
        elif self.task == "fuzzy-in-context-recall":
            needed = max(2 * self.k_motif_size, 2 * self.v_motif_size - 1)
            why = f"the {self.k_motif_size} different tokens of a key and the {self.v_motif_size} of a value"
        else:
            needed, why = 2, "a key and a value"
        if self.num_ordinary_tokens < needed:
            least = self.vocab_size - self.num_ordinary_tokens + needed
            raise ValueError(f"vocab_size must be at least {least} here, to leave room for {why} beside special and "
                             f"noise tokens, got {self.vocab_size}")
        if self.vocab_size > 1 << 31:
            raise ValueError(f"vocab_size must be at most 2^31, got {self.vocab_size}")
        if self.task == "fuzzy-in-context-recall":
            for name, tokens in (("k_motif_size", self.num_keys), ("v_motif_size", self.num_values)):
                motifs = math.perm(tokens, getattr(self, name))
                if motifs > _MAX_MOTIFS:
                    raise ValueError(f"{name} must leave at most {_MAX_MOTIFS} different motifs, as all are tabulated; "
                                     f"{getattr(self, name)} of {tokens} tokens can be ordered in {motifs} ways")

    def _check_length(self) -> None:
        least, why = 2, ""
        if self.task in ("in-context-recall", "noisy-in-context-recall"):
            least, why = 4, ": a pair and its query"
            if self.seq_len % 2:
                raise ValueError(f"seq_len must be even, got {self.seq_len}: keys and values take two positions a pair")
        elif self.task == "fuzzy-in-context-recall":
            least = 2 * (self.k_motif_size + self.v_motif_size) + 1
            why = ": more than twice the longest key and value"
        elif self.task == "selective-copying":
            least, why = 2 * self.num_tokens_to_copy + 2, ": num_tokens_to_copy twice, a blank and the copy token"
        if self.seq_len < least:
            raise ValueError(f"seq_len must be at least {least}{why}, got {self.seq_len}")


def check_seed(seed: int, name: str = "seed") -> None:
    """Raise ValueError unless both of numpy's generators that the tasks use take this seed."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"{name} must be an integer in 0 ... 2^32 - 1, got {seed!r}")
