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
# # Walkthrough: merging heads, a larger memory without parameters
#
# **Claim under test.** Four heads of a GLA layer keep four small states. Laid end to end, the same vectors fill one
# state that is four times as large: the parameters stay, and four times as many pairs fit (*StateX*, section 4.1).
#
# **Draws** *StateX*'s Figure 2 from computed states, and follows its sections 4.1 to 4.3 on models that train in
# seconds. Twenty minutes; you need to know what a matrix product is.

# %% tags=["parameters"]
profile: str = "smoke"  # name of this scale; the command line sets it
results_dir: str = "../outputs/results"  # where rows are stored; the command line sets it
output_dir: str = "../outputs/smoke"  # where figures go; the command line sets it
fresh: bool = False  # train again what is stored already; the command line sets it
steps: int = 1000  # of training from scratch, for each of three tiny models
more_steps: int = 500  # of training after the surgery, for each of its three continuations
seeds: list[int] = [0]  # of data and initial weights; the figures show the first, the tables all
INTERACTIVE: bool = False  # show sliders (in JupyterLab, never in a batch run)

# %%
import torch
from IPython.display import Markdown

from lrm_recall import provenance
from lrm_recall.figures.display import save, show
from lrm_recall.figures.head_merging import HEADS, mask_figure, remembered_picture, state_matrices
from lrm_recall.figures.head_merging_capacity import capacity, capacity_markdown, controls
from lrm_recall.figures.head_merging_training import arms, arms_markdown, function_change
from lrm_recall.figures.widened_state import widened_state, widened_state_markdown
from lrm_recall.ops.gla import gla_recurrent
from lrm_recall.promises import promise
from lrm_recall.results import ResultStore, profile_path
from lrm_recall.sweep import Experiment, run_sweep
from lrm_recall.teach import head_merging as maths
from lrm_recall.teach.merge_training import MergeRun, code_modules, inputs, new_model, run_merging, start_arm
from lrm_recall.teach.merge_training import draw as draw_batch
from lrm_recall.teach.partly_merged import INGREDIENTS, PartlyMerged
from lrm_recall.teach.widened_state import STARTS, new_mamba2, try_start
from lrm_recall.train.axes import check_axes

if INTERACTIVE:
    from lrm_recall.figures.widgets import explore
check_axes({"seeds": seeds})
files = []
print(provenance.describe(provenance.snapshot(), profile=profile, seeds=seeds))

# %% [markdown]
# ## A picture that four heads forget
#
# Sixteen rows of a picture, each stored as the *value* of one *key*. Then every key is asked for. Both memories have 16
# key channels and 32 value channels, and both get the same keys and values:

# %%
cold_open = remembered_picture(num_heads=4, num_pairs=16)
files += save(cold_open, output_dir, "merging_cold_open")
show(cold_open)

# %%
if INTERACTIVE:
    explore(remembered_picture, num_heads=[8, 4, 2, 1], num_pairs=(1, 16))

# %% [markdown]
# **Before you read on:** at how many rows would four heads still be perfect?
#
# ## Four states, one matrix
#
# A head adds every pair to its state, $S_h \mathrel{+}= k_h v_h^\top$, and answers a key with $k_h^\top S_h$. Below are
# the states after six pairs, as the GLA recurrence leaves them. On the left, the four states stand as blocks on the
# diagonal of one matrix. On the right, the *same vectors* went into one head: the blocks are unchanged, and the red
# cells, where a key channel of one head meets a value channel of another, are now in reach.

# %%
signature = state_matrices(num_heads=4, num_pairs=6)
files += save(signature, output_dir, "merging_states")
show(signature)

# %%
if INTERACTIVE:
    explore(state_matrices, num_heads=[8, 4, 2, 1], num_pairs=(1, 24))

# %% [markdown]
# **Identity.** Take the red cells away again, and the merged head *is* the four heads, at every step, with forgetting
# and all. One thing needs care: a head scales its answers by $d_k^{-1/2}$, and merging makes $d_k$ four
# times larger, so answers come out half as large unless the old scale is kept.

