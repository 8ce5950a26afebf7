"""Training language models: the recipe, killing and going on, several processes, packing, the grid of runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lm_small import VOCAB, WITH_RESONA, losses, prepare_small, small_cache, small_run

from lrm_recall.data import DataError, read_corpus
from lrm_recall.data.tokenizer import load_tokenizer
from lrm_recall.evaluate.perplexity import perplexity
from lrm_recall.ops.loss import IGNORED
from lrm_recall.results import ResultStore
from lrm_recall.sweep import run_sweep
from lrm_recall.train import lm_command, lm_trainer
from lrm_recall.train.language_model import LMRun, initial_model, row_key, run_lm
from lrm_recall.train.lm_checkpoints import (
    checkpoints_folder,
    drop_incomplete,
    last_step,
    model_folder,
    trained_model,
)
from lrm_recall.train.lm_data import TrainingSequences, chunk_finder
from lrm_recall.train.lm_grid import (
    experiment,
    forget_checkpoints,
    lm_runs,
    parameter_count,
    read_runs,
    write_runs,
)
from lrm_recall.train.lm_speed import flops_per_token, peak_flops, utilisation
from lrm_recall.train.lm_tokenizer import own_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One cache for the tests that only read: the corpus, and the result of one run with Resona."""
    with pytest.MonkeyPatch.context() as patch:
        corpus = small_cache(tmp_path_factory.mktemp("lm"), patch)
        run = small_run(corpus, **WITH_RESONA)
        entries = []
        yield {"corpus": corpus, "run": run, "result": run_lm(run, progress=entries.append), "entries": entries}


def test_a_run_returns_what_a_row_needs(shared):
    run, result = shared["run"], shared["result"]
    metrics = result["metrics"]
    trained = [entry for entry in result["history"] if "loss" in entry]
    assert [entry["step"] for entry in trained] == [2, 4, 6, 8, 10, 12]
    assert [entry["step"] for entry in result["history"] if "valid_loss" in entry] == [4, 8, 12]
    assert result["history"] == shared["entries"]
    assert trained[-1]["loss"] < trained[0]["loss"]
    valid = {entry["step"]: entry["valid_loss"] for entry in result["history"] if "valid_loss" in entry}
    assert metrics["best_step"] == min(valid, key=valid.get)
    assert metrics["valid_loss"] == pytest.approx(min(valid.values()), abs=1e-6)
    assert metrics["tokens"] == sum(entry["tokens"] for entry in trained) > 0
    assert metrics["mfu"] is None and metrics["tokens_per_s"] > 0
    assert metrics["parameters"] == parameter_count(run)
    assert result["peak_memory_mb"] > 0


def test_the_best_checkpoint_may_be_one_before_the_last(shared, monkeypatch):
    rising = iter([5.0, 6.0, 7.0])
    monkeypatch.setattr(lm_trainer, "perplexity", lambda *_, **__: SimpleNamespace(loss=next(rising)))
    result = run_lm(replace(shared["run"], seed=3))
    assert result["metrics"]["best_step"] == 4 and result["history"][-1] == {"step": 12, "valid_loss": 7.0}


def test_the_schedule_is_a_cosine_after_a_linear_warm_up(shared):
    run = replace(shared["run"], warmup=0.25, log_every=1, eval_every=12, steps=12)
    rates = [entry["learning_rate"] for entry in run_lm(run)["history"] if "loss" in entry]
    done = [(step - 3) / 9 for step in range(3, 12)]
    cosine = [0.5e-3 * (1 + torch.cos(torch.tensor(torch.pi * share)).item()) for share in done]
    assert rates == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, *cosine], abs=1e-9)


def test_the_kept_model_is_the_one_that_was_scored(shared):
    prepared = prepare_small(shared["corpus"])
    model = trained_model(row_key(shared["run"], prepared))
    assert perplexity(model, prepared, "test", 48).loss == pytest.approx(shared["result"]["metrics"]["test_loss"])
    assert trained_model("0" * 16) is None
    tokenizer = load_tokenizer(str(model_folder(row_key(shared["run"], prepared))))
    theirs = load_tokenizer(prepared.manifest["tokenizer"]["name"])
    assert tokenizer("Article 7").input_ids == theirs("Article 7").input_ids


