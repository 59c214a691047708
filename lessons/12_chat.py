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
# *How do I talk to it?* — 20 minutes, about one of them computing.
#
# The model continues a document; a chat is a document written by two. Everything in this lesson is bookkeeping around
# that one fact: render the conversation so far, let the engine (lesson 08) continue it, show each token as it comes,
# stop when asked. The same bookkeeping serves three doors: a box in the notebook, a terminal, a web server that any
# OpenAI client can call.

# %%
#| default_exp chat

# %%
#| export
"""Talking to a model: `Answer` streams what it says, `ChatSession` keeps the conversation."""

# %%
#| export
import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
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

# %%
#| export
@dataclass(frozen=True)
class Piece:
    """Some characters of an answer. `kind` is as in a conversation's parts: "text", "python" or "python_output"."""

    kind: str
    text: str
    part: int  # which part of the answer it continues, or begins


class AnswerReader:
    """Turns the tokens of one answer into pieces as they come; `parts` is all of it: [{"type": kind, "text": …}, …]."""

    def __init__(self, tokenizer: Tokenizer):
        special = tokenizer.encode_special
        self.kind_after = {special("<|python_start|>"): "python", special("<|python_end|>"): "text",
                           special("<|output_start|>"): "python_output", special("<|output_end|>"): "text"}
        self.speller = Speller(tokenizer)  # a character may be spread over several tokens
        self.parts: list[dict[str, str]] = []
        self.kind, self.new_part = "text", True

    def read(self, token: int, last: bool = False) -> Piece | None:
        """Take one token; returns what became readable, if anything."""
        text, piece = self.speller.read(token, last), None
        if text:
            if self.new_part:
                self.parts.append({"type": self.kind, "text": ""})
                self.new_part = False
            self.parts[-1]["text"] += text
            piece = Piece(self.kind, text, len(self.parts) - 1)
        if token in self.kind_after:
            self.kind, self.new_part = self.kind_after[token], True
        return piece

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
        system = messages[:1] if messages[0]["role"] == "system" else []
        rest = messages[len(system):]
        while len(rest) > 1 and len(self.prompt(system + rest)) > self.context * 3 // 4:
            rest = rest[2:]
        return system + rest

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

    def settings(self) -> dict[str, Any]:
        """As the engine takes them."""
        seed = random.randrange(2**31) if self.seed is None else self.seed
        return {"temperature": self.temperature, "top_k": self.top_k or None, "top_p": self.top_p,
                "max_tokens": self.max_tokens, "seed": seed}


class Answer:
    """The answer to a conversation: iterate for its pieces; `content` is what it has said so far.

    Raises NanochatError if the conversation leaves no room in the context.
    """

    def __init__(self, model: ChatModel, messages: list[dict], sampling: Sampling):
        self.model, self.sampling = model, sampling
        self.prompt = model.prompt(messages)
        self.reader = AnswerReader(model.tokenizer)
        self.tokens, self.started, self.seconds = 0, time.perf_counter(), 0.0
        self.finish_reason = ""  # then "stop" (it ended), "length", "context" (no room left) or "stopped" (by the user)
        self.stopped = threading.Event()
        if len(self.prompt) >= model.context:
            raise NanochatError(f"the conversation has {len(self.prompt):,} tokens, the model reads {model.context:,}: "
                                "clear it, or say it in fewer words")

    def stop(self) -> None:
        """End the answer before its next token; may be called from any thread."""
        self.stopped.set()

    @property
    def content(self) -> str | list[dict]:
        """As a message's content: a plain string, or parts if the calculator was called."""
        parts = self.reader.parts
        plain = all(part["type"] == "text" for part in parts)
        return "".join(part["text"] for part in parts) if plain else parts

    def take(self, token: Token) -> Piece | None:
        """Note the next token; returns what became readable."""
        self.tokens += 1
        self.seconds = time.perf_counter() - self.started
        self.finish_reason = token.finish_reason or ""
        return self.reader.read(token.id, last=bool(token.finish_reason))

    def __iter__(self) -> Iterator[Piece]:
        tokens = self.model.engine.stream(self.prompt, **self.sampling.settings())
        with contextlib.closing(tokens):
            for token in tokens:
                if self.stopped.is_set():
                    self.finish_reason = "stopped"
                    return
                if piece := self.take(token):
                    yield piece

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
            self.messages, self.forgotten = [], 0

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
# ## The chat box
#
# A thin view: it draws what the session knows and calls it from a thread. (In a callback of its own the answer would
# block the kernel, and **stop** could not be heard until it is too late.) Errors appear where you look, in the chat.

