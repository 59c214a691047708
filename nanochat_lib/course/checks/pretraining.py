"""Checks of the exercises of lesson 07."""

import json
import math
import random

from nanochat_lib.course.grading import Wrong, exercise, expect, expect_close, expect_equal, expect_type

LOST = (0.26, 0.36), (0.07, 0.13), (0.002, 0.009)  # fractions that several seeds give, with room on both sides


def documents(*lengths: int) -> list[list[int]]:
    """Documents of these lengths; the i-th is made of the numbers 100·(i + 1), 100·(i + 1) + 1, …"""
    return [list(range(100 * i, 100 * i + length)) for i, length in enumerate(lengths, 1)]


def packed(answer, lengths: list[int], length: int) -> tuple[list[int], list[int]]:
    """(which documents are in the row, in order; lengths of what is left in the buffer), after checks of the row."""
    buffer = documents(*lengths)
    row = answer(buffer, length)
    expect_type(row, list)
    expect(all(isinstance(token, int) for token in row), "The row is a flat list of tokens: join documents with +=.")
    expect(len(row) == length, f"The row has {len(row)} tokens; it should have exactly {length}: no padding, and the last "
           "document is cropped to the room that is left.")
    expect(min(row) >= 100, "The row holds a token that is in no document: no padding, the shortest document is cropped "
           "to fill the row.")
    expect(all(token % 100 == 0 or row[i - 1] == token - 1 for i, token in enumerate(row)),
           "A document must enter the row from its first token on; crop its end, not its beginning.")
    return [token // 100 - 1 for token in row if token % 100 == 0], [len(document) for document in buffer]


@exercise(difficulty=2, importance=4, minutes=15, hints=[
    "Keep `room = length - len(row)` and choose again after each document.",
    "max and min with a key return the first of equals.",
    "buffer.pop(i) removes a document and returns it; [:room] crops it, and does nothing to one that fits.",
])
def pack_row(answer):
    order, left = packed(answer, [3, 5, 2, 4], 9)
    expect(order[:1] != [0], "The first document in the buffer went first: choose the longest that fits.")
    expect_equal(order, [1, 3], "Of documents of 3, 5, 2 and 4 tokens, a row of 9 takes the one of 5 and then the one of 4.")
    expect(len(left) == 2, "Documents that were used must leave the buffer.")
    order, left = packed(answer, [9, 4, 7, 8], 6)
    expect(order != [1, 0] and order != [1, 3], "When nothing fits, crop the shortest document: that loses least.")
    expect_equal(order, [1, 2], "A row of 6 takes the document of 4; then none of 9, 7 and 8 fits, and the one of 7 is cropped.")
    expect_equal(left, [9, 8], "A cropped document leaves the buffer whole; its rest is not read later.")
    order, _ = packed(answer, [2, 2, 2], 4)
    expect_equal(order, [0, 1], "Of equally long documents the one that came first goes first.")
    order, _ = packed(answer, [5, 5, 3], 4)
    expect_equal(order, [2, 0], "Of equally short documents the one that came first is cropped.")
    generator = random.Random(7)
    lengths = [generator.randrange(1, 60) for _ in range(60)]
    expected, waiting, room = [], list(enumerate(lengths)), 90
    while room > 0:  # by sorting, where the exercise suggests a search
        fits = sorted((-length, i) for i, length in waiting if length <= room)
        chosen = fits[0][1] if fits else sorted((length, i) for i, length in waiting)[0][1]
        expected.append(chosen)
        room -= lengths[chosen]
        waiting = [pair for pair in waiting if pair[0] != chosen]
    expect_equal(packed(answer, lengths, 90)[0], expected, "From 60 documents it takes others, or in another order.")


@exercise(difficulty=1, importance=5, minutes=10, hints=[
    "Three cases; the warm-down can be written by how much of it is left, (steps − step) / d, which falls from 1 to 0.",
    "With warmdown_ratio = 0 there is nothing to divide by: the rate stays 1.",
])
def learning_rate_multiplier(answer):
    first = answer(0, 100, 10, 0.5, 0.1)
    expect_type(first, (int, float))
    expect(first != 0, "The first step has rate 0 and is wasted: warm up as 1/w, 2/w, …, not 0/w, 1/w.")
    expect_close([answer(step, 100, 10, 0.5, 0.1) for step in range(11)], [*(0.1 * n for n in range(1, 11)), 1.0],
                 "The warm-up over 10 steps is 0.1, 0.2, …, 1.0, and then 1.")
    expect_close(answer(50, 100, 10, 0.5, 0.1), 1.0, "The warm-down starts at step steps − d, still at 1.")
    expect_close(answer(75, 100, 10, 0.5, 0.1), 0.55, "Half-way down, between 1 and 0.1, the factor is 0.55: final_lr_frac "
                 "is where the line ends, not where it is cut off.")
    expect_close(answer(99, 100, 10, 0.5, 0.1), 0.118, "The line reaches final_lr_frac at `steps`, one after the last step.")
    expect_close(answer(99, 100, 0, 0.0, 0.1), 1.0, "Without warm-up and warm-down the rate is always 1.")
    expect_close(answer(4, 5, 1, 0.5, 0.0), 0.5, "d = round(warmdown_ratio · steps): of 5 steps 0.5 is 2.")


@exercise(difficulty=2, importance=4, minutes=10, hints=[
    "Round the exponent, not the number: 2 ** round(log2(…)).",
    "log2 of a product is a sum: 19 + 0.383 · log2(D / D₁₂).",
])
def optimal_batch_size(answer):
    same = answer(1e9, 1e9)
    expect(isinstance(same, int), f"Return an int, not a {type(same).__name__}: tokens are counted.")
    expect_equal(same, 2**19, "A run as long as the reference has the reference's batch, 2¹⁹ = 524,288.")
    got = answer(8e9, 1e9)
    expect(got & (got - 1) == 0, f"{got} is not a power of two.")
    expect(got != 2**22, "Eight times the tokens do not ask for eight times the batch: the exponent is 0.383.")
    expect_equal(answer(1.8e9, 1e9), 2**19, "1.8 times the tokens: 1.8^0.383 = 1.25 is nearer to 1: round, do not round up.")
    expect_equal(got, 2**20, "Eight times the tokens: 8^0.383 = 2.2, so twice the batch.")
    expect_equal(answer(3e9, 1e9), 2**20, "Three times the tokens: 3^0.383 = 1.52, on a logarithmic scale nearer to 2 than to 1.")
    expect_equal(answer(1e8, 1e9), 2**18, "A tenth of the tokens: 0.1^0.383 = 0.41, so half the batch.")
    for depth in range(2, 40):  # D grows about like depth³; compared in whole numbers
        tokens = float(depth) ** 3
        expected = min(range(5, 40), key=lambda power: abs(power - 19 - 0.383 * math.log2(tokens / 1728)))
        expect_equal(answer(tokens, 1728.0), 2**expected, f"For {tokens:.0f} tokens against 1,728 the batch is another.")


@exercise(difficulty=2, importance=3, minutes=10, hints=[
    "BestFit takes anything that has a length: range(n) is a document of n tokens.",
    "A document that take(room) returns is longer than the room only when it is cropped; the difference is lost.",
    "Top the buffer up to `size` before each choice.",
])
def lost_to_cropping(answer):
    expect_type(answer, dict)
    expect(set(answer) == {10, 100, 1000}, "Give a dict {10: fraction, 100: fraction, 1000: fraction}.")
    values = [answer[size] for size in (10, 100, 1000)]
    expect(all(isinstance(value, float) and 0 <= value < 1 for value in values), "Give fractions between 0 and 1, as floats.")
    expect(values[0] > values[1] > values[2], "A larger buffer has a better fitting document, so less is lost: are the "
           "sizes mixed up, or is the buffer not topped up before each choice?")
    for value, (low, high) in zip(values, LOST):
        if not low <= value <= high:
            raise Wrong(f"{value:.4f} is not what 300 rows give: count the part of each cropped document that did not fit, "
                        "and divide by all tokens that left the buffer.")


class Killed(BaseException):
    """The process is gone."""


class Disk:
    """Files by name. Killed after so many moments; a write has two, and between them half of the file is there."""

    def __init__(self, files: dict[str, str] | None = None, moments: float = math.inf):
        self._files, self.moments = dict(files or {}), moments

    def _tick(self):
        self.moments -= 1
        if self.moments < 0:
            raise Killed

    def write(self, name: str, text: str):
        self._tick()
        self._files[name] = text[:len(text) // 2]
        self._tick()
        self._files[name] = text

    def rename(self, old: str, new: str):
        self._tick()
        if old not in self._files:
            raise FileNotFoundError(f"no file {old} on the disk, only {', '.join(self._files) or 'none'}")
        self._files[new] = self._files.pop(old)

    def remove(self, name: str):
        self._tick()
        if self._files.pop(name, None) is None:
            raise FileNotFoundError(f"no file {name} on the disk, only {', '.join(self._files) or 'none'}")

    def files(self) -> dict[str, str]:
        return dict(self._files)


def parts(step: int) -> tuple[str, str]:
    """(weights, metadata) of a step."""
    return f"weights of {step} " * 4, f"metadata of {step} " * 3


def loaded(load, disk: Disk, steps: set[int], when: str) -> int:
    """The step that load finds, one of `steps`, with its own parts; else Wrong."""
    before = disk.files()
    try:
        got = load(disk)
    except Exception as error:
        raise Wrong(f"Killed {when}, load raises {type(error).__name__}: {error}. It must find the checkpoint before.") from None
    expect(disk.files() == before, "load must leave the disk as it is.")
    expect(got is not None, f"Killed {when}, load finds nothing: the checkpoint before must stay until the new one is whole.")
    expect(isinstance(got, tuple) and len(got) == 3, "load returns (step, weights, metadata), or None on an empty disk.")
    step, weights, metadata = got
    expect(step in steps, f"Killed {when}, load finds step {step}; whole were {sorted(steps)}.")
    for name, text, mine in (("weights", weights, 0), ("metadata", metadata, 1)):
        whole = parts(step)[mine]
        expect(text == whole or not whole.startswith(text), f"Killed {when}, load takes half of the {name} for the whole: write "
               "under another name and rename, which happens in one piece.")
        expect(text == whole, f"Killed {when}, load returns {name} of another step than {step}: parts of two "
               "checkpoints are mixed. The name of a file must say its step.")
    return step


@exercise(difficulty=3, importance=5, minutes=20, hints=[
    "Two questions: when is a file whole, and when is a checkpoint whole? A rename answers the first.",
    "Write each file under a name that load ignores, then rename it; the name of the second to arrive says that both are there.",
    "Delete in the opposite order: first the file that says the checkpoint is whole. At the start of save remove what belongs "
    "to no whole checkpoint, and all whole ones but the last.",
])
def save_and_load(answer):
    save, load = answer
    expect(load(Disk()) is None, "On an empty disk load returns None.")
    disk = Disk()
    for step in (10, 20):
        save(disk, step, *parts(step))
        expect(load(Disk(disk.files())) is not None, f"After save of step {step}, load finds nothing.")
        expect_equal(load(Disk(disk.files())), (step, *parts(step)), f"After save of step {step}, load finds another checkpoint.")
    start, usual = disk.files(), len(disk.files())
    disk = Disk(start)
    for step in (30, 40, 50):
        save(disk, step, *parts(step))
    expect(len(disk.files()) <= usual, f"After five saves {len(disk.files())} files are on the disk: keep the last two checkpoints.")
    save(disk, 100, *parts(100))
    expect_equal(load(Disk(disk.files())), (100, *parts(100)), "After step 50 came step 100: compare steps as numbers, not as text.")
    total = Disk(start)
    save(total, 30, *parts(30))
    loaded(load, total, {30}, "after saving step 30")
    moments = 0
    while True:  # killed at every moment of the third save
        disk, when = Disk(start, moments), f"after {moments} operations of saving step 30"
        try:
            save(disk, 30, *parts(30))
        except Killed:
            pass
        else:
            break
        loaded(load, Disk(disk.files()), {20, 30}, when)
        again = Disk(disk.files())  # the next run saves, and cleans up
        save(again, 40, *parts(40))
        loaded(load, again, {40}, f"{when}; then step 40 saved")
        expect(len(again.files()) <= usual, f"Killed {when}, and step 40 saved: {len(again.files())} files are on the disk, after two "
               f"saves it was {usual}. What a killed save left must go: {', '.join(sorted(again.files()))}.")
        moments += 1


def numbers_in(value) -> list:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        return [number for pair in value.items() for part in pair for number in numbers_in(part)]
    if isinstance(value, (list, tuple)):
        return [number for part in value for number in numbers_in(part)]
    return [value] if isinstance(value, (int, float)) else []


def expected_order(lengths: list[int], length: int, size: int) -> list[list[int]]:
    """Which documents are in each row, by sorting."""
    waiting, read, result = [], 0, []
    while True:
        room, row = length, []
        while room > 0:
            while len(waiting) < size and read < len(lengths):
                waiting.append(read)
                read += 1
            if not waiting:
                return result
            fits = sorted((-lengths[i], i) for i in waiting if lengths[i] <= room)
            row.append(fits[0][1] if fits else sorted((lengths[i], i) for i in waiting)[0][1])
            waiting.remove(row[-1])
            room -= lengths[row[-1]]
        result.append(row)


@exercise(difficulty=3, importance=4, minutes=20, hints=[
    "What does the loop know when it yields? How many documents were read, and which of these wait in the buffer.",
    "Keep the places of documents in the buffer, not the documents; `documents[place]` finds them again.",
    "Give `list(waiting)`: the loop goes on changing its own list.",
])
def resumable_rows(answer):
    lengths = [3, 5, 2, 4, 7, 1, 6, 2, 8, 3, 5, 4, 9, 2, 6, 1, 7, 3]
    texts = [[1000 + token for token in document] for document in documents(*lengths)]
    given, kept = [], []
    for row, state in answer(texts, 9, 4):
        expect(len(given) < 20, "It never ends: stop when the documents cannot fill another row.")
        try:
            kept.append(json.dumps(state))
        except (TypeError, ValueError) as error:
            raise Wrong(f"The state is no JSON ({error}): lists, dicts, numbers.") from None
        given.append((row, state))
    expect(bool(given), "It yields no row at all.")
    expect_type(given[0][0], list)
    order = [[token // 100 - 11 for token in row if token % 100 == 0] for row, _ in given]
    expect(all(len(row) == 9 for row, _ in given), "Every row has exactly `length` tokens.")
    expect_equal(order, expected_order(lengths, 9, 4), "Without any stop, these documents are in the rows: (best fit from a "
                 "buffer of 4, topped up before each choice)")
    expect(all(json.dumps(state) == text for (_, state), text in zip(given, kept)),
           "A state changes after it was given: it is the loader's own list. Give a copy.")
    expect(max(numbers_in(json.loads(kept[0])), default=0) < 1000 and len(kept[0]) < 300,
           "The state holds the documents themselves: name them by their places in the list.")
    for number, text in enumerate(kept):
        went_on = [row for row, _ in answer(texts, 9, 4, json.loads(text))]
        expected = [row for row, _ in given[number + 1:]]
        if went_on == expected:
            continue
        seen = {place for row in order[:number + 1] for place in row}
        first = [token // 100 - 11 for row in went_on for token in row if token % 100 == 0]
        expect(not seen & set(first), f"Stopped after row {number + 1}, document {min(seen & set(first), default=0)} is read again: "
               "what has left the buffer must not come back.")
        missing = sorted({place for row in order[number + 1:] for place in row} - set(first))
        expect(not missing or number >= len(kept) // 2, f"Stopped after row {number + 1}, document {missing[0] if missing else 0} is lost: the documents that waited in "
               "the buffer belong to the state, not only what is read next.")
        raise Wrong(f"Stopped after row {number + 1}, the rows that follow are others: is the buffer in the same order as before?")
