"""Figures and tables from made-up rows: what is chosen and averaged, the verdicts, what is drawn, alt text."""

import itertools
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.formatters import DisplayFormatter
from matplotlib.text import Text

from lrm_recall.figures import display
from lrm_recall.figures.mqar_ablation import ablation_table, mqar_ablation
from lrm_recall.figures.mqar_base_controls import base_control
from lrm_recall.figures.mqar_cells import chosen_runs, mqar_cells, mqar_runs, with_zoologys_examples
from lrm_recall.figures.mqar_claim import claim_in_words, mqar_claim
from lrm_recall.figures.mqar_curves import mqar_curves
from lrm_recall.figures.mqar_figure5 import mqar_figure5
from lrm_recall.figures.mqar_state import mqar_state
from lrm_recall.figures.mqar_table11 import mqar_table11, results_table_markdown, verdict_counts
from lrm_recall.figures.style import MODELS, SOURCES
from lrm_recall.figures.tables import markdown, mean_sd, write_table
from lrm_recall.figures.verdicts import (
    NOT_REPRODUCED,
    NOT_RUN,
    PAPER_LEARNING_RATES,
    REPRODUCED,
    TREND_ONLY,
    base_verdict,
    paper_scale_gaps,
    resona_verdict,
    settled,
)
from lrm_recall.paper import paper_values
from lrm_recall.results import frame, load_profiles, make_row
from lrm_recall.train.synthetic_runs import EXAMPLES

RESONA = {"chunk_size": 2, "top_k": 1, "encoder": "mean", "gate": "null_chunk", "alpha": 0.5, "num_heads": 1,
          "memory_norm": True}
fractions = st.floats(0, 1)


def row(mixer="baseconv", layers=None, accuracy=0.5, *, profile="laptop", seed=0, code="c", options=None,
        valid=None, epochs=4, created=None, error=None, **config):
    """One row as a sweep stores it."""
    resona = None if layers is None else {"layers": layers, **RESONA, **(options or {})}
    length = config.setdefault("input_length", 64)
    config = {"d_model": 32, "num_layers": 4, "vocab_size": 8192, "num_kv_pairs": length // 16,
              "num_train": 20_000, "num_test": 1_000, "batch_size": 64, "max_epochs": 16, "learning_rate": 1e-3,
              "mixer": mixer, "mixer_args": {}, "resona": resona, "seed": seed, **config}
    metrics = {"accuracy": accuracy, "sequence_accuracy": accuracy**4, "epochs": epochs, "state_size": 2048,
               "valid_accuracy": accuracy if valid is None else valid, "parameters": 9}
    history = [{"epoch": epoch, "train_loss": 1.0, "valid_accuracy": accuracy * epoch / epochs, "seconds": 1.0}
               for epoch in range(1, epochs + 1)]
    made = make_row(experiment="mqar", config=config, seed=seed, data={"source": "generated", "revision": "1"},
                    code=code, profile=profile, machine={"name": "m"}, metrics=metrics, history=history, error=error)
    return made if created is None else made | {"created": created}


def grid(profile="laptop", lengths=(64, 128), d_models=(32, 64), seeds=(0,), base=0.4, **config):
    """Rows of BaseConv, Mamba2 and the Transformer, base and with Resona."""
    return [row(mixer, layers, base if layers is None else 0.999, profile=profile, seed=seed, input_length=length,
                d_model=d_model, **config)
            for mixer in ("baseconv", "mamba2", "attention") for layers in (None, [0], [2])
            for length in lengths for d_model in d_models for seed in seeds]


# --- which runs count


def test_learning_rate_is_chosen_by_validation_never_by_test():
    runs = chosen_runs(frame([row(accuracy=0.9, valid=0.4, learning_rate=1e-2),
                              row(accuracy=0.5, valid=0.6, learning_rate=1e-3)]))
    assert runs[["learning_rate", "accuracy"]].values.tolist() == [[1e-3, 0.5]]
    assert runs["learning_rates"].tolist() == [(1e-3, 1e-2)]


