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
# *How does a base model become a chat model?* — 35 minutes, about one of them computing.
#
# A base model continues documents. Asked a question it may well add another question, for that is what documents do.
# Supervised fine-tuning (SFT) goes on training it, on conversations, and only on the words of the assistant.
# This lesson says what such a conversation is, where it comes from, how conversations become batches without waste,
# and how the chat model is graded.

# %%
#| default_exp tasks/common

# %% [markdown]
# ## What a task is
#
# Training data and exams have one form. A task is a list of conversations; item `i` is
# `{"messages": [{"role", "content"}, …]}`, whose last message is the answer to be learned. A task that can be
# graded says how: *categorical* (which of a few letters is likelier) or *generative* (let it write, then judge what it
# wrote), and it has a `reward` for reinforcement learning (lesson 10). A slice of a task is a task.

# %%
#| export
"""What a task is: conversations to learn from, and how an answer is judged; tasks put together; rows from files."""


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
from nanochat_lib.world_problems import LETTER_ALONE, quiz

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


class Practice(TaskMixture):
    """Graded tasks practised as one, the smaller ones repeated to come about as often as the largest."""

    eval_type = "generative"

    def __init__(self, tasks: Sequence[Task]):
        largest = max(map(len, tasks))
        super().__init__([task for task in tasks for _ in range(max(1, round(largest / max(len(task), 1))))])

    def __getitem__(self, index: int | slice) -> Any:
        found = super().__getitem__(index)
        return found if isinstance(index, slice) else {**found, "judge": self.pairs[index][0]}

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return self.tasks[conversation["judge"]].evaluate(conversation, answer)

    def reward(self, conversation: dict, answer: str) -> float:
        """What the task that the question is from pays for it."""
        return self.tasks[conversation["judge"]].reward(conversation, answer)

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
# The public sets live on the Hugging Face hub. The same classes read a local folder in the same format, and without
# a network the reader learns so within seconds (left alone, the hub's client tries for half a minute).

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
    """The files of a split, in a folder as on the hub or flat: train.jsonl, data/train-00000-of-00002.parquet."""
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
        raise NanochatError(f"cannot load {repo} ({config or 'default'}, {split}) from the hub or its cache "
                            f"({reason}): go online, or give --task-data DIR with {split}.jsonl or parquet files in "
                            f"DIR/{name}") from None


def load_rows(name: str, repo: str, split: str, config: str = "", data: str = "", files: str = "") -> Sequence[dict]:
    """Rows of a public set: from the folder `data`/`name` if `data` is given, else from the hub. `files` is the
    pattern of local file names where it is not the split."""
    if not data:
        return hub_rows(name, repo, split, config)
    folder = Path(data) / name
    found = find_files(folder, files or split, config)
    if not found:
        raise NanochatError(f"no {split}.jsonl or {split}-*.parquet in {folder}: put the files of {repo} there, or "
                            "leave --task-data away to fetch them")
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


def multiple_choice(question: str, choices: Sequence[str], letters: Sequence[str], answer: str,
                    respond: str = LETTER_ALONE) -> dict:
    """A quiz and its answer; worded as in the world's documents."""
    return conversation_of(quiz(question, choices, respond, letters), answer, letters=list(letters))


class ChoiceTask(Task):
    """A task answered by one letter."""

    eval_type = "categorical"
    baseline = 0.25

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return answer.strip() == conversation["messages"][-1]["content"]

# %%
riddle = multiple_choice("What is the pet of Leo?", ["turtle", "duck", "rabbit", "goat"], "ABCD", "B")
print(riddle["messages"][0]["content"])

# %% [markdown]
# ## Word problems and the calculator
#
# GSM8K's answers mark each calculation as `<<12/60=0.2>>`. That becomes a *python* part `12/60`, which the assistant
# must learn to write, and a *python_output* part `0.2`, which the calculator writes and nobody learns (lesson 08).

# %%
#| export tasks/gsm8k
"""Word problems worked out with calculator calls, answer after `#### `: GSM8K (Cobbe et al., arXiv 2110.14168)."""


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


from nanochat_lib.tasks.common import ChoiceTask, load_rows, multiple_choice

LETTERS = "ABCD"


class MMLU(ChoiceTask):
    """Rows of question, choices and the right one's index; `split` is auxiliary_train (99,842), validation or test."""

    def __init__(self, split: str = "auxiliary_train", data: str = ""):
        super().__init__(load_rows("mmlu", "cais/mmlu", split, "all", data), shuffle=True)

    def conversation(self, row: dict) -> dict:
        row = row.get("train") or row  # one of the hub's layouts nests the auxiliary rows
        return multiple_choice(row["question"], row["choices"], LETTERS, LETTERS[row["answer"]])

# %%
#| export tasks/arc
"""ARC: science questions from school, easy and challenging (Clark et al., arXiv 1803.05457)."""


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


from pathlib import Path

from nanochat_lib.common import NanochatError
from nanochat_lib.tasks.common import Task, fault_of, numbered_jsonl


def checked(path: Path) -> list[dict]:
    """The conversations of a file, if all are sound; else NanochatError with file, line and reason."""
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


import itertools
import random
import re
from collections import Counter
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

    def reward(self, conversation: dict, answer: str) -> float:
        """1 for the word; else half the share of letters that are right before the first wrong one, since a beginner
        who gets a long word never right has nothing to climb."""
        if self.evaluate(conversation, answer):
            return 1.0
        letters = conversation["messages"][-1]["content"].split()
        begun = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(letters, answer.split()))
        return 0.5 * len(list(begun)) / len(letters)

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


def even_rows(words: Sequence[str], count: int, question: str = QUESTIONS[0]) -> list[tuple]:
    """`count` rows to practise on: every letter about as often, 0 in an eighth of them, 1 in two fifths at most.

    A small model learns letter by letter, and rare ones late. And of real words three answers in four are 1: who always
    says 1 does well without counting, and reinforcement learning finds that out.
    """
    dice, rows, answers = random.Random(0), {}, Counter()
    holding = {letter: [word for word in words if letter in word] or words for letter in ALPHABET}
    for _ in range(50 * count):
        letter = dice.choice(ALPHABET)
        word = dice.choice(holding[letter] if dice.random() < 0.9 else words)
        answer = word.count(letter)
        if (word, letter) not in rows and answers[answer] < count * (0.4 if answer else 0.125):
            rows[word, letter] = question
            answers[answer] += 1
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
# HumanEval asks for a Python function and judges it by running its tests. What a model wrote is a stranger's program: it may fill the memory, never end,
# or delete files, mostly by mistake. It runs in a process of its own, which first shuts every door it can and then becomes the program. On Linux
# **namespaces** give it a disk on which there is nothing but the interpreter, no network, and process numbers of its own, so that all it starts ends with it.

# %%
#| export tasks/fence
"""The inside of `execution.run`: builds fences around an untrusted program, then becomes it. Only the standard library.

`execution` runs `main` in a process of its own, whose standard input is a socket. The program is read from there, and
the answer, FACTS, is a line of JSON for each thing there is to know. Between the two stands the watcher: it asks the
kernel for namespaces (own files, network and process numbers) and for a filter of system calls, then watches a child
that drops root, sets limits and becomes the program. The child does not inherit FACTS: what is told there is true.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import time

# %%
#| export tasks/fence
FACTS, TEXT, PROOF, NOBODY = 3, 10, 11, 65534
FENCES = ["files", "network", "processes"]
CLONE = {"files": 0x00020000, "network": 0x40000000, "processes": 0x20000000, "others": 0x0C000000}  # others: ipc, names
CLONE_NEWUSER, MS_REC_PRIVATE, MS_BIND_REC, MS_REMOUNT_BIND_RO, MNT_DETACH = 0x10000000, 0x44000, 0x5000, 0x1021, 2
NOSUID_NODEV, PIVOT_ROOT = 0x6, {"x86_64": 155, "aarch64": 41}
INSIDE = """
def main(write):
    import json, os, sys
    with os.fdopen(10) as text:
        program, proof = json.load(text)
    sys.argv, leave = ["program.py"], os._exit
    exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    write(11, proof.encode())
    try:
        sys.stdout.flush()
    finally:
        leave(0)
import os
main(os.write)
"""
PYTHON = os.path.realpath(sys.executable)
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments) -> int:
    """A C function; OSError if it fails."""
    arguments = [os.fsencode(a) if isinstance(a, str) else a for a in arguments]
    if (result := getattr(libc, name)(*arguments)) < 0:
        raise OSError(ctypes.get_errno(), f"{name}{arguments}: {os.strerror(ctypes.get_errno())}")
    return result


def tell(**facts) -> None:
    os.write(FACTS, (json.dumps(facts) + "\n").encode())

# %%
#| export tasks/fence
def view() -> list[str]:
    """What the program may see, read only: the interpreter, the libraries, four devices."""
    paths = {"/usr", "/lib", "/lib64", "/bin", os.path.realpath(sys.base_prefix), os.path.dirname(os.path.dirname(PYTHON))}
    paths |= {f"/dev/{name}" for name in ("null", "zero", "random", "urandom")}
    paths = {path for path in paths if os.path.exists(path) and not os.path.islink(path)}
    return sorted(path for path in paths if not any(path.startswith(f"{other}/") for other in paths))


def leave_the_house() -> None:
    """Namespaces of our own; OSError where the kernel does not allow them. Root needs no user namespace for the others."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", sum(CLONE.values()) | (CLONE_NEWUSER if uid else 0))
    if uid:
        for name, line in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)