# %%
#| export chat_box
"""The chat in a notebook: `ChatBox` shows a `ChatSession`, and works in a thread so that stop is heard."""

# %%
#| export chat_box
import html
import threading
import time
from collections.abc import Callable

import ipywidgets as widgets

from nanochat_lib.chat import Answer, ChatModel, ChatSession, Sampling, list_models

# %%
#| export chat_box
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
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    inner = ""
    for part in parts:
        text, sign = html.escape(part["text"]), SIGNS.get(part["type"])
        inner += text if sign is None else f'<span style="{TOOL}" class="{part["type"]}">{sign}{text}</span>'
    return f'<div class="chat-{role}" style="{BUBBLE}; {STYLES[role]}">{inner or "…"}</div>'

# %%
#| export chat_box
class ChatBox:
    """A chat in the notebook: `ChatBox()` as a cell's last line. It shows a `ChatSession` and works in a thread."""

    def __init__(self, session: ChatSession | None = None):
        self.session = session or ChatSession(ChatModel.load())
        here, settings, row = self.session.model.name, self.session.sampling, widgets.Layout(flex_flow="row wrap")
        models = {f"{stage}-{tag}": (stage, tag) for stage, tag in list_models()}
        models.setdefault(here, ())  # a session handed in, with a model that is not on disk
        self.error, self.note, self.drawn = "", "", 0.0
        self.thread: threading.Thread | None = None
        self.picker = widgets.Dropdown(options=models, index=list(models).index(here), description="model")
        self.temperature = widgets.FloatSlider(settings.temperature, min=0, max=2, step=0.1, description="temperature",
                                               style={"description_width": "initial"})
        self.top_k = widgets.IntSlider(settings.top_k, min=0, max=200, description="top-k")
        self.length = widgets.IntSlider(settings.max_tokens, min=1, max=1024, description="max tokens")
        self.view = widgets.HTML()
        self.entry = widgets.Text(placeholder="say something, then Enter", layout=widgets.Layout(flex="1"))
        self.entry.on_msg(lambda _, message, __: self.send() if message.get("event") == "submit" else None)
        self.picker.observe(lambda change: self.pick(*change["new"]) if change["new"] else None, "value")
        buttons = []
        for name, icon, action in (("send", "paper-plane", self.send), ("stop", "stop", self.session.stop),
                                   ("regenerate", "refresh", self.regenerate), ("clear", "trash", self.clear)):
            button = widgets.Button(description=name, icon=icon, layout=widgets.Layout(width="auto"))
            button.on_click(lambda _, action=action: action())
            buttons.append(button)
        self.widget = widgets.VBox([widgets.HBox([self.picker, self.temperature, self.top_k, self.length], layout=row),
                                    self.view, widgets.HBox([self.entry, *buttons], layout=row)])
        self.draw()

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

    def pick(self, stage: str, tag: str) -> None:
        """Go on with another model; the conversation stays."""
        def load(show):
            self.say(f"loading {stage} {tag}", error="")
            self.session.stop()
            with self.session.lock:
                self.session.model = ChatModel.load(stage, tag)

        self.work(load)

    def work(self, task: Callable, question: str = "") -> None:
        """Do `task(show)` in a thread, drawing as it goes; what it raises is shown in the chat."""
        def run():
            try:
                self.session.sampling = Sampling(self.temperature.value, self.top_k.value, self.length.value)
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
        bubbles = [bubble(message["role"], message["content"]) for message in self.session.messages]
        if answer := self.session.answer:
            bubbles.append(bubble("assistant", answer.content))
        if self.error:
            bubbles.append(bubble("error", self.error))
        note = f'<div style="opacity: 0.6; font-size: 85%">{html.escape(self.note)}</div>'
        self.view.value = "".join(bubbles) + note

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
box