def test_a_rate_that_some_seeds_lack_was_not_swept():
    rows = [row(seed=seed, learning_rate=rate) for seed in (0, 1) for rate in (1e-4, 1e-3)]
    runs = chosen_runs(frame([*rows, row(seed=0, learning_rate=1e-2)]))
    assert runs[["seed", "learning_rates"]].values.tolist() == [[0, (1e-4, 1e-3)], [1, (1e-4, 1e-3)]]


def test_mean_and_sample_deviation_over_seeds():
    cells = mqar_cells(frame([row(accuracy=0.2, seed=0), row(accuracy=0.4, seed=1), row(d_model=64)]))
    assert cells["seeds"].tolist() == [2, 1]
    assert cells["accuracy"].tolist() == pytest.approx([0.3, 0.5])
    assert cells["sd"].iloc[0] == pytest.approx(0.02**0.5)
    assert pd.isna(cells["sd"].iloc[1])


@pytest.mark.parametrize("old", [{"code": "old"}, {"num_train": 100}, {"max_epochs": 2}])
def test_rows_of_an_older_setup_do_not_count(old):
    new = {"num_train": 20_000, "max_epochs": 16, "code": "new"}
    rows = [row(accuracy=0.9, seed=1, created="2026-01-01T00:00:00+00:00", **new | old),
            row(accuracy=0.3, created="2026-01-02T00:00:00+00:00", **new)]
    assert mqar_cells(frame(rows))[["accuracy", "seeds"]].values.tolist() == [[0.3, 1]]


def test_only_the_given_resona_options_count():
    rows = frame([row(), row(layers=[0], accuracy=0.9, options={"gate": "none"}), row(layers=[0], accuracy=1.0)])
    assert sorted(mqar_runs(rows, {"gate": "null_chunk"})["accuracy"]) == [0.5, 1.0]
    assert sorted(mqar_runs(rows, {"gate": "none"})["accuracy"]) == [0.5, 0.9]


def test_runs_with_different_resona_options_are_never_mixed():
    rows = frame([row(), row(layers=[0], options={"gate": "none"}), row(layers=[0])])
    with pytest.raises(ValueError, match="baseconv resona0 of profile 'laptop' has rows with different gate"):
        mqar_runs(rows)
    with pytest.raises(ValueError, match="different gate"):
        mqar_runs(rows, {"encoder": "mean"})
    assert len(mqar_runs(rows, {"gate": "none"})) == 2


def test_failed_rows_and_other_experiments_do_not_count():
    failed = row(seed=1, accuracy=0.9, error="boom")
    other = make_row(**{name: row(seed=2)[name] for name in ("config", "seed", "data", "code", "profile", "machine")},
                     experiment="mad")
    assert mqar_cells(frame([row(), failed, other]))["seeds"].tolist() == [1]


def test_no_rows_and_foreign_rows():
    assert mqar_cells(pd.DataFrame({"profile": pd.Series(dtype=str)})).empty
    with pytest.raises(ValueError, match="lack the columns .*config.mixer"):
        mqar_cells(pd.DataFrame({"profile": ["laptop"]}))


# --- verdicts


def cell_at_paper_scale(**changes):
    return {"variant": "resona0", "num_layers": 4, "vocab_size": 8192, "length": 128, "pairs": 8,
            "num_train": 20_000, "num_test": 1_000, "max_epochs": 64, "chunk_size": 2, "top_k": 1,
            "learning_rates": PAPER_LEARNING_RATES, "accuracy": 0.5} | changes


