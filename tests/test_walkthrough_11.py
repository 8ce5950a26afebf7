"""Walkthrough 11: its mathematics, its figures over the full range of every control, its exercises, its source.

The solutions of the exercises are here: `causal_mask` and `null_chunk_gate`.
"""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from walkthrough_controls import combinations, controls

from lrm_recall.figures import alpha_mixing as figures
from lrm_recall.figures.alpha_exercises import gate_drawn, mask_drawn
from lrm_recall.figures.alpha_forgetting import state_forgets
from lrm_recall.figures.alpha_search import chunk_lights_up, search_map
from lrm_recall.figures.display import alt_text
from lrm_recall.parameters import declared_parameters
from lrm_recall.resona.layer import Resona
from lrm_recall.resona.search import NO_CHUNK
from lrm_recall.teach import alpha_mixing as teach
from lrm_recall.teach.alpha_exercises import check_causal_mask, check_null_chunk_gate, gate_wanted, mask_wanted
from lrm_recall.teach.alpha_forgetting import expected_error, forget
from lrm_recall.teach.alpha_search import SENTENCE, influence, search_sentence
from lrm_recall.workbook import Workbook

ROOT = Path(__file__).resolve().parents[1]
NAME = "11_walkthrough_alpha_mixing"


def causal_mask(length, chunk_size):
    """The solution of exercise 1."""
    positions = torch.arange(length)[:, None]
    chunks = torch.arange(length // chunk_size)
    return (chunks + 1) * chunk_size <= positions


def null_chunk_gate(scores, null_score, temperature):
    """The solution of exercise 2."""
    logits = torch.cat([scores, null_score[:, None]], dim=1) * temperature
    return torch.softmax(logits, dim=1)[:, :-1]


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model():
    """Retrieval bolted onto a barely trained mixer: enough for everything but good accuracy of the mixer."""
    return teach.add_retrieval(teach.train_base(20), 0.5, 60)


@pytest.fixture(scope="module")
def data():
    return teach.examples(8, 40, 2**31, length=32)


@pytest.fixture(scope="module")
def traces(model, data):
    return teach.trace(model, data)


# --- the mathematics


@pytest.mark.parametrize("decay", [1.0, 0.95])
def test_the_state_forgets_as_the_formula_says(decay):
    story = forget(pairs=40, decay=decay, draws=4000)
    assert story.errors[0] < 1e-5 and story.expected[0] == 0
    np.testing.assert_allclose(story.errors[1:], story.expected[1:], rtol=0.03)


def test_without_decay_each_new_pair_makes_the_first_one_worse():
    story = forget(draws=1000)
    assert (np.diff(story.errors) > 0).all()
    np.testing.assert_allclose(expected_error(17, 16, 1.0)[-1], 1.0)  # one value's worth of error after 16 others


def test_the_state_drawn_is_the_sum_of_outer_products_and_is_read_by_the_first_key():
    story = forget(pairs=5, d_key=4, d_value=3, draws=2)
    ranks = [np.linalg.matrix_rank(state, tol=1e-5) for state in story.states]
    assert ranks == [1, 2, 3, 3, 3]
    np.testing.assert_allclose(story.recalled[0], story.stored, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"decay": 0.0}, {"decay": 1.1}, {"pairs": 0}])
def test_forget_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        forget(**wrong)


@pytest.mark.parametrize("chunk_size", range(1, 9))
def test_influence_is_exactly_the_causal_rule(chunk_size):
    reach = influence(16, chunk_size)
    allowed = mask_wanted(16, chunk_size).repeat_interleave(chunk_size, dim=1).numpy()
    padded = np.zeros((16, 16), dtype=bool)
    padded[:, : allowed.shape[1]] = allowed
    assert ((reach > 0) == padded).all()


def test_a_word_finds_the_chunk_that_holds_it():
    found = search_sentence(chunk_size=3)
    words = SENTENCE.split()
    for word, position in (("bike", words.index("bike", 5)), ("Anna", words.index("Anna", 1))):
        chunk = found.chosen[position]
        assert word in words[chunk * 3 : chunk * 3 + 3]
    with pytest.raises(ValueError, match="chunk_size"):
        search_sentence(chunk_size=100)


