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
# # Walkthrough: α-mixing, or how a recurrent model looks things up
#
# **Claim.** A linear recurrent model forgets what its state cannot hold. *Resona* (section 3) cuts the past into
# chunks, searches them, reads the best, and mixes what it read with what the model said:
#
# $$y = \alpha \cdot \mathrm{mixer}(x) + (1 - \alpha) \cdot \mathrm{retrieved}(x).$$
#
# With $\alpha = 1$ this is the base model, **bit for bit**; below 1, forgotten pairs come back.
#
# **Illustrates** Figure 1, section 3.1 and Algorithms 1 to 3 of *Resona*. No number of the paper is reproduced
# here; that is notebook 01. About twenty minutes to read; everything is computed on this machine, under a minute.

# %% tags=["parameters"]
profile: str = "smoke"  # name of this scale; the command line sets it
output_dir: str = "../outputs/smoke"  # where figures go; the command line sets it
seed: int = 0  # of initial weights, data and order of the examples
base_steps: int = 400  # training steps of the recurrent model alone, and of both branches together
branch_steps: int = 120  # training steps of the retrieval branch beside it
learned_steps: int = 200  # training steps of the branch that also learns alpha
pairs: list[int] = [2, 4, 8, 12, 16]  # key-value pairs in the sequences that are scored, at most 16
num_examples: int = 200  # sequences scored for each number of pairs
INTERACTIVE: bool = False  # show sliders (in JupyterLab, never in a batch run)

# %%
import numpy as np
import torch

from lrm_recall import provenance
from lrm_recall.figures import alpha_mixing as figures
from lrm_recall.figures.alpha_exercises import gate_drawn, mask_drawn
from lrm_recall.figures.alpha_forgetting import state_forgets
from lrm_recall.figures.alpha_search import chunk_lights_up, search_map
from lrm_recall.figures.display import save, show
from lrm_recall.figures.widgets import explore
from lrm_recall.promises import promise
from lrm_recall.teach import alpha_mixing as teach
from lrm_recall.teach.alpha_exercises import check_causal_mask, check_null_chunk_gate
from lrm_recall.teach.alpha_forgetting import forget
from lrm_recall.teach.alpha_search import influence, search_sentence
from lrm_recall.train.axes import check_axes

check_axes({"pairs": pairs})
print(provenance.describe(provenance.snapshot(), profile=profile, seeds=[seed]))
torch.set_num_threads(1)  # small tensors: a second thread is no help, and on a busy machine it is waited for

# %% [markdown]
# ## 1. Watch a state forget
#
# A linear recurrent layer keeps a matrix $S$. It writes a pair by adding $k v^\top$ and reads with $k^\top S$.
# Below, pairs in random directions are written with this library's own GLA step. The state stays the same size; it
# only gets fuller. Each new pair lies across the old ones, and the **first** value comes back a little more wrong.
#
# *Before you look: the state has 16 × 16 numbers. How many pairs of 16 + 16 numbers will it give back?*

# %%
opening = state_forgets(forget(), [1, 8, 32])
files = save(opening, output_dir, "alpha_state_forgets")
show(opening)

# %% [markdown]
# Among $n$ random pairs the error grows like $\sqrt{(n - 1) / K}$ (dashed): with $K = 16$ key channels it is as
# large as the value itself near $n = 17$. A decay below 1 limits the noise, but then the first pair itself fades. A
# larger state only moves the limit (that is *StateX*, notebook 12). Resona goes around it: the tokens are still
# there to be read.

# %%
if INTERACTIVE:
    explore(lambda pairs=8, decay=1.0: state_forgets(forget(decay=decay), [pairs]), pairs=(1, 48),
            decay=[1.0, 0.98, 0.95, 0.9])

# %% [markdown]
# ## 2. Chunk and search
#
# Cut the past into chunks of $U$ tokens, embed each chunk as one vector, and let every position pick the chunk
# whose vector is most like its own. Nothing is trained here: words have random vectors, a chunk has the mean of its
# words, so a word finds a chunk only if that chunk **contains** it. Follow `bike` in the question to `bike in
# Utrecht`.
#
# Two things to notice. Words that have occurred nowhere pick a chunk all the same (rings on white); that is what
# the null chunk in section 4 is for. And `in` has occurred twice when it comes last, but its vector knows nothing
# of its sentence, so it cannot choose between Utrecht and Ghent.

# %%
found = search_sentence(chunk_size=3)
sentence = search_map(found.words, found.cosines, found.chosen, found.chunk_size, "A sentence in chunks of 3")
files += save(sentence, output_dir, "alpha_search_sentence")
show(sentence)


