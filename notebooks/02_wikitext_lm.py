# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Language modelling on real text, with and without Resona
#
# **Claim under test.** A recurrent language model that may look up chunks of what it has read predicts text better: its
# perplexity is lower than that of the same model without retrieval, and lower than that of a wider model with as many
# parameters. On short tasks that need no recall nothing is lost.
#
# **Regenerates** Table 2 of *Resona* (perplexity on WikiText-103), and Table 8 where its scores have been computed.

# %% tags=["parameters"]
profile: str = "smoke"  # name of this scale; the command line sets it
results_dir: str = "../outputs/results"  # where rows are stored; the command line sets it
output_dir: str = "../outputs/smoke"  # where figures and tables go; the command line sets it
fresh: bool = False  # train again what is stored already; the command line sets it
workers: int = 2  # training processes at a time, one thread each; 1 on a GPU
device: str = "cpu"  # where to train: cpu, or cuda
retry_failed: bool = False  # try again the runs that failed before
budget: int | None = None  # seconds; starts no run that would end later; 0 draws what is stored, with its gaps
corpus: str | dict = {"name": "squad", "validation": 0.03, "test": 0.03}  # text: a name of `lrm-recall data list`
own_tokenizer: bool = True  # tokens trained on the corpus' training split; false: the corpus' tokenizer
vocab_size: int = 1024  # of the model, and of its own tokenizer
augmentation: dict | None = None  # what extends the training articles, such as {"kind": "recap"}; null for nothing
mixers: list[str] = ["gla", "deltanet"]  # backbones: modules of lrm_recall.mixers
variants: list[str] = ["base", "sp", "resona"]  # sp: base made wider, to the size of the model with Resona
shapes: dict[str, dict] = {
    "gla": {"hidden_size": 64, "num_layers": 3, "mixer_args": {"num_heads": 2}},
    "deltanet": {"hidden_size": 64, "num_layers": 3, "mixer_args": {"num_heads": 2}},
}  # of each backbone: fields of Shape in lrm_recall/train/lm_grid.py
initializer_range: float = 0.06  # std of the initial weights: narrow models learn sooner with more than 0.02
length: int = 256  # tokens in a training sequence, and in a window of evaluation
steps: int = 240  # optimiser steps
batch_size: int = 1  # sequences a step
accumulation: int = 1  # parts that a step is taken in, where the memory is small
learning_rate: float = 4.0e-3  # highest of the cosine schedule; the paper's is 1.0e-3
bf16: bool = False  # train in bfloat16 (autocast)
log_every: int = 20  # steps between two entries of the loss curve
eval_every: int = 120  # steps between two validations, and checkpoints
seeds: list[int] = [0]  # repetitions: initial weights and order of the sequences
chunk_size: int = 16  # Resona: tokens in a chunk
top_k: int = 2  # Resona: chunks that each position looks into
encoder: str = "linear"  # Resona: how chunks and queries are embedded: mean, place or linear
gate: str = "null_chunk"  # Resona: weights of the found chunks, null_chunk or none
alpha: float | str = 0.5  # Resona: weight of the model's own output, in [0, 1], or learned
num_heads: int = 2  # Resona: heads of its cross-attention
memory_norm: bool = True  # Resona: normalise the initial embeddings before they are searched and read
chunks: str = "search"  # Resona: what it reads, its own finds (search) or those found before training (tf_idf)
shown_mixer: str = "gla"  # backbone of the controls, and of the view of what was retrieved
ablated: dict[str, list] = {"gate": ["none"], "encoder": ["place"]}  # Resona options, and values tried in their place
ablated_mixers: list[str] = ["gla"]  # backbones of that ablation
packed_variants: list[str] = ["base", "resona"]  # trained on packed articles too, to see what leaks between them
changed: dict[str, dict] = {}  # backbones that are trained once more, with these options of their mixer
zero_shot: list[str] = []  # tasks of Table 8 to score the trained models in; none: no scores
zero_shot_source: str = "auto"  # of their questions: auto, hub or offline (openbookqa, piqa and pubmedqa alone)
INTERACTIVE: bool = False  # show widgets (in JupyterLab, never in a batch run)

# %%
from pathlib import Path

from IPython.display import Markdown

