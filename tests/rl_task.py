"""A task and a reward for tests of reinforcement learning (`--task tests.rl_task:HasE`)."""

from nanochat_lib.rewards import Tried
from nanochat_lib.tasks.common import Task, conversation_of


class HasE(Task):
    """Eight questions, whose answers should hold an e; half a point for an e, one for two."""

    eval_type = "generative"

    def __init__(self, split: str):
        super().__init__([f"Question {number}?" for number in range(8)])

    def conversation(self, row: str) -> dict:
        return conversation_of(row, "e e")

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return "e" in answer

    def reward(self, conversation: dict, answer: str) -> float:
        return min(answer.count("e"), 2) / 2


def paid_for_a(tried: Tried) -> float:
    """A reward of one's own (`--reward tests.rl_task:paid_for_a`): a point for every a."""
    return tried.text.count("a")
