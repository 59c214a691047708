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
# # 09 · Learning to talk
#
# *How does a base model become a chat model?* — 30 minutes, about one of them computing.
#
# A base model continues documents. Asked a question it may well add another question, for that is what documents do.
# Supervised fine-tuning (SFT) goes on training it, on conversations, and only on the words of the assistant.
# This lesson says what such a conversation is, where it comes from, how conversations become batches without waste, and how
# the chat model is graded.

# %%
#| default_exp tasks/common

# %% [markdown]
# ## What a task is
#
# Training data and exams have one form. A task is a list of conversations; item `i` is
# `{"messages": [{"role", "content"}, …]}`, whose last message is the answer to be learned. A task that can be graded says how:
# *categorical* (which of a few letters is likelier) or *generative* (let it write, then judge what it wrote), and a
# `reward` for reinforcement learning (lesson 10). A slice of a task is a task.

# %%
#| export
"""What a task is: conversations to learn from, and how an answer is judged; tasks put together; rows from files."""

# %%
#| export
import copy
import json
import random
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_lib.common import NanochatError

# %%
#| export
class Task:
    """A sequence of conversations made from rows; `task[i]` is a conversation, `task[a:b:c]` a task on those rows.

    A subclass says how a row becomes a conversation, and if it can be graded its `eval_type` and `evaluate`.
    """

    eval_type = ""  # "categorical", "generative", or "" for what is only learned from
    baseline = 0.0  # accuracy of a guess

    def __init__(self, rows: Sequence[Any], shuffle: bool = False):
        self.rows = rows
        # the order that datasets' shuffle(seed=42) gives, so that the first n problems are the same everywhere
        self.order = np.random.default_rng(42).permutation(len(rows)) if shuffle else range(len(rows))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            view = copy.copy(self)
            view.order = self.order[index]
            return view
        return self.conversation(self.rows[int(self.order[index])])

    def conversation(self, row: Any) -> dict:
        """One row as {"messages": […]}; categorical tasks add "letters"."""
        return row

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Whether `answer`, the assistant's text, is right. Raises NotImplementedError where a task is not graded."""
        raise NotImplementedError(f"{type(self).__name__} is not graded")

    def reward(self, conversation: dict, answer: str) -> float:
        """What reinforcement learning pays for an answer."""
        return float(self.evaluate(conversation, answer))

# %%
#| export
class TaskSequence:
    """Tasks one after the other, as one."""

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = list(tasks)
        self.pairs = [(which, index) for which, task in enumerate(self.tasks) for index in range(len(task))]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            view = copy.copy(self)
            view.pairs = self.pairs[index]
            return view
        which, row = self.pairs[index]
        return self.tasks[which][row]


class TaskMixture(TaskSequence):
    """Tasks shuffled together, the same way every time (seed 42). A task given twice is learned twice."""

    def __init__(self, tasks: Sequence[Task]):
        super().__init__(tasks)
        random.Random(42).shuffle(self.pairs)

# %% [markdown]
# ## A conversation that cannot be learned from
#
# One bad line in ten thousand should cost a sentence before training, not a strange model after it.

# %%
#| export
PARTS = ("text", "python", "python_output")


def fault_of(conversation: Any) -> str:
    """What is wrong with a conversation in a few words; "" if nothing is."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        return 'no list of "messages"'
    if isinstance(messages[0], dict) and messages[0].get("role") == "system":
        if not isinstance(messages[0].get("content"), str):
            return "the system message is not a string"
        messages = messages[1:]
    if len(messages) < 2:
        return "it needs a message of the user and one of the assistant"
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        role = message.get("role") if isinstance(message, dict) else None
        if role != expected:
            return f"message {i + 1} is of role {role!r}, expected {expected!r}: user and assistant take turns"
        if fault := fault_of_content(message.get("content"), expected):
            return f"message {i + 1}: {fault}"
    return "" if len(messages) % 2 == 0 else "the last message is the user's: there is no answer to learn"


def fault_of_content(content: Any, role: str) -> str:
    """The same for the content of one message: text, or an assistant's list of parts."""
    if isinstance(content, str):
        return "" if content.strip() else "it is empty"
    if role == "user" or not isinstance(content, list):
        return f"its content is a {type(content).__name__}, not a string"
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            return 'a part without "type" and "text"'
        if part.get("type") not in PARTS:
            return f"unknown part {part.get('type')!r}: parts are {', '.join(PARTS)}"
    return "" if content else "it is empty"

