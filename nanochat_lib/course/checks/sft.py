"""Checks of the exercises of lesson 09."""

import random

import torch

from nanochat_lib.course.grading import exercise, expect, expect_equal, expect_shape, expect_type
from nanochat_lib.tasks.common import Task, conversation_of
from nanochat_lib.tokenizer import Tokenizer


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are the 256 bytes and the specials: an id per letter, the same on every machine."""
    return Tokenizer([bytes([byte]) for byte in range(256)])


def talk() -> Task:
    """150 conversations of many lengths, for measuring."""
    return Task([conversation_of(f"question {i}", "ab " * (1 + 37 * i % 61)) for i in range(150)])


def spelled(*pieces: str) -> list[int]:
    """Byte ids of pieces: a marker such as `<|bos|>`, or text."""
    tokenizer = byte_tokenizer()
    return [token for piece in pieces for token in
            ([tokenizer.encode_special(piece)] if piece.startswith("<|") else tokenizer.encode(piece))]


# A conversation piece by piece, and whether a piece is learned.
SPOKEN = (("<|bos|>", 0), ("<|user_start|>", 0), ("2+3?", 0), ("<|user_end|>", 0),
          ("<|assistant_start|>", 0), ("It is ", 1), ("<|python_start|>", 1), ("2+3", 1), ("<|python_end|>", 1),
          ("<|output_start|>", 0), ("5", 0), ("<|output_end|>", 0), ("5.", 1),
          ("<|assistant_end|>", 1), ("<|user_start|>", 0), ("ok", 0), ("<|user_end|>", 0),
          ("<|assistant_start|>", 0), ("Bye", 1), ("<|assistant_end|>", 1))
SAID = {  # what a wrong value at a piece means
    "<|assistant_start|>": "<|assistant_start|> is learned: it is given to the model, which never chooses it.",
    "<|assistant_end|>": "<|assistant_end|> is not learned: the model would never stop.",
    "<|output_start|>": "<|output_start|> is learned: the tool writes it, with all up to <|output_end|>.",
    "<|output_end|>": "<|output_end|> is learned: the tool writes it.",
    "<|python_start|>": "<|python_start|> is not learned: the model would never call the calculator.",
    "<|python_end|>": "<|python_end|> is not learned: the call would never be sent.",
    "5": "The tool's result is learned: the model would learn to make up results.",
    "2+3": "The calculator's input is not learned: the model must write it.",
    "5.": "The text after the tool's output is not learned: the assistant goes on speaking there.",
    "ok": "The user's second message is learned: the assistant's turn ends with <|assistant_end|>.",
    "Bye": "The assistant's second turn is not learned: every turn of it is.",
}


@exercise(difficulty=2, importance=5, minutes=20, hints=[
    "Walk over the ids and remember two things: is the assistant speaking, and is the tool?",
    "<|assistant_start|> opens what is learned but is not learned itself; <|assistant_end|> is the last that is.",
    "<|output_start|>, <|output_end|> and all between are the tool's; <|python_start|> and <|python_end|> are learned.",
])
def learned_mask(answer):
    tokenizer = byte_tokenizer()
    ids = spelled(*(piece for piece, _ in SPOKEN))
    got = answer(tokenizer, list(ids))
    expect_type(got, list)
    expect(len(got) == len(ids), f"The mask has {len(got)} numbers for {len(ids)} tokens: one for each.")
    expect(set(got) <= {0, 1}, "The mask holds only 0 and 1.")
    at = 0
    for piece, learn in SPOKEN:
        size = len(spelled(piece))
        expect(got[at:at + size] == [learn] * size,
               SAID.get(piece, f"{piece!r} should be {'learned' if learn else 'only read'}."))
        at += size
    cut = answer(tokenizer, ids[:ids.index(tokenizer.encode_special("<|output_start|>")) + 2])
    expect(cut[-2:] == [0, 0] and cut[-3] == 1, "Where the tool's output is cut off, it stays unlearned.")
    expect_equal(answer(tokenizer, []), [], "No tokens have an empty mask.")


@exercise(difficulty=2, importance=5, minutes=15, hints=[
    "Pad ids to seq_len + 1 tokens first; the inputs are all but the last, the targets all but the first.",
    "The target at place t is the token at t + 1: its mask is the mask at t + 1.",
    "-1 wherever the shifted mask is 0, padding included.",
])
def inputs_and_targets(answer):
    got = answer([5, 6, 7, 8], [0, 0, 1, 1], 6, 9)
    expect(isinstance(got, tuple) and len(got) == 2, "Return two tensors: inputs and targets.")
    inputs, targets = got
    expect_shape(inputs, (6,), torch.int64)
    expect_shape(targets, (6,), torch.int64)
    expect_equal(inputs.tolist(), [5, 6, 7, 8, 9, 9], "The inputs are the tokens, then the padding token.")
    expect(targets.tolist() != [-1, -1, 7, 8, -1, -1],
           "The targets are not shifted: at each place the target is the next token.")
    expect(targets.tolist()[:3] != [-1, -1, 8], "The mask belongs to the target, not to the input: shift it too.")
    expect(9 not in targets.tolist(), "Padding is a target: the model would learn to write it. Its target is -1.")
    expect(0 not in targets.tolist(), "What is not learned has the target -1; 0 is a token like any other.")
    expect_equal(targets.tolist(), [-1, 7, 8, -1, -1, -1], "The target is the next token if that is learned.")
    full = answer([1, 2, 3, 4], [0, 1, 0, 1], 3, 9)
    expect_equal(full[0].tolist(), [1, 2, 3], "A conversation of seq_len + 1 tokens fills the row: nothing is padded.")
    expect_equal(full[1].tolist(), [2, -1, 4], "A conversation of seq_len + 1 tokens keeps its last target.")
    long = answer([1, 2, 3, 4, 5, 6], [0, 1, 1, 1, 1, 1], 3, 9)
    expect_equal([part.tolist() for part in long], [[1, 2, 3], [2, 3, 4]],
                 "A longer conversation is cut to seq_len + 1 tokens.")


@exercise(difficulty=2, importance=4, minutes=15, hints=[
    "The logits at position t speak about the token after t: the answer's are at the prompt's last token.",
    "Row b's prompt has lengths[b] tokens, so its last one is at lengths[b] - 1; behind it there is only padding.",
    "Compare the logits of letter_ids only; a token that is no letter may be likelier than all of them.",
])
def choose_letter(answer):
    logits = torch.full((1, 3, 10), 0.0)
    logits[0, 2, 4], logits[0, 2, 9] = 1.0, 5.0
    got = answer(logits, torch.tensor([3]), torch.tensor([2, 4, 6]))
    expect_shape(got, (1,), torch.int64)
    expect(got.item() != 9, "Only the letters compete: token 9 is likelier, but it is none of them.")
    expect(got.item() != 4, "Return the place among letter_ids (0, 1, 2…), not the token.")
    expect_equal(got.tolist(), [1], "The second letter has the highest logit after the prompt's last token.")
    logits = torch.zeros(2, 4, 10)
    logits[0, 1, 6], logits[0, 3, 2], logits[0, 2, 4] = 1.0, 3.0, 2.0
    logits[1, 3, 2] = 1.0
    got = answer(logits, torch.tensor([2, 4]), torch.tensor([2, 4, 6])).tolist()
    expect(got[0] != 0, "The first prompt has 2 tokens, the row 4: you read the logits at the padding's end.")
    expect(got[0] != 1, "With a prompt of 2 tokens read position 1, lengths - 1; position 2 is padding.")
    expect_equal(got, [2, 0], "Row by row: the letter with the highest logit at position lengths - 1.")
    generator = torch.Generator().manual_seed(0)
    logits, letters = torch.randn(16, 9, 40, generator=generator), torch.tensor([3, 38, 11, 20])
    lengths = torch.randint(1, 10, (16,), generator=generator)
    before = logits.clone()
    expected = [max(range(4), key=lambda k: float(logits[b, lengths[b] - 1, letters[k]])) for b in range(16)]
    expect_equal(answer(logits, lengths, letters).tolist(), expected, "On 16 random rows some letters differ.")
    expect(torch.equal(logits, before), "The logits were changed: they belong to the caller.")


def packed(lengths: list[int], capacity: int, waiting: int) -> list[list[int]]:
    """The reference: best fit by sorting what waits anew for every placement."""
    rest, buffer, rows, room = list(range(len(lengths))), [], [], 0
    while rest or buffer:
        buffer, rest = buffer + rest[:waiting - len(buffer)], rest[waiting - len(buffer):]
        order = sorted((place for place in buffer if lengths[place] <= room), key=lambda place: (-lengths[place], place))
        if order:
            buffer.remove(order[0])
            rows[-1].append(order[0])
            room -= lengths[order[0]]
        else:
            rows, room = [*rows, []], capacity
    return rows


@exercise(difficulty=3, importance=4, minutes=20, hints=[
    "Keep a list of waiting places; fill it up before every placement.",
    "max(fitting, key=lambda place: lengths[place]) gives the first of the longest.",
    "A loop that ends when nothing waits and nothing is left; a new row when nothing that waits fits.",
])
def pack(answer):
    got = answer([4, 6, 5], 10, 3)
    expect_type(got, list)
    expect(all(isinstance(row, list) for row in got), "Return a list of rows, each a list of places.")
    placed = sorted(place for row in got for place in row)
    expect(placed == [0, 1, 2], "Every conversation is placed exactly once, the last row included.")
    expect(got != [[0, 1], [2]], "In the order they come 4 and 6 fill a row by luck: the longest that fits goes first.")
    expect_equal(got, [[1, 0], [2]], "Lengths 4, 6, 5 in rows of 10: first 6, then the longest that fits into 4.")
    expect_equal(answer([3, 5, 5, 2], 10, 4), [[1, 2], [0, 3]], "Of equal lengths the one that came first is placed first.")
    expect(answer([5, 4, 5], 10, 2) != [[0, 1], [2]], "After a placement the next conversation joins those that wait, "
           "before the row goes on.")
    expect_equal(answer([5, 4, 5], 10, 2), [[0, 2], [1]], "Two wait: 5 is placed, the other 5 joins and fills the row.")
    expect_equal(answer([2, 9, 9, 8], 10, 1), [[0], [1], [2], [3]], "With one waiting, they come in order.")
    expect_equal(answer([], 10, 3), [], "No conversations, no rows.")
    dice = random.Random(0)
    lengths = [dice.randint(1, 60) for _ in range(200)]
    for waiting in (1, 7, 300):
        got = answer(list(lengths), 64, waiting)
        expect(all(sum(lengths[place] for place in row) <= 64 for row in got), "A row holds more than its capacity.")
        expect_equal(len(got), len(packed(lengths, 64, waiting)), f"With {waiting} waiting the number of rows differs.")
        expect(got == packed(lengths, 64, waiting), f"With {waiting} waiting some rows differ from best fit.")


def padding_of(buffer_size: int, capacity: int = 257) -> float:
    """Share of padding in one pass over `talk`, packed best fit by looking at every waiting conversation each time."""
    # five markers, a byte a letter
    lengths = [5 + sum(len(message["content"]) for message in one["messages"]) for one in talk()]
    waiting, padding, rows = [], 0, 0
    while lengths or waiting:
        room, rows = capacity, rows + 1
        while True:
            while lengths and len(waiting) < buffer_size:
                waiting.append(lengths.pop(0))
            fitting = [length for length in waiting if length <= room]
            if not fitting:
                break
            waiting.remove(max(fitting))
            room -= max(fitting)
        padding += room
    return padding / (rows * capacity)


@exercise(difficulty=2, importance=3, minutes=15, hints=[
    "loader.row() gives (ids, mask) of one row; loader.passes is 1 when each conversation has been packed.",
    "Padding is what follows the last <|assistant_end|> of a row.",
])
def padding_share(answer):
    expect_type(answer, dict)
    expect(set(answer) == {1, 100}, "Give two numbers: {1: share with a buffer of 1, 100: share with a buffer of 100}.")
    expect(all(0 <= share <= 1 for share in answer.values()), "A share lies between 0 and 1.")
    expect(answer[1] > answer[100], "A larger buffer leaves less padding, not more.")
    for size in (1, 100):
        expected = padding_of(size)
        expect(abs(answer[size] - expected) < 0.005, f"With a buffer of {size} padding is not {answer[size]:.1%} of "
               "all tokens: count those after each row's last <|assistant_end|>, over one whole pass.")
