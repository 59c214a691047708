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
# *How does it get better than its teachers?* — 35 minutes, less than one of them computing.
#
# A model that imitates can at best become as good as what it imitates. But for many questions an answer is easy to
# judge even where it is hard to give: the number after `####` is right or wrong. So let the model try, see which
# tries were right, and make those more likely. The trouble is that "right" has no derivative. This lesson gets a
# gradient from it all the same.

# %%
#| default_exp rl

# %%
#| export
"""Reinforcement learning from right and wrong: sampled answers, their rewards, and the gradient made of them."""

# %%
#| export
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from nanochat_lib.engine import Completion, Engine
from nanochat_lib.gpt import GPT, softcap
from nanochat_lib.tasks.common import Task

# %%
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
# out much of the noise. The mean of a group of answers to the same question is a good one, and costs nothing.

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
# An answer of a language model is a chain of choices, its log-probability the sum over its tokens. So the loss is a
# cross entropy with a weight, the *advantage*, that may be negative. What the model did not choose has no part in it:
# the prompt, and what the calculator put into the stream. All tokens of a step count the same, long answer or short.
#
# No KL term, no clipping, no division by the standard deviation: with one update per batch of fresh answers, none is
# needed.

# %%
#| export
def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards of a question's answers (…, samples) minus their mean: what an answer earned above its siblings."""
    return rewards - rewards.mean(dim=-1, keepdim=True)


def policy_gradient_loss(logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
                         tokens: float | None = None) -> torch.Tensor:
    """REINFORCE (Williams, 1992): −Σ advantage · logp over the trained tokens, divided by their number.

    logp (B, T) of the tokens that were taken, advantages (B,), mask (B, T) 1 where a token was the policy's own choice.
    `tokens` is the divisor when these rows are a part of a larger batch; by default mask.sum().
    """
    total = (logp * mask * advantages[:, None]).sum()
    return -total / (mask.sum().clamp_min(1) if tokens is None else max(tokens, 1))

# %%
logp = torch.randn(4, 5, requires_grad=True)
mask = torch.tensor([[1, 1, 0, 0, 1]] * 4)  # two tokens in the middle came from a tool
policy_gradient_loss(logp, group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0])), mask).backward()
print(logp.grad.mul(24).int().tolist())  # in units of 1/24: the loss falls where an advantage is positive

# %% [markdown]
# ## Trying
#
# A step takes some questions and tries every one several times, all in one batch of the engine (lesson 08). Which
# questions a step gets follows from its number alone, so that a resumed run goes on as if nothing had happened.

# %%
#| export
@dataclass(frozen=True)
class Question:
    """One question of a step, and the answers that were tried."""

    number: int  # in its task
    prompt: list[int]
    conversation: dict
    answers: list[Completion]
    texts: list[str]
    rewards: list[float]

    @property
    def advantages(self) -> list[float]:
        return group_advantages(torch.tensor(self.rewards, dtype=torch.float64)).tolist()

    @property
    def decided(self) -> bool:
        """All answers earned the same: nothing to learn from the difference."""
        return len(set(self.rewards)) < 2