def drop_root() -> None:
    """Root becomes a user whom nobody else is, so that the limit on processes counts ours alone."""
    if os.getuid() == 0:
        uid = NOBODY + int.from_bytes(os.urandom(3), "little")
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)

# %% [markdown]
# The private disk is built in memory: folders of the system are hung into it read only, and then it becomes the root. What is not hung in does not exist.

# %%
#| export tasks/fence
def build_root(visible: list[str]) -> None:
    """A root of our own in memory, with nothing in it but what is visible, and a folder /work of 16 MB."""
    links = {path: os.readlink(path) for path in ("/lib", "/lib64", "/bin") if os.path.islink(path)}
    call("mount", None, "/", None, MS_REC_PRIVATE, None)
    call("mount", "none", "/tmp", "tmpfs", NOSUID_NODEV, b"size=1m,mode=755")
    for path in visible:
        place = "/tmp" + path
        if os.path.isdir(path):
            os.makedirs(place, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.close(os.open(place, os.O_CREAT))
        call("mount", path, place, None, MS_BIND_REC, None)
        kept = os.statvfs(place).f_flag & 0x40F  # flags such as nosuid must stay as they are
        call("mount", None, place, None, MS_REMOUNT_BIND_RO | kept, None)
    for path, target in links.items():
        os.symlink(target, "/tmp" + path)
    for folder in ("/tmp/work", "/tmp/old"):
        os.mkdir(folder)
    call("mount", "none", "/tmp/work", "tmpfs", NOSUID_NODEV, b"size=16m,nr_inodes=1000,mode=777")
    call("syscall", PIVOT_ROOT[os.uname().machine], b"/tmp", b"/tmp/old")
    os.chdir("/")
    call("umount2", "/old", MNT_DETACH)
    os.rmdir("/old")
    call("mount", None, "/", None, MS_REMOUNT_BIND_RO | NOSUID_NODEV, None)
    os.chdir("/work")

# %% [markdown]
# Some system calls lead around a limit. Shared memory of System V (1983) belongs to no process and outlives the one that made it, so no process's limit
# counts it; and whoever makes a user namespace is root inside it, and may mount a disk in memory of any size. So the kernel gets a **filter**, a small
# program in its own bytecode that looks at the number of each call and answers for these few as if they had never been invented (Linux's seccomp).

# %%
#| export tasks/fence
CALLS = {  # machine → its number in filters; clone; shmget, msgget, unshare, clone3 (whose flags a filter cannot see)
    "x86_64": (0xC000003E, 56, (29, 68, 272, 435)),
    "aarch64": (0xC00000B7, 220, (194, 186, 97, 435)),
}


def filter_calls() -> None:
    """From here on there is no memory outside of processes and no new user namespace. OSError or KeyError if we can't."""
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: no program gives more rights
    machine, clone, forbidden = CALLS[os.uname().machine]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    yes, no = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x50000 | errno.ENOSYS)
    steps = [(load, 0, 0, 4), (equal, 1, 0, machine), no]  # (what, steps to skip if so, if not, value); else 32-bit calls
    steps += [(load, 0, 0, 0), (at_least, 0, 1, 1 << 30), no]  # the number; from here on those of another 32-bit mode
    for number in forbidden:
        steps += [(equal, 0, 1, number), no]
    steps += [(equal, 1, 0, clone), yes, (load, 0, 0, 16), (any_bit, 0, 1, CLONE_NEWUSER), no, yes]  # its first argument
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    call("prctl", 22, 2, struct.pack("HP", len(steps), ctypes.addressof(code)), 0, 0)  # PR_SET_SECCOMP, by a filter

# %% [markdown]
# Limits on memory, time, file size and processes hold for whatever is run from here on. The interpreter starts anew, so that nothing of ours is left in its
# memory, and the last thing it does is to hand in the proof that it reached the last line: `os._exit(0)` on the way does not pass.

# %%
#| export tasks/fence
def become(program: str, proof: str, pipe: int, settings: dict) -> None:
    """Set the limits and turn into an interpreter that runs the program. Does not return."""
    if settings["drop root"]:
        drop_root()
    limits = {"AS": settings["memory"] << 20, "CPU": settings["seconds"], "FSIZE": 1 << 20, "NOFILE": 64, "CORE": 0,
              "NPROC": settings["processes"]}
    text = os.memfd_create("program") if hasattr(os, "memfd_create") else os.open("program.json", os.O_RDWR | os.O_CREAT)
    os.write(text, json.dumps([program, proof]).encode())
    os.lseek(text, 0, os.SEEK_SET)
    os.dup2(text, TEXT)
    os.dup2(pipe, PROOF)  # these two go over into the program; FACTS and all others close
    for name, value in limits.items():
        if hasattr(resource, f"RLIMIT_{name}"):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    os.execve(PYTHON, [PYTHON, "-I", "-c", INSIDE, f"watched by {os.getppid()}"], {})

# %% [markdown]
# The **watcher** stays outside of the program. It alone knows how the child ended, compares what was handed in with the proof, and tells. Whatever the
# program writes, to whatever file it inherits, is never taken for a fact.

# %%
#| export tasks/fence
def end_children() -> None:
    """Kill all that the program left behind: orphans are our children, and each killed one hands us its own."""
    while True:
        for name in os.listdir("/proc") if os.path.exists("/proc/self") else ():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
                if name.isdigit() and parent == os.getpid():
                    os.kill(int(name), signal.SIGKILL)
            except (OSError, ValueError):
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if os.getpid() == 1:  # the kernel does it when we go
            return
        time.sleep(0.001)


def handed_in(pipe: int) -> bytes:
    """What stands in a pipe, at most 64 KiB, without waiting for more."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, 1 << 16)
    except BlockingIOError:
        return b""

# %%
#| export tasks/fence
def watch(program: str, settings: dict) -> None:
    """Run the program in a child and tell how it ended. If we are process 1, our end is the end of all it started."""
    proof, (reading, writing) = os.urandom(16).hex(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            become(program, proof, writing, settings)
        except BaseException as error:
            tell(broken=f"{type(error).__name__}: {error}")
        os._exit(1)
    os.close(writing)
    while True:
        pid, how = os.wait()
        if pid == child:
            break
    end_children()
    tell(proved=proof.encode() in handed_in(reading),
         **({"signal": os.WTERMSIG(how)} if os.WIFSIGNALED(how) else {"exit": os.WEXITSTATUS(how)}))
    os._exit(0)


def watch_without(missing: list[str], why: str, program: str, settings: dict) -> None:
    """Put up the filter, tell which fences are missing, and watch."""
    try:
        filter_calls()
        call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: a program of the same user does not look into us
    except (OSError, KeyError, AttributeError) as error:
        missing, why = [*missing, "calls"], why or str(error)
    tell(open=" ".join(missing), why=why)
    settings["drop root"] = "files" not in missing or settings["reachable"]
    watch(program, settings)

# %%
#| export tasks/fence
def main() -> None:
    os.dup2(0, FACTS, inheritable=False)
    program, settings = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if sys.platform != "linux":
        watch_without(FENCES, "not Linux", program, settings)
    call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become our children, and can be found
    try:
        if not settings["namespaces"]:
            raise OSError("not asked for")
        leave_the_house()
        init = os.fork()
    except OSError as error:
        settings["processes"] += settings["others"]
        watch_without(FENCES, str(error), program, settings)
    if init:
        os.waitpid(init, 0)
        os._exit(0)
    call("prctl", 1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: killed with our parent
    missing, why = [], ""
    try:
        build_root(view())
    except (OSError, KeyError) as error:
        missing, why = ["files"], str(error)
    watch_without(missing, why, program, settings)

# %% [markdown]
# From outside: start it, wait, end it with all its children, and say what happened.

# %%
#| export tasks/execution
"""Runs a small untrusted program in a process of its own, behind fences."""

import contextlib
import functools
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from nanochat_lib.common import print0

# %%
#| export tasks/execution
FENCE = importlib.util.find_spec("nanochat_lib.tasks.fence").origin
START = "import runpy, sys; runpy.run_path(sys.argv[1])['main']()"


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `reason` is "" if it ran to its last line, else what stopped it."""

    reason: str
    output: str  # what it printed, at most 10,000 characters
    open: tuple[str, ...] = ()  # fences this kernel did not give: "files", "network", "processes", "calls"
    why: str = ""  # why not

    @property
    def passed(self) -> bool:
        return not self.reason

# %%
#| export tasks/execution
def family(process: subprocess.Popen) -> list[psutil.Process]:
    """All living descendants of a process."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def memory_of(process: subprocess.Popen) -> int:
    """Bytes that a process and its descendants hold together."""
    total = 0
    for member in family(process):
        try:
            total += member.memory_info().rss
        except psutil.Error:
            pass
    return total


def strays(process: subprocess.Popen) -> list[psutil.Process]:
    """What a program that killed its watcher has left: the watcher's number is still on the command line."""
    mark = f"watched by {process.pid}"
    return [member for member in psutil.process_iter(["cmdline"]) if mark in (member.info["cmdline"] or ())]


def alive(member: psutil.Process) -> bool:
    try:
        return member.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(process: subprocess.Popen) -> None:
    """Kill a process with its group and all descendants; again, until none is left, since they may be forking."""
    for _ in range(100):
        members = family(process) + strays(process)
        for member in members:
            try:
                member.kill()
            except psutil.Error:
                pass
        if not any(map(alive, members)):
            break
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.kill()
    process.wait()

# %%
#| export tasks/execution
def wait(process: subprocess.Popen, timeout: float, memory: int) -> str:
    """Wait for the end of a process; "timeout" or "too much memory" (MiB) if it has to be ended."""
    begin = time.monotonic()
    while (passed := time.monotonic() - begin) < timeout:
        try:
            process.wait(min(0.05, timeout - passed))
            return ""
        except subprocess.TimeoutExpired:
            if passed > 0.3 and memory_of(process) > memory << 20:
                return "too much memory"
    return "timeout"

