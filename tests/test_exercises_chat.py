"""The exercises of lesson 12: our solutions pass, and wrong answers are told what is wrong with them."""

import pytest

from nanochat_lib.chat import AnswerReader
from nanochat_lib.course.checks import chat as check
from nanochat_lib.course.grading import solutions_of


@pytest.fixture(scope="module")
def solutions():
    return solutions_of("12_chat")


@pytest.mark.parametrize("name", ["hold_back", "events", "fit"])
def test_solutions_pass(solutions, name, base_dir):
    verdict = getattr(check, name)(solutions[name])
    assert verdict.passed, verdict


def test_the_library_passes_too(tokenizer, base_dir):
    def library(text, stops):
        reader = AnswerReader(tokenizer, stops)
        return reader.hold_back(text, everything=False), reader.held, reader.ended

    assert check.hold_back(library).passed


def test_measured_answers(solutions, base_dir):
    assert check.longest_line(solutions["answer"]).passed
    wrong = {12: "may be longer", 64: "too long", 32: "Near", 40: "Near", 35: "0, 4, 8", 9.6: "not a float"}
    for answer, sentence in wrong.items():
        verdict = check.longest_line(answer)
        assert verdict.state == "wrong" and sentence in verdict.sentence, verdict
    assert check.longest_line(None).state == "not done yet"


def held(text, stops, longest=max, sizes=lambda stop: range(1, len(stop)), which=lambda stops: stops):
    """The text's end that begins a stop string, chosen in one wrong way or another."""
    size = longest([size for stop in which(stops) for size in sizes(stop) if text.endswith(stop[:size])], default=0)
    return text[:len(text) - size], text[len(text) - size:], False


def ends_first(wrong):
    """A wrong answer that is right where a whole stop string has come."""
    def answer(text, stops):
        places = [text.find(stop) for stop in stops if stop in text]
        return (text[:min(places)], "", True) if places else wrong(text, stops)

    return answer


def first_of_list(text, stops):
    for stop in stops:
        if stop in text:
            return text[:text.find(stop)], "", True
    return held(text, stops)


def keeps_rest(text, stops):
    places = [text.find(stop) for stop in stops if stop in text]
    return (text[:min(places)], text[min(places):], True) if places else held(text, stops)


@pytest.mark.parametrize("wrong, sentence", [
    (lambda text, stops: text, "Return three things"),
    (held, "what follows is neither"),
    (keeps_rest, "what follows is neither"),
    (ends_first(lambda text, stops: (text, "", False)), "'st' may become"),
    (first_of_list, "not the first of the list"),
    (ends_first(lambda text, stops: held(text, stops, min)), "hold the longest end"),
    (ends_first(lambda text, stops: held(text, stops, which=lambda stops: stops[:1])), "every stop string"),
    (ends_first(lambda text, stops: (text[:-9], text[-9:], False)), "may be shown"),
    (lambda text, stops: ends_first(held)(text, stops) if stops else ("", text, False), "Without stop strings"),
])
def test_wrong_hold_backs(wrong, sentence, base_dir):
    verdict = check.hold_back(wrong)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def reader(whole=True, keep=True, done=True, returns="\r\n", join="\n", blank=lambda text: text.removeprefix(" "),
           only_data=True, at_end=False, decode_late=True):
    """A reader of events with one thing wrong."""
    def events(chunks):
        rest, data = b"" if decode_late else "", []
        for chunk in [b"".join(chunks)] if whole is False else chunks:
            chunk = chunk if decode_late else chunk.decode()
            *lines, last = ((rest if keep else type(rest)()) + chunk).split(b"\n" if decode_late else "\n")
            rest = last
            for line in lines:
                line = line.decode() if decode_late else line
                line = line.removesuffix(returns[0]) if len(returns) > 1 else line
                if line.startswith("data:"):
                    data.append(blank(line[5:]))
                elif line and not only_data:
                    data.append(line)
                elif not line and data:
                    text, data = join.join(data), []
                    if text == "[DONE]" and done:
                        return
                    yield text
        if at_end and rest:
            yield blank(rest.decode()[5:])

    return events


@pytest.mark.parametrize("wrong, sentence", [
    (lambda chunks: ["hi"], "one by one"),
    (reader(keep=False), "keep what follows"),
    (reader(done=False), "[DONE] ends"),
    (reader(returns="\n"), "may end with"),
    (reader(join=""), "belong together"),
    (reader(blank=str.strip), "a second is"),
    (reader(blank=lambda text: text[1:]), "a second is"),
    (reader(only_data=False), "are skipped"),
    (reader(at_end=True), "is not complete"),
    (reader(decode_late=False), "decode whole lines"),
    (reader(whole=False), "as soon as it is complete"),
])
def test_wrong_event_readers(wrong, sentence, base_dir):
    verdict = check.events(wrong)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def forgetting(step=2, system=True, least=1, above=int.__gt__, counted=True, from_end=False, changes=False):
    """An answer that forgets in one wrong way or another."""
    def fit(messages, count, budget):
        first = 1 if messages[0]["role"] == "system" and system else 0
        kept, rest = messages[:first], messages[first:]
        if changes:
            rest = messages
        while len(rest) > least and above(count((kept if counted else []) + rest), budget):
            if changes:
                del rest[:step]
            else:
                rest = rest[:-step] if from_end else rest[step:]
        return kept + rest

    return fit


@pytest.mark.parametrize("wrong, sentence", [
    (forgetting(above=int.__ge__), "nothing is left out"),
    (forgetting(step=1), "leave out both"),
    (forgetting(from_end=True), "the oldest question goes"),
    (forgetting(least=3), "only the last message"),
    (forgetting(least=0), "The last message stays"),
    (forgetting(changes=True), "was changed"),
    (forgetting(system=False), "The system message stays"),
    (forgetting(counted=False), "and counts"),
])
def test_wrong_fits(wrong, sentence, base_dir):
    verdict = check.fit(wrong)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict
