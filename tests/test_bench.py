"""The benchmark of the recurrences at a tiny size: its variants agree, and a missed target is told."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "recurrences.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("recurrences", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "recurrences", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LENGTH", 40)
    monkeypatch.setattr(module, "HIDDEN", 32)
    monkeypatch.setattr(module, "GLA", {"heads": 2, "key": 4, "value": 8})
    monkeypatch.setattr(module, "SSD", {"heads": 8, "head": 8, "state": 8})
    monkeypatch.setattr(module, "DELTA", {"heads": 2, "key": 4, "value": 8})
    monkeypatch.setattr(module, "RETENTION", {"heads": 2, "key": 4, "value": 8})
    monkeypatch.setattr(module, "RWKV5", {"heads": 2, "key": 4, "value": 4})
    monkeypatch.setattr(module, "SCAN", {"channels": 8, "state": 4})
    monkeypatch.setattr(module, "HYENA", {"batch": 2, "hidden_size": 8})
    return module


def test_variants_of_a_problem_agree(bench):
    metrics = bench.time_all(1)
    assert set(metrics) == set(bench.VARIANTS)
    for name, found in metrics.items():
        assert found["error"] < 1e-5, name
        assert found["forward_ms"] > 0 and found["forward_backward_ms"] > 0 and found["forward_floor_ms"] >= 0


def test_a_missed_target_is_told(bench, capsys):
    metrics = {name: {"forward_ms": 1.0, "forward_backward_ms": 1.0} for name in bench.VARIANTS}
    assert not bench.print_targets(metrics)
    assert "MISSED" in capsys.readouterr().out