def test_paper_scale_is_met_by_at_least_the_papers_budget():
    assert paper_scale_gaps(cell_at_paper_scale()) == []
    assert paper_scale_gaps(cell_at_paper_scale(num_train=100_000, num_test=3_000, max_epochs=100)) == []
    assert paper_scale_gaps(cell_at_paper_scale(variant="base", chunk_size=float("nan"), top_k=float("nan"))) == []
    assert paper_scale_gaps(cell_at_paper_scale(learning_rates=(1e-4, 4.64e-4, 2.15e-3, 1e-2, 3e-2))) == []
    assert paper_scale_gaps(cell_at_paper_scale(learning_rates=(1e-4,), accuracy=0.995)) == []  # nothing to gain


@pytest.mark.parametrize(("field", "value"), [
    ("num_layers", 2), ("vocab_size", 256), ("pairs", 4), ("num_train", 19_999), ("num_test", 500),
    ("max_epochs", 63), ("chunk_size", 64), ("top_k", 2), ("learning_rates", (1e-3, 1e-2)),
])
def test_each_field_can_keep_a_cell_from_paper_scale(field, value):
    assert len(paper_scale_gaps(cell_at_paper_scale(**{field: value}))) == 1


@pytest.mark.parametrize(("ours", "paper", "pairs", "at_paper_scale", "verdict"), [
    (None, 0.4, 4, False, NOT_RUN),
    (0.501, 0.401, 4, True, REPRODUCED),  # exactly 0.1 away
    (0.502, 0.401, 4, True, TREND_ONLY),  # both partial
    (0.401, 0.401, 4, False, TREND_ONLY),  # never reproduced at toy scale
    (0.20, 0.439, 4, False, NOT_REPRODUCED),  # ours guesses, the paper's does not
    (0.002, 0.051, 8, False, TREND_ONLY),  # both guess
    (0.30, 0.990, 4, False, NOT_REPRODUCED),  # the paper's solves it
    (0.95, 0.92, 4, False, TREND_ONLY),
    (0.85, 0.92, 4, False, TREND_ONLY),  # another level, but within 0.1
])
def test_base_verdicts(ours, paper, pairs, at_paper_scale, verdict):
    assert base_verdict(ours, paper, pairs=pairs, at_paper_scale=at_paper_scale) == verdict


@pytest.mark.parametrize(("ours", "paper", "known"), [
    (0.85, 0.92, True),  # within 0.1, and so is everything above
    (0.81, 0.92, False),  # more rates may bring it within 0.1
    (0.80, 0.85, False),  # within 0.1, and may leave it upwards
    (0.91, 0.80, True),  # solved where the paper's is not, whatever more rates find
    (0.60, 0.42, False),  # better, and may yet be solved
    (0.10, float("nan"), False),  # no such cell in the paper
])
def test_a_verdict_that_more_learning_rates_could_not_change(ours, paper, known):
    assert settled(ours, paper, pairs=4) == known


@given(ours=fractions, paper=fractions, more=fractions, pairs=st.integers(1, 32))
def test_a_settled_verdict_stands_whatever_is_better(ours, paper, more, pairs):
    if settled(ours, paper, pairs=pairs):
        verdicts = {base_verdict(value, paper, pairs=pairs, at_paper_scale=True) for value in (ours, max(ours, more))}
        assert len(verdicts) == 1


@pytest.mark.parametrize(("ours", "our_base", "paper_base", "at_paper_scale", "verdict"), [
    (None, 0.4, 0.4, False, NOT_RUN),
    (1.0, None, 0.4, False, NOT_RUN),  # nothing to compare with
    (0.990, None, 0.4, True, REPRODUCED),
    (0.989, 0.4, 0.4, True, NOT_REPRODUCED),  # does not recall, whatever its gain
    (0.995, 0.4, 0.4, False, TREND_ONLY),
    (0.98, 0.4, 0.4, False, NOT_REPRODUCED),
    (0.995, 0.99, 0.4, False, NOT_REPRODUCED),  # the paper has a gain here, we have none
    (0.995, 0.99, 0.992, False, TREND_ONLY),  # neither has room for one
    (0.991, 0.3, 0.99, False, TREND_ONLY),
])
def test_resona_verdicts(ours, our_base, paper_base, at_paper_scale, verdict):
    assert resona_verdict(ours, 1.0, our_base=our_base, paper_base=paper_base,
                          at_paper_scale=at_paper_scale) == verdict


