"""MAD's sequences: bit-identity with mad-lab, every target derivable from its input, mad-lab's faults.

The golden hashes and arrays were computed once with mad-lab's own generators (athms/mad-lab at 0f49a45, mad/data/
instances.py), called as its train.py calls them: numpy's global state and MADConfig's generator from one seed,
first all training examples, then all test examples.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.tasks.mad import TASKS, MADSplits, MADTask, mad_data
from lrm_recall.tasks.mad.memorization import shown_in_training
from lrm_recall.tasks.mqar import IGNORE

RECALL = ("in-context-recall", "noisy-in-context-recall")
FUZZY = "fuzzy-in-context-recall"


def digest(data: MADSplits) -> str:
    return hashlib.sha256(b"".join(array.numpy().tobytes() for split in data for array in split)).hexdigest()[:16]


def rows(data) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of each example."""
    return list(zip(data.inputs.tolist(), data.targets.tolist(), strict=True))


@pytest.mark.parametrize(
    ("task", "settings", "seed", "expected"),
    [
        ("compression", {}, 1, "e96f2ac08ae0e202"),
        ("compression", {"vocab_size": 40, "seq_len": 50, "noise_vocab_size": 8, "frac_noise": 0.3,
                         "as_released": True}, 2, "d7a1424d10875d99"),
        ("in-context-recall", {}, 12345, "19d5df9f11b58926"),
        ("in-context-recall", {"vocab_size": 128, "seq_len": 64, "multi_query": False}, 2**32 - 1, "eb64fc3dae641cfc"),
        ("noisy-in-context-recall", {}, 12345, "80c7ee25fcbad59b"),
        ("noisy-in-context-recall", {"vocab_size": 35, "noise_vocab_size": 5, "frac_noise": 0.8, "seq_len": 40,
                                     "multi_query": False}, 3, "8e568475597ec187"),
        (FUZZY, {"as_released": True}, 12345, "ae78c3c38ad2d4c5"),
        (FUZZY, {"vocab_size": 24, "seq_len": 64, "k_motif_size": 2, "v_motif_size": 3, "noise_vocab_size": 6,
                 "frac_noise": 0.4, "multi_query": False, "as_released": True}, 4, "717b332c0c57df90"),
        ("selective-copying", {}, 12345, "fc81d74e51f3a420"),
        ("selective-copying", {"vocab_size": 64, "seq_len": 197, "num_tokens_to_copy": 96}, 5, "19bf1028841432fe"),
        ("memorization", {}, 12345, "cdefe834b251955a"),
        ("memorization", {"vocab_size": 101, "seq_len": 13}, 6, "b4a82e81220c8f94"),  # an odd length
        ("memorization", {"vocab_size": 64, "noise_vocab_size": 9, "frac_noise": 0.5, "as_released": True}, 7,
         "b425bd55b2ebecd1"),
    ],
)
def test_data_are_bit_identical_to_mad_lab(task, settings, seed, expected):
    data = mad_data(MADTask(task=task, num_train_examples=24, num_test_examples=40, **settings), seed)
    assert {array.dtype for split in data for array in split} == {torch.int64}
    assert digest(data) == expected


@pytest.mark.parametrize(
    ("task", "settings", "inputs", "answers"),
    [
        ("compression", {"seq_len": 8}, [0, 2, 12, 9, 13, 7, 9, 15], dict(enumerate([0, 2, 12, 9, 13, 7, 9, 15]))),
        ("in-context-recall", {"seq_len": 12}, [4, 12, 7, 13, 5, 12, 4, 12, 7, 13, 4], {6: 12, 8: 13, 10: 12}),
        ("noisy-in-context-recall", {"seq_len": 12, "vocab_size": 24},
         [21, 14, 3, 6, 0, 7, 0, 7, 0, 7, 3], {6: 7, 8: 7, 10: 6}),
        (FUZZY, {"seq_len": 24, "k_motif_size": 2, "v_motif_size": 2},
         [15, 15, 15, 1, 3, 8, 6, 5, 8, 2, 5, 8, 3, 0, 12, 7, 0, 2, 10, 1, 5, 14, 6, 5], {23: 8}),
        ("selective-copying", {"seq_len": 12, "num_tokens_to_copy": 4},
         [14, 4, 0, 1, 14, 14, 0, 15, 14, 14, 14, 14], {8: 4, 9: 0, 10: 1, 11: 0}),
        ("memorization", {"seq_len": 6}, [36, 255, 55, 255, 37, 255], {1: 147, 3: 196, 5: 205}),
    ],
)
def test_a_test_example_of_each_task(task, settings, inputs, answers):
    """What mad-lab gives for seed 0, after one training example."""
    data = mad_data(MADTask(task=task, num_train_examples=1, num_test_examples=1, **settings), 0)
    [(tokens, targets)] = rows(data.test)
    assert tokens == inputs
    assert {i: target for i, target in enumerate(targets) if target != IGNORE} == answers