from lrm_recall import provenance
from lrm_recall.figures.display import save, show
from lrm_recall.figures.lm_controls import ablation_table, changed_table, leak_table, retrieval_control, speed_table
from lrm_recall.figures.lm_curves import lm_curves
from lrm_recall.figures.lm_positions import lm_positions
from lrm_recall.figures.lm_retrieved import lm_retrieved, retrieved_texts
from lrm_recall.figures.lm_rows import with_mixer_args
from lrm_recall.figures.lm_table2 import lm_table2, table2_markdown
from lrm_recall.figures.lm_table8 import lm_table8, table8_markdown, table8_mixers
from lrm_recall.figures.tables import markdown, write_table
from lrm_recall.options import check_names
from lrm_recall.promises import promise
from lrm_recall.results import ResultStore, load_profiles, profile_path
from lrm_recall.sweep import deadline_after, plan_sweep, run_sweep
from lrm_recall.train.device import usable_device
from lrm_recall.train.lm_checkpoints import forget_checkpoints
from lrm_recall.train.lm_data import prepared_corpus
from lrm_recall.train.lm_grid import GROUP, experiment, lm_runs, write_runs
from lrm_recall.train.lm_scores import EXPERIMENT as SCORES
from lrm_recall.train.lm_scores import score_models, zero_shot_experiment, zero_shot_runs

print(provenance.describe(provenance.snapshot(), profile=profile, seeds=seeds))

# %% [markdown]
# ## The text
#
# Articles are one sample each, without title lines and empty lines, and split by article. No hub is needed at small
# scales: the text then comes from packages that carry some, and every row says which. The tokens of small models are
# their own (byte-level BPE of the training split), since GPT-2's 50,257 would be most of such a model.

# %%
prepared = prepared_corpus(corpus, vocab_size, own_tokenizer, augmentation)
print(prepared)
for name, split in prepared.manifest["splits"].items():
    print(f"{name:<11}{split['articles']:>7,} articles {split['tokens']:>12,} tokens {split['words']:>12,} words")

# %%
print(prepared.splits["test"][0]["title"], "\n", prepared.splits["test"][0]["text"][:600], "...")

# %% [markdown]
# ## How
#
# Each backbone is trained three times: `base`; `sp`, made wider until it has the parameters of the third; and `resona`,
# with retrieval beside the mixer of the first, the middle and the last layer (appendix A.4). The recipe is the paper's:
# AdamW with weight decay 0.01, gradients clipped to 1.0, a cosine schedule after a warm-up of 5 % of the steps; the
# weights of the best validation count. A training sequence is a window of one article, so nothing of another article
# is in sight.
#
# Two kinds of runs are added for one backbone (`shown_mixer`): Resona with no weight (alpha 1), and training on packed
# articles, where neither state nor retrieval stops at an article's beginning. A third kind tries other choices of what
# the paper leaves open (`ablated`, for `ablated_mixers`), and a fourth changes an option of a backbone itself
# (`changed`), in all three variants.

# %%
resona = {"chunk_size": chunk_size, "top_k": top_k, "encoder": encoder, "gate": gate, "alpha": alpha,
          "num_heads": num_heads, "memory_norm": memory_norm}
settings = {"corpus": corpus, "own_tokenizer": own_tokenizer, "vocab_size": vocab_size, "augmentation": augmentation,
            "initializer_range": initializer_range, "length": length, "steps": steps, "batch_size": batch_size,
            "accumulation": accumulation, "learning_rate": learning_rate, "bf16": bf16, "log_every": log_every,
            "eval_every": eval_every, "chunks": chunks}


def grid(mixers, variants, settings=settings, shapes=shapes, **options):
    """Every combination with every seed; `options` are changes to the Resona settings."""
    return lm_runs(mixers=mixers, shapes=shapes, variants=variants, seeds=seeds, resona=resona | options,
                   settings=settings)


# %%
main = grid(mixers, variants)
control = grid([shown_mixer], ["resona"], alpha=1.0)
packed = grid([shown_mixer], packed_variants, settings | {"packed": True}) if packed_variants else []
ablation = [run for option, values in ablated.items() for value in values
            for run in grid(ablated_mixers, ["resona"], **{option: value})] if ablated_mixers else []