@given(ours=fractions, base=fractions, paper=fractions, pairs=st.integers(1, 32))
def test_toy_scale_never_reproduces(ours, base, paper, pairs):
    verdicts = {base_verdict(ours, paper, pairs=pairs, at_paper_scale=False),
                resona_verdict(ours, 1.0, our_base=base, paper_base=paper, at_paper_scale=False)}
    assert verdicts <= {TREND_ONLY, NOT_REPRODUCED}


# --- Table 11


def test_table_11_has_every_cell_of_the_paper_once():
    table = mqar_table11(frame(grid()), "laptop", RESONA)
    printed = table.dropna(subset="paper")
    assert len(printed) == len(paper_values("resona", 11)) == sum(verdict_counts(table).values()) == 288
    assert not printed.duplicated(["model", "variant", "length", "d_model"]).any()
    assert (table["verdict"] == "").equals(table["paper"].isna())
    assert set(table.loc[table["paper"].isna(), "model"]) == {"Transformer"}
    ran = table[table["seeds"] > 0].groupby(["model", "variant"]).size()
    assert ran.to_dict() == dict.fromkeys(itertools.product(("BaseConv", "Mamba2", "Transformer"),
                                                            ("base", "resona0", "resona2")), 4)


def test_paper_scale_and_toy_scale_never_share_a_column():
    full = [row(layers=layers, accuracy=0.41 if layers is None else 1.0, max_epochs=64, learning_rate=rate)
            for rate in PAPER_LEARNING_RATES for layers in (None, [0])]
    toy = [row(layers=layers, d_model=64, accuracy=0.45) for layers in (None, [0])]
    table = mqar_table11(frame(full + toy), "laptop", RESONA)
    ran = table[table["seeds"] > 0].set_index(["d_model", "variant"])
    assert (ran["accuracy_paper"].notna() ^ ran["accuracy_toy"].notna()).all()
    assert ran.loc[32, "accuracy_paper"].tolist() == [0.41, 1.0]
    assert ran["verdict"].to_dict() == {(32, "base"): REPRODUCED, (32, "resona0"): REPRODUCED,
                                        (64, "base"): TREND_ONLY, (64, "resona0"): NOT_REPRODUCED}
    text = results_table_markdown(table)
    first, second = text.split("At toy scale")
    assert "0.410" in first and "0.450" not in first
    assert "0.450" in second and "0.410" not in second


def test_a_cell_with_learning_rates_to_try_is_not_run_yet_and_shown_apart():
    first = PAPER_LEARNING_RATES[0]
    rows = [row(accuracy=0.1, max_epochs=64, learning_rate=first),
            row(layers=[0], accuracy=0.5, max_epochs=64, learning_rate=first),
            row(layers=[2], accuracy=0.995, max_epochs=64, learning_rate=first)]  # no other rate could change it
    table = mqar_table11(frame(rows), "laptop", RESONA)
    ran = table[table["seeds"] > 0].set_index("variant")
    assert ran["verdict"].to_dict() == {"base": NOT_RUN, "resona0": NOT_RUN, "resona2": REPRODUCED}
    assert ran["accuracy_unfinished"].notna().tolist() == [True, True, False]
    done, unfinished = results_table_markdown(table).split("with learning rates still to be tried")
    assert "0.995" in done and "0.100" not in done and "toy" not in done + unfinished
    assert "1 of 4 learning rates" in unfinished and "0.100" in unfinished