@pytest.mark.parametrize("task", TASKS)
def test_global_random_state_is_neither_read_nor_written(task):
    def state():
        return np.random.get_state()[1].tolist(), np.random.get_state()[2], torch.get_rng_state().tolist()

    small = MADTask(task=task, num_train_examples=3, num_test_examples=3)
    before = state()
    first = mad_data(small, 5)
    assert state() == before
    np.random.seed(5)
    torch.manual_seed(5)
    assert digest(mad_data(small, 5)) == digest(first) != digest(mad_data(small, 6))


@st.composite
def tasks(draw, names=TASKS):
    """Small tasks of every kind, with and without noise."""
    name = draw(st.sampled_from(names))
    found = {"task": name, "num_train_examples": draw(st.integers(1, 6)), "num_test_examples": draw(st.integers(1, 6)),
             "vocab_size": draw(st.integers(12, 40)), "seq_len": 2 * draw(st.integers(4, 30))}
    if name == "selective-copying":
        found["num_tokens_to_copy"] = draw(st.integers(1, found["seq_len"] // 2 - 1))
        return MADTask(**found)
    found["noise_vocab_size"] = draw(st.integers(1, 4))
    found["frac_noise"] = draw(st.sampled_from([0.0, 0.2, 0.7]))
    if name in (*RECALL, FUZZY):
        found["multi_query"] = draw(st.booleans())
    if name == FUZZY:
        found |= {"k_motif_size": draw(st.integers(1, 2)), "v_motif_size": draw(st.integers(1, 3)),
                  "seq_len": found["seq_len"] + 8, "generator": draw(st.sampled_from(["exact", "fast"]))}
    return MADTask(**found)


SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=150, deadline=None)
@given(tasks(), SEEDS)
def test_shapes_vocabulary_seeds_and_disjoint_sets(task, seed):
    data = mad_data(task, seed)
    for examples, count in zip(data, (task.num_train_examples, task.num_test_examples), strict=True):
        assert examples.inputs.shape == examples.targets.shape == (count, task.input_length)
        assert examples.inputs.min() >= 0 and examples.inputs.max() < task.vocab_size
        assert all(t == IGNORE or 0 <= t < task.vocab_size for t in examples.targets.flatten().tolist())
    train, test = ({tuple(row) for row in examples.inputs.tolist()} for examples in data)
    assert not train & test
    assert digest(mad_data(task, seed)) == digest(data)


@settings(max_examples=80, deadline=None)
@given(tasks(RECALL), SEEDS)
def test_recall_asks_for_what_followed_the_key_before(task, seed):
    data = mad_data(task, seed)
    assert torch.equal(data.train.targets[:, :-1], data.train.inputs[:, 1:])  # in training, every next token
    for tokens, targets in rows(data.test):
        latest: dict[int, int] = {}
        answers = {}
        for i, token in enumerate(tokens):
            if token < task.num_keys:
                if token in latest:
                    answers[i] = latest[token]
                if i + 1 < len(tokens):
                    latest[token] = tokens[i + 1]
                    assert task.num_keys <= latest[token] < task.num_ordinary_tokens
        if not task.multi_query:
            assert tokens.index(task.vocab_size - 1) == len(tokens) - 2
            answers = {len(tokens) - 1: answers[len(tokens) - 1]}
        assert {i: target for i, target in enumerate(targets) if target != IGNORE} == answers
        assert len(tokens) - 1 in answers


@settings(max_examples=80, deadline=None)
@given(tasks([FUZZY]), SEEDS)
def test_fuzzy_recall_asks_for_what_followed_the_motif_before(task, seed):
    data = mad_data(task, seed)
    assert torch.equal(data.train.targets[:, :-1], data.train.inputs[:, 1:])
    size = task.k_motif_size
    values = range(task.num_keys, task.num_ordinary_tokens)
    for tokens, targets in rows(data.test):
        pairs, answers = {}, {}
        i = 0
        while i < len(tokens):
            if tokens[i] >= task.num_keys:  # padding, noise, or the token before the query
                i += 1
                continue
            key, start = tuple(tokens[i : i + size]), i + size
            end = start
            while end < len(tokens) and tokens[end] in values:
                end += 1
            if key in pairs and (task.multi_query or end == len(tokens)):
                answers |= {start - 1 + j: token for j, token in enumerate(pairs[key])}
                assert list(pairs[key][: end - start]) == tokens[start:end]
            pairs.setdefault(key, tuple(tokens[start:end]))
            i = end
        assert all(0 < len(value) <= task.v_motif_size for value in list(pairs.values())[:-1])
        assert {i: target for i, target in enumerate(targets) if target != IGNORE} == answers


@settings(max_examples=50, deadline=None)
@given(tasks(["selective-copying"]), SEEDS)
def test_selective_copying_repeats_what_is_not_blank(task, seed):
    blank, copy, n = task.vocab_size - 2, task.vocab_size - 1, task.num_tokens_to_copy
    for tokens, targets in (row for split in mad_data(task, seed) for row in rows(split)):
        shown = tokens[: tokens.index(copy)]
        assert targets == [IGNORE] * (len(tokens) - n) + [token for token in shown if token != blank]
        assert tokens[len(shown) + 1 :] == [blank] * n
        assert shown[-1] != blank  # mad-lab puts every blank before a token


@settings(max_examples=50, deadline=None)
@given(tasks(["compression"]), SEEDS)
def test_compression_scores_all_but_noise(task, seed):
    for tokens, targets in (row for split in mad_data(task, seed) for row in rows(split)):
        assert tokens.index(task.vocab_size - 1) == len(tokens) - 1
        noise = range(task.num_ordinary_tokens, task.vocab_size - 1)
        assert targets == [IGNORE if token in noise else token for token in tokens]


@settings(max_examples=50, deadline=None)
@given(tasks(["memorization"]), SEEDS)
def test_memorization_has_one_map_for_both_sets(task, seed):
    value_of: dict[int, int] = {}
    for tokens, targets in (row for split in mad_data(task, seed) for row in rows(split)):
        for i, target in enumerate(targets):
            assert (target == IGNORE) == (tokens[i] != task.vocab_size - 1)
            if target != IGNORE:
                assert tokens[i - 1] < task.num_keys <= target < task.num_ordinary_tokens
                assert value_of.setdefault(tokens[i - 1], target) == target
        assert any(target != IGNORE for target in targets)
    assert len(set(value_of.values())) == len(value_of)


def test_facts_have_a_seed_of_their_own_on_request():
    """mad-lab's MADConfig takes the facts from the data's seed; its generator's `kv_map_seed` has no effect."""

    def facts(seed: int, kv_map_seed: int | None) -> dict[int, int]:
        task = MADTask(task="memorization", vocab_size=16, num_train_examples=50, kv_map_seed=kv_map_seed)
        data = mad_data(task, seed).train
        asked = data.targets != IGNORE
        return dict(zip(data.inputs.roll(1)[asked].tolist(), data.targets[asked].tolist(), strict=True))

    assert facts(1, None) == facts(1, 1) != facts(2, None)
    assert facts(1, 9) == facts(2, 9)


def test_facts_that_training_never_showed():
    """At mad-lab's largest vocabulary, 256 sequences show 1 - e^-1 of the facts: 4096 draws of 4095 keys."""
    data = mad_data(MADTask(task="memorization", vocab_size=8192))
    known = shown_in_training(data.train.targets, data.test.targets)
    scored = data.test.targets != IGNORE
    assert 0.60 < known.sum().item() / scored.sum().item() < 0.66
    seen = set(data.train.targets.flatten().tolist()) - {IGNORE}
    for is_known, target in zip(known[scored][:500].tolist(), data.test.targets[scored][:500].tolist(), strict=True):
        assert is_known == (target in seen)
    base = mad_data(MADTask(task="memorization"))
    assert torch.equal(shown_in_training(base.train.targets, base.test.targets), base.test.targets != IGNORE)


def test_compression_noise_is_scored_only_as_released():
    task = MADTask(task="compression", noise_vocab_size=4, frac_noise=0.5, num_train_examples=9, num_test_examples=9)
    meant, released = mad_data(task), mad_data(replace(task, as_released=True))
    for ours, theirs in zip(meant, released, strict=True):
        assert torch.equal(ours.inputs, theirs.inputs) and torch.equal(theirs.targets, theirs.inputs)
        noise = (ours.inputs >= 11) & (ours.inputs < 15)
        assert noise.any() and torch.equal(ours.targets == IGNORE, noise)


def test_memorization_facts_reach_into_the_noise_only_as_released():
    task = MADTask(task="memorization", vocab_size=64, noise_vocab_size=20, frac_noise=0.1, num_train_examples=40)
    first_noise = 64 - 1 - 20
    assert mad_data(task).train.targets.max() < first_noise
    assert mad_data(replace(task, as_released=True)).train.targets.max() >= first_noise


def test_fuzzy_queries_whose_pair_was_never_shown_are_scored_only_as_released():
    task = MADTask(task=FUZZY, num_train_examples=1, num_test_examples=1500, generator="fast")
    ours, theirs = mad_data(task).test, mad_data(replace(task, as_released=True)).test
    assert torch.equal(ours.inputs, theirs.inputs)
    unshown = (ours.targets != theirs.targets).any(1)
    assert 0.01 < unshown.double().mean() < 0.04
    for tokens, ours_row, theirs_row in zip(ours.inputs[unshown].tolist(), ours.targets[unshown].tolist(),
                                            theirs.targets[unshown].tolist(), strict=True):
        differing = [i for i, (a, b) in enumerate(zip(ours_row, theirs_row, strict=True)) if a != b]
        assert differing[-1] == len(tokens) - 1 and {ours_row[i] for i in differing} == {IGNORE}
        query = tokens[differing[0] - 2 : differing[0] + 1]
        assert not any(tokens[i : i + 3] == query for i in range(differing[0] - 2))


def test_recall_goes_on_where_noise_takes_every_pair():
    """mad-lab stops with "a cannot be empty" at most of such seeds."""
    task = MADTask(task="noisy-in-context-recall", seq_len=4, frac_noise=0.9, num_train_examples=50,
                   num_test_examples=50)
    assert (mad_data(task).test.targets != IGNORE).sum(1).eq(1).all()


def test_test_inputs_seen_in_training_are_drawn_anew():
    task = MADTask(task="compression", vocab_size=3, seq_len=6, num_train_examples=40, num_test_examples=20)
    data = mad_data(task)  # of 32 sequences, training shows about 23
    train, test = ({tuple(row) for row in examples.inputs.tolist()} for examples in data)
    assert len(train) > 16 and not train & test and (data.test.inputs == data.test.targets).all()


def test_too_few_sequences_to_test_on():
    task = MADTask(task="compression", vocab_size=3, seq_len=3, num_train_examples=200, num_test_examples=5)
    with pytest.raises(ValueError, match="after 100 draws 5 of 5 test inputs are still training inputs"):
        mad_data(task)


def test_fast_fuzzy_recall_draws_from_the_distribution_of_exact():
    """Counts of the query's key and of the size of its value agree (chi-square of two samples)."""
    tables = []
    for generator, seed in (("exact", 1), ("fast", 2)):
        task = MADTask(task=FUZZY, vocab_size=8, seq_len=20, k_motif_size=2, v_motif_size=3, generator=generator,
                       multi_query=False, as_released=True, num_train_examples=1, num_test_examples=3000)
        test = mad_data(task, seed).test
        size = (test.targets != IGNORE).sum(1)  # [N]
        last = test.inputs.shape[1] - size  # [N], the key's last token
        first_token, second_token = (test.inputs.gather(1, (last - back).unsqueeze(1)).squeeze(1) for back in (1, 0))
        tables.append(torch.bincount((first_token * 3 + second_token) * 3 + size - 1, minlength=27))
    ours, theirs = tables
    cells = ours + theirs > 0
    statistic = ((ours - theirs)[cells] ** 2 / (ours + theirs)[cells]).sum()
    freedom = int(cells.sum()) - 1
    assert freedom == 3 * 2 * 3 - 1
    assert abs(statistic - freedom) < 4.5 * (2 * freedom) ** 0.5


def test_training_data_of_default_size_take_a_second_each():
    """Measured 0.02 to 1 s; the bound allows for a busy machine. A tenth of the examples is made here."""
    start = time.perf_counter()
    for task in TASKS:
        mad_data(MADTask(task=task, num_train_examples=1280, num_test_examples=128))
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "0", True])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match=r"seed must be an integer in 0 ... 2\^32 - 1, got"):
        mad_data(MADTask(task="compression"), seed)
