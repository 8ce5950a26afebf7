"""`lrm-recall evaluate`: lm-evaluation-harness with our models in it.

    lrm-recall evaluate --model_args pretrained=runs/gla tokenizer=gpt2 --tasks table8 --batch_size 16
    lrm-recall evaluate --model_args pretrained=fla-hub/gla-1.3B-100B dtype=bfloat16 --tasks arc_easy,piqa
    lrm-recall evaluate --model_args '{"pretrained": "...", "resona": {"layers": [0]}}' --tasks my_task --include_path .

Everything behind `evaluate` is an option of the harness's own `lm-eval run`; only two words are ours: the model is
`lrm-recall` unless --model names another, and the task `table8` stands for the nine of Resona's Table 8, their data
pinned (`harness_tasks`). The harness finds models of other packages by itself from its next release on; 0.4.13 knows
those alone that were imported before it reads its command line.

Exit code 0: done; 1: a task or its data cannot be had; 2: a mistake in what was asked, nothing has been done.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from lrm_recall.evaluate.harness_tasks import GROUP, group

MODEL = "lrm-recall"
_TABLE8_FILE = f"{GROUP}.yaml"


def main(arguments: Sequence[str]) -> int:
    """Run the harness's command line; returns the exit code.

    Args:
        arguments: those behind `lrm-recall evaluate`.
    """
    if importlib.util.find_spec("lm_eval") is None:
        print("lrm-recall: evaluate needs lm-evaluation-harness: .venv/bin/pip install -e '.[eval]' in the checkout",
              file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    from lrm_recall.evaluate.harness_model import default_device  # which registers the model

    with tempfile.TemporaryDirectory(prefix="lrm-recall-") as folder:
        table8 = Path(folder) / _TABLE8_FILE
        table8.write_text(yaml.safe_dump(group()), encoding="utf-8")
        with _command_line(["lm-eval", "run", *_completed(arguments, table8, default_device())]):
            try:
                cli_evaluate()
            except (ValueError, FileNotFoundError) as error:  # what the harness, or our adapter, refuses
                print(f"lrm-recall: {error}", file=sys.stderr)
                return 2
            except OSError as error:  # of `datasets` and the hub's client: no such data, no network
                reason = " ".join(str(error).split())[:300]
                print(f"lrm-recall: {type(error).__name__}: {reason}", file=sys.stderr)
                return 1
    return 0


def _completed(arguments: Sequence[str], table8: Path, device: str) -> list[str]:
    """The harness's arguments: our model and device unless others are named, and a file for the word `table8`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "-M")
    parser.add_argument("--config", "-C")
    parser.add_argument("--tasks", "-t", nargs="+", default=[])
    parser.add_argument("--device")
    known, rest = parser.parse_known_args(arguments)
    tasks = [task for word in known.tasks for task in word.split(",")]
    given = {
        "--config": known.config,
        # a file may name these two itself
        "--model": known.model or (None if known.config else MODEL),
        "--device": known.device or (None if known.config else device),
        "--tasks": ",".join(str(table8) if task == GROUP else task for task in tasks),
    }
    return rest + [word for name, value in given.items() if value for word in (name, value)]


@contextlib.contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """sys.argv for the time of a call: the harness reads nothing else."""
    saved, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = saved


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
