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
# # 06 · Exercises: evaluation
#
# Two functions of `nanochat_lib` to rebuild, and two questions about luck. The lesson is
# [06 · Evaluation](../lessons/06_evaluation.ipynb).

# %%
import math

import torch

from nanochat_lib.course.checks import evaluation as check

# %% [markdown]
# ## 1 · Bits per byte
#
# difficulty 1/5 · importance 5/5 · 10 minutes
#
# A model gave a loss in nats for each target. `token_bytes[id]` says how many bytes of text a token stands for, 0 for
# the specials. Bits per byte are all nats of targets that have bytes, over ln 2 times all their bytes. Targets of −1
# are not scored, and neither are specials: neither their nats nor their bytes count.

# %%
def bits_per_byte(losses, targets, token_bytes):
    """A float, from losses (B, T) float, targets (B, T) int64 and token_bytes (vocab,) int64."""
    # BEGIN SOLUTION
    size = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
    return losses[size > 0].sum().item() / (math.log(2) * size.sum().item())
    # END SOLUTION

# %%
check.bits_per_byte(bits_per_byte)

# %% [markdown]
# ## 2 · Which tokens are scored
#
# difficulty 3/5 · importance 4/5 · 20 minutes
#
# The prompts of one question come as lists of ids. For each row to score, say where the scored tokens begin and end:
#
# - `multiple_choice`: the rows begin alike and end in different choices; scored is what follows the shared beginning;
# - `schema`: the rows begin differently and end alike; scored is the shared end;
# - `language_modeling`: two rows, without and with the answer; only the second is scored, from where
#   the first stops agreeing with it.
#
# At least one token is scored, and never the first, which nothing predicts: where a choice is the beginning of another,
# start one token earlier.

# %%
def rows_of(kind, rows):
    """[(ids, start, end), …]: tokens start … end − 1 of ids are scored. One per row; one for language_modeling."""
    # BEGIN SOLUTION
    def shared(rows):
        count = 0
        while count < min(map(len, rows)) and len({ids[count] for ids in rows}) == 1:
            count += 1
        return count

    if kind == "schema":
        length = min(shared([ids[::-1] for ids in rows]), min(map(len, rows)) - 1)
        return [(ids, len(ids) - length, len(ids)) for ids in rows]
    start = min(shared(rows), min(map(len, rows)) - 1)
    if kind == "multiple_choice":
        return [(ids, start, len(ids)) for ids in rows]
    ids = rows[1]
    return [(ids, min(shared(rows), len(ids) - 1), len(ids))]
    # END SOLUTION

# %%
check.rows_of(rows_of)

# %% [markdown]
# ## 3 · Questions enough
#
# difficulty 2/5 · importance 4/5 · 10 minutes
#
# A model that answers each question rightly with probability p has, over n questions, an accuracy that scatters with
# a standard deviation of √(p(1 − p)/n). How many questions does a task need before two standard deviations are no
# more than `margin`?

# %%
def questions_needed(p, margin):
    """The smallest whole number n ≥ 1 with 2·√(p(1 − p)/n) ≤ margin."""
    # BEGIN SOLUTION
    return max(1, math.ceil(4 * p * (1 - p) / margin**2 - 1e-9))
    # END SOLUTION

# %%
check.questions_needed(questions_needed)

# %% [markdown]
# ## 4 · Luck
#
# difficulty 2/5 · importance 4/5 · 5 minutes
#
# COPA has 100 questions. Two models get 0.62 and 0.68 on it. Play the first model's exam a thousand times: how often
# does it get 0.68 or more by luck alone?

# %%
answer = None
# BEGIN SOLUTION
exams = torch.rand(10_000, 100, generator=torch.Generator().manual_seed(0)) < 0.62
answer = (exams.sum(1) >= 68).float().mean().item()
# END SOLUTION
answer

# %%
check.luck(answer)
