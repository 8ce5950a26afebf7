"""Tables and figures of the language-model runs, drawn from made-up rows."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pandas as pd
import pytest

from lrm_recall.figures.display import alt_text
from lrm_recall.figures.lm_controls import ablation_table, changed_table, leak_table, retrieval_control, speed_table
from lrm_recall.figures.lm_curves import lm_curves
from lrm_recall.figures.lm_positions import lm_positions
from lrm_recall.figures.lm_retrieved import lm_retrieved, retrieved_texts
from lrm_recall.figures.lm_rows import lm_cells, lm_rows, with_mixer_args
from lrm_recall.figures.lm_table2 import PAPER_SHAPES, lm_table2, table2_markdown
from lrm_recall.figures.lm_table8 import lm_table8, table8_markdown, table8_mixers
from lrm_recall.figures.verdicts import NOT_REPRODUCED, NOT_RUN, REPRODUCED, TREND_ONLY
from lrm_recall.paper import paper_values
from lrm_recall.results import frame, make_row
from lrm_recall.train.language_model import LMRun
from lrm_recall.train.lm_grid import lm_runs

SHAPES = {mixer: {"hidden_size": 64, "num_layers": 3, "mixer_args": {"num_heads": 2}} for mixer in ("gla", "deltanet")}
SETTINGS = {"corpus": "squad", "vocab_size": 512, "length": 64, "steps": 100, "batch_size": 4}
RESONA = {"chunk_size": 8, "top_k": 1, "alpha": 0.5}
LOSSES = {"base": 4.0, "sp": 3.98, "resona": 3.9}


def make(run: LMRun, loss: float, created: int = 0, **changes) -> dict:
    """A row as `run_lm` and a sweep would make it."""
    layers = [{"layer": n, "shares": [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.25, 0.75, 0.0]], "weights": [0, 0.5, 0.9]}
              for n in (run.resona or {}).get("layers", [])]  # fmt: skip
    metrics = {
        "test_loss": loss, "test_ppl": math.exp(loss), "test_word_ppl": math.exp(1.3 * loss), "valid_loss": loss,
        "best_step": 100, "parameters": 1000 * run.hidden_size, "tokens": 25_600, "tokens_per_s": 1000.0, "mfu": None,
        "alone_loss": loss, "behind_loss": loss + (0.0 if run.packed else 0.25),
        "test_positions": [{"start": 0, "end": 16, "tokens": 10, "loss": loss + 0.1},
                           {"start": 16, "end": 63, "tokens": 30, "loss": loss - 0.1}],
    }  # fmt: skip
    if layers:
        metrics |= {"random_chunks_ppl": math.exp(loss + 0.2), "retrieval": {
            "title": "An article", "chunk_size": 8, "texts": ["one", "two two", "three\nthree"], "layers": layers}}
    rest = {"grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 1, "seconds": 1}
    history = [{"step": step, "loss": loss + 1 / step, **rest} for step in (50, 100)]
    row = make_row(
        experiment="language_model", config=asdict(run), seed=run.seed, code="c", profile="smoke", machine={},
        data={"source": "offline:squad", "revision": "r", "corpus": "squad"}, metrics=metrics,
        history=[*history, {"step": 100, "valid_loss": loss}],
    )  # fmt: skip
    return {**row, "created": f"2026-01-01T00:00:{created:02d}.000+00:00", **changes}


def grid(mixers=("gla", "deltanet"), seeds=(0,), settings=None, **resona) -> list[LMRun]:
    return lm_runs(mixers=list(mixers), shapes=SHAPES, seeds=list(seeds), resona=RESONA | resona,
                   settings=SETTINGS | (settings or {}))


def table(rows: list[dict]) -> pd.DataFrame:
    return lm_table2(frame(rows), "smoke", RESONA).set_index(["mixer", "variant"])


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    made = [make(run, LOSSES[run.variant]) for run in grid()]
    made += [make(run, 3.95) for run in grid(["gla"], alpha=1.0) if run.variant == "resona"]
    made += [make(run, LOSSES[run.variant]) for run in grid(["gla"], settings={"packed": True}) if run.variant != "sp"]
    return frame(made)


def test_the_fastest_seed_tells_the_speed():
    made = [make(run, 4.0) for run in grid(["gla"], seeds=(0, 1)) if run.variant == "base"]
    for row, speed in zip(made, (900.0, 300.0), strict=True):  # the second shared its GPU
        row["metrics"]["tokens_per_s"] = speed
    assert speed_table(frame(made), "smoke", RESONA).iloc[0].tolist() == ["GLA", "900"]


def test_every_line_of_table_2_is_there(rows):
    found = lm_table2(rows, "smoke", RESONA)
    assert len(found) == 14 and found["paper_ppl"].notna().all()
    assert list(found["mixer"].unique()) == ["mamba", "gla", "deltanet", "retnet", "hymba"]
    line = found.set_index(["mixer", "variant"]).loc["gla", "resona"]
    assert (line["paper_params"], line["paper_ppl"]) == (145, 13.892)
    assert line["ppl_toy"] == pytest.approx(math.exp(3.9)) and math.isnan(line["ppl_paper"])
    assert (line["gain_base"], line["gain_sp"]) == (pytest.approx(0.1), pytest.approx(0.08))
    hymba = found.set_index(["mixer", "variant"]).loc["hymba"]
    assert hymba["paper_ppl"].to_dict() == {"base": 16.688, "resona": 15.887}


def test_verdicts_are_about_differences():
    verdicts = table([make(run, LOSSES[run.variant]) for run in grid()])["verdict"]
    assert verdicts["gla", "resona"] == TREND_ONLY and verdicts["gla", "sp"] == TREND_ONLY
    assert verdicts["gla", "base"] == "" and verdicts["mamba", "base"] == NOT_RUN


@pytest.mark.parametrize("losses, resona, sp", [
    ({"base": 4.0, "sp": 3.9, "resona": 3.95}, NOT_REPRODUCED, TREND_ONLY),  # the wider base is better still
    ({"base": 4.0, "sp": 4.0, "resona": 3.997}, NOT_REPRODUCED, TREND_ONLY),  # below what counts
    ({"base": 4.0, "sp": 4.1, "resona": 3.9}, TREND_ONLY, NOT_REPRODUCED),
])  # fmt: skip
def test_resona_must_beat_both(losses, resona, sp):
    verdicts = table([make(run, losses[run.variant]) for run in grid(["gla"])])["verdict"]
    assert (verdicts["gla", "resona"], verdicts["gla", "sp"]) == (resona, sp)


def test_a_difference_within_its_spread_over_seeds_is_none():
    runs = grid(["gla"], seeds=[0, 1])
    found = table([make(run, LOSSES[run.variant] + 0.15 * run.seed * (run.variant == "resona")) for run in runs])
    assert found.loc[("gla", "resona"), "seeds"] == 2 and found.loc[("gla", "resona"), "gain_base"] > 0.02
    assert found.loc[("gla", "resona"), "verdict"] == NOT_REPRODUCED  # 0.1 better with one seed, 0.05 worse with one
    assert "2 seeds" in table2_markdown(found.reset_index())
    alike = table([make(run, LOSSES[run.variant] + 0.2 * run.seed) for run in runs])  # seeds differ, the gain does not
    assert alike.loc[("gla", "resona"), "sd_toy"] > 0.1 and alike.loc[("gla", "resona"), "verdict"] == TREND_ONLY


@pytest.mark.parametrize("lacks, other", [("base", "sp"), ("sp", "base")])
def test_without_one_of_the_two_resona_can_fail_and_not_succeed(lacks, other):
    runs = [run for run in grid(["gla"]) if run.variant != lacks]
    assert table([make(run, LOSSES[run.variant]) for run in runs])["verdict"]["gla", "resona"] == NOT_RUN
    worse = table([make(run, {**LOSSES, "resona": 4.1}[run.variant]) for run in runs])
    assert worse["verdict"]["gla", "resona"] == NOT_REPRODUCED and worse["verdict"]["gla", other] in (NOT_RUN, "")


def test_only_the_papers_own_scale_can_be_reproduced():
    (base,) = [run for run in grid(["gla"]) if run.variant == "base"]
    layers, width, _ = PAPER_SHAPES["gla"]
    run = replace(base, num_layers=layers, hidden_size=width, steps=8000, mixer_args={"num_heads": 4})
    data = {"source": "hub:Salesforce/wikitext + written of train", "revision": "r", "corpus": "wikitext103-written"}
    full = table([make(run, math.log(14.5), data=data)]).loc[("gla", "base")]
    assert full["verdict"] == REPRODUCED and full["gaps"] == "" and full["ppl_paper"] == pytest.approx(14.5)
    far = table([make(run, math.log(16), data=data)]).loc[("gla", "base")]
    assert far["verdict"] == NOT_REPRODUCED
    toy = table([make(run, math.log(14.5))]).loc[("gla", "base")]
    assert toy["verdict"] == "" and "wikitext103 from the hub" in toy["gaps"] and math.isnan(toy["ppl_paper"])


def test_the_newest_setup_counts_and_controls_stay_apart(rows):
    assert len(lm_rows(rows, RESONA)) == 8 and len(lm_rows(rows)) == 8  # of Resona with alpha 0.5 and 1: the newest
    (base,) = [run for run in grid(["gla"]) if run.variant == "base"]
    both = frame([make(base, 4.0), make(replace(base, steps=200), 3.0, created=1)])
    assert lm_cells(both)["test_loss"].tolist() == [3.0]
    assert lm_rows(pd.DataFrame({"profile": []})).empty


def test_markdown_says_what_ran_and_counts(rows):
    text = table2_markdown(lm_table2(rows, "smoke", RESONA))
    assert "At toy scale" in text and "smoke: squad from offline:squad" in text and "At the paper's scale" not in text
    assert "Of the 14 lines of Table 2: 0 reproduced, 4 trend only, 0 not reproduced, 8 not run; 2 base models" in text
    assert "Of the 14 lines" in table2_markdown(lm_table2(pd.DataFrame({"profile": []}), "smoke"))


def test_figures_say_in_words_what_they_show(rows):
    curves, positions = lm_curves(rows, "smoke", RESONA), lm_positions(rows, "smoke", RESONA)
    assert "GLA, + Resona: validation 3.900" in alt_text(curves)
    assert "GLA, Base model: 60.3 to 49.4" in alt_text(positions)
    retrieved = lm_retrieved(rows, "smoke", "gla", RESONA)
    assert "Layer 2: 100% of the chunks mostly read the one before" in alt_text(retrieved)
    for figure in (curves, positions, retrieved):
        assert [axes for axes in figure.axes if axes.get_visible()]


def test_the_texts_that_are_trusted_most_come_first(rows):
    texts = retrieved_texts(rows, "smoke", "gla", RESONA)
    assert texts["chunk that asks"].tolist() == ["three three", "two two"]
    assert texts["chunk that most of its positions read"].tolist() == ["two two", "one"]
    assert texts["how far back"].tolist() == ["1 chunks", "1 chunks"]


@pytest.mark.parametrize("draw", [lm_curves, lm_positions, lambda rows, profile: lm_retrieved(rows, profile, "mamba")])
def test_nothing_to_draw_is_an_error(rows, draw):
    with pytest.raises(ValueError, match="no "):
        draw(rows, "smoke" if draw not in (lm_curves, lm_positions) else "laptop")


def test_controls(rows):
    lines = retrieval_control(rows, "smoke", RESONA, "gla").set_index("retrieval")["test PPL"]
    assert lines.to_dict() == pytest.approx({
        "none": math.exp(4.0), "the chunks that it finds": math.exp(3.9), "random chunks of the past": math.exp(4.1),
        "trained without any weight": math.exp(3.95)})
    leaks = leak_table(rows, "smoke", RESONA)
    assert leaks["leak"].tolist() == pytest.approx([0.25, 0.0, 0.25, 0.0])
    assert leaks["trained on"].tolist() == ["one article a sequence", "packed articles"] * 2
    ablation = ablation_table(rows, "smoke", RESONA, {"alpha": [1.0, 0.2]})  # 0.2 did not run
    assert ablation["value"].tolist() == ["1.0"]
    assert ablation[["nats below in use", "nats below base"]].to_numpy().tolist() == [pytest.approx([-0.05, 0.05])]
    assert speed_table(rows, "smoke", RESONA).shape == (2, 4)


def test_gains_are_between_runs_of_the_same_seed():
    base, resona = ([run for run in grid(["gla"], seeds=(0, 1)) if run.variant == name] for name in ("base", "resona"))
    made = [make(base[0], 4.0), make(base[1], 5.0), make(resona[0], 3.9)]  # the second seed with Resona is still to run
    line = table(made).loc["gla", "resona"]
    assert line["gain_base"] == pytest.approx(0.1) and math.isnan(line["gain_sp"])


def test_backbones_with_other_options_stand_apart():
    options = {"deltanet": {"use_gate": True, "qk_norm": "sum"}}
    usual = {mixer: shape["mixer_args"] for mixer, shape in SHAPES.items()}
    changed = {"deltanet": usual["deltanet"] | options["deltanet"]}
    other = [replace(run, mixer_args=changed["deltanet"]) for run in grid(["deltanet"], seeds=(0, 1))]
    made = [make(run, LOSSES[run.variant] + run.seed) for run in grid(seeds=(0, 1, 2))]
    made += [make(run, LOSSES[run.variant] - 1, created=9) for run in other]
    rows, apart = (with_mixer_args(frame(made), "smoke", args) for args in (usual, changed))
    assert (len(rows), len(apart)) == (18, 6) and lm_rows(rows)["test_loss"].min() == 3.9
    table = changed_table(rows, apart, "smoke", RESONA, options)
    assert table["backbone"].tolist() == ["DeltaNet"] * 2 and table["below base: seeds"].tolist() == [2, 2]
    assert table["mixer"].tolist() == ["as in Table 2", "use_gate True, qk_norm sum"]
    assert table["+ Resona"].tolist() == pytest.approx([math.exp(4.4), math.exp(2.9)])  # of the seeds that both have
    assert table["nats below size-matched"].tolist() == pytest.approx([0.08, 0.08])
    assert table["below base: sd"].tolist() == pytest.approx([0.0, 0.0])
    fewer = apart[(apart["config.variant"] != "sp") | (apart["seed"] == 1)]  # one size-matched run is still to come
    table = changed_table(rows, fewer, "smoke", RESONA, options)
    assert table["below base: seeds"].tolist() == [2, 2] and table["below size-matched: seeds"].tolist() == [1, 1]
    assert table["nats below size-matched"].tolist() == pytest.approx([0.08, 0.08])
    assert len(with_mixer_args(frame(made), "laptop", usual)) == 24  # other profiles' rows stay
    assert with_mixer_args(frame(made), "smoke", {"gla": {}}).empty
    assert changed_table(rows, apart[:0], "smoke", RESONA, options).empty
    none = frame([])
    assert with_mixer_args(none, "smoke", usual).empty


def test_a_change_of_one_seed_is_held_against_that_seed(rows):
    base, resona = ([run for run in grid(["gla"], seeds=(0, 1)) if run.variant == name] for name in ("base", "resona"))
    (changed,) = [run for run in grid(["gla"], gate="none") if run.variant == "resona"]
    losses = zip((*base, *resona, changed), (5.0, 3.0, 4.0, 2.5, 3.9), strict=True)
    both = frame([make(run, loss) for run, loss in losses])
    in_use = {**RESONA, "gate": "null_chunk"}
    (line,) = ablation_table(both, "smoke", in_use, {"gate": ["none"]}).to_dict("records")
    assert (line["backbone"], line["seeds"]) == ("GLA", 1)
    assert [line[name] for name in ("nats below in use", "nats below base")] == pytest.approx([0.1, 1.1])
    (more,) = [run for run in grid(["gla"], gate="none", seeds=(2,)) if run.variant == "resona"]
    losses = zip((*base, *resona, more), (5.0, 3.0, 4.0, 2.5, 3.9), strict=True)
    other = frame([make(run, loss) for run, loss in losses])
    assert ablation_table(other, "smoke", in_use, {"gate": ["none"]}).empty  # no seed to hold it against
    assert list(retrieval_control(both, "paper", in_use, "gla").columns)[:2] == ["backbone", "model"]
    control = retrieval_control(both, "smoke", in_use, "gla").set_index("model")
    assert control.loc["+ Resona", "nats below base"] == pytest.approx(0.75)


def test_resona_in_other_layers_is_an_ablation_and_no_line_of_table_2(rows):
    usual, elsewhere = ([run for run in grid(["gla"], **layers) if run.variant == "resona"]
                        for layers in ({}, {"layers": [1]}))  # fmt: skip
    assert usual[0].resona["layers"] == [0, 1, 2]
    base = [run for run in grid(["gla"]) if run.variant == "base"]
    made = [make(*base, 4.0), make(*usual, 3.9), make(*elsewhere, 3.7, created=1)]  # the newest
    assert table(made).loc[("gla", "resona"), "ppl_toy"] == pytest.approx(math.exp(3.9))
    (line,) = ablation_table(frame(made), "smoke", RESONA, {"layers": [[1]]}).to_dict("records")
    assert (line["option"], line["value"]) == ("layers", "[1]")
    assert [line[name] for name in ("nats below in use", "nats below base")] == pytest.approx([0.2, 0.3])


def scored(trained: dict, created: int = 1, questions: int = 500, limit: int | None = None, **tasks: dict) -> dict:
    """The row of the scores of the model that a row trained; a task's two accuracies, or the one that it has."""
    config = {"trained": trained["key"], "limit": limit,
              **{name: trained["config"][name] for name in ("mixer", "variant", "seed")}}  # fmt: skip
    metrics = {task: scores | ({} if task == "AVG" else {"questions": questions}) for task, scores in tasks.items()}
    row = make_row(experiment="table8", config=config, seed=trained["seed"], code="c", profile="smoke", machine={},
                   data={"source": "s", "revision": "r"}, metrics=metrics)
    return {**row, "created": f"2026-01-01T00:00:{created:02d}.000+00:00"}


