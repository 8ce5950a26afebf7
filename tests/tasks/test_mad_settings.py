"""What a MAD task can be told, what is refused, and the settings of the benchmark."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import pytest

from lrm_recall.tasks.mad import TASKS, MADTask, benchmark, mad_data


@pytest.mark.parametrize("task", TASKS)
def test_a_task_survives_json(task):
    made = MADTask(task=task)
    assert MADTask(**json.loads(json.dumps(asdict(made)))) == made
    assert hash(made) == hash(MADTask(task=task))


def test_base_settings_are_those_of_mad_lab():
    recall = MADTask(task="in-context-recall")
    assert (recall.vocab_size, recall.seq_len, recall.num_train_examples, recall.multi_query) == (16, 128, 12_800, True)
    assert recall.num_test_examples == 1_280 and recall.num_tokens_to_copy is None
    noisy = MADTask(task="noisy-in-context-recall")
    assert (noisy.vocab_size, noisy.noise_vocab_size, noisy.frac_noise) == (32, 16, 0.2)
    fuzzy = MADTask(task="fuzzy-in-context-recall")
    assert (fuzzy.vocab_size, fuzzy.k_motif_size, fuzzy.v_motif_size) == (16, 3, 3)
    copying = MADTask(task="selective-copying")
    assert (copying.vocab_size, copying.seq_len, copying.num_tokens_to_copy) == (16, 256, 16)
    memory = MADTask(task="memorization")
    assert (memory.vocab_size, memory.seq_len, memory.num_train_examples) == (256, 32, 256)
    compression = MADTask(task="compression")
    assert (compression.vocab_size, compression.seq_len, compression.decodes_last_position) == (16, 32, True)
    assert not any(MADTask(task=task).decodes_last_position for task in TASKS if task != "compression")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "in-context-recal"}, r"no MAD task 'in-context-recal' \(did you mean 'in-context-recall'\?\)"),
        ({"task": 3}, "no MAD task 3; there are compression,"),
        ({"task": "compression", "num_tokens_to_copy": 4}, "compression has no num_tokens_to_copy, got 4; it has"),
        ({"task": "selective-copying", "frac_noise": 0.1}, "selective-copying has no frac_noise, got 0.1"),
        ({"task": "in-context-recall", "k_motif_size": 2}, "in-context-recall has no k_motif_size"),
        ({"task": "compression", "generator": "fast"}, "compression has no generator, got 'fast'"),
        ({"task": "compression", "vocab_size": "16"}, r"'vocab_size' must be int \| None, got '16' \(str\)"),
        ({"task": "compression", "vocab_size": 16.0}, r"'vocab_size' must be int \| None, got 16.0 \(float\)"),
        ({"task": "compression", "num_test_examples": None}, "'num_test_examples' must be int, got None"),
        ({"task": "fuzzy-in-context-recall", "generator": "quick"}, "'generator' must be .*, got 'quick'"),
        ({"task": "compression", "num_train_examples": 0}, "num_train_examples must be at least 1, got 0"),
        ({"task": "compression", "num_test_examples": -1}, "num_test_examples must be at least 1, got -1"),
        ({"task": "selective-copying", "num_tokens_to_copy": 0}, "num_tokens_to_copy must be at least 1, got 0"),
        ({"task": "fuzzy-in-context-recall", "k_motif_size": 0}, "k_motif_size must be at least 1, got 0"),
        ({"task": "fuzzy-in-context-recall", "v_motif_size": 0}, "v_motif_size must be at least 1, got 0"),
        ({"task": "compression", "frac_noise": 1.0}, r"frac_noise must lie in \[0, 1\), got 1.0"),
        ({"task": "compression", "frac_noise": float("nan")}, r"frac_noise must lie in \[0, 1\), got nan"),
        ({"task": "memorization", "frac_noise": 0.1}, "noise_vocab_size must be at least 1 with frac_noise .*, got 0"),
        ({"task": "memorization", "noise_vocab_size": -1}, "noise_vocab_size must be 0 or more, got -1"),
        ({"task": "memorization", "kv_map_seed": -1}, "kv_map_seed must be an integer in 0 ... 2"),
        ({"task": "compression", "vocab_size": 1}, "vocab_size must be at least 2 here, to leave room for an ordinary"),
        ({"task": "selective-copying", "vocab_size": 2}, "vocab_size must be at least 3 here"),
        ({"task": "in-context-recall", "vocab_size": 1}, "vocab_size must be at least 2 here, .* a key and a value"),
        ({"task": "in-context-recall", "vocab_size": 2, "multi_query": False}, "vocab_size must be at least 3 here"),
        ({"task": "noisy-in-context-recall", "vocab_size": 17}, "vocab_size must be at least 18 here"),
        ({"task": "memorization", "vocab_size": 2}, "vocab_size must be at least 3 here"),
        ({"task": "fuzzy-in-context-recall", "vocab_size": 6}, "vocab_size must be at least 7 here"),
        ({"task": "compression", "vocab_size": 2**31 + 1}, "vocab_size must be at most 2"),
        ({"task": "fuzzy-in-context-recall", "vocab_size": 400}, "k_motif_size must leave at most 1048576 .* motifs"),
        ({"task": "fuzzy-in-context-recall", "v_motif_size": 9, "vocab_size": 30}, "v_motif_size must leave at most"),
        ({"task": "compression", "seq_len": 1}, "seq_len must be at least 2, got 1"),
        ({"task": "memorization", "seq_len": 1}, "seq_len must be at least 2, got 1"),
        ({"task": "in-context-recall", "seq_len": 129}, "seq_len must be even, got 129"),
        ({"task": "noisy-in-context-recall", "seq_len": 2}, "seq_len must be at least 4: a pair and its query, got 2"),
        ({"task": "fuzzy-in-context-recall", "seq_len": 12}, "seq_len must be at least 13: more than twice"),
        ({"task": "selective-copying", "seq_len": 33}, "seq_len must be at least 34: num_tokens_to_copy twice"),
    ],
)
def test_a_task_that_cannot_be_is_one_clear_error(settings, message):
    with pytest.raises(ValueError, match=message):
        MADTask(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"task": "compression", "vocab_size": 4, "seq_len": 6},
        {"task": "in-context-recall", "vocab_size": 5, "multi_query": False, "seq_len": 16},
        {"task": "noisy-in-context-recall", "vocab_size": 26, "seq_len": 4},
        {"task": "fuzzy-in-context-recall", "vocab_size": 7, "seq_len": 13},
        {"task": "fuzzy-in-context-recall", "vocab_size": 8, "seq_len": 13, "multi_query": False},
        {"task": "fuzzy-in-context-recall", "vocab_size": 6, "seq_len": 11, "v_motif_size": 3, "k_motif_size": 2},
        {"task": "selective-copying", "vocab_size": 3, "seq_len": 34},
        {"task": "memorization", "vocab_size": 6, "seq_len": 16},
    ],
)
def test_small_tasks_can_be_made(settings):
    task = MADTask(num_train_examples=2, num_test_examples=2, **settings)
    assert mad_data(task).test.inputs.shape == (2, task.input_length)


def test_the_benchmark_is_mad_labs():
    found = benchmark()
    assert len(found) == len(set(found)) == 66
    assert Counter(task.task for task in found) == {
        "compression": 11, "in-context-recall": 11, "noisy-in-context-recall": 14, "fuzzy-in-context-recall": 11,
        "selective-copying": 13, "memorization": 6,
    }
    for name in TASKS:
        base, *changed = benchmark([name])
        assert base == MADTask(task=name)
        for task in changed:
            different = {field for field, value in asdict(task).items() if value != getattr(base, field)}
            assert len(different) == 1
    assert {task.frac_noise for task in benchmark(["noisy-in-context-recall"])} == {0.2, 0.4, 0.6, 0.8}
    assert {task.vocab_size for task in benchmark(["memorization"])} == {256, 512, 1024, 2048, 4096, 8192}


def test_the_benchmark_takes_settings_for_all():
    assert {task.num_test_examples for task in benchmark(num_test_examples=128)} == {128}
    assert all(task.generator == "fast" for task in benchmark(["fuzzy-in-context-recall"], generator="fast"))
    with pytest.raises(ValueError, match="did you mean 'memorization'"):
        benchmark(["memorisation"])