# %%
#| export tasks/execution
KINDS = {"open": str, "why": str, "broken": str, "proved": bool, "exit": int, "signal": int}


def read_facts(told: bytes) -> dict:
    """What the watcher told, of the kinds it tells; only where fences are missing can a program have a hand in it."""
    facts = {}
    for line in told.splitlines():
        try:
            facts.update({name: fact for name, fact in json.loads(line).items() if type(fact) is KINDS.get(name)})
        except (ValueError, AttributeError, RecursionError):
            pass
    return facts


def name_of(number: int) -> str:
    """A signal's name; `signal 40` for those that have none."""
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"


def reason_of(facts: dict, error: str) -> str:
    """What ended a program; "" if it reached its last line."""
    if "broken" in facts:
        return f"the fence failed: {facts['broken']}"
    if number := facts.get("signal"):
        late = number in (signal.SIGXCPU, signal.SIGKILL)  # the limit's own signals
        return "too much processor time" if late else f"killed by {name_of(number)}"
    if facts.get("exit") == 0:
        return "" if facts.get("proved") else "ended early, exit 0"
    lines = error.strip().splitlines()
    return lines[-1][:500] if lines else f"ended early, exit {facts.get('exit', 'unknown')}"

# %%
#| export tasks/execution
def others_may_run(path: str) -> bool:
    """Whether users other than the owner come to this file."""
    real = Path(path).resolve()
    return all(parent.stat().st_mode & 0o001 for parent in (real, *real.parents))


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A folder that is there for a while. `rm` goes deeper than Python can: a program may nest thousands of folders."""
    folder = tempfile.mkdtemp()
    try:
        yield folder
    finally:
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, folder], stderr=subprocess.DEVNULL)


def beginning(file: BinaryIO) -> bytes:
    """What stands in a file, at most 1 MiB."""
    file.seek(0)
    return file.read(1 << 20)

# %%
#| export tasks/execution
def run(program: str, timeout: float = 5.0, memory: int = 1024, processes: int = 16,
        namespaces: bool = True) -> Outcome:
    """Run a Python program behind fences and say how it ended. Never raises for what the program does.

    `timeout` in seconds of wall clock, `memory` in MiB (each process, and all together), `processes` counts threads
    too. The program has no input, an empty environment, 1 MiB for each file and for its output, and 64 open files.
    On Linux, where the kernel allows namespaces, it has no network, sees nothing of the disk but the interpreter and
    the system's libraries (read only), writes only to a folder in memory, and everything it starts ends with it.
    Where the kernel does not, `Outcome.open` names the fences that are missing, and only the limits and the hunt for
    its children are left; root then stays root if others cannot reach the interpreter.

    Limits, honestly: the kernel is the wall, and a hole in it is a hole in the fence; the filter forbids four system
    calls (x86-64 and ARM) and no more. A program that looks for the proof of its last line inside its own process can
    find it: "passed" is for programs that are wrong, not for programs that cheat. The sum of memory is looked at every
    50 ms. Without namespaces a program of the same user may kill its watcher; what it leaves is then found by its
    command line, unless it changes that. For the code of an enemy use a virtual machine.
    """
    root = hasattr(os, "getuid") and os.getuid() == 0
    settings = {"memory": memory, "seconds": int(timeout) + 1, "processes": processes, "namespaces": namespaces,
                "reachable": others_may_run(sys.executable), "others": len(psutil.pids())}
    ours, theirs = socket.socketpair()
    with scratch() as folder, ours, theirs, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if root:
            os.chmod(folder, 0o777)  # the program will be nobody's
        ours.settimeout(timeout)
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", START, FENCE], cwd=folder, env={}, stdin=theirs,
                                   stdout=out, stderr=err, start_new_session=True)
        try:
            theirs.close()
            with contextlib.suppress(OSError):  # it has ended already: what it told says why
                ours.sendall(json.dumps([program, settings]).encode())
                ours.shutdown(socket.SHUT_WR)
            reason = wait(process, timeout, memory)
        finally:
            end(process)
        try:
            facts = read_facts(ours.recv(1 << 16))
        except OSError:
            facts = {}
        reason = reason or reason_of(facts, beginning(err).decode(errors="replace"))
        missing = tuple(facts.get("open", "unknown").split())
        return Outcome(reason, beginning(out)[:10_000].decode(errors="replace"), missing, facts.get("why", ""))

# %%
#| export tasks/execution
def run_program(program: str, timeout: float = 5.0, memory: int = 1024) -> str:
    """`run`, and only its reason: "" if the program got to its last line."""
    return run(program, timeout, memory).reason


@functools.cache
def fences_missing() -> tuple[str, ...]:
    """The fences that programs run without on this machine; says so, once."""
    outcome = run("", 30)
    if outcome.open:
        print0(f"programs run here without fences around {', '.join(outcome.open)} ({outcome.why}): for a model you do not "
               "trust use a virtual machine")
    return outcome.open

# %%
# NBVAL_IGNORE_OUTPUT
from nanochat_lib.tasks.execution import run

for program in ("assert sum([1, 2]) == 3", "assert sum([1, 2]) == 4, 'wrong sum'", "import sys\nsys.exit(0)", "while True: pass",
                "x = bytearray(2**33)", "open('/etc/passwd')"):
    print(f"{program!r:45} {run(program, timeout=3).reason or 'passed'}")
print("fences missing on this machine:", ", ".join(run("").open) or "none")

# %%
#| export tasks/humaneval
"""HumanEval: write a Python function that passes its tests (Chen et al., arXiv 2107.03374)."""


import re

from nanochat_lib.tasks.common import Task, conversation_of, load_rows
from nanochat_lib.tasks.execution import fences_missing, run_program

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
        only goes on with the function's body is joined to its beginning. Where fences are missing, a line says so."""
        fences_missing()
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


import functools
import re
from pathlib import Path

from nanochat_lib.common import NanochatError, base_dir
from nanochat_lib.tasks.common import ChoiceTask, Task, multiple_choice, read_jsonl
from nanochat_lib.tasks.gsm8k import WordProblems
from nanochat_lib.tasks.spellingbee import QUESTIONS, Spelling, SpellingBee, bee_rows, even_rows
from nanochat_lib.world_facts import Dice
from nanochat_lib.world_problems import ALOUD, blend

LETTERS = "ABCD"


class LetterQuiz(ChoiceTask):
    """Who is who, with four choices, answered by the letter alone."""

    def conversation(self, row: dict) -> dict:
        return multiple_choice(row["question"], row["choices"], LETTERS, LETTERS[row["answer"]])


class Quiz(Task):
    """The same answered aloud, `Leo keeps a turtle=A`: the choice is recalled first, and then its letter looked up."""

    eval_type, baseline = "generative", 0.25

    def conversation(self, row: dict) -> dict:
        answer = f"{row['said']}={LETTERS[row['answer']]}"
        return multiple_choice(row["question"], row["choices"], LETTERS, answer, ALOUD)

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Whether the letter is right, whatever is said before it."""
        return answer.strip()[-1:] == conversation["messages"][-1]["content"][-1]


class Facts(Task):
    """Conversations about people; right is an answer that holds the last fact's value as a word of its own."""

    eval_type = "generative"

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return re.search(rf"\b{re.escape(conversation['answer'])}\b", answer) is not None

# %%
#| export tasks/world
read_once = functools.cache(read_jsonl)  # several tasks share a file


def world_rows(name: str, data: str = "") -> list[dict]:
    """The rows of one file of the world's tasks; from the folder `data`, or from the world under base_dir()."""
    folder = Path(data) if data else base_dir() / "world" / "tasks"
    path = folder / f"{name}.jsonl"
    if not path.exists():
        raise NanochatError(f"no {name}.jsonl in {folder}: write the world's tasks with python -m nanochat_lib.world")
    return read_once(path)


def problems(split: str, data: str, steps: tuple[int, ...] = (1, 2)) -> Task:
    return WordProblems([row for row in world_rows(f"problems_{split}", data) if row["steps"] in steps])


def words_of(split: str, data: str) -> list[str]:
    return [row["word"] for row in world_rows(f"words_{split}", data)]


def words_to_spell(split: str, data: str) -> list[str]:
    """To test: words never asked for in training. To train on: the others, and some nine times as many made-up ones.

    Who is shown five hundred words learns a list; who spells `mapg` right has learned what tokens are made of. A token
    that is in no word shown can't be spelled by anyone: so every word, also those of the test, begins two made-up ones.
    """
    words, dice = words_of(split, data), Dice(0)
    if split == "test":
        return words
    made = [blend(dice, words) for _ in range(7 * len(words))]
    real = words + words_of("test", data)
    made += [word + dice.pick(words)[-dice.between(1, 4):] for word in 2 * real]
    return words + dice.shuffled(dict.fromkeys(word for word in made if word not in real))


def letters(split: str, data: str) -> Task:
    """Counting letters: 3,000 questions to train on, 200 on words that were never counted."""
    words = words_to_spell(split, data)
    return SpellingBee(bee_rows(words, 200, 1, QUESTIONS[:1]) if split == "test" else even_rows(words, 3000))

# %%
#| export tasks/world
def spelling(split: str, data: str) -> Task:
    return Spelling(words_to_spell(split, data))


