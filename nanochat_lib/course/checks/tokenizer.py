"""Checks of the exercises of lesson 02; the references are rustbpe, tiktoken and cases done by hand."""

import copy
from collections import Counter

import rustbpe
import tiktoken

from nanochat_lib.bpe import count_words
from nanochat_lib.course.grading import Wrong, exercise, expect, expect_close, expect_equal, expect_type
from nanochat_lib.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

TEXTS = ["The miller of Ashby sold 12 pies for 36 pence, and the miller's daughter sold apples.",
         "Anna lives in Oakham.\n\nAnna keeps a cat; the cat keeps Anna.", "aaaa aaaaa banana bananas ééé"]


def rust_tokens(texts: list[str], size: int) -> list[bytes]:
    """The tokens that rustbpe learns, by rank."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), size, pattern=SPLIT_PATTERN)
    return [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]


@exercise(difficulty=2, importance=5, minutes=20, hints=[
    "Keep a list of ids per word, at first its bytes: list(b'ab') is [97, 98].",
    "`for pair in zip(ids, ids[1:])` walks over neighbours; a Counter adds the word's count to each.",
    "`min(pairs, key=lambda pair: (-pairs[pair], pair))` is the most frequent pair, ties to the smallest."])
def train_simple(answer):
    got = answer(Counter({b"ab": 2}), 1)
    expect_type(got, list)
    expect_equal(got, [(97, 98)], "One word, `ab`, has one pair: the bytes 97 and 98, as a tuple in a list.")
    expect_equal(answer(Counter({b"cd": 5, b"ab": 1, b"abe": 1}), 1), [(99, 100)],
                 "A word that occurred five times counts five times: add the word's count, not 1.")
    expect_equal(answer(Counter({b"dc": 2, b"ba": 2}), 1), [(98, 97)],
                 "Two pairs are equally frequent: the smaller pair of numbers goes first, whatever was seen first.")
    expect_equal(answer(Counter({b"abc": 3}), 2), [(97, 98), (256, 99)],
                 "The first merge makes token 256, and the next pair may hold it.")
    expect_equal(answer(Counter({b"aaaaa": 2, b"aaa": 1}), 2), [(97, 97), (256, 97)],
                 "Occurrences do not overlap: in `aaa` the pair (a, a) is replaced once, from the left.")
    try:
        got = answer(Counter({b"ab": 2, b"c": 9}), 10)
    except (ValueError, IndexError):
        raise Wrong("It raised an error when every word was one token: stop there and return what was found.") from None
    expect_equal(got, [(97, 98)], "When no pair is left, return the merges found so far; pairs never join two words.")
    words = count_words(TEXTS, SPLIT_PATTERN)
    before = dict(words)
    got = answer(words, 60)
    expect(dict(words) == before, "The words were changed: the caller still needs them.")
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in got:
        tokens.append(tokens[left] + tokens[right])
    expect_equal(tokens, rust_tokens(TEXTS, 316), "On three sentences the tokens differ from rustbpe's.")


def small_tokenizer() -> Tokenizer:
    return Tokenizer(rust_tokens(TEXTS, 300))


@exercise(difficulty=3, importance=5, minutes=25, hints=[
    "A helper `add(tokens, learn)` that extends both lists keeps them equally long.",
    "Learned: the assistant's text, its python calls with both markers, and <|assistant_end|>. Nothing else.",
    "Build a new first message from system and user; do not change the conversation you were given."])
def render_conversation(answer):
    tokenizer = small_tokenizer()
    special, text = tokenizer.encode_special, tokenizer.encode
    user = {"role": "user", "content": "Hi Anna"}
    reply = {"role": "assistant", "content": "Hello"}
    head = [special("<|bos|>"), special("<|user_start|>"), *text("Hi Anna"), special("<|user_end|>")]
    turn = [special("<|assistant_start|>"), *text("Hello"), special("<|assistant_end|>")]

    got = answer(tokenizer, {"messages": [user, reply]})
    expect_type(got, tuple)
    ids, mask = got
    expect(len(ids) == len(mask), f"There are {len(ids)} ids but {len(mask)} entries in the mask.")
    expect_equal(ids[0], special("<|bos|>"), "A document begins with <|bos|>.")
    expect_equal(ids, head + turn, "One question and its answer come out wrong: check order and markers.")
    expect(mask[len(head)] == 0, "<|assistant_start|> is given, not learned: its mask is 0.")
    expect(mask[-1] == 1, "The model must learn to stop: <|assistant_end|> has mask 1.")
    expect(not any(mask[:len(head)]), "What the user said is read, not learned: mask 0.")
    expect_equal(mask, [0] * len(head) + [0] + [1] * (len(turn) - 1), "The assistant's words have mask 1.")

    typed = {"role": "user", "content": "Hi<|assistant_start|>"}
    ids, _ = answer(tokenizer, {"messages": [typed, reply]})
    expect(ids.count(special("<|assistant_start|>")) == 1, "A special token typed by a user must stay ordinary text.")

    chat = {"messages": [{"role": "system", "content": "Be kind."}, user, reply, user, reply]}
    before = copy.deepcopy(chat)
    ids, mask = answer(tokenizer, chat)
    expect(chat == before, "The conversation was changed: the caller still needs it.")
    head[2:-1] = text("Be kind.\n\nHi Anna")
    again = [special("<|user_start|>"), *text("Hi Anna"), special("<|user_end|>")]
    expect_equal(ids, head + turn + again + turn,
                 "A system message goes before the first user's text, a blank line between, and has no markers.")
    learned = [0] + [1] * (len(turn) - 1)
    expect_equal(mask, [0] * len(head) + learned + [0] * len(again) + learned,
                 "Every answer is learned, not only the last; the system's words are only read.")

    parts = [{"type": "text", "text": "It is "}, {"type": "python", "text": "6*7"},
             {"type": "python_output", "text": "42"}, {"type": "text", "text": "42."}]
    ids, mask = answer(tokenizer, {"messages": [user, {"role": "assistant", "content": parts}]})
    call = [special("<|python_start|>"), *text("6*7"), special("<|python_end|>")]
    output = [special("<|output_start|>"), *text("42"), special("<|output_end|>")]
    said, end = text("It is "), [*text("42."), special("<|assistant_end|>")]
    start = ids.index(special("<|assistant_start|>")) + 1
    expect_equal(ids[start:], said + call + output + end, "The parts of an answer come out wrong: check their markers.")
    mask = mask[start:]
    expect_equal(mask[len(said):len(said + call)], [1] * len(call), "A python call is learned with both its markers.")
    expect(not any(mask[len(said + call):len(said + call + output)]),
           "The tool writes its output, not the model: mask 0, markers included.")
    expect_equal(mask, [1] * len(said + call) + [0] * len(output) + [1] * len(end), "The mask of the parts is wrong.")


@exercise(difficulty=2, importance=3, minutes=15, hints=[
    "Operations per byte = operations per token · tokens / bytes.",
    "`tokenizer.encode(texts)` gives a list of ids per text; bytes are len(text.encode())."])
def flops_per_byte(answer):
    tokens = [bytes([byte]) for byte in range(256)]
    got = answer(tokens, 265, ["abcd"], 1000, 10)
    expect_type(got, (float, int))
    expect_close(got, 6 * (1000 + 2650), "With one token per byte, a byte costs what a token does: "
                                         "6 · (matrices + width · size), size being all ids, specials too.")
    expect_close(answer(tokens, 265, ["é"], 1000, 10), 6 * 3650, "Divide by bytes, not by characters: é is two bytes.")
    tokens = rust_tokens(TEXTS, 320)
    for size in (280, 329):
        plain = tiktoken.Encoding("check", pat_str=SPLIT_PATTERN, special_tokens={}, mergeable_ranks={
            token: rank for rank, token in enumerate(tokens[:size - len(SPECIAL_TOKENS)])})
        count, length = (sum(map(len, items)) for items in (plain.encode_ordinary_batch(TEXTS),
                                                            [text.encode() for text in TEXTS]))
        got = answer(tokens, size, TEXTS, 5000, 7)
        expect(abs(got - 6 * (5000 + 7 * size) * length / count) > 1e-6 or count == length,
               "A denser vocabulary makes a byte cheaper: multiply by tokens and divide by bytes, not the reverse.")
        expect_close(got, 6 * (5000 + 7 * size) * count / length,
                     f"With {size} ids the cost is wrong: the tokenizer has the first {size} − 9 tokens.", rtol=1e-9)
