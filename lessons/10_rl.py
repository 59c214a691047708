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
# # 10 · Reinforcement learning
#
# *How does it get better than its teachers?* — 45 minutes, about one of them computing.
#
# A model that imitates learns its teachers' errors too. But for many questions an answer is easy to judge even where it
# is hard to give: the number after `####` is right or wrong. So let the model try, see which
# tries were right, and make those more likely. The trouble is that "right" has no derivative. This lesson gets a
# gradient from it all the same.

# %%
#| default_exp objectives

# %%
#| export
"""What reinforcement learning minimizes: each algorithm a function of log-probabilities, rewards and a mask."""


from dataclasses import dataclass

import torch
from torch import Tensor

# %%
import random

import matplotlib.pyplot as plt

from nanochat_lib.gpt import GPTConfig, build_model
from nanochat_lib.tasks.common import conversation_of
from nanochat_lib.tokenizer import Tokenizer

# %% [markdown]
# ## One question, three answers
#
# The smallest case: a policy that chooses among three answers, softmax of three logits, and answers that are right
# with chance 0.2, 0.5 and 0.8. The expected reward J = Σ p(a)·r(a) does have a gradient, but to compute it one must
# know r for every answer. With language, nobody can list all answers. The way out (REINFORCE, Williams 1992) is to
# write ∇p = p·∇log p:
#
# $$\nabla J = \sum_a p(a)\, r(a)\, \nabla \log p(a) = \mathbb{E}\,[\, r \cdot \nabla \log p(a)\,]$$
#
# An expectation can be sampled: try answers, and push the log-probability of each by the reward it got.

# %%
chances = torch.tensor([0.2, 0.5, 0.8])
logits = torch.tensor([1.0, 0.0, -0.5], requires_grad=True)

expected = (logits.softmax(-1) * chances).sum()
(exact,) = torch.autograd.grad(expected, logits)


def estimates(groups, samples, baseline):
    """Gradient estimates (groups, 3), each from `samples` tries; baseline(rewards) is subtracted from the rewards."""
    generator = torch.Generator().manual_seed(0)
    p = logits.detach().softmax(-1)
    actions = torch.multinomial(p, groups * samples, replacement=True, generator=generator).view(groups, samples)
    rewards = torch.bernoulli(chances[actions], generator=generator)
    score = torch.nn.functional.one_hot(actions, 3) - p  # ∇ log softmax
    return ((rewards - baseline(rewards))[..., None] * score).mean(1)


raw = estimates(20_000, 16, lambda rewards: 0.0)
print("exact    ", [round(x, 2) for x in exact.tolist()])
print("estimated", [round(x, 2) for x in raw.mean(0).tolist()])

# %% [markdown]
# ## Better or worse than usual
#
# Right in the mean, but a single estimate is noisy: if most answers are right, almost everything tried is pushed up.
# Subtract what one expects anyway. Such a *baseline* changes nothing in the mean, because E[∇log p] = 0, and takes
# out much of the noise. The mean of a group of answers to the same question is a good one, and costs nothing. (It holds
# the answer itself, which shrinks the gradient by 1/16; the mean of the others, RLOO's below, does not.)

# %%
baselines = torch.linspace(-0.5, 1.5, 21)
spread = [estimates(4000, 16, lambda rewards: b).var(0).sum() for b in baselines]
grouped = estimates(20_000, 16, lambda rewards: rewards.mean(1, keepdim=True))

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
for name, values in {"no baseline": raw, "group mean": grouped}.items():
    left.hist(values[:, 0].numpy(), bins=60, range=(-0.4, 0.3), alpha=0.6, density=True, label=name)
left.axvline(exact[0].item(), color="black", linewidth=1, label="exact gradient")
left.set(xlabel="estimate of the first component, 16 tries", ylabel="density")
left.legend(fontsize=8)
right.plot(baselines, spread, label="a constant baseline")
right.axhline(grouped.var(0).sum(), color="C1", label="group mean")
right.axvline(expected.item(), color="0.6", linewidth=1, label="expected reward")
right.set(xlabel="baseline", ylabel="variance of the estimate", ylim=(0, None))
right.legend(fontsize=8)
assert grouped.var(0).sum() < 0.6 * raw.var(0).sum()

# %% [markdown]
# ## From answers to tokens
#
# An answer of a language model is a chain of choices, its log-probability the sum over its tokens. So the loss is a
# cross entropy with a weight, the *advantage*, that may be negative. What the model did not choose has no part in it:
# the prompt, and what the calculator put into the stream. All tokens of a step count the same, long answer or short.

# %%
#| export
def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards of a question's answers (…, samples) minus their mean: what an answer earned above its siblings."""
    return rewards - rewards.mean(dim=-1, keepdim=True)


def policy_gradient_loss(logp: Tensor, advantages: Tensor, mask: Tensor, tokens: float | None = None) -> Tensor:
    """−Σ advantage · logp over the trained tokens, divided by their number.

    logp (…, T) of the tokens that were taken, advantages (…), mask (…, T) 1 where a token was the policy's own choice.
    `tokens` is the divisor when these rows are a part of a larger batch; by default mask.sum().
    """
    total = (logp * mask * advantages[..., None]).sum()
    return -total / (mask.sum().clamp_min(1) if tokens is None else max(tokens, 1))

# %%
logp = torch.randn(4, 5, requires_grad=True)
mask = torch.tensor([[1, 1, 0, 0, 1]] * 4)  # two tokens in the middle came from a tool
policy_gradient_loss(logp, group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0])), mask).backward()
print(logp.grad.mul(24).round().int().tolist())  # in units of 1/24: the loss falls where an advantage is positive

# %% [markdown]
# ## One family
#
# With one update per batch of fresh answers nothing more is needed, and that is our default. The published algorithms
# change three things about it: what an answer is worth, by what a sum is divided, and what happens when a batch is
# used more than once, so that the policy is no longer the one that tried. All are functions of the same tensors, for Q
# questions with G answers of at most T tokens each: `logp` now, `old_logp` when the answers were tried,
# `reference_logp` by the model before any practice, `rewards`, `mask`.

# %%
#| export
@dataclass(frozen=True)
class Terms:
    """What else an objective may ask for."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    tokens: float | None = None   # trained tokens of the whole step, on all ranks; None: those of the mask
    answers: float | None = None  # answers of the whole step; None: those of the rewards
    longest: int = 256            # most tokens an answer can have


def reinforce(logp: Tensor, old_logp: Tensor, reference_logp: Tensor, rewards: Tensor, mask: Tensor,
              terms: Terms = Terms()) -> Tensor:
    """REINFORCE (Williams, 1992) above the group's mean, every token of the step alike. For fresh answers only."""
    return policy_gradient_loss(logp, group_advantages(rewards), mask, terms.tokens)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards (…, samples) minus the mean of the *other* answers, on which an answer itself has no influence."""
    others = rewards.sum(dim=-1, keepdim=True) - rewards
    return rewards - others / (rewards.size(-1) - 1)


def rloo(logp: Tensor, old_logp: Tensor, reference_logp: Tensor, rewards: Tensor, mask: Tensor,
         terms: Terms = Terms()) -> Tensor:
    """REINFORCE leave-one-out (arXiv 2402.14740): unbiased, an answer is one action. For fresh answers only."""
    total = (logp * mask * leave_one_out(rewards)[..., None]).sum()
    return -total / (terms.answers or rewards.numel())

# %% [markdown]
# After an update the policy has moved, and old answers tell of the old policy. Weighting each token by the ratio
# ρ = π_new/π_old mends the mean (importance sampling), but a ratio can become huge. PPO (arXiv 1707.06347) stops the
# push once the ratio has left 1 ± ε in the wanted direction: **min(ρA, clip(ρ)A)**.

# %%
#| export
def clipped_gain(logp: Tensor, old_logp: Tensor, advantages: Tensor, terms: Terms) -> Tensor:
    """min(ρ·A, clip(ρ, 1 − low, 1 + high)·A) of every token (Q, G, T), ρ = π_new / π_old; advantages (Q, G)."""
    ratio, advantages = (logp - old_logp).exp(), advantages[..., None]
    return torch.minimum(ratio * advantages, ratio.clamp(1 - terms.clip_low, 1 + terms.clip_high) * advantages)


def z_scores(rewards: Tensor) -> Tensor:
    """Advantages over the group's standard deviation; 0 where all answers earned the same."""
    above = group_advantages(rewards)
    return above / (above.square().mean(dim=-1, keepdim=True).sqrt() + 1e-6)