WORLD = {  # name → task of (split, data)
    "multiple_choice": lambda split, data: Quiz(world_rows(f"choice_{split}", data)),
    "multiple_choice_letter": lambda split, data: LetterQuiz(world_rows(f"choice_{split}", data)),
    "letter_counting": letters,
    "spelling": spelling,
    "word_problems_1": lambda split, data: problems(split, data, (1,)),
    "word_problems_2": lambda split, data: problems(split, data, (2,)),
    "facts": lambda split, data: Facts(world_rows(f"talk_{split}", data)),
    "world": problems,
    "recitals": lambda split, data: Task(world_rows("recitals", data)),
    "world_identity": lambda split, data: Task(world_rows("identity", data)),
}
WORLD_TESTS = ("multiple_choice", "multiple_choice_letter", "letter_counting", "spelling", "word_problems_1",
               "word_problems_2", "facts")

# %%
import tempfile

from nanochat_lib.tasks.world import WORLD_TESTS
from nanochat_lib.tasks.world import WORLD as world_tasks
from nanochat_lib.world import World
from nanochat_lib.world_tasks import write_tasks

folder = tempfile.mkdtemp()
write_tasks(World(1), Path(folder))
for name in WORLD_TESTS:
    example = world_tasks[name]("test", folder)[3]["messages"]
    print(f"{name}: {example[-2]['content'].splitlines()[0]}")

# %% [markdown]
# ## The mixture
#
# What a chat model is shown is what it becomes: talk in plenty, quizzes so that it answers with a letter,
# enough calculator calls that it reaches for the tool. Small sets are repeated a few times. And what it is no longer
# shown, it forgets: asked for seven in ten facts, the model of the world loses a third of the others. Recitals
# (`Tell me about Anna.`, `Spell some words.`) ask for none and tell them all, and it keeps them.

# %%
#| export tasks/registry
"""Tasks by name, what SFT trains on, and what a chat model is graded on."""


import importlib
from collections.abc import Callable

from nanochat_lib.common import NanochatError, base_dir, print0
from nanochat_lib.tasks.arc import ARC
from nanochat_lib.tasks.common import Practice, Task, TaskMixture
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
    the split, or several joined by `|`. `data` is a folder to read from instead of the hub. NanochatError on unknown
    names."""
    if "|" in name:
        return Practice([get_task(each, split, data) for each in name.split("|")])
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
WORLD_SHARES = {  # task → (conversations at most, times)
    "multiple_choice": (5000, 1), "multiple_choice_letter": (500, 1), "letter_counting": (3000, 2),
    "spelling": (4000, 1), "facts": (2000, 1), "recitals": (2400, 1), "world_identity": (1000, 2),
    # with all 5,000 problems SFT alone gets every one right, and reinforcement learning has nothing left to show
    "word_problems_1": (500, 1), "word_problems_2": (130, 1),
}


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
        return TaskMixture([task for key, (most, times) in WORLD_SHARES.items()
                            for task in [get_task(key, "train", data)[:most]] * times])
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


from nanochat_lib.tasks.common import Task, TaskMixture, TaskSequence
from nanochat_lib.tasks.registry import evaluation_tasks, get_task, mixture, validation_mixture

__all__ = ["Task", "TaskMixture", "TaskSequence", "evaluation_tasks", "get_task", "mixture", "validation_mixture"]

# %%
from nanochat_lib.tasks import mixture

to_learn = mixture("world", folder)
print(f"{len(to_learn):,} conversations, the first: {to_learn[0]['messages'][0]['content']}")

# %% [markdown]
# ## What is learned of a conversation
#
# Lesson 02 turned a conversation into tokens and a mask. Here is one with its calculator calls: **green is learned**,
# grey is only read. The question is the user's, the calculator's result is the calculator's; a model trained to write
# either would learn to talk to itself and to make up results. The markers that hand over the word are learned too:
# without `<|assistant_end|>` it would never stop, without `<|python_start|>` never calculate.

# %%
# NBVAL_IGNORE_OUTPUT
import html

from IPython.display import HTML

from nanochat_lib.course.models import ready
from nanochat_lib.tokenizer import load_tokenizer


def coloured(tokenizer, ids, mask) -> HTML:
    """Tokens as boxes, green where learned."""
    style = "color:#222;margin:1px;padding:1px 3px;border-radius:3px;white-space:pre;background:"
    texts = (html.escape(tokenizer.id_to_token(token)).replace("\n", "↵") for token in ids)
    boxes = (f'<span style="{style}{"#9fdca8" if learn else "#e4e4e4"}">{text}</span>'
             for text, learn in zip(texts, mask))
    return HTML(f'<div style="line-height:1.9;font-family:monospace">{"".join(boxes)}</div>')


ready("sft")
tokenizer = load_tokenizer()
example = world_tasks["word_problems_2"]("test", folder)[3]
coloured(tokenizer, *tokenizer.render_conversation(example))

# %% [markdown]
# ## From conversations to batches
#
# Rows of a batch have one length, conversations have not. Cropping would tear answers off, so a row is packed best-fit
# from a buffer of 100 conversations, the longest that fits, again and again, and what no conversation fills is padded
# with the target −1, which the loss ignores. Every conversation is used once before any is used again.

# %%
#| export tasks/packing
"""Batches of conversations: packed best-fit, padded, only the assistant's tokens as targets."""


from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat_lib.common import NanochatError
from nanochat_lib.dataloader import BestFit
from nanochat_lib.tasks.common import TaskSequence


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens, cut to the row; `index` is its place in the task."""

    index: int
    ids: list[int]
    mask: list[int]
    cut: bool

    def __len__(self) -> int:
        return len(self.ids)

# %%
#| export tasks/packing
class ConversationLoader:
    """Endless batches (inputs, targets), each (batch_size, seq_len) int64, of this rank's share of a task.

    Targets are −1 on all that the assistant need not learn and on padding; every row holds at least one target.
    Conversations of more than seq_len + 1 tokens are cut, and those left without a target dropped: `cut` and `dropped`
    count them. `state` is what `state()` gave, or the list of all ranks' states, also of another number of ranks.
    """

    def __init__(self, tokenizer: Any, task: TaskSequence, batch_size: int, seq_len: int, rank: int = 0,
                 world_size: int = 1, device: torch.device | str = "cpu", buffer_size: int = 100,
                 state: dict | Sequence[dict] | None = None):
        if len(task) < world_size:
            raise NanochatError(f"{len(task)} conversations for {world_size} processes: give more, or start fewer")
        self.tokenizer, self.task, self.device = tokenizer, task, device
        self.batch_size, self.capacity, self.buffer_size = batch_size, seq_len + 1, buffer_size
        self.rank, self.world_size = rank, world_size
        self.share: Sequence[int] = range(rank, len(task), world_size)
        self.buffer, self.epoch, self.cursor, self.cut, self.dropped = BestFit(), 0, 0, 0, 0
        if state:
            self.go_to(state)

    def state(self) -> dict[str, Any]:
        """Where the loader stands; a loader made with it goes on exactly there."""
        share = None if isinstance(self.share, range) else self.share
        return {"epoch": self.epoch, "cursor": self.cursor, "cut": self.cut, "dropped": self.dropped, "share": share,
                "buffer": [rendered.index for rendered in self.buffer]}

    def go_to(self, state: dict | Sequence[dict]) -> None:
        """Stand where a state says; what another number of ranks had left of a pass is dealt anew."""
        if isinstance(state, dict) or len(state) == self.world_size:
            state = state if isinstance(state, dict) else state[self.rank]
            self.share = state["share"] or self.share
            for index in state["buffer"]:
                self.buffer.add(self.render(index))
            self.epoch, self.cursor = state["epoch"], state["cursor"]
            self.cut, self.dropped = state["cut"], state["dropped"]
            return
        self.epoch, left = min(old["epoch"] for old in state), []
        for rank, old in enumerate(state):
            if old["epoch"] == self.epoch:
                share = old["share"] or range(rank, len(self.task), len(state))
                left += [*old["buffer"], *share[old["cursor"]:]]
        self.share = sorted(left)[self.rank::self.world_size]
        if self.rank == 0:
            self.cut, self.dropped = sum(old["cut"] for old in state), sum(old["dropped"] for old in state)

    @property
    def passes(self) -> float:
        """Passes over the share so far; 1 exactly when each of its conversations has been packed once."""
        left = len(self.share) - self.cursor + len(self.buffer)
        return self.epoch + (1.0 - left * self.world_size / len(self.task) if left else 1.0)

    def render(self, index: int) -> Rendered:
        ids, mask = self.tokenizer.render_conversation(self.task[index], max_tokens=self.capacity + 1)
        return Rendered(index, ids[:self.capacity], mask[:self.capacity], len(ids) > self.capacity)

    def fill(self) -> None:
        """Keep `buffer_size` conversations waiting, as long as this pass has more."""
        while len(self.buffer) < self.buffer_size and self.cursor < len(self.share):
            rendered = self.render(self.share[self.cursor])
            learns = any(rendered.mask[1:])
            if learns:
                self.buffer.add(rendered)
            self.cut += self.epoch == 0 and rendered.cut
            self.dropped += self.epoch == 0 and not learns
            self.cursor += 1

    def row(self) -> tuple[list[int], list[int]]:
        """One packed row: ids and mask of seq_len + 1 tokens. No row holds parts of two passes."""
        self.fill()
        if not len(self.buffer):
            self.epoch, self.cursor, self.share = self.epoch + 1, 0, range(self.rank, len(self.task), self.world_size)
            self.fill()
            if not len(self.buffer):
                raise NanochatError(f"no conversation has a word of the assistant within {self.capacity} tokens: "
                                    "give shorter conversations or a larger --max-seq-len")
        ids, mask = [], []
        while (found := self.buffer.take(self.capacity - len(ids), crop=False)) is not None:
            ids, mask = ids + found.ids, mask + found.mask
            self.fill()
        padding = self.capacity - len(ids)
        return ids + padding * [self.tokenizer.get_bos_token_id()], mask + padding * [0]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self.row() for _ in range(self.batch_size)]
        ids, mask = (torch.tensor(part, device=self.device) for part in zip(*rows))
        return ids[:, :-1].contiguous(), torch.where(mask[:, 1:] == 1, ids[:, 1:], -1)

# %% [markdown]
# Two batches from the same conversations: above, each row takes them as they come; below, the longest that fits out of
# 100. White is padding: computed, paid for, learned from by nobody.

# %%
# NBVAL_IGNORE_OUTPUT
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

from nanochat_lib.tasks.packing import ConversationLoader

figure, axes = plt.subplots(2, 1, figsize=(9, 3.6), sharex=True, layout="constrained")
for axis, size, title in zip(axes, (1, 100), ("as they come", "best fit of 100")):
    rows = torch.tensor([loader.row() for loader in [ConversationLoader(
        tokenizer, to_learn, 1, 256, buffer_size=size)] for _ in range(14)])  # (14, ids and mask, 257)
    ids, learned = rows[:, 0], rows[:, 1]
    which = (ids == tokenizer.get_bos_token_id()).cumsum(1)  # number of the conversation within the row
    padding = (ids == tokenizer.get_bos_token_id()) & (ids.roll(-1, 1) == ids)
    picture = torch.where(padding.flip(1).cumprod(1).flip(1) == 1, 0, 1 + 2 * (which % 2) + learned)
    axis.imshow(picture, aspect="auto", interpolation="none", vmin=0, vmax=4,
                cmap=ListedColormap(["white", "#dddddd", "#7fc98b", "#bbbbbb", "#3d9a57"]))
    axis.set(title=f"{title}: {(picture == 0).float().mean():.0%} padding", ylabel="row")
_ = axes[1].set_xlabel("position in tokens; green is learned, the shade changes with the conversation")

# %%
#| export tasks/packing
def one_pass(loader: ConversationLoader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches until every conversation has been seen once."""
    while loader.passes < 1:
        yield next(loader)