def test_base_models_with_zoologys_examples_count_and_resona_is_judged_beside_its_own_budget():
    few = [row(accuracy=0.30), row(d_model=64, accuracy=0.35), row(layers=[0], accuracy=0.999)]
    full = [row(accuracy=accuracy, num_train=100_000, max_epochs=epochs, learning_rate=1e-2) | {"experiment": EXAMPLES}
            for accuracy, epochs in ((0.41, 64), (0.9, 13))]  # as many steps as with 20,000 is a control, no budget
    rows = frame(few + full)
    runs = mqar_runs(with_zoologys_examples(rows))
    base = runs[runs["variant"] == "base"].set_index("d_model")
    assert base["accuracy"].to_dict() == {32: 0.41, 64: 0.35} and set(base["num_train"]) == {100_000, 20_000}
    table = mqar_table11(rows, "laptop", RESONA)
    ran = table[table["seeds"] > 0].set_index(["d_model", "variant"])
    assert ran["verdict"].to_dict() == {(32, "base"): NOT_RUN, (64, "base"): TREND_ONLY, (32, "resona0"): TREND_ONLY}
    assert "100,000 examples, at most 64 epochs, 1 of 4 learning rates" in ran.loc[(32, "base"), "scale"]
    assert with_zoologys_examples(frame(few)).equals(frame(few))
    own = row(accuracy=0.42, num_train=100_000, max_epochs=64, learning_rate=2.15e-3)  # a sweep's own, of that budget
    both = mqar_runs(with_zoologys_examples(frame([*few, *full, own])))
    assert set(both.loc[(both["variant"] == "base") & (both["d_model"] == 32), "accuracy"]) == {0.41, 0.42}


def test_the_base_of_another_profile_is_no_comparison():
    rows = frame([row(layers=[0], accuracy=1.0), row(profile="smoke")])
    table = mqar_table11(rows, "laptop").set_index(["mixer", "length", "d_model", "variant"])
    assert table.loc[("baseconv", 64, 32, "resona0"), "verdict"] == NOT_RUN
    assert table.loc[("baseconv", 64, 32, "base"), "seeds"] == 0


def test_markdown_shows_paper_ours_spread_and_counts():
    text = results_table_markdown(mqar_table11(frame(grid(seeds=(0, 1))), "laptop", RESONA))
    assert "| BaseConv | 64, 4 | 32 | 0.401 | 0.400 ± 0.000 | trend only | 1.000 | 0.999 ± 0.000 |" in text
    assert "| Transformer | 64, 4 | 32 | – | 0.400 ± 0.000 | – |" in text
    assert "(laptop: 20,000 examples, at most 16 epochs)" in text
    assert text.endswith("264 not run.")


def test_tables_are_written(tmp_path):
    table = pd.DataFrame({"model": ["a|b", "c"], "value": [0.12345, None]})
    csv, md = write_table(table, tmp_path / "tables", "t")
    assert csv.read_text() == "model,value\na|b,0.12345\nc,\n"
    assert md.read_text() == markdown(table) + "\n"
    assert markdown(table).splitlines() == ["| model | value |", "| --- | --: |", r"| a\|b | 0.123 |", "| c | – |"]
    assert [mean_sd(0.5, 0.1, 2), mean_sd(0.5, None, 1), mean_sd(None, None, 0)] == ["0.500 ± 0.100", "0.500", "–"]


def test_the_claim_lists_the_cells_that_fail_without_resona():
    rows = frame([row(accuracy=0.3), row(layers=[0], accuracy=0.99), row(layers=[2], accuracy=0.98),
                  row("mamba2", accuracy=0.95), row("mamba2", [0], 0.5),  # the base does not fail
                  row(d_model=64, accuracy=0.2), row(d_model=64, layers=[0], accuracy=1.0),
                  row("attention", accuracy=0.1)])  # has no variant
    claim = mqar_claim(rows, "laptop", RESONA)
    assert claim[["model", "d_model", "base", "resona0", "holds"]].values.tolist() == [
        ["BaseConv", 32, 0.3, 0.99, False], ["BaseConv", 64, 0.2, 1.0, True]]
    assert claim_in_words(claim) == (
        "In 1 of the 2 cells where the base model is below 0.9, every variant of Resona, trained with the same "
        "budget, reaches 0.99; not in: BaseConv at length 64, dimension 32.")
    assert claim_in_words(claim[claim["holds"]]).endswith("reaches 0.99.")


