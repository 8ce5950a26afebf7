"""Learning rates are tried in order, and a solved cell is not trained again."""

from dataclasses import asdict, replace

from lrm_recall.train.rates import sweep_rates, unsolved
from lrm_recall.train.synthetic import MQARRun

RUN = MQARRun(mixer="gla", mixer_args={"num_heads": 2}, d_model=16, input_length=16, num_kv_pairs=2, vocab_size=64,
              learning_rate=0.01, num_train=8, target_accuracy=0.9)


def row(run: MQARRun, accuracy: float, status: str = "ok") -> dict:
    return {"config": asdict(run), "seed": run.seed, "status": status, "metrics": {"valid_accuracy": accuracy}}


def test_a_cell_is_solved_when_every_seed_is_at_one_rate():
    runs = [replace(RUN, seed=seed, learning_rate=rate) for rate in (0.01, 0.001) for seed in (0, 1)]
    assert len(unsolved(runs, [])) == 1
    assert len(unsolved(runs, [row(runs[0], 0.95), row(runs[1], 0.5)])) == 1
    assert len(unsolved(runs, [row(runs[0], 0.95), row(runs[3], 0.95)])) == 1  # two rates, one seed each
    assert len(unsolved(runs, [row(runs[0], 0.95), row(runs[1], 0.95, "failed")])) == 1
    assert unsolved(runs, [row(runs[0], 0.95), row(runs[1], 0.9)]) == set()


def test_no_target_is_never_reached():
    run = replace(RUN, target_accuracy=None)
    assert len(unsolved([run], [row(run, 1.0)])) == 1


def test_only_unsolved_cells_go_on(monkeypatch):
    runs = [replace(RUN, d_model=width, learning_rate=rate) for rate in (0.01, 0.001) for width in (16, 32)]
    asked = []

    def sweep(todo, experiment, store, **options):
        asked.append([(run.d_model, run.learning_rate) for run in todo])
        return [row(run, 0.95 if run.d_model == 16 else 0.2) for run in todo]

    monkeypatch.setattr("lrm_recall.train.rates.run_sweep", sweep)
    rows = sweep_rates(runs, None, None)
    assert asked == [[(16, 0.01), (32, 0.01)], [(32, 0.001)]]
    assert len(rows) == 3