def questions_of_step(step: int, per_step: int, size: int, seed: int = 42) -> list[int]:
    """Numbers of the questions of a step: pass after pass over a task of `size`, each in its own order.

    Any step can be asked for alone, so that a resumed run goes on with the questions it would have had.
    """
    places = range(step * per_step, (step + 1) * per_step)
    order = {epoch: random.Random(f"{seed} {epoch}").sample(range(size), size) for epoch in {p // size for p in places}}
    return [order[place // size][place % size] for place in places]


def roll_out(engine: Engine, task: Task, numbers: list[int], **sampling: Any) -> list[Question]:
    """Answer these questions of a task, all in one batch; `sampling` goes to Engine.generate_many."""
    conversations = [task[number] for number in numbers]
    prompts = [engine.tokenizer.render_for_completion(conversation) for conversation in conversations]
    questions = []
    for number, conversation, prompt, answers in zip(numbers, conversations, prompts,
                                                     engine.generate_many(prompts, **sampling)):
        texts = [engine.tokenizer.decode(answer.tokens) for answer in answers]
        rewards = [float(task.reward(conversation, text)) for text in texts]
        questions.append(Question(number, prompt, conversation, answers, texts, rewards))
    return questions

# %% [markdown]
# ## Learning from what was tried
#
# If all answers to a question are right, or all wrong, every advantage is zero: such questions carry no gradient, and
# we skip their forward and backward pass. Equal answers are common in small groups: they become one row with the sum
# of their advantages. Both change the work, not the result.

# %%
#| export
@dataclass(frozen=True)
class Row:
    """A sequence to learn from: mask 1 on the tokens the policy chose, and what the choice was worth."""

    tokens: tuple[int, ...]
    mask: tuple[int, ...]
    advantage: float


def chosen(answer: Completion) -> tuple[list[int], list[int]]:
    """(tokens, mask) of an answer with the token that ended it, which was a choice too."""
    end = [] if answer.stop_token is None else [answer.stop_token]
    return answer.tokens + end, answer.mask + [1] * len(end)


def rows_of(questions: list[Question]) -> list[Row]:
    """The rows that carry a gradient. Equal answers to a question become one row, their advantages added up."""
    rows = []
    for question in questions:
        if question.decided:
            continue
        worth, masks = Counter(), {}
        for answer, advantage in zip(question.answers, question.advantages):
            tokens, mask = chosen(answer)
            worth[tuple(tokens)] += advantage
            masks[tuple(tokens)] = mask
        prompt = tuple(question.prompt)
        rows += [Row(prompt + tokens, (0,) * len(prompt) + tuple(masks[tokens]), advantage)
                 for tokens, advantage in worth.items()]
    return rows


def micro_batches(rows: list[Row], most: int) -> list[list[Row]]:
    """Rows of like length together, each batch at most `most` tokens with padding (a longer row goes alone)."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.tokens)):
        if batches and (len(batches[-1]) + 1) * len(row.tokens) <= most:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def tensors_of(rows: list[Row], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, mask (B, longest), advantages (B,)) of a batch, padded on the right."""
    longest = max(len(row.tokens) for row in rows)
    padding = [(0,) * (longest - len(row.tokens)) for row in rows]
    tokens, mask = (torch.tensor([part + pad for part, pad in zip(parts, padding)], device=device)
                    for parts in ([row.tokens for row in rows], [row.mask for row in rows]))
    return tokens, mask, torch.tensor([row.advantage for row in rows], dtype=torch.float32, device=device)

# %%
#| export
def token_logprobs(model: GPT, tokens: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log p of every token after the first, given those before it (B, T) → (B, T−1); 0 where mask (B, T) is 0.

    Logits are computed only where they are needed: of a 32K vocabulary they are the largest tensor of all.
    """
    trained = mask[:, 1:].bool()
    x = model.hidden(tokens[:, :-1])[trained]  # (N, C)
    logits = softcap(model.lm_head(x)[:, :model.config.vocab_size]) / temperature
    logp = logits.gather(-1, tokens[:, 1:][trained][:, None])[:, 0] - logits.logsumexp(dim=-1)
    return torch.zeros(trained.shape, device=logp.device).masked_scatter(trained, logp)


def learn(model: GPT, rows: list[Row], tokens: float, most: int, scale: float = 1.0, temperature: float = 1.0) -> float:
    """Add the gradient of the policy-gradient loss of all rows, micro-batch by micro-batch; returns the loss.

    `tokens` divides the sum; `most` bounds a micro-batch; `scale` multiplies the gradient.
    """
    device, loss = next(model.parameters()).device, 0.0
    for batch in micro_batches(rows, most):
        sequences, mask, advantages = tensors_of(batch, device)
        logp = token_logprobs(model, sequences, mask, temperature)
        part = policy_gradient_loss(logp, advantages, mask[:, 1:], tokens)
        (part * scale).backward()
        loss += part.item()
    return loss

# %% [markdown]
# What to watch: reward, of course; entropy, which falls as the policy makes up its mind, and at zero nothing new is
# tried; length; tool use; and the answers themselves, since a reward is often earned in ways nobody meant.

# %%
#| export
def statistics(questions: list[Question], tool: int) -> dict[str, float]:
    """Sums over a rank's questions, to be added up over ranks and divided; `tool` is the token that opens a call."""
    answers = [answer for question in questions for answer in question.answers]
    return {
        "questions": len(questions),
        "answers": len(answers),
        "reward": sum(sum(question.rewards) for question in questions),
        "all_right": sum(question.decided and question.rewards[0] > 0 for question in questions),
        "all_wrong": sum(question.decided and question.rewards[0] <= 0 for question in questions),
        "length": sum(len(answer.tokens) for answer in answers),
        "cut": sum(answer.stop_token is None for answer in answers),
        "tool_use": sum(tool in answer.tokens for answer in answers),
        "surprise": -sum(sum(answer.logprobs) for answer in answers),  # of sampled tokens; forced ones count 0
        "sampled": sum(sum(answer.mask) for answer in answers),
        "trained": sum(sum(chosen(answer)[1]) for answer in answers),
    }


def readable(step: int, question: Question) -> dict[str, Any]:
    """One line of rollouts.jsonl: the question and each different answer, most frequent first."""
    counts = Counter(zip(question.texts, question.rewards, question.advantages))
    return {"step": step, "number": question.number, "question": question.conversation["messages"][-2]["content"],
            "mean_reward": sum(question.rewards) / len(question.rewards),
            "answers": [{"count": count, "reward": reward, "advantage": round(advantage, 4), "text": text}
                        for (text, reward, advantage), count in counts.most_common()]}

# %% [markdown]
# ## Better than the teachers
#
# All of it on a task small enough for this page: sums of two digits, taught by teachers who err in four sums of ten.
# A small GPT first imitates them, as in lesson 09.

# %%
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


task, dice = Sums(), random.Random(0)
tokenizer = Tokenizer.train_from_iterator(iter(["1+2"] * 9), 265)
torch.manual_seed(0)
policy = build_model(GPTConfig(sequence_len=16, vocab_size=265, n_layer=2, n_head=2, n_kv_head=2, n_embd=64), "cpu")
optimizer = policy.setup_optimizer(unembedding_lr=0.004, embedding_lr=0.1, scalar_lr=0.1)
STEPS = 120
for step in range(STEPS):
    pairs = [tokenizer.render_conversation(task.taught(number, dice)) for number in dice.choices(range(36), k=64)]
    rows = [Row(tuple(ids), tuple(mask), 1.0) for ids, mask in pairs]  # imitation: the same loss, every advantage 1
    learn(policy, rows, sum(sum(row.mask) for row in rows), most=4096)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * min(1, 2 * (1 - step / STEPS))
    optimizer.step()
    optimizer.zero_grad()

# %% [markdown]
# Now it practises: all 36 questions each step, 16 tries each, told only which were right.

# %%
engine, rewards, kept = Engine(policy, tokenizer), [], {}
optimizer = policy.setup_optimizer(unembedding_lr=0.002, embedding_lr=0.02, matrix_lr=0.03, scalar_lr=0.005)
STEPS = 25
for step in range(STEPS + 1):
    questions = roll_out(engine, task, questions_of_step(step, 36, 36), num_samples=16, max_tokens=4, seed=step)
    sums = statistics(questions, engine.python_start)
    rewards.append(sums["reward"] / sums["answers"])
    if step in (0, 8, STEPS):
        [kept[step]] = roll_out(engine, task, [29], num_samples=16, max_tokens=4, seed=0)  # 4 + 5
    learn(policy, rows_of(questions), sums["trained"], most=4096)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (1 - step / STEPS)
    optimizer.step()
    optimizer.zero_grad()

figure, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
ax.plot(rewards, label="the model")
ax.axhline(0.6, color="0.5", linestyle="--", label="its teachers")
ax.set(xlabel="step of reinforcement learning", ylabel="part of right answers", ylim=(0, 1.02))
ax.legend()
assert rewards[0] < 0.72 and sum(rewards[-3:]) / 3 > 0.76

# %% [markdown]
# It began as good as its teachers and left them behind. Nothing told it a right answer; it had to say it first, if
# only one time in ten. What a model never says cannot be reinforced, which is why chat models are taught before they
# practise.
#
# Sixteen tries at 4+5 before, during and after, each with its advantage:

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 1.9), layout="constrained")
for ax, (step, question) in zip(axes, kept.items()):
    for place, (text, advantage) in enumerate(sorted(zip(question.texts, question.advantages))):
        box = dict(facecolor=plt.cm.RdYlGn(0.5 + advantage / 2), edgecolor="none")
        ax.text(place % 8, 1 - place // 8, text, ha="center", va="center", bbox=box)
    ax.set(xlim=(-0.7, 7.7), ylim=(-0.6, 1.6), title=f"step {step}: mean reward {sum(question.rewards) / 16:.2f}")
    ax.axis("off")

# %% [markdown]
# ## The command
#
# `chat_rl` is this loop with settings, evaluation and checkpoints. It starts from the chat model of lesson 09 and
# practises GSM8K, or the world's word problems. Rates are a twentieth of pretraining's: the model is to be nudged,
# not taught anew. Several ranks share the questions of a step; the divisor is the number of trained tokens of all of
# them.

# %%
#| export scripts/chat_rl
"""Reinforcement learning of a chat model: try answers, reward the right ones. Alone, or under torchrun."""

# %%
#| export scripts/chat_rl
import json
import time
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

from nanochat_lib.checkpoint import (checkpoint_directory, find_checkpoint, gather, load_model, load_optimizer,
                                     prepare_directory, save_checkpoint, steps_in, write_result)
from nanochat_lib.common import MetricsLog, NanochatError, Runtime, print0, progress, run_cli, start
from nanochat_lib.engine import Engine
from nanochat_lib.rl import Question, learn, questions_of_step, readable, roll_out, rows_of, statistics
from nanochat_lib.tasks import Task, get_task
from nanochat_lib.tasks.evaluate import pass_at_k
from nanochat_lib.training import check_loss, set_rates, trim_metrics

SEED = 42
EVAL_SAMPLES = 8  # answers per question of an evaluation: pass@1 … pass@8

# %%
#| export scripts/chat_rl
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
    """what to practise: gsm8k, world, any other task with a reward, or module:Class"""
    task_data: str = ""
    """a folder with the task's files, read instead of the hub"""
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
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """go on from this model's newest RL checkpoint, if there is one"""


def check_settings(settings: ChatRL) -> None:
    for name in ("num_epochs", "device_batch_size", "examples_per_step", "max_new_tokens", "eval_examples"):
        if getattr(settings, name) < 1:
            raise NanochatError(f"--{name.replace('_', '-')} {getattr(settings, name)}: it must be at least 1")
    if settings.num_samples < 2:
        raise NanochatError("--num-samples 1 has nothing to compare an answer with: give at least 2")
    if settings.temperature <= 0:
        raise NanochatError(f"--temperature {settings.temperature} tries the same answer every time: give more than 0")

# %%
#| export scripts/chat_rl
class Run:
    """A run of reinforcement learning at some step."""

    def __init__(self, settings: ChatRL, runtime: Runtime):
        self.settings, self.runtime = settings, runtime
        folder, step = find_checkpoint("sft", settings.model_tag or None, settings.model_step)
        self.directory = checkpoint_directory("rl", folder.name)
        self.task = get_task(settings.task, "train", settings.task_data)
        if not len(self.task):
            raise NanochatError(f"task {settings.task} has no training questions: name another one with --task")
        self.steps = settings.num_iterations
        if self.steps < 0:
            self.steps = max(1, settings.num_epochs * len(self.task) // settings.examples_per_step)
        done = steps_in(self.directory)[-1:] if settings.resume else []
        self.step, self.curve, self.evaluations = 0, [], []
        if done:
            self.model, self.tokenizer, meta = load_model("rl", runtime.device, "train", folder.name, done[0])
            self.step, self.source = done[0], meta["source"]
            self.curve, self.evaluations = meta["loop"]["curve"], meta["loop"]["evaluations"]
            print0(f"going on from step {self.step} in {self.directory}")
        else:
            self.model, self.tokenizer, _ = load_model("sft", runtime.device, "train", folder.name, step)
            self.source = {"stage": "sft", "model_tag": folder.name, "step": step}
            print0(f"starting from sft model {folder.name}, step {step}")
        self.engine = Engine(self.model, self.tokenizer)
        self.optimizer = self.model.setup_optimizer(settings.unembedding_lr, settings.embedding_lr, settings.matrix_lr,
                                                    settings.weight_decay)
        if done:
            load_optimizer(self.directory, self.step, self.optimizer)
        self.open_logs(bool(done))

    def open_logs(self, resumed: bool) -> None:
        """The checkpoint folder readied; what an interrupted run wrote after its last checkpoint is taken back."""
        prepare_directory(self.directory, self.runtime, self.step if resumed else -1)
        self.rollouts = self.directory / "rollouts.jsonl"
        if self.runtime.is_main:
            for path in (self.rollouts, self.directory / "metrics.jsonl"):
                trim_metrics(path, self.step if resumed else -1)
        self.metrics = MetricsLog(self.directory / "metrics.jsonl", self.settings.run, asdict(self.settings))

    def try_answers(self, task: Task, numbers: list[int], samples: int, seed: int) -> list[Question]:
        """This rank's share of some questions, with sampled answers."""
        mine = numbers[self.runtime.rank::self.runtime.world_size]
        settings = self.settings
        self.model.eval()
        questions = roll_out(self.engine, task, mine, num_samples=samples, max_tokens=settings.max_new_tokens,
                             temperature=settings.temperature, top_k=settings.top_k or None, seed=seed)
        self.model.train()
        return questions

    def sums(self, questions: list[Question]) -> dict[str, float]:
        """`statistics` of all ranks' questions."""
        parts = gather(statistics(questions, self.engine.python_start))
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def train_step(self) -> float:
        """One step: answers, rewards, gradient, update; returns the mean reward."""
        settings, began = self.settings, time.perf_counter()
        numbers = questions_of_step(self.step, settings.examples_per_step, len(self.task), SEED)
        questions = self.try_answers(self.task, numbers, settings.num_samples, SEED + self.step)
        sums, rolled = self.sums(questions), time.perf_counter()
        multiplier = settings.init_lr_frac * (1 - self.step / self.steps)
        rows, loss = rows_of(questions), 0.0
        if sums["all_right"] + sums["all_wrong"] < sums["questions"]:  # else Muon would step on old momentum alone
            most = settings.device_batch_size * self.model.config.sequence_len
            loss = learn(self.model, rows, sums["trained"], most, self.runtime.world_size, settings.temperature)
            check_loss(loss, self.step, self.optimizer, self.directory)
            set_rates(self.optimizer, multiplier)
            self.optimizer.step()
            self.model.zero_grad(set_to_none=True)
        seconds = dict(rollout_seconds=round(rolled - began, 3), train_seconds=round(time.perf_counter() - rolled, 3))
        self.note(questions, sums, dict(loss=loss, lr=multiplier, rows=len(rows), **seconds))
        self.step += 1
        return self.curve[-1]

    def note(self, questions: list[Question], sums: dict[str, float], more: dict[str, Any]) -> None:
        """Write down a step: one line of metrics.jsonl, one line of rollouts.jsonl per question."""
        lines = gather([readable(self.step, question) for question in questions])
        if self.runtime.is_main:
            with open(self.rollouts, "a", encoding="utf-8") as file:
                for part in lines:
                    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in part)
        self.curve.append(sums["reward"] / sums["answers"])
        means = {name: sums[name] / sums["answers"] for name in ("length", "cut", "tool_use")}
        entropy = sums["surprise"] / max(sums["sampled"], 1)  # nats per token, estimated by the tokens drawn
        self.metrics.log(step=self.step, reward=self.curve[-1], entropy=entropy, questions=sums["questions"],
                         all_right=sums["all_right"], all_wrong=sums["all_wrong"], **means, **more)

    def evaluate(self) -> None:
        """pass@1 … pass@8 on the test questions."""
        task = get_task(self.settings.task, "test", self.settings.task_data)[:self.settings.eval_examples]
        questions = self.try_answers(task, list(range(len(task))), EVAL_SAMPLES, SEED)
        right = [sum(reward > 0 for reward in q.rewards) for part in gather(questions) for q in part]
        curve = [sum(pass_at_k(EVAL_SAMPLES, n, k) for n in right) / len(right) for k in range(1, EVAL_SAMPLES + 1)]
        self.evaluations.append({"step": self.step, "pass_at_k": curve})
        self.metrics.log(step=self.step, pass_at_k=curve)
        print0(f"step {self.step:5}/{self.steps}: pass@1 {curve[0]:.3f}, pass@{EVAL_SAMPLES} {curve[-1]:.3f} "
               f"on {len(right)} test questions")

    def save(self) -> None:
        if self.step in steps_in(self.directory):
            return  # resumed here
        meta = {"tokenizer": self.tokenizer.fingerprint, "settings": asdict(self.settings), "source": self.source,
                "loop": {"curve": self.curve, "evaluations": self.evaluations}}
        save_checkpoint(self.directory, self.step, self.model, self.optimizer, meta, self.runtime)

    def report(self) -> None:
        """What the run measured: the reward of its first and last steps (up to five), and of every step."""
        few = min(5, len(self.curve))
        first, last = (sum(part) / max(few, 1) for part in (self.curve[:few], self.curve[len(self.curve) - few:]))
        write_result("rl", reward_start=first, reward=last, steps=self.steps, curve=self.curve,
                     evaluations=self.evaluations, task=self.settings.task)

# %%
#| export scripts/chat_rl
#| cli chat_rl
def chat_rl(settings: ChatRL) -> None:
    """Reinforcement learning of a chat model on a task whose answers can be judged."""
    check_settings(settings)
    run = Run(settings, start(settings.device_type))
    bar = progress(total=run.steps, desc="chat_rl", initial=run.step)
    while True:
        last = run.step >= run.steps
        if last or settings.save_every > 0 and run.step > 0 and run.step % settings.save_every == 0:
            run.save()
        due = settings.eval_every > 0 and (last or run.step % settings.eval_every == 0)
        if due and run.step not in [evaluation["step"] for evaluation in run.evaluations]:
            run.evaluate()
        if last:
            break
        bar.set_postfix_str(f"reward {run.train_step():.3f}", refresh=False)
        bar.update()
    bar.close()
    run.metrics.close()
    run.report()
    if not any(run.curve):
        print0("no answer ever earned anything, so there was nothing to learn from: fine-tune longer first, or "
               "practise an easier task")
    print0(f"reward by step: {' '.join(f'{reward:.2f}' for reward in run.curve)}: {run.directory}")

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
events = [event for event in events if "reward" in event]
figure, axes = plt.subplots(1, 3, figsize=(10, 2.4), layout="constrained")
for ax, (name, label) in zip(axes, {"reward": "mean reward", "entropy": "entropy (nats per token)",
                                    "length": "length of an answer (tokens)"}.items()):
    ax.plot([event["step"] for event in events], [event[name] for event in events])
    ax.set(xlabel="step", ylabel=label)

# %%
# NBVAL_IGNORE_OUTPUT
tries = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
question = max(tries, key=lambda line: 0 < line["mean_reward"] < 1)  # one that was decided neither way
print(f"step {question['step']}: {question['question']}")
for answer in question["answers"][:4]:
    print(f"\n{answer['count']} times, advantage {answer['advantage']:+.2f}: {answer['text'][:300]}")

# %% [markdown]
# ## Exercises
#
# In [10_rl](../exercises/10_rl.ipynb):
# 1. `group_advantages`: better or worse than one's siblings.
# 2. `policy_gradient_loss`: the whole of REINFORCE in two lines.
# 3. `pass_at_k`: the chance that one of k tries is right, without bias.
# 4. Explore: what is the best constant baseline?
#
# **Next:** [11 · The full run](11_full_run.ipynb)
