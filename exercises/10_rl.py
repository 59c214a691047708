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
# # 10 · Exercises: reinforcement learning
#
# Three functions to rebuild, two of `nanochat_lib.objectives` and one of `nanochat_lib.tasks.evaluate`, a reward of your
# own, and one question to answer by measuring. The lesson is [10 · Reinforcement learning](../lessons/10_rl.ipynb).

# %%
import torch

from nanochat_lib.course.checks import rl as check

# %% [markdown]
# ## 1 · Better or worse than one's siblings
#
# difficulty 1/5 · importance 5/5 · 5 minutes
#
# Several answers were tried to each question. An answer's advantage is its reward minus the mean reward of the
# answers to the *same* question.

# %%
def group_advantages(rewards):
    """Rewards (questions, samples), or any shape that ends in samples → advantages, the same shape."""
    raise NotImplementedError  # your code here

# %%
check.group_advantages(group_advantages)

# %% [markdown]
# ## 2 · The policy-gradient loss
#
# difficulty 2/5 · importance 5/5 · 15 minutes
#
# Given the log-probabilities of the tokens that were taken, (B, T), an advantage for each row, (B,), and a mask, (B,
# T), that is 1 on tokens the policy chose itself (not the prompt, not what a tool put there): return the loss whose
# negative gradient makes good answers likelier. Every chosen token counts the same: divide once, by the number of
# chosen tokens in the whole batch, not row by row.

# %%
def policy_gradient_loss(logp, advantages, mask):
    """−Σ advantage · logp over the chosen tokens, divided by their number (by 1 if there is none); a 0-dim tensor."""
    raise NotImplementedError  # your code here

# %%
check.policy_gradient_loss(policy_gradient_loss)

# %% [markdown]
# ## 3 · pass@k without bias
#
# difficulty 2/5 · importance 4/5 · 15 minutes
#
# What is the chance that at least one of k answers is right? If n answers were sampled and c of them are right, look
# at all ways to draw k of the n *without* putting back: pass@k is the part of them that holds a right one (Chen et
# al., arXiv 2107.03374). The tempting 1 − (1 − c/n)ᵏ is too low.

# %%
def pass_at_k(samples, right, k):
    """Part of the draws of k out of `samples` answers that hold one of the `right` right ones; a float."""
    raise NotImplementedError  # your code here

# %%
check.pass_at_k(pass_at_k)

# %% [markdown]
# ## 4 · A reward of one's own
#
# difficulty 3/5 · importance 5/5 · 20 minutes
#
# Write the rule that pays for an answer to a word problem, so that there is no cheap way to be paid. 1 for a right
# answer: it ends in `#### ` and the right number, after some words of work, and names no other final number. 0.1 for one
# of that form with a wrong number, so that a beginner has something to climb. 0 for everything else. The check plays the
# model: it tries what models have tried.

# %%
def careful_reward(answer, right):
    """What the text `answer` earns when `right` (a string of digits) is the number asked for: 1.0, 0.1 or 0.0."""
    raise NotImplementedError  # your code here

# %%
check.careful_reward(careful_reward)

# %% [markdown]
# ## 5 · Explore: the best constant baseline
#
# difficulty 3/5 · importance 3/5 · 20 minutes
#
# In the lesson's figure the variance of the gradient estimate is a parabola in the baseline, and its bottom is *not*
# at the expected reward. Take this policy and these chances of being right. Find, to 0.02, the constant baseline with
# the least total variance of (r − b)·∇log p(a): by measuring, or by setting a derivative to zero. Why is it not the
# mean reward?

# %%
p = torch.tensor([0.85, 0.1, 0.05])        # the policy, a softmax of three logits
chances = torch.tensor([0.9, 0.3, 0.1])    # of each answer to be right
answer = None  # the baseline, a float
# your code here

# %%
check.best_baseline(answer)