# %%
random = torch.Generator().manual_seed(seeds[0])
q, k, log_decay = (torch.randn(2, 24, 4, 4, generator=random) for _ in range(3))  # [B, T, H, K]
v, log_decay = torch.randn(2, 24, 4, 8, generator=random), -log_decay.abs()  # [B, T, H, V]
four_heads, _ = gla_recurrent(q, k, v, log_decay)
masked = maths.masked_merged(q, k, v, log_decay)
merged = gla_recurrent(*(maths.merge(x) for x in (q, k, v, log_decay)))[0].unflatten(-1, (4, 8)).squeeze(2)

assert torch.allclose(masked, four_heads, atol=1e-5)  # the identity
assert not torch.allclose(merged, four_heads, atol=1e-1)  # and it is the mask that makes it
print(f"largest difference from four heads: masked {(masked - four_heads).abs().max():.1e}, "
      f"not masked {(merged - four_heads).abs().max():.1f}")

# %% [markdown]
# ## How many pairs fit?
#
# **The limit.** Whatever the state $S$, the answers to $N$ keys are the product $K S$, with the keys as rows of $K$.
# Keys with $d_k$ channels span at most $d_k$ of the $N$ directions, and what lies in the others is lost: nothing up to
# $N = d_k$ pairs, the share $1 - d_k / N$ beyond (for values that have nothing in common). Sixteen key channels are
# $d_k = 4$ for each of four heads, and 16 for one.
#
# **The measurement,** twice. Left: random values, written by the recurrence under the best keys there are; the marks
# lie on the limit. Right: three tiny models (one GLA layer, the same width) trained to answer 16 pairs; the hollow
# marks on top repeat the limits. The same parameters, up to the norm's weight: 8, 16 and 32 numbers.

# %%
runs = [MergeRun(steps=steps, more_steps=more_steps, seed=seed) for seed in seeds]
store = ResultStore(profile_path(results_dir, "head_merging", profile))
experiment = Experiment("head_merging", run_merging, {"source": "lrm_recall.teach.merge_training",
                                                      "revision": "generated"}, modules=code_modules)
rows = run_sweep(runs, experiment, store, profile=profile, fresh=fresh, progress=False)
history = rows[0]["history"]
print(f"trained in {sum(row['runtime_s'] for row in rows):.0f} s")

# %%
how_many = capacity(history)
files += save(how_many, output_dir, "merging_capacity")
show(how_many)
Markdown(capacity_markdown(rows[0]))

# %%
if INTERACTIVE:
    explore(lambda marked=16: capacity(history, tuple(reversed(HEADS)), marked), marked=(1, 32))

# %% [markdown]
# Trained models go on beyond the limit because they need not be exact: an answer counts when the right value is the
# *nearest* one of 64. And heads can share the work, each keeping some of the pairs. What the limit says, they show: the
# fewer the heads, the later recall breaks.
#
# ## Negative control: is it only the number of numbers?
#
# If a large state were enough, these two would be as good as the merged head: the large state with its cross terms
# masked, and one head's keys copied four times over, which fills all 512 cells.

# %%
control = controls(num_heads=4, num_pairs=16)
files += save(control, output_dir, "merging_controls")
show(control)

# %%
if INTERACTIVE:
    explore(controls, num_heads=[8, 4, 2], num_pairs=(16, 32))

# %% [markdown]
# Neither is. What counts is how many *different directions* the keys have to write in.
#
# ## What merging does before any training
#
# Take the trained model of four heads and merge them, every parameter inherited. Three things change at once. Here each
# is switched on alone. With none the layer is the old one, with all it is what `merge_heads` builds; both are asserted.

