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
# # 02 · Exercises: the tokenizer
#
# Two functions of the library to rebuild, `bpe.train_simple` and `tokenizer.render_conversation`, and one question of
# cost. The lesson is [02 · The tokenizer](../lessons/02_tokenizer.ipynb).

# %%
from collections import Counter

from nanochat_lib import bpe
from nanochat_lib.course.checks import tokenizer as check
from nanochat_lib.tokenizer import SPLIT_PATTERN, Tokenizer
from nanochat_lib.world_facts import World
from nanochat_lib.world_text import documents

# %% [markdown]
# ## 1 · Byte pair encoding
#
# difficulty 2/5 · importance 5/5 · 20 minutes
#
# Find the merges that rustbpe would. You get the different words as bytes and how often each occurred; neighbours in
# different words never merge. Again and again: count all pairs of neighbours, choose the most frequent (of several, the
# smallest pair of numbers), give it the next number from 256 on, and put that number in its place, from the left.
# Stop after `merges` steps, or earlier, when every word is a single token.

# %%
def train_simple(words, merges):
    """The pairs joined, in order: list of (left id, right id); merge number i makes token 256 + i.

    `words` is a Counter of bytes → count, and is left as it is.
    """
    raise NotImplementedError  # your code here

# %%
check.train_simple(train_simple)

# %% [markdown]
# ## 2 · A chat as a document
#
# difficulty 3/5 · importance 5/5 · 25 minutes
#
# Turn a conversation into ids and a mask of the same length, 1 exactly on what the assistant must learn to emit. The
# specification is in the lesson under *A chat is a document*: `<|bos|>` first; a user's turn between its markers; an
# assistant's turn between its markers, its content a string or parts of type `text`, `python` (between python
# markers) or `python_output` (between output markers); a leading system message put before the first user's text with
# a blank line between. You need `tokenizer.encode(text)` and `tokenizer.encode_special("<|bos|>")`. Users and
# assistant take turns in all conversations you get, and nothing need be cut.

# %%
def render_conversation(tokenizer, conversation):
    """(ids, mask), two lists of equal length, of {"messages": [{"role", "content"}, …]}, which is left as it is."""
    raise NotImplementedError  # your code here

# %%
check.render_conversation(render_conversation)

# %% [markdown]
# ## 3 · What a vocabulary costs
#
# difficulty 2/5 · importance 3/5 · 15 minutes
#
# A larger vocabulary needs fewer tokens for a text, but makes each token dearer: the last matrix of the model has a
# row of `width` weights for every id. Training takes 6 floating-point operations per weight and token, so a model
# with `matrices` other weights pays 6 · (matrices + width · size) per token. What does it pay per *byte* of text? A
# vocabulary of `size` ids is the first `size − 9` tokens, since nine ids are specials: `Tokenizer(tokens[:size -
# 9])`.

# %%
def flops_per_byte(tokens, size, texts, matrices, width):
    """Operations to train on one byte (UTF-8) of the texts, a float; `tokens` are bytes, in order of merging."""
    raise NotImplementedError  # your code here

# %%
check.flops_per_byte(flops_per_byte)

# %% [markdown]
# For a toy of two blocks and width 32, and for the laptop's model of four blocks and width 128 (a block has 12 ·
# width² weights): which of these sizes is the cheapest? What would a model of 24 blocks, width 1,536 and the text of
# the web choose?

# %%
texts = list(documents(World(1), 2000))
tokens = bpe.tokens_of(bpe.train(bpe.count_words(texts[:1800], SPLIT_PATTERN), 1000))
answer = None
# your code here
answer