# %% [markdown]
# ## Looking inside an answer
#
# What else could it have said? The engine gives the likeliest tokens at each place on demand. A column is a place of
# the answer; its five cells are the five likeliest tokens there, the likeliest on top.

# %%
# NBVAL_IGNORE_OUTPUT
import matplotlib.pyplot as plt
import numpy as np

tokens = list(session.model.engine.stream(answer.prompt, max_tokens=12, temperature=0, top=5))
chances = np.array([[chance for _, chance in token.top] for token in tokens])  # (T, 5)

figure, axes = plt.subplots(figsize=(10, 3), layout="constrained")
image = axes.imshow(chances.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
for place, token in enumerate(tokens):
    for rank, (id_, chance) in enumerate(token.top):
        word = tokenizer.id_to_token(id_).replace("\n", "\\n").replace("assistant_end", "end")
        axes.text(place, rank, word, ha="center", va="center", fontsize=9, parse_math=False,
                  weight="bold" if id_ == token.id else "normal", color="white" if chance > 0.6 else "black")
axes.set(xlabel="place in the answer (tokens)", ylabel="rank", xticks=range(len(tokens)), yticks=range(5),
         yticklabels=range(1, 6), title="what could have been said (bold: what was said)")
_ = figure.colorbar(image, label="probability")

# %% [markdown]
# ## The terminal
#
# `python -m nanochat_lib.scripts.chat_cli` is a loop around `session.send`. Ctrl-C is caught while an answer is
# written and ends the answer, not the chat; `-p "one question"` answers and leaves, for use in shell scripts.

# %%
#| export scripts/chat_cli
"""Chat with a model in the terminal."""

# %%
#| export scripts/chat_cli
import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from nanochat_lib.chat import ChatModel, ChatSession, Piece, Sampling
from nanochat_lib.common import NanochatError, pick_device, run_cli

# %%
#| export scripts/chat_cli
HELP = "/clear forgets the conversation, /retry answers again, /quit leaves (so does Ctrl-D); Ctrl-C stops an answer"
BRACKETS = {"text": ("", ""), "python": ("[", "]"), "python_output": ("[= ", "]")}


class Printer:
    """Prints pieces as they come; the calculator's work stands in brackets: [12/4][= 3]."""

    def __init__(self):
        self.part, self.closing = -1, ""

    def __call__(self, piece: Piece) -> None:
        opening = ""
        if piece.part != self.part:
            opening, closing = BRACKETS[piece.kind]
            opening, self.part, self.closing = self.closing + opening, piece.part, closing
        print(opening + piece.text, end="", flush=True)

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
    model = ChatModel.load(settings.source, settings.model_tag, settings.step, pick_device(settings.device_type))
    session = ChatSession(model, Sampling(settings.temperature, settings.top_k, settings.max_tokens, settings.seed))
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

# %%
#| export serving
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nanochat_lib.batch import Request, Token
from nanochat_lib.chat import Answer, ChatModel, Piece

# %%
#| export serving
class Full(Exception):
    """The line of waiting questions is as long as it may get."""


@dataclass(eq=False)
class Job:
    """A question in line. `deliver` gets each piece, then the error if any, then None; from another thread."""

    answer: Answer
    deliver: Callable[[Piece | Exception | None], None]

    def __post_init__(self):
        self.request = Request(self.answer.prompt, **self.answer.sampling.settings(), watch=self.watch)

    def watch(self, token: Token) -> None:
        if piece := self.answer.take(token):
            self.deliver(piece)


class Replica:
    """One model with its running batch."""

    def __init__(self, model: ChatModel, rows: int):
        self.model, self.rows = model, min(rows, model.engine.rows_that_fit(model.context))
        self.begin()

    def begin(self) -> None:
        self.batch, self.jobs = self.model.engine.batch(self.rows), {}

    def add(self, job: Job) -> None:
        self.jobs[job.request] = job
        self.batch.add(job.request)

    def step(self) -> list[tuple[Job, Exception | None]]:
        """One token for every row; returns the jobs that are over with their errors, which do not end the replica."""
        for request, job in self.jobs.items():
            if job.answer.stopped.is_set():
                job.answer.finish_reason = "stopped"
                self.batch.cancel(request)
        try:
            return [(self.jobs.pop(request), None) for request in self.batch.step()]
        except Exception as error:
            failed = [(job, error) for job in self.jobs.values()]
            self.begin()
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

    def submit(self, job: Job) -> None:
        """Put a question in line. Raises Full if there is no room."""
        with self.changed:
            for gone in [waiting for waiting in self.waiting if waiting.answer.stopped.is_set()]:
                self.waiting.remove(gone)
                self.counts["stopped"] += 1
                gone.deliver(None)
            running = sum(len(replica.jobs) for replica in self.replicas)
            if running + len(self.waiting) >= self.max_waiting + sum(replica.rows for replica in self.replicas):
                self.counts["refused"] += 1
                raise Full
            self.waiting.append(job)
            self.changed.notify_all()

    def may_take(self, replica: Replica) -> bool:
        """There is a question, and no replica is freer than this one."""
        freest = min(self.replicas, key=lambda replica: len(replica.jobs) / replica.rows)
        return bool(self.waiting) and replica is freest and len(replica.jobs) < replica.rows

    def serve(self, replica: Replica) -> None:
        """Answer for ever: let questions join, take a step, send away what is over."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: replica.jobs or self.may_take(replica))
                while self.may_take(replica):
                    replica.add(self.waiting.popleft())
                self.changed.notify_all()
            for job, error in replica.step():
                self.close(job, error)

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

# %%
#| export protocol
import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request

from nanochat_lib.chat import Answer, ChatModel, Piece, Sampling
from nanochat_lib.common import NanochatError

# %%
#| export protocol
MAX_MESSAGES, MAX_CHARACTERS, MAX_CHARACTERS_IN_ALL = 500, 8_000, 32_000
MAX_TEMPERATURE, MAX_TOP_K, MAX_TOKENS = 2.0, 200, 4_096
ONLY = {  # parameters of the format that are taken only where they change nothing
    "n": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "logprobs": (False,), "stop": ([], ""),
    "tools": ([],), "functions": ([],), "logit_bias": ({},), "response_format": ({"type": "text"},),
}


class ApiError(Exception):
    """A request that is refused, in OpenAI's terms."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict:
        kind = {429: "rate_limit_error", 500: "server_error"}.get(self.status, "invalid_request_error")
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

# %%
#| export protocol
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
NEXT = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}
PARTS = {"user": ("text",), "system": ("text",), "assistant": ("text", "python", "python_output")}


