"""Compiling ahead of a sweep: which kinds of runs there are, and that one that fails stops nothing."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lrm_recall.tasks.mad import MADTask
from lrm_recall.train.compile_ahead import compile_ahead, short_runs
from lrm_recall.train.mad import MADRun
from lrm_recall.train.synthetic import MQARRun, run_mqar
from lrm_recall.workbook import main

ROOT = Path(__file__).resolve().parents[1]
MQAR = MQARRun(mixer="baseconv", d_model=8, num_layers=1, vocab_size=64, input_length=16, num_kv_pairs=2,
               learning_rate=1e-2, batch_size=8, num_train=4096, max_epochs=50)  # fmt: skip
MAD = MADRun(mixer="mamba2", task=MADTask(task="compression"), learning_rate=1e-3)


def where(run: MQARRun, folder: Path) -> None:
    """Stands for training: notes which GPU the process was given, or fails."""
    if run.d_model == 24:
        raise ValueError("no such width")
    (folder / str(run.d_model)).write_text(os.environ["CUDA_VISIBLE_DEVICES"])


def test_rates_seeds_and_epochs_make_no_kind_but_shapes_do():
    alike = [replace(MQAR, learning_rate=rate, seed=seed, num_train=size) for rate in (1e-2, 1e-3)
             for seed in (0, 1) for size in (64, 4096)]  # fmt: skip
    changes = ({"d_model": 16}, {"input_length": 32}, {"batch_size": 16}, {"precision": "tf32"},
               {"resona": {"layers": [0], "chunk_size": 2}})  # fmt: skip
    others = [replace(MQAR, **change) for change in changes]
    assert len(short_runs(alike)) == 1 and len(short_runs(alike + others)) == 1 + len(others)
    assert len(short_runs([MAD, replace(MAD, weight_decay=0.1), replace(MAD, num_blocks=4)])) == 2


def test_a_short_run_is_one_step():
    (short,) = short_runs([MQAR])
    result = run_mqar(short)
    assert result["metrics"]["steps"] == 1 and result["metrics"]["epochs"] == 1


def test_every_kind_is_done_on_a_gpu_of_its_process_and_errors_stop_nothing(tmp_path):
    runs = [replace(MQAR, d_model=8 * width) for width in range(1, 6)]
    errors = compile_ahead(runs, functools.partial(where, folder=tmp_path), processes=2, gpus=["3", "5"], show=False)
    assert len(errors) == 1 and errors[0].startswith("ValueError: no such width")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["16", "32", "40", "8"]
    assert {path.read_text() for path in tmp_path.iterdir()} <= {"3", "5"}


def test_without_a_gpu_it_is_refused_before_anything_is_done(capsys):
    assert main(["sweep", "synthetic", "--profile", "smoke", "--compile-first", "2"]) == 2
    assert "--compile-first compiles on this machine's GPUs, not for device 'cpu'" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["0", "some", "-1"])
def test_the_number_of_processes_is_checked(word, capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "synthetic", "--compile-first", word])
    assert "is not a number above 0" in capsys.readouterr().err
