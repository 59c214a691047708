"""Checks of the exercises of lesson 10."""

import itertools

import torch

from nanochat_lib.course.grading import exercise, expect, expect_close, expect_shape, expect_type


@exercise(difficulty=1, importance=5, minutes=5, hints=[
    "rewards.mean(dim=-1, keepdim=True) has one mean per question, and broadcasts.",
])
def group_advantages(answer):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    got = answer(rewards)
    expect_shape(got, (2, 4))
    expect(bool(got[1].eq(0).all()), "Four right answers to one question: all their advantages are 0. Take the mean of "
           "each question's own answers, not of all.")
    expect_close(got[0], torch.tensor([0.5, -0.5, -0.5, 0.5]), "Two of four right: the mean is 0.5. Subtract it, and "
                 "do not divide by the standard deviation.")
    expect(torch.equal(rewards[0], torch.tensor([1.0, 0.0, 0.0, 1.0])), "The rewards were changed: make a new tensor.")
    expect_close(answer(torch.tensor([0.25, 0.75])), torch.tensor([-0.25, 0.25]), "One group alone, shape (samples,).")
    many = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0))
    expect_close(answer(many).sum(-1), torch.zeros(3, 2), "A group's advantages sum to 0, over the last dimension.")


@exercise(difficulty=2, importance=5, minutes=15, hints=[
    "advantages[:, None] has shape (B, 1) and broadcasts over the tokens.",
    "The optimizer makes the loss smaller, and we want advantage · logp larger: mind the sign.",
    "One division, by mask.sum(); clamp_min(1) guards the empty batch.",
])
def policy_gradient_loss(answer):
    logp = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]], requires_grad=True)
    advantages = torch.tensor([2.0, -1.0])
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
    loss = answer(logp, advantages, mask)
    expect_shape(loss, ())
    expect(loss.requires_grad, "The loss has no gradient: no detach, no item, no new tensor on the way from logp.")
    (gradient,) = torch.autograd.grad(loss, logp, retain_graph=True)
    expect(bool(gradient[mask == 0].eq(0).all()),
           "Tokens with mask 0 (prompt, tool output) have a gradient; it must be 0.")
    expect(bool((gradient[0, 1:] < 0).all()),
           "Descending this loss would make the better answer less likely: the sign is wrong.")
    expect_close(gradient, -mask * advantages[:, None] / 3, "Each chosen token's gradient is −advantage / 3, the "
                 "number of chosen tokens in the batch: divide once, not row by row, and not by B·T.")
    expect_close(loss, torch.tensor(5 / 3), "The sum is −(2·(−2) + 2·(−3) − 1·(−5)) = 5, over 3 tokens.")
    empty = answer(logp, advantages, torch.zeros(2, 3, dtype=torch.int64))
    expect_close(empty, torch.tensor(0.0), "Without a chosen token the loss is 0, not nan: divide by at least 1.")
    theta = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    worth = torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)
    p = theta.softmax(-1)
    (expected,) = torch.autograd.grad((p * worth).sum(), theta, retain_graph=True)
    loss = answer(p.log()[:, None], (p * worth).detach(), torch.ones(3, 1)) * 3
    (gradient,) = torch.autograd.grad(loss, theta)
    expect_close(-gradient, expected, "Weighted by their probabilities, all answers together must give the gradient of "
                 "the expected reward.")


@exercise(difficulty=2, importance=4, minutes=15, hints=[
    "math.comb(n, k) counts the ways to draw k of n, and is 0 when k > n.",
    "Draws without a right one take all k from the samples − right wrong ones.",
])
def pass_at_k(answer):
    got = answer(4, 2, 1)
    expect_type(got, (float, int))
    expect_close(got, 0.5, "pass@1 is the part of right answers.")
    expect_close(answer(4, 2, 2), 5 / 6, "2 of 4 right, draw 2: of 6 pairs one holds no right answer. 1 − (1 − c/n)ᵏ = "
                 "0.75 puts every draw back, which is biased.")
    expect_close(answer(8, 0, 3), 0.0, "No right answer: never.")
    expect_close(answer(4, 3, 2), 1.0, "Only one of 4 is wrong: every pair holds a right one.")
    for n, c, k in ((6, 1, 2), (6, 3, 3), (7, 2, 4), (5, 5, 5)):
        draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
        expect_close(answer(n, c, k), sum(map(any, draws)) / len(draws), f"{c} of {n} right, k = {k}: count all draws.")
    expect_close(answer(2000, 100, 8), 0.3372, "Large numbers overflow floats: use math.comb, or a product of ratios.",
                 rtol=1e-2)


@exercise(difficulty=3, importance=5, minutes=20, hints=[
    "Split at the mark: work, mark, number = answer.strip().partition('#### ').",
    "re.fullmatch(r'-?\\d+', number) is None unless the rest is one whole number and nothing else.",
    "A second #### lands in the rest, and is no number.",
])
def careful_reward(answer):
    got = answer("They cost 6 pence.\n#### 6", "6")
    expect_type(got, (float, int))
    expect_close(got, 1.0, "Work, the mark and the right number: 1.")
    expect_close(answer("They cost 7 pence.\n#### 7", "6"), 0.1, "The form is kept and the number wrong: 0.1.")
    tricks = {
        "#### 6": "A bare number was paid: it is a guess as good as any, and soon all answers are guesses. Ask for work.",
        "They cost 6 pence.": "An answer without #### was paid.",
        "Either way #### 5 #### 6 #### 7": "Three final numbers were paid: it will learn to name all numbers there are.",
        "Pence.\n#### 6 or 7": "Two numbers after one mark were paid: it will learn to hedge.",
        "Pence.\n#### 6 and now a story": "Text after the number was paid: it will learn never to end.",
        "Pence.\n#### ": "A mark without a number was paid.",
        "  \n #### 6": "Blanks were taken for work.",
    }
    for text, sentence in tricks.items():
        expect(float(answer(text, "6")) == 0.0, sentence)
    expect_close(answer("Pence.\n#### 12", "2"), 0.1, "12 is not 2: compare the whole number, not its end.")
    expect_close(answer("Pence.\n#### 12", "1"), 0.1, "12 is not 1: compare the whole number, not its beginning.")
    expect_close(answer("She owes.\n#### -4 ", "-4"), 1.0, "Numbers may be negative, and a blank at the end is harmless.")


@exercise(difficulty=3, importance=3, minutes=20, hints=[
    "∇log p(a) with respect to the logits is onehot(a) − p.",
    "Total variance = E[(r − b)²·|∇log p|²] − |E[…]|², and the second part does not depend on b.",
    "Set the derivative in b to zero: b = E[r·|∇log p|²] / E[|∇log p|²].",
])
def best_baseline(answer):
    expect_type(answer, (float, int))
    value = float(answer)
    expect(abs(value - 0.80) > 0.02, "That is the expected reward, 0.80. Measure on either side of it: the variance is "
           "lower elsewhere, since answers do not all have equally long gradients.")
    expect(0 < value < 0.8,
           "Rare answers have long gradients and, here, low rewards: the best baseline is below the mean.")
    expect_close(value, 0.3057, "Close the interval further: the variance is still lower elsewhere.", rtol=0, atol=0.02)
