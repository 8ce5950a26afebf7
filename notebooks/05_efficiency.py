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
# # What recall costs: prefill, decoding and memory
#
# **Claim under test.** Retrieval inside a recurrent layer stays cheap: every position looks into a fixed number of
# chunks, so time grows with the length as it does without (*Resona*, section 4.5). The paper pays 1.9 times the
# prefill of GLA at 128K tokens for it; the arithmetic says that it should be nearly free. A larger state (*StateX*)
# costs speed in the layers that have it, and nothing elsewhere.
#
# **Regenerates** Tables 5, 6 and 7 of *Resona*; adds what neither paper measures: the cost of StateX, of training
# with Resona, and of a cold start.

# %% tags=["parameters"]
profile: str = "smoke"  # name of this scale; the command line sets it
results_dir: str = "../outputs/results"  # where rows are stored; the command line sets it
output_dir: str = "../outputs/smoke"  # where figures and tables go; the command line sets it
fresh: bool = False  # measure again what is stored already; the command line sets it
device: str = "cpu"  # where to measure: cpu, or cuda
measured_on: str = ""  # draw the rows of this device, such as NVIDIA H100 80GB HBM3, and measure nothing
retry_failed: bool = False  # try again the measurements that failed before
mixers: list[str] = ["attention", "mamba", "deltanet", "gla"]  # of Tables 5 to 7; attention is measured alone
state_mixers: list[str] = ["gla", "mamba2"]  # of the part on StateX: gla, mamba2 or both
train_mixers: list[str] = ["gla"]  # of the part on training
cold_mixers: list[str] = ["gla"]  # of the part on cold starts
num_layers: int = 2  # of models whose blocks have a channel mixer
num_layers_without_mlp: int = 4  # of Mamba and Mamba2, whose blocks have none
mixer_args: dict[str, dict] = {"mamba2": {"head_dim": 32, "state_size": 16}}  # where they differ from the defaults
hidden_size: int = 128  # of Tables 5 to 7 and of StateX
train_hidden_size: int = 128  # of the part on training
vocab_size: int = 2048  # ids
dtype: str = "float32"  # of weights and activations: float32 or bfloat16
prefill_lengths: list[int] = [512, 2048]  # tokens of a prompt that is read
decode_lengths: list[int] = [512, 2048]  # tokens of a prompt before decoding
new_tokens: int = 16  # tokens decoded after it (the paper: 128)
train_lengths: list[int] = [256]  # tokens of a training sequence
state_lengths: list[int] = [1024]  # tokens of a prompt in the part on StateX, read and decoded after
expanded: list[int] = [1]  # StateX: how many layers; all of them comes by itself
cold_start_length: int = 256  # tokens of the first step of a fresh process
checkpointing: bool = False  # training: compute the activations of a layer again in its backward
repeats: int = 3  # timed runs of each measurement; the median counts
chunk_size: int = 64  # Resona: tokens in a chunk (section 4.2.1)
top_k: int = 4  # Resona: chunks that each position looks into
encoder: str = "linear"  # Resona: how chunks and queries are embedded: mean, place or linear
encoder_dim: int = 32  # Resona: size of a chunk's embedding
num_heads: int = 2  # Resona: heads of its cross-attention

# %%
from functools import partial

from IPython.display import Markdown, display

from lrm_recall import provenance
from lrm_recall.efficiency.grid import retrieval_runs, state_runs, this_device
from lrm_recall.efficiency.run import EfficiencyRun, code_modules, measure
from lrm_recall.efficiency.stored import stored_rows
from lrm_recall.figures.display import save, show
from lrm_recall.figures.efficiency_figures import costs, resona_overhead, speed_and_state
from lrm_recall.figures.efficiency_tables import (
    TABLES,
    cold_start_table,
    paper_cost_markdown,
    paper_cost_table,
    state_cost_table,
    training_cost_table,
)
from lrm_recall.figures.tables import markdown, write_table
from lrm_recall.promises import promise
from lrm_recall.results import ResultStore, frame, profile_path
from lrm_recall.sweep import Experiment, plan_sweep, run_sweep
from lrm_recall.train.device import usable_device

print(provenance.describe(provenance.snapshot(), profile=profile))

# %% [markdown]
# ## What is measured
#
# Models with random weights, which cost what trained ones do; batch 1. **Prefill** reads a prompt into a cache and
# computes the logits of its last token. **Decoding** is the ordinary `generate`: the clock starts when the first new
# token is there. **Memory** is the peak of the prefill, weights included (on a CPU that of the whole process). Runs
# before the first that counts compile what there is to compile; the median of the others is shown.
#
# Resona stands beside the mixer of the shallowest, the middle and the deepest layer, as in the paper.

# %%
models = {mixer: {"num_layers": num_layers_without_mlp, "mlp": "none"} if mixer in ("mamba", "mamba2")
          else {"num_layers": num_layers} for mixer in (*mixers, *state_mixers, *train_mixers, *cold_mixers)}
models = {mixer: model | {"mixer_args": mixer_args.get(mixer, {})} for mixer, model in models.items()}


def chosen(names):
    """The models of one part."""
    return {name: models[name] for name in names}


resona = {"chunk_size": chunk_size, "top_k": top_k, "encoder": encoder, "encoder_dim": encoder_dim,
          "num_heads": num_heads}
device_name = measured_on or this_device(usable_device(device))
shape = {"device_name": device_name, "vocab_size": vocab_size, "dtype": dtype,
         "new_tokens": new_tokens, "repeats": repeats}
main_shape = shape | {"hidden_size": hidden_size}
main = retrieval_runs({"prefill": prefill_lengths, "decode": decode_lengths}, models=chosen(mixers), resona=resona,
                      shape=main_shape, without=["attention"])