# --- the tiny model


@torch.no_grad()
def test_alpha_one_is_the_base_model_bit_for_bit(model, data):
    with teach.at_alpha(model, 1.0):
        mixed = model(data.inputs).logits
    assert torch.equal(mixed, teach.without_retrieval(model)(data.inputs).logits)
    assert not torch.equal(mixed, model(data.inputs).logits)  # and alpha is back at 0.5
    assert teach.resona_layer(model).alpha == 0.5


def test_only_what_resona_adds_is_trained():
    base = teach.train_base(3)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    after = teach.without_retrieval(teach.add_retrieval(base, "learned", 5)).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_retrieval_brings_back_what_the_mixer_cannot(model):
    table = teach.recall_by_alpha(model, [0.0, 0.5, 1.0], [4, 8], num_examples=50)
    assert (table[1] > 0.9).all() and (table[2] < 0.5).all()


def test_alpha_and_models_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="alpha"), teach.at_alpha(model, 1.5):
        pass
    with pytest.raises(ValueError, match="no Resona"):
        teach.trace(teach.build(None), teach.examples(4, 1, 0))


def test_a_trace_tells_what_the_layer_does(model, data, traces):
    layer, seen = teach.resona_layer(model), {}
    hook = layer.register_forward_hook(lambda module, given, out: seen.update(out=out))
    with torch.no_grad():
        model(data.inputs)
    hook.remove()
    for row, each in enumerate(traces):
        best = np.where(np.arange(each.cosines.shape[1]) < np.arange(32)[:, None] // 2, each.cosines, -np.inf)
        seeing = each.chosen != NO_CHUNK
        assert (best.argmax(axis=1)[seeing] == each.chosen[seeing]).all() and not seeing[:2].any() and seeing[2:].all()
        norm = seen["out"][row].norm(dim=-1).numpy()
        assert (norm <= 0.5 * (each.mixed + each.retrieved) + 1e-3)[seeing].all()  # the triangle inequality
        np.testing.assert_allclose(norm[:2], each.mixed[:2], rtol=1e-5)
        assert ((each.weights >= 0) & (each.weights <= 1)).all() and (each.alpha == 0.5).all()


def test_questions_find_their_pairs(traces):
    right = [each.tokens[2 * each.chosen[position]] == each.tokens[position]
             for each in traces for position in np.flatnonzero(each.asked)]
    assert np.mean(right) > 0.95


def test_learned_alpha_differs_between_tokens_and_not_between_a_key_and_its_question(data):
    each = teach.trace(teach.add_retrieval(teach.build(None), "learned", 20), data)[0]
    assert ((each.alpha > 0) & (each.alpha < 1)).all() and each.alpha.std() > 0
    for position in np.flatnonzero(each.asked):
        listed = int(np.flatnonzero(each.tokens == each.tokens[position])[0])
        assert each.alpha[listed] == pytest.approx(each.alpha[position], abs=1e-5)


def test_shuffled_chunks_are_causal_wrong_and_no_help(model, data):
    shuffled = teach.shuffled_chunks(model, data.inputs)
    assert (shuffled[..., 0] < torch.arange(32) // 2).all() and (shuffled[:, 2:] >= 0).all()
    found, wrong = teach.recall(model, data), teach.recall(model, data, shuffled)
    none = teach.recall(model, data, torch.full_like(shuffled, NO_CHUNK))
    assert found > 0.9 and wrong < 0.5
    with teach.at_alpha(model, 1.0):
        assert none == teach.recall(model, data)  # no chunk is the base model


# --- every control over its full range, which is read from the notebook


@pytest.fixture(scope="module")
def ranges(notebook):
    """Control -> values of each interactive figure: forgetting, search, the causal rule, alpha."""
    found = controls(notebook)
    assert [list(of) for of in found] == [["pairs", "decay"], ["chunk_size"], ["position", "chunk_size"], ["alpha"]]
    return found


def alphas() -> list[float]:
    return np.linspace(0, 1, 21).round(2).tolist()


@pytest.fixture(scope="module")
def table():
    generator = np.random.default_rng(0)
    return generator.random((21, 5))


def test_the_alpha_slider_draws_each_of_its_values(ranges, table, traces):
    roles = teach.role_of(traces[0], 8)
    drawn = set()
    assert len(ranges[3]["alpha"]) == 21 and ranges[3]["alpha"][-1] == pytest.approx(1)
    for step, alpha in enumerate(ranges[3]["alpha"]):
        figure = figures.alpha_slider(table, alphas(), [2, 4, 8, 12, 16], traces[0], roles, alpha)
        assert f"alpha {alpha:.2f}" in alt_text(figure) and f"2 pairs {table[step, 0]:.2f}" in alt_text(figure)
        if step % 5 == 0:  # 0.0, 0.25, 0.5, 0.75, 1.0
            drawn.add(png(figure))
    assert len(drawn) == 5
    with pytest.raises(ValueError, match="0.07"):
        figures.alpha_slider(table, alphas(), [2, 4, 8, 12, 16], traces[0], roles, 0.07)


def test_the_branches_drawn_are_weighed_by_alpha(table, traces):
    example, roles = traces[0], teach.role_of(traces[0], 8)
    figure = figures.alpha_slider(table, alphas(), [2, 4, 8, 12, 16], example, roles, 0.25)
    up, down = figure.axes[2].collections
    heights = [np.array([path.vertices[1, 1] for path in branch.get_paths()]) for branch in (up, down)]
    np.testing.assert_allclose(heights[0][2:], 0.25 * example.mixed[2:], rtol=1e-5)
    np.testing.assert_allclose(heights[1][2:], -0.75 * example.retrieved[2:], rtol=1e-5)
    np.testing.assert_allclose(heights[0][:2], example.mixed[:2], rtol=1e-5)  # nothing to retrieve yet


def test_the_forgetting_sliders_draw_each_of_their_values(ranges):
    numbers, decays = ranges[0].values()
    for decay in decays:
        story = forget(decay=decay, draws=8)
        for pairs in numbers if decay == decays[0] else numbers[:: len(numbers) - 1]:
            assert f"{story.errors[pairs - 1]:.2f} after {pairs};" in alt_text(state_forgets(story, [pairs]))
    png(state_forgets(story, [1, 8, 32]))
    with pytest.raises(ValueError, match="49"):
        state_forgets(story, [49])


def test_the_search_slider_draws_each_of_its_values(ranges):
    drawn = set()
    for chunk_size in ranges[1]["chunk_size"]:
        found = search_sentence(chunk_size=chunk_size)
        figure = search_map(found.words, found.cosines, found.chosen, chunk_size, "title")
        assert f"chunks of {chunk_size}" in alt_text(figure)
        drawn.add(png(figure))
    assert len(drawn) == len(ranges[1]["chunk_size"])


def test_the_causal_sliders_draw_each_of_their_values(ranges):
    reach = {chunk_size: influence(16, chunk_size) for chunk_size in ranges[2]["chunk_size"]}
    for at in combinations(ranges[2]):
        count = at["position"] // at["chunk_size"]
        said = alt_text(chunk_lights_up(reach[at["chunk_size"]], **at))
        assert f"reads {count} complete chunk{'s' * (count > 1)}," in said if count else "reads no chunk" in said
    with pytest.raises(ValueError, match="16"):
        chunk_lights_up(reach[8], 8, 16)


def test_all_text_is_at_least_eight_points_at_the_width_that_github_shows(table, traces):
    example, roles = traces[0], teach.role_of(traces[0], 8)
    found = search_sentence()
    drawn = [
        figures.alpha_slider(table, alphas(), [2, 4, 8, 12, 16], example, roles, 0.5),
        figures.learned_alpha(example, roles, {"key": example.alpha, "query": example.alpha}),
        figures.shuffled_control({"found": 0.9, "shuffled": 0.2}, 1 / 64),
        figures.trained_apart_or_together({"a": table[:, 0], "b": table[:, 1]}, alphas(), 0.5),
        state_forgets(forget(draws=8), [4]), chunk_lights_up(influence(16, 4), 4, 5),
        search_map(found.words, found.cosines, found.chosen, 3, "title"),
        mask_drawn(check_causal_mask(causal_mask)), gate_drawn(check_null_chunk_gate(null_chunk_gate)),
    ]
    from matplotlib.text import Text

    for figure in drawn:
        assert alt_text(figure) and png(figure)
        assert 96 * figure.get_figwidth() <= 800  # pixels: GitHub does not shrink it
        assert all(text.get_fontsize() >= 8 for text in figure.findobj(Text) if text.get_text().strip())


# --- the exercises


def test_the_solutions_are_right():
    for verdict in (check_causal_mask(causal_mask), check_null_chunk_gate(null_chunk_gate)):
        assert verdict.solved and str(verdict).startswith("Yes")


@pytest.mark.parametrize(("solution", "said"), [
    (lambda length, size: None, "Not yet"),
    (lambda length, size: [True], "torch tensor"),
    (lambda length, size: 1 / 0, "ZeroDivisionError"),
    (lambda length, size: torch.ones(length, length // size + 1), "one column too many"),
    (lambda length, size: torch.arange(length // size) <= torch.arange(length)[:, None] // size, "future leaks"),
    (lambda length, size: torch.arange(length // size) < torch.arange(length)[:, None] // size - 1, "does not see"),
    (lambda length, size: (torch.arange(length // size) + 1) * 4 <= torch.arange(length)[:, None], "chunks of 3"),
])
def test_wrong_masks_are_told_and_drawn(solution, said):
    verdict = check_causal_mask(solution)
    assert not verdict.solved and said in str(verdict) and str(verdict).startswith(("No", "Not yet"))
    assert png(mask_drawn(verdict))


@pytest.mark.parametrize(("solution", "said"), [
    (lambda scores, null, temperature: None, "Not yet"),
    (lambda scores, null, temperature: scores.softmax(dim=-1), "sum to one"),
    (lambda scores, null, temperature: gate_wanted(scores, null, 1.0), "temperature is missing"),
    (lambda scores, null, temperature: torch.cat([scores, null[:, None]], 1), "one column too many"),
    (lambda scores, null, temperature: scores / 0, "not finite"),
    (lambda scores, null, temperature: ((scores - null[:, None]) * temperature).sigmoid(), "not the softmax"),
])
def test_wrong_gates_are_told_and_drawn(solution, said):
    verdict = check_null_chunk_gate(solution)
    assert not verdict.solved and said in str(verdict)
    assert png(gate_drawn(verdict))


@torch.no_grad()
def test_the_gate_asked_for_is_resonas_own():
    torch.manual_seed(0)
    layer, x = Resona(nn.Identity(), 16, chunk_size=2, top_k=3, encoder="mean"), torch.randn(1, 12, 16)
    found = layer.retrieve(x)
    null = layer.encoder.queries(x) @ nn.functional.normalize(layer.null_chunk, dim=-1)  # [1, T]
    late = slice(6, None)  # where three chunks are visible
    wanted = gate_wanted(found.scores[0, late], null[0, late], layer.log_temperature.exp().item())
    torch.testing.assert_close(found.weights[0, late], wanted)


# --- the notebook's source


@pytest.fixture(scope="module")
def notebook():
    return Workbook(ROOT).read(NAME)


def test_source_follows_the_contract(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert notebook.cells[0].source.startswith("# ") and "Claim" in notebook.cells[0].source
    for part in ("Negative control", "Try it yourself", "Limits", "bit for bit", "causal rule"):
        assert part in text


def test_every_profile_fits_and_batch_runs_show_no_widgets(notebook):
    declared = declared_parameters(notebook, NAME)
    assert declared["INTERACTIVE"].default is False
    for profile in ("smoke", "laptop", "h100", "paper"):
        Workbook(ROOT).values(NAME, profile, declared)
    for cell in notebook.cells:
        if cell.cell_type == "code" and "explore(" in cell.source:
            assert "if INTERACTIVE:" in cell.source