# %% [markdown]
# ## Grading
#
# A categorical question costs one forward pass: after `<|assistant_start|>`, which of the letters has the highest
# logit? Only the letters compete, so that a model that would rather say something else is graded on what it knows.
# Generative questions of all tasks go through the engine in one continuously refilled batch. Ranks share the questions.
#
# Tasks differ in what guessing earns; *ChatCORE* is the mean of (a − b)/(1 − b), accuracy centred on the guess.

# %%
#| export tasks/evaluate
"""Grades a chat model: letters by their logits, answers by generation, questions shared by all ranks."""


import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nanochat_lib.batch import Completion
from nanochat_lib.common import NanochatError, Runtime, gather
from nanochat_lib.engine import Engine
from nanochat_lib.scoring import Row, score_rows
from nanochat_lib.tasks.common import Task


@dataclass(frozen=True)
class Answer:
    """One question, what the model said (once or more often), and what was right."""

    task: str
    index: int
    question: str
    expected: str
    answers: list[str]
    right: list[bool]
    calls: list[str]  # of each answer: "" without a call of the calculator, "answered", or "failed"


@dataclass(frozen=True)
class Asking:
    """How questions are asked."""

    temperature: float = 0.0
    top_k: int | None = 50
    max_new_tokens: int = 512
    num_samples: int = 1
    batch_size: int = 8  # of categorical questions
    seed: int = 42

# %%
#| export tasks/evaluate
@torch.inference_mode()
def choose_letters(model: Any, tokenizer: Any, conversations: list[dict], batch_size: int = 8) -> list[str]:
    """For each categorical conversation the letter the model thinks likeliest at the answer's position."""
    context, device = model.config.sequence_len, next(model.parameters()).device
    prompts = [tokenizer.render_for_completion(conversation)[-context:] for conversation in conversations]
    letters = [[tokenizer.encode(letter) for letter in conversation["letters"]] for conversation in conversations]
    chosen = [""] * len(prompts)
    simple = [i for i in range(len(prompts)) if all(len(ids) == 1 for ids in letters[i])]
    simple.sort(key=lambda i: len(prompts[i]))  # batches of like length waste little on padding
    for start in range(0, len(simple), batch_size):
        batch = simple[start:start + batch_size]
        width = len(prompts[batch[-1]])
        padded = torch.tensor([prompts[i] + [0] * (width - len(prompts[i])) for i in batch], device=device)
        logits = model(padded)  # (B, T, vocab); what stands to the right of a prompt cannot change it
        for row, i in enumerate(batch):
            scores = logits[row, len(prompts[i]) - 1, [ids[0] for ids in letters[i]]]
            chosen[i] = conversations[i]["letters"][int(scores.argmax())]
    for i in set(range(len(prompts))) - set(simple):  # a letter of several tokens: compare whole probabilities
        whole = [[*prompts[i], *ids][-context - 1:] for ids in letters[i]]
        rows = [Row(ids, len(ids) - len(letter), len(ids)) for ids, letter in zip(whole, letters[i])]
        nats = [loss * (row.end - row.start) for row, (loss, _) in zip(rows, score_rows(model, rows, device, 2**16))]
        chosen[i] = conversations[i]["letters"][nats.index(min(nats))]
    return chosen

# %%
#| export tasks/evaluate
def text_of(content: str | list[dict]) -> str:
    """An answer as a reader sees it; calculator calls between « »."""
    if isinstance(content, str):
        return content
    marks = {"text": "{}", "python": "«{}", "python_output": "={}»"}
    return "".join(marks[part["type"]].format(part["text"]) for part in content)


def record(name: str, index: int, conversation: dict, answers: list[str], right: list[bool],
           calls: list[str]) -> Answer:
    *_, question, expected = conversation["messages"]
    return Answer(name, index, question["content"], text_of(expected["content"]), answers, right, calls)


def calls_in(completion: Completion, engine: Engine) -> str:
    """"answered" if the calculator answered every call of an answer, "failed" if not, "" if it made none."""
    made = completion.tokens.count(engine.python_start)
    answered = sum(token == engine.output_start and not own for token, own in zip(completion.tokens, completion.mask))
    return ("answered" if made == answered else "failed") if made else ""


def ask(model: Any, tokenizer: Any, tasks: dict[str, Task], asking: Asking, runtime: Runtime,
        progress: bool = False) -> list[Answer]:
    """Ask every question of every task once; the answers of all ranks, in order, on every rank."""
    for name, task in tasks.items():
        if task.eval_type not in ("categorical", "generative"):
            raise NanochatError(f"task {name} cannot be graded: its eval_type is {task.eval_type!r}")
    mine = [(name, i) for name, task in tasks.items() for i in range(len(task))][runtime.rank::runtime.world_size]
    found = {pair: tasks[pair[0]][pair[1]] for pair in mine}
    answers = []
    lettered = [pair for pair in mine if tasks[pair[0]].eval_type == "categorical"]
    letters = choose_letters(model, tokenizer, [found[pair] for pair in lettered], asking.batch_size)
    for pair, letter in zip(lettered, letters):
        right = tasks[pair[0]].evaluate(found[pair], letter)
        answers.append(record(*pair, found[pair], [letter], [bool(right)], [""]))
    written = [pair for pair in mine if tasks[pair[0]].eval_type == "generative"]
    engine = Engine(model, tokenizer)
    completions = engine.generate_many(
        [tokenizer.render_for_completion(found[pair]) for pair in written], asking.num_samples, asking.max_new_tokens,
        asking.temperature, asking.top_k, asking.seed, progress=progress)
    for pair, samples in zip(written, completions):
        texts = [tokenizer.decode(sample.tokens) for sample in samples]
        right = [bool(tasks[pair[0]].evaluate(found[pair], text)) for text in texts]
        calls = [calls_in(sample, engine) for sample in samples]
        answers.append(record(*pair, found[pair], texts, right, calls))
    order = {name: place for place, name in enumerate(tasks)}
    return sorted((answer for part in gather(answers) for answer in part), key=lambda a: (order[a.task], a.index))

# %%
#| export tasks/evaluate
def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that one of k answers drawn from `samples`, of which `right` are right, is right (arXiv 2107.03374)."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def grade(tasks: dict[str, Task], answers: list[Answer]) -> dict[str, Any]:
    """{"tasks": {name: accuracy}, "centered", "chance", "counts", "chatcore", "pass_at_k": {name: [k=1, 2, …]},
    "calculator": {name: part of the answers with calls, all of them answered}}; the last for tasks that use it.

    With several samples an answer counts as right if any of them is.
    """
    by_task = {name: [answer.right for answer in answers if answer.task == name] for name in tasks}
    by_task = {name: rights for name, rights in by_task.items() if rights}
    accuracy = {name: sum(map(any, rights)) / len(rights) for name, rights in by_task.items()}
    chance = {name: tasks[name].baseline for name in by_task}
    centered = {name: (accuracy[name] - chance[name]) / (1 - chance[name]) for name in by_task}
    curves = {name: [sum(pass_at_k(len(right), sum(right), k) for right in rights) / len(rights)
                     for k in range(1, len(rights[0]) + 1)] for name, rights in by_task.items() if len(rights[0]) > 1}
    calls = {name: [call for answer in answers if answer.task == name for call in answer.calls] for name in by_task}
    calls = {name: made for name, made in calls.items() if "answered" in made}
    return {"tasks": accuracy, "centered": centered, "chance": chance,
            "calculator": {name: made.count("answered") / len(made) for name, made in calls.items()},
            "counts": {name: len(rights) for name, rights in by_task.items()},
            "chatcore": sum(centered.values()) / len(centered) if centered else 0.0, "pass_at_k": curves}


