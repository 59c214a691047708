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
# *How does text become numbers, and a chat become a document?* — 40 minutes, less than one of them computing.
#
# A model reads whole numbers. Which pieces of text get a number is decided once, before any training, and then holds
# for good: it fixes how much text fits into a context, what a model can spell, and how a chat looks from the inside.

# %%
#| default_exp tokenizer

# %%
#| export
"""Text to token ids and back: byte-level BPE, trained by rustbpe, used through tiktoken; and a chat as one document."""


import hashlib
import json
import pickle
from collections.abc import Iterable
from pathlib import Path

import rustbpe
import tiktoken
import torch

from nanochat_lib.common import NanochatError, base_dir, read_json, write_json

TRAIN = "python -m nanochat_lib.scripts.tok_train"

# %% [markdown]
# ## Bytes: any text, but long
#
# UTF-8 writes every text as bytes, numbers from 0 to 255. A vocabulary of 256 would do, and nothing could ever be
# unknown. But a context of 2,048 bytes is a page, and attention's work grows with the square of the length. So frequent
# sequences of bytes should share one number.

# %%
for text in ("Anna lives here.", "Анна живёт здесь.", "안나는 여기 산다."):
    print(f"{len(text):2} characters, {len(text.encode()):2} bytes   {text}")

# %% [markdown]
# ## First cut: words
#
# If pieces could grow over anything, `dog.`, `dog,` and `dog!` would each win a number of their own. GPT-2 therefore
# cuts text into words first, by a regular expression, and lets pieces grow only within a word. A blank belongs to the
# word after it. This is GPT-4's expression, but digits go by two.

# %%
#| export
SPLIT_PATTERN = "|".join([
    r"'(?i:[sdmt]|ll|ve|re)",         # the ends of it's, don't, we'll
    r"[^\r\n\p{L}\p{N}]?+\p{L}+",     # a word, with the blank (or one other sign) before it
    r"\p{N}{1,2}",                    # digits by twos: GPT-4 takes three, too many of a small vocabulary
    r" ?[^\s\p{L}\p{N}]++[\r\n]*",    # punctuation
    r"\s*[\r\n]",                     # blanks that end in a line break
    r"\s+(?!\S)",                     # blanks, but for the last one before a word
    r"\s+",
])

# %%
import regex

print(regex.findall(SPLIT_PATTERN, "It's 1234567 steps,\n\nor  so: we'll see!"))

# %% [markdown]
# ## Byte pair encoding
#
# The rule that makes pieces is of 1994 (Gage, data compression; for language models Sennrich et al., arXiv 1508.07909):
# find the pair of neighbours that occurs most often, give it the next number, put that number in its place, repeat.
# Words repeat a lot, so we count each different word once and remember how often it came.

# %%
#| export bpe
"""Byte pair encoding in plain Python, to read and to test by: the merges of rustbpe, the ids of tiktoken."""


import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable

import regex

Pair = tuple[int, int]


def count_words(texts: Iterable[str], pattern: str) -> Counter[bytes]:
    """How often each word, as bytes, occurs in the texts when they are cut by the pattern."""
    words = Counter()
    for text in texts:
        words.update(regex.findall(pattern, text))
    return Counter({word.encode(): count for word, count in words.items()})


def merge(ids: list[int], pair: Pair, new: int) -> list[int]:
    """The ids with `new` in place of each occurrence of the pair, from the left."""
    merged, place = [], 0
    while place < len(ids):
        found = place + 1 < len(ids) and (ids[place], ids[place + 1]) == pair
        merged.append(new if found else ids[place])
        place += 1 + found
    return merged

# %% [markdown]
# The trainer, as the rule says it. Where two pairs are equally frequent the one with the smaller numbers wins: without
# a rule for ties, two machines could train two tokenizers.

