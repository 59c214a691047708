"""Lesson 07: packing against a plain linear search, exact resume, ranks, and real text."""

import json
import random
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat_lib.common import NanochatError
from nanochat_lib.dataloader import BestFit, PackedLoader
from nanochat_lib.dataset import row_groups


def texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Documents of many lengths, each beginning with its own number."""
    rng = random.Random(seed)
    return [f"{seed}:{i} " + "".join(rng.choice("abcdefgh ") for _ in range(rng.randrange(longest))) for i in range(count)]


@pytest.fixture
def shards(tmp_path):
    """shards([[texts of a row group], …] per shard, the last for validation) → folder."""

    def write(*files):
        folder = tmp_path / f"shards{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for number, groups in enumerate(files):
            with pq.ParquetWriter(folder / f"shard_{number:05d}.parquet", pa.schema([("text", pa.string())])) as writer:
                for group in groups:
                    writer.write_table(pa.table({"text": group}))
        return str(folder)

    return write


def linear_rows(documents, length, buffer_size):
    """The reference: rows of `length` tokens by plain search through a list; documents is an iterator of token lists."""
    buffer = []
    while True:
        row = []
        while len(row) < length:
            while len(buffer) < buffer_size:
                buffer.append(next(documents))
            room = length - len(row)
            fitting = [document for document in buffer if len(document) <= room]
            best = max(fitting, key=len) if fitting else min(buffer, key=len)  # the first of equals, like max and min
            for place, document in enumerate(buffer):
                if document is best:
                    del buffer[place]
                    break
            row += best[:room]
        yield row


def endless(tokenizer, groups):
    while True:
        for group in groups:
            yield from (list(ids) for ids in tokenizer.encode(group, prepend=tokenizer.get_bos_token_id()))


@pytest.mark.parametrize("length, buffer_size", [(16, 1), (33, 10), (64, 100), (257, 50)])
def test_rows_equal_those_of_a_linear_search(tokenizer, shards, length, buffer_size):
    groups = [texts(70, 1), texts(3, 2, 400), texts(130, 3)]
    loader = PackedLoader(tokenizer, 3, length - 1, data_dir=shards(groups[:2], groups[2:], [texts(5, 9)]),
                          buffer_size=buffer_size)
    expected = linear_rows(endless(tokenizer, groups), length, buffer_size)
    for _ in range(30):
        inputs, targets = next(loader)
        assert inputs.shape == targets.shape == (3, length - 1) and inputs.dtype == targets.dtype == torch.int64
        for row in range(3):
            tokens = next(expected)
            assert inputs[row].tolist() == tokens[:-1] and targets[row].tolist() == tokens[1:]
            assert inputs[row, 0] == tokenizer.get_bos_token_id()


def taken(loader, batches):
    """Indices (number of the document's own text) of the documents that went into some batches, in order."""
    names = []
    take = loader.buffer.take

    def spy(*args):
        document = take(*args)
        names.append((str(document.unit.path), document.unit.group, document.unit.rows.start, document.index))
        return document

    loader.buffer.take = spy
    for _ in range(batches):
        next(loader)
    return names


def test_no_document_is_lost_or_repeated(tokenizer, shards):
    folder = shards([texts(50, 1), texts(50, 2)], [texts(100, 3)], [texts(5, 9)])
    loader = PackedLoader(tokenizer, 4, 40, data_dir=folder, buffer_size=20)
    seen = []
    while loader.position[0] < 3:
        seen += taken(loader, 1)
        loader.buffer.take = BestFit.take.__get__(loader.buffer)
    waiting = [(str(d.unit.path), d.unit.group, d.unit.rows.start, d.index) for d in loader.buffer]
    counts = Counter(seen + waiting)
    assert len(counts) == 200 and set(counts.values()) <= {3, 4}


def test_resume_goes_on_with_the_next_row(tokenizer, shards):
    folder = shards([texts(50, 1), texts(70, 2)], [texts(100, 3)], [texts(5, 9)])
    make = lambda state=None: PackedLoader(tokenizer, 4, 40, data_dir=folder, buffer_size=30, state=state)  # noqa: E731
    loader = make()
    for batches in (0, 1, 7, 40):
        for _ in range(batches):
            next(loader)
        resumed = make(json.loads(json.dumps(loader.state())))
        for _ in range(12):
            for mine, theirs in zip(next(loader), next(resumed)):
                assert torch.equal(mine, theirs)
        assert loader.state() == resumed.state()


@pytest.mark.parametrize("worlds", [(1, 2, 1), (2, 1, 3), (3, 2, 2), (2, 3, 1), (2, 2, 4)])
def test_every_document_is_read_once_an_epoch_also_when_the_number_of_ranks_changes(tokenizer, shards, monkeypatch, worlds):
    groups = [texts(30, seed) for seed in range(7)]
    folder = shards(groups[:4], groups[4:], [texts(5, 9)])

    def loaders(count, states):
        return [PackedLoader(tokenizer, 2, 40, data_dir=folder, buffer_size=15, rank=rank, world_size=count, state=states)
                for rank in range(count)]

    used, states = [], None
    for count in worlds[:-1]:
        mine = loaders(count, states)
        for loader in mine:
            used += taken(loader, 4)
            loader.buffer.take = BestFit.take.__get__(loader.buffer)
            assert loader.position[0] == 0
            loader.thread.shutdown(cancel_futures=True)  # reads no further ahead
        states = [json.loads(json.dumps(loader.state())) for loader in mine]

    real, rest = PackedLoader._document, []  # what the last ones tokenize: again what waited, and what was left of the epoch

    def note(unit, index, tokens, position):
        if position[0] == 0:
            rest.append((str(unit.path), unit.group, unit.rows.start, index))
        return real(unit, index, tokens, position)

    monkeypatch.setattr(PackedLoader, "_document", staticmethod(note))
    for loader in loaders(worlds[-1], states):
        while loader.position[0] == 0:
            next(loader)
        loader.close()
    everything = {(str(unit.path), unit.group, None, index) for unit in row_groups(folder) for index in range(30)}
    assert len(used) + len(rest) == len(everything) == 210 and set(used) | set(rest) == everything


def test_two_ranks_read_different_documents(tokenizer, shards):
    folder = shards([texts(40, seed) for seed in range(4)], [texts(5, 9)])
    mine, theirs = (set(taken(PackedLoader(tokenizer, 2, 40, data_dir=folder, buffer_size=10, rank=rank, world_size=2), 4))
                    for rank in range(2))
    assert mine and theirs and not mine & theirs


def test_fewer_row_groups_than_ranks(tokenizer, shards):
    folder = shards([texts(60, 1)], [texts(5, 9)])
    seen = [set(taken(PackedLoader(tokenizer, 2, 40, data_dir=folder, buffer_size=10, rank=rank, world_size=3), 2))
            for rank in range(3)]
    assert all(seen) and not seen[0] & seen[1] and not seen[1] & seen[2]
    with pytest.raises(NanochatError, match="2 documents in .* for 3 processes"):  # before any work
        PackedLoader(tokenizer, 2, 40, data_dir=shards([["a", "b"]], [["c"]]), rank=0, world_size=3)


def test_bad_data_is_named(tokenizer, shards, tmp_path):
    with pytest.raises(NanochatError, match="no parquet shards"):
        PackedLoader(tokenizer, 2, 40, data_dir=str(tmp_path))
    with pytest.raises(NanochatError, match="no documents"):
        next(PackedLoader(tokenizer, 2, 40, data_dir=shards([["", ""]], [["c"]])))
    state = PackedLoader(tokenizer, 2, 40, data_dir=shards([texts(60, 1)], [texts(60, 1)], [["c"]]), buffer_size=100)
    next(state)
    with pytest.raises(NanochatError, match="trained on"):
        PackedLoader(tokenizer, 2, 40, data_dir=shards([["a"]], [["c"]]), state=state.state())


def test_best_fit_looks_at_few_documents():
    """The search is not linear: of 1,000 documents in the buffer a handful are asked for their length."""
    asked = []

    class Counted(bytes):
        def __len__(self):
            asked.append(0)
            return super().__len__()

    rng, buffer = random.Random(0), BestFit()
    for _ in range(1000):
        buffer.add(Counted(rng.randrange(1, 2000)))
    asked.clear()
    for _ in range(100):
        buffer.take(rng.randrange(1, 2049))
        buffer.add(Counted(rng.randrange(1, 2000)))
    assert len(asked) <= 300


def test_it_is_tokenized_ahead(tokenizer, shards):
    """While the caller computes, the next documents are read and tokenized."""
    loader = PackedLoader(tokenizer, 1, 40, data_dir=shards([texts(2000, 1)], [["c"]]), buffer_size=10)
    next(loader)
    jobs = list(loader.ahead)
    assert len(jobs) == 4 and all(len(job.result(60)) > 0 for job in jobs)
    loader.close()


def test_best_fit_without_cropping():
    buffer = BestFit()
    for document in ("aaaa", "bb", "cc"):
        buffer.add(document)
    assert buffer.take(1, crop=False) is None and len(buffer) == 3
    assert [buffer.take(3), buffer.take(1), buffer.take(9)] == ["bb", "cc", "aaaa"]


def test_real_text(tokenizer, shared_data):
    loader = PackedLoader(tokenizer, 4, 512, data_dir=str(shared_data / "public_domain_text"))
    for _ in range(3):
        next(loader)
    resumed = PackedLoader(tokenizer, 4, 512, data_dir=str(shared_data / "public_domain_text"), state=loader.state())
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(next(loader), next(resumed)))
    assert len(json.dumps(loader.state())) < 100_000
