"""Walkthrough 12: what it claims is true, its figures say what they compute, every slider redraws at every value."""

import ast
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from walkthrough_controls import combinations
from walkthrough_controls import controls as ranges_in

from lrm_recall.figures.display import alt_text
from lrm_recall.figures.head_merging import CHANNELS, HEADS, mask_figure, remembered_picture, state_matrices
from lrm_recall.figures.head_merging_capacity import capacity, capacity_markdown, controls, pairs_before_break
from lrm_recall.figures.head_merging_training import arms, arms_markdown, function_change
from lrm_recall.figures.widened_state import widened_state, widened_state_markdown
from lrm_recall.ops.gla import gla_recurrent
from lrm_recall.parameters import declared_parameters
from lrm_recall.statex.surgery import merge_heads
from lrm_recall.teach import head_merging as maths
from lrm_recall.teach import merge_training as training
from lrm_recall.teach.partly_merged import INGREDIENTS, PartlyMerged, output_change
from lrm_recall.teach.picture import picture
from lrm_recall.teach.widened_state import STARTS, new_mamba2, try_start
from lrm_recall.workbook import Workbook

ROOT = Path(__file__).resolve().parents[1]
NAME = "12_walkthrough_head_merging"
TINY = training.MergeRun(hidden_size=32, steps=4, more_steps=3, batch_size=4)


@pytest.fixture(scope="module")
def row():
    return {"config": {"heads": TINY.heads, "seed": 0}, **training.run_merging(TINY)}


@pytest.fixture(scope="module")
def found():
    model = new_mamba2()
    return {start: try_start(model, start, steps=3) for start in (*STARTS, "fresh")}


# the mathematics


@settings(max_examples=25, deadline=None)
@given(heads=st.integers(1, 4), key_dim=st.integers(1, 4), value_dim=st.integers(1, 5), tokens=st.integers(1, 12))
def test_a_masked_merged_head_equals_the_heads(heads, key_dim, value_dim, tokens):
    generator = torch.Generator().manual_seed(heads * 100 + tokens)
    q, k, decay = (torch.randn(2, tokens, heads, key_dim, generator=generator) for _ in range(3))
    v = torch.randn(2, tokens, heads, value_dim, generator=generator)
    expected, _ = gla_recurrent(q, k, v, -decay.abs())
    assert torch.allclose(maths.masked_merged(q, k, v, -decay.abs()), expected, atol=1e-5)


def test_merging_keeps_the_blocks_and_fills_the_rest():
    keys, values = maths.make_keys("random", 6, 4, 4), maths.make_values(6, 4, 8)
    separate, merged = (maths.block_diagonal(maths.write(keys, values)[0]),
                        maths.write(maths.merge(keys), maths.merge(values))[0, 0])
    mask = maths.block_mask(4, 4, 8)
    assert torch.equal(separate[mask], merged[mask])
    assert separate[~mask].abs().max() == 0 and merged[~mask].abs().min() > 0


@pytest.mark.parametrize("num_heads", HEADS)
def test_best_keys_reach_the_limit_and_random_keys_do_not_pass_it(num_heads):
    key_dim = CHANNELS[0] // num_heads
    for pairs in (1, key_dim, key_dim + 1, 2 * key_dim, 32):
        limit = maths.error_limit(pairs, key_dim)
        assert maths.measured_error("best", pairs, num_heads, CHANNELS) == pytest.approx(limit, abs=0.03)
        assert maths.measured_error("random", pairs, num_heads, CHANNELS) > limit - 0.03
        assert (limit == 0) == (pairs <= key_dim)


def test_no_state_beats_the_limit():
    """Least squares finds the best state there is, for any keys."""
    keys, values = maths.make_keys("random", 12, 1, 5, repeats=64), maths.make_values(12, 1, 30, repeats=64)
    best = torch.linalg.lstsq(keys[:, :, 0], values[:, :, 0]).solution.unsqueeze(1)  # [B, 1, K, V]
    error = maths.recall_error(maths.read(best, keys), values).mean().item()
    assert error == pytest.approx(maths.error_limit(12, 5), abs=0.02)


