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
# # 02 · The tokenizer
#
# *How does text become numbers, and a chat become a document?* — 40 minutes, about half a minute of them computing.

# %%
#| default_exp tokenizer

# %%
#| export
"""Text to token ids and back: byte-level BPE, trained by rustbpe, used through tiktoken; and a chat as one document."""

# %%
#| export
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import rustbpe
import tiktoken
import torch

from nanochat_lib.common import NanochatError, base_dir, read_json, write_json

TRAIN = "python -m nanochat_lib.scripts.tok_train"

# %%
#| export
SPLIT_PATTERN = "|".join([
    r"'(?i:[sdmt]|ll|ve|re)",         # the ends of it's, don't, we'll
    r"[^\r\n\p{L}\p{N}]?+\p{L}+",     # a word, with the blank (or one other sign) before it
    r"\p{N}{1,2}",                    # digits by twos: GPT-4 takes three, too many of a small vocabulary
    r" ?[^\s\p{L}\p{N}]++[\r\n]*",    # punctuation
    r"\s*[\r\n]",                     # one line break
    r"\s+(?!\S)",                     # blanks, but for the last one before a word
    r"\s+",
])

SPECIAL_TOKENS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                  "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")

# %%
#| export
def text_of(content: str | list[dict]) -> str:
    """The text of a message by a user or the system: a string, or parts of type text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content)
    raise NanochatError(f"a user's or system's message is text, not {str(content)[:80]!r}: mend the conversation")


def turns(conversation: dict) -> list[dict]:
    """The messages, user and assistant in turn, a leading system message merged into the first user's."""
    messages = list(conversation["messages"])
    if len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user":
        system, user = (text_of(message["content"]) for message in messages[:2])
        messages[:2] = [{"role": "user", "content": f"{system}\n\n{user}"}]
    for place, message in enumerate(messages):
        expected = ("user", "assistant")[place % 2]
        if message["role"] != expected:
            raise NanochatError(f"message {place} is by {message['role']!r}, where {expected!r} should speak: user and "
                                "assistant take turns, a system message may come first")
    return messages

# %%
#| export
PART_MARKERS = {"text": None, "python": "python", "python_output": "output"}


def render_conversation(tokenizer: "Tokenizer", conversation: dict, max_tokens: int | None = 2048):
    """(ids, mask) of a conversation, cut to max_tokens; mask is 1 on what the assistant must learn to emit."""
    ids, mask = [], []

    def add(tokens: list[int], learn: int):
        ids.extend(tokens)
        mask.extend([learn] * len(tokens))

    def marked(name: str, text: str) -> list[int]:
        return tokenizer.encode(text, prepend=f"<|{name}_start|>", append=f"<|{name}_end|>")

    add([tokenizer.get_bos_token_id()], 0)
    for message in turns(conversation):
        content = message["content"]
        if message["role"] == "user":
            add(marked("user", text_of(content)), 0)
            continue
        add([tokenizer.encode_special("<|assistant_start|>")], 0)
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] not in PART_MARKERS:
                raise NanochatError(f"a part of type {part['type']!r}: the types are {', '.join(PART_MARKERS)}")
            marker = PART_MARKERS[part["type"]]
            tokens = marked(marker, part["text"]) if marker else tokenizer.encode(part["text"])
            add(tokens, 0 if marker == "output" else 1)  # the tool writes its output, the model need not
        add([tokenizer.encode_special("<|assistant_end|>")], 1)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: "Tokenizer", conversation: dict) -> list[int]:
    """The prompt for the assistant's next answer: without a last assistant message, ending with <|assistant_start|>."""
    messages = conversation["messages"]
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    ids, _ = render_conversation(tokenizer, {"messages": messages}, max_tokens=None)
    return [*ids, tokenizer.encode_special("<|assistant_start|>")]

# %%
#| export
class Tokenizer:
    """Token ids 0 … 255 are some order of the bytes, then come the merges by rank, then the specials."""

    def __init__(self, tokens: list[bytes], pattern: str = SPLIT_PATTERN, specials: Iterable[str] = SPECIAL_TOKENS):
        self.tokens, self.pattern = tokens, pattern
        self.specials = {name: len(tokens) + place for place, name in enumerate(specials)}
        self.encoding = tiktoken.Encoding("nanochat", pat_str=pattern, special_tokens=self.specials,
                                          mergeable_ranks={token: rank for rank, token in enumerate(tokens)})

    @classmethod
    def train_from_iterator(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn the merges that fill `vocab_size` ids. Raises NanochatError if these texts cannot fill them."""
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise NanochatError(f"vocabulary of {vocab_size} tokens: the bytes and specials alone are {smallest}")
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = trainer.get_mergeable_ranks()
        reachable = len(ranks) + len(SPECIAL_TOKENS)
        if reachable < vocab_size:
            raise NanochatError(f"the text fills {reachable} tokens, not {vocab_size}: "
                                f"give more text, or --vocab-size {reachable} or less")
        return cls([bytes(token) for token, _ in sorted(ranks, key=lambda pair: pair[1])])

    @classmethod
    def from_directory(cls, directory: str | Path) -> "Tokenizer":
        """Load what `save` wrote. Raises NanochatError if it is missing or damaged."""
        path = Path(directory) / "tokenizer.json"
        if not path.exists():
            raise NanochatError(f"no tokenizer in {directory}: run {TRAIN}")
        stored = read_json(path)
        try:
            tokens = [token.encode("latin-1") for token in stored["tokens"]]
            if len(set(tokens)) < len(tokens) or {bytes([byte]) for byte in range(256)} != set(tokens[:256]):
                raise ValueError("tokens repeated or bytes missing")
            return cls(tokens, stored["pattern"], stored["specials"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise NanochatError(f"{path} is not a tokenizer ({error}): delete it and run {TRAIN}") from None

    def save(self, directory: str | Path):
        """Write tokenizer.json: pattern, tokens by rank (a character per byte, as in Latin-1), specials."""
        write_json(Path(directory) / "tokenizer.json", {
            "pattern": self.pattern, "specials": list(self.specials), "fingerprint": self.fingerprint,
            "tokens": [token.decode("latin-1") for token in self.tokens]})

    @property
    def fingerprint(self) -> str:
        """16 hex digits that two tokenizers share only if they give the same ids."""
        facts = [self.pattern, [token.hex() for token in self.tokens], list(self.specials)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def encode(self, text: str | list[str], prepend: int | str | None = None, append: int | str | None = None):
        """Ids of a text, or a list of ids for each of several; what looks like a special in it stays ordinary text."""
        first, last = ([] if token is None else [token if isinstance(token, int) else self.encode_special(token)]
                       for token in (prepend, append))
        if isinstance(text, str):
            return first + self.encoding.encode_ordinary(text) + last
        return [first + ids + last for ids in self.encoding.encode_ordinary_batch(list(text))]

    def encode_special(self, name: str) -> int:
        if name not in self.specials:
            raise NanochatError(f"no special token {name!r}: there are {', '.join(self.specials)}")
        return self.specials[name]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.get_vocab_size():
            raise NanochatError(f"ids {min(ids)} … {max(ids)} in a vocabulary of {self.get_vocab_size()}: "
                                "they were made by another tokenizer")
        return self.encoding.decode(ids)

    def id_to_token(self, token: int) -> str:
        return self.decode([token])

    def token_bytes(self) -> torch.Tensor:
        """(vocab,) int64: bytes of text each token stands for, 0 for specials; what bits per byte divides by."""
        return torch.tensor([*map(len, self.tokens), *[0] * len(self.specials)])

    def get_vocab_size(self) -> int:
        return len(self.tokens) + len(self.specials)

    def get_bos_token_id(self) -> int:
        return self.encode_special("<|bos|>")

    def get_special_tokens(self) -> set[str]:
        return set(self.specials)

    def render_conversation(self, conversation: dict, max_tokens: int | None = 2048):
        return render_conversation(self, conversation, max_tokens)

    def render_for_completion(self, conversation: dict) -> list[int]:
        return render_for_completion(self, conversation)

# %%
#| export
def load_tokenizer(directory: str | Path | None = None) -> Tokenizer:
    """The tokenizer in `directory`, by default the one that `tok_train` left under $NANOCHAT_BASE_DIR."""
    return Tokenizer.from_directory(directory or base_dir() / "tokenizer")
