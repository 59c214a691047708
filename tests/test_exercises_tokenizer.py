"""The exercises of lesson 02: our solutions pass, and wrong answers are told what is wrong with them."""

from collections import Counter

import pytest

from nanochat_lib import bpe
from nanochat_lib.course.checks import tokenizer as check
from nanochat_lib.course.grading import solutions_of
from nanochat_lib.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def solutions():
    return solutions_of("02_tokenizer")


@pytest.mark.parametrize("name", ["train_simple", "render_conversation", "flops_per_byte"])
def test_solutions_pass(solutions, name, base_dir):
    verdict = getattr(check, name)(solutions[name])
    assert verdict.passed, verdict


def test_unwritten_is_not_wrong(base_dir):
    def unwritten(*_):
        raise NotImplementedError

    assert check.train_simple(unwritten).state == "not done yet"


def test_a_bigger_model_affords_a_bigger_vocabulary(solutions):
    assert solutions["answer"][32] < solutions["answer"][128]


def trainer(weigh=True, ties=True, stop=True, overlap=False, fresh=True):
    def train_simple(words, merges):
        chunks, found = {word: list(word) for word in words}, []
        for new in range(256, 256 + merges):
            pairs = Counter()
            for word, ids in chunks.items():
                for pair in zip(ids, ids[1:]):
                    pairs[pair] += words[word] if weigh else 1
            if stop and not pairs:
                break
            best = min(pairs, key=lambda pair: (-pairs[pair], pair)) if ties else max(pairs, key=pairs.get)
            for word, ids in chunks.items():
                if overlap:
                    hits = [place for place, pair in enumerate(zip(ids, ids[1:])) if pair == best]
                    chunks[word] = [new if place in hits else token for place, token in enumerate(ids)
                                    if place - 1 not in hits or place in hits]
                else:
                    chunks[word] = bpe.merge(ids, best, new)
            found.append(best)
        if not fresh:
            words.clear()
        return found
    return train_simple


@pytest.mark.parametrize("answer, sentence", [
    (trainer(weigh=False), "counts five times"),
    (trainer(ties=False), "smaller pair of numbers"),
    (trainer(stop=False), "every word was one token"),
    (trainer(overlap=True), "do not overlap"),
    (trainer(fresh=False), "words were changed"),
    (lambda words, merges: [bytes(pair) for pair in trainer()(words, 1)], "as a tuple in a list"),
    (lambda words, merges: tuple(trainer()(words, merges)), "Return a list"),
])
def test_wrong_train_simple(answer, sentence, base_dir):
    verdict = check.train_simple(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def rendered(change):
    """The library's answer, with ids and mask changed."""
    def render_conversation(tokenizer, conversation):
        ids, mask = tokenizer.render_conversation(conversation)
        return change(tokenizer, list(ids), list(mask))
    return render_conversation


def with_mask(value, *names):
    def change(tokenizer, ids, mask):
        marked = {tokenizer.encode_special(f"<|{name}|>") for name in names}
        return ids, [value if token in marked else learn for token, learn in zip(ids, mask)]
    return rendered(change)


def learns_output(tokenizer, conversation):
    ids, mask = tokenizer.render_conversation(conversation)
    start, end = (tokenizer.encode_special(f"<|output_{side}|>") for side in ("start", "end"))
    if start in ids:
        mask[ids.index(start):ids.index(end) + 1] = [1] * (ids.index(end) + 1 - ids.index(start))
    return ids, mask


def parses_specials(tokenizer, conversation):
    ids, mask = tokenizer.render_conversation(conversation)
    ids = tokenizer.encoding.encode(tokenizer.decode(ids), allowed_special="all")
    return ids, (mask + [0] * len(ids))[:len(ids)]


def loses_the_blank_line(tokenizer, conversation):
    system, *others = conversation["messages"]
    if system["role"] == "system":
        first = {"role": "user", "content": system["content"] + others[0]["content"]}
        conversation = {"messages": [first, *others[1:]]}
    return tokenizer.render_conversation(conversation)


def changes_the_conversation(tokenizer, conversation):
    result = tokenizer.render_conversation(conversation)
    if conversation["messages"][0]["role"] == "system":
        conversation["messages"].pop(0)
    return result


@pytest.mark.parametrize("answer, sentence", [
    (with_mask(1, "assistant_start"), "<|assistant_start|> is given"),
    (with_mask(0, "assistant_end"), "must learn to stop"),
    (with_mask(1, "user_end"), "read, not learned"),
    (with_mask(0, "python_start", "python_end"), "both its markers"),
    (learns_output, "The tool writes its output"),
    (parses_specials, "ordinary text"),
    (loses_the_blank_line, "blank line between"),
    (changes_the_conversation, "conversation was changed"),
    (rendered(lambda tokenizer, ids, mask: (ids[1:], mask[1:])), "begins with <|bos|>"),
    (rendered(lambda tokenizer, ids, mask: (ids, mask[1:])), "entries in the mask"),
])
def test_wrong_render_conversation(answer, sentence, base_dir):
    verdict = check.render_conversation(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def cost(length=lambda text: len(text.encode()), ids=0, invert=False, first=9):
    def flops_per_byte(tokens, size, texts, matrices, width):
        count = sum(map(len, Tokenizer(tokens[:size - first]).encode(texts)))
        ratio = count / sum(map(length, texts))
        return 6 * (matrices + width * (size - ids)) * (1 / ratio if invert else ratio)
    return flops_per_byte


@pytest.mark.parametrize("answer, sentence", [
    (cost(length=len), "not by characters"),
    (cost(ids=9), "specials too"),
    (cost(invert=True), "not the reverse"),
    (cost(first=0), "first 280"),
])
def test_wrong_flops_per_byte(answer, sentence, base_dir):
    verdict = check.flops_per_byte(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict
