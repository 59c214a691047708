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
# # 12 · Chat
#
# *How do I talk to it?* — 30 minutes, about one of them computing.
#
# The model continues a document; a chat is a document written by two. Everything in this lesson is bookkeeping around
# that one fact: render the conversation so far, let the engine (lesson 08) continue it, show each token as it comes,
# stop when asked. The same bookkeeping serves three doors: a box in the notebook, a terminal, a web server that any
# OpenAI client can call. And since it is our own model that answers, we can look inside while it does.

# %%
#| default_exp chat

# %%
#| export
"""Talking to a model: `Answer` streams what it says, `ChatSession` keeps the conversation."""


import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat_lib.batch import Token
from nanochat_lib.checkpoint import SET_ASIDE, checkpoint_directory, find_checkpoint, load_model, steps_in
from nanochat_lib.common import NanochatError, base_dir, pick_device
from nanochat_lib.engine import Engine, Speller
from nanochat_lib.tokenizer import Tokenizer

# %% [markdown]
# ## From tokens back to words
#
# The engine (lesson 08) gives tokens, each with the characters it completes. Not all of them are speech: between
# `<|python_start|>` and `<|python_end|>` stands a calculator call, between `<|output_start|>` and `<|output_end|>` its
# result. A good chat shows them, and shows what they are. So an answer is read into *parts*, the very parts of which a
# conversation's messages are made (lesson 02): what was read can be sent back as history, unchanged.
#
# One thing must be held back. A client may ask the answer to end at a string of its own (`stop`), and such a string may
# come in two tokens: text that could be its beginning waits until the next token tells.

# %%
#| export
@dataclass(frozen=True)
class Piece:
    """Some characters of an answer. `kind` is as in a conversation's parts: "text", "python" or "python_output"."""

    kind: str
    text: str
    part: int  # which part of the answer it continues, or begins


class AnswerReader:
    """Turns the tokens of one answer into pieces as they come; `parts` is all of it: [{"type": kind, "text": …}, …].

    A string of `stop` ends the text before it: `ended` is then true, and no more is read.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        special = tokenizer.encode_special
        self.kind_after = {special("<|python_start|>"): "python", special("<|python_end|>"): "text",
                           special("<|output_start|>"): "python_output", special("<|output_end|>"): "text"}
        self.speller = Speller(tokenizer)  # a character may be spread over several tokens
        self.parts: list[dict[str, str]] = []
        self.kind, self.new_part = "text", True
        self.stop, self.held, self.ended = stop, "", False

    def read(self, token: int, last: bool = False) -> Piece | None:
        """Take one token; returns what became readable, if anything."""
        if self.ended:
            return None
        text, piece, change = self.speller.read(token, last), None, self.kind_after.get(token)
        if self.stop and self.kind == "text":
            text = self.hold_back(self.held + text, everything=last or change is not None)
        if text:
            if self.new_part:
                self.parts.append({"type": self.kind, "text": ""})
                self.new_part = False
            self.parts[-1]["text"] += text
            piece = Piece(self.kind, text, len(self.parts) - 1)
        if change:
            self.kind, self.new_part = change, True
        return piece

    def hold_back(self, text: str, everything: bool) -> str:
        """The text up to a stop string, or up to what may become one; with `everything` nothing more will come."""
        self.held, found = "", [text.find(stop) for stop in self.stop if stop in text]
        if found:
            self.ended = True
            return text[:min(found)]
        if not everything:
            begun = [size for stop in self.stop for size in range(1, len(stop)) if text.endswith(stop[:size])]
            self.held = text[len(text) - max(begun, default=0):]
        return text[:len(text) - len(self.held)]

# %% [markdown]
# ## A model to talk to
#
# The picker lists what is on disk: the newest checkpoint of each run, chat models first. A base model can be talked to
# as well, but it has never seen a chat. It is given your text alone, and continues it: try the same question on both.

# %%
#| export
CHAT_STAGES = ("rl", "sft", "base")  # best first


def list_models() -> list[tuple[str, str]]:
    """(stage, model tag) of every run with a checkpoint under the base directory, the newest first within its stage."""
    found = []
    for stage in CHAT_STAGES:
        folders = [path for path in checkpoint_directory(stage).glob("*")
                   if steps_in(path) and not SET_ASIDE.search(path.name)]
        found += [(stage, path.name) for path in sorted(folders, key=lambda path: -path.stat().st_mtime)]
    return found


def best_stage() -> str:
    """The stage of the best model there is: rl, sft, base. NanochatError if there is none."""
    for stage, _ in list_models():
        return stage
    raise NanochatError(f"no model to talk to in {base_dir()}: make one with "
                        "python -m nanochat_lib.pipeline --preset laptop")

# %%
#| export
def newest(messages: list[dict], room: int, size: Callable[[list[dict]], int]) -> list[dict]:
    """The system message, the last question and as many exchanges before it as their sizes have room for."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    rest, start = messages[len(system):], len(messages) - len(system) - 1
    room -= size(system + rest[start:])
    while start > 1 and (room := room - size(rest[start - 2:start])) >= 0:  # each is measured once
        start -= 2
    return system + rest[start:]


