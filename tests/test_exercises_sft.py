"""The exercises of lesson 09: our solutions pass, and wrong answers are told what is wrong with them."""

import pytest
import torch

from nanochat_lib.course.checks import sft as check
from nanochat_lib.course.grading import solutions_of


@pytest.fixture(scope="module")
def solutions():
    return solutions_of("09_sft")


@pytest.mark.parametrize("name", ["learned_mask", "inputs_and_targets", "choose_letter", "pack"])
def test_solutions_pass(solutions, name, base_dir):
    verdict = getattr(check, name)(solutions[name])
    assert verdict.passed, verdict


def test_the_measured_answer_passes(solutions, base_dir):
    assert check.padding_share(solutions["answer"]).passed, check.padding_share(solutions["answer"])
    assert check.padding_share(None).state == "not done yet"


def mask_of(start=0, end=1, output=0, python=1, turns=True):
    """A learner's mask with one thing wrong."""
    def answer(tokenizer, ids):
        names, mask, speaking, tool = {v: k for k, v in tokenizer.specials.items()}, [], False, False
        for token in ids:
            name = names.get(token, "")
            if name == "<|assistant_start|>":
                speaking = True
                mask.append(start)
            elif name == "<|assistant_end|>":
                mask.append(end)
                speaking = not turns
            elif "output" in name:
                tool = name == "<|output_start|>"
                mask.append(output)
            elif "python" in name:
                mask.append(python)
            else:
                mask.append(int(speaking and (output or not tool)))
        return mask
    return answer


@pytest.mark.parametrize("answer, sentence", [
    (mask_of(start=1), "<|assistant_start|> is learned"),
    (mask_of(end=0), "would never stop"),
    (mask_of(output=1), "the tool writes it"),
    (mask_of(python=0), "never call the calculator"),
    (mask_of(turns=False), "The assistant's turn ends"),
    (lambda tokenizer, ids: [1], "one for each"),
])
def test_wrong_masks(answer, sentence, base_dir):
    if sentence == "The assistant's turn ends":
        sentence = "should be only read"  # the marker before the second message is the first to be wrong
    assert sentence in check.learned_mask(answer).sentence


def row_of(shift=True, shift_mask=True, ignored=-1, pad_learned=False, cut=True):
    def answer(ids, mask, seq_len, padding):
        size = seq_len + 1 if cut else max(seq_len + 1, len(ids))
        left = size - len(ids)
        ids, mask = torch.tensor(ids[:size] + [padding] * left), torch.tensor(mask[:size] + [int(pad_learned)] * left)
        targets = ids[1:] if shift else ids[:-1]
        learned = mask[1:] if shift and shift_mask else mask[:-1]
        return ids[:-1], torch.where(learned == 1, targets, ignored)
    return answer


@pytest.mark.parametrize("answer, sentence", [
    (row_of(shift=False), "not shifted"),
    (row_of(shift_mask=False), "shift it too"),
    (row_of(pad_learned=True), "Padding is a target"),
    (row_of(ignored=0), "the target -1"),
    (row_of(cut=False), "cut to seq_len + 1"),
])
def test_wrong_rows(answer, sentence, base_dir):
    assert sentence in check.inputs_and_targets(answer).sentence


@pytest.mark.parametrize("answer, sentence", [
    (lambda logits, lengths, letters: logits[torch.arange(len(logits)), lengths - 1].argmax(-1), "Only the letters"),
    (lambda logits, lengths, letters: letters[logits[torch.arange(len(logits)), lengths - 1][:, letters].argmax(-1)],
     "Return the place"),
    (lambda logits, lengths, letters: logits[:, -1, letters].argmax(-1), "the padding's end"),
    (lambda logits, lengths, letters: logits[torch.arange(len(logits)), lengths.clamp(max=logits.size(1) - 1)]
     [:, letters].argmax(-1), "lengths - 1"),
])
def test_wrong_letters(answer, sentence, base_dir):
    assert sentence in check.choose_letter(answer).sentence


def packing(choose=max, latest=False, refill=True, drop_last=False):
    """A learner's packing with one thing wrong."""
    def answer(lengths, capacity, waiting):
        rows, buffer, rest, room = [], [], list(range(len(lengths))), 0
        while buffer or rest:
            if refill or not any(lengths[place] <= room for place in buffer):
                buffer, rest = buffer + rest[:waiting - len(buffer)], rest[waiting - len(buffer):]
            fitting = [place for place in buffer if lengths[place] <= room]
            if not fitting:
                rows, room = [*rows, []], capacity
                continue
            best = choose(fitting[::-1] if latest else fitting, key=lambda place: lengths[place])
            buffer.remove(best)
            rows[-1].append(best)
            room -= lengths[best]
        return rows[:-1] if drop_last else rows
    return answer


@pytest.mark.parametrize("answer, sentence", [
    (packing(choose=lambda fitting, key: fitting[0]), "the longest that fits goes first"),
    (packing(choose=min), "the longest that fits"),
    (packing(latest=True), "came first"),
    (packing(refill=False), "joins those that wait"),
    (packing(drop_last=True), "the last row included"),
    (lambda lengths, capacity, waiting: [list(range(len(lengths)))], "first 6"),
])
def test_wrong_packing(answer, sentence, base_dir):
    assert sentence in check.pack(answer).sentence


@pytest.mark.parametrize("answer, sentence", [
    ({1: 0.1}, "Give two numbers"),
    ({1: 0.01, 100: 0.2}, "leaves less padding"),
    ({1: 0.5, 100: 0.001}, "With a buffer of 1"),
    ({1: 30.0, 100: 2.0}, "between 0 and 1"),
])
def test_wrong_measurements(answer, sentence, base_dir):
    assert sentence in check.padding_share(answer).sentence
