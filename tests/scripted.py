"""A chat model that says what a test wants (the real engine, its choices replaced by a script), and a server of it."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

import uvicorn

from nanochat_lib.batch import Batch
from nanochat_lib.chat import ChatModel
from nanochat_lib.engine import Engine
from nanochat_lib.scripts.chat_web import ChatWeb, make_app
from nanochat_lib.serving import Pool

LONG = "word " * 500  # never ends by itself before a test stops it
MARKDOWN = ("# Plan\nUse **bold** and `code`, not <b>tags</b>: 2**3**2\n```python\nprint('<i>')  # **no**\n```\n"
            "#### 40 [x](http://x.y)")


class ScriptedBatch(Batch):
    def choose(self):
        tokens, logprobs = super().choose()
        time.sleep(self.engine.pause)
        for row, request in enumerate(self.running):
            script = self.engine.script(self.engine.question(request.prompt))
            if isinstance(script, Exception):
                raise script
            place = self.notes.line[row]
            chosen = int(self.notes.mask[place, :self.notes.counts[place]].sum())  # forced tokens are not the script's
            tokens[row] = script[chosen] if chosen < len(script) else self.engine.assistant_end
        return tokens, logprobs


class ScriptedEngine(Engine):
    """`script(question)` gives the token ids to say, or an exception to raise; each token takes `pause` seconds."""

    def __init__(self, model, tokenizer, script: Callable, pause: float = 0.0):
        super().__init__(model, tokenizer)
        self.script, self.pause, self.batches = script, pause, []

    def batch(self, rows, capacity=None, refill=0.0, *shared):
        batch = ScriptedBatch(self, super().batch(rows, capacity, refill, *shared).slots, refill)
        self.batches.append(batch)
        return batch

    def question(self, prompt: list[int]) -> str:
        """The last user message in a prompt."""
        start, end = (self.tokenizer.encode_special(f"<|user_{side}|>") for side in ("start", "end"))
        if end not in prompt:
            return self.tokenizer.decode(prompt[1:])
        last = len(prompt) - 1 - prompt[::-1].index(end)
        begin = last - 1 - prompt[:last][::-1].index(start)
        return self.tokenizer.decode(prompt[begin + 1:last])


def usual(tokenizer) -> Callable:
    """What a test asks decides what is said: sums with the calculator, long texts, errors, markup; else an echo."""
    def script(question: str):
        encode, special = tokenizer.encode, tokenizer.encode_special
        if question == "fail":
            return RuntimeError("out of luck")
        if question == "long":
            return encode(LONG)
        if question == "sum":
            return [*encode("So "), special("<|python_start|>"), *encode("12/4"), special("<|python_end|>"),
                    *encode(" are 3 pies.")]
        if question == "markdown":
            return encode(MARKDOWN)
        if question == "markup":
            return encode("<b>bold</b><script>document.title = 'owned'</script>"
                          "<img src=x onerror=\"document.title = 'owned'\">")
        return encode(f"You said: {question} (né 日本)")

    return script


def scripted_model(make_model, tokenizer, pause: float = 0.0, stage: str = "sft", context: int = 1024) -> ChatModel:
    engine = ScriptedEngine(make_model(sequence_len=context), tokenizer, usual(tokenizer), pause)
    return ChatModel(engine, tokenizer, stage, f"{stage}-d3", context)


def until(condition, seconds=60.0):
    """Wait for a condition that a thread will make true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(*models, **settings):
    """A real server on a free port of 127.0.0.1; yields (url, pool)."""
    settings = ChatWeb(**{"max_tokens": 200, **settings})
    pool = Pool(list(models), settings.max_waiting, settings.rows)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(pool, settings), port=port, log_level="error",
                                           timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{port}", pool
    finally:
        server.should_exit = True
        thread.join(10)