def test_the_retrieval_map_reads_the_past_alone(shared):
    found = shared["result"]["metrics"]["retrieval"]
    assert [layer["layer"] for layer in found["layers"]] == [0, 1] and found["chunk_size"] == 8
    for layer in found["layers"]:
        shares = torch.tensor(layer["shares"])
        assert shares.shape == (len(found["texts"]),) * 2 and not shares.triu().any() and shares.sum() > 0
        assert shares[1:].sum(dim=1).sub(1).abs().max() < 5e-3  # behind the first chunk all find something


def test_the_same_run_gives_the_same_losses(shared):
    again = small_run(shared["corpus"], **WITH_RESONA, seed=1, steps=4)
    first = run_lm(again)
    remove(again)
    assert losses(run_lm(again)["history"]) == losses(first["history"])
    assert losses(first["history"]) != losses(shared["result"]["history"])


def test_resona_starts_from_the_weights_of_its_base(shared):
    run = small_run(shared["corpus"], **WITH_RESONA)
    base = replace(run, variant="base", resona=None)
    theirs, ours = (dict(initial_model(each).named_parameters()) for each in (base, run))
    wrapped = {name.replace(".mixer.", ".mixer.mixer."): weight for name, weight in theirs.items()}
    assert all(torch.equal(ours[name], weight) for name, weight in wrapped.items())
    assert not torch.equal(ours["model.layers.0.mixer.v_proj.weight"], theirs["model.layers.0.mixer.v_proj.weight"])
    off = replace(run, resona=run.resona | {"alpha": 1.0}, steps=4)
    pairs = zip(run_lm(off)["history"], run_lm(replace(base, steps=4))["history"], strict=True)
    for without, alone in pairs:
        assert without.get("loss") == pytest.approx(alone.get("loss"), abs=1e-6)


def remove(run: LMRun) -> None:
    forget_checkpoints({"status": "ok", "key": row_key(run, prepare_small(run.corpus))})


# killing

_ONE_RUN = """
import json, sys, time
from lrm_recall.train.language_model import LMRun, run_lm
def say(entry):
    print(json.dumps(entry), flush=True)
    time.sleep(0.05)
result = run_lm(LMRun(**json.loads(sys.argv[1])), progress=say)
print("done " + json.dumps(result["history"]), flush=True)
"""


