"""Checks of the exercises of lesson 12."""

import itertools
import random
from collections.abc import Iterator

from nanochat_lib.course.grading import Wrong, exercise, expect, expect_equal, expect_type

STOPS = [("stop",), ("aab",), ("ab", "b\n\n"), ("xyz", "yx"), ("\n\n",), ("aa", "aaa")]


def cuts(text: str, dice: random.Random) -> list[str]:
    """The text in pieces of one to three characters."""
    pieces = []
    while text:
        size = dice.randint(1, 3)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@exercise(difficulty=3, importance=4, minutes=20, hints=[
    "First look for whole stop strings: text.find(stop) gives a place, and the smallest place of all counts.",
    "If there is none, the text's end may begin one: text.endswith(stop[:size]) for sizes 1 … len(stop) − 1.",
    "Hold the longest such end, over all sizes and all stop strings; text[:-0] is empty, so count from the front.",
])
def hold_back(answer):
    got = answer("hello", ("stop",))
    expect(isinstance(got, tuple) and len(got) == 3, "Return three things: (shown, held, ended).")
    expect_equal(got, ("hello", "", False), "'hello' does not end like a beginning of 'stop': all of it may be shown.")
    expect_equal(answer("hello stop it", ("stop",)), ("hello ", "", True), "The answer ends before the stop string, "
                 "and what follows is neither shown nor held.")
    expect_equal(answer("hello st", ("stop",)), ("hello ", "st", False), "'st' may become 'stop': it has to wait.")
    expect_equal(answer("", ("stop",)), ("", "", False), "No text: nothing to show or hold.")
    expect_equal(answer("a b c", ("c", "b")), ("a ", "", True), "The first stop string in the text ends it, not the "
                 "first of the list.")
    expect_equal(answer("xaa", ("aab",)), ("x", "aa", False), "Of 'xaa', both letters a may belong to 'aab': hold the "
                 "longest end that begins a stop string, not the first that fits.")
    expect_equal(answer("so", ("stop", "over")), ("s", "o", False), "'o' may become 'over': every stop string is to be "
                 "considered.")
    expect_equal(answer("hello", ()), ("hello", "", False), "Without stop strings nothing is held.")
    dice = random.Random(12)
    for _ in range(300):
        stops = dice.choice(STOPS)
        text = "".join(dice.choices("abxyz\nstop", k=dice.randint(0, 30)))
        places = [text.find(stop) for stop in stops if stop in text]
        due = text[:min(places, default=len(text))]
        seen, held, ended = "", "", False
        for piece in cuts(text, dice):
            held += piece
            shown, held, ended = answer(held, stops)
            seen += shown
            expect(due.startswith(seen), f"Of {text!r} with the stop strings {stops} you have shown {seen!r}, though "
                   f"only {due!r} comes before a stop string.")
            if ended:
                break
            needed = not held or any(stop.startswith(held) for stop in stops)
            expect(needed, f"{held!r} begins none of {stops}: show it.")
        expect_equal(seen + ("" if ended else held), due, f"{text!r} in pieces, with the stop strings {stops}:")


STREAM = (": welcome\r\nevent: chunk\r\ndata: {\"a\": 1}\r\n\r\ndata:né 日本\n\nid: 7\n\ndata: one\ndata:  two\ndata:\n\n"
          "data: a data: b\n\ndata: [DONE]\n\ndata: after\n\n").encode()
DATA = ['{"a": 1}', "né 日本", "one\n two\n", "a data: b"]


