"""The explorer of notebook 01: what the knobs of a trained tiny model do, its figure, and the notebook's section."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from walkthrough_controls import combinations, controls

from lrm_recall.figures.display import alt_text
from lrm_recall.figures.mqar_explorer import knobs_in_words, turned_knobs
from lrm_recall.resona.layer import Resona
from lrm_recall.teach import mqar_explorer as teach
from lrm_recall.teach.alpha_mixing import build, resona_layer
from lrm_recall.teach.mqar_explorer import TRAINED, Knobs
from lrm_recall.train.synthetic import mqar_splits
from lrm_recall.workbook import Workbook

RUN = teach.tiny_run(2, 4000)


@pytest.fixture(scope="module")
def model():
    return teach.train_tiny(RUN)


@pytest.fixture(scope="module")
def weights(model):
    """As they were before any knob was turned."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def explored(model, weights):
    return teach.turn_knobs(model, teach.train_tiny(teach.tiny_run(1, 64, retrieves=False)), RUN)


@pytest.fixture(scope="module")
def notebook():
    return Workbook(Path(__file__).resolve().parents[1]).read("01_synthetic")


def setting(model) -> Knobs:
    layer = resona_layer(model)
    return Knobs(layer.alpha, layer.chunk_size, layer.top_k)


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return buffer.getvalue()


# --- the knobs


def test_retrieval_is_what_the_trained_model_recalls_with(explored):
    trained = explored.index(TRAINED)
    assert explored.accuracy[trained] > 0.8 and explored.found[trained[1:]] > 0.7
    assert (explored.accuracy[-1] < explored.accuracy[trained] - 0.4).all()
    assert (explored.accuracy[-1] == explored.accuracy[-1, 0, 0]).all()  # alpha 1: what is retrieved has no part in it
    assert explored.found[0, 0] < 0.1  # a chunk of one token is the key, not the value
    assert (np.diff(explored.found, axis=1) >= 0).all()  # more chunks find no less


@torch.no_grad()
def test_the_table_is_what_the_model_answers(model, explored):
    test = mqar_splits(RUN).test
    for knobs in (TRAINED, Knobs(0.3, 4, 2)):
        with teach.at_knobs(model, knobs):
            logits = model(test.inputs).logits
        right = logits.argmax(-1).gather(1, test.positions) == test.answers  # [N, P]
        at = explored.index(knobs)
        assert explored.accuracy[at] == pytest.approx(right.float().mean().item())
        assert (explored.example.right[at] == right[0].numpy()).all()


@torch.no_grad()
def test_alpha_one_is_the_mixer_alone_bit_for_bit(model, monkeypatch):
    inputs = mqar_splits(RUN).test.inputs
    with teach.at_knobs(model, Knobs(1.0, 4, 2)):
        mixed = model(inputs).logits
    monkeypatch.setattr(Resona, "forward", lambda layer, x, context: layer.mixer(x, context))
    assert torch.equal(mixed, model(inputs).logits)


def test_a_found_chunk_holds_the_value_and_lies_before_the_question(explored):
    example, answers = explored.example, mqar_splits(RUN).test.answers[0].numpy()
    assert (example.tokens[2 * example.pairs] == example.tokens[example.positions]).all()
    assert (example.tokens[2 * example.pairs + 1] == answers).all()
    for (chunk_size, top_k), chosen in example.chosen.items():
        assert chosen.shape == (RUN.num_kv_pairs, top_k) == example.weights[chunk_size, top_k].shape
        assert ((chosen + 1) * chunk_size <= example.positions[:, None]).all()
        for row, answer in enumerate(answers):
            read = [answer in example.tokens[chunk * chunk_size : (chunk + 1) * chunk_size] for chunk in chosen[row]]
            assert read == ((2 * example.pairs[row] + 1) // chunk_size == chosen[row]).tolist()


def test_a_knob_changes_no_weight_and_is_turned_back(model, weights, explored):
    with pytest.raises(KeyError), teach.at_knobs(model, Knobs(0.2, 5, 3)):
        assert setting(model) == (0.2, 5, 3)
        raise KeyError
    assert setting(model) == TRAINED
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("knobs", "said"), [
    ({"alpha": 1.5}, "alpha must lie in"), ({"alpha": -0.1}, "alpha must lie in"), ({"alpha": "most"}, "'alpha'"),
    ({"alpha": "learned"}, "alpha must be a number"), ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ({"chunk_size": 2.5}, "'chunk_size'"), ({"top_k": 0}, "top_k must be at least 1"), ({"top_k": "2"}, "'top_k'"),
])  # fmt: skip
def test_a_knob_that_cannot_be_is_one_error_and_turns_nothing(model, knobs, said):
    with pytest.raises(ValueError, match=said), teach.at_knobs(model, TRAINED._replace(**knobs)):
        pass
    assert setting(model) == TRAINED


