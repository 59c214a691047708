"""What every exercise check is made of: the verdict, its hints, and comparisons that say what differs.

    @exercise(difficulty=1, importance=4, minutes=10, hints=["The mean is over the last dimension."])
    def rmsnorm(answer):
        x = torch.tensor([[3.0, 4.0]])
        got = answer(x)
        expect_shape(got, (1, 2))
        expect_close(got, x / 12.5**0.5, "Divide by the root of the mean square, not by the norm: the mean is over C numbers.")

`check.rmsnorm(rmsnorm)` in a notebook shows the verdict and keeps the progress; it never raises. In tests,
`check.rmsnorm(wrong).sentence` is what the learner reads, and `solutions_of("04_gpt")` holds our own answers by name.
"""

import functools
import html
import json
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext
import torch

from nanochat_lib.common import base_dir, write_json

ROOT = Path(__file__).resolve().parents[2]
SOLUTION = re.compile(r"\s*# (BEGIN|END) SOLUTION\s*$")


class Wrong(Exception):
    """An answer that is not right; its text is the one sentence the learner reads."""


@dataclass(frozen=True)
class Verdict:
    """What a check found: "right", "wrong" or "not done yet", and the sentence that goes with it."""

    name: str
    state: str
    sentence: str
    hints: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.state == "right"

    def __repr__(self) -> str:
        return f"{self.name}: {self.state}" + (f" — {self.sentence}" if self.sentence else "")

    def _repr_html_(self) -> str:
        colour = {"right": "#2a7", "wrong": "#c33"}.get(self.state, "#888")
        hints = "" if self.passed else "".join(
            f"<details><summary>hint {number}</summary>{html.escape(hint)}</details>"
            for number, hint in enumerate(self.hints, 1))
        return (f'<div style="border-left: 4px solid {colour}; padding: 0.3em 0.8em"><b>{html.escape(self.name)}</b>: '
                f'{self.state}<pre style="margin: 0; white-space: pre-wrap">{html.escape(self.sentence)}</pre>{hints}</div>')


@dataclass(frozen=True)
class Exercise:
    """A check with what the course says about it."""

    name: str
    lesson: str
    difficulty: int
    importance: int
    minutes: int
    hints: tuple[str, ...]


EXERCISES: dict[tuple[str, str], Exercise] = {}  # (lesson word, name) → exercise, in the order of the checks' modules


def exercise(difficulty: int, importance: int, minutes: int, hints: Sequence[str] = ()) -> Callable:
    """Make a check of a function that raises Wrong: called with an answer, it returns a Verdict and keeps the progress."""

    def decorate(check: Callable[[Any], None]) -> Callable[[Any], Verdict]:
        lesson, name = check.__module__.rsplit(".", 1)[-1], check.__name__
        EXERCISES[lesson, name] = Exercise(name, lesson, difficulty, importance, minutes, tuple(hints))

        @functools.wraps(check)
        def graded(answer: Any) -> Verdict:
            verdict = Verdict(name, *judge(check, answer), tuple(hints))
            if verdict.state != "not done yet":
                keep_progress(lesson, name, verdict.passed)
            return verdict

        return graded

    return decorate


def judge(check: Callable[[Any], None], answer: Any) -> tuple[str, str]:
    """(state, sentence) of one answer."""
    if answer is None or answer is ...:
        return "not done yet", ""
    try:
        check(answer)
    except NotImplementedError:
        return "not done yet", ""
    except Wrong as wrong:
        return "wrong", str(wrong)
    except Exception as error:  # the learner's own error: say what and where, not our stack
        place = [frame for frame in traceback.extract_tb(error.__traceback__) if "nanochat_lib" not in frame.filename]
        where = f", at your line `{place[-1].line}`" if place and place[-1].line else ""
        return "wrong", f"It raised {type(error).__name__}: {error}{where}."
    return "right", ""


def progress_file() -> Path:
    return base_dir() / "course_progress.json"


def progress() -> dict[str, dict[str, bool]]:
    """{lesson word: {exercise: solved}} as far as checks have run here."""
    try:
        return json.loads(progress_file().read_text())
    except (OSError, ValueError):
        return {}


def keep_progress(lesson: str, name: str, passed: bool) -> None:
    """Remember a verdict; what was solved once stays solved."""
    done = progress()
    done.setdefault(lesson, {})[name] = passed or done.get(lesson, {}).get(name, False)
    write_json(progress_file(), done)


def expect(condition: bool, sentence: str) -> None:
    """Raise Wrong with the sentence unless the condition holds."""
    if not condition:
        raise Wrong(sentence)


def expect_type(got: Any, kind: type | tuple[type, ...]) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expect(isinstance(got, kinds), f"Return a {' or '.join(k.__name__ for k in kinds)}, not a {type(got).__name__}.")


def expect_shape(got: Any, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """A tensor of this shape (and dtype)."""
    expect_type(got, torch.Tensor)
    expect(tuple(got.shape) == tuple(shape), f"The result has shape {tuple(got.shape)}; it should be {tuple(shape)}.")
    expect(dtype is None or got.dtype == dtype, f"The result is {got.dtype}; it should be {dtype}.")


def shown(value: Any) -> str:
    """A value as the learner sees it: at most 4×4 of a tensor, rounded."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    corner = value.detach().float().cpu()[(slice(4),) * value.dim()]
    while corner.dim() > 2:
        corner = corner[0]
    text = re.sub(r"(\.\d{4})\d+", r"\1", str(corner.double().tolist()))
    return text if corner.numel() == value.numel() else f"{text} (a corner)"


def expect_close(got: Any, expected: Any, sentence: str, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Numbers or tensors that agree; else Wrong with the sentence, expected and got."""
    left, right = (torch.as_tensor(value, dtype=torch.float64) for value in (got, expected))
    expect(left.shape == right.shape, f"The result has shape {tuple(left.shape)}; it should be {tuple(right.shape)}.")
    expect(torch.allclose(left, right, rtol, atol, equal_nan=True),
           f"{sentence}\nexpected {shown(expected)}\ngot      {shown(got)}")


def expect_equal(got: Any, expected: Any, sentence: str) -> None:
    expect(type(got) is type(expected) and got == expected, f"{sentence}\nexpected {shown(expected)}\ngot      {shown(got)}")


def solutions_of(lesson: str, root: Path = ROOT) -> dict[str, Any]:
    """Names defined by solutions/{lesson}.py, run as a notebook would but without its checks and magics."""
    space: dict[str, Any] = {"__name__": f"solutions_{lesson}"}
    for cell in jupytext.read(root / "solutions" / f"{lesson}.py").cells:
        if cell.cell_type == "code" and not re.match(r"\s*(check\.|[%!])", cell.source):
            exec(compile(cell.source, f"solutions/{lesson}.py", "exec"), space)
    return space
