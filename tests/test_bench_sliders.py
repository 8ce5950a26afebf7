"""The benchmark of the sliders: it finds those of every box, moves each through its range, tells a missed target."""

import importlib.util
from itertools import islice
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "sliders.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("sliders", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "sliders", module)
    spec.loader.exec_module(module)
    return module


def test_the_sliders_of_every_box_are_found(bench):
    models = {
        "a": {"_model_name": "FloatSliderModel", "description": "alpha", "min": 0.0, "max": 1.0, "step": 0.25,
              "value": 0.5},
        "b": {"_model_name": "SelectionSliderModel", "description": "heads", "_options_labels": ["8", "4"], "index": 1},
        "c": {"_model_name": "OutputModel"},
        "d": {"_model_name": "VBoxModel", "_dom_classes": ["widget-interact"],
              "children": ["IPY_MODEL_a", "IPY_MODEL_b", "IPY_MODEL_c"]},
        "e": {"_model_name": "IntSliderModel", "description": "in no box"},
    }
    alpha, heads = bench.sliders(models, "11")
    assert (alpha.name, alpha.field, alpha.values, alpha.start) == ("11, figure 1: alpha", "value", [0, 0.25, 0.5, 0.75,
                                                                                                   1], 2)
    assert (heads.comm, heads.field, heads.values, heads.start) == ("b", "index", [0, 1], 1)
    assert list(islice(bench.up_and_down(heads), 3)) == [0, 1, 0]


def test_a_slider_never_moves_to_where_it_stands_and_reaches_every_value(bench):
    for start in range(4):
        route = [start, *islice(bench.up_and_down(bench.Slider("", "", "value", [0, 1, 2, 3], start)), 6)]
        assert all(abs(a - b) == 1 for a, b in zip(route, route[1:], strict=False)) and set(route) == {0, 1, 2, 3}


def test_a_missed_target_is_told(bench, capsys):
    times = {"slowest_ms": 200.0, "worst_try_median_ms": 160.0}
    assert bench.print_table({"fast": {"median_ms": 149.0, **times}}) and "MISSED" not in capsys.readouterr().out
    assert not bench.print_table({"slow": {"median_ms": 151.0, **times}}) and "MISSED" in capsys.readouterr().out