# --- Figure 5


def test_figure_5_draws_the_rows_and_the_papers_values():
    figure = mqar_figure5(frame(grid(seeds=(0, 1))), "laptop", RESONA)
    assert [axes.get_title("left") for axes in figure.axes[:2]] == ["length 64, 4 pairs", "length 128, 8 pairs"]
    assert len(figure.axes) == 6  # two lengths, three variants
    lines = {(line.get_marker(), line.get_linestyle()): list(line.get_ydata()) for line in figure.axes[0].lines
             if line.get_marker() not in (None, "None", "")}
    circle = MODELS["baseconv"].marker
    assert lines[circle, "-"] == pytest.approx([0.4, 0.4])
    assert lines[circle, "--"] == pytest.approx([0.401, 0.439])
    assert len(lines.get((MODELS["attention"].marker, "--"), [])) == 0  # not in the paper


def test_figure_5_marks_the_rows_of_other_profiles():
    rows = frame(grid(base=0.4) + grid("smoke", (64,), (32,), base=0.1, num_train=5_000))
    figure = mqar_figure5(rows, "smoke", RESONA)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "this run (smoke):\n5,000 examples,\nup to 16 epochs" in labels
    assert "committed rows (laptop):\n20,000 examples,\nup to 16 epochs" in labels
    assert "the paper, Table 11" in labels
    assert "length 64, BaseConv, Base model: 0.100 at 32" in display.alt_text(figure)
    assert "committed rows (laptop): base models 0.400 to 0.400" in display.alt_text(figure)


def test_a_line_of_figure_5_joins_no_different_budgets():
    few = [row(accuracy=0.3, d_model=width, input_length=length) for width in (32, 64) for length in (64, 128)]
    full = row(accuracy=0.9, d_model=32, num_train=100_000, max_epochs=64) | {"experiment": EXAMPLES}
    figure = mqar_figure5(frame([*few, full]), "laptop")
    assert "length 64, BaseConv, Base model: 0.900 at 32, 0.300 at 64;" in display.alt_text(figure)
    assert "base: 20,000 to 100,000 examples" in figure.axes[0].get_title("left")
    own = [[y for y in line.get_ydata() if y == y] for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    assert [0.9] in own and [0.3] in own and not any({0.3, 0.9} <= {*line} for line in own)


def test_figure_5_without_own_rows():
    with pytest.raises(ValueError, match="no MQAR rows of profile 'h100' to draw; there are rows of: laptop"):
        mqar_figure5(frame(grid()), "h100")


def figures():
    rows = frame([*grid(), row(layers=[0], accuracy=0.3, options={"gate": "none"})])
    return {"figure5": mqar_figure5(rows, "laptop", RESONA), "curves": mqar_curves(rows, "laptop", RESONA),
            "state": mqar_state(rows, "laptop", RESONA), "ablation": mqar_ablation(rows, "laptop", RESONA)}


@pytest.mark.parametrize("name", ["figure5", "curves", "state", "ablation"])
def test_every_figure_is_legible_saved_and_described(name, tmp_path):
    figure = figures()[name]
    svg, png, text = display.save(figure, tmp_path, name)
    alt = text.read_text().strip()
    assert alt == display.alt_text(figure) and "0.999" in alt
    assert alt[:40] in svg.read_text() and alt[:40].encode() in png.read_bytes()
    assert all(part.get_fontsize() >= 8 for part in figure.findobj(Text) if part.get_text())
    again = display.save(figures()[name], tmp_path / "again", name)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in (svg, png, text)]


def test_models_and_sources_differ_without_colour():
    assert len({look.marker for look in MODELS.values()}) == len(MODELS)
    assert len({str(look["linestyle"]) for look in SOURCES.values()}) == len(SOURCES)