def grpo(logp: Tensor, old_logp: Tensor, reference_logp: Tensor, rewards: Tensor, mask: Tensor,
         terms: Terms = Terms()) -> Tensor:
    """GRPO (arXiv 2402.03300): z-scores, clipped ratio, the mean over each answer's tokens, then over the answers."""
    gain = clipped_gain(logp, old_logp, z_scores(rewards), terms) * mask
    return -(gain.sum(-1) / mask.sum(-1).clamp_min(1)).sum() / (terms.answers or rewards.numel())


def dapo(logp: Tensor, old_logp: Tensor, reference_logp: Tensor, rewards: Tensor, mask: Tensor,
         terms: Terms = Terms(clip_high=0.28)) -> Tensor:
    """DAPO (arXiv 2503.14476): every token alike, so that long answers weigh what they are; more room upwards, so that
    a rare good token can rise. (Questions of mixed outcome only: the others are skipped, and none drawn in their place;
    there is no penalty for overlong answers.)
    """
    gain = clipped_gain(logp, old_logp, z_scores(rewards), terms) * mask
    return -gain.sum() / max(terms.tokens or mask.sum(), 1)


def dr_grpo(logp: Tensor, old_logp: Tensor, reference_logp: Tensor, rewards: Tensor, mask: Tensor,
            terms: Terms = Terms()) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): neither σ, which overrates questions that are almost decided, nor an answer's own
    length, which forgives long wrong answers: divided by constants."""
    gain = clipped_gain(logp, old_logp, group_advantages(rewards), terms) * mask
    return -gain.sum() / ((terms.answers or rewards.numel()) * terms.longest)

# %%
#| export
def kl_to_reference(logp: Tensor, old_logp: Tensor, reference_logp: Tensor, rewards: Tensor, mask: Tensor,
                    terms: Terms = Terms()) -> Tensor:
    """How far the policy has gone from the reference, mean over tokens: the estimate k3 = e^d − d − 1 with d = log
    π_ref − log π, never negative (Schulman, 2020, as used in GRPO). To be added to an objective with a factor."""
    d = reference_logp - logp
    return ((d.exp() - d - 1) * mask).sum() / max(terms.tokens or mask.sum(), 1)


ALGORITHMS = {"reinforce": reinforce, "rloo": rloo, "grpo": grpo, "dapo": dapo, "dr_grpo": dr_grpo}
CLIPS = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "dr_grpo": (0.2, 0.2)}  # low, high of the papers

# %% [markdown]
# Left: what one right answer is worth if k of 16 are right. Dividing by σ makes the rare one on either side loud
# (a wrong answer's curve is the mirror image).
# Right: how hard a token is still pushed when the policy has moved. A good token rests above 1 + ε, a bad one below
# 1 − ε; on the other side both are pulled back with full force.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
wins = torch.tensor([[1.0] * k + [0.0] * (16 - k) for k in range(1, 16)])
for name, rule in {"minus the mean": group_advantages, "leave one out": leave_one_out, "z-score": z_scores}.items():
    left.plot(range(1, 16), rule(wins)[:, 0], label=name)
left.set(xlabel="right answers among 16", ylabel="advantage of a right one")
left.legend(fontsize=8)
ratios = torch.linspace(0.4, 1.6, 200)
for advantage, style in ((1.0, "-"), (-1.0, "--")):
    for name in ("grpo", "dapo"):
        now = ratios.log().requires_grad_()
        gain = clipped_gain(now, torch.zeros(200), torch.tensor(advantage), Terms(*CLIPS[name]))
        right.plot(ratios, torch.autograd.grad(gain.sum(), now)[0], style, label=f"{name}, advantage {advantage:+.0f}")
right.set(xlabel="ratio of new to old probability", ylabel="push on the token")
_ = right.legend(fontsize=8)

# %% [markdown]
# ## What an answer earns
#
# The task judges the answer. Form and brevity can be paid for as well, and what is paid is a sum with weights. One rule
# comes first: an answer that the token budget cut off earns nothing. Without it, an answer that says `#### 12` and then
# talks on is as good as one that stops, nothing holds the length, and we have seen whole runs end in answers that never
# end.

# %%
#| export rewards
"""What reinforcement learning pays for an answer: right, well-formed, short, by the tool; a sum with weights."""


import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nanochat_lib.request import Completion
from nanochat_lib.common import NanochatError
from nanochat_lib.tasks.common import Task

WELL_FORMED = re.compile(r"(?!.*####.*####).*####\s*-?[\d,]*\.?\d+\s*", re.DOTALL)


@dataclass(frozen=True)
class Tried:
    """An answer as a reward sees it."""

    task: Task
    conversation: dict
    text: str
    completion: Completion
    budget: int  # tokens it might have had


def answer_reward(tried: Tried) -> float:
    """What the task itself pays, mostly 1 for right and 0 for wrong."""
    return float(tried.task.reward(tried.conversation, tried.text))


def format_reward(tried: Tried) -> float:
    """1 for an answer that ends in `#### number`, and has only one."""
    return float(WELL_FORMED.fullmatch(tried.text) is not None)


def length_reward(tried: Tried) -> float:
    """1 for an empty answer, falling to 0 for one that takes the whole budget."""
    return 1.0 - min(len(tried.completion.tokens) / tried.budget, 1.0)


REWARDS: dict[str, Callable[[Tried], float]] = {"answer": answer_reward, "format": format_reward,
                                                "length": length_reward}

# %%
#| export rewards
@dataclass(frozen=True)
class Reward:
    """A sum of rewards, {name: weight}; `zero_cut`: answers cut off by the token budget earn 0 in every part."""

    weights: Mapping[str, float] = field(default_factory=lambda: {"answer": 1.0})
    zero_cut: bool = True

    def parts(self, tried: Tried) -> dict[str, float]:
        """What each part pays, before weights."""
        cut = self.zero_cut and tried.completion.stop_token is None
        return {name: 0.0 if cut else float(reward_named(name)(tried)) for name in self.weights}

    def total(self, parts: Mapping[str, float]) -> float:
        return sum(weight * parts[name] for name, weight in self.weights.items())


def reward_named(name: str) -> Callable[[Tried], float]:
    """A reward of the table, or a function of one's own as `module:function`. NanochatError for unknown names."""
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError):
        raise NanochatError(f"no reward {name!r}: choose {', '.join(REWARDS)}, or an importable module:function that "
                            "takes a nanochat_lib.rewards.Tried") from None


def parse_reward(text: str, zero_cut: bool = True) -> Reward:
    """`answer=1,format=0.1` → Reward; a name alone has the weight 1. NanochatError names what cannot be read."""
    weights: dict[str, Any] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise NanochatError(f"--reward {part!r}: the weight is a number, as in answer=1,format=0.1") from None
        reward_named(name)
    return Reward(weights, zero_cut)

# %%
from nanochat_lib.request import Completion
from nanochat_lib.rewards import Tried, parse_reward
from nanochat_lib.tasks.gsm8k import WordProblems

problem = WordProblems([{"question": "Two pens at 3 pence?", "answer": "They cost <<2*3=6>>6 pence.\n#### 6"}])
reward = parse_reward("answer=1,format=0.2,length=0.1")
for text, stop in (("They cost 6.\n#### 6", 1), ("#### 7", 1), ("They cost 6 pence.", 1), ("#### 6\n#### 6 and", None)):
    parts = reward.parts(Tried(problem, problem[0], text, Completion([0] * len(text), [], [], "stop", stop), 40))
    print(f"{text!r:24} {parts} → {reward.total(parts):.2f}")

# %% [markdown]
# ## Trying
#
# A step takes some questions and tries every one several times, all in one batch of the engine (lesson 08). Which
# questions a step gets follows from its number alone, so that a resumed run goes on as if nothing had happened.

# %%
#| export rl
"""Reinforcement learning from right and wrong: sampled answers, their rewards, and the gradient made of them."""


import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nanochat_lib.request import Completion
from nanochat_lib.engine import Engine
from nanochat_lib.gpt import GPT, softcap
from nanochat_lib.objectives import Terms, group_advantages, kl_to_reference
from nanochat_lib.rewards import Reward, Tried
from nanochat_lib.tasks.common import Task


