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
# # 04 · Exercises: GPT
#
# Four formulas to rebuild, one of them with its gradient, and one question to answer by counting. The
# lesson is [04 · GPT](../lessons/04_gpt.ipynb).

# %%
import torch
from torch.autograd import Function

from nanochat_lib.course.checks import gpt as check
from nanochat_lib.gpt import GPT, GPTConfig

# %% [markdown]
# ## 1 · RMS norm
#
# difficulty 1/5 · importance 5/5 · 10 minutes
#
# Everything that a block reads is normed first. Divide each vector (the last dimension of `x`) by the root of its mean
# square, and multiply by `scale`. There are no weights. A tiny `eps` is added to the mean square, so that a vector of
# zeros stays zeros. The mean square is taken in float32: in bfloat16 the sum of many squares is coarse.

# %%
def norm(x, scale=1.0, eps=1e-6):
    """RMS norm of x (…, C) over the last dimension, times scale; same shape and dtype as x."""
    raise NotImplementedError  # your code here

# %%
check.norm(norm)

# %% [markdown]
# ## 2 · Rotary positions
#
# difficulty 2/5 · importance 5/5 · 15 minutes
#
# Channel i of a head and channel i + D/2 are a pair (x1, x2), and turn together by the angle of their position:
#
# - y1 = x1·cos + x2·sin
# - y2 = −x1·sin + x2·cos
#
# `cos` and `sin` hold one number per position and pair. The first half of the result holds the y1, the second the y2.

# %%
def apply_rotary_emb(x, cos, sin):
    """Rotate x (B, T, H, D) by cos, sin (1, T, 1, D/2); the result has the shape of x."""
    raise NotImplementedError  # your code here

# %%
check.apply_rotary_emb(apply_rotary_emb)

# %% [markdown]
# ## 3 · Relu squared, with its gradient by hand
#
# difficulty 3/5 · importance 3/5 · 15 minutes
#
# Between the two matrices of the MLP stands max(x, 0)². Write it as an autograd function: `forward` computes, and keeps
# what the gradient needs (`ctx.save_for_backward`); `backward` gets the gradient by the result and returns that by the
# input. One tensor kept is enough, and neither may change a tensor it was given.

# %%
class SquaredRelu(Function):
    @staticmethod
    def forward(ctx, x):
        """max(x, 0)² of x of any shape."""
        raise NotImplementedError  # your code here

    @staticmethod
    def backward(ctx, grad):
        """The gradient by x, from the gradient by the result."""
        raise NotImplementedError  # your code here

# %%
check.SquaredRelu(SquaredRelu)

# %% [markdown]
# ## 4 · What depth buys
#
# difficulty 2/5 · importance 4/5 · 15 minutes
#
# Turn one dial, the depth, and the width follows (64 × depth, heads of 128, vocabulary 32,768, all heads with keys
# of their own). A small model is mostly tables, a large one mostly matrices. Count with `num_scaling_params`; on the
# meta device a model of any size costs nothing. Two numbers are asked:
#
# - `crossing`: the smallest even depth at which `transformer_matrices` are more than half of `total`
# - `growth`: N at depth 24 divided by N at depth 12, to one decimal, where N = `transformer_matrices` + `lm_head`
#
# Before you count: the matrices of a block grow with the square of the width, and there are depth of them. What would
# `growth` be if there were no `lm_head`?

# %%
def model_of_depth(depth):
    """A GPT of this (even) depth without weights."""
    with torch.device("meta"):
        return GPT(GPTConfig(n_layer=depth, n_head=depth // 2, n_kv_head=depth // 2, n_embd=64 * depth))


answer = None  # dict(crossing=…, growth=…)
# your code here

# %%
check.parameters_by_depth(answer)

# %% [markdown]
# ## 5 · Into eight bits
#
# difficulty 2/5 · importance 3/5 · 15 minutes
#
# Before a tensor is cast to an 8-bit float it is divided by a scale, one for the whole tensor, so that its largest
# entry becomes the largest number of the format (`torch.finfo(dtype).max`: 448 for e4m3, 57,344 for e5m2). The scale
# is a float32 tensor without dimensions; later the product of two such tensors is multiplied by both scales. Two
# traps: a tensor of zeros has no largest entry to divide by, and in float16 entry and scale lose digits or overflow, so
# divide in float32.

# %%
def to_fp8(x, dtype):
    """(x / scale as a tensor of the 8-bit dtype, scale); zeros stay zeros, with a finite scale above 0."""
    raise NotImplementedError  # your code here

# %%
check.to_fp8(to_fp8)