def test_more_numbers_alone_do_not_help():
    errors = maths.compare_controls(CHANNELS, 4, 16)
    assert errors["merged"] < 1e-5 < 0.6 < min(errors["heads"], errors["masked"], errors["copied"])
    assert errors["masked"] == pytest.approx(errors["heads"], abs=1e-5)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="num_heads must divide the 16 channels, got 3"):
        maths.measured_error("best", 4, 3, CHANNELS)
    with pytest.raises(ValueError, match="'best' or 'random', got 'good'"):
        maths.make_keys("good", 4, 1, 4)
    with pytest.raises(ValueError, match="between 1 and 16, got 17"):
        remembered_picture(4, 17)
    with pytest.raises(ValueError, match="num_pairs must be at most num_keys"):
        training.MergeRun(num_pairs=33)
    with pytest.raises(ValueError, match="arm must be one of keep, inherit, reinitialise, got 'half'"):
        training.start_arm(training.new_model(TINY, 4), "half", 0)
    with pytest.raises(ValueError, match="scale, norm, cross terms, got gate"):
        PartlyMerged(training.new_model(TINY, 4).model.layers[0].mixer, ("gate",))


# models


def test_ingredients_lead_from_the_old_layer_to_the_merged_one():
    model = training.new_model(TINY, 4)
    layer = model.model.layers[0].mixer
    with torch.no_grad():
        layer.g_norm_swish_gate.weight.uniform_(0.5, 1.5)
        x = torch.randn(2, 9, 32)
        merged = merge_heads(model, [0], start="inherit").model.layers[0].mixer
        assert torch.allclose(PartlyMerged(layer, ())(x), layer(x), atol=1e-6)
        assert torch.allclose(PartlyMerged(layer, INGREDIENTS)(x), merged(x), atol=1e-6)
    assert output_change(model, x, ()) == 0 < output_change(model, x, ("cross terms",))


def test_the_task_asks_for_every_key_once():
    batch = training.draw(TINY, 16, torch.Generator().manual_seed(0))
    for keys, values, asked, answers in zip(*batch, strict=True):
        shown = dict(zip(keys.tolist(), values.tolist(), strict=True))
        assert len(shown) == 16 and {k: shown[k] for k in asked.tolist()} == shown
        assert [shown[k] for k in asked.tolist()] == answers.tolist()
        assert keys.max() < TINY.num_keys <= values.min()


def test_a_run_is_repeatable_and_leaves_torch_alone(row):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    again = training.run_merging(TINY)
    assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
    assert again["history"] == row["history"] and again["metrics"] == row["metrics"]


def test_parameters_stay_but_for_the_norm(row):
    metrics = row["metrics"]
    assert metrics["state_1"] == 2 * metrics["state_2"] == 4 * metrics["state_4"] == CHANNELS[0] * CHANNELS[1]
    assert metrics["parameters_1"] - metrics["parameters_4"] == 32 - 8


def test_training_learns():
    run = training.MergeRun(steps=150, num_pairs=8, num_keys=12, num_values=16)
    assert training.recall(training.new_model(run, 4), run, 8) < 0.15
    assert training.recall(training.pretrain(run, 4), run, 8) > 0.6


def test_zeros_in_both_never_learn(found):
    assert all(found[start].function_change == 0 for start in STARTS) and found["fresh"].function_change > 0
    assert found["zero_both"].gradient == (0.0, 0.0) == found["zero_both"].moved
    assert found["zero_B"].gradient[0] > 0 == found["zero_B"].gradient[1]
    assert found["zero_C"].gradient[1] > 0 == found["zero_C"].gradient[0]
    assert min(found["zero_B"].moved) > 0 and min(found["zero_C"].moved) > 0  # the other factor follows


# the figures


def every_figure(row, found):
    history = row["history"]
    starts = {start: found[start] for start in STARTS}
    return [remembered_picture(), state_matrices(), capacity(history), controls(), function_change(history),
            arms(history, 16), widened_state(starts), mask_figure(None), mask_figure(maths.block_mask(4, 4, 8))]


def test_figures_are_described_and_legible(row, found):
    before = dict(mpl.rcParams)
    for figure in every_figure(row, found):
        figure.draw_without_rendering()
        sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert min(sizes) >= 8 and len(alt_text(figure)) > 60
        assert figure.get_figwidth() <= 7.2  # at 96 dots an inch, no wider than a page of GitHub: text keeps its size
    assert dict(mpl.rcParams) == before


def test_the_picture_of_four_heads_is_lost_and_that_of_one_is_not():
    stored, four, one = (axes.images[0].get_array() for axes in remembered_picture(4, 16).axes)
    ink = picture().numpy() > 0
    assert ((stored > 0) == ink).all() and ((one > 0) == ink).all()
    assert 0.2 < ((four > 0) != ink).mean() < 0.6