# %%
turns = [{"role": "user", "content": "Where does Anna live?"}, {"role": "assistant", "content": "In Oakham."}]
assert fault_of({"messages": turns}) == ""
print(fault_of({"messages": turns[::-1]}))
print(fault_of({"messages": turns[:1]}))

# %% [markdown]
# ## Rows from a file or from the hub
#
# The public sets live on the Hugging Face hub. The same classes read a local folder in the same format, and without a network the
# reader learns so within seconds (left alone, the hub's client tries for half a minute and then speaks of sockets).

# %%
#| export
def numbered_jsonl(path: Path) -> list[tuple[int, Any]]:
    """(line number, value) of a JSON-lines file, blank lines left out; NanochatError with file, line and reason."""
    path, values = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise NanochatError(f"cannot read {path} ({error}): give a file of UTF-8 text, one JSON value a line") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                values.append((number, json.loads(line)))
            except ValueError as error:
                raise NanochatError(f"{path}, line {number}: not JSON ({error}): mend or delete the line") from None
    return values


def read_jsonl(path: Path) -> list[Any]:
    """The values alone."""
    return [value for _, value in numbered_jsonl(path)]


def find_files(folder: Path, split: str, config: str = "") -> list[Path]:
    """The files of a split in a folder laid out as on the hub or flat: train.jsonl, data/train-00000-of-00002.parquet."""
    name = re.compile(rf"({split})(-\d+-of-\d+)?\.(jsonl|parquet)")
    for place in (folder / config, folder / "data" / config, folder / "data", folder):
        if files := sorted(path for path in place.glob("*") if name.fullmatch(path.name)):
            return files
    return []

# %%
#| export
def hub_is_reachable(timeout: float = 3.0) -> bool:
    """Whether the hub answers at all, asked once by a bare connection (through a proxy one cannot tell: then True)."""
    from huggingface_hub import constants

    address = urllib.parse.urlparse(constants.ENDPOINT)
    if urllib.request.getproxies().get(address.scheme):
        return True
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout).close()
        return True
    except OSError:
        return False


def hub_rows(name: str, repo: str, split: str, config: str = "") -> Sequence[dict]:
    """Rows of a hub set, downloaded once and then read from the cache; NanochatError if neither is possible."""
    import datasets  # imported late: it takes seconds, and the world needs none of it
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not hub_is_reachable():
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # what is cached still loads, at once
    try:
        return datasets.load_dataset(repo, config or None, split=split)
    except Exception as error:  # the client raises a dozen kinds
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise NanochatError(f"cannot load {repo} ({config or 'default'}, {split}) from the hub or its cache ({reason}): go "
                            f"online, or give --task-data DIR with {split}.jsonl or parquet files in DIR/{name}") from None


def load_rows(name: str, repo: str, split: str, config: str = "", data: str = "", files: str = "") -> Sequence[dict]:
    """Rows of a public set: from the folder `data`/`name` if `data` is given, else from the hub. `files` is the
    pattern of local file names where it is not the split."""
    if not data:
        return hub_rows(name, repo, split, config)
    folder = Path(data) / name
    found = find_files(folder, files or split, config)
    if not found:
        raise NanochatError(f"no {split}.jsonl or {split}-*.parquet in {folder}: put the files of {repo} there, or leave "
                            "--task-data away to fetch them")
    if found[0].suffix == ".jsonl":
        return [row for path in found for row in read_jsonl(path)]
    import datasets

    try:
        return datasets.Dataset.from_parquet([str(path) for path in found])
    except Exception as error:
        raise NanochatError(f"cannot read {found[0]} ({type(error).__name__}): delete it and fetch it again") from None

