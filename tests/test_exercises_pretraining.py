"""The exercises of lesson 07: our solutions pass, and wrong answers are told what is wrong with them."""

import math

import pytest

from nanochat_lib.course.checks import pretraining as check
from nanochat_lib.course.grading import solutions_of


@pytest.fixture(scope="module")
def solutions():
    return solutions_of("07_pretraining")


@pytest.mark.parametrize("name", ["pack_row", "learning_rate_multiplier", "optimal_batch_size"])
def test_solutions_pass(solutions, name, base_dir):
    verdict = getattr(check, name)(solutions[name])
    assert verdict.passed, verdict


def test_the_measured_answer_passes(solutions, base_dir):
    assert check.lost_to_cropping(solutions["answer"]).passed
    assert check.lost_to_cropping(None).state == "not done yet"


def packer(choose=None, crop=min, pad=False, end=False, rest=False, last=False):
    """A pack_row that is right but for what is named."""
    def pack_row(buffer, length):
        row = []
        while len(row) < length:
            room = length - len(row)
            places = range(len(buffer))[::-1] if last else range(len(buffer))
            fits = [i for i in places if len(buffer[i]) <= room]
            if not fits and pad:
                return row + [0] * room
            size = lambda i: len(buffer[i])  # noqa: E731
            best = (choose or max)(fits, key=size) if fits else crop(places, key=size)
            document = buffer.pop(best)
            row += document[-room:] if end else document[:room]
            if rest and document[room:]:
                buffer.append(document[room:])
        return row
    return pack_row