@dataclass
class ChatModel:
    """A loaded model ready to answer, and how a conversation becomes its prompt."""

    engine: Engine
    tokenizer: Tokenizer
    stage: str
    name: str  # e.g. "rl-d4"
    context: int  # most tokens of conversation and answer together

    @classmethod
    def load(cls, source: str = "", model_tag: str | None = None, step: int | None = None,
             device: str | torch.device = "") -> "ChatModel":
        """Load a checkpoint of a stage ("" = the best there is). NanochatError if there is none."""
        stage = source or best_stage()
        folder, step = find_checkpoint(stage, model_tag, step)
        model, tokenizer, _ = load_model(stage, device or pick_device(), "eval", folder.name, step)
        return cls(Engine(model, tokenizer), tokenizer, stage, f"{stage}-{folder.name}", model.config.sequence_len)

    def prompt(self, messages: list[dict]) -> list[int]:
        """Token ids that the answer continues: the rendered chat, or for a base model the last text alone."""
        if self.stage == "base":
            return [self.tokenizer.get_bos_token_id(), *self.tokenizer.encode(messages[-1]["content"])]
        return self.tokenizer.render_for_completion({"messages": messages})

    def fit(self, messages: list[dict]) -> list[dict]:
        """The messages without the oldest exchanges, so that a quarter of the context is free for the answer."""
        if self.stage == "base":  # it reads the last one alone
            return messages

        def tokens(some: list[dict]) -> int:
            return len(self.tokenizer.render_conversation({"messages": some}, None)[0]) - 1  # without <|bos|>

        return newest(messages, self.context * 3 // 4 - 2, tokens)  # 2: <|bos|> and the last <|assistant_start|>

# %% [markdown]
# ## An answer as it comes
#
# An `Answer` takes the engine's tokens, one by one, and knows afterwards why it ended. Before each token it looks at a
# flag: that is all it takes to stop *within a token*, from any thread.

# %%
#| export
@dataclass(frozen=True)
class Sampling:
    """How to choose the next token, and how long to go on."""

    temperature: float = 0.8
    top_k: int = 50  # 0: all tokens
    max_tokens: int = 512
    seed: int | None = None  # None: another answer each time
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # strings that end the answer before them

    def settings(self) -> dict[str, Any]:
        """As the engine takes them."""
        seed = random.randrange(2**31) if self.seed is None else self.seed
        return {"temperature": self.temperature, "top_k": self.top_k or None, "top_p": self.top_p,
                "max_tokens": self.max_tokens, "seed": seed}

# %%
#| export
class Answer:
    """The answer to a conversation: iterate for its pieces; `content` is what it has said so far.

    `top` likeliest tokens are noted at each place; `number` tells answers to one question apart, if they share a seed
    (and a `prompt`, which need not be rendered again). NanochatError if the conversation leaves no room in the context.
    """

    def __init__(self, model: ChatModel, messages: list[dict], sampling: Sampling, top: int = 0, number: int = 0,
                 prompt: list[int] | None = None):
        self.model, self.sampling, self.top, self.number = model, sampling, top, number
        self.prompt = model.prompt(messages) if prompt is None else prompt
        self.reader = AnswerReader(model.tokenizer, sampling.stop)
        self.said: list[tuple[str, Token]] = []  # each token with the kind of its part
        self.started, self.seconds = time.perf_counter(), 0.0
        self.finish_reason = ""  # then "stop" (it ended), "length", "context" (no room left) or "stopped" (by the user)
        self.stopped = threading.Event()
        if len(self.prompt) >= model.context:
            raise NanochatError(f"the conversation has {len(self.prompt):,} tokens, the model reads {model.context:,}: "
                                "clear it, or say it in fewer words")

    def stop(self) -> None:
        """End the answer before its next token; may be called from any thread."""
        self.stopped.set()

    @property
    def tokens(self) -> int:
        return len(self.said)

    @property
    def content(self) -> str | list[dict]:
        """As a message's content: a plain string, or parts if the calculator was called."""
        parts = self.reader.parts
        plain = all(part["type"] == "text" for part in parts)
        return "".join(part["text"] for part in parts) if plain else parts

    def take(self, token: Token) -> Piece | None:
        """Note the next token; returns what became readable. A stop string stops the answer."""
        self.said.append((self.reader.kind, token))
        self.seconds = time.perf_counter() - self.started
        self.finish_reason = token.finish_reason or ""
        piece = self.reader.read(token.id, last=bool(token.finish_reason))
        if self.reader.ended:
            self.finish_reason = "stop"
            self.stop()
        return piece

    def __iter__(self) -> Iterator[Piece]:
        tokens = self.model.engine.stream(self.prompt, **self.sampling.settings(), top=self.top)
        with contextlib.closing(tokens):
            for token in tokens:
                if self.stopped.is_set():
                    self.finish_reason = "stopped"
                    return
                if piece := self.take(token):
                    yield piece
                if self.reader.ended:
                    return

# %% [markdown]
# ## A conversation
#
# `ChatSession` adds the memory. Three rules keep it honest: only one answer at a time; a question that failed leaves
# no trace in the history (or the next prompt would hold a question nobody answered); what no longer fits into the
# context is left out of the prompt, oldest first, and the session says so.

# %%
#| export
class ChatSession:
    """A conversation with a model. `send` blocks and gives every piece to `show`; another thread may `stop` it."""

    def __init__(self, model: ChatModel, sampling: Sampling = Sampling()):
        self.model, self.sampling = model, sampling
        self.messages: list[dict] = []
        self.answer: Answer | None = None  # the one being written
        self.answers: dict[int, Answer] = {}  # place of a message → the answer it is, to look inside
        self.forgotten = 0  # messages that the last prompt had no room for
        self.lock = threading.Lock()

    @property
    def busy(self) -> bool:
        return self.lock.locked()

    def send(self, text: str, show: Callable[[Piece], Any] = lambda piece: None) -> Answer:
        """Say `text` and return the finished answer. NanochatError if still answering, or if it has no room."""
        return self.reply(lambda: [*self.messages, {"role": "user", "content": text}], show)

    def regenerate(self, show: Callable[[Piece], Any] = lambda piece: None) -> Answer:
        """Answer the last question once more."""
        if not self.messages:
            raise NanochatError("nothing to answer yet: say something first")
        return self.reply(lambda: self.messages[:-1], show)

    def reply(self, edit: Callable[[], list[dict]], show: Callable[[Piece], Any]) -> Answer:
        """Answer the edited history; if that fails the old history stays."""
        if not self.lock.acquire(blocking=False):
            raise NanochatError("still answering: wait for it, or stop it first")
        before = self.messages
        try:
            self.messages = edit()
            fitting = self.model.fit(self.messages)
            self.forgotten = len(self.messages) - len(fitting)
            self.answer = answer = Answer(self.model, fitting, self.sampling)
            for piece in answer:
                show(piece)
            self.answers[len(self.messages)] = answer
            self.messages = [*self.messages, {"role": "assistant", "content": answer.content}]
            return answer
        except BaseException:
            self.messages = before
            raise
        finally:
            self.answer = None
            self.lock.release()

    def stop(self) -> None:
        """End the answer being written, if there is one; what it has said stays in the history."""
        if answer := self.answer:
            answer.stop()

    def clear(self) -> None:
        """Forget the conversation (and end the answer being written)."""
        self.stop()
        with self.lock:
            self.messages, self.answers, self.forgotten = [], {}, 0

    def change_model(self, model: ChatModel) -> None:
        """Go on with another model; the conversation stays, but what was said before cannot be looked into any more."""
        self.stop()
        with self.lock:
            self.model, self.answers = model, {}

# %% [markdown]
# A conversation worth keeping is kept twice: as Markdown for people, and as a line of JSON, the very format that
# lesson 09 trains on (`chat_sft --data FILE`). So a good talk, its bad answers mended by hand, can become a lesson
# for the model.

# %%
#| export transcript
"""A conversation as a file: JSON lines that `chat_sft --data` reads, Markdown for people."""


import json
import re
import time
from pathlib import Path

from nanochat_lib.common import NanochatError, write_aside
from nanochat_lib.tokenizer import parts_of

# %%
#| export transcript
def answered(messages: list[dict]) -> list[dict]:
    """The messages without questions that have no answer, or an empty one: nothing could be learned from them."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    pairs = zip(messages[first::2], messages[first + 1::2])
    kept = [pair for pair in pairs if any(part["text"].strip() for part in parts_of(pair[1]["content"]))]
    return [*messages[:first], *(message for pair in kept for message in pair)]


def as_json(messages: list[dict], **about: str) -> str:
    """One line {"messages": […], …}, with what else is to be noted about it."""
    return json.dumps({"messages": answered(messages), **about}, ensure_ascii=False) + "\n"


def as_markdown(messages: list[dict], title: str = "A conversation") -> str:
    """The conversation to read: questions quoted, the calculator's work as code."""
    blocks = [f"# {title}"]
    for message in messages:
        parts = parts_of(message["content"])
        text = "".join(part["text"] if part["type"] == "text" else code(part) for part in parts).strip()
        quoted = message["role"] != "assistant"
        blocks += [f"**{message['role']}**", re.sub("^", "> ", text, flags=re.M) if quoted else text]
    return "\n\n".join(blocks) + "\n"


def code(part: dict) -> str:
    """A calculator call or its result between more backquotes than it holds."""
    fence = "`" * (1 + max(map(len, re.findall("`+", part["text"])), default=0))
    return f" {fence}{'= ' * (part['type'] == 'python_output')}{part['text']}{fence} "


def save(messages: list[dict], folder: str | Path = ".", model: str = "") -> list[Path]:
    """Write chat-DATE-TIME.jsonl and .md into a folder; returns their paths. NanochatError if there is nothing yet."""
    if not answered(messages):
        raise NanochatError("nothing to save yet: have something answered first")
    stem = f"chat-{time.strftime('%Y%m%d-%H%M%S')}"
    about = {"model": model} if model else {}
    title = f"A conversation with {model or 'a model'}"
    texts = {".jsonl": as_json(messages, **about), ".md": as_markdown(messages, title)}
    for suffix, text in texts.items():
        with write_aside(Path(folder) / (stem + suffix)) as path:
            path.write_text(text, encoding="utf-8", errors="replace")
    return [Path(folder) / (stem + suffix) for suffix in texts]

# %%
from nanochat_lib.transcript import as_json, as_markdown

talk = [{"role": "user", "content": "Share 12 pies among 4."},
        {"role": "assistant", "content": [{"type": "text", "text": "Each gets "}, {"type": "python", "text": "12/4"},
                                          {"type": "python_output", "text": "3"}, {"type": "text", "text": "."}]}]
print(as_json(talk, model="by hand"), as_markdown(talk), sep="\n")

# %% [markdown]
# ## Try it
#
# The best model on this machine answers. Where there is none, the tour's small run is made first, a minute or two
# (lesson 11 makes a real one).

# %%
# NBVAL_IGNORE_OUTPUT
from nanochat_lib.chat import AnswerReader, ChatModel, ChatSession, Sampling
from nanochat_lib.course.models import ready

ready("rl")
session = ChatSession(ChatModel.load(), Sampling(temperature=0, max_tokens=96))
question = "Who are you?"
print("you   ", question)
answer = session.send(question, lambda piece: print(piece.text, end=""))
print(f"\n\n{answer.tokens} tokens, {answer.finish_reason}")

# %% [markdown]
# The reader needs no model to be checked. Half a character waits for its other bytes, and a calculator call becomes a
# part of its own:

# %%
tokenizer = session.model.tokenizer
call = tokenizer.encode("12/4", prepend="<|python_start|>", append="<|python_end|>")
result = tokenizer.encode("3", prepend="<|output_start|>", append="<|output_end|>")
script = [*tokenizer.encode("日本: "), *call, *result, *tokenizer.encode("3 pies each")]
reader = AnswerReader(tokenizer)
pieces = [piece for piece in map(reader.read, script) if piece]
assert not any("\ufffd" in piece.text for piece in pieces)
reader.parts

# %% [markdown]
# ## Looking inside an answer
#
# What else could it have said? Nothing has to be noted while it speaks: the finished answer goes through the model
# once more, all tokens in one forward pass, and the logits at each place are what the model expected there.

# %%
#| export inside
"""Looking inside a model: how likely each token of a text was to it, and which earlier tokens its heads look at."""


import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nanochat_lib.attention import visible
from nanochat_lib.fused import norm
from nanochat_lib.gpt import GPT, apply_rotary_emb, rotary_at

# %%
#| export inside
@dataclass(frozen=True)
class Look:
    """How one token came: its probability, before temperature and top-k, and the likeliest tokens at its place."""

    id: int
    probability: float
    top: tuple[tuple[int, float], ...]  # (token, probability), the likeliest first


@torch.inference_mode()
def looks(model: GPT, ids: list[int], start: int = 1, top: int = 5) -> list[Look]:
    """A look at each of ids[start:], by one forward pass over all of them; start is at least 1."""
    tokens = torch.tensor(ids, device=next(model.parameters()).device)
    chances = model(tokens[None, :-1])[0, start - 1:].softmax(dim=-1)  # (T - start, V), float32
    own = chances.gather(-1, tokens[start:, None])[:, 0].tolist()
    likeliest, names = (x.tolist() for x in chances.topk(top))
    return [Look(*look) for look in zip(ids[start:], own, (tuple(zip(*pair)) for pair in zip(names, likeliest)))]

# %% [markdown]
# A column is a place of the answer; its five cells are the five likeliest tokens there, the likeliest on top.

# %%
# NBVAL_IGNORE_OUTPUT
import matplotlib.pyplot as plt
import numpy as np

from nanochat_lib.inside import looks

said = [token.id for _, token in answer.said]
seen = looks(session.model.engine.model, answer.prompt + said, start=len(answer.prompt))[:12]
chances = np.array([[chance for _, chance in look.top] for look in seen])  # (T, 5)

figure, axes = plt.subplots(figsize=(10, 3), layout="constrained")
image = axes.imshow(chances.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
for place, look in enumerate(seen):
    for rank, (id_, chance) in enumerate(look.top):
        word = tokenizer.id_to_token(id_).replace("\n", "\\n").replace("assistant_end", "end")
        axes.text(place, rank, word, ha="center", va="center", fontsize=9, parse_math=False,
                  weight="bold" if id_ == look.id else "normal", color="white" if chance > 0.6 else "black")
axes.set(xlabel="place in the answer (tokens)", ylabel="rank", xticks=range(len(seen)), yticks=range(5),
         yticklabels=range(1, 6), title="what could have been said (bold: what was said)")
_ = figure.colorbar(image, label="probability")

# %% [markdown]
# ## The chat box
#
# A thin view: it draws what the session knows and calls it from a thread. (In a callback of its own the answer would
# block the kernel, and **stop** could not be heard until it is too late.) Errors appear where you look, in the chat.

# %%
#| export chat_html
"""A conversation as HTML for the notebook: everything said is escaped; on demand tokens are coloured by probability."""


import html

from nanochat_lib.chat import Answer
from nanochat_lib.engine import Speller
from nanochat_lib.inside import Look
from nanochat_lib.tokenizer import Tokenizer, parts_of

# %%
#| export chat_html
STYLES = {  # JupyterLab's own colours, so that the box follows its light and dark themes
    "user": "margin: 6px 0 6px 15%; background: var(--jp-layout-color2, #eee)",
    "assistant": "margin: 6px 15% 6px 0; background: var(--jp-layout-color1, #fff); "
                 "border: 1px solid var(--jp-border-color2, #ccc)",
    "error": "margin: 6px 0; background: var(--jp-error-color3, #fdd); color: var(--jp-error-color0, #900)",
}
TOOL = ("display: inline-block; padding: 0 6px; margin: 0 2px; border-radius: 4px; font-family: monospace; "
        "background: var(--jp-layout-color3, #ddd)")
BUBBLE = "padding: 6px 12px; border-radius: 10px; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere"
SIGNS = {"python": "calc ", "python_output": "= "}


def bubble(role: str, content: str | list[dict]) -> str:
    """One message as HTML, everything in it escaped; calculator calls and their results are set apart."""
    parts = parts_of(content) if role == "assistant" else [{"type": "text", "text": content}]
    inner = ""
    for part in parts:
        text, sign = html.escape(part["text"]), SIGNS.get(part["type"])
        inner += text if sign is None else f'<span style="{TOOL}" class="{part["type"]}">{sign}{text}</span>'
    return frame(role, inner or "…")


def frame(role: str, inner: str) -> str:
    return f'<div class="chat-{role}" style="{BUBBLE}; {STYLES[role]}">{inner}</div>'

# %% [markdown]
# On demand each token is coloured: the less likely it was, the stronger. Its five best rivals stand in a card that
# appears under the answer when the pointer rests on the token, or after a click on it. No script is needed: a style
# sheet shows the card of the token that is hovered over, or has the focus.

# %%
#| export chat_html
CARDS = """<style>
.chat-token { cursor: help; border-radius: 3px; outline: none } .chat-token:focus { box-shadow: 0 0 0 2px currentColor }
.chat-cards { position: relative; padding-bottom: 8.6em } .chat-mark { opacity: 0.55; font-size: 80% }
.chat-card { display: none; position: absolute; left: 12px; right: 0; bottom: 6px; height: 8.4em; line-height: 1.3;
             white-space: pre; font-family: monospace; font-size: 90%; background: var(--jp-layout-color0, #fff) }
.chat-hint { position: absolute; left: 12px; bottom: 6em; font-size: 85%; opacity: 0.6 }
.chat-token:hover .chat-card { display: block; z-index: 2 } .chat-token:focus .chat-card { display: block; z-index: 1 }
</style>"""
MARKS = {" ": "·", "\n": "⏎", "\t": "→"}  # in cards, blanks are shown


def named(tokenizer: Tokenizer, token: int) -> str:
    """A token as a card shows it: its blanks visible, half characters and control characters as hexadecimal bytes."""
    text = "".join(MARKS.get(letter, letter) for letter in tokenizer.id_to_token(token))
    if "\ufffd" in text or not text.isprintable():
        return " ".join(f"{byte:02X}" for byte in tokenizer.tokens[token])
    return text


def card(tokenizer: Tokenizer, look: Look) -> str:
    """The likeliest tokens at one place with their probabilities as bars; the one that was said has a mark."""
    lines = []
    for token, chance in look.top:
        mark, bar = "▸" if token == look.id else " ", "█" * round(20 * chance)
        lines.append(f"{mark} {chance:6.1%} {named(tokenizer, token)[:20]:20} {bar}")
    rank = "" if look.id in dict(look.top) else f"\n▸ {look.probability:6.2%} {named(tokenizer, look.id)[:20]}"
    return html.escape("\n".join(lines) + rank)


def token_bubble(answer: Answer, looks: list[Look]) -> str:
    """An answer token by token, coloured by how unlikely each was. What the tool wrote has no colour."""
    tokenizer, special, spans = answer.model.tokenizer, answer.model.tokenizer.get_special_tokens(), ""
    speller = Speller(tokenizer)
    for place, ((_, token), look) in enumerate(zip(answer.said, looks), 1):
        name = tokenizer.id_to_token(token.id)
        text = html.escape(speller.read(token.id, last=place == len(looks)))
        if name in special:
            text += f'<span class="chat-mark">{html.escape(name[2:-2])}</span>'
        if token.forced:
            spans += f'<span class="chat-forced">{text}</span>'
            continue
        shade = f"background: rgba(224, 96, 32, {0.75 * (1 - look.probability):.2f})"
        spans += (f'<span class="chat-token" tabindex="0" style="{shade}">{text or "▪"}'
                  f'<span class="chat-card">{card(tokenizer, look)}</span></span>')
    hint = '<div class="chat-hint">point at a token, or click it: what else could have stood there?</div>'
    return f'{CARDS}<div class="chat-cards">{frame("assistant", spans or "…")}{hint}</div>'

# %%
#| export chat_box
"""The chat in a notebook: `ChatBox` shows a `ChatSession`, and works in a thread so that stop is heard."""


import html
import threading
import time
from collections.abc import Callable

import ipywidgets as widgets

from nanochat_lib.chat import Answer, ChatModel, ChatSession, Sampling, list_models
from nanochat_lib.chat_html import bubble, token_bubble
from nanochat_lib.inside import looks
from nanochat_lib.transcript import save

# %%
#| export chat_box
class ChatBox:
    """A chat in the notebook: `ChatBox()` as a cell's last line. It shows a `ChatSession` and works in a thread."""

    def __init__(self, session: ChatSession | None = None):
        self.session = session or ChatSession(ChatModel.load())
        here, settings = self.session.model.name, self.session.sampling
        models = {f"{stage}-{tag}": (stage, tag) for stage, tag in list_models()}
        models.setdefault(here, ())  # a session handed in, with a model that is not on disk
        self.error, self.note, self.drawn = "", "", 0.0
        self.thread: threading.Thread | None = None
        self.inside: dict[int, tuple[Answer, str]] = {}  # place of a message → its answer, drawn with probabilities
        self.picker = widgets.Dropdown(options=models, index=list(models).index(here), description="model")
        self.picker.observe(lambda change: self.pick(*change["new"]) if change["new"] else None, "value")
        self.sliders = {
            "temperature": widgets.FloatSlider(settings.temperature, min=0, max=2, step=0.1),
            "top_k": widgets.IntSlider(settings.top_k, min=0, max=200),
            "top_p": widgets.FloatSlider(settings.top_p, min=0.05, max=1, step=0.05),
            "max_tokens": widgets.IntSlider(settings.max_tokens, min=1, max=max(1024, settings.max_tokens))}
        for name, slider in self.sliders.items():
            slider.description, slider.style.description_width = name.replace("_", " "), "initial"
        self.chances = widgets.ToggleButton(False, description="probabilities", icon="eye", layout={"width": "auto"},
                                            tooltip="how likely each token was; point at one, or click it")
        self.chances.observe(lambda _: self.draw(), "value")
        self.view = widgets.HTML()
        self.entry = widgets.Text(placeholder="say something, then Enter", layout=widgets.Layout(flex="1 1 12em"))
        self.entry.on_msg(lambda _, message, __: self.send() if message.get("event") == "submit" else None)
        self.widget = self.arrange()
        self.draw()

    def arrange(self) -> widgets.Widget:
        """Settings above, the transcript, then the entry and its buttons."""
        row, buttons = widgets.Layout(flex_flow="row wrap"), []
        for name, icon, action in (("send", "paper-plane", self.send), ("stop", "stop", self.session.stop),
                                   ("regenerate", "refresh", self.regenerate), ("clear", "trash", self.clear),
                                   ("save", "download", self.save)):
            button = widgets.Button(description=name, icon=icon, layout=widgets.Layout(width="auto"))
            button.on_click(lambda _, action=action: action())
            buttons.append(button)
        return widgets.VBox([widgets.HBox([self.picker, *self.sliders.values()], layout=row), self.view,
                             widgets.HBox([self.entry, *buttons, self.chances], layout=row)])

    def send(self) -> None:
        """Say what stands in the entry."""
        if self.session.busy:
            self.say("still answering: wait for it, or stop it first")
        elif text := self.entry.value.strip():
            self.entry.value = ""
            self.work(lambda show: self.session.send(text, show), question=text)

    def regenerate(self) -> None:
        self.work(self.session.regenerate)

    def clear(self) -> None:
        self.session.clear()
        self.say("", error="")

    def save(self) -> None:
        """Write the conversation into the notebook's folder, as JSON (for `chat_sft --data`) and as Markdown."""
        try:
            paths = save(self.session.messages, model=self.session.model.name)
            self.say(f"saved as {' and '.join(path.name for path in paths)}", error="")
        except Exception as error:  # a full disk, a folder that may not be written: said in the chat
            self.say("", error=str(error))

    def pick(self, stage: str, tag: str) -> None:
        """Go on with another model; the conversation stays."""
        def load(show):
            self.say(f"loading {stage} {tag}", error="")
            try:
                self.session.change_model(ChatModel.load(stage, tag))
            finally:
                self.picker.label = self.session.model.name  # the one in use, if this one cannot be loaded

        if f"{stage}-{tag}" != self.session.model.name:
            self.work(load)

    def work(self, task: Callable, question: str = "") -> None:
        """Do `task(show)` in a thread, drawing as it goes; what it raises is shown in the chat."""
        def run():
            try:
                values = {name: slider.value for name, slider in self.sliders.items()}
                self.session.sampling = Sampling(**values)
                self.say("", error="")
                done = task(lambda piece: self.draw(every=0.05))
                self.say(self.describe(done) if done else "")
            except Exception as error:
                self.entry.value = self.entry.value or question  # nothing typed is lost
                self.say("", error=str(error) or repr(error))

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def describe(self, answer: Answer) -> str:
        """One line on a finished answer."""
        lost, speed = self.session.forgotten, answer.tokens / max(answer.seconds, 1e-9)
        return (f"{self.session.model.name}: {answer.tokens} tokens, {speed:.0f} tokens/s, {answer.finish_reason}"
                + f", {lost} oldest messages left out: no room" * bool(lost))

    def say(self, note: str, error: str | None = None) -> None:
        self.note, self.error = note, self.error if error is None else error
        self.draw()

    def draw(self, every: float = 0.0) -> None:
        """Redraw the transcript, at most once in `every` seconds."""
        if time.monotonic() - self.drawn < every:
            return
        self.drawn = time.monotonic()
        bubbles = [self.show(place, message) for place, message in enumerate(self.session.messages)]
        if answer := self.session.answer:
            bubbles.append(bubble("assistant", answer.content))
        if self.error:
            bubbles.append(bubble("error", self.error))
        note = f'<div style="opacity: 0.6; font-size: 85%">{html.escape(self.note)}</div>'
        self.view.value = "".join(bubbles) + note

    def show(self, place: int, message: dict) -> str:
        """One message; with its probabilities if they are wanted, and this model said it."""
        answer = self.session.answers.get(place)
        if not (self.chances.value and answer and answer.said):
            return bubble(message["role"], message["content"])
        known, drawn = self.inside.get(place, (None, ""))
        if known is not answer:
            ids = answer.prompt + [token.id for _, token in answer.said]
            drawn = token_bubble(answer, looks(answer.model.engine.model, ids, len(answer.prompt)))
            self.inside[place] = answer, drawn
        return drawn

    def _repr_mimebundle_(self, **kwargs):
        return self.widget._repr_mimebundle_(**kwargs)

# %% [markdown]
# Type a question, or let the cell do it. `box.session` is the session above; every button calls one of its methods.

# %%
# NBVAL_IGNORE_OUTPUT
from nanochat_lib.chat_box import ChatBox

box = ChatBox(session)
box.entry.value = "Walt has 26 apples and finds 28 more. He shares them among 6 friends. How many apples does each get?"
box.send()
box.thread.join()
box.chances.value = True  # as the button `probabilities` does
box

# %% [markdown]
# ## Where a head looks
#
# Attention (lesson 03) is a weighted mean over earlier tokens, and the weights can be read: at each place, each head
# shares one unit of attention among the tokens up to it. The forward pass never stores them, so they are computed
# once more from the queries and keys.

# %%
#| export inside
@torch.inference_mode()
def attention_maps(model: GPT, ids: list[int], start: int = 0) -> torch.Tensor:
    """Attention weights (layer, head, query, key) of the tokens from `start` on to all of ids; each row sums to 1.

    Not while another thread generates with the model: it listens to what goes into the layers.
    """
    inputs, places = [], torch.arange(len(ids), device=next(model.parameters()).device)
    listeners = [block.attn.register_forward_pre_hook(lambda _, values: inputs.append(values[0]))
                 for block in model.transformer.h]
    try:
        model.hidden(torch.tensor([ids], device=places.device))
    finally:
        for listener in listeners:
            listener.remove()
    rotary, maps = rotary_at(model.cos, model.sin, len(ids)), []
    for block, x in zip(model.transformer.h, inputs):
        heads = (linear(x).view(1, len(ids), -1, block.attn.head_dim) for linear in (block.attn.c_q, block.attn.c_k))
        q, k = (norm(apply_rotary_emb(x, *rotary), 1.2)[0].float() for x in heads)  # (T, H, D), as in lesson 04
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        scores = torch.einsum("thd,shd->hts", q[start:], k) / q.size(-1) ** 0.5
        hidden = ~visible(places[start:], places, block.attn.window)
        maps.append(scores.masked_fill(hidden, -torch.inf).softmax(dim=-1))
    return torch.stack(maps)


@contextlib.contextmanager
def without_head(model: GPT, layer: int, head: int) -> Iterator[None]:
    """Inside, this head says nothing: its columns of the output matrix are zero."""
    attn = model.transformer.h[layer].attn
    columns = attn.c_proj.weight.data[:, head * attn.head_dim:(head + 1) * attn.head_dim]
    kept = columns.clone()
    columns.zero_()
    try:
        yield
    finally:
        columns.copy_(kept)

# %% [markdown]
# Ask a word problem. The answer must repeat numbers of the question, and something must fetch them. So: at each place
# where a number is about to be said, how much attention goes to earlier copies of that very number?

# %%
# NBVAL_IGNORE_OUTPUT
from nanochat_lib.inside import attention_maps, without_head

session.clear()
answer = session.send("Tom buys 6 pies for 3 pence each and a hat for 12 pence. How many pence does Tom pay?")
gpt, start = session.model.engine.model, len(answer.prompt)
ids = answer.prompt + [token.id for _, token in answer.said]
names = [tokenizer.id_to_token(token).replace("\n", "⏎").replace("<|", "").replace("|>", "") for token in ids]
maps = attention_maps(gpt, ids)  # (layer, head, T, T)

chosen = [place for place in range(start, len(ids)) if not answer.said[place - start][1].forced]
copied = [place for place in chosen if ids[place] in ids[:place]]
copied = [place for place in copied if names[place].isdigit()] or copied  # a very small model may say no number
share = torch.stack([maps[:, :, place - 1, :place][:, :, [ids[place] == id_ for id_ in ids[:place]]].sum(-1)
                     for place in copied]).mean(0)  # (layer, head)
layer, head = divmod(int(share.argmax()), share.size(1))
print("".join(names[start:]))
print(f"layer {layer}, head {head} gives {share[layer, head]:.0%} of its attention to earlier copies of the number "
      f"that is said next; the mean of all heads is {share.mean():.0%}")

# %% [markdown]
# Its map: a row is a token about to be said, a column a token it could look back to.

# %%
# NBVAL_IGNORE_OUTPUT
figure, axes = plt.subplots(figsize=(12, 5.6), layout="constrained")
image = axes.imshow(maps[layer, head, start - 1:-1].numpy(), cmap="Oranges", vmin=0, vmax=1, aspect="auto")
small = {"fontsize": 7, "parse_math": False}
axes.set_xticks(range(len(ids)), names, rotation=90, **small)
axes.set_yticks(range(len(ids) - start), names[start:], **small)
axes.set(ylabel="about to be said", title=f"layer {layer}, head {head}: where it looks")
_ = figure.colorbar(image, label="attention")

# %% [markdown]
# A map shows where a head looks, not what depends on it (Jain & Wallace, *Attention is not Explanation*, 2019). To know
# that, take the head out and read the probabilities of those same numbers again:

# %%
# NBVAL_IGNORE_OUTPUT
places = [place - start for place in copied]


def sureness():
    """Mean probability of the copied numbers."""
    seen = looks(gpt, ids, start)
    return float(np.mean([seen[place].probability for place in places]))


print(f"with all heads: {sureness():.2f}")
for one in range(len(maps)):
    for other in range(maps.size(1)):
        with without_head(gpt, one, other):
            print(f"without layer {one}, head {other}: {sureness():.2f}")

# %% [markdown]
# One head of the last layer does most of the copying in this run of the `laptop` preset; in another, two shared it. (The
# tour's model has not learned to copy yet.) Heads that find what came before are among the first things that attention
# learns, and much of what looks like reasoning stands on them (Olsson et al., *In-context Learning and Induction
# Heads*, 2022).

# %% [markdown]
# ## The terminal
#
# `python -m nanochat_lib.scripts.chat_cli` is a loop around `session.send`. Ctrl-C is caught while an answer is
# written and ends the answer, not the chat; `-p "one question"` answers and leaves, for use in shell scripts.

# %%
#| export scripts/chat_cli
"""Chat with a model in the terminal."""


import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from nanochat_lib.chat import ChatModel, ChatSession, Piece, Sampling
from nanochat_lib.common import NanochatError, pick_device, run_cli
from nanochat_lib.transcript import save

# %%
#| export scripts/chat_cli
HELP = ("/clear forgets the conversation, /retry answers again, /save keeps it in a file, /quit leaves (so does "
        "Ctrl-D); Ctrl-C stops an answer")
BRACKETS = {"text": ("", ""), "python": ("[", "]"), "python_output": ("[= ", "]")}
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}  # a terminal obeys these


class Printer:
    """Prints pieces as they come; the calculator's work stands in brackets: [12/4][= 3]."""

    def __init__(self):
        self.part, self.closing = -1, ""

    def __call__(self, piece: Piece) -> None:
        opening = ""
        if piece.part != self.part:
            opening, closing = BRACKETS[piece.kind]
            opening, self.part, self.closing = self.closing + opening, piece.part, closing
        print(opening + piece.text.translate(CONTROL), end="", flush=True)

    def end(self, note: str) -> None:
        print(self.closing + note, flush=True)


@contextlib.contextmanager
def ctrl_c_stops(session: ChatSession) -> Iterator[None]:
    """Inside, Ctrl-C ends the answer being written and nothing else."""
    before = signal.signal(signal.SIGINT, lambda *_: session.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

# %%
#| export scripts/chat_cli
@dataclass
class ChatCli:
    """Settings of a chat in the terminal."""

    source: Annotated[str, arg(aliases=["-i"])] = ""
    """stage of the model: rl, sft or base; "" takes the best there is"""
    model_tag: Annotated[str | None, arg(aliases=["-g"])] = None
    """run of that stage, e.g. d4; none: the deepest"""
    step: Annotated[int | None, arg(aliases=["-s"])] = None
    """checkpoint of that run; none: the last"""
    prompt: Annotated[str, arg(aliases=["-p"])] = ""
    """answer this and leave"""
    temperature: Annotated[float, arg(aliases=["-t"])] = 0.6
    top_k: Annotated[int, arg(aliases=["-k"])] = 50
    top_p: float = 1.0
    max_tokens: Annotated[int, arg(aliases=["-m"])] = 512
    seed: int | None = None
    """the same answers each time; none: others"""
    device_type: str = ""


def answer(session: ChatSession, text: str) -> None:
    """Say `text` (or "/retry" the last question) and print what comes."""
    printer = Printer()
    with ctrl_c_stops(session):
        done = session.regenerate(printer) if text == "/retry" else session.send(text, printer)
    note = "" if done.finish_reason == "stop" else f" [{done.finish_reason}]"
    printer.end(note + f" [{session.forgotten} oldest messages left out]" * bool(session.forgotten))

# %%
#| export scripts/chat_cli
#| cli chat_cli
def chat_cli(settings: ChatCli) -> None:
    """Talk to a model in the terminal."""
    with contextlib.suppress(AttributeError):  # a notebook's output takes every character
        sys.stdout.reconfigure(errors="replace")
    model = ChatModel.load(settings.source, settings.model_tag, settings.step, pick_device(settings.device_type))
    session = ChatSession(model, Sampling(settings.temperature, settings.top_k, settings.max_tokens, settings.seed,
                                          settings.top_p))
    if settings.prompt:
        return answer(session, settings.prompt)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and earlier lines at the prompt, where the system has it
    print(f"{model.name}: {HELP}")
    while True:
        try:
            text = input("\n> ").strip()
        except KeyboardInterrupt:
            print(f"\n{HELP}")
            continue
        except EOFError:
            return print()
        if text in ("/quit", "/exit", "quit", "exit"):
            return
        if text in ("/clear", "clear"):
            session.clear()
            print("cleared")
        elif text:
            try:
                if text == "/save":
                    print(f"saved as {' and '.join(path.name for path in save(session.messages, model=model.name))}")
                else:
                    answer(session, text)
            except NanochatError as error:
                print(f"error: {error}")

# %% [markdown]
# ## The web server
#
# A server has many talkers and few models. It keeps one replica per GPU, each in a thread of its own with a running
# batch (lesson 08): a question joins the batch of the freest replica, and leaves it when it is answered. Questions
# that find no row wait in one line. When that is full the answer is *429, try again later*, at once: a line that grows
# without end serves nobody. When a client goes away, its row is freed within a token.

# %%
#| export serving
"""Model replicas that answer many talkers at once: one line of questions, a running batch for each replica."""


import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nanochat_lib.batch import Request, Token
from nanochat_lib.chat import Answer, ChatModel, Piece, Sampling

# %%
#| export serving
class Full(Exception):
    """The line of waiting questions is as long as it may get."""


class Broken(Exception):
    """No replica is left to answer."""


@dataclass(eq=False)
class Job:
    """A question in line. `deliver` gets each piece, then the error if any, then None; from another thread."""

    answer: Answer
    deliver: Callable[[Piece | Exception | None], None]

    def __post_init__(self):
        self.request = Request(self.answer.prompt, **self.answer.sampling.settings(), sample=self.answer.number,
                               watch=self.watch, top=self.answer.top)

    def watch(self, token: Token) -> None:
        if piece := self.answer.take(token):
            self.deliver(piece)


class Replica:
    """One model with its running batch."""

    def __init__(self, model: ChatModel, rows: int):
        self.model, self.rows = model, min(rows, model.engine.rows_that_fit(model.context))
        self.broken = False  # its device answers no more
        self.begin()
        self.warm_up()

    def begin(self) -> None:
        self.batch, self.jobs = self.model.engine.batch(self.rows), {}

    def warm_up(self) -> None:
        """Answer in a few tokens, one row and then two, so that no talker waits for what is compiled on first use."""
        for rows in 1, 2:
            for number in range(rows):
                answer = Answer(self.model, [{"role": "user", "content": "hi"}], Sampling(max_tokens=2, seed=number))
                self.add(Job(answer, lambda event: None))
            while self.jobs:
                if errors := [error for _, error in self.step() if error]:
                    raise errors[0]

    def add(self, job: Job) -> None:
        self.jobs[job.request] = job
        self.batch.add(job.request)

    def step(self) -> list[tuple[Job, Exception | None]]:
        """One token for every row; returns the jobs that are over with their errors, which do not end the replica."""
        for request, job in self.jobs.items():
            if job.answer.stopped.is_set():
                job.answer.finish_reason = job.answer.finish_reason or "stopped"  # or a stop string ended it
                self.batch.cancel(request)
        try:
            return [(self.jobs.pop(request), None) for request in self.batch.step()]
        except Exception as error:
            failed = [(job, error) for job in self.jobs.values()]
            try:
                self.begin()
            except Exception:  # not even an empty batch can be made
                self.broken, self.jobs = True, {}
            return failed

# %%
#| export serving
class Pool:
    """Replicas of one model and the line before them; at most `max_waiting` questions wait."""

    def __init__(self, models: list[ChatModel], max_waiting: int = 64, rows: int = 16):
        self.replicas = [Replica(model, rows) for model in models]
        self.max_waiting, self.started = max_waiting, time.time()
        self.waiting: deque[Job] = deque()
        self.changed = threading.Condition()
        self.counts = dict.fromkeys(
            ("finished", "stopped", "failed", "refused", "prompt_tokens", "completion_tokens"), 0)
        for replica in self.replicas:
            threading.Thread(target=self.serve, args=(replica,), daemon=True).start()

    def submit(self, *jobs: Job) -> None:
        """Put questions in line, all or none. Raises Full if there is no room, Broken if nobody is left to answer."""
        with self.changed:
            if not self.replicas:
                raise Broken
            for gone in [waiting for waiting in self.waiting if waiting.answer.stopped.is_set()]:
                self.waiting.remove(gone)
                self.counts["stopped"] += 1
                gone.deliver(None)
            running = sum(len(replica.jobs) for replica in self.replicas)
            places = self.max_waiting + sum(replica.rows for replica in self.replicas)
            if running + len(self.waiting) + len(jobs) > places:
                self.counts["refused"] += len(jobs)
                raise Full
            self.waiting.extend(jobs)
            self.changed.notify_all()

    def may_take(self, replica: Replica) -> bool:
        """There is a question, and no replica is freer than this one."""
        freest = min(self.replicas, key=lambda replica: len(replica.jobs) / replica.rows)
        return bool(self.waiting) and replica is freest and len(replica.jobs) < replica.rows

    def serve(self, replica: Replica) -> None:
        """Answer for ever: let questions join, take a step, send away what is over."""
        try:
            while not replica.broken:
                with self.changed:
                    self.changed.wait_for(lambda: replica.jobs or self.may_take(replica))
                    while self.may_take(replica):
                        replica.add(self.waiting.popleft())
                    self.changed.notify_all()
                for job, error in replica.step():
                    self.close(job, error)
        finally:
            self.lose(replica)

    def lose(self, replica: Replica) -> None:
        """A replica has ended, whatever the reason: nobody waits for it."""
        with self.changed:
            self.replicas.remove(replica)
            lost = list(replica.jobs.values())
            if not self.replicas:
                lost += self.waiting
                self.waiting = deque()
            self.changed.notify_all()
        for job in lost:
            self.close(job, Broken("the model's replica has ended"))

    def close(self, job: Job, error: Exception | None) -> None:
        """Count an answer that is over, and tell its talker."""
        outcome = "failed" if error else "stopped" if job.answer.finish_reason == "stopped" else "finished"
        with self.changed:
            self.counts[outcome] += 1
            self.counts["prompt_tokens"] += len(job.answer.prompt)
            self.counts["completion_tokens"] += job.answer.tokens
        if error:
            job.deliver(error)
        job.deliver(None)

    def stop(self) -> None:
        """End all answers at once, since the server goes; their talkers are told."""
        with self.changed:
            jobs = [*self.waiting, *(job for replica in self.replicas for job in list(replica.jobs.values()))]
        for job in jobs:
            job.deliver(Broken("the server was stopped"))
            job.answer.stop()

    def stats(self) -> dict[str, float | int]:
        """What the server does now, and did since it started."""
        with self.changed:
            return {"uptime_seconds": round(time.time() - self.started, 1), "replicas": len(self.replicas),
                    "rows": sum(replica.rows for replica in self.replicas),
                    "running": sum(len(replica.jobs) for replica in self.replicas),
                    "waiting": len(self.waiting), "max_waiting": self.max_waiting, **self.counts}

# %%
#| export protocol
"""OpenAI's chat-completions format: requests read and checked, replies written, whole or as a stream."""


import asyncio
import contextlib
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from fastapi import Request

from nanochat_lib.chat import Answer, ChatModel, Piece, Sampling, newest
from nanochat_lib.common import NanochatError
from nanochat_lib.serving import Broken, Job

# %%
#| export protocol
MAX_MESSAGES, MAX_CHARACTERS, MAX_CHARACTERS_IN_ALL = 500, 8_000, 32_000
MAX_TEMPERATURE, MAX_TOP_K, MAX_TOKENS, MAX_TOP_LOGPROBS = 2.0, 200, 4_096, 20
MAX_STOPS, MAX_STOP_LENGTH, MAX_CHOICES = 4, 200, 16
ONLY = {  # parameters of the format that are taken only where they change nothing
    "presence_penalty": (0,), "frequency_penalty": (0,), "tools": ([],), "tool_choice": ("none", "auto"),
    "functions": ([],), "function_call": ("none", "auto"), "logit_bias": ({},), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "audio": (), "prediction": (), "store": (False,), "echo": (False,),
}


class ApiError(Exception):
    """A request that is refused, in OpenAI's terms."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def number(body: dict, name: str, default: Any, low: float, high: float, kind: type = float) -> Any:
    """A number of the request within its limits, both included."""
    value = body.get(name)
    if value is None:
        return default
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not fits or kind(value) != value:
        what = "an integer" if kind is int else "a number"
        raise ApiError(400, f"{name} must be {what} from {low:g} to {high:g}", name)
    return kind(value)


def flag(body: dict, name: str) -> bool:
    """A yes or no of the request; absent and null are no."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", name)
    return bool(value)


def read_stop(body: dict) -> tuple[str, ...]:
    """The strings that end an answer: one, or a list of up to four."""
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(
            isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in stop):
        raise ApiError(400, f"stop must be a string, or a list of up to {MAX_STOPS}, of 1 to {MAX_STOP_LENGTH} "
                            "characters each", "stop")
    return tuple(stop)

# %%
#| export protocol
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
NEXT = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}
PARTS = {"user": ("text",), "system": ("text",), "assistant": ("text", "python", "python_output")}


def characters(parts: list[dict]) -> int:
    return sum(len(part["text"]) for part in parts)


def read_content(message: dict, role: str, where: str) -> list[dict]:
    """The content of one message as parts; a plain string is one part."""
    content = message.get("content")
    if content is None and role == "assistant":  # it said nothing
        content = []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts if isinstance(parts, list) else [None]:
        if not (isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type") in PARTS[role]):
            raise ApiError(400, f"{where}.content must be a string, or a list of {{type, text}} with type "
                                f"{' or '.join(PARTS[role])}", f"{where}.content")
    return [{"type": part["type"], "text": part["text"]} for part in parts]


def read_turns(given: Any) -> list[dict]:
    """User and assistant take turns, the user has the last word. `sent`: the characters of each message as it came."""
    if not isinstance(given, list) or not given:
        raise ApiError(400, f"messages must be a list of 1 to {MAX_MESSAGES} messages", "messages")
    messages: list[dict] = []
    for place, message in enumerate(given):
        where = f"messages[{place}]"
        role = ROLES.get(str(message.get("role"))) if isinstance(message, dict) else None
        if role is None:
            raise ApiError(400, f"{where} needs a role: {', '.join(ROLES)}", where)
        parts = read_content(message, role, where)
        before = messages[-1]["role"] if messages else None
        if role == before:  # two in a row are one, as other servers have it
            messages[-1]["content"] += [{"type": "text", "text": "\n\n"}, *parts]
            messages[-1]["sent"][where] = characters(parts)
            continue
        if role not in NEXT[before]:
            raise ApiError(400, f"{where} is by {role}, where {' or '.join(NEXT[before])} should speak", where)
        messages.append({"role": role, "content": parts, "sent": {where: characters(parts)}})
    if messages[-1]["role"] != "user":
        raise ApiError(400, "the last message must be by user", "messages")
    return messages


def how_many(messages: list[dict]) -> int:
    return sum(len(message["sent"]) for message in messages)


def how_long(messages: list[dict]) -> int:
    return sum(sum(message["sent"].values()) for message in messages)


def read_messages(body: dict, fit: Callable[[list[dict]], list[dict]] | None = None) -> list[dict]:
    """The conversation of a request, checked; with `fit` what goes beyond a limit in all is left out, oldest first."""
    messages = read_turns(body.get("messages"))
    if fit:
        messages = newest(messages, MAX_MESSAGES, how_many)
        messages = fit(newest(messages, MAX_CHARACTERS_IN_ALL, how_long))
    if how_many(messages) > MAX_MESSAGES:
        raise ApiError(400, f"messages must be a list of 1 to {MAX_MESSAGES} messages", "messages")
    for message in messages:
        for where, length in message["sent"].items():
            if length > MAX_CHARACTERS and message["role"] != "assistant":  # an answer is as long as the model made it
                raise ApiError(400, f"{where} is longer than {MAX_CHARACTERS:,} characters", f"{where}.content")
    if how_long(messages) > MAX_CHARACTERS_IN_ALL:
        raise ApiError(400, f"the messages are longer than {MAX_CHARACTERS_IN_ALL:,} characters in all", "messages")
    for message in messages:
        del message["sent"]
        if all(part["type"] == "text" for part in message["content"]):
            message["content"] = "".join(part["text"] for part in message["content"])
    return messages

# %%
#| export protocol
def read_request(body: dict, model: ChatModel, defaults: Sampling) -> list[Answer]:
    """The answers that a request asks for (one, or `n`), not yet begun."""
    if body.get("model") not in (None, "", model.name):
        asked = str(body["model"])[:80]
        raise ApiError(404, f"there is no model {asked!r} here: it is {model.name}", "model", "model_not_found")
    for name, harmless in ONLY.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise ApiError(400, f"{name} is not supported here", name, "unsupported_parameter")
    length = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    sampling = Sampling(number(body, "temperature", defaults.temperature, 0, MAX_TEMPERATURE),
                        number(body, "top_k", defaults.top_k, 0, MAX_TOP_K, int),
                        number(body, length, defaults.max_tokens, 1, MAX_TOKENS, int),
                        number(body, "seed", None, -2**63, 2**63 - 1, int), number(body, "top_p", 1.0, 1e-6, 1),
                        read_stop(body))
    top = number(body, "top_logprobs", 0, 0, MAX_TOP_LOGPROBS, int)
    if top and not flag(body, "logprobs"):
        raise ApiError(400, "top_logprobs is given only together with logprobs: true", "top_logprobs")
    count = number(body, "n", 1, 1, MAX_CHOICES, int)
    # as in OpenAI's newer API: leave out the oldest messages that do not fit
    messages = read_messages(body, model.fit if body.get("truncation") == "auto" else None)
    try:
        first = Answer(model, messages, sampling, top)
        return [first, *(Answer(model, messages, sampling, top, index, first.prompt) for index in range(1, count))]
    except NanochatError as error:
        raise ApiError(400, str(error), "messages", "context_length_exceeded") from None


def logprobs(answer: Answer, start: int, end: int) -> dict:
    """Log-probabilities of the words among tokens start … end − 1, in OpenAI's terms: {"content": [{token, …}, …]}.

    They are the model's own: of temperature 1, before top-k and top-p, whatever the answer was sampled with.
    """
    tokenizer = answer.model.tokenizer

    def entry(token: int, logprob: float) -> dict:
        data = tokenizer.tokens[token] if token < len(tokenizer.tokens) else tokenizer.id_to_token(token).encode()
        return {"token": tokenizer.id_to_token(token), "logprob": logprob, "bytes": list(data)}

    words = [token for kind, token in answer.said[start:end] if kind == "text" and token.id < len(tokenizer.tokens)]
    return {"content": [{**entry(token.id, token.logprob),
                         "top_logprobs": [entry(id_, math.log(max(chance, 1e-30))) for id_, chance in token.top]}
                        for token in words], "refusal": None}

# %%
#| export protocol
class Reply:
    """The answers to one request in OpenAI's format, whole or as a stream of chunks."""

    def __init__(self, answers: list[Answer], include_usage: bool, with_logprobs: bool = False):
        self.answers, self.include_usage, self.with_logprobs = answers, include_usage, with_logprobs
        self.read = [0] * len(answers)  # tokens of each answer behind the pieces taken so far
        self.told = [0] * len(answers)  # those whose log-probabilities have been sent
        self.events: asyncio.Queue[tuple[int, Piece | Exception | None, int]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": answers[0].model.name}

    def jobs(self) -> list[Job]:
        """The answers as questions to a pool."""
        return [Job(answer, partial(self.deliver, index)) for index, answer in enumerate(self.answers)]

    def deliver(self, index: int, event: Piece | Exception | None) -> None:
        """Called in a replica's thread; notes how many tokens there were, which may be more when the piece is sent."""
        with contextlib.suppress(RuntimeError):  # the server has shut down meanwhile
            self.loop.call_soon_threadsafe(self.events.put_nowait, (index, event, self.answers[index].tokens))

    def stop(self) -> None:
        """End all answers."""
        for answer in self.answers:
            answer.stop()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | None]]:
        """(answer, piece) as they come, each answer's last piece None.

        An error of a replica is an ApiError here: what it was is no business of the client.
        """
        left = len(self.answers)
        while left:
            index, event, self.read[index] = await self.events.get()
            if isinstance(event, Broken):
                raise ApiError(503, str(event))
            if isinstance(event, Exception):
                raise ApiError(500, f"the model failed: {type(event).__name__}")
            left -= event is None
            yield index, event

    def finish_reason(self, index: int) -> str:
        return "length" if self.answers[index].finish_reason in ("length", "context") else "stop"

    @property
    def usage(self) -> dict:
        prompt, completion = len(self.answers[0].prompt), sum(answer.tokens for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def whole(self, request: Request) -> dict:
        """The response object. Should the client go away, its answers end (and nobody reads this)."""
        async def until_gone():
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.stop()

        watch = asyncio.create_task(until_gone())
        try:
            async for _ in self.pieces():
                pass
        finally:
            self.stop()
            watch.cancel()
        return {**self.head, "object": "chat.completion", "choices": [self.choice(i) for i in range(len(self.answers))],
                "usage": self.usage}

    def choice(self, index: int) -> dict:
        """One whole answer."""
        answer = self.answers[index]
        content = answer.content
        text = "".join(part["text"] for part in answer.reader.parts if part["type"] == "text")
        message = {"role": "assistant", "content": text, **({} if isinstance(content, str) else {"parts": content})}
        return {"index": index, "message": message, "finish_reason": self.finish_reason(index),
                "logprobs": self.news(index)}

    def news(self, index: int) -> dict | None:
        """Log-probabilities of an answer's tokens since the last call, up to the last piece taken, if wanted."""
        if not self.with_logprobs:
            return None
        start, self.told[index] = self.told[index], self.read[index]
        return logprobs(self.answers[index], start, self.told[index])

    def chunk(self, index: int, delta: dict, finish_reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": self.news(index)}
        usage = {"usage": None} if self.include_usage else {}
        return event_line({**self.head, "object": "chat.completion.chunk", "choices": [choice], **usage})

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events. Calculator calls and results are `delta.part`s: plain clients see words only."""
        try:
            for index in range(len(self.answers)):
                yield self.chunk(index, {"role": "assistant", "content": ""})
            async for index, piece in self.pieces():
                if piece is None:
                    yield self.chunk(index, {}, self.finish_reason(index))
                    continue
                part = {"type": piece.kind, "text": piece.text}
                delta = {"content": piece.text} if piece.kind == "text" else {"part": part}
                yield self.chunk(index, {**delta, "part_index": piece.part})
            if self.include_usage:
                yield event_line({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield event_line(error.body)
        finally:
            self.stop()  # reached, too, when the client has gone

# %%
#| export protocol
def event_line(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=True)}\n\n"

# %%
#| export scripts/chat_web
"""Serve a model: one web page to chat on, and OpenAI's chat-completions API for any client."""


import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from tyro.conf import arg

import nanochat_lib
from nanochat_lib.chat import ChatModel, Sampling
from nanochat_lib.common import NanochatError, pick_device, run_cli
from nanochat_lib.protocol import MAX_TEMPERATURE, MAX_TOKENS, MAX_TOP_K, ApiError, Reply, flag, read_request
from nanochat_lib.serving import Broken, Full, Pool

# %%
#| export scripts/chat_web
MAX_BYTES = 1 << 20  # of a request: far more than the limits of its messages let through
SECONDS_TO_SEND = 20
LOOPBACK = ("127.0.0.1", "localhost")


async def read_body(request: Request) -> dict:
    """The JSON object of a request, of bounded size, sent in bounded time."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # a form on another web site cannot send this type, so it cannot make the model work
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    async def receive() -> bytes:
        data = b""
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_BYTES:
                raise ApiError(413, f"the request is larger than {MAX_BYTES:,} bytes")
        return data

    try:
        data = await asyncio.wait_for(receive(), SECONDS_TO_SEND)
    except (asyncio.TimeoutError, ClientDisconnect):
        raise ApiError(408, f"the request was not whole within {SECONDS_TO_SEND} seconds") from None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise ApiError(400, "the request is not JSON") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the request must be a JSON object")
    return body

# %%
#| export scripts/chat_web
@dataclass
class ChatWeb:
    """Settings of the server."""

    source: Annotated[str, arg(aliases=["-i"])] = ""
    """stage of the model: rl, sft or base; "" takes the best there is"""
    model_tag: Annotated[str | None, arg(aliases=["-g"])] = None
    step: Annotated[int | None, arg(aliases=["-s"])] = None
    num_gpus: Annotated[int, arg(aliases=["-n"])] = -1
    """replicas, one per GPU; -1: on all there are"""
    temperature: Annotated[float, arg(aliases=["-t"])] = 0.8
    """of requests that name none; so with top-k and max-tokens"""
    top_k: Annotated[int, arg(aliases=["-k"])] = 50
    max_tokens: Annotated[int, arg(aliases=["-m"])] = 512
    rows: int = 16
    """answers that a replica writes at once"""
    max_waiting: int = 64
    """questions that may wait in line; one more is answered with 429"""
    host: str = "127.0.0.1"
    """0.0.0.0 opens the server to the network"""
    port: Annotated[int, arg(aliases=["-p"])] = 8000
    api_key: str = ""
    """key that clients must send; "" takes $NANOCHAT_API_KEY (which no list of processes shows), and if that is empty
    everyone may ask"""
    cors: str = ""
    """another web site whose pages may call this server, e.g. https://example.org"""
    device_type: str = ""


LIMITS = {"temperature": (0, MAX_TEMPERATURE), "top_k": (0, MAX_TOP_K), "max_tokens": (1, MAX_TOKENS),
          "rows": (1, 1_024), "max_waiting": (0, 10_000)}


def check(settings: ChatWeb) -> None:
    """NanochatError for a setting with which no request could be answered."""
    for name, (low, high) in LIMITS.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise NanochatError(f"--{name.replace('_', '-')} {value:g}: give a number from {low:g} to {high:,g}")

# %%
#| export scripts/chat_web
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
          "form-action 'none'; frame-ancestors 'none'; script-src 'sha256-{}'")


def policy(page: str) -> str:
    """What a browser may do for the page: run the script it has, and no other."""
    script = re.search("<script>(.*)</script>", page, re.DOTALL)[1]
    return POLICY.format(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())


def make_app(pool: Pool, settings: ChatWeb) -> FastAPI:
    """The server over a pool of replicas."""
    async def at_home(request: Request) -> None:
        name = request.headers.get("host", "").partition(":")[0]
        if settings.host in LOOPBACK and name not in LOOPBACK:  # a web site that renames itself to this address
            raise ApiError(400, f"this server answers to {' and '.join(LOOPBACK)} only, unless started with --host")

    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(at_home)])
    if settings.cors:
        app.add_middleware(CORSMiddleware, allow_origins=[settings.cors], allow_methods=["GET", "POST"],
                           allow_headers=["Authorization", "Content-Type"])
    key = settings.api_key or os.environ.get("NANOCHAT_API_KEY", "")
    defaults = Sampling(settings.temperature, settings.top_k, settings.max_tokens)
    page = (Path(nanochat_lib.__file__).parent / "chat.html").read_text()
    rules = policy(page)
    model = pool.replicas[0].model

    async def guard(request: Request) -> None:
        sent = request.headers.get("authorization", "").encode("latin-1")
        if key and not hmac.compare_digest(sent, b"Bearer " + key.encode()):  # takes as long, however much is right
            raise ApiError(401, "this server wants its key: send it as Authorization: Bearer KEY",
                           code="invalid_api_key")

    guarded = [Depends(guard)]

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        return JSONResponse(ApiError(500, "the server failed").body, 500)

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": rules, "X-Content-Type-Options": "nosniff"})

    @app.post("/v1/chat/completions", dependencies=guarded)
    @app.post("/chat/completions", dependencies=guarded)
    async def complete(request: Request) -> Response:
        body = await read_body(request)
        stream, options = flag(body, "stream"), body.get("stream_options") or {}
        if not isinstance(options, dict):
            raise ApiError(400, "stream_options must be an object", "stream_options")
        reply = Reply(read_request(body, model, defaults), flag(options, "include_usage"), flag(body, "logprobs"))
        try:
            pool.submit(*reply.jobs())
        except Full:
            raise ApiError(429, "all replicas are busy and the line is full: try again in a moment") from None
        except Broken:
            raise ApiError(503, "the model is gone: restart the server") from None
        if stream:
            return StreamingResponse(reply.stream(), 200, {"Cache-Control": "no-store"}, "text/event-stream")
        return JSONResponse(await reply.whole(request))

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict:
        card = {"id": model.name, "object": "model", "created": int(pool.started), "owned_by": "nanochat"}
        return {"object": "list", "data": [{**card, "context": model.context, "defaults": asdict(defaults)}]}

    @app.get("/health")
    async def health() -> Response:
        whole = {"status": "ok" if pool.replicas else "broken", "model": model.name}
        return JSONResponse(whole, 200 if pool.replicas else 503)

    @app.get("/stats", dependencies=guarded)
    async def stats() -> dict:
        return {**pool.stats(), "memory_bytes": psutil.Process().memory_info().rss}

    return app

