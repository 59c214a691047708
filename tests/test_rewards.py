"""What an answer is paid (lesson 10), and when a run that is paid less and less stops."""

import pytest

from nanochat_lib.engine import Completion
from nanochat_lib.rewards import Tried, parse_reward
from nanochat_lib.rl import collapsed
from nanochat_lib.tasks.common import conversation_of
from tests.rl_task import HasE, paid_for_a

STOP = 301


def tried(text, stop=STOP, tokens=4):
    return Tried(HasE("train"), conversation_of("q", "e"), text, Completion([0] * tokens, [], [], "stop", stop), 10)


def test_rewards_are_summed_with_weights():
    reward = parse_reward("answer=2,format=0.5, length")
    parts = reward.parts(tried("e\n#### 12"))
    assert parts == {"answer": 0.5, "format": 1.0, "length": 0.6} and reward.total(parts) == pytest.approx(2.1)
    forms = {"#### 7": 1, "a #### -1,000.5 ": 1, "#### 7 and": 0, "#### 1 #### 2": 0, "7": 0, "####": 0}
    assert {text: parse_reward("format").parts(tried(text))["format"] for text in forms} == forms


def test_an_answer_that_was_cut_off_earns_nothing():
    cut = tried("e #### 12", stop=None)
    assert set(parse_reward("answer=1,format=1,length=1").parts(cut).values()) == {0.0}
    assert parse_reward("answer=1", zero_cut=False).parts(cut) == {"answer": 0.5}


def test_a_function_of_ones_own_sees_the_whole_try():
    assert paid_for_a(tried("a bad cat")) == 3


def steps(count=10, **changes):
    return [{"reward": 0.5, "entropy": 0.3, "cut": 0.1, "questions": 16, "all_right": 2, **changes}] * count


def test_a_collapse_is_told_from_a_sound_run():
    assert collapsed(steps(30), 10) == collapsed(steps(3, cut=1.0), 10) == collapsed(steps(30, cut=1.0), -1) == ""
    assert "no answer ended" in collapsed(steps(20) + steps(10, cut=1.0), 10)
    assert "nothing new is tried" in collapsed(steps(10, entropy=1e-5), 10)
    assert collapsed(steps(10, entropy=1e-5, all_right=16, reward=1.0), 10) == ""  # there is nothing left to learn
    assert "fell from 0.50 (steps from 0 on) to 0.10" in collapsed(steps(20) + steps(10, reward=0.1), 10)
    assert collapsed(steps(20) + steps(10, reward=0.3), 10) == ""  # not by half
    assert collapsed(steps(20, reward=0.1) + steps(10, reward=0.01), 10) == ""  # within chance