# %%
#| export
def conversation_of(question: str, answer: str | list[dict], **more: Any) -> dict:
    """One question and its answer as a conversation; `more` is kept beside the messages."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def multiple_choice(question: str, choices: Sequence[str], letters: Sequence[str], answer: str) -> dict:
    """A quiz as the user asks it. The letter stands after its choice, beside nothing else: a small model
    binds `=B` to the words before it more easily than `B)` to the words after."""
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters))
    text = f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."
    return conversation_of(text, answer, letters=list(letters))


class ChoiceTask(Task):
    """A task answered by one letter."""

    eval_type = "categorical"
    baseline = 0.25

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return answer.strip() == conversation["messages"][-1]["content"]

# %%
quiz = multiple_choice("What is the pet of Leo?", ["turtle", "duck", "rabbit", "goat"], "ABCD", "B")
print(quiz["messages"][0]["content"])

# %% [markdown]
# ## Word problems and the calculator
#
# GSM8K's answers mark each calculation as `<<12/60=0.2>>`. That becomes a *python* part `12/60`, which the assistant must
# learn to write, and a *python_output* part `0.2`, which the calculator writes and nobody needs to learn (lesson 08).

# %%
#| export tasks/gsm8k
"""Word problems worked out with calculator calls, answer after `#### `: GSM8K (Cobbe et al., arXiv 2110.14168)."""

# %%
#| export tasks/gsm8k
import re

from nanochat_lib.tasks.common import Task, conversation_of, load_rows

CALL = re.compile(r"<<([^<>]*)>>")
FINAL = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


def calculator_parts(answer: str) -> list[dict]:
    """`a <<1+2=3>>3 b` → parts text `a `, python `1+2`, python_output `3`, text `3 b`."""
    parts = []
    for i, piece in enumerate(CALL.split(answer)):
        if i % 2:  # inside << >>
            expression, _, result = piece.rpartition("=")
            parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def final_number(text: str) -> float | None:
    """The number after the first `####`, commas left out; None if there is none."""
    found = FINAL.search(text)
    return float(found[1].replace(",", "")) if found else None


class WordProblems(Task):
    """Rows of question and answer in GSM8K's form."""

    eval_type = "generative"

    def conversation(self, row: dict) -> dict:
        return conversation_of(row["question"], calculator_parts(row["answer"]))

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Whether the number after `####` is the right one."""
        right = final_number(conversation["messages"][-1]["content"][-1]["text"])
        return right is not None and final_number(answer) == right


def gsm8k(split: str = "train", data: str = "") -> WordProblems:
    """GSM8K: 7,473 problems to train on, 1,319 to test."""
    return WordProblems(load_rows("gsm8k", "openai/gsm8k", split, "main", data), shuffle=True)

# %%
from nanochat_lib.tasks.gsm8k import calculator_parts, final_number

for part in calculator_parts("She earns 12/60 = $<<12/60=0.2>>0.2 a minute.\n#### 0.2"):
    print(part)
assert final_number("so #### 1,200 pence") == 1200

# %% [markdown]
# ## Quizzes, talk, spelling

# %%
#| export tasks/mmlu
"""MMLU: multiple choice in 57 subjects (Hendrycks et al., arXiv 2009.03300)."""

# %%
#| export tasks/mmlu
from nanochat_lib.tasks.common import ChoiceTask, load_rows, multiple_choice

LETTERS = "ABCD"


class MMLU(ChoiceTask):
    """Rows of question, choices and the right choice's index; `split` is auxiliary_train (99,842), validation or test."""

    def __init__(self, split: str = "auxiliary_train", data: str = ""):
        super().__init__(load_rows("mmlu", "cais/mmlu", split, "all", data), shuffle=True)

    def conversation(self, row: dict) -> dict:
        row = row.get("train") or row  # one of the hub's layouts nests the auxiliary rows
        return multiple_choice(row["question"], row["choices"], LETTERS, LETTERS[row["answer"]])

# %%
#| export tasks/arc
"""ARC: science questions from school, easy and challenging (Clark et al., arXiv 1803.05457)."""

# %%
#| export tasks/arc
from nanochat_lib.tasks.common import ChoiceTask, load_rows, multiple_choice


class ARC(ChoiceTask):
    """`level` is Easy or Challenge. Most questions have letters A–D; some have 1–4, or three or five of them."""

    def __init__(self, level: str, split: str = "test", data: str = ""):
        name = f"arc_{level.lower()}"
        super().__init__(load_rows(name, "allenai/ai2_arc", split, f"ARC-{level}", data), shuffle=True)

    def conversation(self, row: dict) -> dict:
        return multiple_choice(row["question"], row["choices"]["text"], row["choices"]["label"], row["answerKey"])