usual_args = {mixer: shape.get("mixer_args", {}) for mixer, shape in shapes.items()}
check_names("changed", changed, shapes)
changed_args = {mixer: usual_args[mixer] | options for mixer, options in changed.items()}
other = {mixer: shapes[mixer] | {"mixer_args": args} for mixer, args in changed_args.items()}
other_mixers = grid(list(other), variants, shapes=other) if other else []
runs = main + control + packed + ablation + other_mixers
scoring = zero_shot_experiment(zero_shot_source, zero_shot, usable_device(device)) if zero_shot else None

# %% [markdown]
# The store knows which of these runs are done; only the others are trained. A run that is stopped, or killed, goes on
# from its last checkpoint and gives the same loss curve. The file below holds the runs for several GPUs:
# `lrm_recall.train.lm_command` spreads each over all of them, or, started once on each, parts the runs among them.

# %%
how = experiment(prepared, usable_device(device))
store = ResultStore(profile_path(results_dir, GROUP, profile))
files = [write_runs(runs, Path(output_dir) / "lm_runs.jsonl")]
print(str(plan_sweep(runs, how, store, fresh=fresh)).partition("\n")[0], f"for one {device} worker")

# %%
options = {"profile": profile, "on_row": forget_checkpoints}
often = {"workers": workers, "fresh": fresh, "retry_failed": retry_failed, "deadline": deadline_after(budget)}
own = run_sweep(runs, how, store, **often, **options)
stored = load_profiles(results_dir, GROUP)
rows, changed_rows = (with_mixer_args(stored, profile, args) for args in (usual_args, changed_args))

# %% [markdown]
# ## Table 2: the paper beside ours
#
# Perplexity on the test split: every token once, in windows of one article, the separator between articles not counted.
# By word, the nats of all tokens are divided by the number of words, so that models with different tokenizers compare.
# The verdicts are about differences, in nats a token; the rules are in `lrm_recall/figures/lm_table2.py`. At toy scale
# `trend only` is the most there is: Resona is better than its base and than the size-matched model.

# %%
table2 = lm_table2(rows, profile, resona)
table2_text = table2_markdown(table2)
files += write_table(table2, output_dir, "lm_table2", table2_text)
Markdown(table2_text)

# %% [markdown]
# Differences are between runs of the same seed, which read the same text in the same order; a model with Resona also
# starts from the weights of its base, where their shapes agree.
#
# ## Loss curves
#
# A line that still falls at its end has not seen enough text: then the table compares how fast models learn.

# %%
curves = lm_curves(rows, profile, resona)
files += save(curves, output_dir, "lm_curves")
show(curves)

# %% [markdown]
# ## Perplexity by position
#
# A model that makes use of what it has read gets better with every token that stands before. If retrieval helps, its
# line parts from the others where the first chunks are complete, and more so towards the right.

# %%
positions = lm_positions(rows, profile, resona)
files += save(positions, output_dir, "lm_positions")
show(positions)

# %% [markdown]
# ## What was retrieved
#
# One article of the test split, as the trained model reads it. A row is a chunk that asks, a column a chunk that is
# read. A dark line just left of the grey means that a layer reads what was said just before, which the state knows too.

# %%
retrieved = lm_retrieved(rows, profile, shown_mixer, resona)
files += save(retrieved, output_dir, "lm_retrieved")
show(retrieved)

# %%
texts = retrieved_texts(rows, profile, shown_mixer, resona)
files += write_table(texts, output_dir, "lm_retrieved_texts")
Markdown(markdown(texts))

# %% [markdown]
# ## Negative control: retrieval that cannot help
#
# If the gain came from more parameters, a model trained with alpha 1, whose retrieval has no weight, would have it too.
# If what is found did not matter, random chunks of the past would do as well.

# %%
helpless = retrieval_control(rows, profile, resona, shown_mixer)
files += write_table(helpless, output_dir, "lm_control")
Markdown(markdown(helpless))

# %% [markdown]
# ## Ablation: other choices in Resona
#
# One option changed at a time, beside the options in use at the same seeds: both start from the same weights and read
# the same text in the same order. Even so rounding alone parts two runs in the end: alpha 1 above is the base model to
# the bit, and what lies between the two after training is what a single seed can tell apart, and no less. `layers` are
# those that retrieve; in use are the first, the middle and the last.

# %%
ablations = ablation_table(rows, profile, resona, ablated)
ablations_text = markdown(ablations) if len(ablations) else "No other choices were tried in this profile."
files += write_table(ablations, output_dir, "lm_ablation", ablations_text)
Markdown(ablations_text)