def trained_models(**resona) -> dict[str, dict]:
    return {run.variant: make(run, LOSSES[run.variant]) for run in grid(["gla"], **resona)}


def test_table_8_is_not_run_until_it_is(rows):
    found = lm_table8(rows, pd.DataFrame(), "smoke", RESONA)
    assert len(found) == 6 * 14 and set(found["verdict"]) == {NOT_RUN}
    assert "not run" in table8_markdown(found)
    values = paper_values("resona", 8)
    assert len(found) == values["metric"].str.startswith("accuracy").sum()
    assert set(lm_table8(pd.DataFrame(), pd.DataFrame(), "smoke")["verdict"]) == {NOT_RUN}
    assert table8_mixers() == ["gla", "deltanet"]


def test_table_8_compares_with_our_own_base_within_what_chance_explains():
    models = trained_models()
    made = [scored(models["base"], **{"ARC-C": {"accuracy": 0.2}, "Hella.": {"accuracy": 0.3},
                                      "AVG": {"accuracy": 0.25}}),
            scored(models["resona"], **{"ARC-C": {"accuracy": 0.19}, "Hella.": {"accuracy": 0.2}})]
    found = lm_table8(frame(list(models.values())), frame(made), "smoke", RESONA)
    text, found = table8_markdown(found), found.set_index(["variant", "task", "metric", "model"])
    cell = found.loc["resona", "ARC-C", "accuracy", "GLA"]
    assert (cell["paper"], cell["ours"], cell["verdict"]) == (0.192, 0.19, TREND_ONLY)
    assert cell["error"] == pytest.approx(math.sqrt(0.19 * 0.81 / 500))
    assert found.loc[("resona", "Hella.", "accuracy", "GLA"), "verdict"] == NOT_REPRODUCED
    assert found.loc[("base", "ARC-C", "accuracy", "GLA"), "verdict"] == ""
    average = found.loc["base", "AVG", "accuracy", "GLA"]
    assert average["error"] == pytest.approx(math.hypot(*(math.sqrt(p * (1 - p) / 500) for p in (0.2, 0.3))) / 2)
    assert "0.192" in text and "0.190 ± 0.018" in text
    assert "Questions from s;" in text and "3 of base and size-matched models without" in text
    assert "Of the 84 accuracies of Table 8: 0 reproduced, 1 trend only, 1 not reproduced, 79 not run" in text
    assert "GLA in Hella. (accuracy)" in text