# %%
#| export tasks/smoltalk
"""SmolTalk: conversations of all kinds, the bulk of what a chat model learns from (arXiv 2502.02737)."""

# %%
#| export tasks/smoltalk
from nanochat_lib.tasks.common import Task, load_rows


class SmolTalk(Task):
    """The small edition: 460K conversations to train on, 24K to test; some begin with a system message."""

    def __init__(self, split: str = "train", data: str = ""):
        super().__init__(load_rows("smoltalk", "HuggingFaceTB/smol-smoltalk", split, data=data), shuffle=True)

    def conversation(self, row: dict) -> dict:
        return {"messages": row["messages"]}

# %%
#| export tasks/customjson
"""Conversations of one's own from a JSON-lines file, every one checked before training."""

# %%
#| export tasks/customjson
from pathlib import Path

from nanochat_lib.common import NanochatError
from nanochat_lib.tasks.common import Task, fault_of, numbered_jsonl


def checked(path: Path) -> list[dict]:
    """The conversations of a file, if all are sound; else NanochatError with file, line and reason of the first fault."""
    rows, faults = [], []
    for number, value in numbered_jsonl(path):
        row = {"messages": value} if isinstance(value, list) else value
        rows.append(row)
        if fault := fault_of(row):
            faults.append(f"{path}, line {number}: {fault}")
    if faults:
        others = f" (and {len(faults) - 1} more lines)" if len(faults) > 1 else ""
        raise NanochatError(f"{faults[0]}{others}: mend or delete it")
    if not rows:
        raise NanochatError(f'{path} holds no conversation: write one a line, {{"messages": […]}}')
    return rows


class CustomJSON(Task):
    """One conversation a line: {"messages": […]}, or the bare list of messages."""

    def __init__(self, path: str | Path):
        super().__init__(checked(Path(path)))

# %%
#| export tasks/spellingbee
"""Spelling words and counting their letters: easy for people, hard for a model that sees tokens."""

# %%
#| export tasks/spellingbee
import random
import re
from collections.abc import Iterable, Sequence

from nanochat_lib.tasks.common import Task, conversation_of
from nanochat_lib.tasks.gsm8k import final_number
from nanochat_lib.world_problems import count_letter, spell

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
QUESTIONS = ("How many {letter} are in {word}?", "How many {letter} are in the word {word}?",
             "How often does {letter} occur in {word}?", "Count the letter {letter} in {word}.")


class SpellingBee(Task):
    """Rows (word, letter, question): how often is the letter in the word? Worked out letter by letter, since a
    token does not show its letters; the number follows `####`."""

    eval_type = "generative"

    def conversation(self, row: tuple[str, str, str]) -> dict:
        word, letter, question = row
        answer = f"{count_letter(word, letter)} #### {word.count(letter)}"
        return conversation_of(question.format(word=word, letter=letter), answer)

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return final_number(answer) == final_number(conversation["messages"][-1]["content"])


class Spelling(Task):
    """Rows of words: spell them with a blank after each letter."""

    eval_type = "generative"

    def conversation(self, row: str) -> dict:
        return conversation_of(f"Spell the word {row}.", spell(row))

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return answer.strip() == conversation["messages"][-1]["content"]

# %%
#| export tasks/spellingbee
def bee_rows(words: Sequence[str], count: int, seed: int, questions: Sequence[str] = QUESTIONS) -> list[tuple]:
    """`count` different rows; the letter is mostly one of the word's, so that the answer is seldom 0."""
    dice, rows = random.Random(seed), {}
    for _ in range(20 * count):
        word = dice.choice(words)
        letter = dice.choice(word) if dice.random() < 0.9 else dice.choice(ALPHABET)
        rows.setdefault((word, letter), dice.choice(questions))
        if len(rows) == count:
            break
    return [(word, letter, question) for (word, letter), question in rows.items()]