def test_drawing_leaves_global_settings_alone():
    before = dict(mpl.rcParams)
    figures()
    assert dict(mpl.rcParams) == before


def test_a_notebook_gets_a_small_png_with_alt_text(monkeypatch):
    figure, shown = figures()["figure5"], []
    monkeypatch.setattr(display, "display", shown.append)
    display.show(figure)
    data, metadata = DisplayFormatter().format(shown[0])
    assert metadata["image/png"]["alt"] == display.alt_text(figure)
    assert 10_000 < len(data["image/png"]) < 200_000


def test_a_figure_without_alt_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no alt text"):
        display.save(mpl.figure.Figure(), tmp_path / "out", "nameless")
    assert not (tmp_path / "out").exists()


# --- ablation, curves, state


def test_ablation_compares_settings_with_everything_else_equal():
    rows = frame([row(), row(layers=[0], accuracy=1.0), row(layers=[0], accuracy=0.3, options={"gate": "none"}),
                  row(layers=[0], accuracy=0.99, options={"memory_norm": False}),
                  row(layers=[0], accuracy=0.1, options={"alpha": 1.0}), row(layers=[2], accuracy=1.0)])
    table = ablation_table(rows, "laptop", RESONA)
    assert table[["variant", "gate", "memory_norm", "accuracy", "recalls"]].values.tolist() == [
        ["resona0", "none", True, 0.3, "no"], ["resona0", "null_chunk", False, 0.99, "0.99 or more"],
        ["resona0", "null_chunk", True, 1.0, "1.000"]]
    assert table["base_accuracy"].unique().tolist() == [0.5]
    control = ablation_table(rows, "laptop", RESONA, ["alpha"])
    assert control[["alpha", "accuracy"]].values.tolist() == [[0.5, 1.0], [1.0, 0.1]]


def test_ablation_refuses_what_it_cannot_show():
    with pytest.raises(ValueError, match="no option 'gates' to vary"):
        ablation_table(frame(grid()), "laptop", RESONA, ["gates"])
    with pytest.raises(ValueError, match="no cell of profile 'laptop' has rows with different alpha"):
        mqar_ablation(frame(grid()), "laptop", RESONA, ["alpha"])


def test_curves_end_where_training_stopped():
    rows = frame([row(accuracy=0.8, epochs=4), row(layers=[0], accuracy=1.0, epochs=2)])
    (axes,) = mqar_curves(rows, "laptop").axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.2, 0.4, 0.6000000000000001, 0.8], [0.5, 1.0]]
    with pytest.raises(ValueError, match="d_model 64"):
        mqar_curves(rows, "laptop", d_model=64)


def test_state_tells_base_from_resona_by_fill():
    (axes,) = mqar_state(frame([row(), row(layers=[0], accuracy=1.0)]), "laptop").axes
    fills = {float(line.get_ydata()[0]): line.get_markerfacecolor() for line in axes.lines}
    assert fills == {0.5: "none", 1.0: MODELS["baseconv"].colour}


def test_a_solved_model_is_judged_beside_a_base_that_needed_more_rates():
    rows = frame([row(accuracy=0.2, valid=0.2, learning_rate=0.01), row(accuracy=0.3, valid=0.3, learning_rate=0.003),
                  row(layers=[0], accuracy=1.0, learning_rate=0.01)])
    table = mqar_table11(rows, "laptop", RESONA)
    ran = table[table["accuracy_toy"].notna()].set_index("variant")
    assert ran.loc["base", "accuracy_toy"] == 0.3
    assert ran.loc["resona0", "verdict"] == TREND_ONLY