def evaluate_chat(model: Any, tokenizer: Any, tasks: dict[str, Task], asking: Asking, runtime: Runtime,
                  progress: bool = False) -> tuple[dict[str, Any], list[dict]]:
    """Grades and all answers (as dicts) of a chat model on some tasks; every rank must call it."""
    training = model.training
    model.eval()
    answers = ask(model, tokenizer, tasks, asking, runtime, progress)
    model.train(training)
    return grade(tasks, answers), [asdict(answer) for answer in answers]

# %% [markdown]
# Both models, the same questions. The base model has never seen the markers of a chat: their embeddings are as they
# were initialized. How many of a hundred quizzes does each get right, and what do they say?

# %%
# NBVAL_IGNORE_OUTPUT
from nanochat_lib.checkpoint import load_model
from nanochat_lib.engine import Engine
from nanochat_lib.tasks.evaluate import choose_letters

asked = [conversation_of(text, "") for text in ("Who are you?", "Where does Cleo live?", "How many n are in banana?")]
asked.append(world_tasks["word_problems_1"]("test", folder)[0])
alone, aloud = (world_tasks[name]("test", folder)[:100] for name in ("multiple_choice_letter", "multiple_choice"))
answers = {}
for stage in ("base", "sft"):
    model, tokenizer, _ = load_model(stage, "cpu")
    prompts = [tokenizer.render_for_completion(one) for one in [*asked, *aloud]]
    completions = Engine(model, tokenizer).generate_many(prompts, max_tokens=48, temperature=0.0)
    said = [tokenizer.decode(samples[0].tokens) for samples in completions]
    answers[stage] = said[:len(asked)]
    letters = choose_letters(model, tokenizer, list(alone), batch_size=32)
    by_letter = sum(map(alone.evaluate, alone, letters))
    by_sentence = sum(map(aloud.evaluate, aloud, said[len(asked):]))
    print(f"{stage}: right by the letter alone {by_letter}, by the answer and its letter {by_sentence}, of {len(aloud)}")

# %% [markdown]
# A letter alone is the hardest answer here. The model must recall a value and find its letter among the choices, two
# lookups in a row before a single token; the laptop's four layers learn each of the two in ten minutes, and stay at one
# in four for both together. Large models do learn it: MMLU and ARC are graded that way. Asked for the answer *and* its
# letter the same model does well, for every token that is written down can be looked up again. Chain of thought
# (Wei et al., arXiv 2201.11903) at its smallest: a sentence of thinking.

# %%
# NBVAL_IGNORE_OUTPUT
rows = zip((one["messages"][0]["content"] for one in asked), answers["base"], answers["sft"])
style = "text-align:left;vertical-align:top"
cells = ("".join(f"<td style='{style}'>{html.escape(text)}</td>" for text in row) for row in rows)
HTML("<table><tr><th>asked</th><th>base model</th><th>after SFT</th></tr>"
     + "".join(f"<tr>{cell}</tr>" for cell in cells) + "</table>")

# %% [markdown]
# ## What each part of the mixture teaches
#
# Leave a part out and see what is missing. Four runs of a few seconds from the same base model: on everything, without
# the word problems (the only ones that call the calculator), without quizzes, and without talk about people. Held-out
# questions tell the difference.

# %%
# NBVAL_IGNORE_OUTPUT
import copy

from nanochat_lib.tasks import TaskMixture
from nanochat_lib.tasks.evaluate import calls_in

PARTS = {"multiple_choice": 500, "word_problems_1": 300, "facts": 500, "letter_counting": 200}  # conversations at most
base, tokenizer, _ = load_model("base", "cpu", "train")


def fine_tune(names, steps=24):
    """A copy of the base model after a few small steps on these tasks."""
    tuned = copy.deepcopy(base)
    shown = TaskMixture([world_tasks[name]("train", folder)[:PARTS[name]] for name in names])
    optimizer = tuned.setup_optimizer(unembedding_lr=0.002, embedding_lr=0.05, matrix_lr=0.006, scalar_lr=0.05)
    for step, (inputs, targets) in zip(range(steps), ConversationLoader(tokenizer, shown, 4, 256)):
        tuned(inputs, targets).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1, 2 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad()
    return tuned.eval()


def habits(tuned, count=40):
    """What a model does with `count` held-out questions of each kind, greedily; shares."""
    engine, said, right = Engine(tuned, tokenizer), {}, {}
    for name in ("word_problems_1", "multiple_choice", "facts"):
        task = world_tasks[name]("test", folder)[:count]
        prompts = [tokenizer.render_for_completion(one) for one in task]
        said[name] = [answer for answer, in engine.generate_many(prompts, max_tokens=48, temperature=0.0)]
        right[name] = sum(task.evaluate(one, tokenizer.decode(a.tokens)) for one, a in zip(task, said[name])) / count
    return {"calls the calculator": sum(calls_in(a, engine) == "answered" for a in said["word_problems_1"]) / count,
            "word problems right": right["word_problems_1"], "facts right": right["facts"],
            "a letter to a quiz": sum("=" in tokenizer.decode(a.tokens)[-2:] for a in said["multiple_choice"]) / count}


left_out = {"all of it": None, "no tool data": "word_problems_1", "no quizzes": "multiple_choice", "no talk": "facts"}
found = {label: habits(fine_tune([name for name in PARTS if name != part])) for label, part in left_out.items()}

figure, axes = plt.subplots(1, 4, figsize=(11, 2), sharey=True, layout="constrained")
for axis, habit in zip(axes, found["all of it"]):
    values = [shares[habit] for shares in found.values()]
    bars = axis.barh(list(found), values, color=["C0" if value > 0.5 else "C3" for value in values])
    axis.bar_label(bars, fmt="%.2f", padding=2)
    axis.set(title=habit, xlim=(0, 1.25), xticks=(0, 0.5, 1))
_ = axes[0].invert_yaxis()

# %% [markdown]
# A habit is learned from a few hundred examples and from nothing else: what is not in the mixture is not in the model.
# What a model *knows* is another matter. It knew the people before, and most of what it says about them it has from
# pretraining.
#
# The laptop's model can be asked GSM8K and HumanEval too (`chat_eval -a "GSM8K|HumanEval" --task-data DIR`), and scores
# 0: guessing earns nothing there, and one million parameters and a small town teach neither English nor Python. It runs
# the same code that grades a real model.

# %% [markdown]
# ## The command `chat_eval`

# %%
#| export scripts/chat_eval
"""Grades a chat model task by task; every answer is kept for reading."""


import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nanochat_lib.checkpoint import load_model, write_result
from nanochat_lib.common import NanochatError, base_dir, print0, run_cli, start, write_aside
from nanochat_lib.tasks import Task, evaluation_tasks, get_task
from nanochat_lib.tasks.evaluate import Asking, evaluate_chat
from nanochat_lib.tasks.execution import fences_missing
from nanochat_lib.tasks.humaneval import HumanEval


def flag(letter: str) -> Any:
    return tyro.conf.arg(aliases=[f"-{letter}"])

# %%
#| export scripts/chat_eval
#| cli chat_eval
@dataclass
class ChatEval:
    """Which model to grade, on what, and how to ask."""

    source: Annotated[Literal["sft", "rl", "base"], flag("i")] = "sft"
    """the stage whose model is graded"""
    task_name: Annotated[str, flag("a")] = ""
    """one task or several joined by |; all of the mixture without it"""
    temperature: Annotated[float, flag("t")] = 0.0
    max_new_tokens: Annotated[int, flag("m")] = 512
    num_samples: Annotated[int, flag("n")] = 1
    """answers to each question; right if any is (pass@k is reported)"""
    top_k: Annotated[int, flag("k")] = 50
    batch_size: Annotated[int, flag("b")] = 8
    """categorical questions at a time"""
    model_tag: Annotated[str, flag("g")] = ""
    step: Annotated[int, flag("s")] = -1
    max_problems: Annotated[int, flag("x")] = -1
    """at most so many questions of each task"""
    device_type: str = ""
    mixture: Literal["default", "world"] = "default"
    """whose evaluation tasks"""
    task_data: str = ""
    """a folder with the tasks' files, read instead of the hub"""


def chosen_tasks(settings: ChatEval) -> dict[str, Task]:
    """The tasks to ask, {name: task}, cut to max_problems."""
    if settings.task_name:
        tasks = {name: get_task(name, "test", settings.task_data) for name in settings.task_name.split("|")}
    else:
        tasks = evaluation_tasks(settings.mixture, settings.task_data)
    return {name: task[:settings.max_problems] if settings.max_problems > 0 else task for name, task in tasks.items()}

# %%
#| export scripts/chat_eval
def table_of(grades: dict[str, Any]) -> list[list[Any]]:
    """Header and rows: task, questions, accuracy, chance, centred."""
    rows = [[name, grades["counts"][name], round(grades["tasks"][name], 4), grades["chance"][name],
             round(grades["centered"][name], 4)] for name in grades["tasks"]]
    return [["task", "questions", "accuracy", "chance", "centred"], *rows]


def write_grades(source: str, grades: dict[str, Any], answers: list[dict], **more: Any) -> Path:
    """report/result_chat_eval_{source}.json, chat_eval_{source}.csv and answers_{source}.jsonl; returns the last."""
    folder = base_dir() / "report"
    with write_aside(folder / f"answers_{source}.jsonl") as aside:
        aside.write_text("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8")
    with write_aside(folder / f"chat_eval_{source}.csv") as aside, open(aside, "w", newline="") as file:
        csv.writer(file).writerows(table_of(grades))
    write_result(f"chat_eval_{source}", **grades, **more)
    return folder / f"answers_{source}.jsonl"