# %%
#| export scripts/chat_web
class Server(uvicorn.Server):
    """Ends the answers being written before it goes: uvicorn would wait for them, then break them off with a traceback."""

    def __init__(self, config: uvicorn.Config, pool: Pool):
        super().__init__(config)
        self.pool = pool

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.pool.stop()
        super().handle_exit(sig, frame)

# %%
#| export scripts/chat_web
#| cli chat_web
def chat_web(settings: ChatWeb) -> None:
    """Serve a model to browsers and to clients of OpenAI's API."""
    check(settings)
    kind = pick_device(settings.device_type)
    gpus = torch.cuda.device_count() if kind == "cuda" else 1
    replicas = gpus if settings.num_gpus < 0 else settings.num_gpus
    if not 1 <= replicas <= gpus:
        raise NanochatError(f"--num-gpus {replicas}: this machine can hold 1 to {gpus} replicas")
    devices = [f"cuda:{index}" for index in range(replicas)] if kind == "cuda" else [kind]
    models = [ChatModel.load(settings.source, settings.model_tag, settings.step, device) for device in devices]
    pool = Pool(models, settings.max_waiting, settings.rows)
    app = make_app(pool, settings)
    print(f"{models[0].name} on {', '.join(devices)}: http://{settings.host}:{settings.port}", flush=True)
    if settings.host not in LOOPBACK and not (settings.api_key or os.environ.get("NANOCHAT_API_KEY")):
        print("anyone who reaches this machine can use it: set NANOCHAT_API_KEY to ask for a key", flush=True)
    Server(uvicorn.Config(app, host=settings.host, port=settings.port, log_level="warning",
                          timeout_graceful_shutdown=2), pool).run()