def read_content(message: dict, role: str, where: str) -> list[dict]:
    """The content of one message as parts; a plain string is one part."""
    content = message.get("content") or []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts if isinstance(parts, list) else [None]:
        if not (isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type") in PARTS[role]):
            raise ApiError(400, f"{where}.content must be a string, or a list of {{type, text}} with type "
                                f"{' or '.join(PARTS[role])}", f"{where}.content")
    if sum(len(part["text"]) for part in parts) > MAX_CHARACTERS:
        raise ApiError(400, f"{where} is longer than {MAX_CHARACTERS:,} characters", f"{where}.content")
    return [{"type": part["type"], "text": part["text"]} for part in parts]


def read_messages(body: dict) -> list[dict]:
    """The conversation of a request, checked: user and assistant take turns, the user has the last word."""
    given = body.get("messages")
    if not isinstance(given, list) or not given or len(given) > MAX_MESSAGES:
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
            continue
        if role not in NEXT[before]:
            raise ApiError(400, f"{where} is by {role}, where {' or '.join(NEXT[before])} should speak", where)
        messages.append({"role": role, "content": parts})
    if messages[-1]["role"] != "user":
        raise ApiError(400, "the last message must be by user", "messages")
    if sum(len(part["text"]) for message in messages for part in message["content"]) > MAX_CHARACTERS_IN_ALL:
        raise ApiError(400, f"the messages are longer than {MAX_CHARACTERS_IN_ALL:,} characters in all", "messages")
    for message in messages:
        if all(part["type"] == "text" for part in message["content"]):
            message["content"] = "".join(part["text"] for part in message["content"])
    return messages

# %%
#| export protocol
def read_request(body: dict, model: ChatModel, defaults: Sampling) -> Answer:
    """The answer that a request asks for, not yet begun."""
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
                        number(body, "seed", None, -2**63, 2**63 - 1, int), number(body, "top_p", 1.0, 1e-6, 1))
    messages = read_messages(body)
    if body.get("truncation") == "auto":  # as in OpenAI's newer API: leave out the oldest messages that do not fit
        messages = model.fit(messages)
    try:
        return Answer(model, messages, sampling)
    except NanochatError as error:
        raise ApiError(400, str(error), "messages", "context_length_exceeded") from None