def words_in(texts: Iterable[str], split: str) -> list[str]:
    """The words of some texts, three letters or longer, in order; every eighth is for tests."""
    words = sorted({word for text in texts for word in re.findall(r"\b[a-z]{3,}\b", text)})
    return [word for i, word in enumerate(words) if (i % 8 == 0) == (split == "test")]

# %% [markdown]
# ## Code, run
#
# HumanEval asks for a Python function and judges it by running its tests. Running what a model wrote wants care: a process of
# its own, little memory, little time, and no way to pass by leaving early.

# %%
#| export tasks/execution
"""Runs a small untrusted program in a process of its own, with limits."""

# %%
#| export tasks/execution
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

LIMITS = """
import sys
try:
    import resource
    megabyte = 2**20
    for limit, value in ((resource.RLIMIT_AS, {memory} * megabyte), (resource.RLIMIT_CPU, {seconds}),
                         (resource.RLIMIT_FSIZE, megabyte), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
except (ImportError, ValueError, OSError):
    pass
sys.argv = ["program.py"]
exec(compile(open("program.py").read(), "program.py", "exec"), {{"__name__": "__main__"}})
"""


def end(process: subprocess.Popen) -> None:
    """Kill a process, its group and all descendants that can still be found."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.kill()
    process.wait()


def run_program(program: str, timeout: float = 5.0, memory: int = 1024) -> str:
    """Run a Python program to its last line; "" if it got there, else why not ("timeout", or the error's last line).

    `timeout` in seconds of wall clock, `memory` in MiB. The program has a temporary folder, an empty environment, no input,
    and limits on memory, processor time, file size and open files. **This is a fence, not a prison**: it keeps
    honest but wrong programs from harming; network and file system stay open to a malicious one. Run models you do not
    trust in a container.
    """
    proof = secrets.token_hex(16)  # printed after the last line: sys.exit(0) on the way does not pass
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "program.py").write_text(f"{program}\nprint('\\n{proof}')\n", encoding="utf-8")
        with open(path / "out", "wb") as out, open(path / "err", "wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", LIMITS.format(memory=memory, seconds=int(timeout) + 1)], cwd=folder,
                env={}, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                return "timeout"
            finally:
                end(process)
        if (path / "out").read_bytes().rstrip().endswith(proof.encode()):
            return ""
        said = (path / "err").read_text(errors="replace").strip()
        return said.splitlines()[-1] if said else f"ended early, exit {process.returncode}"

# %%
from nanochat_lib.tasks.execution import run_program

print(run_program("assert sum([1, 2]) == 3") or "passed")
print(run_program("import sys\nsys.exit(0)"))
print(run_program("while True: pass", timeout=0.5))

# %%
#| export tasks/humaneval
"""HumanEval: write a Python function that passes its tests (Chen et al., arXiv 2107.03374)."""

# %%
#| export tasks/humaneval
import re

from nanochat_lib.tasks.common import Task, conversation_of, load_rows
from nanochat_lib.tasks.execution import run_program

BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)```", re.DOTALL)


def code_of(answer: str) -> str:
    """The first fenced block of an answer, or all of it."""
    found = BLOCK.search(answer)
    return found[1] if found else answer


class HumanEval(Task):
    """164 problems, for evaluation only: the beginning of a function is the question, the whole of it the answer."""

    eval_type = "generative"

    def __init__(self, split: str = "test", data: str = ""):
        rows = load_rows("humaneval", "openai/openai_humaneval", split, data=data, files="test|HumanEval")
        super().__init__(rows, shuffle=True)

    def conversation(self, row: dict) -> dict:
        return conversation_of(row["prompt"], row["prompt"] + row["canonical_solution"], entry_point=row["entry_point"],
                               test=row["test"])

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Whether the function passes its tests. The question's imports and helpers stand before it; an answer that
        only goes on with the function's body is joined to its beginning."""
        prompt, code = conversation["messages"][0]["content"], code_of(answer)
        name = conversation["entry_point"]
        whole = f"{prompt[:prompt.rindex(f'def {name}')]}\n{code}" if f"def {name}" in code else prompt + code
        return run_program(f"{whole}\n\n{conversation['test']}\n\ncheck({name})\n") == ""

# %% [markdown]
# ## The embedded world's tasks
#
# Lesson 01 wrote their rows; here they become conversations. No test question, problem or word is in the training rows.

# %%
#| export tasks/world
"""The embedded world's chat tasks: quizzes, word problems, letters, facts told in conversation, an identity."""

# %%
#| export tasks/world
import functools
import re
from pathlib import Path

from nanochat_lib.common import NanochatError, base_dir
from nanochat_lib.tasks.common import ChoiceTask, Task, multiple_choice, read_jsonl
from nanochat_lib.tasks.gsm8k import WordProblems
from nanochat_lib.tasks.spellingbee import QUESTIONS, Spelling, SpellingBee, bee_rows

LETTERS = "ABCD"


class Quiz(ChoiceTask):
    """Who is who, with four choices."""

    def conversation(self, row: dict) -> dict:
        return multiple_choice(row["question"], row["choices"], LETTERS, LETTERS[row["answer"]])


class Facts(Task):
    """Conversations about people; right is an answer that holds the last fact's value as a word of its own."""

    eval_type = "generative"

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return re.search(rf"\b{re.escape(conversation['answer'])}\b", answer) is not None

# %%
#| export tasks/world
@functools.cache
def world_rows(name: str, data: str = "") -> list[dict]:
    """The rows of one file of the world's tasks; from the folder `data`, or from the world under base_dir()."""
    folder = Path(data) if data else base_dir() / "world" / "tasks"
    path = folder / f"{name}.jsonl"
    if not path.exists():
        raise NanochatError(f"no {name}.jsonl in {folder}: write the world's tasks with python -m nanochat_lib.world")
    return read_jsonl(path)


def problems(split: str, data: str, steps: tuple[int, ...] = (1, 2)) -> Task:
    return WordProblems([row for row in world_rows(f"problems_{split}", data) if row["steps"] in steps])


def letters(split: str, data: str) -> Task:
    """Counting letters: 3,000 questions on the training words, 200 on words that were never counted."""
    words = [row["word"] for row in world_rows(f"words_{split}", data)]
    return SpellingBee(bee_rows(words, *((200, 1) if split == "test" else (3000, 0)), QUESTIONS[:2]))


WORLD = {  # name → task of (split, data)
    "multiple_choice": lambda split, data: Quiz(world_rows(f"choice_{split}", data)),
    "letter_counting": letters,
    "spelling": lambda split, data: Spelling([row["word"] for row in world_rows(f"words_{split}", data)]),
    "word_problems_1": lambda split, data: problems(split, data, (1,)),
    "word_problems_2": lambda split, data: problems(split, data, (2,)),
    "facts": lambda split, data: Facts(world_rows(f"talk_{split}", data)),
    "world": problems,  # what reinforcement learning practises
    "world_identity": lambda split, data: Task(world_rows("identity", data)),
}
WORLD_TESTS = ("multiple_choice", "letter_counting", "spelling", "word_problems_1", "word_problems_2", "facts")

# %% [markdown]
# ## The mixture
#
# What a chat model is shown is what it becomes: talk in plenty, enough quizzes that it learns to bind letters to choices, enough
# calculator calls that it reaches for the tool. Small sets are repeated a few times.

# %%
#| export tasks/registry
"""Tasks by name, what SFT trains on, and what a chat model is graded on."""

# %%
#| export tasks/registry
import importlib
from collections.abc import Callable

from nanochat_lib.common import NanochatError, base_dir, print0
from nanochat_lib.tasks.arc import ARC
from nanochat_lib.tasks.common import Task, TaskMixture
from nanochat_lib.tasks.customjson import CustomJSON
from nanochat_lib.tasks.gsm8k import gsm8k
from nanochat_lib.tasks.humaneval import HumanEval
from nanochat_lib.tasks.mmlu import MMLU
from nanochat_lib.tasks.smoltalk import SmolTalk
from nanochat_lib.tasks.spellingbee import Spelling, SpellingBee, bee_rows, words_in
from nanochat_lib.tasks.world import WORLD, WORLD_TESTS


def problem_words(split: str, data: str) -> list[str]:
    """Words to spell: those of GSM8K's questions, so that nothing more need be fetched."""
    return words_in((row["question"] for row in gsm8k("train", data).rows), split)


def bee(split: str, data: str) -> Task:
    return SpellingBee(bee_rows(problem_words(split, data), *((256, 1) if split == "test" else (20_000, 0))))


TASKS: dict[str, Callable[[str, str], Task]] = {
    "smoltalk": SmolTalk,
    "mmlu": MMLU,
    "arc_easy": lambda split, data: ARC("Easy", split, data),
    "arc_challenge": lambda split, data: ARC("Challenge", split, data),
    "gsm8k": gsm8k,
    "humaneval": HumanEval,
    "spellingbee": bee,
    "simplespelling": lambda split, data: Spelling(problem_words(split, data)),
    **WORLD,
}
EVALUATED = {
    "default": {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge", "MMLU": "mmlu", "GSM8K": "gsm8k",
                "HumanEval": "humaneval", "SpellingBee": "spellingbee"},
    "world": {name: name for name in WORLD_TESTS},
}

# %%
#| export tasks/registry
def get_task(name: str, split: str = "test", data: str = "") -> Task:
    """A task by name (`GSM8K`, `arc-easy`, `word_problems_2`…), or a class of one's own as `module:Class`, called with
    the split. `data` is a folder to read from instead of the hub. NanochatError on unknown names."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)(split)
        except (ImportError, AttributeError) as error:
            raise NanochatError(f"no task {name} ({error}): name an importable module and a class in it") from None
    key = name.lower().replace("-", "_")
    if key not in TASKS:
        raise NanochatError(f"no task {name!r}: choose {', '.join(TASKS)}, or module:Class")
    if split not in ("train", "test", "validation", "auxiliary_train"):
        raise NanochatError(f"no split {split!r}: choose train or test")
    return TASKS[key](split, data)


def evaluation_tasks(mixture: str = "default", data: str = "") -> dict[str, Task]:
    """{name: task} of all that a mixture's chat model is graded on, test splits."""
    return {name: get_task(key, "test", data) for name, key in EVALUATED[known(mixture)].items()}


def known(mixture: str) -> str:
    if mixture not in EVALUATED:
        raise NanochatError(f"no mixture {mixture!r}: choose {', '.join(EVALUATED)}")
    return mixture

# %%
#| export tasks/registry
def identity() -> list[Task]:
    """Who the assistant is: one's own conversations in base_dir(), if there are any."""
    path = base_dir() / "identity_conversations.jsonl"
    if path.exists():
        return [CustomJSON(path)]
    print0(f"no {path}: the model will not be told who it is (one conversation a line)")
    return []


def mixture(name: str = "default", data: str = "", mmlu_epochs: int = 3, gsm8k_epochs: int = 4) -> TaskMixture:
    """The conversations SFT trains on. `data` is a folder to read from instead of the hub."""
    if known(name) == "world":
        repeats = {"multiple_choice": 2, "word_problems_1": 1, "word_problems_2": 1, "letter_counting": 1, "spelling": 2,
                   "facts": 1, "world_identity": 2}
        return TaskMixture([task for key, times in repeats.items() for task in [get_task(key, "train", data)] * times])
    return TaskMixture([
        get_task("smoltalk", "train", data),
        *[get_task("mmlu", "auxiliary_train", data)] * mmlu_epochs,
        *[get_task("gsm8k", "train", data)] * gsm8k_epochs,
        *identity() * 2,
        get_task("spellingbee", "train", data), get_task("simplespelling", "train", data),
    ])


def validation_mixture(name: str = "default", data: str = "") -> TaskMixture:
    """Held-out conversations of the same kinds, for bits per byte."""
    if known(name) == "world":
        return TaskMixture(list(evaluation_tasks("world", data).values()))
    return TaskMixture([get_task("smoltalk", "test", data), get_task("mmlu", "test", data)[:5200],
                        get_task("gsm8k", "test", data)[:420]])

# %%
#| export tasks/__init__
"""Everything a chat model learns from and is graded on."""

# %%
#| export tasks/__init__
from nanochat_lib.tasks.common import Task, TaskMixture, TaskSequence
from nanochat_lib.tasks.registry import evaluation_tasks, get_task, mixture, validation_mixture

__all__ = ["Task", "TaskMixture", "TaskSequence", "evaluation_tasks", "get_task", "mixture", "validation_mixture"]