def test_what_these_weights_or_sequences_cannot_have_is_refused(model):
    with pytest.raises(ValueError, match="weights for each place"), teach.at_knobs(build(0.5), Knobs(0.5, 3, 1)):
        pass
    with teach.at_knobs(build(0.5), Knobs(0.4, 2, 2)):  # as long as the chunks stay
        pass
    with pytest.raises(ValueError, match="chunk_size must be below the input length"):
        teach.turn_knobs(model, model, RUN, chunk_sizes=(2, RUN.input_length))
    with pytest.raises(ValueError, match="alpha must lie in"):
        teach.turn_knobs(model, model, RUN, alphas=(0.5, 2.0))
    with pytest.raises(ValueError, match="max_epochs"):
        teach.tiny_run(-1)


# --- the figure


@pytest.mark.parametrize(("knobs", "said"), [((0.55, 2, 1), "alpha must be one of 0, 0.1"),
                                             ((0.5, 5, 1), "chunk_size must be one of 1, 2"),
                                             ((0.5, 2, 9), "top_k must be one of 1, 2")])  # fmt: skip
def test_a_setting_that_was_not_tried_is_not_drawn(explored, knobs, said):
    with pytest.raises(ValueError, match=said):
        turned_knobs(explored, *knobs)


def test_every_value_of_every_slider_is_drawn(explored, notebook):
    (of,) = controls(notebook)
    assert {name: values[0] if name == "alpha" else values for name, values in of.items()} == {
        "alpha": 0.0, "chunk_size": list(teach.CHUNK_SIZES), "top_k": list(teach.TOP_KS)}
    assert len({explored.index(Knobs(**values)) for values in combinations(of)}) == explored.accuracy.size
    for name, values in of.items():
        for value in values:
            knobs = TRAINED._replace(**{name: value})
            said = f"accuracy {explored.accuracy[explored.index(knobs)]:.3f}"
            assert said in alt_text(turned_knobs(explored, *knobs))


def test_the_figure_is_legible_and_changes_with_each_knob(explored):
    drawn = [turned_knobs(explored, *knobs) for knobs in (TRAINED, (0.9, 2, 1), (0.5, 4, 1), (0.5, 2, 3))]
    assert len({png(figure) for figure in drawn}) == len(drawn)
    for figure in drawn:
        assert 96 * figure.get_figwidth() <= 800  # pixels: GitHub does not shrink it
        assert all(text.get_fontsize() >= 8 for text in figure.findobj(Text) if text.get_text().strip())


def test_the_words_have_the_numbers_of_the_table(explored):
    said = knobs_in_words(explored)
    for knobs in (TRAINED, Knobs(1.0, 2, 1), Knobs(0.5, 8, 1), Knobs(0.5, 2, 4)):
        assert f"{explored.accuracy[explored.index(knobs)]:.3f}" in said
    assert f"trained without Resona reaches {explored.alone:.3f}" in said


# --- the notebook's section


def test_no_epochs_leave_the_section_out_and_batch_runs_show_no_widget(notebook):
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code" and "explorer_epochs:\n" in cell.source]
    assert len(cells) == 3 and cells[-1].startswith("if INTERACTIVE and")
    for source in cells:
        exec(source, {"explorer_epochs": 0, "INTERACTIVE": True})  # nothing is looked up: nothing runs
    exec(cells[-1], {"explorer_epochs": 3, "INTERACTIVE": False})