@dataclass(frozen=True)
class Question:
    """One question of a step, and the answers that were tried."""

    number: int  # in its task
    prompt: list[int]
    conversation: dict
    answers: list[Completion]
    texts: list[str]
    parts: list[dict[str, float]]  # of each answer's reward, by name
    rewards: list[float]

    @property
    def advantages(self) -> list[float]:
        return group_advantages(torch.tensor(self.rewards, dtype=torch.float64)).tolist()

    @property
    def decided(self) -> bool:
        """All answers earned the same: nothing to learn from the difference."""
        return max(self.rewards) - min(self.rewards) < 1e-9

    @property
    def right(self) -> bool:
        """Whether the first answer earned all there is for an answer (of a decided question: all of them did)."""
        return self.parts[0].get("answer", self.rewards[0]) >= 1

# %%
#| export rl
def questions_of_step(step: int, per_step: int, size: int, seed: int = 42) -> list[int]:
    """Numbers of the questions of a step: pass after pass over a task of `size`, each in its own order.

    Any step can be asked for alone, so that a resumed run goes on with the questions it would have had.
    """
    places = range(step * per_step, (step + 1) * per_step)
    order = {epoch: random.Random(f"{seed} {epoch}").sample(range(size), size) for epoch in {p // size for p in places}}
    return [order[place // size][place % size] for place in places]


def roll_out(engine: Engine, task: Task, numbers: list[int], reward: Reward = Reward(), **sampling: Any
             ) -> list[Question]:
    """Answer these questions of a task, all in one batch; `sampling` goes to Engine.generate_many."""
    conversations = [task[number] for number in numbers]
    prompts = [engine.tokenizer.render_for_completion(conversation) for conversation in conversations]
    budget, questions = sampling.get("max_tokens") or engine.model.config.sequence_len, []
    for number, conversation, prompt, answers in zip(numbers, conversations, prompts,
                                                     engine.generate_many(prompts, **sampling)):
        texts = [engine.tokenizer.decode(answer.tokens) for answer in answers]
        parts = [reward.parts(Tried(task, conversation, *pair, budget)) for pair in zip(texts, answers)]
        questions.append(Question(number, prompt, conversation, answers, texts, parts, [*map(reward.total, parts)]))
    return questions

# %% [markdown]
# ## Learning from what was tried
#
# If all answers to a question earned the same, every advantage is zero: such questions carry no gradient, and we skip
# their forward and backward pass. Equal answers are common in small groups: they share one row. Both change the work,
# not the result.

# %%
#| export rl
@dataclass(frozen=True)
class Row:
    """A sequence to learn from: mask 1 on the tokens the policy chose."""

    tokens: tuple[int, ...]
    mask: tuple[int, ...]


@dataclass(frozen=True)
class Tries:
    """Some questions' answers: the different sequences among them, and for each answer which row it is."""

    rows: list[Row]
    place: torch.Tensor  # (Q, G) int64
    rewards: torch.Tensor  # (Q, G) float32

    @cached_property
    def mask(self) -> torch.Tensor:
        """(rows, T − 1) float32: 1 on the trained tokens after the first."""
        return padded([row.mask[1:] for row in self.rows]).float()


def padded(sequences: list[tuple], device: torch.device | str = "cpu") -> torch.Tensor:
    """Sequences of unlike length as one tensor, zeros on the right."""
    longest = max(map(len, sequences))
    return torch.tensor([(*sequence, *[0] * (longest - len(sequence))) for sequence in sequences], device=device)


def chosen(answer: Completion) -> tuple[list[int], list[int]]:
    """(tokens, mask) of an answer with the token that ended it, which was a choice too."""
    end = [] if answer.stop_token is None else [answer.stop_token]
    return answer.tokens + end, answer.mask + [1] * len(end)


def tries_of(questions: list[Question], keep_decided: bool = False) -> Tries | None:
    """What there is to learn from; None if every question is decided. `keep_decided`: a KL term pulls on those too."""
    places, groups, rewards = {}, [], []
    for question in questions:
        if question.decided and not keep_decided:
            continue
        rewards.append(question.rewards)
        groups.append([])
        for answer in question.answers:
            tokens, mask = chosen(answer)
            row = Row((*question.prompt, *tokens), (0,) * len(question.prompt) + tuple(mask))
            groups[-1].append(places.setdefault(row, len(places)))
    return Tries(list(places), torch.tensor(groups), torch.tensor(rewards)) if groups else None

# %% [markdown]
# Any objective of the family can now be learned from in pieces that fit the memory. It is a function of a table of
# log-probabilities. Its derivative with respect to each entry is a *weight* for that token, and Σ weight · logp, the
# weights held constant, has the same gradient. So we compute the weights from the table, without the model, and then
# learn piece by piece. `chat_rl` fills the table as the pieces come by, and makes no forward pass twice; the short loop
# below fills it first, with a pass of its own.

# %%
#| export rl
def token_weights(objective: Callable, tries: Tries, terms: Terms, logp: torch.Tensor, old: torch.Tensor,
                  reference: torch.Tensor | None = None, kl: float = 0.0) -> torch.Tensor:
    """Derivative of objective + kl · kl_to_reference with respect to the rows' log-probabilities (rows, T − 1)."""
    leaf, mask = logp.detach().clone().requires_grad_(), tries.mask[tries.place]
    given = [table[tries.place] for table in (leaf, old, logp if reference is None else reference)]  # (Q, G, T − 1)
    loss = objective(*given, tries.rewards.to(logp.dtype), mask, terms)
    if kl:
        loss = loss + kl * kl_to_reference(*given, tries.rewards, mask, terms)
    return torch.autograd.grad(loss, leaf)[0]


def micro_batches(rows: list[Row], most: int) -> list[list[int]]:
    """Places of rows of like length together, each batch at most `most` tokens with padding (a longer row alone)."""
    batches: list[list[int]] = []
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place].tokens)):
        if batches and (len(batches[-1]) + 1) * len(rows[place].tokens) <= most:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def token_logprobs(model: GPT, tokens: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log p of every token after the first, given those before it (B, T) → (B, T−1); 0 where mask (B, T) is 0.

    Logits are computed only where they are needed: of a 32K vocabulary they are the largest tensor of all.
    """
    trained = mask[:, 1:].bool()
    x = model.hidden(tokens[:, :-1])[trained]  # (N, C)
    logits = softcap(model.lm_head(x)[:, :model.config.vocab_size]) / temperature
    logp = logits.gather(-1, tokens[:, 1:][trained][:, None])[:, 0] - logits.logsumexp(dim=-1)
    return torch.zeros(trained.shape, device=logp.device, dtype=logp.dtype).masked_scatter(trained, logp)

# %%
#| export rl
@torch.no_grad()
def row_logprobs(model: GPT, rows: list[Row], most: int, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of all rows' tokens (rows, T − 1) on the CPU, 0 where not trained."""
    device, longest = next(model.parameters()).device, max(len(row.tokens) for row in rows)
    table = torch.zeros(len(rows), longest - 1)
    for batch in micro_batches(rows, most):
        tokens, mask = (padded(part, device) for part in zip(*[(rows[i].tokens, rows[i].mask) for i in batch]))
        table[batch, :tokens.size(1) - 1] = token_logprobs(model, tokens, mask, temperature).float().cpu()
    return table


def learn(model: GPT, rows: list[Row], weights: Tensor | Callable[[list[int], Tensor], Tensor], most: int,
          scale: float = 1.0, temperature: float = 1.0) -> float:
    """Add the gradient of Σ weights · logp, micro-batch by micro-batch; returns that sum, which is the loss where an
    objective is linear in logp. `most` bounds a micro-batch; `scale` multiplies the gradient.

    weights: (rows, T − 1), or a function that gives those of some rows from their places and logp (n, t) on the CPU.
    """
    device, total, useful = next(model.parameters()).device, 0.0, list(range(len(rows)))
    if not callable(weights):
        useful = weights.ne(0).any(-1).nonzero()[:, 0].tolist()
    for batch in micro_batches([rows[i] for i in useful], most):
        batch = [useful[i] for i in batch]
        tokens, mask = (padded(part, device) for part in zip(*[(rows[i].tokens, rows[i].mask) for i in batch]))
        logp = token_logprobs(model, tokens, mask, temperature)
        mine = weights(batch, logp.detach().float().cpu()) if callable(weights) else weights[batch]
        part = (logp * mine[:, :logp.size(1)].to(device)).sum()
        (part * scale).backward()
        total += part.item()
    return total

# %% [markdown]
# What to watch: reward, of course; entropy, which falls as the policy makes up its mind, and at zero nothing new is
# tried; length; tool use; and the answers themselves, since a reward is often earned in ways nobody meant.

# %%
#| export rl
def statistics(questions: list[Question], tool: int, output: int = -1) -> dict[str, float]:
    """Sums over a rank's questions, to be added up over ranks and divided. `tool` is the token that opens a call,
    `output` the one that opens its result: a call is right if the calculator answered it."""
    answers = [answer for question in questions for answer in question.answers]
    calls = [(answer.tokens.count(tool),
              sum(token == output and not own for token, own in zip(answer.tokens, answer.mask))) for answer in answers]
    parts = Counter()
    for question in questions:
        for part in question.parts:
            parts.update({f"reward_{name}": value for name, value in part.items()})
    return {
        "questions": len(questions),
        "answers": len(answers),
        "reward": sum(sum(question.rewards) for question in questions),
        **parts,
        "all_right": sum(question.decided and question.right for question in questions),
        "all_wrong": sum(question.decided and not question.right for question in questions),
        "length": sum(len(answer.tokens) for answer in answers),
        "cut": sum(answer.stop_token is None for answer in answers),
        "tool_use": sum(made > 0 for made, _ in calls),
        "tool_right": sum(made > 0 and made == answered for made, answered in calls),
        "surprise": -sum(sum(answer.logprobs) for answer in answers),  # of sampled tokens; forced ones count 0
        "sampled": sum(sum(answer.mask) for answer in answers),
        "trained": sum(sum(chosen(answer)[1]) for answer in answers),
    }


def readable(step: int, question: Question) -> dict[str, Any]:
    """One line of rollouts.jsonl: the question and each different answer, most frequent first."""
    counts = Counter(zip(question.texts, question.rewards, question.advantages))
    parts = dict(zip(question.texts, question.parts))
    return {"step": step, "number": question.number, "question": question.conversation["messages"][-2]["content"],
            "mean_reward": sum(question.rewards) / len(question.rewards),
            "answers": [{"count": count, "reward": reward, "advantage": round(advantage, 4),
                         **({"parts": parts[text]} if len(parts[text]) > 1 else {}), "text": text}
                        for (text, reward, advantage), count in counts.most_common()]}

# %% [markdown]
# Practice can also spoil a model: rates too high, a reward that can be had cheaply. Going on then only costs money.
# So a run is stopped, with the reason, when for some steps in a row no answer ended, or nothing new was tried though
# not all was right, or the reward fell by more than half and more than chance explains.

# %%
#| export rl
def collapsed(history: list[dict[str, float]], patience: int) -> str:
    """Why a run should stop, judged by the last `patience` steps of its history; "" while it is sound.

    A step has reward, entropy (nats per token), cut (share of answers cut off), questions and all_right.
    """
    if patience < 1 or len(history) < patience:
        return ""
    last = history[-patience:]
    if all(step["cut"] > 0.99 for step in last):
        return f"in {patience} steps no answer ended within the token budget"
    if all(step["entropy"] < 1e-3 and step["all_right"] < 0.9 * step["questions"] for step in last):
        return f"the entropy has been below 0.001 nats per token for {patience} steps: nothing new is tried"
    means = [sum(step["reward"] for step in history[at:at + patience]) / patience
             for at in range(len(history) - patience + 1)]
    best, now = max(means), means[-1]
    chance = 2 / sum(step["questions"] for step in last) ** 0.5  # four standard errors of a mean of coins
    if now < best / 2 and best - now > chance:
        return f"the reward fell from {best:.2f} (steps from {means.index(best)} on) to {now:.2f}"
    return ""

# %% [markdown]
# ## Better than the teachers
#
# All of it on a task small enough for this page: sums of two digits, taught by teachers who err in four sums of ten.
# A small GPT first imitates them, as in lesson 09.

# %%
import copy

from nanochat_lib.engine import Engine
from nanochat_lib.objectives import ALGORITHMS, CLIPS, Terms, reinforce
from nanochat_lib.rewards import Reward
from nanochat_lib.rl import (Row, learn, padded, questions_of_step, roll_out, row_logprobs, statistics, token_weights,
                             tries_of)


class Sums:
    """36 sums of digits up to 5; a demonstration is wrong by one with chance 0.4."""

    def __len__(self):
        return 36

    def __getitem__(self, number):
        return self.said(number, 0)

    def said(self, number, error):
        a, b = divmod(number, 6)
        return conversation_of(f"{a}+{b}", str(a + b + error))

    def taught(self, number, dice):
        return self.said(number, dice.choice([-1, 1]) if dice.random() < 0.4 else 0)

    def reward(self, conversation, answer):
        return float(answer == conversation["messages"][-1]["content"])


def imitate(task, tokenizer, steps=120):
    """A small GPT that says what the task's teachers say."""
    dice = random.Random(0)
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=32, vocab_size=tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2,
                       n_embd=64)
    policy = build_model(config, "cpu")
    optimizer = policy.setup_optimizer(unembedding_lr=0.004, embedding_lr=0.1, scalar_lr=0.1)
    for step in range(steps):
        pairs = [tokenizer.render_conversation(task.taught(number, dice)) for number in dice.choices(range(36), k=64)]
        rows = [Row(tuple(ids), tuple(mask)) for ids, mask in pairs]
        mask = padded([row.mask[1:] for row in rows]).float()
        learn(policy, rows, -mask / mask.sum(), most=4096)  # the loss of lesson 09: every target has the same weight
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1, 2 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad()
    return policy


task, tokenizer = Sums(), Tokenizer.train_from_iterator(iter(["1+2"] * 9), 265)
taught = imitate(task, tokenizer)

# %% [markdown]
# Now it practises: all 36 questions each step, 16 tries each, told only which were right. This is the whole loop.

# %%
def practise(policy, task, tokenizer, steps=25, objective=reinforce, clips=(0.2, 0.2), updates=1, reward=Reward(),
             budget=4, seed=0, watch=lambda step, engine, questions: None):
    """Reinforcement learning of `policy`, in place; returns the mean reward of every step."""
    engine, curve = Engine(policy, tokenizer), []
    optimizer = policy.setup_optimizer(unembedding_lr=0.002, embedding_lr=0.02, matrix_lr=0.03, scalar_lr=0.005)
    for step in range(steps + 1):
        questions = roll_out(engine, task, questions_of_step(step, 36, 36), reward, num_samples=16, max_tokens=budget,
                             seed=1000 * seed + step)
        sums = statistics(questions, engine.python_start)
        curve.append(sums["reward"] / sums["answers"])
        watch(step, engine, questions)
        if (tries := tries_of(questions)) is None:
            continue
        terms = Terms(*clips, sums["trained"], sums["answers"], budget)
        old = row_logprobs(policy, tries.rows, 4096)
        for update in range(updates):
            logp = row_logprobs(policy, tries.rows, 4096) if update else old
            learn(policy, tries.rows, token_weights(objective, tries, terms, logp, old), most=4096)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
    return curve


kept = {}


def keep(step, engine, questions):
    """Remember sixteen tries at 4 + 5."""
    if step % 5 == 0:
        [kept[step]] = roll_out(engine, task, [29], num_samples=16, max_tokens=4, seed=0)


rewards = practise(copy.deepcopy(taught), task, tokenizer, watch=keep)

figure, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
ax.plot(rewards, label="the model")
ax.axhline(0.6, color="0.5", linestyle="--", label="its teachers")
greedy = roll_out(Engine(taught, tokenizer), task, list(range(36)), Reward(), num_samples=1, max_tokens=4,
                  temperature=0.0, seed=0)
right = sum(question.rewards[0] for question in greedy) / 36
ax.axhline(right, color="C1", linestyle=":", label="at temperature 0, before")
assert right > 0.9
ax.set(xlabel="step of reinforcement learning", ylabel="part of right answers", ylim=(0, 1.02))
ax.legend()
assert rewards[0] < 0.72 and sum(rewards[-3:]) / 3 > 0.76

# %% [markdown]
# Sampled, it began as good as its teachers and left them behind. (At temperature 0 it was right before: the errors of
# teachers who err at random cancel, and practice makes a sample as good as their vote.) Nothing told it a right answer;
# it had to say it first, if
# only one time in ten. What a model never says cannot be reinforced, which is why chat models are taught before they
# practise.
#
# Sixteen tries at 4+5 before, during and after, each with its advantage; the slider shows every fifth step.

# %%
def draw_tries(ax, step, question, columns=8):
    """A question's different answers as boxes, coloured by advantage; returns the axis."""
    ax.clear()
    for place, (text, advantage) in enumerate(sorted(zip(question.texts, question.advantages))):
        box = dict(facecolor=plt.cm.RdYlGn(0.5 + advantage / 2), edgecolor="none")
        ax.text(place % columns, 1 - place // columns, text, ha="center", va="center", bbox=box)
    mean = sum(question.rewards) / len(question.rewards)
    ax.set(xlim=(-0.7, columns - 0.3), ylim=(-0.6, 1.6), title=f"step {step}: mean reward {mean:.2f}")
    ax.axis("off")
    return ax


figure, axes = plt.subplots(1, 3, figsize=(10, 1.9), layout="constrained")
for ax, step in zip(axes, (0, 10, 25)):
    draw_tries(ax, step, kept[step])

# %%
# NBVAL_IGNORE_OUTPUT
import ipywidgets
from IPython.display import display


def browse(step):
    figure, ax = plt.subplots(figsize=(5, 1.6), layout="constrained")
    draw_tries(ax, step, kept[step])
    plt.show()


_ = ipywidgets.interact(browse, step=ipywidgets.SelectionSlider(options=sorted(kept), description="step"))

# %% [markdown]
# ## Three algorithms, one budget
#
# The same start, the same questions and number of answers, three seeds. REINFORCE updates once a step; GRPO and DAPO
# use each batch twice, which the clipped ratio is meant to make safe, and so pay twice for learning, not for trying.

# %%
contest = {"reinforce": 1, "grpo": 2, "dapo": 2}
results = {name: torch.tensor([practise(copy.deepcopy(taught), task, tokenizer, 16, ALGORITHMS[name],
                                        CLIPS.get(name, (0.2, 0.2)), updates, seed=seed) for seed in range(3)])
           for name, updates in contest.items()}
figure, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
for name, curves in results.items():
    ax.plot(curves.mean(0), label=f"{name}, {contest[name]} update{'s' * (contest[name] > 1)} a step")
    ax.fill_between(range(17), curves.amin(0), curves.amax(0), alpha=0.2)
ax.axhline(0.6, color="0.5", linestyle="--")
ax.set(xlabel="step", ylabel="part of right answers", ylim=(0.4, 1.02))
ax.legend(fontsize=8)
for curves in results.values():
    assert curves[:, -1].mean() > curves[:, 0].mean()

# %% [markdown]
# Twice the updates from the same answers, and no run came apart. How much of the lead is the second update, and how
# much the z-scores? Give `contest` one update each and see.
#
# ## One gets what one pays for
#
# A reward is a wish put as a rule, and a model finds the cheapest way to keep the rule. Here most teachers write the
# sum out, `4+5=9 #### 9`, and one in six only guesses, `#### 7`. We pay for form and brevity and forget to pay for
# being right: `format=1,length=1`.

# %%
# NBVAL_IGNORE_OUTPUT
class Worked(Sums):
    """The same sums, worked out; one demonstration in six is a guess."""

    def __getitem__(self, number):
        a, b = divmod(number, 6)
        return conversation_of(f"{a}+{b}", f"{a}+{b}={a + b} #### {a + b}")

    def taught(self, number, dice):
        a, b = divmod(number, 6)
        guess = dice.randrange(10)
        return conversation_of(f"{a}+{b}", f"#### {guess}") if dice.random() < 1 / 6 else self[number]

    def reward(self, conversation, answer):
        return float(answer.split("#### ")[-1] == conversation["messages"][-1]["content"].split("#### ")[-1])


work, words = Worked(), Tokenizer.train_from_iterator(iter(["####"] * 9), 267)
student = imitate(work, words, 160)
paid, right, said = {}, {}, {}
rules = {"answer": Reward({"answer": 1.0}), "format + length": Reward({"format": 1.0, "length": 1.0})}
for name, rule in rules.items():
    right[name] = []

    def watch(step, engine, questions):
        texts = [(work.reward(q.conversation, text), text) for q in questions for text in q.texts]
        right[name].append(sum(value for value, _ in texts) / len(texts))
        said[name] = questions[0].texts[0]

    paid[name] = practise(copy.deepcopy(student), work, words, 16, reward=rule, budget=16, watch=watch)

figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharex=True, layout="constrained")
for ax, values, label in zip(axes, (paid, right), ("what it is paid", "part of right answers")):
    for name, curve in values.items():
        ax.plot(curve, label=f"paid for {name}")
    ax.set(xlabel="step", ylabel=label, ylim=(0, None))
axes[1].legend(fontsize=8)
for name, text in said.items():
    print(f"paid for {name}, it ends up saying: {text}")
assert paid["format + length"][-1] > paid["format + length"][0]
assert right["format + length"][-1] < 0.5 < right["answer"][-1]

# %% [markdown]
# The curve on the left is all that a log would show, and it looks like success. So `chat_rl` writes every answer down,
# and keeps the parts of the reward apart.
#
# An honest reward has the same hole where the questions have one. Of real words, three counts of a letter in four are 1.
# Practising on such questions, a laptop's chat model unlearned counting in 300 steps: `b 1 u 1 b 1 b 1 l 1 e 1 #### 1`,
# whatever was asked. Its reward rose from 0.79 to 0.86, and 0.755 of 200 held-out answers were right (0.635 before): the
# part whose answer is 1. That is why lesson 09 deals the questions out evenly (`even_rows`).
#
# ## The command
#
# `chat_rl` is this loop with settings, evaluation and checkpoints. It starts from the chat model of lesson 09 and
# practises GSM8K, the world's word problems, its spellings, or a class of your own. Rates are a twentieth of
# pretraining's: the model is to be nudged, not taught anew. Several ranks share the questions of a step; sums are
# divided by what all of them tried.

# %%
#| export practice
"""What a run of reinforcement learning is made of: its settings, the policy that practises, the journal of it."""


import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from nanochat_lib.checkpoint import load_model, load_optimizer, prepare_directory
from nanochat_lib.common import MetricsLog, NanochatError, Runtime, check_least, gather, print0
from nanochat_lib.engine import Engine
from nanochat_lib.objectives import ALGORITHMS, CLIPS, Terms, kl_to_reference
from nanochat_lib.rewards import parse_reward
from nanochat_lib.rl import (Question, Tries, learn, readable, roll_out, row_logprobs, statistics, token_weights,
                             tries_of)
from nanochat_lib.tasks import Task
from nanochat_lib.tasks.evaluate import pass_at_k
from nanochat_lib.training import check_loss, set_rates, trim_metrics

EVAL_SAMPLES = 8  # answers per question of an evaluation: pass@1 … pass@8

# %%
#| export practice
@dataclass
class ChatRL:
    """Settings of reinforcement learning."""

    run: str = "dummy"
    """name at Weights & Biases; dummy: none"""
    device_type: str = ""
    model_tag: str = ""
    """the SFT model to start from; the deepest without it"""
    model_step: int = -1
    task: str = "gsm8k"
    """what to practise: gsm8k, world (word problems), spelling (letters counted, words spelled), any other task with a
    reward, several joined by |, or module:Class"""
    task_data: str = ""
    """a folder with the task's files, read instead of the hub"""
    reward: str = "answer=1"
    """what is paid, a sum with weights: answer, format, length, or module:function"""
    zero_cut: int = 1
    """1: an answer cut off by max-new-tokens earns nothing"""
    algorithm: Literal["reinforce", "rloo", "grpo", "dapo", "dr_grpo"] = "reinforce"
    kl: float = 0.0
    """weight of the KL term that holds the policy near the SFT model; above 0 a second copy of the model is kept"""
    clip_low: float = -1
    """how far below 1 a ratio is still pushed; -1: as in the algorithm's paper"""
    clip_high: float = -1
    inner_epochs: int = 1
    """updates from the answers of one step; more than 1 is for the algorithms with a clipped ratio"""
    num_epochs: int = 1
    """passes over the task's training questions"""
    num_iterations: int = -1
    """steps; -1: as many as the passes have"""
    device_batch_size: int = 8
    """sequences of full length in one forward and backward pass; of shorter ones more"""
    examples_per_step: int = 16
    """questions per step, over all processes"""
    num_samples: int = 16
    """answers tried per question"""
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 50
    embedding_lr: float = 0.2
    unembedding_lr: float = 0.004
    matrix_lr: float = 0.02
    weight_decay: float = 0.0
    init_lr_frac: float = 0.05
    """all rates start at so much of the above and fall to 0 in a straight line"""
    eval_every: int = 60
    """steps between evaluations on the test questions; -1: never"""
    eval_examples: int = 400
    save_every: int = 60
    """steps between checkpoints; -1: only at the end"""
    patience: int = 10
    """stop when this many steps in a row look like a collapse; -1: never"""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """go on from this model's newest RL checkpoint, if there is one"""

# %%
#| export practice
def check_settings(settings: ChatRL) -> None:
    check_least(settings, num_epochs=1, device_batch_size=1, examples_per_step=1, max_new_tokens=1, eval_examples=1,
                inner_epochs=1)
    if settings.num_samples < 2:
        raise NanochatError("--num-samples 1 has nothing to compare an answer with: give at least 2")
    if settings.temperature <= 0:
        raise NanochatError(f"--temperature {settings.temperature} tries the same answer every time: give more than 0")
    if settings.inner_epochs > 1 and settings.algorithm not in CLIPS:
        raise NanochatError(f"--inner-epochs {settings.inner_epochs}: {settings.algorithm} is right for fresh answers "
                            f"only; give 1, or --algorithm {', '.join(CLIPS)}")
    if settings.kl < 0:
        raise NanochatError(f"--kl {settings.kl} would drive the policy away from the SFT model: give 0 or more")


def clips_of(settings: ChatRL) -> tuple[float, float]:
    """(low, high): those given, else the paper's."""
    return tuple(own if given < 0 else given for own, given in
                 zip(CLIPS.get(settings.algorithm, (0.0, 0.0)), (settings.clip_low, settings.clip_high)))

# %% [markdown]
# A run has three parts: a policy that tries and learns, a journal that writes down, and a loop that knows when.

# %%
#| export practice
class Policy:
    """The model that practises, from the SFT checkpoint or, going on, from its own; tries answers, learns from them."""

    def __init__(self, settings: ChatRL, runtime: Runtime, source: dict, directory: Path, step: int):
        self.settings, self.runtime, self.directory, self.source = settings, runtime, directory, source
        self.reward = parse_reward(settings.reward, bool(settings.zero_cut))
        tag = source["model_tag"]
        found = ("rl", tag, step) if step else ("sft", tag, source["step"])
        self.model, self.tokenizer, self.meta = load_model(found[0], runtime.device, "train", *found[1:])
        print0(f"{'going on' if step else 'starting'} from {found[0]} model {tag}, step {found[2]}")
        self.reference = load_model("sft", runtime.device, "eval", tag, source["step"])[0] if settings.kl else None
        self.engine = Engine(self.model, self.tokenizer)
        self.optimizer = self.model.setup_optimizer(settings.unembedding_lr, settings.embedding_lr, settings.matrix_lr,
                                                    settings.weight_decay)
        if step:
            load_optimizer(directory, step, self.optimizer)
        self.most = settings.device_batch_size * self.model.config.sequence_len

    def try_answers(self, task: Task, numbers: list[int], samples: int, seed: int) -> list[Question]:
        """This rank's share of some questions, with sampled answers."""
        mine = numbers[self.runtime.rank::self.runtime.world_size]
        settings = self.settings
        self.model.eval()
        questions = roll_out(self.engine, task, mine, self.reward, num_samples=samples, seed=seed,
                             max_tokens=settings.max_new_tokens, temperature=settings.temperature,
                             top_k=settings.top_k or None)
        self.model.train()
        return questions

    def sums(self, questions: list[Question]) -> dict[str, float]:
        """`statistics` of all ranks' questions."""
        parts = gather(statistics(questions, self.engine.python_start, self.engine.output_start))
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: sum(part.get(name, 0) for part in parts) for name in names}

    def learn(self, questions: list[Question], sums: dict[str, float], rate: float, step: int) -> dict[str, float]:
        """Update the weights from all ranks' questions, inner_epochs times; what it did, for the log."""
        settings = self.settings
        if not settings.kl and sums["all_right"] + sums["all_wrong"] == sums["questions"]:
            return {"loss": 0.0, "rows": 0}  # nothing to learn; Muon would step on old momentum alone
        tries = tries_of(questions, keep_decided=settings.kl > 0)
        terms = Terms(*clips_of(settings), sums["trained"], sums["answers"], settings.max_new_tokens)
        reference = None
        if tries and settings.kl:
            reference = row_logprobs(self.reference, tries.rows, self.most, settings.temperature)
        loss, old = 0.0, None
        for _ in range(settings.inner_epochs):
            if tries:
                loss, logp = self.descend(tries, terms, old, reference)
                old = logp if old is None else old
            check_loss(loss, step, self.optimizer, self.directory)
            set_rates(self.optimizer, rate)
            self.optimizer.step()
            self.model.zero_grad(set_to_none=True)
        return {"loss": loss, "rows": len(tries.rows) if tries else 0,
                **({"kl": self.distance(tries, old, reference, terms)} if settings.kl else {})}

    def descend(self, tries: Tries, terms: Terms, old: torch.Tensor | None,
                reference: torch.Tensor | None) -> tuple[float, torch.Tensor]:
        """Add the gradient; returns the loss and what the model says now (rows, T − 1). `old`: None if it is the same."""
        settings, now = self.settings, torch.zeros_like(tries.mask)

        def weights(places: list[int], logp: torch.Tensor) -> torch.Tensor:
            now[places, :logp.size(1)] = logp
            return token_weights(ALGORITHMS[settings.algorithm], tries, terms, now, now if old is None else old,
                                 reference, settings.kl)[places]

        loss = learn(self.model, tries.rows, weights, self.most, self.runtime.world_size, settings.temperature)
        return loss, now

    def distance(self, tries: Tries | None, logp: torch.Tensor, reference: torch.Tensor,
                 terms: Terms) -> float:
        """KL divergence from the SFT model before the update, nats per token, over all ranks."""
        mine = 0.0
        if tries:
            tables = [table[tries.place] for table in (logp, logp, reference)]
            mine = kl_to_reference(*tables, tries.rewards, tries.mask[tries.place], terms).item()
        return sum(gather(mine))