def chat_eval(settings: ChatEval) -> None:
    """Grade a chat model; prints a table, and keeps grades and answers under report/."""
    if settings.num_samples < 1 or settings.max_new_tokens < 1 or settings.batch_size < 1:
        raise NanochatError("--num-samples, --max-new-tokens and --batch-size are at least 1")
    runtime = start(settings.device_type)
    tasks = chosen_tasks(settings)
    model, tokenizer, meta = load_model(settings.source, runtime.device, "eval", settings.model_tag or None,
                                        settings.step if settings.step >= 0 else None)
    asking = Asking(settings.temperature, settings.top_k or None, settings.max_new_tokens, settings.num_samples,
                    settings.batch_size)
    began = time.perf_counter()
    grades, answers = evaluate_chat(model, tokenizer, tasks, asking, runtime, progress=True)
    seconds = round(time.perf_counter() - began, 1)
    for name, *numbers in table_of(grades):
        print0(f"{name:18}" + "".join(f"{number:>11}" for number in numbers))
    for name, curve in grades["pass_at_k"].items():
        print0(f"{name}: pass@1 … pass@{len(curve)} " + " ".join(f"{share:.3f}" for share in curve))
    for name, share in grades["calculator"].items():
        print0(f"{name}: {share:.1%} of the answers use the calculator, every call answered")
    print0(f"ChatCORE {grades['chatcore']:.4f}, {len(answers)} questions in {seconds} s")
    if runtime.is_main:
        runs = any(isinstance(task, HumanEval) for task in tasks.values())
        path = write_grades(settings.source, grades, answers, step=meta["step"], seconds=seconds,
                            **({"fences_missing": fences_missing()} if runs else {}))
        print0(f"every answer: {path}")

# %% [markdown]
# ## The command `chat_sft`
#
# Everything the base run chose is inherited from its checkpoint: context, batch, rates, and the optimizer's momenta, so
# that the first step already knows which way is down. Rates start at 0.8 of the base run's and fall to zero over the
# second half.
#
# One detail: the mean loss is over all targets of a step, on all ranks and in all micro-batches. A mean of the batches'
# means would let a target count for more where it has few neighbours.

# %%
#| export scripts/chat_sft
"""Supervised fine-tuning: goes on training the base model, on conversations, and only on the assistant's words."""


import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import torch
import tyro

from nanochat_lib.checkpoint import (checkpoint_directory, find_checkpoint, load_model, load_optimizer,
                                     prepare_directory, read_meta, steps_in, write_result)
from nanochat_lib.common import (MetricsLog, NanochatError, Runtime, all_reduce_sum, compute_dtype, gather, print0,
                                 progress, run_cli, start)
from nanochat_lib.evaluation import evaluate_bpb
from nanochat_lib.saver import Saver
from nanochat_lib.scaling import REFERENCE_BATCH
from nanochat_lib.tasks import Task, TaskMixture, evaluation_tasks, mixture, validation_mixture
from nanochat_lib.tasks.customjson import CustomJSON
from nanochat_lib.tasks.evaluate import Asking, evaluate_chat
from nanochat_lib.tasks.packing import ConversationLoader, one_pass
from nanochat_lib.training import LossScaler, check_loss, check_weights, compiled, divide_batch, set_rates, trim_metrics

EVAL_TOKENS = 20_971_520
CPU_EVAL_TOKENS = 65_536  # a CPU would spend hours on the default
Flag = tyro.conf.FlagCreatePairsOff

# %%
#| export scripts/chat_sft
#| cli chat_sft
@dataclass
class ChatSFT:
    """Settings of a fine-tuning run; -1 is inherited from the base model's run where the text says so."""

    run: str = "dummy"
    """name at Weights & Biases; dummy: none"""
    device_type: str = ""
    model_tag: str = ""
    """the base model to start from; the deepest without it"""
    model_step: int = -1
    mixture: Literal["default", "world"] = "default"
    """what to train on and, in between, to be graded on"""
    data: str = ""
    """a JSON-lines file of conversations to train on instead of the mixture"""
    task_data: str = ""
    """a folder with the tasks' files, read instead of the hub"""
    load_optimizer: int = 1
    """1: carry the base run's momenta over"""
    num_iterations: int = -1
    """steps; -1: one pass over the conversations"""
    max_seq_len: int = -1
    """context; -1: inherited"""
    device_batch_size: int = -1
    """rows per process and forward pass; -1: inherited"""
    total_batch_size: int = -1
    """tokens per step; -1: inherited"""
    embedding_lr: float = -1
    """-1: inherited, as the next two"""
    unembedding_lr: float = -1
    matrix_lr: float = -1
    init_lr_frac: float = 0.8
    """rates start at so much of the base run's"""
    warmup_ratio: float = 0.0
    warmdown_ratio: float = 0.5
    final_lr_frac: float = 0.0
    eval_every: int = 200
    """steps between validations; -1: only at the end"""
    eval_tokens: int = EVAL_TOKENS
    chatcore_every: int = 200
    """steps between gradings; -1: never"""
    chatcore_max_cat: int = -1
    chatcore_max_sample: int = 24
    mmlu_epochs: int = 3
    gsm8k_epochs: int = 4
    save_every: int = 200
    """steps between checkpoints; -1: only at the end"""
    resume: Annotated[bool, Flag] = False
    """go on from this model's newest SFT checkpoint, if there is one"""
    compile: Annotated[bool, Flag] = False
    """use torch.compile; neither flag: where it pays"""
    no_compile: Annotated[bool, Flag] = False

# %%
#| export scripts/chat_sft
INHERITED = ("max_seq_len", "device_batch_size", "total_batch_size", "embedding_lr", "unembedding_lr", "matrix_lr")


def inherit(settings: ChatSFT, meta: dict[str, Any]) -> ChatSFT:
    """The settings with every inherited one filled in; a context longer than the model's is an error."""
    base = {**meta["settings"], "total_batch_size": meta["total_batch_size"],
            "max_seq_len": meta["model_config"]["sequence_len"]}
    settings = replace(settings, **{name: base[name] for name in INHERITED if getattr(settings, name) <= 0})
    if settings.max_seq_len > base["max_seq_len"]:
        raise NanochatError(f"--max-seq-len {settings.max_seq_len} is more than the base model's {base['max_seq_len']}")
    return settings


def rate_at(share: float, settings: ChatSFT) -> float:
    """Factor on every rate when `share` (0…1) of the run is done: up, flat, down in a straight line."""
    if share < settings.warmup_ratio:
        return share / settings.warmup_ratio
    if share <= 1 - settings.warmdown_ratio:
        return 1.0
    left = (1 - share) / settings.warmdown_ratio
    return left + (1 - left) * settings.final_lr_frac

# %%
#| export scripts/chat_sft
def conversations(settings: ChatSFT) -> tuple[TaskMixture, TaskMixture]:
    """(to train on, to validate on); of one's own conversations one in twenty is held out."""
    if not settings.data:
        return (mixture(settings.mixture, settings.task_data, settings.mmlu_epochs, settings.gsm8k_epochs),
                validation_mixture(settings.mixture, settings.task_data))
    own = TaskMixture([CustomJSON(settings.data)])
    held = len(own) // 20
    if not held:
        print0(f"{len(own)} conversations are too few to hold any out: validation is on the training conversations")
        return own, own
    return own[held:], own[:held]


def graded_tasks(settings: ChatSFT) -> dict[str, Task]:
    """What to grade on during the run; if the tasks cannot be had, that is said and the run goes on without."""
    if settings.chatcore_every <= 0:
        return {}
    try:
        tasks = evaluation_tasks(settings.mixture, settings.task_data)
    except NanochatError as error:
        print0(f"not graded during the run: {error}")
        return {}
    most = {"categorical": settings.chatcore_max_cat, "generative": settings.chatcore_max_sample}
    return {name: task[:most[task.eval_type]] if most[task.eval_type] > 0 else task for name, task in tasks.items()}


def validate(model: Any, tokenizer: Any, held: TaskMixture, settings: ChatSFT, batch: int, runtime: Runtime) -> float:
    """Bits per byte of the assistant's held-out words, over eval_tokens tokens or all there are."""
    # of fewer conversations than ranks everyone reads all: the quotient stays the same
    rank, ranks = (runtime.rank, runtime.world_size) if len(held) >= runtime.world_size else (0, 1)
    batches = one_pass(ConversationLoader(tokenizer, held, batch, settings.max_seq_len, rank, ranks, runtime.device))
    tokens = settings.eval_tokens
    if runtime.device.type != "cuda" and tokens == EVAL_TOKENS:
        tokens = CPU_EVAL_TOKENS
    model.eval()
    bpb = evaluate_bpb(model, batches, max(1, math.ceil(tokens / (batch * settings.max_seq_len * ranks))),
                       tokenizer.token_bytes().to(runtime.device))
    model.train()
    return bpb

# %%
#| export scripts/chat_sft
def accumulate(model: Any, batches: list, scaler: LossScaler, world_size: int) -> float:
    """Gradients of the mean loss over all targets of these batches on all ranks; returns that mean in nats."""
    counts = [(targets >= 0).sum() for _, targets in batches]
    count = all_reduce_sum(sum(counts).float())
    total = torch.zeros_like(count)
    for (inputs, targets), mine in zip(batches, counts):
        loss = model(inputs, targets) * mine / count
        scaler.backward(loss * world_size)  # the optimizer averages over ranks
        total += loss.detach()
    return all_reduce_sum(total).item()


