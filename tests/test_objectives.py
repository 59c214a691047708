"""The objectives of lesson 10: against enumerated expectations, loops written independently, and hand-made cases."""

import itertools
import math

import pytest
import torch

from nanochat_lib.gpt import GPT, GPTConfig
from nanochat_lib.objectives import ALGORITHMS, CLIPS, Terms, group_advantages, kl_to_reference, leave_one_out, z_scores
from nanochat_lib.rl import Row, Tries, learn, token_logprobs, token_weights, padded

VOCAB, PROMPT = 4, [3, 0, 2]
ANSWERS = list(itertools.product(range(VOCAB), repeat=2))  # every answer of two tokens


@pytest.fixture(scope="module")
def policy() -> GPT:
    """A GPT of a few thousand parameters in float64, so that finite differences are sharp."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(sequence_len=8, vocab_size=VOCAB, n_layer=2, n_head=2, n_kv_head=1, n_embd=24))
    model.init_weights()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.double().dtype = torch.float64
    return model


ROWS = [Row((*PROMPT, *answer), (0, 0, 0, 1, 1)) for answer in ANSWERS]
REWARDS = torch.rand(16, generator=torch.Generator().manual_seed(0)).double()


def chances(model) -> torch.Tensor:
    """Probability of every answer, from a plain softmax over the whole sequence."""
    tokens = torch.tensor([row.tokens for row in ROWS])
    with torch.no_grad():
        logp = model(tokens).double().log_softmax(-1)
    return torch.stack([logp[:, at - 1].gather(-1, tokens[:, at:at + 1])[:, 0] for at in (3, 4)]).sum(0).exp()


def expected_weights(model, objective, terms) -> torch.Tensor:
    """Mean over all pairs of answers, weighted by their probability, of the weights a question of this pair gives."""
    p, total = chances(model), 0
    table = token_logprobs(model, *(torch.tensor([getattr(row, name) for row in ROWS]) for name in ("tokens", "mask")))
    for pair in itertools.product(range(16), repeat=2):
        tries = Tries(ROWS, torch.tensor([pair]), REWARDS[[*pair]][None])
        total = total + p[list(pair)].prod() * token_weights(objective, tries, terms, table, table.detach())
    return total


def slope(model, value) -> tuple[list, float]:
    """A random direction and the measured change of value(model) along it."""
    direction = [torch.randn_like(p) for p in model.parameters()]
    values = []
    for sign in (1, -2, 1):  # there, to the other side, and back
        for p, d in zip(model.parameters(), direction):
            p.data += sign * 1e-3 * d
        values.append(value(model))
    return direction, (values[0] - values[1]) / 2e-3


@pytest.mark.parametrize("name, factor", [
    ("rloo", 1.0),             # unbiased: exactly the gradient of the expected reward
    ("reinforce", 0.5 / 2),    # (G − 1)/G of it by its own share in the mean, over two tokens an answer
    ("dr_grpo", 0.5 / 8),      # the same over its constant length
])
def test_the_gradient_is_that_of_the_expected_reward(policy, name, factor):
    weights = expected_weights(policy, ALGORITHMS[name], Terms(longest=8))
    policy.zero_grad()
    learn(policy, ROWS, weights, most=64)
    torch.manual_seed(5)
    for _ in range(3):
        direction, measured = slope(policy, lambda model: float(chances(model) @ REWARDS))
        found = -sum(float((p.grad * d).sum()) for p, d in zip(policy.parameters(), direction) if p.grad is not None)
        assert found == pytest.approx(factor * measured, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_z_scores_of_pairs_climb_the_chance_of_beating_the_present_policy(policy, name):
    """Of two answers the better one has the z-score 1 and the other −1, whatever the distance."""
    weights = expected_weights(policy, ALGORITHMS[name], Terms())
    policy.zero_grad()
    learn(policy, ROWS, weights, most=64)
    now, better = chances(policy), (REWARDS[:, None] - REWARDS[None]).sign()
    torch.manual_seed(6)
    direction, measured = slope(policy, lambda model: float(chances(model) @ better @ now))
    found = -sum(float((p.grad * d).sum()) for p, d in zip(policy.parameters(), direction) if p.grad is not None)
    assert found == pytest.approx(measured / 2, rel=2e-3, abs=1e-6)  # two tokens an answer


def by_hand(name, logp, old, rewards, mask, clip, longest):
    """Every objective again, token by token, in plain Python."""
    low, high, questions = *clip, range(len(rewards))
    tokens, answers, total = int(mask.sum()), rewards.numel(), 0.0
    for q in questions:
        mean = sum(rewards[q].tolist()) / len(rewards[q])
        deviation = math.sqrt(sum((r - mean)**2 for r in rewards[q].tolist()) / len(rewards[q]))
        for i, reward in enumerate(rewards[q].tolist()):
            others = (mean * len(rewards[q]) - reward) / (len(rewards[q]) - 1)
            worth = {"rloo": reward - others, "grpo": (reward - mean) / (deviation + 1e-6),
                     "dapo": (reward - mean) / (deviation + 1e-6)}.get(name, reward - mean)
            for t in range(mask.size(-1)):
                if not mask[q, i, t]:
                    continue
                if name in ("reinforce", "rloo"):
                    gain = worth * logp[q, i, t]
                else:
                    ratio = torch.exp(logp[q, i, t] - old[q, i, t])
                    free = (ratio < 1 + high) if worth > 0 else (ratio > 1 - low)
                    gain = worth * ratio if free else worth * (1 + high if worth > 0 else 1 - low)
                total = total + gain / {"reinforce": tokens, "dapo": tokens, "rloo": answers,
                                        "grpo": answers * int(mask[q, i].sum()), "dr_grpo": answers * longest}[name]
    return -total


@pytest.mark.parametrize("name", ALGORITHMS)
def test_losses_and_gradients_agree_with_loops(name):
    generator = torch.Generator().manual_seed(1)
    logp = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64).sub(3).requires_grad_()
    old = (logp + 0.4 * torch.randn(3, 4, 6, generator=generator)).detach()
    rewards = torch.randint(0, 3, (3, 4), generator=generator).double()
    mask = torch.randint(0, 2, (3, 4, 6), generator=generator)
    mask[..., 0] = 1
    clip = CLIPS.get(name, (0.2, 0.2))
    loss = ALGORITHMS[name](logp, old, old, rewards, mask, Terms(*clip, longest=6))
    expected = by_hand(name, logp, old, rewards, mask, clip, 6)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    (gradient,), (reference,) = torch.autograd.grad(loss, logp), torch.autograd.grad(expected, logp)
    torch.testing.assert_close(gradient, reference)
    assert gradient[mask == 0].eq(0).all() and gradient[mask == 1].ne(0).any()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_at_the_first_update_the_values_do_not_matter(name):
    """Weights at ratio 1 are those with every log-probability 0, which saves a forward pass."""
    tries = Tries(ROWS[:3], torch.tensor([[0, 1, 0, 2]]), torch.tensor([[1.0, 0.0, 1.0, 0.5]]))
    table, terms = torch.randn(3, 4), Terms(*CLIPS.get(name, (0.2, 0.2)))
    found = token_weights(ALGORITHMS[name], tries, terms, table, table)
    torch.testing.assert_close(found, token_weights(ALGORITHMS[name], tries, terms, table * 0, table * 0))
    assert found[:, :2].eq(0).all()  # the prompt


def test_several_ranks_sum_to_one():
    """With the step's totals as divisors, the losses of parts add up to the loss of the whole."""
    generator = torch.Generator().manual_seed(2)
    logp, rewards = torch.randn(4, 3, 5, generator=generator), torch.rand(4, 3, generator=generator)
    mask = torch.randint(0, 2, (4, 3, 5), generator=generator)
    for objective in ALGORITHMS.values():
        whole = objective(logp, logp, logp, rewards, mask)
        terms = Terms(tokens=float(mask.sum()), answers=12.0)
        parts = [objective(logp[a:b], logp[a:b], logp[a:b], rewards[a:b], mask[a:b], terms) for a, b in ((0, 1), (1, 4))]
        assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-6)