def test_rows_of_mad_beside_them_change_nothing():
    """Fields that only MQAR has become floats where rows of another experiment stand in the same table."""
    rows = load_profiles(Path(__file__).resolve().parents[1] / "outputs" / "results", "synthetic")
    rows = rows[(rows["profile"] == "laptop") & (rows["config.mixer"] == "mamba2")]
    assert (rows["experiment"] == "mad").any()
    cells = mqar_cells(rows)
    assert {str(cells[name].dtype) for name in ("length", "pairs", "d_model", "num_train")} == {"int64"}


def test_a_control_compares_at_the_rates_that_both_sides_have():
    few = [row(profile="paper", num_train=20_000, learning_rate=rate, accuracy=score)
           for rate, score in ((0.01, 0.3), (0.001, 0.9))]
    more = row(profile="paper", num_train=100_000, learning_rate=0.01, accuracy=0.8) | {"experiment": "mqar-examples"}
    (line,) = base_control(frame([*few, more]), "paper", "mqar-examples").to_dict("records")
    assert (line["rates"], line["accuracy"], line["its accuracy"]) == (1, "0.300", "0.800")
    assert (line["in use"], line["control"]) == ("20,000 examples 16 times", "100,000 examples 16 times")
    better = row(profile="paper", num_train=100_000, learning_rate=0.0001, accuracy=1.0) | {
        "experiment": "mqar-examples"}
    assert base_control(frame([*few, more, better]), "paper", "mqar-examples").to_dict("records") == [line]
    old = row(profile="paper", num_train=500, learning_rate=0.01, created="2020-01-01T00:00:00.000+00:00")
    beside = row(profile="paper") | {"experiment": "mad", "config": {"mixer": "rwkv5"}}  # lacks columns: NaN, so floats
    table = base_control(frame([old, *few, more, beside]), "paper", "mqar-examples")
    assert table.to_dict("records") == [line] and {str(table[name].dtype) for name in ("length", "pairs")} == {"int64"}


def test_every_budget_of_a_control_has_its_line_beside_the_papers_value():
    few = row("rwkv4", profile="paper", d_model=64, accuracy=0.2)
    more = [row("rwkv4", profile="paper", d_model=64, num_train=100_000, max_epochs=epochs,
                accuracy=score) | {"experiment": "mqar-examples"} for epochs, score in ((13, 0.5), (64, 0.9))]
    table = base_control(frame([few, *more]), "paper", "mqar-examples")
    assert table[["control", "accuracy", "its accuracy"]].to_numpy().tolist() == [
        ["100,000 examples 13 times", "0.200", "0.500"], ["100,000 examples 64 times", "0.200", "0.900"]]
    paper = paper_values("resona", 11)
    (value,) = paper[(paper["model"] == "RWKV") & (paper["variant"] == "base") & (paper["L"] == 64)
                     & (paper["d_model"] == 64)]["value"]
    assert table["paper"].tolist() == [value, value]


def test_a_control_names_each_models_own_setup_and_the_papers_value_for_its_task_alone():
    used = [row(profile="paper", num_train=20_000), row("mamba2", profile="paper", num_train=8_000)]
    more = [row(mixer, profile="paper", num_train=examples) | {"experiment": "mqar-examples"}
            for examples in (9_000, 100_000) for mixer in ("baseconv", "mamba2")]
    table = base_control(frame([*used, *more]), "paper", "mqar-examples")
    assert table["in use"].tolist() == 2 * ["20,000 examples 16 times"] + 2 * ["8,000 examples 16 times"]
    assert table["control"].tolist() == 2 * ["9,000 examples 16 times", "100,000 examples 16 times"], "by number"
    assert table["paper"].notna().all()
    for each in (*used, *more):
        each["config"]["num_kv_pairs"] = 8
    assert base_control(frame([*used, *more]), "paper", "mqar-examples")["paper"].isna().all()


def test_without_base_models_the_other_embeddings_have_no_lines():
    rows = frame([row(layers=[0], profile="paper", embedding_range=0.1)])
    assert base_control(rows, "paper", "mqar-embedding").empty and "No base model that ran" in claim_in_words(
        mqar_claim(rows, "paper", RESONA))
