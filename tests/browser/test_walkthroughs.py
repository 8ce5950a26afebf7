"""Both walkthroughs as a student uses them: open in JupyterLab, INTERACTIVE = True, run all, move every slider.

Every value of every slider is held, byte for byte, against the figure that the library's pure function draws for it in
this process. What was trained is trained here again (alpha-mixing) or read from the stored row (head merging).
Screenshots of every output and the times from key to figure stay in build/browser/<notebook>/, for a person to look at.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from walkthrough_controls import controls

from lrm_recall.figures import alpha_mixing, display
from lrm_recall.figures.alpha_forgetting import state_forgets
from lrm_recall.figures.alpha_search import chunk_lights_up, search_map
from lrm_recall.figures.head_merging import remembered_picture, state_matrices
from lrm_recall.figures.head_merging_capacity import capacity
from lrm_recall.figures.head_merging_capacity import controls as negative_controls
from lrm_recall.parameters import declared_parameters
from lrm_recall.results import ResultStore
from lrm_recall.teach import alpha_mixing as teach
from lrm_recall.teach.alpha_forgetting import forget
from lrm_recall.teach.alpha_search import influence, search_sentence
from lrm_recall.workbook import Workbook

if TYPE_CHECKING:
    from browser.lab import Box

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "build" / "browser"
Draw = Callable[..., Figure]


@pytest.fixture
def image_of(monkeypatch):
    """Figure -> the address of the image that a notebook would show."""
    from browser.lab import png

    sent: list[Any] = []
    monkeypatch.setattr(display, "display", sent.append)

    def image(figure: Figure) -> str:
        display.show(figure)
        return png(sent.pop().data)

    return image


def alpha_mixing_figures(folder: Path, parameters: dict[str, Any]) -> list[Draw]:
    """The pure functions behind the four interactive figures of walkthrough 11, in their order."""
    seed, pairs = parameters["seed"], parameters["pairs"]
    model = teach.add_retrieval(teach.train_base(parameters["base_steps"], seed), 0.5, parameters["branch_steps"], seed)
    example = teach.trace(model, teach.examples(8, 100, 2**31 + seed, length=32))[0]
    alphas, roles = np.linspace(0, 1, 21).round(2).tolist(), teach.role_of(example, 8)
    table = teach.recall_by_alpha(model, alphas, pairs, parameters["num_examples"], 2**31 + seed)

    def search(chunk_size: int = 3) -> Figure:
        found = search_sentence(chunk_size=chunk_size)
        return search_map(found.words, found.cosines, found.chosen, chunk_size, f"A sentence in chunks of {chunk_size}")

    return [
        lambda pairs=8, decay=1.0: state_forgets(forget(decay=decay), [pairs]),
        search,
        lambda position=7, chunk_size=4: chunk_lights_up(influence(16, chunk_size), chunk_size, position),
        lambda alpha=0.5: alpha_mixing.alpha_slider(table, alphas, pairs, example, roles, alpha),
    ]


def head_merging_figures(folder: Path, parameters: dict[str, Any]) -> list[Draw]:
    """The pure functions behind the four interactive figures of walkthrough 12, in their order."""
    store = ResultStore(folder / "outputs" / "results" / "head_merging.smoke.jsonl")  # where the notebook puts its row

    def trained(marked: int = 16) -> Figure:
        (row,) = store.rows()
        return capacity(row["history"], (8, 4, 2, 1), marked)

    return [remembered_picture, state_matrices, trained, negative_controls]


@pytest.mark.parametrize(("name", "figures"), [
    ("11_walkthrough_alpha_mixing", alpha_mixing_figures),
    ("12_walkthrough_head_merging", head_merging_figures),
])
def test_every_slider_shows_what_the_pure_function_draws(name, figures, chromium, image_of, tmp_path):
    from browser.lab import Walkthrough, copy_notebook, jupyterlab

    pictures = PICTURES / name
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    notebook = Workbook(ROOT).read(name)
    parameters = {key: each.default for key, each in declared_parameters(notebook, name).items()}
    path, times = copy_notebook(ROOT / "notebooks" / f"{name}.ipynb", tmp_path), {}
    with jupyterlab(tmp_path) as address:
        page = chromium.new_page(viewport={"width": 1280, "height": 1000})
        walkthrough = Walkthrough(page, address.format(path=path), pictures)
        walkthrough.set_interactive()
        walkthrough.run_all()
        draws, ranges = figures(tmp_path, parameters), controls(notebook)  # trains while the notebook does
        walkthrough.wait_until_idle()
        assert walkthrough.problems() == []
        walkthrough.photograph_outputs()
        boxes = walkthrough.boxes()
        assert len(boxes) == len(draws) == len(ranges)
        for number, (box, draw, of) in enumerate(zip(boxes, draws, ranges, strict=True), start=1):
            assert box.labels == [control.replace("_", " ") for control in of]
            for control in of:
                lags = sweep(box, draw, of, control, image_of, pictures / f"figure{number}")
                times[f"figure {number}, {control}"] = lags
        assert walkthrough.problems() == []
        page.close()
    medians = {control: {"median_ms": statistics.median(lags), "lags_ms": lags} for control, lags in times.items()}
    (pictures / "times.json").write_text(json.dumps(medians, indent=1))


def sweep(box: Box, draw: Draw, of: dict[str, list[Any]], control: str, image_of: Callable[[Figure], str],
          pictures: Path) -> list[float]:
    """Move one slider to its right end with the mouse, left through all its values with the keyboard, and back.

    Returns:
        Milliseconds from each key to its figure.
    """
    label, values = control.replace("_", " "), of[control]
    at = {name: argument.default for name, argument in signature(draw).parameters.items()}  # where all sliders start

    def check(value: Any) -> None:
        reached = box.comes_to_show(image_of(draw(**{**at, control: value})))
        if not reached or value in (values[0], values[-1]):
            box.screenshot(Path(f"{pictures}_{control}_{value:g}.png"))
        assert reached, f"{pictures.name}: {label} {value} does not show what the pure function draws"
        assert float(box.readout(label)) == pytest.approx(value, abs=0.005)

    check(at[control])
    box.drag_to_the_end(label)
    check(values[-1])
    box.take_lags()
    for value in reversed(values[:-1]):
        box.press(label, "ArrowLeft")
        check(value)
    lags = box.take_lags()
    for _ in range(values.index(at[control])):
        box.press(label, "ArrowRight")
    check(at[control])
    return lags