training = retrieval_runs({"train": train_lengths}, models=chosen(train_mixers), resona=resona,
                          shape=shape | {"hidden_size": train_hidden_size, "checkpointing": checkpointing})
states = state_runs({"prefill": state_lengths, "decode": state_lengths}, models=chosen(state_mixers),
                    expanded=expanded, shape=main_shape)
cold = [EfficiencyRun(task="cold start", mixer=mixer, length=cold_start_length, **models[mixer], **main_shape)
        for mixer in cold_mixers]

# %% [markdown]
# A row is stored as soon as it is measured, and measured once for each kind of machine; `--fresh` measures again. Times
# of other machines are never mixed in: the device is part of what a row is asked for. With `measured_on` the rows of
# that device are drawn on any machine, as far as they are stored, older versions of the code included.

# %%
experiment = Experiment("efficiency", partial(measure, device=device), modules=code_modules,
                        data={"source": "random", "revision": ""})
store = ResultStore(profile_path(results_dir, "efficiency", profile))
runs = [*main, *states, *training, *cold]
if not measured_on:
    print(str(plan_sweep(runs, experiment, store, fresh=fresh)).partition("\n")[0], "on", device_name)

# %%
def rows_of(runs):
    """Measured here, or as they are stored."""
    if measured_on:
        return stored_rows(runs, store)
    return run_sweep(runs, experiment, store, profile=profile, retry_failed=retry_failed, fresh=fresh)


def any_of(rows):
    """Whether this part has rows to draw; says so where it has none."""
    if rows.empty:
        print(f"no row of this part on {device_name}")
    return not rows.empty


parts = [rows_of(part) for part in (main, states, training, cold)]
if runs and not any(parts):
    raise ValueError(f"no measurement on {device_name} has succeeded, or is stored")
main_rows, state_rows, training_rows, cold_rows = map(frame, parts)
print(f"{sum(map(len, parts))} rows of {len(runs)} runs on {device_name}")

# %% [markdown]
# ## Tables 5, 6 and 7: the paper beside ours
#
# The paper names no machine; its base models' times are those of an H100-class GPU. A printed value stands beside
# ours only where ours has the paper's shape (1.3B parameters, bf16) and runs on such a GPU. At any other scale the
# ratios are what can be compared. `reproduced` means no slower, or no larger, than printed, with a tenth to spare.

# %%
files = []
if any_of(main_rows):
    tables = {number: paper_cost_table(main_rows, number) for number in TABLES}
    texts = {number: paper_cost_markdown(table, number) for number, table in tables.items()}
    files += [file for number in TABLES
              for file in write_table(tables[number], output_dir, f"efficiency_table{number}", texts[number])]
    display(Markdown("\n\n".join(texts.values())))

# %%
if any_of(frame([row for row in parts[0] if row["config"]["resona"]])):
    overhead = resona_overhead(main_rows)
    files += save(overhead, output_dir, "efficiency_overhead")
    show(overhead)

# %%
if any_of(main_rows):
    absolute = costs(main_rows)
    files += save(absolute, output_dir, "efficiency_costs")
    show(absolute)

# %% [markdown]
# ## What a larger state costs (StateX)
#
# GLA's heads are merged into one, Mamba2's keys and queries are four times as wide, in a few layers and in all of them.
# The paper argues for a few layers by quality; here is what each choice costs.

# %%
expanded_rows = frame([row for row in parts[1] if row["config"]["expanded_layers"]])
if any_of(expanded_rows):
    state_table = state_cost_table(state_rows)
    files += write_table(state_table, output_dir, "efficiency_statex")
    display(Markdown(markdown(state_table)))

# %%
if any_of(expanded_rows):
    state_figure = speed_and_state(state_rows)
    files += save(state_figure, output_dir, "efficiency_statex")
    show(state_figure)

# %% [markdown]
# ## What training with Resona costs
#
# Forward and backward of one sequence, no optimiser.

# %%
if any_of(training_rows):
    training_table = training_cost_table(training_rows)
    files += write_table(training_table, output_dir, "efficiency_training")
    display(Markdown(markdown(training_table)))

# %% [markdown]
# ## Cold start
#
# A new process with nothing compiled: how long until the first forward and backward are done.

# %%
cold_table = cold_start_table(cold_rows)
files += write_table(cold_table, output_dir, "efficiency_cold_start")
Markdown(markdown(cold_table))

# %% [markdown]
# ## Try it yourself
#
# What does looking into more chunks cost? Change `top_k` below: retrieval reads `top_k * chunk_size` tokens a
# position, so its part of the time should grow with it, and decoding should hardly notice.

# %%
tried = retrieval_runs({"prefill": prefill_lengths[-1:]}, models=chosen(mixers[-1:]), shape=main_shape,
                       resona=resona | {"top_k": 2 * top_k})
tried_rows = rows_of(tried)
if len(tried_rows) < len(tried):
    print(f"{len(tried) - len(tried_rows)} of {len(tried)} is not stored for {device_name}")
for row in tried_rows:
    retrieval = row["config"]["resona"]
    print(f"{'resona' if retrieval else 'base':7} top_k {retrieval['top_k'] if retrieval else '-':>2}"
          f"  {row['metrics']['ms']:8.1f} ms")

# %% [markdown]
# ## Limits
#
# * Batch 1 and random tokens, as the paper measures. Random tokens spread retrieval over all chunks: the worst case for
#   a cache, and no statement about text.
# * The paper does not say how many chunks its efficiency models look into, nor the chunk size; 64 and 4 here.
# * Times of a laptop vary with what else runs on it; the files hold the fastest and the slowest repeat too.

# %%
promise(store, [row["key"] for part in parts for row in part], files)