# %%
#| export bpe
def train_simple(words: Counter[bytes], merges: int) -> list[Pair]:
    """The first `merges` pairs that BPE joins; merge number i makes token 256 + i. Counts everything anew each time."""
    chunks, found = {word: list(word) for word in words}, []
    for new in range(256, 256 + merges):
        pairs = Counter()
        for word, ids in chunks.items():
            for pair in zip(ids, ids[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break  # every word is one token
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        chunks = {word: merge(ids, best, new) for word, ids in chunks.items()}
        found.append(best)
    return found


def tokens_of(merges: list[Pair]) -> list[bytes]:
    """The bytes of every token: the 256 bytes, then each merge's two parts together."""
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens

# %%
from nanochat_lib.world_facts import World
from nanochat_lib.world_text import documents

everything = list(documents(World(1), 4200))
texts, held_out = everything[:4000], everything[4000:]
words = count_words(texts, SPLIT_PATTERN)
print(f"{sum(map(len, texts)):,} characters, {sum(words.values()):,} words, {len(words):,} different ones")
print("the first merges:", [token.decode() for token in tokens_of(train_simple(words, 24))[256:]])

# %% [markdown]
# ## Fast enough
#
# Each step above walks through all words, though a merge changes few of them. So: keep the counts, remember for each
# pair the words that hold it, and touch only those. The most frequent pair waits on top of a heap. Counts in the heap
# may be out of date, but only too high, since a pair that is not new can only lose: check the top one, and put it
# back if it fell.

# %%
#| export bpe
def train(words: Counter[bytes], merges: int) -> list[Pair]:
    """The merges of `train_simple`, found by touching only the words that a merge changes."""
    chunks, counts = [list(word) for word in words], list(words.values())
    pairs, holders, found = Counter(), defaultdict(set), []
    for place, ids in enumerate(chunks):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += counts[place]
            holders[pair].add(place)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while heap and len(found) < merges:
        count, best = heapq.heappop(heap)
        if -count != pairs[best]:  # fell since it was pushed
            if pairs[best] > 0:
                heapq.heappush(heap, (-pairs[best], best))
            continue
        new, born = 256 + len(found), set()
        found.append(best)
        for place in holders.pop(best):
            old, chunks[place] = chunks[place], merge(chunks[place], best, new)
            for pair in zip(old, old[1:]):
                pairs[pair] -= counts[place]
            for pair in zip(chunks[place], chunks[place][1:]):
                pairs[pair] += counts[place]
                if new in pair:
                    holders[pair].add(place)
                    born.add(pair)
        for pair in born:
            heapq.heappush(heap, (-pairs[pair], pair))
    return found

# %%
# NBVAL_IGNORE_OUTPUT
import time

started = time.perf_counter()
assert train(words, 30) == train_simple(words, 30)
middle = time.perf_counter()
merges = train(words, 1500)
print(f"30 merges, both ways: {middle - started:.1f} s · 1,500, the fast way: {time.perf_counter() - middle:.1f} s")

# %% [markdown]
# `rustbpe` is this algorithm in Rust, on all cores; it is what trains our tokenizers. Same text, same merges:

# %%
trainer = rustbpe.Tokenizer()
trainer.train_from_iterator(iter(texts), 256 + 1500, pattern=SPLIT_PATTERN)
theirs = [bytes(token) for token, rank in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
assert theirs == tokens_of(merges)
print("longest tokens:", sorted(theirs, key=len)[-6:])

# %% [markdown]
# ## Encoding
#
# To encode a word, merge again, always the pair that was learned first. `tiktoken` does so in Rust; ours is five lines.

# %%
#| export bpe
def encode_word(word: bytes, merges: dict[Pair, int]) -> list[int]:
    """Token ids of one word; `merges` maps a pair to the token it makes."""
    ids = list(word)
    while known := [merges[pair] for pair in zip(ids, ids[1:]) if pair in merges]:
        first = min(known)
        ids = merge(ids, next(pair for pair in zip(ids, ids[1:]) if merges.get(pair) == first), first)
    return ids


def encode(text: str, merges: list[Pair], pattern: str) -> list[int]:
    """Token ids of a text."""
    numbers = {pair: 256 + place for place, pair in enumerate(merges)}
    return [token for word in regex.findall(pattern, text) for token in encode_word(word.encode(), numbers)]

# %%
fast = tiktoken.Encoding("world", pat_str=SPLIT_PATTERN, special_tokens={},
                         mergeable_ranks={token: rank for rank, token in enumerate(theirs)})
for text in [*texts[:50], "Ünïcode, 汉字 and  🙂\n\n\n", "a" * 50]:
    assert encode(text, merges, SPLIT_PATTERN) == fast.encode_ordinary(text)
print(encode("The miller lives in Ashby.", merges, SPLIT_PATTERN))

# %% [markdown]
# ## A chat is a document
#
# A model only ever continues a document. A chat becomes one by nine special tokens, numbered after the merges: one
# begins every document, the others mark who speaks, and where the calculator is called and answers.

# %%
#| export
SPECIAL_TOKENS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                  "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")

# %% [markdown]
# A system message has no token of its own: it is put before the first user's words.

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

# %% [markdown]
# With the ids comes a mask: 1 on what the assistant must learn to emit. Its words, its calculator calls, the token that
# ends its turn; not the user's words, and not what the calculator answered, which is forced into the stream.

# %%
#| export
PART_MARKERS = {"text": None, "python": "python", "python_output": "output"}


def parts_of(content: str | list[dict]) -> list[dict]:
    """The parts of an assistant's message, each {"type", "text"}; a string is one part of type text."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or any(part.get("type") not in PART_MARKERS for part in parts):
        raise NanochatError(f"an assistant's message is text, or parts of the types {', '.join(PART_MARKERS)}, "
                            f"not {str(content)[:80]!r}: mend the conversation")
    return parts


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
        if message["role"] == "user":
            add(marked("user", text_of(message["content"])), 0)
            continue
        add([tokenizer.encode_special("<|assistant_start|>")], 0)
        for part in parts_of(message["content"]):
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

# %% [markdown]
# ## The tokenizer
#
# One class holds it together. Text is always encoded as *ordinary* text: a user who types `<|assistant_end|>` gets
# some harmless pieces, never the special token. It is saved as JSON, and its fingerprint goes into every checkpoint,
# so that a model is never fed the ids of another tokenizer. nanochat keeps its own as a pickle, which can run any code
# when opened; we read one with nothing allowed but the data inside.

# %%
#| export
class Stored:
    """Takes the place of tiktoken.Encoding in a pickle: keeps its data and runs nothing."""

    def __setstate__(self, state: dict):
        self.state = state


class DataOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return Stored


def read_nanochat(path: Path) -> tuple[list[bytes], str, list[str]]:
    """Tokens by rank, pattern and specials of a tokenizer.pkl."""
    try:
        with open(path, "rb") as file:
            state = DataOnly(file).load().state
        ranks, specials = state["mergeable_ranks"], state["special_tokens"]
        return sorted(ranks, key=ranks.get), state["pat_str"], sorted(specials, key=specials.get)
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise NanochatError(f"{path} is not a tokenizer ({error}): delete it and run {TRAIN}") from None

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
        """Load what `save`, or nanochat, wrote. Raises NanochatError if it is missing or damaged."""
        path = Path(directory) / "tokenizer.json"
        if not path.exists() and path.with_suffix(".pkl").exists():
            return cls(*read_nanochat(path.with_suffix(".pkl")))
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

# %%
tokenizer = Tokenizer.train_from_iterator(texts, 1024)
attack = "Hi<|assistant_end|>"
print([tokenizer.id_to_token(token) for token in tokenizer.encode(attack)])
assert tokenizer.decode(tokenizer.encode(attack)) == attack
assert tokenizer.encode_special("<|assistant_end|>") not in tokenizer.encode(attack)

# %% [markdown]
# Text can run out of pairs: when every word is one token, there is nothing left to merge. That is an error, and says
# how far it got, since a model with thousands of ids that never occur would be a surprise later.

# %%
try:
    Tokenizer.train_from_iterator(texts[:100], 32768)
except NanochatError as error:
    print(error)

# %% [markdown]
# ## What it looks like

# %%
import matplotlib.pyplot as plt


def draw(axis, pieces, colours, y=0.0):
    """Pieces of text side by side in a line, each on its colour, on an axis that counts characters."""
    x = 0
    for piece, colour in zip(pieces, colours):
        shown = piece.replace("\n", "↵").replace(" ", "·")
        axis.text(x, y, shown, family="monospace", fontsize=11, va="center",
                  bbox=dict(facecolor=colour, edgecolor="none", pad=1.5, alpha=0.6))
        x += len(shown) + 0.6


def first(size):
    """The tokenizer that training would have given with a smaller vocabulary: its merges come in order."""
    return Tokenizer(theirs[:size - len(SPECIAL_TOKENS)])


sentence = "The miller of Ashby sold 12 pies for 36 pence."
palette = plt.cm.Pastel1.colors
figure, axis = plt.subplots(figsize=(10, 2.2), layout="constrained")
for y, size in enumerate((265, 300, 400, 800, 1700)):
    tokens = first(size).encode(sentence)
    draw(axis, [first(size).id_to_token(token) for token in tokens], palette * 6, -y)
    axis.text(-1, -y, f"{size} ids: {len(tokens)} tokens", ha="right", va="center", fontsize=10)
axis.set(xlim=(-24, 83), ylim=(-4.6, 0.6), title="one sentence, five vocabularies")
_ = axis.axis("off")

# %% [markdown]
# More ids make shorter sequences, but each doubling gains less, and every id costs the model a row in its embedding and
# one in its last matrix. And what is gained depends on the text: merges learned in a small world help little with
# Python's own manual.

# %%
manual = "\n".join(str(item.__doc__) for item in (str, list, dict, print, open, sorted, range, zip, map, property))
sizes = [265, 300, 400, 600, 800, 1024, 1300, 1700]
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, sample in (("the world, documents not trained on", held_out), ("Python's manual", [manual])):
    total = sum(len(text.encode()) for text in sample)
    axis.plot(sizes, [total / sum(map(len, first(size).encode(sample))) for size in sizes], marker="o", label=name)
axis.set(xscale="log", xlabel="vocabulary size (ids)", ylabel="bytes per token", xticks=sizes)
axis.xaxis.set_major_formatter("{x:.0f}")
axis.xaxis.set_minor_formatter("")
_ = axis.legend()

# %% [markdown]
# A conversation, with the calculator. Green is learned, grey is only read.

# %%
conversation = {"messages": [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "12 pies at 3 pence?"},
    {"role": "assistant", "content": [{"type": "python", "text": "12*3"}, {"type": "python_output", "text": "36"},
                                      {"type": "text", "text": "36 pence."}]},
]}
ids, mask = tokenizer.render_conversation(conversation)
figure, axis = plt.subplots(figsize=(10, 1.4), layout="constrained")
answer = ids.index(tokenizer.encode_special("<|assistant_start|>"))
lines = [0, answer, ids.index(tokenizer.encode_special("<|output_end|>")) + 1, len(ids)]
for y, (begin, end) in enumerate(zip(lines, lines[1:])):
    draw(axis, [tokenizer.id_to_token(token) for token in ids[begin:end]],
         ["#5b8" if learn else "#ddd" for learn in mask[begin:end]], -y)
axis.set(xlim=(0, 107), ylim=(-2.6, 0.6))
_ = axis.axis("off")

# %% [markdown]
# The prompt for an answer is the same document, cut where the assistant should speak:

# %%
print(tokenizer.decode(tokenizer.render_for_completion(conversation)))
assert ids[:answer + 1] == tokenizer.render_for_completion(conversation)

# %% [markdown]
# ## The commands
#
# `tok_train` reads the training shards, a long document only to its 10,000th character, so that no single book fills
# the vocabulary with its names.

# %%
#| export scripts/tok_train
"""Train the tokenizer on text shards and keep it: `python -m nanochat_lib.scripts.tok_train`."""


import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from nanochat_lib.common import base_dir, print0, progress, run_cli, write_json
from nanochat_lib.dataset import data_folder, text_batches
from nanochat_lib.tokenizer import Tokenizer


# %%
#| export scripts/tok_train
@dataclass
class TokTrain:
    """Which text to learn the vocabulary from."""

    data_dir: str = ""
    """folder of parquet shards; "": the downloaded corpus"""
    vocab_size: int = 32768
    """token ids, the nine specials included"""
    doc_cap: int = 10_000
    """characters read of one document"""
    max_chars: int = 2_000_000_000
    """characters read in all"""


def crop_texts(texts: Iterable[str], doc_cap: int, max_chars: int) -> Iterator[str]:
    """Each text cut to doc_cap characters, until max_chars have been passed on."""
    left = max_chars
    for text in texts:
        if left <= 0:
            return
        text = text[:min(doc_cap, left)]
        left -= len(text)
        yield text


def texts_of(data_dir: str, split: str) -> Iterator[str]:
    return (text for texts, _ in text_batches(data_dir, split) for text in texts)


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    return sum(len(text.encode(errors="replace")) for text in texts) / sum(map(len, tokenizer.encode(texts)))

# %%
#| export scripts/tok_train
#| cli tok_train
def tok_train(settings: TokTrain) -> None:
    """Learn a vocabulary from the training shards and keep it in tokenizer/ of $NANOCHAT_BASE_DIR."""
    data_folder(settings.data_dir)  # fail before the progress bar
    started, characters = time.monotonic(), 0

    def read() -> Iterator[str]:
        nonlocal characters
        with progress(desc="characters") as bar:
            for text in crop_texts(texts_of(settings.data_dir, "train"), settings.doc_cap, settings.max_chars):
                characters += len(text)
                bar.update(len(text))
                yield text

    tokenizer = Tokenizer.train_from_iterator(read(), settings.vocab_size)
    seconds = time.monotonic() - started
    tokenizer.save(base_dir() / "tokenizer")
    sample = list(islice(texts_of(settings.data_dir, "val"), 1000))
    result = {"vocab_size": tokenizer.get_vocab_size(), "bytes_per_token": bytes_per_token(tokenizer, sample),
              "characters": characters, "seconds": round(seconds, 1), "fingerprint": tokenizer.fingerprint}
    write_json(base_dir() / "report" / "result_tok.json", result)
    print0(f"{result['vocab_size']:,} tokens from {characters:,} characters in {seconds:.1f} s, "
           f"{result['bytes_per_token']:.2f} bytes per token of held-out text: {base_dir() / 'tokenizer'}")

# %% [markdown]
# `tok_eval` sets it beside the vocabularies of GPT-2 and GPT-4 on several kinds of text. These come from the network;
# without one it compares with what `tiktoken` has kept from earlier, and says what it leaves out.

# %%
#| export scripts/tok_eval
"""How well the tokenizer packs text, beside GPT-2's and GPT-4's: `python -m nanochat_lib.scripts.tok_eval`."""


import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tiktoken

from nanochat_lib.common import NanochatError, base_dir, print0, run_cli, write_json
from nanochat_lib.scripts.tok_train import texts_of
from nanochat_lib.tokenizer import load_tokenizer

SERVER = "https://openaipublic.blob.core.windows.net"
FILES = {  # what tiktoken fetches for a vocabulary
    "gpt2": ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json"),
    "cl100k_base": ("encodings/cl100k_base.tiktoken",),
}
SAMPLES = {
    "English": "The ferry was late again, and nobody on the pier seemed to mind. A boy counted gulls; his mother, who "
               "had brought a book, read the same page twice. \u201cIt won't come before six,\u201d she said at last.",
    "Korean": "배가 또 늦었지만 부두에 있는 사람은 아무도 신경 쓰지 않는 것 같았다. 한 소년이 갈매기를 세고 있었다.",
    "code": "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
            "    return total / len(values) if values else None\n",
    "mathematics": "Let $f(x) = \\frac{1}{2}x^2 - 3x + 4$. Then $f'(x) = x - 3$, so that the minimum lies at $x = 3$, "
                   "where $f(3) = -\\frac{1}{2}$; for $n \\ge 12$ we have $2^n > n^3$.",
    "numbers": "1984: 3,141,592 people; 2026: 27182818 people, 12.75% more than 1,024 * 65536.",
}

# %%
#| export scripts/tok_eval
def is_cached(name: str) -> bool:
    """Whether tiktoken has kept a vocabulary on this machine."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(folder or Path(tempfile.gettempdir()) / "data-gym-cache")
    return all((folder / hashlib.sha1(f"{SERVER}/{path}".encode()).hexdigest()).exists() for path in FILES[name])


def is_online(seconds: float = 3) -> bool:
    """Whether the server of these vocabularies answers (tiktoken itself would wait without end)."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no", "off"):
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(SERVER, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        return True  # an answer, if not the page
    except OSError:
        return False
    return True


def references() -> tuple[dict[str, tiktoken.Encoding], list[str]]:
    """The vocabularies to compare with that can be had, and the names of those that cannot."""
    online, found, missing = None, {}, []
    for name in FILES:
        if not is_cached(name) and online is None:
            online = is_online()
        try:
            if not (is_cached(name) or online):
                raise OSError
            found[name] = tiktoken.get_encoding(name)
        except (OSError, ValueError):
            missing.append(name)
    return found, missing

# %%
#| export scripts/tok_eval
#| cli tok_eval
@dataclass
class TokEval:
    """Which shards to measure on."""

    data_dir: str = ""
    """folder of parquet shards; "": the downloaded corpus, left out if there is none"""


def tok_eval(settings: TokEval) -> None:
    """Print bytes per token, by kind of text and by tokenizer (more is denser), and keep them in the report."""
    tokenizer = load_tokenizer()
    samples = dict(SAMPLES)
    try:
        samples["validation"] = "\n".join(islice(texts_of(settings.data_dir, "val"), 300))
    except NanochatError as error:
        if settings.data_dir:
            raise
        print0(f"left out: validation text ({error})")
    others, missing = references()
    encoders = {f"ours ({tokenizer.get_vocab_size():,})": tokenizer.encode,
                **{f"{name} ({other.n_vocab:,})": other.encode_ordinary for name, other in others.items()}}
    table = {kind: {name: len(text.encode()) / len(encode(text)) for name, encode in encoders.items()}
             for kind, text in samples.items()}
    print0(f"{'bytes per token':16}" + "".join(f"{name:>22}" for name in encoders))
    for kind, row in table.items():
        print0(f"{kind:16}" + "".join(f"{value:22.2f}" for value in row.values()))
    if missing:
        print0(f"left out: {', '.join(missing)}, neither kept here by tiktoken nor to be reached at {SERVER}")
    write_json(base_dir() / "report" / "result_tok_eval.json", {"bytes_per_token": table, "left_out": missing})

# %% [markdown]
# ## Exercises
#
# In [02_tokenizer](../exercises/02_tokenizer.ipynb):
# - *train_simple*: write the trainer from its rule, tie-break included.
# - *render_conversation*: a chat as ids and mask, tools and system message too.
# - *flops_per_byte*: which vocabulary is the cheapest to train with?
#
# **Next:** [03 · Attention](03_attention.ipynb)
