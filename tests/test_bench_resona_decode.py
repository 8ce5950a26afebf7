"""bench/gpu_resona_decode.py at a tiny size on a CPU, where the step that a GPU would capture runs as it is."""

import importlib
import json
from pathlib import Path

import pytest
from decoding_checks import WithoutGraph

from lrm_recall.ops.beside import beside

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("gpu_resona_decode")
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "mixer": "gla"}
    resona = {"layers": [0, 2], "chunk_size": 4, "top_k": 2, "num_heads": 2, "encoder": "linear", "encoder_dim": 8}
    for name, value in {"SHAPE": shape, "RESONA": resona, "MODELS": {"base": None, "resona": resona},
                        "LENGTHS": [9, 30], "NEW_TOKENS": 5, "Decoder": WithoutGraph,
                        "build": lambda make, name: make(name)}.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    return module


def test_every_side_is_captured_anew_and_stored(bench, tmp_path, monkeypatch, capsys):
    forks, graphs = [], []
    opened = lambda layers: forks.append(len(layers)) or beside(layers)  # noqa: E731
    monkeypatch.setattr(bench.decoding, "beside", opened)
    capture = bench.capture

    def captured(model, prompt, fork):
        before = len(forks)
        graph = capture(model, prompt, fork)
        assert len(forks) - before == fork  # one step
        assert prompt.past_key_values.length in (9, 30)  # as it was
        graphs.append(graph)
        return graph

    monkeypatch.setattr(bench, "capture", captured)
    times = iter(range(1, 100))
    bench.bench("tiny", tmp_path, 2, lambda graph: float(next(times)))
    assert len(set(map(id, graphs))) == len(graphs) == 2 * 2 * 3  # prompts, rounds, sides
    rows = [json.loads(line) for line in (tmp_path / "bench.tiny.jsonl").read_text().splitlines()]
    assert [(row["config"]["length"], row["config"]["side"]) for row in rows] == [
        (length, side) for length in (9, 30) for side in bench.SIDES]  # fmt: skip
    metrics = rows[1]["metrics"]
    assert (metrics["replay_us_least"], metrics["replay_us"], metrics["replay_us_most"]) == (2, 3.5, 5)
    assert metrics["replay_us_ratio"] == 3.5 / 2.5 and metrics["decode_ms"] > 0
    assert "us a Resona layer" in capsys.readouterr().out


def test_a_capture_within_what_is_timed_is_told(bench, tmp_path, monkeypatch):
    def forget(model, ids, new_tokens):
        model._decoder = WithoutGraph()
        return 1.0

    monkeypatch.setattr(bench, "decode", forget)
    with pytest.raises(RuntimeError, match="base: the step was captured again"):
        bench.bench("tiny", tmp_path, 1, lambda graph: 1.0)
