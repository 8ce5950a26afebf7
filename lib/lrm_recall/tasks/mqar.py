"""Multi-query associative recall (MQAR): data and scoring.

A sequence lists key-value pairs, then asks for the value of each key once, at power-law distances; the other
positions are filler. The task is from Arora et al. 2024; Resona, section 4.2.1 and appendix A.3.

    N examples, L input length, P key-value pairs, V vocabulary size, S = (L - 2P) / 2 slots for a query

Keys are drawn from 1 ... V//2 - 1 and values from V//2 ... V - 1, without replacement within a sequence;
token 0 is the filler. Query p stands at position 2P + 2 g_p and its label at the same index, where the slots
g are drawn without replacement with probability proportional to (g + 1)^(power_a - 1), in the order of the
keys.

Two generators draw from this one distribution:

`exact`  the very batches of zoology's `multiquery_ar` for the same arguments and seed. That function shuffles
         all keys and all values of the vocabulary for each row, on one sequential Mersenne Twister stream,
         and how much of it a row takes depends on its words (rejection), so all N * 2 * 1.39 * V/2 words must
         be drawn in turn. At V = 8192 drawing the bare words takes a fifth of zoology's time: no exact
         generator on numpy's stream can be 20 times faster. What is dropped here is the rest: its [N, V/2]
         tables (655 MB each for 20,000 rows) and the use of the global random state.
`fast`   vectorised, numpy's PCG64: Floyd's sampling for keys and values, an exponential race for the slots.
         Repeatable for a seed and a numpy version.

Microseconds a row on one core, V = 8192 and P = L / 16:
            L = 64    128    256    512
    zoology     97    102    103    110
    exact       87     91     95    101
    fast      0.27   0.64    1.6    3.8
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # label of a position that asks nothing: what torch's cross entropy skips
FILLER = 0
GENERATORS = ("exact", "fast")
_SPLITS = ("train", "valid", "test")


class MQARData(NamedTuple):
    """One set of examples: inputs [N, L] int64, and labels [N, L] int64, -100 where nothing is asked."""

    inputs: Tensor
    labels: Tensor


class Accuracy(NamedTuple):
    """Both readings of accuracy, each a fraction in [0, 1]."""

    position: float  # labelled positions that are right (what zoology reports)
    sequence: float  # sequences with every labelled position right ("the entire output" of Resona, 4.2.1)


def mqar(
    *,
    vocab_size: int = 8192,
    num_examples: int,
    input_length: int,
    num_kv_pairs: int,
    seed: int,
    power_a: float = 0.01,
    random_non_queries: bool = False,
    generator: str = "exact",
) -> MQARData:
    """Generate MQAR examples.

    Args:
        vocab_size: V; the lower half (without 0) are keys, the upper half values.
        num_examples: N.
        input_length: L, even; 4 positions a pair are needed: key, value, query and the slot after it.
        num_kv_pairs: P.
        seed: 0 ... 2^32 - 1. `split_seed` gives seeds whose training, validation and test sets differ.
        power_a: exponent of the distances between a pair and its query; 1 is uniform, 0.01 prefers near ones.
        random_non_queries: replace the filler, including the position after a query, by tokens drawn
            uniformly from the whole vocabulary (which may repeat a key). Both settings are in the literature:
            zoology's Figure 2 has False, its later default is True, the Resona paper does not say.
        generator: "exact" or "fast", see the module's docstring.

    Returns:
        inputs and labels, [N, L] int64 each; every row has exactly P labels.

    Raises:
        ValueError: no such data exist; the message names the value and what is allowed.
    """
    check_arguments(vocab_size=vocab_size, num_examples=num_examples, input_length=input_length,
                    num_kv_pairs=num_kv_pairs, seed=seed, power_a=power_a, generator=generator)
    num_keys = vocab_size // 2 - 1
    num_values = vocab_size - vocab_size // 2
    slot_weights = _slot_probabilities((input_length - 2 * num_kv_pairs) // 2, power_a)  # [S]
    if generator == "exact":
        legacy = np.random.RandomState(seed)
        # one call a row and array: numpy's `choice(replace=False)` is the head of a permutation of everything
        rows = range(num_examples)
        keys = np.stack([legacy.permutation(num_keys)[:num_kv_pairs] for _ in rows])  # [N, P]
        values = np.stack([legacy.permutation(num_values)[:num_kv_pairs] for _ in rows])  # [N, P]
        slots = np.stack([legacy.choice(len(slot_weights), num_kv_pairs, replace=False, p=slot_weights)
                          for _ in rows])  # [N, P]
    else:
        rng = np.random.default_rng(seed)
        keys = _distinct(rng, num_examples, num_kv_pairs, num_keys)  # [N, P]
        values = _distinct(rng, num_examples, num_kv_pairs, num_values)  # [N, P]
        slots = _race(rng, num_examples, num_kv_pairs, slot_weights)  # [N, P]
    data = _lay_out(keys + 1, values + vocab_size // 2, slots, input_length)
    return _fill_randomly(data, vocab_size, seed) if random_non_queries else data


def split_seed(seed: int, split: str) -> int:
    """The data seed of one split of the run with this seed.

    Each split owns a quarter of the seeds 0 ... 2^32 - 1, so the test set of one run is never the training or
    validation set of any run; inside its quarter the seed is a hash, so neighbouring runs share nothing.

    Raises:
        ValueError: `split` is not train, valid or test.
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}")
    digest = hashlib.sha256(f"mqar {split} {seed}".encode()).digest()
    return (_SPLITS.index(split) << 30) | (int.from_bytes(digest[:4]) >> 2)