# %% [markdown]
# `python -m nanochat_lib.scripts.chat_web`, then http://127.0.0.1:8000: the page (`nanochat_lib/chat.html`) is one
# file that loads nothing from elsewhere. Whatever a model writes is shown as text, never run as markup; of Markdown,
# code, bold type and headings become elements that the page makes itself. Under *Settings*, *show probabilities*
# colours the next answers token by token, as the notebook's box does. The same address serves programs. Here one asks
# a server that runs in a thread of this notebook, and reads the answer as it comes:

# %%
# NBVAL_IGNORE_OUTPUT
import socket
from urllib.request import Request as WebRequest, urlopen

from nanochat_lib.protocol import ApiError, read_messages
from nanochat_lib.serving import Pool

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
settings = ChatWeb(port=port, temperature=0)
server = uvicorn.Server(uvicorn.Config(make_app(Pool([session.model]), settings), port=port, log_level="warning"))
threading.Thread(target=server.run, daemon=True).start()
while not server.started:
    time.sleep(0.05)

question = "Lena buys 5 eggs for 4 pence each and a hat for 20 pence. How many pence does Lena pay?"
body = {"messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 64}
web_request = WebRequest(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
                         {"Content-Type": "application/json"})
with urlopen(web_request) as stream:
    for line in map(bytes.decode, stream):
        if line.startswith("data: {"):
            delta = json.loads(line[6:])["choices"][0]["delta"]
            print(delta.get("content") or delta.get("part", {}).get("text", ""), end="|")

# %% [markdown]
# Each bar ends an event of the stream.
#
# With OpenAI's own client it is `openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")`. `stop`, `seed`,
# `top_p`, `logprobs` and their like are heeded, and `n` answers to one question share its prompt; what would be ignored
# (`tools`, `response_format`) is refused. (Log-probabilities are the model's own, of temperature 1 before top-k and
# top-p, whatever the answer was sampled with.) A chat that has outgrown the limits is refused as well, unless the
# request says `"truncation": "auto"`, as those of the page do: then its oldest exchanges are left out. And what is
# wrong with a request is said before any model works on it:

# %%
for messages in ([], [{"role": "assistant", "content": "me first"}], [{"role": "user", "content": "x" * 9000}]):
    try:
        read_messages({"messages": messages})
    except ApiError as error:
        print(error.status, error)

# %% [markdown]
# The server listens on this machine alone. `--host 0.0.0.0` opens it to the network; then give it a key too, in
# `$NANOCHAT_API_KEY` or by `--api-key`. Pages of other web sites may not call it, unless `--cors` names theirs.
#
# ## Will it hold?
#
# A server meets clients that send nonsense, vanish in the middle of an answer, and come all at once. `chat_load` plays
# them: half of its requests are malformed, some leave early, and every answer that arrives is compared with what
# the engine says to that prompt alone. An answer that is lost, or belongs to someone else, would show.

# %%
#| export load
"""Clients that try a chat server: many at once, half of them malformed, some vanishing; every answer is checked."""


import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field

# %%
#| export load
GOOD = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
WRONG = [("messages", value) for value in (  # in place of a field of a good request
    None, [], {}, "hi", [None], [["user", "hi"]], [{"role": "user"}], [{"content": "hi"}],
    [{"role": "robot", "content": "hi"}], [{"role": "assistant", "content": "hi"}],
    [{"role": "user", "content": {"a": 1}}], [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
    [{"role": "user", "content": "x" * 8001}], [{"role": "user", "content": "hi"}] * 501)
] + [("temperature", value) for value in (-1, 2.5, "hot", [], True, 1e999)] + [
    ("max_tokens", value) for value in (0, -5, 5000, 1.5, "many", {})] + [
    ("top_p", value) for value in (0, 1.1, "x")] + [("top_k", value) for value in (-1, 201, 0.5)] + [
    ("n", 0), ("n", 17), ("stop", 5), ("stop", [""]), ("stop", ["a"] * 5), ("seed", "x"), ("seed", 10**30),
    ("stream", "yes"), ("stream_options", 3), ("logprobs", 1), ("top_logprobs", 5), ("model", "gpt-0"), ("model", {"a": []}),
    ("tools", [{"type": "function"}]), ("response_format", {"type": "json_object"})]
RAW = [b"", b"{", b"null", b"[]", b'"hi"', b"\xff\xfe\x00", b"[" * 50_000, b'{"messages": ' + b"9" * 5000 + b"}",
       b" " * (1 << 20) + b" {}"]


def malformed(dice: random.Random) -> bytes:
    """The body of a request that a server must refuse."""
    if dice.random() < 0.25:
        return dice.choice(RAW)
    name, value = dice.choice(WRONG)
    body = json.dumps({**GOOD, name: value}).encode()
    return body[:dice.randrange(1, len(body))] if dice.random() < 0.1 else body


def http(host: str, method: str, path: str, body: bytes, key: str = "") -> bytes:
    """A whole HTTP/1.1 request, the connection closed after it."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", "Content-Type: application/json",
             f"Content-Length: {len(body)}", *[f"Authorization: Bearer {key}"] * bool(key), "", ""]
    return "\r\n".join(lines).encode() + body

async def ask(address: str, key: str, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """(status, body) of a request that is answered in one piece; status 0 if the connection broke."""
    reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
    with contextlib.closing(writer):
        with contextlib.suppress(OSError):  # a request too large is refused before it has been sent
            writer.write(http(address, method, path, body, key))
            await writer.drain()
        try:
            head, _, rest = (await reader.read(-1)).partition(b"\r\n\r\n")
            return int(head.split(b" ", 2)[1]), rest
        except (OSError, IndexError, ValueError):
            return 0, b""

# %%
#| export load
MAX_GROWTH = 100_000_000  # bytes a server may take after the first quarter of the load: it has seen every kind by then


@dataclass
class Results:
    """What the clients saw."""

    statuses: Counter = field(default_factory=Counter)  # of malformed requests
    outcomes: Counter = field(default_factory=Counter)  # of others: right, wrong, crossed, lost, failed, refused, left
    first_token: list[float] = field(default_factory=list)  # seconds until it came
    seconds: float = 0.0
    memory: list[int] = field(default_factory=list)  # bytes the server held after each quarter

    def quantile(self, share: float) -> float:
        """Seconds to the first token that this share of the proper requests did not exceed."""
        times = sorted(self.first_token) or [float("nan")]
        return times[min(len(times) - 1, int(share * len(times)))]

    @property
    def faults(self) -> list[str]:
        """What no server may do; an empty list if it did nothing of that."""
        grown = self.memory[-1] - self.memory[0] if self.memory else 0
        return [f"{count} malformed requests were answered with status {status}"
                for status, count in sorted(self.statuses.items()) if not 400 <= status < 500] + [
                f"{self.outcomes[name]} answers were {name}" for name in ("wrong", "crossed", "lost", "failed")
                if self.outcomes[name]] + [
                f"the server's memory grew by {grown / 1e6:.0f} MB after the first quarter"] * (grown > MAX_GROWTH)

# %%
#| export load
class Load:
    """Clients of the server at host:port. `expected` has each proper request's body as JSON, and the answer to it."""

    def __init__(self, address: str, expected: dict[str, str], vanish: float = 0.1, seed: int = 0, key: str = ""):
        self.address, self.expected, self.vanish, self.key = address, expected, vanish, key
        self.dice, self.results = random.Random(seed), Results()

    async def break_off(self) -> None:
        """Begin a request, and go away before it is whole."""
        request = http(self.address, "POST", "/v1/chat/completions", json.dumps(GOOD).encode(), self.key)
        _, writer = await asyncio.open_connection(*self.address.rsplit(":", 1))
        with contextlib.closing(writer), contextlib.suppress(OSError):
            writer.write(request[:self.dice.randrange(1, len(request))])
            await writer.drain()
        self.results.outcomes["broken off"] += 1

    async def talk(self, request: str) -> None:
        """Send a proper request and read its stream; or leave in the middle."""
        leave = self.dice.randrange(1, 6) if self.dice.random() < self.vanish else 0  # after so many events
        began, text, events, done = time.perf_counter(), "", 0, False
        reader, writer = await asyncio.open_connection(*self.address.rsplit(":", 1))
        with contextlib.closing(writer), contextlib.suppress(OSError):
            writer.write(http(self.address, "POST", "/v1/chat/completions", request.encode(), self.key))
            status = int((await reader.readline()).split()[1])
            if status != 200:
                self.results.outcomes["refused" if status == 429 else "failed"] += 1
                return
            async for line in reader:
                done = done or line.startswith(b"data: [DONE]")
                if not line.startswith(b"data: {"):
                    continue
                events += 1
                delta = (json.loads(line[6:]).get("choices") or [{}])[0].get("delta", {})
                said = delta.get("content") or delta.get("part", {}).get("text", "")
                if said and not text:
                    self.results.first_token.append(time.perf_counter() - began)
                text += said
                if events == leave:
                    self.results.outcomes["vanished"] += 1
                    return
        self.results.outcomes[self.judge(request, text) if done else "lost"] += 1

    def judge(self, request: str, text: str) -> str:
        """Whether a whole answer is the one due to this request."""
        if text == self.expected[request]:
            return "right"
        return "crossed" if text in self.expected.values() else "wrong"

    async def client(self, tasks: list[str]) -> None:
        """Take requests from the list until it is empty; "" stands for a malformed one."""
        while tasks:
            if request := tasks.pop():
                await self.talk(request)
            elif self.dice.random() < self.vanish / 2:
                await self.break_off()
            else:
                body = malformed(self.dice)
                status, _ = await ask(self.address, self.key, "POST", "/v1/chat/completions", body)
                self.results.statuses[status] += 1

    async def stats(self) -> dict:
        return json.loads((await ask(self.address, self.key, "GET", "/stats"))[1])

    async def run(self, requests: int, clients: int) -> Results:
        """Send so many requests, half of them malformed, from so many clients at once."""
        proper, began = list(self.expected), time.perf_counter()
        for quarter in range(4):
            count = requests * (quarter + 1) // 4 - requests * quarter // 4
            tasks = [self.dice.choice(proper) if number % 2 else "" for number in range(count)]
            self.dice.shuffle(tasks)
            await asyncio.gather(*(self.client(tasks) for _ in range(clients)))
            self.results.memory.append((await self.stats()).get("memory_bytes", 0))
        self.results.seconds = time.perf_counter() - began
        return self.results

# %%
#| export scripts/chat_load
"""Try a chat server: many clients at once, half of their requests malformed, some vanishing; every answer is checked.

    python -m nanochat_lib.scripts.chat_load                                     # a small model of its own
    python -m nanochat_lib.scripts.chat_load --source sft                        # a trained one
    python -m nanochat_lib.scripts.chat_load --address 127.0.0.1:8000            # a server that is running
"""


import asyncio
import json
import random
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import torch
import uvicorn

from nanochat_lib.chat import Answer, ChatModel, Sampling
from nanochat_lib.common import NanochatError, run_cli
from nanochat_lib.engine import Engine
from nanochat_lib.gpt import GPTConfig, build_model
from nanochat_lib.load import Load, Results, ask
from nanochat_lib.scripts.chat_web import ChatWeb, check, make_app
from nanochat_lib.serving import Pool
from nanochat_lib.tokenizer import Tokenizer

# %%
#| export scripts/chat_load
WORDS = "How many apples does Lena have when she gives seven of them to her brother who lives by the mill".split()


@dataclass
class ChatLoad:
    """Settings of the load. Without --source and --address a small model of random weights is served."""

    source: str = ""
    """rl, sft or base: serve and try a checkpoint"""
    address: str = ""
    """HOST:PORT of a server that runs already; what it says to each question alone is taken as right"""
    api_key: str = ""
    clients: int = 32
    requests: int = 2000
    prompts: int = 48
    """different proper requests"""
    max_tokens: int = 16
    vanish: float = 0.1
    """share of the proper requests whose client leaves in the middle of the answer"""
    rows: int = 16
    seed: int = 0
    serve: int = 0
    """be the server, on this port (the command starts itself so)"""


def served(settings: ChatLoad) -> ChatModel:
    """The model to serve; the same in every process."""
    if settings.source:
        return ChatModel.load(settings.source, device="cpu")
    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)])  # every byte a token
    config = GPTConfig(512, tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
    torch.manual_seed(settings.seed)
    model = build_model(config, "cpu").eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # fresh blocks add nothing; these do
    return ChatModel(Engine(model, tokenizer), tokenizer, "sft", "sft-random", config.sequence_len)


def bodies(settings: ChatLoad) -> list[dict]:
    """Proper requests of different lengths, greedy ones and seeded ones: each has one right answer."""
    dice, found = random.Random(settings.seed), []
    for number in range(settings.prompts):
        text = f"{number}: " + " ".join(dice.choices(WORDS, k=dice.randint(1, 24)))
        found.append({"messages": [{"role": "user", "content": text}], "stream": True, "seed": number,
                      "max_tokens": dice.randint(1, settings.max_tokens), "temperature": float(number % 2)})
    return found

# %%
#| export scripts/chat_load
def alone(model: ChatModel, body: dict) -> str:
    """What the engine answers to this request when it has nothing else to do."""
    sampling = Sampling(body["temperature"], max_tokens=body["max_tokens"], seed=body["seed"])
    return "".join(piece.text for piece in Answer(model, body["messages"], sampling))


async def reference(load: Load, requests: list[str]) -> dict[str, str]:
    """What a running server answers to each request, one after the other."""
    answers = {}
    for request in requests:
        body = json.dumps({**json.loads(request), "stream": False}).encode()
        status, reply = await ask(load.address, load.key, "POST", "/v1/chat/completions", body)
        if status != 200:
            said = reply[:200].decode(errors="replace")
            raise NanochatError(f"{load.address} answered a proper request with status {status}: {said}")
        message = json.loads(reply)["choices"][0]["message"]
        parts = message.get("parts") or [{"text": message["content"]}]
        answers[request] = "".join(part["text"] for part in parts)
    return answers


def wait_for(process: subprocess.Popen, port: int, seconds: float = 120.0) -> None:
    """Until the server takes connections. NanochatError if it ends or takes too long."""
    end = time.monotonic() + seconds
    while socket.socket().connect_ex(("127.0.0.1", port)):
        if process.poll() is not None or time.monotonic() > end:
            raise NanochatError("the server did not start: run python -m nanochat_lib.scripts.chat_web to see why")
        time.sleep(0.1)


async def play(settings: ChatLoad, address: str, answers: dict[str, str]) -> Results:
    """All the load; the rows of those who left must be free soon after."""
    load = Load(address, answers, settings.vanish, settings.seed, settings.api_key)
    if not answers:
        load.expected = await reference(load, [json.dumps(body) for body in bodies(settings)])
    results = await load.run(settings.requests, settings.clients)
    for _ in range(100):
        if not (stats := await load.stats())["running"] + stats["waiting"]:
            return results
        await asyncio.sleep(0.1)
    raise NanochatError(f"{stats['running']} rows of {address} are still taken, though all clients have gone")


def report(settings: ChatLoad, results: Results) -> None:
    """Print what was seen."""
    counts = ", ".join(f"{count} {name}" for name, count in sorted(results.outcomes.items()))
    refused = ", ".join(f"{count} × {status}" for status, count in sorted(results.statuses.items()))
    print(f"{settings.clients} clients, {settings.requests:,} requests in {results.seconds:.1f} s: "
          f"{settings.requests / results.seconds:.0f} a second")
    print(f"proper or left: {counts}\nmalformed, with the status they got: {refused}")
    half, most = (1e3 * results.quantile(share) for share in (0.5, 0.99))
    print(f"time to the first token: median {half:.0f} ms, p99 {most:.0f} ms")
    if results.memory[0]:
        print(f"server's memory after each quarter: {', '.join(f'{size / 1e6:.0f}' for size in results.memory)} MB")

# %%
#| export scripts/chat_load
#| cli chat_load
def chat_load(settings: ChatLoad) -> None:
    """Play many clients of a chat server, and fail if it does."""
    check(server := ChatWeb(port=settings.serve, top_k=50, rows=settings.rows))
    if settings.serve:
        app = make_app(Pool([served(settings)], rows=settings.rows), server)
        return uvicorn.run(app, host="127.0.0.1", port=settings.serve, log_level="warning")
    answers, process, address = {}, None, settings.address
    if not address:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = f"127.0.0.1:{port}"
        process = subprocess.Popen([
            sys.executable, "-m", "nanochat_lib.scripts.chat_load", f"--serve={port}", f"--source={settings.source}",
            f"--seed={settings.seed}", f"--rows={settings.rows}"])
    try:
        if process:
            model = served(settings)
            answers = {json.dumps(body): alone(model, body) for body in bodies(settings)}
            wait_for(process, port)
        outcome: list[Results | Exception] = []

        def run():
            try:
                outcome.append(asyncio.run(play(settings, address, answers)))
            except Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=run)  # a notebook's own thread has a loop that runs already
        thread.start()
        thread.join()
    finally:
        if process:
            process.terminate()
            process.wait()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    report(settings, outcome[0])
    if outcome[0].faults:
        raise NanochatError("; ".join(outcome[0].faults))