def start(run: LMRun) -> subprocess.Popen:
    command = [sys.executable, "-c", _ONE_RUN, json.dumps(asdict(run))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_killed_and_resumed_gives_the_same_loss_curve(shared):
    run = small_run(shared["corpus"], **WITH_RESONA, seed=2, steps=24)
    whole = run_lm(run)
    folder = checkpoints_folder(row_key(run, prepare_small(run.corpus)))
    remove(run)
    process = start(run)
    for line in process.stdout:  # right behind the second checkpoint, in the middle of the steps after it
        if json.loads(line)["step"] == 10:
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    assert last_step(folder) == 8
    (folder / "checkpoint-12").mkdir()  # as if it had died while it saved
    resumed = run_lm(run)
    assert losses(resumed["history"]) == losses(whole["history"])
    same = [name for name in whole["metrics"] if name != "tokens_per_s"]
    assert {name: resumed["metrics"][name] for name in same} == {name: whole["metrics"][name] for name in same}


def test_a_run_that_is_trained_but_not_stored_is_only_scored_again(shared, monkeypatch):
    monkeypatch.setattr("lrm_recall.train.language_model.LMTrainer.train", lambda *_, **__: pytest.fail("trained"))
    again = run_lm(shared["run"])
    assert again["history"] == shared["result"]["history"]
    assert again["metrics"] == shared["result"]["metrics"]


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    for step in (4, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-4" / "complete").touch()
    assert last_step(tmp_path) == 4 and last_step(tmp_path / "nowhere") == 0
    drop_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


# several processes


def test_two_processes_give_the_loss_of_one_and_one_row(shared, tmp_path):
    run = small_run(shared["corpus"], **WITH_RESONA, seed=3, steps=8)
    file = write_runs([run], tmp_path / "runs.jsonl")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "lrm_recall.train.lm_command", str(file), "--profile", "test", "--results", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'lib'}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = ResultStore(tmp_path / "language_model.test.jsonl").rows()
    assert len(rows) == 1
    assert not checkpoints_folder(rows[0]["key"]).exists()
    alone = run_lm(run)
    for ours, theirs in zip(alone["history"], rows[0]["history"], strict=True):
        assert ours["step"] == theirs["step"] and ours.get("tokens") == theirs.get("tokens")
        name = "loss" if "loss" in ours else "valid_loss"
        assert theirs[name] == pytest.approx(ours[name], abs=2e-5)  # sums in another order, in float32
    assert rows[0]["metrics"]["test_loss"] == pytest.approx(alone["metrics"]["test_loss"], abs=2e-5)


def test_processes_with_the_same_file_share_its_runs(shared, tmp_path):
    runs = [small_run(shared["corpus"], seed=seed, steps=4) for seed in range(10, 14)]
    command = [str(write_runs(runs, tmp_path / "runs.jsonl")), "--profile", "test", "--results", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'lib'}:{ROOT / 'kernels'}"}
    both = [subprocess.Popen([sys.executable, "-m", "lrm_recall.train.lm_command", *command], env=environment,
                             stdout=subprocess.PIPE, text=True) for _ in range(2)]  # fmt: skip
    told = "".join(process.communicate(timeout=120)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    keys = {row["key"] for row in ResultStore(tmp_path / "language_model.test.jsonl").rows()}
    assert sorted(line.split()[0] for line in told.splitlines() if "test loss" in line) == sorted(keys)
    assert len(keys) == 4


def test_the_command_keeps_to_its_budget_and_refuses_one_that_processes_would_share(
    shared, tmp_path, monkeypatch, capsys
):  # fmt: skip
    file = write_runs([small_run(shared["corpus"], seed=20, steps=4)], tmp_path / "runs.jsonl")
    words = [str(file), "--profile", "test", "--results", str(tmp_path)]
    assert lm_command.main([*words, "--budget", "0"]) == 0
    assert not ResultStore(tmp_path / "language_model.test.jsonl").rows()
    assert lm_command.main([*words, "--budget", "-1"]) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lm_command.main([*words, "--budget", "9"]) == 2
    assert [line[:29] for line in capsys.readouterr().err.splitlines() if line.startswith("lm_command")] == [
        "lm_command: budget must be at", "lm_command: --budget is for p"]


def test_accumulated_steps_give_the_same_loss(shared):
    run = small_run(shared["corpus"], seed=4, steps=4)
    whole, parts = (run_lm(replace(run, accumulation=parts))["history"] for parts in (1, 2))
    assert [entry["loss"] for entry in parts if "loss" in entry] == pytest.approx(
        [entry["loss"] for entry in whole if "loss" in entry], abs=2e-5)


def test_a_batch_that_cannot_be_divided_is_refused(shared, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size 4 cannot be divided among 3 processes"):
        run_lm(small_run(shared["corpus"], seed=5))


# sweeps


def test_the_sweep_stores_the_row_under_the_key_of_the_checkpoints_and_removes_them(shared, tmp_path):
    run = small_run(shared["corpus"], seed=6, steps=4)
    prepared, store = prepare_small(run.corpus), ResultStore(tmp_path / "language_model.test.jsonl")
    folders = []
    rows = run_sweep([run], experiment(prepared), store, profile="test", progress=False,
                     on_row=lambda row: (folders.append(checkpoints_folder(row["key"]).is_dir()),
                                         forget_checkpoints(row)))
    assert [row["status"] for row in rows] == ["ok"] and folders == [True]
    assert rows[0]["key"] == row_key(run, prepared)
    assert rows[0]["data"]["revision"] == prepared.revision and rows[0]["data"]["source"] == "offline:articles.jsonl"
    assert not checkpoints_folder(rows[0]["key"]).exists() and trained_model(rows[0]["key"]) is not None


def test_divergence_is_named(shared):
    with pytest.raises(FloatingPointError, match="learning rate 1e\\+30"):
        run_lm(small_run(shared["corpus"], learning_rate=1e30, seed=7))


# data


@pytest.mark.parametrize("packed", [False, True])
def test_sequences_depend_on_index_and_seed_alone(shared, packed):
    prepared = prepare_small(shared["corpus"])
    here, there = (TrainingSequences(prepared, 48, packed=packed, count=600, seed=3) for _ in range(2))
    assert here.epoch_length < 300
    order = [5, 120, 301, 599]
    in_order = [here[i]["input_ids"] for i in order]
    for index, want in reversed(list(zip(order, in_order, strict=True))):
        assert torch.equal(there[index]["input_ids"], want)
    assert any(not torch.equal(here[i]["input_ids"], here[i + here.epoch_length]["input_ids"]) for i in range(9))
    assert all(here[i]["labels"][0] == IGNORED for i in order)


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_found_before_training_come_with_their_tokens(shared, packed):
    prepared = prepare_small(shared["corpus"])
    finder = chunk_finder("tf_idf", shared["run"].resona, prepared)
    sequences = TrainingSequences(prepared, 48, packed=packed, count=200, seed=3, finder=finder)
    plain = TrainingSequences(prepared, 48, packed=packed, count=200, seed=3)
    found = 0
    for index in (0, 7, 199):
        item = sequences[index]
        assert item.keys() == {"input_ids", "labels", "chunk_indices"}
        assert torch.equal(item["input_ids"], plain[index]["input_ids"])
        if not packed:
            assert torch.equal(item["chunk_indices"], finder.find(item["input_ids"]))
        found += int((item["chunk_indices"] >= 0).sum())
    assert found and chunk_finder("search", shared["run"].resona, prepared) is None


def test_a_run_trains_and_is_scored_on_chunks_found_before(shared):
    run = replace(shared["run"], chunks="tf_idf", steps=4)
    metrics = run_lm(run)["metrics"]
    assert metrics["search_ppl"] != metrics["test_ppl"] and "search_ppl" not in shared["result"]["metrics"]
    with pytest.raises(ValueError, match="chunks 'tf_idf' are for a model with Resona layers"):
        small_run(shared["corpus"], chunks="tf_idf")


def test_one_epoch_of_articles_holds_every_token_as_a_target_once(shared):
    prepared = prepare_small(shared["corpus"])
    count = TrainingSequences(prepared, 48, packed=False, count=1, seed=0).epoch_length
    sequences = TrainingSequences(prepared, 48, packed=False, count=count, seed=0)
    targets = sum(int((sequences[i]["labels"] != IGNORED).sum()) for i in range(count))
    split = prepared.manifest["splits"]["train"]
    assert targets == split["tokens"] + split["articles"]  # a separator ends each


def test_nothing_of_another_article_is_in_a_window(shared):
    """The input of a window is an article's own text: what comes before it changes nothing."""
    prepared = prepare_small(shared["corpus"])
    texts = [set(ids) for ids in prepared.splits["train"]["input_ids"]]
    sequences = TrainingSequences(prepared, 48, packed=False, count=60, seed=0)
    for i in range(60):
        ids = set(sequences[i]["input_ids"].tolist()) - {prepared.separator}
        assert any(ids <= text for text in texts)


def test_own_tokenizer_is_deterministic_and_spells_everything(shared, tmp_path, monkeypatch):
    prepared = prepare_small(shared["corpus"])
    first = own_tokenizer(read_corpus(shared["corpus"]), VOCAB)
    tokenizer = load_tokenizer(str(first))
    assert len(tokenizer) == VOCAB == prepared.vocab_size
    text = "Ünïcode, 数字 and\na new line"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    monkeypatch.setenv("LRM_RECALL_CACHE", str(tmp_path))
    second = own_tokenizer(read_corpus(shared["corpus"]), VOCAB)
    assert second != first and (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert not list((tmp_path / "prepared").glob("*/manifest.json"))  # the corpus in bytes was for a moment


@pytest.mark.parametrize("size, says", [(200, "at least 257"), (90_000, "ask for a smaller")])
def test_own_tokenizer_refuses(shared, size, says):
    with pytest.raises(DataError, match=says):
        own_tokenizer(read_corpus(shared["corpus"]), size)


# the grid

SHAPES = {"gla": {"hidden_size": 64, "num_layers": 4, "intermediate_size": 128, "mixer_args": {"num_heads": 2}},
          "hymba": {"hidden_size": 32, "num_layers": 4, "intermediate_size": 64,
                    "mixer_args": {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_window_size": 8},
                    "resona_mixer_args": {"attention": False}}}
SETTINGS = {"corpus": "squad", "vocab_size": 512, "length": 64, "steps": 100, "batch_size": 4}


def test_size_matched_models_have_the_parameters_of_resona():
    runs = {run.variant: run for run in lm_runs(mixers=["gla"], shapes=SHAPES, settings=SETTINGS,
                                                resona={"chunk_size": 8})}
    assert list(runs) == ["base", "sp", "resona"]
    size = {variant: parameter_count(run) for variant, run in runs.items()}
    assert size["base"] < size["resona"]
    width = runs["sp"].hidden_size
    step = parameter_count(replace(runs["sp"], hidden_size=width + 8)) - size["sp"]
    assert abs(size["sp"] - size["resona"]) <= step
    assert runs["resona"].resona["layers"] == [0, 2, 3] and runs["resona"].resona["encoder"] == "place"


def test_resona_takes_the_place_of_hymbas_attention():
    runs = lm_runs(mixers=["hymba"], shapes=SHAPES, settings=SETTINGS, resona={"chunk_size": 8})
    with_resona = next(run for run in runs if run.variant == "resona")
    assert with_resona.layer_overrides == {layer: {"attention": False} for layer in ("0", "2", "3")}


def test_an_explicit_width_is_taken():
    shapes = {"gla": SHAPES["gla"] | {"matched_size": 80}}
    (run,) = lm_runs(mixers=["gla"], shapes=shapes, variants=["sp"], settings=SETTINGS, resona={"chunk_size": 8})
    assert (run.variant, run.hidden_size, run.intermediate_size) == ("sp", 80, 128)


@pytest.mark.parametrize("change, says", [
    ({"mixers": ["glu"]}, "shapes has no 'glu'.*gla"),
    ({"mixers": []}, "mixers must list"),
    ({"variants": ["Resona"]}, "a variant is one of base, sp, resona"),
    ({"settings": SETTINGS | {"step": 3}}, "unknown name 'step'.*did you mean 'steps'"),
    ({"settings": SETTINGS | {"hidden_size": 3}}, "unknown name 'hidden_size'"),
    ({"shapes": {"gla": {"hidden": 3}}}, "no option 'hidden'"),
    ({"settings": SETTINGS | {"eval_every": 30}}, "steps one of eval_every"),
    ({"resona": {"chunk_size": 64}}, "chunk_size must be below length"),
])  # fmt: skip
def test_bad_parameters_are_refused(change, says):
    arguments = {"mixers": ["gla"], "shapes": SHAPES, "settings": SETTINGS, "resona": {"chunk_size": 8}} | change
    with pytest.raises(ValueError, match=says):
        lm_runs(**arguments)


def test_runs_survive_their_file(tmp_path):
    runs = lm_runs(mixers=["gla", "hymba"], shapes=SHAPES, settings=SETTINGS, resona={"chunk_size": 8}, seeds=[0, 1])
    assert read_runs(write_runs(runs, tmp_path / "runs.jsonl")) == runs
    (tmp_path / "runs.jsonl").write_text('{"mixer": "gla"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_runs(tmp_path / "runs.jsonl")


# speed


@pytest.mark.parametrize("tied", [True, False])
def test_operations_count_each_product_once(tied):
    run = LMRun(mixer="gla", hidden_size=32, num_layers=1, corpus="squad", vocab_size=500, length=8, steps=100,
                batch_size=1, tie_embeddings=tied)
    model = initial_model(run)
    products = sum(p.numel() for name, p in model.named_parameters() if "embeddings" not in name)
    assert flops_per_token(model) == 6 * (products + (500 * 32 if tied else 0))
    assert utilisation(model, 1e4) is None


@pytest.mark.parametrize("name, peak", [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H200", 989.4e12),
                                        ("NVIDIA H100 PCIe", 756e12), ("NVIDIA T4", None)])  # fmt: skip
def test_peaks_are_known_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_a_numbered_gpu_is_refused(shared):
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        run_lm(small_run(shared["corpus"], seed=8), device="cuda:1")


def test_code_modules_leave_out_what_cannot_decide(shared):
    from lrm_recall.code_hash import import_closure
    from lrm_recall.train.language_model import code_modules

    found = set(import_closure(code_modules(shared["run"])))
    assert {"lrm_recall.mixers.gla", "lrm_recall.resona.layer", "lrm_recall.evaluate.perplexity",
            "lrm_recall.data.sequences"} <= found
    assert not {name for name in found if name.startswith(("lrm_recall.figures", "lrm_recall.tasks"))}
    assert "lrm_recall.data.corpora" not in found


# precision

BACKBONES = {
    "gla": {"num_heads": 2},
    "deltanet": {"num_heads": 2},
    "retnet": {"num_heads": 2},
    "mamba": {"state_size": 4},
    "hymba": {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_window_size": 8},
}


@pytest.mark.parametrize("mixer", BACKBONES)
def test_every_backbone_trains_in_bf16_near_fp32(mixer):
    run = LMRun(mixer=mixer, mixer_args=BACKBONES[mixer], hidden_size=32, num_layers=2, intermediate_size=32,
                corpus="squad", vocab_size=100, length=24, steps=100, batch_size=1, initializer_range=0.2,
                variant="resona", resona={"layers": [0, 1], "chunk_size": 4, "encoder": "mean"})  # fmt: skip
    model = initial_model(run)
    ids = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    losses = []
    for bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters()
                   if p.grad is not None)  # fmt: skip
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]
