# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 · Exercises: pretraining
#
# Rows, rates and the size of a batch; a question to answer by measuring; and two programs that survive a kill. The lesson
# is [07 · Pretraining](../lessons/07_pretraining.ipynb).

# %%
import math
import random

from nanochat_lib.course.checks import pretraining as check

# %% [markdown]
# ## 1 · Best fit
#
# difficulty 2/5 · importance 4/5 · 15 minutes
#
# Fill one row from a buffer of tokenized documents: put in the longest document that still fits, again and again; when none
# fits, the shortest, cropped to the room that is left. Of equally long documents the one that came first goes first. What
# has been used leaves the buffer, a cropped document too.
#
# A plain search through the list is fine here (the library's finds its document without one).

# %%
def pack_row(buffer, length):
    """A list of exactly `length` tokens; `buffer`, a list of non-empty lists of tokens, loses what was used.

    The buffer holds enough tokens to fill the row.
    """
    raise NotImplementedError  # your code here

# %%
check.pack_row(pack_row)

# %% [markdown]
# ## 2 · A rate for each step
#
# difficulty 1/5 · importance 5/5 · 10 minutes
#
# The factor on every learning rate at `step` = 0, 1, …, steps − 1:
#
# - warm-up: 1/w, 2/w, …, 1 over the first w = `warmup_steps` steps;
# - then 1;
# - warm-down over the last d = round(warmdown_ratio · steps) steps: a straight line from 1 at `steps − d` to `final_lr_frac` at
#   `steps` (a step that is never taken).

# %%
def learning_rate_multiplier(step, steps, warmup_steps=40, warmdown_ratio=0.65, final_lr_frac=0.05):
    """A float between 0 and 1; warmup_steps and warmdown_ratio may be 0."""
    raise NotImplementedError  # your code here

# %%
check.learning_rate_multiplier(learning_rate_multiplier)

# %% [markdown]
# ## 3 · How large a batch?
#
# difficulty 2/5 · importance 4/5 · 10 minutes
#
# The best batch grows with the length of the run, but slowly: B = 2¹⁹ · (D / D₁₂)^0.383 tokens for a run of D tokens, where a
# run of D₁₂ tokens was found to like 2¹⁹. Computers like powers of two: take the one nearest on a logarithmic scale.

# %%
def optimal_batch_size(tokens, reference_tokens):
    """Tokens a step, an int and a power of two."""
    raise NotImplementedError  # your code here

# %%
check.optimal_batch_size(optimal_batch_size)

# %% [markdown]
# ## 4 · What does cropping cost?
#
# difficulty 2/5 · importance 3/5 · 10 minutes
#
# Best fit crops documents, and what is cropped is never read. Measure: of all tokens that leave a full buffer of `size`
# documents, which part is lost to cropping? Take lengths as below and rows of 513 tokens, pack 300 rows, and try `size` = 10, 100 and 1,000.
# Answer with the three fractions, and look at how they fall: this is why the buffer holds 1,000 documents.

# %%
from nanochat_lib.dataloader import BestFit


def lengths(seed=0):
    """Endless lengths of documents, in tokens: many short, a few long (log-normal, median 150)."""
    generator = random.Random(seed)
    while True:
        yield max(int(generator.lognormvariate(5, 1)), 2)


answer = None
# your code here

# %%
check.lost_to_cropping(answer)

# %% [markdown]
# ## 5 · In which order?
#
# difficulty 3/5 · importance 5/5 · 20 minutes
#
# The process may be killed at any moment, in the middle of writing a file too; then half of it is on the disk. Write
# a checkpoint so that `load` finds the newest one that is whole, whenever that was. The disk knows four operations, of
# which `write` alone can be cut in half:
#
# - `disk.write(name, text)` makes or overwrites a file, piece by piece;
# - `disk.rename(old, new)` gives a file another name; a file of the new name is replaced;
# - `disk.remove(name)`; `disk.files()` → {name: text}.
#
# A checkpoint of a step has two parts, both texts of any content. After each `save`, at most the last two checkpoints
# may be on the disk, and nothing half-written of the one before.

# %%
def save(disk, step, weights, metadata):
    """Write the checkpoint of `step`; steps only grow. What an earlier, killed save left is cleaned up."""
    raise NotImplementedError  # your code here


def load(disk):
    """(step, weights, metadata) of the newest whole checkpoint, or None if there is none. The disk stays as it is."""
    raise NotImplementedError  # your code here

# %%
check.save_and_load((save, load))

# %% [markdown]
# ## 6 · To go on as if nothing had happened
#
# difficulty 3/5 · importance 4/5 · 20 minutes
#
# A loader that can be stopped: `rows` packs documents best-fit from a buffer of `size` documents (topped up before
# each choice, in order) and yields with each row a *state*. Started again with a state, it must go on with the very
# next row. The state goes into a checkpoint: it is JSON, and it holds numbers, no texts. `documents` is a list of
# non-empty lists of tokens, and is read once; end when it cannot fill another row. Choose as in exercise 1.

# %%
def rows(documents, length, size, state=None):
    """Yield (row, state): rows of `length` tokens, each with the state to go on from behind it."""
    raise NotImplementedError  # your code here

# %%
check.resumable_rows(rows)