def test_table_8_is_of_the_models_of_table_2_and_their_newest_scores():
    models, elsewhere = trained_models(), trained_models(layers=[1])
    trained = frame([*models.values(), *elsewhere.values()])
    made = [scored(models["resona"], 1, **{"ARC-C": {"accuracy": 0.1}}),
            scored(models["resona"], 3, **{"ARC-C": {"accuracy": 0.2}}),
            scored(elsewhere["resona"], 5, **{"ARC-C": {"accuracy": 0.9}})]
    found = lm_table8(trained, frame(made), "smoke", RESONA).set_index(["mixer", "variant", "task"])
    assert found.loc[("gla", "resona", "ARC-C"), "ours"].iloc[0] == 0.2
    assert found.loc[("gla", "resona", "ARC-C"), "verdict"].iloc[0] == NOT_RUN  # no base to hold it against


def test_table_8_compares_what_was_asked_alike_and_keeps_each_task():
    models = trained_models()
    base, resona = models["base"], models["resona"]
    made = [scored(base, 1, PIQA={"accuracy": 0.5}), scored(resona, 1, PIQA={"accuracy": 0.4}),
            scored(resona, 2, OBQA={"accuracy": 0.3}),  # later, in another task
            scored(resona, 3, limit=10, questions=10, PIQA={"accuracy": 0.9})]  # a try
    found = lm_table8(frame([base, resona]), frame(made), "smoke", RESONA).dropna(subset="ours")
    found = found.set_index(["variant", "task"])["verdict"]
    assert found["resona", "PIQA"] == NOT_REPRODUCED and found["resona", "OBQA"] == NOT_RUN
    other = [scored(base, 4, questions=1838, PIQA={"accuracy": 0.5})]
    found = lm_table8(frame([base, resona]), frame(made + other), "smoke", RESONA).dropna(subset="ours")
    assert found.set_index(["variant", "task"])["verdict"]["resona", "PIQA"] == NOT_RUN


def test_seeds_are_averaged_in_table_8():
    first, second = (make(run, 4.0) for run in grid(["gla"], seeds=(0, 1)) if run.variant == "base")
    made = [scored(row, **{"PIQA": {"accuracy": value, "accuracy_norm": 0.5}})
            for row, value in ((first, 0.5), (second, 0.6))]
    ran = lm_table8(frame([first, second]), frame(made), "smoke", RESONA).dropna(subset="ours")
    cell = ran.set_index("metric").loc["accuracy"]
    assert (cell["ours"], cell["seeds"]) == (pytest.approx(0.55), 2)
    assert cell["error"] == pytest.approx(sum(math.sqrt(p * (1 - p) / 500) for p in (0.5, 0.6)) / 2)