# %%
model = new_model(runs[0], num_heads=4)
block, x = model.model.layers[0], inputs(model, draw_batch(runs[0], 16, torch.Generator().manual_seed(seeds[0])))
surgery = start_arm(model, "inherit", seeds[0]).model.layers[0].mixer
assert torch.allclose(PartlyMerged(block.mixer, ())(x), block.mixer(x), atol=1e-6)
assert torch.allclose(PartlyMerged(block.mixer, INGREDIENTS)(x), surgery(x), atol=1e-6)

# %%
change = function_change(history)
files += save(change, output_dir, "merging_function")
show(change)

# %% [markdown]
# The scale does next to nothing, because the norm behind it takes lengths away. That norm now runs over all channels
# instead of each head's own. But what hurts is the cross terms: queries were never trained to meet the other heads'
# keys. The new cells are full of things nobody asked for.
#
# ## What re-initialising costs and gives
#
# So the paper throws the layer's parameters away (section 4.3) and keeps only what lies around it: embeddings and
# feed-forward block. Three ways to go on, with the same budget:

# %%
going_on = arms(history, runs[0].num_pairs)
files += save(going_on, output_dir, "merging_arms")
show(going_on)
Markdown(arms_markdown(rows))

# %% [markdown]
# Re-initialising costs everything at first; merging, from either start, gives what four heads do not reach with the
# same training. **What is different from the paper:** there, re-initialised models end above inheriting ones (section
# 5.4), and the paper supposes that inherited parameters have converged and resist. Which of the two ends higher *here*
# depends on the seed (profile `laptop` trains five): models this small have hardly converged, so
# they can neither support nor refute it.
#
# ## Mamba2: a wider state, and zeros that never learn
#
# Mamba2 has one key for all heads, so there is nothing to merge. Its keys and queries ($B$ and $C$) get new channels
# instead (section 4.2). To keep the function, the new channels must not be heard: their score is the product $C_n B_n$,
# so one factor at zero will do. For inherited models the paper says only that "we initialize the new parameters with
# zeros" (section 5.4). Take that to the letter, and both factors are zero:

# %%
mamba = new_mamba2()
found = {start: try_start(mamba, start) for start in STARTS}
assert all(each.function_change == 0 for each in found.values())
assert found["zero_both"].gradient == (0.0, 0.0) == found["zero_both"].moved
assert found["zero_B"].gradient[0] > 0 and found["zero_C"].gradient[1] > 0
wide = widened_state(found)
files += save(wide, output_dir, "merging_mamba2")
show(wide)
Markdown(widened_state_markdown(found))

# %% [markdown]
# The gradient of a product $C_n B_n$ is $C_n$ for $B_n$ and $B_n$ for $C_n$. With one factor at zero, the zero moves
# away; with both, nothing ever moves: the larger state stays empty, and costs its memory all the same.
#
# ## Exercise: write the mask
#
# `my_mask` should say which cells of the merged state belong to one head: `[H K, H V]`, `True` on the diagonal blocks.
# Fill it in and run the two cells. (A start: `torch.arange(num_heads * key_dim) // key_dim` is each row's head.)


# %%
def my_mask(num_heads, key_dim, value_dim):
    """Your turn: return a bool tensor [num_heads * key_dim, num_heads * value_dim]."""


# %%
mine = my_mask(num_heads=4, key_dim=4, value_dim=8)
print(maths.check_mask(mine, num_heads=4, key_dim=4, value_dim=8))
exercise = mask_figure(mine)
files += save(exercise, output_dir, "merging_exercise")
show(exercise)

# %% [markdown]
# ## Limits
#
# * Pairs of exact tokens, no noise, no text. How much of this is left in a language model is the business of the
#   StateX notebooks.
# * The limit is for exact recall of values that need all channels. Values that need few can be spread over heads, which
#   the trained models do.
# * Few seeds: differences of a few hundredths between trained models mean nothing.
# * The larger state is not free: memory and work of the recurrence grow with it. The paper pays in four layers only
#   (section 4.4).

# %%
promise(store, [row["key"] for row in rows], files)