def accuracy(predictions: Tensor, labels: Tensor) -> Accuracy:
    """Score predictions against labels, per position and per sequence.

    Args:
        predictions: [N, M] token ids; what stands where `labels` is -100 does not matter.
        labels: [N, M] int64, -100 where nothing is asked; M is L, or P if gathered.

    Raises:
        ValueError: shapes differ, or a sequence has no labelled position (its score would be undefined).
    """
    if predictions.shape != labels.shape or labels.dim() != 2:
        raise ValueError(f"predictions and labels must both be [N, M], got {list(predictions.shape)} "
                         f"and {list(labels.shape)}")
    asked = labels != IGNORE  # [N, M]
    if not asked.any(dim=1).all() or len(labels) == 0:
        raise ValueError("every sequence must have at least one labelled position; "
                         f"{int((~asked.any(dim=1)).sum())} of {len(labels)} have none")
    right = (predictions == labels) & asked  # [N, M]
    position = right.sum().item() / asked.sum().item()
    return Accuracy(position, (right | ~asked).all(dim=1).double().mean().item())


def check_arguments(
    *,
    vocab_size: int,
    num_examples: int,
    input_length: int,
    num_kv_pairs: int,
    seed: int,
    power_a: float,
    generator: str,
) -> None:
    """Raise ValueError for arguments of `mqar` that no data can satisfy: zoology's conditions, and the types."""
    integers = {"vocab_size": vocab_size, "num_examples": num_examples, "input_length": input_length,
                "num_kv_pairs": num_kv_pairs, "seed": seed}
    for name, value in integers.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise ValueError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    for name in ("num_examples", "num_kv_pairs"):
        if integers[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {integers[name]}")
    if input_length % 2:
        raise ValueError(f"input_length must be even, got {input_length}")
    if 4 * num_kv_pairs > input_length:
        raise ValueError(f"num_kv_pairs must be at most input_length / 4 = {input_length // 4}, "
                         f"got {num_kv_pairs}; a pair takes two positions and its query two more")
    if vocab_size <= input_length:
        raise ValueError(f"vocab_size must be greater than input_length ({input_length}), got {vocab_size}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0 ... 2^32 - 1, got {seed}")
    if not isinstance(power_a, int | float) or isinstance(power_a, bool) or not 0 < power_a < float("inf"):
        raise ValueError(f"power_a must be a positive number, got {power_a!r}")
    if generator not in GENERATORS:
        raise ValueError(f"generator must be one of {', '.join(GENERATORS)}, got {generator!r}")
    _slot_probabilities((input_length - 2 * num_kv_pairs) // 2, power_a)


def _slot_probabilities(num_slots: int, power_a: float) -> np.ndarray:
    """Probability of each slot [S] float64; the exact stream depends on zoology's order of operations."""
    with np.errstate(over="ignore", invalid="ignore"):
        weights = power_a * np.arange(1, num_slots + 1) ** (power_a - 1)  # [S]
        probabilities = weights / weights.sum()
    if not (probabilities > 0).all():
        raise ValueError(f"power_a must leave each of {num_slots} slots a probability above zero in double "
                         f"precision, got {power_a}; 0.01 to 1 is usual")
    return probabilities


def _distinct(rng: np.random.Generator, rows: int, size: int, population: int) -> np.ndarray:
    """For each row an ordered sample without replacement from 0 ... population - 1; [rows, size] int64.

    Floyd's algorithm, one column at a time for all rows: column i draws from 0 ... m, where m is
    population - size + i, and takes m itself where the draw is taken already. That makes every set equally
    likely but not every order, so each row is shuffled.
    """
    sample = np.empty((size, rows), dtype=np.int64)  # columns first: a step then touches whole rows
    for i in range(size):
        largest = population - size + i
        draw = rng.integers(0, largest, size=rows, endpoint=True)  # [rows]
        taken = (sample[:i] == draw).any(axis=0)  # [rows]
        sample[i] = np.where(taken, largest, draw)
    return rng.permuted(sample.T, axis=1)  # [rows, size]


def _race(rng: np.random.Generator, rows: int, size: int, probabilities: np.ndarray) -> np.ndarray:
    """For each row `size` slots drawn one after another without replacement; [rows, size] int64.

    Slots race with exponential arrival times of rate p; the order of arrival is that of successive draws.
    Doubles above zero sort as their bits do, so each time carries its slot in its lowest bits (about ten of
    53, which decide nothing) and one plain sort is enough, several times faster than an argsort.
    """
    times = rng.standard_exponential((rows, len(probabilities))) / probabilities  # [rows, S]
    low_bits = (1 << len(probabilities).bit_length()) - 1
    times_and_slots = times.view(np.int64) & ~low_bits | np.arange(len(probabilities))  # [rows, S]
    times_and_slots.sort(axis=1)
    return times_and_slots[:, :size] & low_bits  # [rows, size]


def _lay_out(keys: np.ndarray, values: np.ndarray, slots: np.ndarray, input_length: int) -> MQARData:
    """Write pairs and queries, all [N, P], into sequences [N, L]; the rest is filler."""
    num_examples, num_kv_pairs = keys.shape
    inputs = np.full((num_examples, input_length), FILLER, dtype=np.int64)  # [N, L]
    labels = np.full((num_examples, input_length), IGNORE, dtype=np.int64)  # [N, L]
    inputs[:, 0 : 2 * num_kv_pairs : 2] = keys
    inputs[:, 1 : 2 * num_kv_pairs : 2] = values
    positions = 2 * num_kv_pairs + 2 * slots  # [N, P]
    np.put_along_axis(inputs, positions, keys, axis=1)
    np.put_along_axis(labels, positions, values, axis=1)
    return MQARData(torch.from_numpy(inputs), torch.from_numpy(labels))


def _fill_randomly(data: MQARData, vocab_size: int, seed: int) -> MQARData:
    """Draw the filler uniformly from the vocabulary: zoology's draw after `torch.manual_seed(seed)`."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randint(vocab_size, data.inputs.shape, generator=rng)  # [N, L]
    return MQARData(torch.where(data.inputs == FILLER, noise, data.inputs), data.labels)
