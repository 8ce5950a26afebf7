"""Training of MAD runs: what is learned, what is repeatable, what is refused; the grid; the notebook's parameters."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrm_recall.code_hash import import_closure
from lrm_recall.tasks.mad import LEARNING_RATES, TASKS, WEIGHT_DECAYS, MADTask, accuracy, benchmark, mad_data
from lrm_recall.tasks.mqar import IGNORE
from lrm_recall.train import mad
from lrm_recall.train import small as small_models
from lrm_recall.train.mad import MADRun, code_modules, run_mad
from lrm_recall.train.mad_autoencoder import AutoEncoder, logits_of_decoder, sinusoids
from lrm_recall.train.mad_grid import MIXER_ARGS, expected_seconds, mad_runs
from lrm_recall.train.start import initial_model
from lrm_recall.train.synthetic_runs import mad_grid_of

RESONA = {"layers": [1], "chunk_size": 4, "top_k": 1}
SHORT = {"vocab_size": 12, "seq_len": 24, "num_train_examples": 256, "num_test_examples": 128}
MIXERS = ("attention", "mamba", "mamba2", "rwkv5", "hyena")


def small(task: str = "in-context-recall", sizes: dict | None = None, **changes) -> MADRun:
    """A run of a fraction of a second."""
    return MADRun(**{
        "mixer": "attention", "mixer_args": {"num_heads": 2}, "d_model": 32,
        "task": MADTask(task=task, **(sizes or SHORT)), "num_valid": 128,
        "learning_rate": 3e-3, "max_epochs": 2, "batch_size": 32, **changes,
    })


def without_seconds(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in history]


# --- training ---


def test_resona_recalls_what_its_base_does_not():
    sizes = {**SHORT, "num_train_examples": 1024, "seq_len": 32}
    base = small(sizes=sizes, mixer="rwkv5", mixer_args={"head_dim": 4}, max_epochs=6, learning_rate=5e-3)
    with_resona = replace(base, resona={"layers": [0, 1], "chunk_size": 2, "top_k": 1})
    scores = [run_mad(run)["metrics"]["macro_accuracy"] for run in (base, with_resona)]
    assert scores[1] > 0.85 and scores[1] > scores[0] + 0.2


def test_the_last_position_carries_a_sequence_that_the_decoder_reads():
    sizes = {**SHORT, "vocab_size": 8, "seq_len": 4, "num_train_examples": 512}
    result = run_mad(small("compression", sizes=sizes, mixer="rwkv5", mixer_args={"head_dim": 4}, max_epochs=12,
                           learning_rate=1e-2))  # fmt: skip
    assert result["metrics"]["macro_accuracy"] > 0.6  # a constant answer has 0.25
    assert result["history"][-1]["train_loss"] < 0.5 * result["history"][0]["train_loss"]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_with_and_without_resona(task):
    sizes = {"num_train_examples": 96, "num_test_examples": 32, "seq_len": 40}
    if task == "fuzzy-in-context-recall":
        sizes["generator"] = "fast"
    for resona in (None, RESONA):
        run = small(task, sizes=sizes, resona=resona, max_epochs=3, num_valid=32)
        losses = [epoch["train_loss"] for epoch in run_mad(run)["history"]]
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_of_the_paper_trains_in_mad_labs_shape(mixer):
    task = MADTask(task="memorization", num_train_examples=128, num_test_examples=64)
    (run,) = mad_runs(mixers=[mixer], tasks=[task], variants=["base"], learning_rates=[1e-3], weight_decays=[0.1],
                      settings={"max_epochs": 2, "num_valid": 64, "batch_size": 64})  # fmt: skip
    losses = [epoch["train_loss"] for epoch in run_mad(run)["history"]]
    assert losses[-1] < losses[0]
    assert run.mixer_args.items() >= MIXER_ARGS.get(mixer, {}).items()


def test_result_is_complete_and_plain_json():
    heard = []
    run = small(target_accuracy=None, sizes={**SHORT, "num_train_examples": 100})
    result = run_mad(run, progress=heard.append)
    assert json.loads(json.dumps(result)) == result
    assert set(result) == {"metrics", "history", "runtime_s", "peak_memory_mb"} and heard == result["history"]
    metrics = result["metrics"]
    assert (metrics["epochs"], metrics["steps"]) == (2, 8)  # 100 examples in batches of 32, twice
    model = initial_model(run.to_model_config(), run.seed)
    assert metrics["parameters"] == model.num_parameters() and metrics["state_size"] == model.state_size(23)
    assert metrics["sequence_accuracy"] <= metrics["accuracy"]
    assert metrics["valid_accuracy"] == heard[-1]["valid_accuracy"]


def test_same_seed_same_metrics_and_no_trace_in_torch():
    run = small("compression", resona=RESONA)
    state = torch.get_rng_state()
    first = run_mad(replace(run))  # a new run is checked anew: that leaves no trace either
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12345)
    second, other = run_mad(run), run_mad(replace(run, seed=1))

    def timeless(result):
        return {**result["metrics"], "tokens_per_s": None}, without_seconds(result["history"])

    assert timeless(first) == timeless(second)
    assert first["history"][0]["train_loss"] != other["history"][0]["train_loss"]


def test_training_ends_with_the_epoch_that_reaches_the_macro_accuracy():
    run = small(max_epochs=4, target_accuracy=None)
    full = without_seconds(run_mad(run)["history"])
    target = max(epoch["valid_accuracy"] for epoch in full[:2])
    stopped = without_seconds(run_mad(replace(run, target_accuracy=target))["history"])
    assert stopped == full[: len(stopped)] and len(stopped) <= 2


def test_the_scores_are_those_of_the_task_itself(monkeypatch):
    run, heard = small(), []

    def listens(*arguments):
        heard.append(fit(*arguments))
        return heard[0]

    fit = small_models.fit
    monkeypatch.setattr(small_models, "fit", listens)
    got, test = run_mad(run)["metrics"], mad_data(run.task, run.seed).test
    positions = mad.mad_splits(run).test.positions  # [N, P]
    everywhere = torch.zeros_like(test.targets).scatter(1, positions, heard[0].predictions)  # [N, L]
    everywhere[test.targets == IGNORE] = 0
    want = accuracy(everywhere, test.targets, run.task.vocab_size)
    assert (got["macro_accuracy"], got["accuracy"], got["sequence_accuracy"]) == tuple(want)
    assert want.position > 0.05


# --- the data of a run ---


@pytest.mark.parametrize("task", TASKS)
def test_training_and_test_sets_are_mad_labs_and_validation_is_another_draw(task):
    sizes = {"num_train_examples": 64, "num_test_examples": 32}
    asked = MADTask(task=task, **sizes)
    run = MADRun(mixer="attention", task=asked, learning_rate=1e-3, num_valid=48, seed=7)
    splits, made = mad.mad_splits(run), mad_data(asked, 7)
    assert torch.equal(splits.train.inputs, made.train.inputs) and torch.equal(splits.test.inputs, made.test.inputs)
    assert splits.valid.inputs.shape == (48, asked.input_length)
    known = {bytes(row.numpy()) for split in (splits.train, splits.test) for row in split.inputs}
    assert not any(bytes(row.numpy()) in known for row in splits.valid.inputs)
    if task == "memorization":  # the same facts: a model that knows them answers the validation set
        facts = {}
        for split in splits:
            for row, place, answer in zip(split.inputs, split.positions, split.answers, strict=True):
                for position, value in zip(place.tolist(), answer.tolist(), strict=True):
                    assert facts.setdefault(int(row[position - 1]), value) == value


def test_the_decoder_sees_the_last_position_alone():
    run = small("compression")
    model = mad._initial_model(run)
    assert isinstance(model, AutoEncoder)
    split = mad.mad_splits(run).train
    batch = type(split)(*(tensor[:5] for tensor in split))
    logits = logits_of_decoder(model, batch)
    assert logits.shape == (5 * 24, 12)
    hidden = model.encoder(input_ids=batch.inputs, use_cache=False).last_hidden_state  # [B, L, D]
    by_place = torch.stack([model.decoder(hidden[:, -1], torch.full((5, 1), place))[:, 0] for place in range(24)], 1)
    torch.testing.assert_close(logits.view(5, 24, 12), by_place)


@given(length=st.integers(1, 40), half=st.integers(2, 20))
def test_places_are_told_apart(length, half):
    places = sinusoids(length, 2 * half)
    assert places.shape == (length, 2 * half) and places.abs().max() <= 1
    torch.testing.assert_close((places**2).sum(1), torch.full((length,), float(half)))  # sin^2 + cos^2
    assert len(torch.unique(places, dim=0)) == length


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "mambo"}, "unknown mixer 'mambo'"),
        ({"mixer_args": {"heads": 2}}, "has no option 'heads'"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above zero"),
        ({"learning_rate": 1e-3, "min_learning_rate": 1e-2}, "min_learning_rate must lie in 0"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"max_epochs": 0}, "max_epochs must be at least 1"),
        ({"num_valid": 0}, "num_valid must be at least 1"),
        ({"seed": -1}, "seed must be an integer"),
        ({"d_model": 32.0}, "option 'd_model' must be int"),
        ({"resona": {"layers": [2]}}, "this model has layers 0 to 1"),
        ({"resona": {"layers": [0], "chunk_size": 23}}, "chunk_size must be below the input length"),
    ],
)
def test_a_run_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
    with pytest.raises(ValueError, match="task must be a MADTask"):
        MADRun(mixer="attention", task={"task": "compression"}, learning_rate=1e-3)


# --- the grid ---


def test_the_grid_is_every_combination_and_fits_the_benchmark():
    tasks = [task for name in ("memorization", "compression") for task in benchmark([name])[:3]]
    runs = mad_runs(mixers=["mamba", "hyena"], tasks=tasks, variants=["base", "resona1"])
    assert len(runs) == len({repr(asdict(run)) for run in runs}) == 2 * 6 * 2 * 3 * 2
    assert {(run.learning_rate, run.weight_decay) for run in runs} == {
        (rate, decay) for rate in LEARNING_RATES for decay in WEIGHT_DECAYS}  # fmt: skip
    for run in runs:
        assert run.batch_size == 128 and run.max_epochs == 200 and run.seed == 12345
        assert run.to_model_config().intermediate_size == 352  # mad-lab's SwiGLU of width 128
        assert run.mixer != "hyena" or run.mixer_args["l_max"] == run.task.input_length
        assert run.resona is None or (run.resona["chunk_size"], run.resona["top_k"]) == (6, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ["resona"]}, "a variant is 'base' or 'resona' and layers"),
        ({"tasks": []}, "tasks must list at least one value"),
        ({"mixer_args": {"gla": {}}}, "mixer_args has an unknown name 'gla'"),
        ({"settings": {"seed": 1}}, "settings has an unknown name 'seed'"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        mad_runs(**{"mixers": ["mamba"], "tasks": benchmark(["compression"])[:1], **changes})


def test_cost_grows_with_what_makes_a_run_long():
    run = small()
    assert expected_seconds(replace(run, max_epochs=4)) == pytest.approx(2 * expected_seconds(run))
    assert expected_seconds(replace(run, resona=RESONA)) > expected_seconds(run)
    longer = replace(run, task=replace(run.task, seq_len=48))
    assert expected_seconds(longer) > 1.9 * expected_seconds(run)


def test_the_code_of_a_run_is_its_mixer_and_what_it_imports():
    with_resona = code_modules(small(resona=RESONA))
    closure = import_closure(with_resona)
    for name in ("train.mad_autoencoder", "train.loop", "mixers.attention", "tasks.mad.recall", "resona.layer"):
        assert f"lrm_recall.{name}" in closure
    for name in ("checkpoints", "figures", "sweep"):
        assert not any(each.startswith(f"lrm_recall.{name}") for each in closure)


# --- from the notebook's parameters ---


PARAMETERS = {
    "mad_mixers": ["mamba"], "mad_tasks": ["compression", "fuzzy-in-context-recall"], "mad_benchmark": "base",
    "mad_task_args": {"num_train_examples": 100}, "mad_variants": ["base"], "mad_learning_rates": [1e-3],
    "mad_weight_decays": [0.0], "mad_seeds": [12345], "mad_d_model": 32, "mad_num_blocks": 2, "mad_max_epochs": 3,
    "mad_num_test": 64, "mad_base_only": [], "target_accuracy": 0.999, "precision": "tf32",
}  # fmt: skip


def test_parameters_of_the_notebook_become_runs():
    compression, fuzzy = mad_grid_of(PARAMETERS)
    assert compression.task == MADTask(task="compression", num_train_examples=100, num_test_examples=64)
    assert fuzzy.task.generator == "fast" and fuzzy.precision == "tf32" and fuzzy.num_valid == 64
    assert len(mad_grid_of(PARAMETERS | {"mad_benchmark": "all", "mad_tasks": ["memorization"],
                                         "mad_task_args": {}})) == 6  # fmt: skip
    variants = PARAMETERS | {"mad_variants": ["base", "resona1"], "mad_mixers": ["mamba", "attention"]}
    assert len(mad_grid_of(variants)) == 8 and len(mad_grid_of(variants | {"mad_base_only": ["attention"]})) == 6
    with pytest.raises(ValueError, match="mad_benchmark must be one of base, all, got 'some'"):
        mad_grid_of(PARAMETERS | {"mad_benchmark": "some"})