# %%
def draw_search(chunk_size=3):
    """The sentence, cut and searched anew."""
    found = search_sentence(chunk_size=chunk_size)
    return search_map(found.words, found.cosines, found.chosen, chunk_size, f"A sentence in chunks of {chunk_size}")


if INTERACTIVE:
    explore(draw_search, chunk_size=(2, 8))

# %% [markdown]
# ## 3. The causal rule: a chunk lights up only once it is complete
#
# Position $p$ may look into chunk $n$ only if the whole chunk lies before it: $(n + 1) U \le p$. Position 7
# completes chunk 1 and still may not read it; position 8 may. On the right is the proof, not a drawing: each token
# of the memory is replaced in turn, and a cell is grey where an output moved. White is 0.0 exactly.

# %%
reach = influence(length=16, chunk_size=4)
for position in (7, 8):
    lit = chunk_lights_up(reach, 4, position)
    files += save(lit, output_dir, f"alpha_chunk_lights_up_{position}")
    show(lit)

# %%
outputs, tokens = np.indices(reach.shape)
assert ((reach > 0) == ((tokens // 4 + 1) * 4 <= outputs)).all()  # what moves is what the rule allows, cell by cell
if INTERACTIVE:
    explore(lambda position=7, chunk_size=4: chunk_lights_up(influence(16, chunk_size), chunk_size, position),
            position=(0, 15), chunk_size=[2, 3, 4, 5, 8])

# %% [markdown]
# ## 4. Integrate: a tiny model that has learned to look
#
# Now real training, on multi-query associative recall (MQAR): a list of key-value pairs, then every key again,
# whose value must be named. First one Mamba2 layer learns the task alone. Then Resona is put around it, and only
# Resona's own parameters are trained, at $\alpha = 0.5$. The mixer stays frozen, so whatever recall comes on top is
# retrieval's.

# %%
base = teach.train_base(base_steps, seed)
model = teach.add_retrieval(base, 0.5, branch_steps, seed)
print(f"state of the base model: {base.state_size()} numbers; added by Resona: "
      f"{model.num_parameters() - base.num_parameters():,} parameters, no state")

# %% [markdown]
# Which chunk does each position pick? Chunks hold two tokens, as in the paper's MQAR, so a pair is a chunk. Every
# question (`55?`) should find the pair with its key (`k55`), wherever it stands. Filler finds filler: nobody asks
# it anything.

# %%
data = teach.examples(8, 100, 2**31 + seed, length=32)
examples = teach.trace(model, data)
example, roles = examples[0], teach.role_of(examples[0], 8)
recalled = search_map(figures.token_labels(example, roles), example.cosines, example.chosen, 2,
                      "MQAR in chunks of 2: which chunk each token picks")
files += save(recalled, output_dir, "alpha_search_mqar")
show(recalled)

# %% [markdown]
# The position then reads the two tokens of its chunk by cross-attention. How much of that counts is up to the
# **null chunk**: a learned vector that competes in a softmax with the chunk found. If it wins, the position
# abstains.
#
# ## 5. Mix: the slider
#
# Left: accuracy at every α, for sequences with more and more pairs. Right: what the state alone forgets, and what
# the mixture brings back (grey). Below: how loudly each branch speaks at each token of one sequence, the mixer
# upwards, retrieval downwards. The first chunk of tokens has nothing to retrieve, so there the mixer speaks alone,
# whatever α is.

# %%
alphas = np.linspace(0, 1, 21).round(2).tolist()
table = teach.recall_by_alpha(model, alphas, pairs, num_examples, 2**31 + seed)


def draw_alpha(alpha=0.5):
    """The three panels at one alpha."""
    return figures.alpha_slider(table, alphas, pairs, example, roles, alpha)


for alpha in (0.0, 0.5, 1.0):
    mixed = draw_alpha(alpha)
    files += save(mixed, output_dir, f"alpha_slider_{alpha:.1f}")
    show(mixed)

# %%
if INTERACTIVE:
    explore(draw_alpha, alpha=(0.0, 1.0, 0.05))

# %% [markdown]
# *Ask: why does the curve fall so late, when 0.9 of the output is the mixer's?* (Only the sum counts. Where the
# mixer is unsure between values, a small push towards the right one decides.)
#
# **α = 1 is the base model, bit for bit.** Below, the first model computes the whole retrieval and gives it no
# weight; the second has no retrieval code at all.

# %%
with teach.at_alpha(model, 1.0), torch.no_grad():
    assert torch.equal(model(data.inputs).logits, teach.without_retrieval(model)(data.inputs).logits)
    assert torch.equal(model(data.inputs).logits, base(data.inputs).logits)  # and it is the one that was trained alone
print("α = 1: every logit is equal, bit for bit")

# %% [markdown]
# ## 6. Who trained the mixer?
#
# Train both branches **together** at α = 0.5, from scratch, for as many steps as the base model had, and turn α up
# afterwards. Retrieval solves the task so fast that nothing is left to learn for the mixer: at α = 1 it guesses. A
# high score at α = 0.5 does not say that the model *remembers* anything, and an α chosen after training is not the
# α that was trained.

# %%
together = teach.train_together(base_steps, 0.5, seed)
most = pairs[-1:]
curves = {"mixer trained first, then retrieval": table[:, -1],
          "both trained together": teach.recall_by_alpha(together, alphas, most, num_examples, 2**31 + seed)[:, 0]}
apart = figures.trained_apart_or_together(curves, alphas, 0.5)
files += save(apart, output_dir, "alpha_trained_together")
show(apart)

# %% [markdown]
# ## 7. Let each token choose: learned α
#
# With `alpha="learned"`, α is a sigmoid of a linear map of the position's input. The questions choose to lean on
# retrieval. A key that is listed has the same α as the same key asked: in the first layer the input is the token's
# own embedding, which does not know where it stands.
#
# *Ask: what do the α of values and filler tell?* Nothing. This model has one layer, so only the output at a
# question is ever used; no loss has touched the others, and what is drawn there is the linear map continued to
# where it was never trained. A value that a model learned is not yet a reason that it has.

# %%
learner = teach.add_retrieval(base, "learned", learned_steps, seed)
learned = teach.trace(learner, data)
everywhere = np.concatenate([each.alpha for each in learned])
parts = np.concatenate([teach.role_of(each, 8) for each in learned])
by_role = {role: everywhere[parts == role] for role in ("key", "value", "query", "filler")}
chosen = figures.learned_alpha(learned[0], roles, by_role)
files += save(chosen, output_dir, "alpha_learned")
show(chosen)

# %% [markdown]
# ## 8. Negative control: shuffled chunk embeddings
#
# Is it really the *right* chunk that helps, or just more parameters? Deal the chunk embeddings out anew, so that
# none stays with its own chunk, let the same model search them, and hand it what that finds (`chunk_indices`).
# Handing it no chunk at all leaves the base model. The wrong chunk can be worse than none: the branch speaks with
# confidence about another pair.

# %%
asked = teach.examples(pairs[-1], num_examples, 2**31 + seed + pairs[-1])
shuffled = teach.shuffled_chunks(model, asked.inputs, seed)
accuracies = {"the chunk that the search found": teach.recall(model, asked),
              "no chunk": teach.recall(model, asked, torch.full_like(shuffled, -1)),
              "the base model": teach.recall(base, asked),
              "a chunk found among shuffled embeddings": teach.recall(model, asked, shuffled)}
control = figures.shuffled_control(accuracies, chance=2 / teach.VOCABULARY)
files += save(control, output_dir, "alpha_control_shuffled")
show(control)

# %% [markdown]
# ## 9. Try it yourself
#
# **Exercise 1: the causal mask.** Return a boolean tensor with one row for each position and one column for each
# complete chunk: may the position look into the chunk? Run the cell: crosses mark wrong cells.


# %%
def causal_mask(length, chunk_size):
    """[length, length // chunk_size] bool: the rule of section 3 above."""
    return None  # your solution here


verdict = check_causal_mask(causal_mask)
print(verdict)
show(mask_drawn(verdict))


# %% [markdown]
# **Exercise 2: the null chunk's gate.** Each position has the scores of its $k$ chunks and the score of the null
# chunk. Weigh the chunks by a softmax over all $k + 1$ scores, times the temperature. What the null chunk takes is
# not given out.


# %%
def null_chunk_gate(scores, null_score, temperature):
    """scores [T, k] and null_score [T] to the weights [T, k] of the chunks."""
    return None  # your solution here


verdict = check_null_chunk_gate(null_chunk_gate)
print(verdict)
show(gate_drawn(verdict))

# %% [markdown]
# Solutions are in `tests/test_walkthrough_11.py`. More to try: change `pairs` or `base_steps` at the top (does a
# better base model move the best α?); search your own sentence with `search_sentence("...", chunk_size=4)`.
#
# ## Limits
#
# * One layer, a vocabulary of 128, exact keys. Search by identity is enough here; real text needs queries that know
#   their context.
# * The mixer is frozen while retrieval learns, so that α = 1 stays the trained base model. The paper trains both
#   together on MQAR; section 6 shows what that does to the slider.
# * Chunks of two tokens fit the layout of the pairs. Notebook 01 has the paper's grid, ablations and a control with
#   chunks that cut pairs in two.
# * One seed: differences of a few hundredths mean nothing.
#
# The last cell promises the figures to the runner, which checks that they are there.

# %%
promise(files=files)