def test_a_ratio_that_has_left_the_clip_is_pushed_no_further():
    old = torch.zeros(1, 2, 1, dtype=torch.float64)
    rewards, mask = torch.tensor([[1.0, 0.0]]).double(), torch.ones(1, 2, 1)
    for up, pushed in ((0.1, True), (0.25, False)):  # ratios e^0.1 = 1.11 and e^0.25 = 1.28
        logp = torch.tensor([[[up], [-0.1]]], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(ALGORITHMS["grpo"](logp, old, old, rewards, mask), logp)
        assert bool(gradient[0, 0, 0] != 0) == pushed and gradient[0, 1, 0] != 0
    logp = torch.tensor([[[0.24], [0.5]]], dtype=torch.float64, requires_grad=True)  # 1.27: DAPO allows up to 1.28
    (gradient,) = torch.autograd.grad(ALGORITHMS["dapo"](logp, old, old, rewards, mask), logp)
    assert gradient[0, 0, 0] < 0 < gradient[0, 1, 0]  # a bad answer that has become likelier is pulled back in full


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert group_advantages(rewards).tolist() == [[0.5, -0.5, -0.5, 0.5], [0.0] * 4]
    torch.testing.assert_close(leave_one_out(rewards)[0], torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3]))
    torch.testing.assert_close(z_scores(rewards), torch.tensor([[1.0, -1.0, -1.0, 1.0], [0.0] * 4]), rtol=1e-5, atol=0)


def test_the_kl_estimate_is_right_in_the_mean_and_never_negative(policy):
    """Its expectation over the policy's own answers is the KL divergence, computed from whole distributions."""
    torch.manual_seed(8)
    p, q = torch.randn(6).log_softmax(-1), torch.randn(6).log_softmax(-1)
    one = torch.ones(1)
    each = torch.stack([kl_to_reference(p[i:i + 1], p[i:i + 1], q[i:i + 1], one, one) for i in range(6)])
    assert (each >= 0).all()
    torch.testing.assert_close((p.exp() * each).sum(), (p.exp() * (p - q)).sum())
    assert kl_to_reference(p, p, p, one, torch.ones(6)).item() == 0
    logp = p.clone().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kl_to_reference(x, x, q.double(), one, torch.ones(6)), logp)


def test_kl_pulls_on_decided_questions_too():
    tries = Tries(ROWS[:2], torch.tensor([[0, 1]]), torch.tensor([[1.0, 1.0]]))
    table = torch.full((2, 4), -1.0)
    weights = token_weights(ALGORITHMS["reinforce"], tries, Terms(), table, table, table - 0.5, kl=0.1)
    assert (weights[:, 2:] > 0).all() and weights[:, :2].eq(0).all()  # likelier than the reference says: pushed down
    assert padded([(1,), (1, 2)]).tolist() == [[1, 0], [1, 2]]