def test_every_value_of_the_sliders_draws_another_figure(notebook, row):
    def marked_capacity(marked):
        return capacity(row["history"], tuple(reversed(HEADS)), marked)

    for draw, of in zip((remembered_picture, state_matrices, marked_capacity, controls), ranges_in(notebook),
                        strict=True):
        described = [alt_text(draw(**values)) for values in combinations(of)]
        assert len(set(described)) == len(described) > 1, draw.__name__
    assert "8 heads" in alt_text(marked_capacity(1))


def test_where_recall_breaks():
    assert pairs_before_break({1: 1.0, 2: 0.95, 4: 0.5, 6: 0.95}) == 2
    assert pairs_before_break({1: 0.5}) == 0


def test_tables_have_a_line_for_each(row, found):
    assert len(capacity_markdown(row).splitlines()) == 2 + len(TINY.heads)
    assert len(arms_markdown([row, row]).splitlines()) == 2 + 2 * len(training.ARMS)
    assert "| both zero | 0 | 0 | 0 | 0 | 0 |" in widened_state_markdown({s: found[s] for s in STARTS})


# the exercise


def test_the_exercise_tells_not_yet_from_right():
    mask = maths.block_mask(4, 4, 8)
    assert maths.check_mask(None, 4, 4, 8).startswith("not yet: there is no mask")
    assert maths.check_mask(mask.T, 4, 4, 8).startswith("not yet: a tensor of [16, 32] is wanted")
    assert maths.check_mask(~mask, 4, 4, 8).startswith("not yet: 512 of 512")
    assert maths.check_mask(mask, 4, 4, 8).startswith("right")
    row, column = torch.arange(16) // 4, torch.arange(32) // 8  # the way the notebook hints at
    assert maths.check_mask(row[:, None] == column, 4, 4, 8).startswith("right")


def test_the_exercise_is_seen():
    mask = maths.block_mask(4, 4, 8)
    said = [alt_text(mask_figure(each)).rpartition(": ")[2] for each in (None, ~mask, mask)]
    assert said == ["there is no usable mask yet.", "they differ.", "they are equal."]


# the notebook


@pytest.fixture(scope="module")
def notebook():
    return Workbook(ROOT).read(NAME)


def test_notebook_keeps_the_contract(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert notebook.cells[0].source.startswith("# Walkthrough") and "Claim" in notebook.cells[0].source
    for part in ("Identity", "## Negative control", "## Exercise", "## Limits", "different from the paper"):
        assert part in text
    trees = [ast.parse(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    assert any(isinstance(node, ast.Assert) for tree in trees for node in ast.walk(tree))


def test_no_widget_is_made_in_a_batch_run(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code" and "explore" in cell.source:
            calls = [node for node in ast.parse(cell.source).body if "explore" in ast.unparse(node)]
            assert all(isinstance(node, ast.If) and ast.unparse(node.test) == "INTERACTIVE" for node in calls)


@pytest.mark.parametrize("profile", ("smoke", "laptop", "h100", "paper"))
def test_profiles_are_valid(notebook, profile):
    declared = declared_parameters(notebook, NAME)
    assert set(Workbook(ROOT).values(NAME, profile, declared)) <= {"seeds"}
    assert declared["INTERACTIVE"].default is False


def test_a_slider_shows_what_the_pure_function_gives(monkeypatch):
    widgets = pytest.importorskip("lrm_recall.figures.widgets")
    drawn = []
    monkeypatch.setattr(widgets, "show", lambda figure: drawn.append(alt_text(figure)))
    monkeypatch.setattr(widgets, "display", lambda widget: None)
    box = widgets.explore(state_matrices, num_heads=[8, 4, 2, 1], num_pairs=(1, 24))
    box.update()
    heads, pairs = box.children[:2]
    heads.value, pairs.value = 2, 9
    assert drawn[-1] == alt_text(state_matrices(2, 9)) and drawn[0] == alt_text(state_matrices())  # the static figure
    for wrong in ("many", [], [1, 2], (7, 24)):  # a slider starts at the default, 6
        with pytest.raises(ValueError, match="num_pairs must be"):
            widgets.explore(state_matrices, num_pairs=wrong)
    assert widgets.explore(lambda num_pairs: state_matrices(4, num_pairs), num_pairs=(3, 5)).children[0].value == 3