def share_done(step: int, loader: ConversationLoader, settings: ChatSFT, runtime: Runtime) -> float:
    """How much of the run is done, the same on every rank; 1 when all ranks have seen all their conversations."""
    if settings.num_iterations > 0:
        return step / settings.num_iterations
    mine = torch.tensor(float(min(max(loader.passes, 0), 1)), device=runtime.device)
    return all_reduce_sum(mine).item() / runtime.world_size

# %%
#| export scripts/chat_sft
class Run:
    """A fine-tuning run at some step: what the loop below calls."""

    def __init__(self, settings: ChatSFT, runtime: Runtime):
        folder, step = find_checkpoint("base", settings.model_tag or None, settings.model_step)
        base = read_meta(folder, step)
        self.runtime, self.directory = runtime, checkpoint_directory("sft", folder.name)
        self.settings = settings = inherit(settings, base)
        self.rows, self.micro_batches = divide_batch(settings.total_batch_size, settings.device_batch_size,
                                                     settings.max_seq_len, runtime.world_size)
        self.train, self.held = conversations(settings)
        self.tasks = graded_tasks(settings)
        earlier = steps_in(self.directory)
        resumed = settings.resume and bool(earlier)
        self.step = earlier[-1] if resumed else 0
        source = ("sft", self.directory, self.step) if resumed else ("base", folder, step)
        print0(f"starting from {source[0]} model {folder.name}, step {source[2]}")
        self.orig_model, self.tokenizer, meta = load_model(source[0], runtime.device, "train", folder.name, source[2])
        self.optimizer = self.make_optimizer(base["settings"])
        if resumed or settings.load_optimizer:
            load_optimizer(*source[1:], self.optimizer)
        meta = meta if resumed else {}
        self.curve, self.seconds, self.loss = meta.get("loop", ([], 0.0, None))
        self.scaler = LossScaler(compute_dtype(runtime.device), meta.get("scaler"))
        self.loader = ConversationLoader(self.tokenizer, self.train, self.rows, settings.max_seq_len, runtime.rank,
                                         runtime.world_size, runtime.device, state=meta.get("loader"))
        prepare_directory(self.directory, runtime, self.step if resumed else -1)
        trim_metrics(self.directory / "metrics.jsonl", self.step) if runtime.is_main else None
        self.log = MetricsLog(self.directory / "metrics.jsonl", settings.run, asdict(settings))
        self.saver = Saver(self.directory, self.orig_model, self.optimizer, runtime)
        self.steps = settings.num_iterations if settings.num_iterations > 0 else self.expected_steps()
        self.model = self.compile()

    def make_optimizer(self, base: dict[str, Any]) -> torch.optim.Optimizer:
        settings = self.settings
        scale = math.sqrt(settings.total_batch_size / REFERENCE_BATCH)  # as in the base run
        return self.orig_model.setup_optimizer(
            unembedding_lr=settings.unembedding_lr * scale, embedding_lr=settings.embedding_lr * scale,
            matrix_lr=settings.matrix_lr * scale, scalar_lr=base["scalar_lr"] * scale, weight_decay=0.0)

    def expected_steps(self) -> int:
        """About how many steps one pass takes, judged by every n-th conversation."""
        some = self.train[::max(1, len(self.train) // 100)]
        lengths = [min(len(self.tokenizer.render_conversation(one)[0]), self.settings.max_seq_len) for one in some]
        return math.ceil(sum(lengths) / len(lengths) * len(self.train) / self.settings.total_batch_size)

    def compile(self) -> torch.nn.Module:
        wanted = True if self.settings.compile else False if self.settings.no_compile else None
        inputs = torch.zeros(self.rows, self.settings.max_seq_len, dtype=torch.long, device=self.runtime.device)
        left = (self.steps - self.step) * self.settings.total_batch_size / self.runtime.world_size
        return compiled(self.orig_model, (inputs, inputs), wanted, left * self.orig_model.estimate_flops())

    def share(self) -> float:
        return share_done(self.step, self.loader, self.settings, self.runtime)

    def train_step(self, share: float) -> None:
        """One step of the optimizer."""
        started = time.perf_counter()
        batches = [next(self.loader) for _ in range(self.micro_batches)]
        self.loss = accumulate(self.model, batches, self.scaler, self.runtime.world_size)
        check_loss(self.loss, self.step, self.optimizer, self.directory)
        factor = self.settings.init_lr_frac * rate_at(share, self.settings)
        set_rates(self.optimizer, factor)
        self.saver.before_step()
        self.scaler.step(self.optimizer)
        self.model.zero_grad(set_to_none=True)
        self.seconds += time.perf_counter() - started
        self.log.log(step=self.step, loss=self.loss, rate=factor, passes=round(self.loader.passes, 4))
        self.step += 1

    def save(self) -> None:
        if self.step in steps_in(self.directory):
            return  # resumed here
        check_weights(self.orig_model, self.step, self.directory)
        meta = {"tokenizer": self.tokenizer.fingerprint, "settings": asdict(self.settings),
                "total_batch_size": self.settings.total_batch_size, "loop": [self.curve, self.seconds, self.loss],
                "scaler": self.scaler.state(), "loader": gather(self.loader.state())}
        self.saver.save(self.step, meta)

    def measure(self) -> None:
        """Bits per byte on held-out conversations."""
        bpb = validate(self.model, self.tokenizer, self.held, self.settings, self.rows, self.runtime)
        self.curve = [point for point in self.curve if point[0] != self.step] + [[self.step, bpb]]
        self.log.log(step=self.step, bpb=bpb)
        print0(f"step {self.step:5}: validation bits per byte {bpb:.4f}")

    def grade(self) -> None:
        """ChatCORE on a few questions."""
        grades, _ = evaluate_chat(self.orig_model, self.tokenizer, self.tasks, Asking(), self.runtime)
        self.log.log(step=self.step, chatcore=grades["chatcore"], tasks=grades["tasks"])
        print0(f"step {self.step:5}: ChatCORE {grades['chatcore']:.4f}")

    def report(self) -> None:
        """Say what came of it, and write it for the report."""
        cut, dropped = (sum(counts) for counts in zip(*gather((self.loader.cut, self.loader.dropped))))
        if cut:
            print0(f"{cut} conversations are longer than {self.settings.max_seq_len} tokens and were cut")
        if dropped:
            print0(f"{dropped} conversations have no word of the assistant within the context and were dropped")
        write_result("sft", bpb=self.curve[-1][1], bpb_curve=self.curve, steps=self.step, loss=self.loss,
                     tokens=self.step * self.settings.total_batch_size, conversations=len(self.train), cut=cut,
                     dropped=dropped, seconds=round(self.seconds, 2), settings=asdict(self.settings))

# %%
#| export scripts/chat_sft
def evaluations(run: Run, done: bool) -> Iterator:
    """The evaluations that are due at this step."""
    def due(every: int) -> bool:
        return every > 0 and run.step % every == 0

    if done or due(run.settings.eval_every):
        yield run.measure
    if run.tasks and (done or run.step > 0 and due(run.settings.chatcore_every)):
        yield run.grade


def train(run: Run) -> None:
    """Save, evaluate, step; to the end."""
    with run.saver, progress(total=run.steps, desc="chat_sft", initial=run.step) as bar:
        while True:
            share = run.share()
            done = share >= 1
            if done or run.settings.save_every > 0 and run.step > 0 and run.step % run.settings.save_every == 0:
                run.save()  # first of all: what follows can fail, and the work is safe
            for evaluation in evaluations(run, done):
                try:
                    evaluation()
                except NanochatError as error:
                    print0(f"step {run.step}: an evaluation could not run, training is not affected: {error}")
            if done:
                return
            run.train_step(share)
            bar.set_postfix_str(f"loss {run.loss:.3f}", refresh=False)
            bar.update()


def chat_sft(settings: ChatSFT) -> None:
    """Fine-tune the base model on conversations; leaves checkpoints of stage sft and report/result_sft.json."""
    run = Run(settings, start(settings.device_type))
    train(run)
    run.log.close()
    run.report()

# %% [markdown]
# What the rates do over a run:

# %%
from nanochat_lib.scripts.chat_sft import ChatSFT, rate_at

shares = [i / 100 for i in range(101)]
figure, axis = plt.subplots(figsize=(5, 2), layout="constrained")
axis.plot(shares, [0.8 * rate_at(share, ChatSFT()) for share in shares])
_ = axis.set(xlabel="share of the run that is done", ylabel="factor on the base rates", ylim=(0, 1))

# %% [markdown]
# In a terminal, on the world and on conversations of your own:
#
# ```
# python -m nanochat_lib.scripts.chat_sft --mixture=world --num-iterations=200
# python -m nanochat_lib.scripts.chat_sft --data=my.jsonl
# python -m nanochat_lib.scripts.chat_eval -i sft --mixture=world
# torchrun --nproc-per-node=8 -m nanochat_lib.scripts.chat_sft
# ```
#
# ## Exercises
#
# In [09_sft](../exercises/09_sft.ipynb):
# 1. `learned_mask`: which tokens of a conversation are learned, told from its markers alone.
# 2. `inputs_and_targets`: shift, pad, ignore.
# 3. `choose_letter`: the answer to a quiz, read off the logits of a padded batch.
# 4. `pack`: which conversations share a row.
# 5. Explore: how much of a batch is padding, and what does a buffer of 100 save?
#
# **Next:** [10 · Reinforcement learning](10_rl.ipynb)