# %% [markdown]
# ## Does it depend on the backbone's own options?
#
# DeltaNet is the only one of Table 2's backbones without an output gate (in Hymba the Mamba half has one). Where
# `changed` asks for it, a backbone is trained once more with other options of its mixer, all variants alike:

# %%
others = changed_table(rows, changed_rows, profile, resona, changed)
others_text = markdown(others) if len(others) else "Not asked for in this profile, or not run yet."
files += write_table(others, output_dir, "lm_changed", others_text)
Markdown(others_text)

# %% [markdown]
# ## What leaks between packed articles
#
# The end of another article in front of each test article: what does it do to the loss of the article behind it? No
# mixer here can reset its state inside a sequence yet, so a model trained on packed articles must learn to forget; one
# trained on single articles never sees such a thing, and is not meant to.

# %%
leaks = leak_table(rows, profile, resona)
files += write_table(leaks, output_dir, "lm_leaks") if len(leaks) else []
Markdown(markdown(leaks) if len(leaks) else "Not asked for.")

# %% [markdown]
# ## Table 8: zero-shot scores
#
# The models of Table 2 that the paper scores too, in the tasks that `zero_shot` names, by lm-evaluation-harness. A
# model is scored on the machine that has its weights. The paper's claim is that Resona loses nothing where nothing is
# to be recalled.

# %%
score_store = ResultStore(profile_path(results_dir, SCORES, profile))
scores, what = [], "Not asked for in this profile."
if scoring is not None:
    in_table8 = plan_sweep([run for run in main if run.mixer in table8_mixers()], how, store)
    trained = {key: in_table8.specs[key] for key in in_table8.stored}
    scores, what = score_models(zero_shot_runs(trained, zero_shot), scoring, score_store, profile=profile, **often)
print(what)

# %%
table8 = lm_table8(rows, load_profiles(results_dir, SCORES), profile, resona)
table8_text = table8_markdown(table8)
files += write_table(table8, output_dir, "lm_table8", table8_text)
Markdown(table8_text)

# %% [markdown]
# ## What it costs to train
#
# Tokens a second, as measured inside the runs, the first entry of each log left out; of several seeds the fastest,
# since runs may share a device.

# %%
speed = speed_table(rows, profile, resona)
files += write_table(speed, output_dir, "lm_speed")
Markdown(markdown(speed))

# %% [markdown]
# ## Try it yourself
#
# Change `alpha` below and run the cell: `"learned"` lets every position choose; 0 keeps the retrieved part alone. Other
# things to change: `top_k=4`, `chunk_size=32`, `encoder="mean"`. A row is stored, so what was tried is there at once.

# %%
tried = {"alpha": alpha}
tried_rows = run_sweep(grid([shown_mixer], ["resona"], **tried), how, store, **options)
print(tried, [round(row["metrics"]["test_ppl"], 2) for row in tried_rows])

# %%
if INTERACTIVE:
    from ipywidgets import interact

    interact(lambda mixer: show(lm_retrieved(rows, profile, mixer, resona)), mixer=mixers)

# %% [markdown]
# ## What is different, and limits
#
# * **Text.** The paper trains on WikiText-103 (100 million words) after a large model has extended every article by
#   text that makes retrieval useful. Small scales train on far less, as it is; `augmentation` extends it.
# * **What the paper leaves open.** Length of a sequence, batch size, tokenizer, chunk size and k of this experiment.
#   The parameters of Table 2 fit a vocabulary of 32,000 for GLA, DeltaNet and RetNet (131.6, 131.4 and 132.6 million
#   here). What Resona adds there, 10 to 14 million, is two to three times what our three layers add (4.4 million).
# * **Size-matched models** have here the width that comes nearest to the size with Resona; in the profile `paper` it is
#   the paper's 640. Hymba has none: there Resona takes the place of attention, and adds nothing.
# * **Retrieval** is trained along with the model, by its gate; the paper searches once, before training.
# * A difference of a hundredth of a nat between two runs with one seed each means nothing.
#
# The last cell promises the rows and files of this notebook to the runner, which checks that they are there.

# %%
promise(store, [row["key"] for row in own], files)
if scores:
    promise(score_store, [row["key"] for row in scores])