# %%
#| export practice
class Journal:
    """What a run leaves for its readers: metrics.jsonl, rollouts.jsonl with every answer, and the curves."""

    def __init__(self, settings: ChatRL, runtime: Runtime, directory: Path, step: int, loop: dict[str, list]):
        prepare_directory(directory, runtime, step or -1)
        self.runtime, self.rollouts = runtime, directory / "rollouts.jsonl"
        self.history, self.evaluations = loop.get("history", []), loop.get("evaluations", [])
        if runtime.is_main:
            for path in (self.rollouts, directory / "metrics.jsonl"):
                trim_metrics(path, step or -1)  # what an interrupted run wrote after its last checkpoint
        self.metrics = MetricsLog(directory / "metrics.jsonl", settings.run, asdict(settings))

    @property
    def curve(self) -> list[float]:
        """The mean reward of every step."""
        return [step["reward"] for step in self.history]

    def note(self, step: int, questions: list[Question], sums: dict[str, float], more: dict[str, Any]) -> None:
        """Write down a step: one line of metrics.jsonl, one line of rollouts.jsonl per question."""
        lines = gather([readable(step, question) for question in questions])
        if self.runtime.is_main:
            with open(self.rollouts, "a", encoding="utf-8") as file:
                for part in lines:
                    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in part)
        parts = [name for name in sums if name.startswith("reward_")]
        per_answer = ("reward", *parts, "length", "cut", "tool_use", "tool_right")
        found = {name: sums[name] / sums["answers"] for name in per_answer}
        found["entropy"] = sums["surprise"] / max(sums["sampled"], 1)  # nats per token, estimated by the tokens drawn
        found |= {name: sums[name] for name in ("questions", "all_right", "all_wrong")}
        self.history.append({name: found[name] for name in ("reward", "entropy", "cut", "questions", "all_right")})
        self.metrics.log(step=step, **found, **more)

    def note_evaluation(self, step: int, steps: int, right: list[int]) -> None:
        """pass@1 … pass@8 from how many of eight answers to each test question were right."""
        curve = [sum(pass_at_k(EVAL_SAMPLES, n, k) for n in right) / len(right) for k in range(1, EVAL_SAMPLES + 1)]
        self.evaluations.append({"step": step, "pass_at_k": curve})
        self.metrics.log(step=step, pass_at_k=curve)
        print0(f"step {step:5}/{steps}: pass@1 {curve[0]:.3f}, pass@{EVAL_SAMPLES} {curve[-1]:.3f} "
               f"on {len(right)} test questions")

