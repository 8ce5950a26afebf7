"""A sweep of learning rates on workers: started once, and only when something is to be done."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from lrm_recall import execution
from lrm_recall.results import ResultStore
from lrm_recall.sweep import Experiment
from lrm_recall.train.rates import sweep_rates
from lrm_recall.train.synthetic import MQARRun, code_modules, run_mqar


def test_workers_are_started_once_for_all_rates(tmp_path, monkeypatch):
    base = MQARRun(mixer="attention", mixer_args={"num_heads": 1}, d_model=8, num_layers=1, vocab_size=32, num_train=40,
                   input_length=16, num_kv_pairs=2, num_valid=20, num_test=20, max_epochs=1, learning_rate=1e-2)
    runs = [replace(base, learning_rate=rate) for rate in (1e-2, 1e-3)]
    started = []

    @contextlib.contextmanager
    def counted(workers, device):
        started.append((workers, device))
        with execution.dask_client(workers, device) as client:
            yield client

    monkeypatch.setattr("lrm_recall.train.rates.dask_client", counted)
    experiment = Experiment("mqar", run_mqar, {"source": "generated", "revision": "1"}, code_modules)
    store = ResultStore(tmp_path / "synthetic.smoke.jsonl")
    for _ in range(2):  # the second time all is stored, and nothing is started
        rows = sweep_rates(runs, experiment, store, workers=5, profile="smoke", progress=False)
        assert [(row["config"]["learning_rate"], row["status"]) for row in rows] == [(1e-2, "ok"), (1e-3, "ok")]
    assert started == [(1, "cpu")]  # no more workers than there are cells