@pytest.mark.parametrize("answer, sentence", [
    (packer(choose=lambda fits, key: fits[0]), "The first document in the buffer went first"),
    (packer(crop=max), "crop the shortest"),
    (packer(pad=True), "in no document: no padding"),
    (packer(end=True), "from its first token on"),
    (packer(rest=True), "its rest is not read later"),
    (packer(last=True), "the one that came first goes first"),
    (lambda buffer, length: packer()(list(buffer), length), "must leave the buffer"),
])
def test_wrong_rows(answer, sentence, base_dir):
    verdict = check.pack_row(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def schedule(offset=1, floor=False, zero=True):
    def learning_rate_multiplier(step, steps, warmup_steps=40, warmdown_ratio=0.65, final_lr_frac=0.05):
        warmdown = round(warmdown_ratio * steps)
        if step < warmup_steps:
            return (step + offset) / warmup_steps
        if zero and warmdown == 0 or step <= steps - warmdown:
            return 1.0
        left = (steps - step) / warmdown
        return max(left, final_lr_frac) if floor else left + (1 - left) * final_lr_frac
    return learning_rate_multiplier


@pytest.mark.parametrize("answer, sentence", [
    (schedule(offset=0), "is wasted"),
    (schedule(floor=True), "not where it is cut off"),
    (schedule(offset=2), "0.1, 0.2"),
    (lambda step, steps, w=40, r=0.65, f=0.05: schedule()(step, steps - 1, w, r, f), "still at 1"),
])
def test_wrong_schedules(answer, sentence, base_dir):
    verdict = check.learning_rate_multiplier(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


@pytest.mark.parametrize("answer, sentence", [
    (lambda d, r: 2**19 * (d / r) ** 0.383, "Return an int"),
    (lambda d, r: int(2**19 * (d / r) ** 0.383), "not a power of two"),
    (lambda d, r: 2 ** round(19 + math.log2(d / r)), "the exponent is 0.383"),
    (lambda d, r: 2 ** math.ceil(19 + 0.383 * math.log2(d / r)), "do not round up"),
    (lambda d, r: 2 ** math.floor(19 + 0.383 * math.log2(d / r)), "nearer to 2 than to 1"),
])
def test_wrong_batches(answer, sentence, base_dir):
    verdict = check.optimal_batch_size(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


@pytest.mark.parametrize("answer, sentence", [
    ({10: 0.3, 100: 0.1}, "Give a dict"),
    ({10: 0.005, 100: 0.1, 1000: 0.3}, "mixed up"),
    ({10: 0.46, 100: 0.12, 1000: 0.005}, "divide by all tokens that left"),
])
def test_wrong_measurements(answer, sentence, base_dir):
    verdict = check.lost_to_cropping(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def saver(aside=True, meta_last=True, keep=1, clean=True, numbered=True, key=int):
    """A (save, load) that is right but for what is named."""
    def names(disk):
        return [name for name in disk.files() if name.startswith("meta_") and not name.endswith(".part")]

    def save(disk, step, weights, metadata):
        tag = step if numbered else ""
        whole = sorted(names(disk), key=lambda name: key(name[5:] or 0))
        kept = whole[-keep:] if keep else []
        for name in [name for name in whole if name not in kept]:
            disk.remove(name)
            if not clean:
                disk.remove(name.replace("meta", "weights"))
        for name in disk.files() if clean else ():
            if name.endswith(".part") or name.startswith("weights") and f"meta_{name[8:]}" not in kept:
                disk.remove(name)
        parts = [(f"weights_{tag}", weights), (f"meta_{tag}", metadata if numbered else f"{step}:{metadata}")]
        for name, text in parts if meta_last else parts[::-1]:
            if aside:
                disk.write(f"{name}.part", text)
                disk.rename(f"{name}.part", name)
            else:
                disk.write(name, text)

    def load(disk):
        files = disk.files()
        found = sorted(names(disk), key=lambda name: key(name[5:] or 0))
        if not found:
            return None
        tag = found[-1][5:]
        metadata = files[f"meta_{tag}"]
        step, metadata = (int(tag), metadata) if numbered else (int(metadata.split(":")[0]), metadata.split(":")[1])
        return step, files[f"weights_{tag}"], metadata

    return save, load


@pytest.mark.parametrize("answer, sentence", [
    (saver(aside=False), "takes half of the metadata for the whole"),
    (saver(meta_last=False), "load raises KeyError"),
    (saver(keep=0), "load finds nothing: the checkpoint before must stay"),
    (saver(clean=False), "What a killed save left must go"),
    (saver(keep=9), "keep the last two checkpoints"),
    (saver(numbered=False), "parts of two checkpoints are mixed"),
    (saver(key=str), "compare steps as numbers"),
    ((saver()[0], lambda disk: {}), "On an empty disk load returns None"),
])
def test_wrong_savers(answer, sentence, base_dir):
    verdict = check.save_and_load(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def loader(state_of, copy=list, resume=lambda state, documents: (state["read"], list(state["waiting"])), early=False):
    """A `rows` that is right but for its state."""
    def rows(documents, length, size, state=None):
        read, waiting = resume(state, documents) if state else (0, [])
        while True:
            row = []
            while len(row) < length:
                while len(waiting) < size and read < len(documents):
                    waiting.append(read)
                    read += 1
                if not waiting:
                    return
                room = length - len(row)
                fits = [i for i in waiting if len(documents[i]) <= room]
                best = max(fits, key=lambda i: len(documents[i])) if fits else min(waiting, key=lambda i: len(documents[i]))
                waiting.remove(best)
                row += documents[best][:room]
            yield row, state_of(read, copy(waiting), documents)
    return rows


def plain(read, waiting, documents):
    return {"read": read, "waiting": waiting}


@pytest.mark.parametrize("answer, sentence", [
    (loader(lambda read, waiting, _: {"read": read}, resume=lambda state, _: (state["read"], [])), "document 0 is lost"),
    (loader(lambda read, waiting, _: {"read": read, "waiting": waiting}, resume=lambda state, _: (min(state["waiting"]), [])),
     "is read again"),
    (loader(plain, copy=lambda waiting: waiting), "changes after it was given"),
    (loader(lambda read, waiting, _: {"read": read, "waiting": set(waiting)}), "is no JSON"),
    (loader(lambda read, waiting, documents: {"read": read, "waiting": [documents[i] for i in waiting]}), "holds the documents themselves"),
    (loader(lambda read, waiting, _: {"read": read, "waiting": waiting[::-1]}), "in the same order as before"),
    (lambda documents, length, size, state=None: ((document[:length], {}) for document in documents), "exactly `length` tokens"),
    (lambda documents, length, size, state=None: iter(()), "no row at all"),
])
def test_wrong_loaders(answer, sentence, base_dir):
    verdict = check.resumable_rows(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def test_killed_and_resumed_solutions_pass(solutions, base_dir):
    assert check.save_and_load((solutions["save"], solutions["load"])).passed
    assert check.save_and_load(saver()).passed and check.resumable_rows(loader(plain)).passed
    verdict = check.resumable_rows(solutions["rows"])
    assert verdict.passed, verdict

    def unwritten(*arguments):
        raise NotImplementedError

    assert check.save_and_load((unwritten, unwritten)).state == check.resumable_rows(unwritten).state == "not done yet"