# %%
#| export protocol
class Reply:
    """One answer in OpenAI's format, whole or as a stream of chunks."""

    def __init__(self, answer: Answer, include_usage: bool):
        self.answer, self.include_usage = answer, include_usage
        self.events: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": answer.model.name}

    def deliver(self, event: Piece | Exception | None) -> None:
        """Called in a replica's thread."""
        with contextlib.suppress(RuntimeError):  # the server has shut down meanwhile
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces as they come; an error of the replica is an ApiError here, and no business of the client."""
        while (event := await self.events.get()) is not None:
            if isinstance(event, Exception):
                raise ApiError(500, f"the model failed: {type(event).__name__}")
            yield event

    @property
    def finish_reason(self) -> str:
        return "length" if self.answer.finish_reason in ("length", "context") else "stop"

    @property
    def usage(self) -> dict:
        prompt, completion = len(self.answer.prompt), self.answer.tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def whole(self, request: Request) -> dict:
        """The response object. Should the client go away, its answer ends (and nobody reads this)."""
        async def until_gone():
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.answer.stop()

        watch = asyncio.create_task(until_gone())
        try:
            async for _ in self.pieces():
                pass
        finally:
            self.answer.stop()
            watch.cancel()
        content = self.answer.content
        text = "".join(part["text"] for part in self.answer.reader.parts if part["type"] == "text")
        message = {"role": "assistant", "content": text, **({} if isinstance(content, str) else {"parts": content})}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason, "logprobs": None}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": self.usage}

    def chunk(self, delta: dict, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        usage = {"usage": None} if self.include_usage else {}
        return event_line({**self.head, "object": "chat.completion.chunk", "choices": [choice], **usage})

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events. Calculator calls and results are `delta.part`s: plain clients see words only."""
        try:
            yield self.chunk({"role": "assistant", "content": ""})
            async for piece in self.pieces():
                part = {"type": piece.kind, "text": piece.text}
                delta = {"content": piece.text} if piece.kind == "text" else {"part": part}
                yield self.chunk({**delta, "part_index": piece.part})
            yield self.chunk({}, self.finish_reason)
            if self.include_usage:
                yield event_line({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield event_line(error.body)
        finally:
            self.answer.stop()  # reached, too, when the client has gone


def event_line(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=True)}\n\n"

# %%
#| export scripts/chat_web
"""Serve a model: one web page to chat on, and OpenAI's chat-completions API for any client."""

# %%
#| export scripts/chat_web
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from tyro.conf import arg

import nanochat_lib
from nanochat_lib.chat import ChatModel, Sampling
from nanochat_lib.common import NanochatError, pick_device, run_cli
from nanochat_lib.protocol import ApiError, Reply, read_request
from nanochat_lib.serving import Full, Job, Pool

# %%
#| export scripts/chat_web
MAX_BYTES = 1 << 20  # of a request: far more than the limits of its messages let through


async def read_body(request: Request) -> dict:
    """The JSON object of a request, of bounded size."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # a form on another web site cannot send this type, so it cannot make the model work
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BYTES:
            raise ApiError(413, f"the request is larger than {MAX_BYTES:,} bytes")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise ApiError(400, "the request is not JSON") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the request must be a JSON object")
    return body


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
    device_type: str = ""


# %%
#| export scripts/chat_web
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def make_app(pool: Pool, settings: ChatWeb) -> FastAPI:
    """The server over a pool of replicas."""
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, openapi_url=None)
    if settings.host in ("127.0.0.1", "localhost"):  # a web site that renames itself to this address gets nothing
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    defaults = Sampling(settings.temperature, settings.top_k, settings.max_tokens)
    page = (Path(nanochat_lib.__file__).parent / "chat.html").read_text()
    model = pool.replicas[0].model

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 429 else None)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        return JSONResponse(ApiError(500, "the server failed").body, 500)

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    @app.post("/v1/chat/completions")
    @app.post("/chat/completions")
    async def complete(request: Request) -> Response:
        body = await read_body(request)
        options = body.get("stream_options")
        with_usage = isinstance(options, dict) and options.get("include_usage") is True
        reply = Reply(read_request(body, model, defaults), with_usage)
        try:
            pool.submit(Job(reply.answer, reply.deliver))
        except Full:
            raise ApiError(429, "all replicas are busy and the line is full: try again in a moment") from None
        if body.get("stream") is True:
            return StreamingResponse(reply.stream(), 200, {"Cache-Control": "no-store"}, "text/event-stream")
        return JSONResponse(await reply.whole(request))

    @app.get("/v1/models")
    async def models() -> dict:
        card = {"id": model.name, "object": "model", "created": int(pool.started), "owned_by": "nanochat"}
        return {"object": "list", "data": [{**card, "context": model.context, "defaults": asdict(defaults)}]}

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "model": model.name}

    @app.get("/stats")
    async def stats() -> dict:
        return pool.stats()

    return app

# %%
#| export scripts/chat_web
#| cli chat_web
def chat_web(settings: ChatWeb) -> None:
    """Serve a model to browsers and to clients of OpenAI's API."""
    kind = pick_device(settings.device_type)
    gpus = torch.cuda.device_count() if kind == "cuda" else 1
    replicas = gpus if settings.num_gpus < 0 else settings.num_gpus
    if not 1 <= replicas <= gpus:
        raise NanochatError(f"--num-gpus {replicas}: this machine can hold 1 to {gpus} replicas")
    devices = [f"cuda:{index}" for index in range(replicas)] if kind == "cuda" else [kind]
    models = [ChatModel.load(settings.source, settings.model_tag, settings.step, device) for device in devices]
    app = make_app(Pool(models, settings.max_waiting, settings.rows), settings)
    print(f"{models[0].name} on {', '.join(devices)}: http://{settings.host}:{settings.port}", flush=True)
    uvicorn.run(app, host=settings.host, port=settings.port, log_level="warning", timeout_graceful_shutdown=2)

# %% [markdown]
# `python -m nanochat_lib.scripts.chat_web`, then http://127.0.0.1:8000: the page (`nanochat_lib/chat.html`) is one
# file that loads nothing from elsewhere. Whatever a model writes is shown as text, never run as markup. The same
# address serves programs. Here one asks a server that runs in a thread of this notebook, and reads the answer as it
# comes:

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
server.should_exit = True

# %% [markdown]
# Each bar ends an event of the stream. With OpenAI's own client it is
# `openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")`. And what is wrong with a request is said before
# any model works on it:

# %%
for messages in ([], [{"role": "assistant", "content": "me first"}], [{"role": "user", "content": "x" * 9000}]):
    try:
        read_messages({"messages": messages})
    except ApiError as error:
        print(error.status, error)

# %% [markdown]
# ## Where it fails
#
# Ask it something outside its world: the capital of France, a sum with three-digit numbers, a story about a person you
# made up. It answers all the same, and as fluently, because a model that continues documents has no other way to end
# one. What it is sure of (the figure above) is what its data said often; what its data never said, it makes up. More
# data, more depth and better examples change how much it knows, not what it is.
#
# That was the course: from bytes to a conversation. What you built here is the library; lesson 11 has the commands
# that make it large.
#
# **Back to** [00 · The tour](00_tour.ipynb)