# %% [markdown]
# The server above, on the trained model, for a small taste of it (the command's own default is 2,000 requests of 32
# clients):

# %%
# NBVAL_IGNORE_OUTPUT
chat_load(ChatLoad(address=f"127.0.0.1:{port}", requests=80, clients=8, prompts=8))
server.should_exit = True

# %% [markdown]
# ## Where it fails
#
# Four questions: one of the kind it was taught, one about itself, one outside its world, one that looks like its sums
# but asks for larger numbers than it ever saw.

# %%
# NBVAL_IGNORE_OUTPUT
questions = ["Tom buys 6 pies for 3 pence each and a hat for 12 pence. How many pence does Tom pay?", "Who are you?",
             "What is the capital of France?", "Tom buys 617 pies for 384 pence each. How many pence does Tom pay?"]
figure, axes = plt.subplots(len(questions), figsize=(10, 6), sharey=True, layout="constrained")
for axis, question in zip(axes, questions):
    session.clear()
    answer = session.send(question)
    ids = answer.prompt + [token.id for _, token in answer.said][:40]
    seen = looks(gpt, ids, len(answer.prompt))
    words = [tokenizer.id_to_token(look.id).replace("\n", "⏎").replace("<|", "").replace("|>", "") for look in seen]
    own = [not token.forced for _, token in answer.said]
    axis.bar(range(len(seen)), [look.probability if mine else 0 for look, mine in zip(seen, own)], color="tab:blue")
    axis.set_xticks(range(len(seen)), words, rotation=60, ha="right", fontsize=7, parse_math=False)
    sure = np.mean([look.probability for look, mine in zip(seen, own) if mine])
    axis.set_title(f"{question}  (mean probability {sure:.2f})", fontsize=9, loc="left")
    print(question, "→", "".join(words))
    axis.set(xlim=(-1, 40), ylim=(0, 1))
_ = figure.supylabel("probability of what was said")

# %% [markdown]
# Read the answers, then the bars (none stands where the calculator wrote). A wrong answer is written as fluently as a
# right one, and often with as much confidence: the probabilities say how usual a token is after these words, and
# nothing on whether it is true. Asked for what its data never held, the model goes on in the form it knows best,
# because a model that continues documents has no other way to end one. More data, more depth and better examples
# change how much it knows, not what it is.
#
# ## Exercises
#
# In [exercises/12_chat](../exercises/12_chat.ipynb):
#
# 1. `hold_back`: a stop string that comes in pieces.
# 2. `events`: reading a stream that is cut anywhere.
# 3. `fit`: which messages to forget.
# 4. Measure: how long may the line grow?
#
# That was the course: from bytes to a conversation. What you built here is the library; lesson 11 has the commands
# that make it large.
#
# **Back to** [00 · The tour](00_tour.ipynb)