@exercise(difficulty=3, importance=4, minutes=25, hints=[
    "Keep the bytes after the last line break for the next chunk, and decode whole lines only.",
    "Collect the data lines of an event in a list; the empty line gives it out, if it holds any, and begins another.",
    "line[5:].removeprefix(' ') takes off one blank; strip() would take all of them.",
])
def events(answer):
    def read(chunks) -> list[str]:
        got = answer(chunks)
        expect(isinstance(got, Iterator), "Yield the events one by one: a chat shows them as they come.")
        return list(got)

    expect_equal(read([b"data: hi\n\n"]), ["hi"], "One event in one chunk:")
    expect_equal(read([b"data: hi\n\ndata: you\n\n"]), ["hi", "you"], "Two events in one chunk:")
    expect_equal(read([b"data: h", b"i\n", b"\nda", b"ta: you\n\n"]), ["hi", "you"], "A line may be spread over "
                 "chunks: keep what follows the last line break.")
    expect_equal(read([b"data: hi\n\n", b"data: [DONE]\n\n", b"data: more\n\n"]), ["hi"], "[DONE] ends the stream, and "
                 "is no event.")
    expect_equal(read([b"data: hi\r\n\r\n"]), ["hi"], "Lines may end with \\r\\n.")
    expect_equal(read([b"data: a\ndata: b\n\n"]), ["a\nb"], "Data lines of one event belong together.")
    expect_equal(read([b"data:a\n\ndata:  b\n\n"]), ["a", " b"], "One blank after the colon, if there is one, is not "
                 "data; a second is.")
    expect_equal(read([b": hi\n\nevent: x\ndata: a\n\nid: 1\n\n"]), ["a"], "Comments and other fields are skipped.")
    expect_equal(read([b"data: a"]), [], "An event that its empty line has not ended is not complete.")
    for size in (1, 2, 3, 7, 1000):
        chunks = [STREAM[start:start + size] for start in range(0, len(STREAM), size)]
        try:
            got = read(chunks)
        except UnicodeDecodeError:
            raise Wrong("A character may be spread over chunks: decode whole lines, not chunks.") from None
        expect_equal(got, DATA, f"A stream in chunks of {size} bytes:")
    given = []
    stream = answer(given.append(number) or b"data: %d\n\n" % number for number in range(1000))
    expect(next(stream, "") == "0" and len(given) == 1, "Yield an event as soon as it is complete, before the next "
           "chunk is asked for.")


def words(messages: list[dict]) -> int:
    """The tokens of messages, in this check: two more than their words each."""
    return sum(2 + len(message["content"].split()) for message in messages)


def dialogue(*sizes: int, system: int = 0) -> list[dict]:
    """Messages of so many words, by user and assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    talk = [{"role": "system", "content": " ".join(["s"] * system)}] * bool(system)
    for place, (role, size) in enumerate(zip(roles, sizes)):
        talk.append({"role": role, "content": " ".join([f"w{place}"] * size)})
    return talk


@exercise(difficulty=2, importance=4, minutes=15, hints=[
    "Set the system message aside first, and count it with the rest.",
    "rest = rest[2:] leaves out one question and its answer.",
    "Stop at the last message: while len(rest) > 1 and count(system + rest) > budget.",
])
def fit(answer):
    talk, given = dialogue(3, 3, 3, 3, 3), dialogue(3, 3, 3, 3, 3)
    expect_type(answer(given, words, 20), list)
    expect(talk == given, "The list you were given was changed: return another.")
    expect_equal(answer(talk, words, 25), talk, "All five messages are 25 tokens, and 25 fit: nothing is left out.")
    got = answer(talk, words, 24)
    expect(got != talk[1:], "A question without its answer is no exchange: leave out both, or an answer comes first.")
    expect_equal(got, talk[2:], "One token too many: the oldest question goes, with its answer.")
    expect_equal(answer(talk, words, 6), talk[4:], "For 6 tokens only the last message is left.")
    expect_equal(answer(talk, words, 1), talk[4:], "The last message stays, even if too long: it is to be answered.")
    talk = dialogue(3, 3, 3, system=4)
    expect_equal(answer(talk, words, 21), talk, "With its system message this is 21 tokens, and 21 fit.")
    expect_equal(answer(talk, words, 20), [talk[0], talk[3]], "The system message stays, and counts: leave out the "
                 "oldest exchange after it.")
    dice = random.Random(3)
    for _ in range(200):
        talk = dialogue(*(dice.randint(1, 9) for _ in range(dice.choice((1, 3, 5, 9)))), system=dice.choice((0, 3)))
        first, budget = len(talk) % 2 == 0, dice.randint(1, 70)
        endings = [talk[:first] + talk[start:] for start in range(first, len(talk), 2)]
        due = next((ending for ending in endings if words(ending) <= budget), endings[-1])
        expect_equal(answer(talk, words, budget), due, f"{len(talk)} messages of {words(talk)} tokens; {budget} fit:")


@exercise(difficulty=1, importance=3, minutes=10, hints=[
    "for line in range(0, 80, 4): print(line, simulate(line))",
    "Whoever joins a full line waits until all before him have begun. At which rate do they begin?",
])
def longest_line(answer):
    expect_type(answer, int)
    expect(answer % 4 == 0, "Try lines of 0, 4, 8, 12, …")
    expect(answer > 28, "It may be longer: with this line 99 % wait well under 10 seconds.")
    expect(answer < 44, "It is too long: four of those in line begin each second, so the last waits line / 4 seconds.")
    expect(answer == 36, "Near: run simulate on the lines around it, and look at the second number.")
