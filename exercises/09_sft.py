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
# # 09 · Exercises: learning to talk
#
# What is learned of a conversation, how it becomes a batch, and how a quiz is graded. The lesson is [09 · Learning to
# talk](../lessons/09_sft.ipynb).

# %%
import torch

from nanochat_lib.course.checks import sft as check

# %% [markdown]
# ## 1 · What is learned
#
# difficulty 2/5 · importance 5/5 · 20 minutes
#
# The library makes the mask while it renders a conversation. Make it afterwards, from the tokens alone. Learned (1) is
# what the assistant must emit: its text, its calculator calls with both python markers, and `<|assistant_end|>`. Only
# read (0) are `<|bos|>`, the user's turns, `<|assistant_start|>`, and the tool's output with both output markers. A
# conversation may have several turns, and may be cut anywhere. `tokenizer.encode_special("<|bos|>")` gives a marker's
# id.

# %%
def learned_mask(tokenizer, ids):
    """A list of 0 and 1, one for each of the token ids of a rendered conversation."""
    raise NotImplementedError  # your code here

# %%
check.learned_mask(learned_mask)

# %% [markdown]
# ## 2 · Inputs and targets
#
# difficulty 2/5 · importance 5/5 · 15 minutes
#
# Make one row of a batch from one conversation: pad `ids` with the token `padding` to `seq_len + 1` (or cut it to
# that), and split it into inputs and targets, each of shape (seq_len,). The target of a place is the token after it if
# that is learned, and −1 otherwise; the loss ignores −1.

# %%
def inputs_and_targets(ids, mask, seq_len, padding):
    """Lists of equal length → (inputs, targets), two int64 tensors of shape (seq_len,)."""
    raise NotImplementedError  # your code here

# %%
check.inputs_and_targets(inputs_and_targets)

# %% [markdown]
# ## 3 · The answer to a quiz
#
# difficulty 2/5 · importance 4/5 · 15 minutes
#
# A batch of quizzes has been run through the model, prompts padded on the right. `logits` has shape (B, T, vocab),
# `lengths` (B,) holds the number of tokens of each prompt, `letter_ids` (K,) the tokens of the letters A, B, …. Which
# letter does the model choose in each row?

# %%
def choose_letter(logits, lengths, letter_ids):
    """(B,) int64: for each row the place in letter_ids of the likeliest letter after the prompt."""
    raise NotImplementedError  # your code here

# %%
check.choose_letter(choose_letter)

# %% [markdown]
# ## 4 · Packing
#
# difficulty 3/5 · importance 4/5 · 20 minutes
#
# Conversations of known lengths are to fill rows of `capacity` tokens. At most `waiting` of them wait at a time, taken
# in order; as soon as one has been placed the next one joins. Into the present row goes the longest waiting one that
# still fits, of equals the one that came first; when none fits, a new row begins. No length is above `capacity`.

# %%
def pack(lengths, capacity, waiting):
    """A list of ints → rows, each a list of the places (0, 1, …) of its conversations in the order they were put in."""
    raise NotImplementedError  # your code here

# %%
check.pack(pack)

# %% [markdown]
# ## 5 · What padding costs
#
# difficulty 2/5 · importance 3/5 · 15 minutes
#
# Measure it: pack `check.talk()` in rows of 257 tokens (`seq_len` 256) with `ConversationLoader`, once with a buffer of
# 1 and once of 100, over one whole pass. What share of all tokens is padding? Answer with a dict {1: …, 100: …}. Then
# think: why is there any padding left with 100, and where in the pass does it stand?

# %%
from nanochat_lib.tasks.packing import ConversationLoader

tokenizer = check.byte_tokenizer()
answer = None
# your code here

# %%
check.padding_share(answer)