# %%
#| export scripts/chat_rl
"""Reinforcement learning of a chat model: try answers, reward the right ones. Alone, or under torchrun."""


import time
from dataclasses import asdict

from nanochat_lib.checkpoint import checkpoint_directory, find_checkpoint, steps_in, write_result
from nanochat_lib.common import NanochatError, Runtime, gather, print0, progress, run_cli, start
from nanochat_lib.practice import EVAL_SAMPLES, ChatRL, Journal, Policy, check_settings
from nanochat_lib.rl import collapsed, questions_of_step
from nanochat_lib.saver import Saver
from nanochat_lib.tasks import Task, get_task

SEED = 42
PRACTICE = {"spelling": "letter_counting|spelling"}  # what a task's name stands for here

# %%
#| export scripts/chat_rl
def is_right(task: Task, conversation: dict, text: str) -> bool:
    """The task's own judgement; of a task that is only rewarded, whether the answer earns anything."""
    try:
        return bool(task.evaluate(conversation, text))
    except (AttributeError, NotImplementedError):
        return task.reward(conversation, text) > 0

# %%
#| export scripts/chat_rl
class Run:
    """A run of reinforcement learning at some step."""

    def __init__(self, settings: ChatRL, runtime: Runtime):
        self.settings = settings
        folder, step = find_checkpoint("sft", settings.model_tag or None, settings.model_step)
        self.directory = checkpoint_directory("rl", folder.name)
        self.task = self.questions("train")
        if not len(self.task):
            raise NanochatError(f"task {settings.task} has no training questions: name another one with --task")
        self.steps = settings.num_iterations
        if self.steps < 0:
            self.steps = max(1, settings.num_epochs * len(self.task) // settings.examples_per_step)
        saved = steps_in(self.directory)
        self.step = saved[-1] if settings.resume and saved else 0
        source = {"stage": "sft", "model_tag": folder.name, "step": step}
        self.policy = Policy(settings, runtime, source, self.directory, self.step)
        earlier = self.policy.meta if self.step else {}
        self.policy.source = earlier.get("source", source)
        self.saver = Saver(self.directory, self.policy.model, self.policy.optimizer, runtime)
        self.journal = Journal(settings, runtime, self.directory, self.step, earlier.get("loop", {}))

    def questions(self, split: str) -> Task:
        return get_task(PRACTICE.get(self.settings.task, self.settings.task), split, self.settings.task_data)

    def train_step(self) -> float:
        """One step: answers, rewards, gradient, update; returns the mean reward."""
        settings, began = self.settings, time.perf_counter()
        numbers = questions_of_step(self.step, settings.examples_per_step, len(self.task), SEED)
        questions = self.policy.try_answers(self.task, numbers, settings.num_samples, SEED + self.step)
        sums, rolled = self.policy.sums(questions), time.perf_counter()
        rate = settings.init_lr_frac * (1 - self.step / self.steps)
        self.saver.before_step()
        done = self.policy.learn(questions, sums, rate, self.step)
        seconds = dict(rollout_seconds=round(rolled - began, 3), train_seconds=round(time.perf_counter() - rolled, 3))
        self.journal.note(self.step, questions, sums, {**done, "lr": rate, **seconds})
        self.step += 1
        return self.journal.curve[-1]

    def evaluate(self) -> None:
        """pass@1 … pass@8 on the test questions."""
        task = self.questions("test")[:self.settings.eval_examples]
        tried = gather(self.policy.try_answers(task, list(range(len(task))), EVAL_SAMPLES, SEED))
        right = [sum(is_right(task, q.conversation, text) for text in q.texts) for part in tried for q in part]
        self.journal.note_evaluation(self.step, self.steps, right)

    def save(self) -> None:
        if self.step in steps_in(self.directory):
            return  # resumed here
        policy = self.policy
        meta = {"tokenizer": policy.tokenizer.fingerprint, "settings": asdict(self.settings), "source": policy.source,
                "loop": {"history": list(self.journal.history), "evaluations": list(self.journal.evaluations)}}
        self.saver.save(self.step, meta)

    def stop_if_collapsed(self) -> None:
        """NanochatError with the reason; checkpoints written before stay."""
        if reason := collapsed(self.journal.history, self.settings.patience):
            self.saver.wait()
            saved = steps_in(self.directory)
            last = f"the last checkpoint is step {saved[-1]}" if saved else "no checkpoint was written yet"
            raise NanochatError(f"stopped at step {self.step}: {reason}. Read {self.journal.rollouts}; {last}. "
                                "Try a lower --init-lr-frac, or hold the model with --kl 0.05")

    def report(self) -> None:
        """What the run measured: the reward of its first and last steps (up to five), and of every step."""
        curve = self.journal.curve
        few = min(5, len(curve))
        first, last = (sum(part) / max(few, 1) for part in (curve[:few], curve[len(curve) - few:]))
        write_result("rl", reward_start=first, reward=last, steps=self.steps, curve=curve, task=self.settings.task,
                     evaluations=self.journal.evaluations, algorithm=self.settings.algorithm)

# %%
#| export scripts/chat_rl
#| cli chat_rl
def train(run: Run) -> None:
    """Save, evaluate, step; to the end."""
    settings = run.settings
    with run.saver, progress(total=run.steps, desc="chat_rl", initial=run.step) as bar:
        while True:
            last = run.step >= run.steps
            if last or settings.save_every > 0 and run.step > 0 and run.step % settings.save_every == 0:
                run.save()
            due = settings.eval_every > 0 and (last or run.step % settings.eval_every == 0)
            if due and run.step not in [evaluation["step"] for evaluation in run.journal.evaluations]:
                try:
                    run.evaluate()
                except NanochatError as error:
                    print0(f"step {run.step}: the evaluation could not run, training is not affected: {error}")
            if last:
                return
            reward = run.train_step()
            bar.set_postfix_str(f"reward {reward:.3f}", refresh=False)
            bar.update()
            run.stop_if_collapsed()


def chat_rl(settings: ChatRL) -> None:
    """Reinforcement learning of a chat model on a task whose answers can be judged."""
    check_settings(settings)
    run = Run(settings, start(settings.device_type))
    train(run)
    run.journal.metrics.close()
    run.report()
    curve = run.journal.curve
    if not any(curve):
        print0("no answer ever earned anything, so there was nothing to learn from: fine-tune longer first, or "
               "practise an easier task")
    print0(f"reward by step: {' '.join(f'{reward:.2f}' for reward in curve)}: {run.directory}")

# %% [markdown]
# ```
# python -m nanochat_lib.scripts.chat_rl --task=world --init-lr-frac=0.1 --max-new-tokens=96
# python -m nanochat_lib.scripts.chat_rl --task=spelling --num-iterations=60 --max-new-tokens=64
# python -m nanochat_lib.scripts.chat_rl --task="world|letter_counting|spelling" --algorithm=dapo --inner-epochs=2
# python -m nanochat_lib.scripts.chat_rl --task=my_tasks:Riddles --reward=answer=1,length=0.1 --kl=0.02
# torchrun --nproc-per-node=8 -m nanochat_lib.scripts.chat_rl
# ```
#
# ## Is it fast?
#
# Two claims of these lessons, measured by one command on your machine: a step in one batch against one question after
# the other, eight answers at a time and each answer with its own row; and packing by length against looking at every
# waiting conversation (lesson 09).

# %%
#| export scripts/chat_bench
"""How fast chat training is: a step of RL in one batch against question by question, packing against linear search.

    python -m nanochat_lib.scripts.chat_bench                  # random weights
    python -m nanochat_lib.scripts.chat_bench --source sft     # a trained model
"""


import random
from dataclasses import dataclass

import torch

from nanochat_lib.checkpoint import load_model
from nanochat_lib.common import NanochatError, pick_device, print0, run_cli
from nanochat_lib.dataloader import BestFit
from nanochat_lib.engine import Engine
from nanochat_lib.gpt import GPTConfig, build_model
from nanochat_lib.objectives import Terms, reinforce
from nanochat_lib.rewards import Reward
from nanochat_lib.rl import learn, roll_out, token_weights, tries_of
from nanochat_lib.scripts.train_bench import Linear, turns_of
from nanochat_lib.tasks.common import Task, conversation_of
from nanochat_lib.tokenizer import Tokenizer


@dataclass
class ChatBench:
    """What to measure."""

    source: str = ""
    """sft or rl: a checkpoint; without it random weights of the laptop's size"""
    questions: int = 16
    samples: int = 16
    max_new_tokens: int = 32
    repeats: int = 3
    """rounds; each runs every contestant, and medians are shown"""
    device_type: str = ""

# %%
#| export scripts/chat_bench
class Additions(Task):
    """Sums to be tried; the reward is a coin, so that no question is decided and all rows are learned from."""

    def conversation(self, row: tuple[int, int]) -> dict:
        return conversation_of(f"Anna has {row[0]} apples and finds {row[1]} more. How many has she now?", "0")

    def reward(self, conversation: dict, answer: str) -> float:
        return float(sum(map(ord, answer)) % 2)


def rl_step(engine: Engine, task: Task, settings: ChatBench, one_by_one: bool) -> None:
    """Answers and gradients of one step, all at once or a question at a time, eight rows each."""
    count, tokens = settings.samples, settings.max_new_tokens
    parts = [[number] for number in range(settings.questions)] if one_by_one else [list(range(settings.questions))]
    most = 8 * engine.model.config.sequence_len
    for numbers in parts:
        groups = [8] * (count // 8) + [count % 8] * (count % 8 > 0) if one_by_one else [count]
        for seed, group in enumerate(groups):
            engine.model.eval()
            asked = roll_out(engine, task, numbers, Reward(zero_cut=False), num_samples=group, max_tokens=tokens,
                             seed=seed)
            engine.model.train()
            if tries := tries_of(asked, keep_decided=True):
                table = tries.mask * 0
                weights = token_weights(reinforce, tries, Terms(tokens=1000.0), table, table)
                learn(engine.model, tries.rows, weights, most)
    engine.model.zero_grad(set_to_none=True)


def bench_rl(settings: ChatBench) -> float:
    """How many times faster a step in one batch is."""
    device = pick_device(settings.device_type)
    if settings.source:
        model, tokenizer, _ = load_model(settings.source, device, "train")
    else:
        torch.manual_seed(0)
        tokenizer = Tokenizer([bytes([byte]) for byte in range(256)])
        model = build_model(GPTConfig(256, tokenizer.get_vocab_size(), 4, 2, 2, 128), device)
    engine, task = Engine(model, tokenizer), Additions([(i, i + 3) for i in range(settings.questions)])
    seconds = turns_of({name: lambda slow=slow: rl_step(engine, task, settings, slow)
                       for name, slow in (("one batch", False), ("one by one", True))}, settings.repeats)
    ratio = seconds["one by one"] / seconds["one batch"]
    print0(f"RL step of {settings.questions} × {settings.samples} answers: {seconds['one batch']:.2f} s in one batch, "
           f"{seconds['one by one']:.2f} s question by question: {ratio:.1f}×")
    return ratio

# %%
#| export scripts/chat_bench
def packed(lengths: list[range], capacity: int, waiting: int, buffer: BestFit | Linear) -> list[list[int]]:
    """Rows of conversations, given as ranges of their lengths, with so many waiting in the buffer."""
    rest, rows, room = iter(lengths), [[]], capacity
    while True:
        while len(buffer) < waiting and (one := next(rest, None)) is not None:
            buffer.add(one)
        if not len(buffer):
            return rows
        found = buffer.take(room, crop=False)
        if found is None:
            rows.append([])
            room = capacity
        else:
            rows[-1].append(found.start)
            room -= len(found)


def bench_packing(settings: ChatBench) -> dict[int, float]:
    """{conversations waiting: how many times faster they are packed than by a linear search}; the rows are equal."""
    dice, ratios = random.Random(0), {}
    lengths = [range(i, i + min(int(dice.expovariate(1 / 60)) + 8, 257)) for i in range(0, 4000)]
    for waiting in (100, 1000):
        rows = [packed(lengths, 257, waiting, make()) for make in (BestFit, Linear)]
        if rows[0] != rows[1]:
            raise NanochatError("the loader packs other rows than a linear search: please report this")
        seconds = turns_of({make.__name__: lambda make=make: packed(lengths, 257, waiting, make())
                            for make in (BestFit, Linear)}, settings.repeats)
        ratios[waiting] = seconds["Linear"] / seconds["BestFit"]
        fast, slow = (f"{len(rows[0]) / seconds[name]:,.0f}" for name in ("BestFit", "Linear"))
        print0(f"packing with {waiting} waiting: {fast} rows/s, {slow} by linear search: {ratios[waiting]:.1f}×")
    return ratios

# %%
#| export scripts/chat_bench
#| cli chat_bench
def chat_bench(settings: ChatBench) -> None:
    """Print what packing and one batch for a whole step are worth on this machine."""
    bench_packing(settings)
    bench_rl(settings)

# %% [markdown]
# ## What your own run did
#
# Every step of `chat_rl` leaves its numbers in `metrics.jsonl` and its answers in `rollouts.jsonl`. Here are those of
# the run under your base directory. (The tour's model is too small to be right even once, and so it learns nothing;
# the laptop preset's is not.)

# %%
# NBVAL_IGNORE_OUTPUT
from nanochat_lib.course.models import ready

ready("rl")
folder, _ = find_checkpoint("rl")
events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
steps = [event for event in events if "reward" in event]
figure, axes = plt.subplots(1, 4, figsize=(12, 2.4), layout="constrained")
for ax, (name, label) in zip(axes, {"reward": "mean reward", "entropy": "entropy (nats per token)",
                                    "length": "tokens of an answer", "tool_use": "answers with a call"}.items()):
    ax.plot([event["step"] for event in steps], [event[name] for event in steps])
    ax.set(xlabel="step", ylabel=label)
if curves := [event for event in events if "pass_at_k" in event]:
    figure, ax = plt.subplots(figsize=(4, 2.4), layout="constrained")
    for event in (curves[0], curves[-1]):
        ax.plot(range(1, 9), event["pass_at_k"], marker="o", label=f"step {event['step']}")
    ax.set(xlabel="k", ylabel="pass@k, test questions")
    ax.legend()

# %% [markdown]
# And the answers: choose a step and one of its questions, those first that were decided neither way.

# %%
# NBVAL_IGNORE_OUTPUT
import html

from IPython.display import HTML

by_step = {}
for line in (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines():
    by_step.setdefault(json.loads(line)["step"], []).append(json.loads(line))


def page(step, number):
    """One question of a step with its different answers as HTML, the frequent ones first, coloured by advantage."""
    questions = sorted(by_step[step], key=lambda line: abs(line["mean_reward"] - 0.5))
    line, rows = questions[number % len(questions)], []
    for answer in line["answers"]:
        shade = "#{:02x}{:02x}{:02x}".format(*plt.cm.RdYlGn(0.5 + answer["advantage"] / 2, bytes=True)[:3])
        text = html.escape(answer["text"]).replace("\n", "<br>")
        rows.append(f"<tr><td>{answer['count']} ×</td><td>{answer['reward']:.2f}</td><td style='background:{shade};"
                    f"color:#222;text-align:left'>{text}</td></tr>")
    asked = html.escape(line["question"])
    return HTML(f"<b>{asked}</b><table><tr><th></th><th>reward</th><th>answer</th></tr>{''.join(rows)}</table>")


display(page(min(by_step), 0), page(max(by_step), 0))
_ = ipywidgets.interact(page, step=ipywidgets.SelectionSlider(options=sorted(by_step)), number=(0, 15))

# %% [markdown]
# ## Exercises
#
# In [10_rl](../exercises/10_rl.ipynb):
# 1. `group_advantages`: better or worse than one's siblings.
# 2. `policy_gradient_loss`: the whole of REINFORCE in two lines.
# 3. `pass_at_k`: the chance that one of k tries is right, without bias.
# 4. `careful_reward`: a reward of your own, which the check tries to cheat.
# 5. Explore: what is the best constant baseline?
#
# **Next:** [11 · The full run](11_full_run.ipynb)
