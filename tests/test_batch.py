"""The running batch: shared beginnings, fixed memory, who joins when, and that none of it changes a token."""

import collections
import contextlib
import random
import types

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat_lib.attention import reference_attention
from nanochat_lib.common import NanochatError
from nanochat_lib.decoder import Decoder
from nanochat_lib.engine import Engine
from nanochat_lib.graphs import CHOICES, GraphedDecoder
from nanochat_lib.kv_cache import KVCache, cache_bytes
from nanochat_lib.lookback import look_back, runs_of
from nanochat_lib.prefill import chunks
from nanochat_lib.request import Request
from nanochat_lib.sampling import pick
from nanochat_lib.sharing import shared_beginnings
from nanochat_lib.slots import Slots


@pytest.fixture(scope="module")
def engine(make_model, tokenizer):
    return Engine(make_model(seed=4), tokenizer)


def tokens_of(seed, count):
    return np.random.default_rng(seed).integers(0, 300, count).tolist()


def naive(engine, prompt, max_tokens):
    """Greedy tokens by reading the whole prefix again for each."""
    room = engine.model.config.sequence_len + 1 - len(prompt)
    answer = []
    for token in engine.model.generate(prompt, min(room, max_tokens), temperature=0.0):
        if token in engine.stops:
            break
        answer.append(token)
    return answer


def check_greedy(engine, prompts, max_tokens=12, **settings):
    requests = [Request(prompt, max_tokens, temperature=0.0, **settings) for prompt in prompts]
    engine.run(requests)
    for request in requests:
        assert request.completion.tokens == naive(engine, request.prompt, max_tokens), request.prompt
    return requests


# Which prompts share what


def sharing_of(*prompts):
    return list(shared_beginnings(collections.Counter(map(tuple, prompts))).values())


def test_what_is_shared():
    a, b = tokens_of(0, 40), tokens_of(1, 40)
    assert set(sharing_of(a, a, b)) == {0, 40}
    assert sharing_of(a + [1], a + [2], a + [3]) == [40, 40, 40]
    assert sharing_of(a, a + [2]) == [40, 40]
    assert sharing_of(a) == [0] and sharing_of(a[:15], a[:15]) == [0]  # one row, or too short
    assert sharing_of(*[a] * 9, a[:20] + b, ) == [0, 40] or sharing_of(*[a] * 9, a[:20] + b) == [40, 0]  # many keep theirs
    assert sharing_of([], []) == [0]


@pytest.mark.parametrize("seed", range(5))
def test_sharing_never_saves_less_than_identical_prompts_alone(seed):
    dice = random.Random(seed)
    stem = tokens_of(seed, 60)
    prompts = [stem[:dice.randint(1, 60)] + tokens_of(dice.random() > 0.5, dice.randint(0, 20)) for _ in range(30)]
    wanted = collections.Counter(map(tuple, prompts * 2))
    shared, heads = shared_beginnings(wanted), collections.Counter()
    for prompt, length in shared.items():
        assert 0 <= length <= len(prompt) and (length == 0 or length >= 16)
        heads[prompt[:length]] += wanted[prompt]
    saved = sum(len(head) * (n - 1) for head, n in heads.items() if head)
    assert saved >= sum(len(prompt) * (n - 1) for prompt, n in wanted.items() if len(prompt) >= 16)


# Same tokens


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 4}, {"n_kv_head": 1}, {"sequence_len": 256, "window_pattern": "SL"}], ids=str)
@pytest.mark.parametrize("rows", [2, 64])
def test_shared_beginnings_change_no_token(make_model, tokenizer, changes, rows):
    engine = Engine(make_model(seed=5, **changes), tokenizer)
    long = 150 if "sequence_len" in changes else 30  # longer than the window of 128
    stem, other = tokens_of(2, long), tokens_of(3, long - 5)
    prompts = [stem, stem, stem + [7], stem + [7, 8], stem + [9] * 11, other, other + [1], other, tokens_of(4, 5), tokens_of(5, 26)]
    requests = [Request(prompt, 12, temperature=0.0) for prompt in prompts]
    engine.run(requests, rows)
    for request in requests:
        assert request.completion.tokens == naive(engine, request.prompt, 12)
    assert [bool(request.shared) for request in requests] == [True] * 8 + [False] * 2


def test_samples_are_the_same_with_and_without_sharing(engine):
    stem = tokens_of(6, 30)
    wishes = [dict(prompt=stem + [5] * (i % 3), max_tokens=10, temperature=0.9, top_k=40, sample=i) for i in range(9)]
    together, apart = ([Request(**wish, shared=shared) for wish in wishes] for shared in (None, 0))
    engine.run(together)
    engine.run(apart, rows=4)
    for left, right, wish in zip(together, apart, wishes):
        engine.run([alone := Request(**wish)])
        assert left.completion.tokens == right.completion.tokens == alone.completion.tokens
        assert np.allclose(left.completion.logprobs, right.completion.logprobs, atol=1e-4)
    assert together[0].shared and len({tuple(request.completion.tokens) for request in together}) > 3


def test_a_long_beginning_beside_short_rows(make_model, tokenizer):
    engine = Engine(make_model(seed=6, sequence_len=256), tokenizer)
    stem = tokens_of(7, 200)
    requests = check_greedy(engine, [stem, stem, tokens_of(8, 4)], 5)
    assert requests[0].shared == 200


def test_random_comings_and_goings(engine):
    """Arrivals, cancellations, stops and every setting, in random order: each answer is what it is alone."""
    dice, stems = random.Random(3), [tokens_of(9, 20), tokens_of(10, 33)]
    batch, open_, done = engine.batch(5, prefixes=2), [], []
    for step in range(150):
        if dice.random() < 0.35 and step < 90:
            prompt = dice.choice(stems)[:dice.choice([18, 20, 33])] * dice.randint(0, 1) + tokens_of(step, dice.randint(1, 25))
            request = Request(prompt, dice.randint(1, 20), dice.choice([0.0, 0.7, 1.3]), dice.choice([None, 5, 50]),
                              dice.choice([None, 0.8]), seed=step, stop=tuple(tokens_of(step, 2) * dice.randint(0, 1)))
            batch.add(request)
            open_.append(request)
        if open_ and dice.random() < 0.05:
            batch.cancel(dice.choice(open_))
        for request in batch.step():
            open_.remove(request)
            done.append(request)
    assert not open_ and not len(batch) and len(batch.notes.free) == 5 and not any(batch.slots.users) and len(done) > 25
    for request in done:
        alone = Request(request.prompt, request.max_tokens, *request.settings, seed=request.seed, stop=request.stop)
        engine.run([alone])
        answer, expected = request.completion, alone.completion
        if answer.finish_reason == "cancelled":
            assert answer.tokens == expected.tokens[:len(answer.tokens)]
        else:
            assert (answer.tokens, answer.finish_reason, answer.stop_token) == (
                expected.tokens, expected.finish_reason, expected.stop_token)


def test_a_requests_own_stop(engine):
    [[full]] = engine.generate_many([[5, 6, 7]], max_tokens=20, temperature=0.0)
    assert len(full.tokens) > 3
    stop = full.tokens[3]
    request = Request([5, 6, 7], 20, temperature=0.0, stop=(stop, 299))
    engine.run([request, Request([5, 6, 7], 20, temperature=0.0)])
    first = full.tokens.index(stop)
    assert request.completion.tokens == full.tokens[:first] and request.completion.finish_reason == "stop"
    assert request.completion.stop_token == stop


# Memory


def test_rows_stay_within_the_memory(make_model, tokenizer):
    model = make_model(seed=7)
    row = cache_bytes(model.config, 1, 64)
    engine = Engine(model, tokenizer, memory=3 * row)
    batch, requests = engine.batch(16, prefixes=0), [Request(tokens_of(i, 9), 8, temperature=0.0, shared=0) for i in range(7)]
    assert batch.slots.rows == 3 and batch.slots.tails.nbytes == 3 * row
    for request in requests:
        batch.add(request)
    batch.step()
    assert len(batch.running) <= 3 and len(batch.waiting) >= 4  # the others wait
    while batch:
        batch.step()
    assert [request.completion.tokens for request in requests] == [naive(engine, request.prompt, 8) for request in requests]
    shared = engine.batch(16)
    assert shared.slots.tails.nbytes + shared.slots.heads.nbytes <= 3 * row


def test_what_never_fits_is_refused(make_model, tokenizer):
    model = make_model()
    engine = Engine(model, tokenizer, memory=cache_bytes(model.config, 1, 64) - 1)
    with pytest.raises(NanochatError, match="a row of 64 positions takes .* MB of cache, and .* ask for fewer tokens"):
        engine.generate_many([[1]], max_tokens=64)
    batch = Engine(model, tokenizer).batch(2, capacity=10)
    with pytest.raises(NanochatError, match="the prompt has 11 tokens, a row of this batch 10"):
        batch.add(Request([1] * 11))
    batch.add(Request([1] * 10))


def positions(model, count):
    return cache_bytes(model.config, 1, count)


def finish(batch, steps=200):
    """Step until all is done; it must not take more than so many steps."""
    while len(batch):
        batch.step()
        assert (steps := steps - 1), "a batch that never ends"


def test_samples_fit_where_their_shared_beginning_does_not(make_model, tokenizer):
    model = make_model(seed=14, sequence_len=256)
    engine, stem = Engine(model, tokenizer, memory=positions(model, 320)), tokens_of(100, 200)
    requests = [Request(stem, 16, temperature=0.0, sample=number) for number in range(2)]
    batch = engine.batch_of(requests)
    assert (batch.slots.rows, batch.slots.prefixes) == (1, 0) and batch.slots.capacity >= 215
    finish(batch)
    assert [request.completion.tokens for request in requests] == [naive(engine, stem, 16)] * 2
    mixed = [Request(tokens_of(101, 200), 9, temperature=0.0), *(Request(stem[:20], 5, temperature=0.0) for _ in "ab")]
    finish(Engine(model, tokenizer, memory=positions(model, 210)).batch_of(mixed))  # no byte for a beginning
    assert [r.completion.tokens for r in mixed] == [naive(engine, r.prompt, r.max_tokens) for r in mixed]


@pytest.mark.parametrize("places", [dict(prefixes=0), dict(prefixes=2, prefix_capacity=17)], ids=str)
def test_rows_take_a_beginning_that_has_no_place(engine, places):
    batch, stem = engine.batch(4, capacity=40, **places), tokens_of(102, 30)
    requests = [Request(stem + [i], 30, temperature=0.0) for i in range(3)]
    for request in requests:
        batch.add(request)
    finish(batch)
    for request in requests:
        answer = request.completion.tokens
        assert answer == naive(engine, request.prompt, 30)[:len(answer)]
        assert request.completion.finish_reason == "stop" or len(answer) >= 10


def test_a_batch_in_which_nothing_can_run_says_so(engine):
    batch = engine.batch(2, capacity=16, prefixes=0)
    batch.add(Request(tokens_of(103, 30), 5, shared=30))  # planned for another batch
    with pytest.raises(NanochatError, match="shares 30 tokens of its prompt, and this batch has no place"):
        batch.step()


def test_a_full_row_ends_its_answer(engine):
    """A row may be shorter than the context: its answer is then as long as was allowed."""
    engine.notable[:], before = False, engine.notable.copy()
    try:
        batch = engine.batch(2, capacity=20)
        cut, whole, full = Request([5] * 10, 30), Request([6] * 10, 11), Request([7] * 60, 11)
        for request in (cut, whole):
            batch.add(request)
        finish(batch)
        engine.run([full])
    finally:
        engine.notable[:] = before
    ends = [(len(request.completion.tokens), request.completion.finish_reason) for request in (cut, whole, full)]
    assert ends == [(11, "length"), (11, "length"), (5, "context")]


def test_a_prefill_counts_the_beginnings_it_copies(make_model, tokenizer, monkeypatch):
    model = make_model(seed=15, sequence_len=512)
    engine, made, stem = Engine(model, tokenizer, memory=positions(model, 8000)), [], tokens_of(104, 300)

    def cache(config, rows, capacity):
        made.append(rows * capacity)
        return KVCache(config, rows, capacity)

    monkeypatch.setattr("nanochat_lib.prefill.KVCache", cache)
    requests = [Request(stem + [i % 250, i // 250], 1, temperature=0.0) for i in range(200)]
    engine.run(requests)
    assert max(made) <= 8192 and requests[0].shared == 300
    for request in requests[::67]:
        engine.run([alone := Request(request.prompt, 1, temperature=0.0)])
        assert alone.completion.tokens == request.completion.tokens


def test_beginnings_are_kept_once_and_until_their_place_is_needed(engine):
    stems = [tokens_of(20 + i, 20) for i in range(3)]
    batch = engine.batch(4, prefixes=2)

    def ask(*prompts):
        requests = [Request(prompt, 3, temperature=0.0) for prompt in prompts]
        for request in requests:
            batch.add(request)
        while batch:
            batch.step()
        assert [r.completion.tokens for r in requests] == [naive(engine, r.prompt, 3) for r in requests]
        return [request.shared for request in requests]

    assert ask(stems[0] + [1], stems[0] + [2]) == [20, 20]
    assert ask(stems[0] + [3]) == [20]  # alone, but the beginning is there
    assert ask(stems[1], stems[1], stems[1]) == [20] * 3
    assert list(batch.slots.known) == [tuple(stems[0]), tuple(stems[1])]
    ask(stems[0] + [4])
    assert ask(stems[2], stems[2]) == [20, 20]  # takes the place of the one used least recently
    assert list(batch.slots.known) == [tuple(stems[0]), tuple(stems[2])] and batch.slots.users == [0, 0]


def test_sixteen_samples_of_sixteen_questions_take_little_memory(engine):
    requests = [Request(tokens_of(30 + i, 40), 16, sample=number) for i in range(16) for number in range(16)]
    slots = engine.batch_of(requests).slots
    taken = slots.tails.nbytes + slots.heads.nbytes
    assert slots.prefixes == 16 and slots.rows == 256
    assert slots.capacity < 40 and taken < 0.6 * cache_bytes(engine.model.config, 256, 56)


def test_slots_are_used_again(engine):
    engine.generate_many([[1, 2]], max_tokens=5)
    slots = engine.runner.spare
    engine.generate_many([[3]], max_tokens=4)
    assert engine.runner.spare is slots


# The step itself


def test_parts_of_a_softmax_add_up():
    q, k, v = torch.randn(4, 3, 8), torch.randn(4, 30, 8), torch.randn(4, 30, 8)
    bias = torch.zeros(4, 3, 30).masked_fill(torch.rand(4, 3, 30) < 0.3, -torch.inf)
    total = weight = 0
    for part in (slice(0, 7), slice(7, 8), slice(8, 30)):
        values, sums = look_back(q, k[:, part], v[:, part], bias[..., part])
        total, weight = total + values, weight + sums
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
    assert torch.allclose(total / weight, expected, atol=1e-5)


def test_runs_cover_all_rows():
    for lengths in ([5], [3] * 16 + [90] * 20, list(range(1, 200)), [200] + [1] * 40):
        runs = runs_of(lengths)
        assert [row for rows, _ in runs for row in range(rows.start, rows.stop)] == list(range(len(lengths)))
        assert all(end > max(lengths[rows]) for rows, end in runs)
    assert len(runs_of([3] * 16 + [90] * 16)) == 2 and len(runs_of([9] * 64)) == 1


def test_chunks_hold_all_texts_with_little_padding():
    texts = [((1,) * (1 + (7 * i) % 300), [Request([1], sample=i)]) for i in range(300)]
    parts = list(chunks(texts))
    assert sorted(request.sample for part in parts for _, [request] in part) == list(range(300))
    real, padded = sum(len(text) for text, _ in texts), sum(len(part) * len(part[-1][0]) for part in parts)
    assert padded < 1.3 * real and max(len(part) * len(part[-1][0]) for part in parts) <= 8192


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 4, "window_pattern": "SL", "sequence_len": 256}, {"n_layer": 1}], ids=str)
def test_steps_of_fixed_shape(make_model, tokenizer, changes):
    """What a GPU records: no shape depends on a length, rows beyond the batch run along."""
    engine = Engine(make_model(seed=8, **changes), tokenizer)
    engine.runner.decoder, engine.runner.numpy_step = GraphedDecoder(engine.model, fuse=False, record=False), None
    check_greedy(engine, [tokens_of(40 + i, length) for i, length in enumerate((1, 3, 20, 40, 52))])
    stem = tokens_of(50, 30)
    check_greedy(engine, [stem, stem, stem + [4], tokens_of(51, 9)])
    assert [GraphedDecoder.padded(B, 200) for B in (1, 2, 3, 9, 16, 17, 33, 199)] == [1, 2, 4, 16, 16, 32, 48, 200]


def test_a_steps_addresses_stay(make_model):
    """A graph is bound to addresses: no step makes new ones for what lasts."""
    model = make_model()
    slots, decoder = Slots(model, 4, 32), Decoder(model)
    lasting = [slots.tails, slots.inputs, slots.previous, *(w for layer in decoder.layers for w in layer if w is not None)]
    before = [tensor.data_ptr() for tensor in lasting]
    with torch.inference_mode():
        for n in range(3):
            slots.feed(np.array([1, 2]), np.array([n, n + 4]), np.array([0, 0]))
            decoder(slots, 2)
    decoder.refresh()
    assert [tensor.data_ptr() for tensor in lasting] == before


class Replayed:
    """Stands in for a CUDA graph: what was recorded runs again, and its result lands where it was."""

    def __init__(self, step, slots):
        previous = slots.previous.clone()
        self.step, self.result = step, step().clone()
        slots.previous.copy_(previous)  # recording runs nothing

    def replay(self):
        self.result.copy_(self.step())


def decode_with_prompts(q, k, v, totals, window, shared):
    """What lesson 03's decoding kernel computes, row by row."""
    rows = []
    for row, (total, owner) in enumerate(zip(totals.tolist(), shared[3].tolist())):
        held = int(shared[2][owner])
        keys, values = (torch.cat((prompt[owner, :held] if held else own[row, :0], own[row, :total + 1 - held]))[None]
                        for prompt, own in ((shared[0], k), (shared[1], v)))
        rows.append(reference_attention(q[row:row + 1], keys, values, window, totals[row:row + 1]))
    return torch.cat(rows)


@pytest.fixture
def recording(make_model, tokenizer, monkeypatch):
    """An engine whose steps are recorded; `recorded` of its decoder are all that ever were."""
    engine = Engine(make_model(seed=12), tokenizer)
    engine.runner.decoder, engine.runner.numpy_step = decoder, _ = GraphedDecoder(engine.model, fuse=False), None
    decoder.decoder.look.kernel, decoder.recorded = decode_with_prompts, []

    def capture(self, step):
        self.recorded.append(made := Replayed(step, self.slots))
        return made, made.result

    monkeypatch.setattr(GraphedDecoder, "capture", capture)
    return engine


def test_recorded_steps_follow_the_batch(recording):
    """Rows on shared beginnings come and go, at the same batch size: no step and no choice may be another step's."""
    engine, decoder = recording, recording.runner.decoder
    stem = tokens_of(90, 20)
    prompts = [stem + [5], stem + [6], tokens_of(91, 9), tokens_of(92, 4), tokens_of(93, 12), stem + [7], stem + [8]]
    for rows in (2, 3):
        requests = [Request(prompt, 3 + i % 4, temperature=0.0) for i, prompt in enumerate(prompts)]
        engine.run(requests, rows)
        for request in requests:
            assert request.completion.tokens == naive(engine, request.prompt, request.max_tokens), (rows, request.prompt)
    assert {shared for _, shared in decoder.graphs} == {True, False}, decoder.graphs  # both kinds were recorded


def test_recordings_of_choices_are_let_go(recording):
    """Clients may send any temperature: what was recorded for the last ones is kept."""
    engine, decoder, prompt = recording, recording.runner.decoder, tokens_of(105, 9)

    def ask(temperature):
        [[answer]] = engine.generate_many([prompt], max_tokens=3, temperature=temperature)
        return answer.tokens

    settings = [0.5 + number / 100 for number in range(2 * CHOICES)]
    answers = {}
    for number, temperature in enumerate(settings):
        answers[temperature] = ask(temperature)
        ask(settings[0])  # in use all the time
        assert len(decoder.choices) <= min(CHOICES, number + 1)
    count = len(decoder.recorded)
    assert [ask(t) for t in (settings[0], settings[-1])] == [answers[settings[0]], answers[settings[-1]]]
    assert len(decoder.recorded) == count  # still there
    assert ask(settings[1]) == answers[settings[1]] and len(decoder.recorded) == count + 1  # made anew


def test_the_next_turn_of_a_chat_records_nothing(recording):
    engine, prompt = recording, tokens_of(106, 9)
    settings, recorded = dict(max_tokens=4, temperature=0.7), recording.runner.decoder.recorded
    turns = [lambda: list(engine.stream(prompt, **settings)), lambda: next(engine.stream(prompt, **settings)),
             lambda: list(engine.generate(prompt, **settings)), lambda: next(engine.generate(prompt, **settings)),
             lambda: engine.generate_many([prompt], **settings)]
    turns[0]()
    count = len(recorded)
    assert count > 0
    for turn in turns:
        turn()  # left early or not, it gives its memory back
        assert len(recorded) == count


@pytest.mark.gpu
def test_on_a_gpu_recorded_steps_give_the_naive_tokens(make_model, tokenizer, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    engine = Engine(make_model(seed=13, n_embd=128, n_head=2, n_kv_head=1, sequence_len=128).cuda(), tokenizer)
    stem = tokens_of(94, 40)
    prompts = [stem + [i] for i in range(5)] + [tokens_of(95 + i, 1 + 9 * i) for i in range(9)]
    requests = [Request(prompt, 5 + i % 7, temperature=0.0) for i, prompt in enumerate(prompts)]
    for rows in (1, 4, 14):
        engine.run(requests, rows)
        for request in requests:
            assert request.completion.tokens == naive(engine, request.prompt, request.max_tokens), (rows, request.prompt)
    assert engine.runner.decoder.record and engine.runner.decoder.fused and not capsys.readouterr().err


class Recorder(TorchDispatchMode):
    """Notes what a CUDA graph cannot record: reading a value on the host, a tensor made of host data, a shape that depends on values."""

    FORBIDDEN = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.FORBIDDEN), f"{func} in a recorded step"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [(0.0, None, None), (0.8, 50, None), (1.0, None, 0.9)])
def test_a_step_asks_the_host_for_nothing(make_model, monkeypatch, settings):
    def attention(q, k, v, lengths, window):  # the decoding kernel's part, which reads lengths on the device
        return reference_attention(q, k, v, window, lengths)

    monkeypatch.setattr("nanochat_lib.lookback.cached_attention", attention)
    model = make_model()
    slots, decoder = Slots(model, 4, 32), Decoder(model)
    decoder.static = True
    slots.feed(np.array([1, 2]), np.array([3, 4]), np.array([0, 0]))
    with torch.inference_mode(), Recorder():
        picked = pick(decoder(slots, 4), torch.zeros(4, dtype=torch.int32), *settings)
    assert picked.shape == (2, 4)
    with pytest.raises(AssertionError, match="recorded step"), Recorder():
        torch.tensor([1.0])


def test_a_gpu_that_cannot_record_goes_on_without(make_model, tokenizer, capsys):
    engine = Engine(make_model(seed=11), tokenizer)
    engine.runner.numpy_step = None
    engine.runner.decoder = GraphedDecoder(engine.model, fuse=False)  # no CUDA here: every recording fails
    check_greedy(engine, [tokens_of(80, 9), tokens_of(81, 4)], 4)
    assert capsys.readouterr().err.count("engine: without CUDA graphs: ") == 1
    broken = GraphedDecoder(engine.model, fuse=False, record=False)

    def fails(*arguments):
        raise RuntimeError("no compiler\nhere")

    broken.fused = broken.unsure = True
    broken.decoder.project = fails
    engine.runner.decoder = broken
    check_greedy(engine, [tokens_of(82, 9), tokens_of(83, 4)], 4)
    assert capsys.readouterr().err == "engine: without fused kernels: no compiler\n"


def test_a_gpu_without_a_compiler_samples_all_the_same(make_model, capsys):
    decoder = GraphedDecoder(make_model(seed=12), fuse=False)
    decoder.kernels = types.SimpleNamespace(choose=lambda *arguments: 1 / 0)
    logits, seeds = torch.randn(3, 309), torch.arange(3, dtype=torch.int32)
    for settings in [(0.0, None, None), (1.0, 50, None), (1.0, None, 0.9)]:
        assert torch.equal(decoder.pick(logits, seeds, settings), pick(logits, seeds, *settings))
    assert decoder.kernels is None and capsys.readouterr().err == "engine: without kernels of its own: division by zero\n"


def test_all_of_a_step_runs_on_the_engines_device(make_model, tokenizer, monkeypatch):
    engine, where = Engine(make_model(), tokenizer), []

    @contextlib.contextmanager
    def on_device():
        where.append("engine's")
        yield
        where.pop()

    def watched(function):
        return lambda *arguments: function(*arguments) if where == ["engine's"] else pytest.fail("on another GPU")

    monkeypatch.setattr(engine.runner, "on_device", on_device)
    for name in ("read", "decode", "pick"):
        monkeypatch.setattr(engine.runner, name, watched(getattr(engine.runner, name)))
    engine.run([Request(tokens_of(5, 7), 3), Request(tokens_of(6, 4), 5)])
    assert not where


def test_trained_weights_are_taken_over(make_model, tokenizer):
    engine = Engine(make_model(seed=9), tokenizer)
    prompts = [tokens_of(60, 8), tokens_of(61, 5)]
    before = check_greedy(engine, prompts)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.add_(0.1)
    after = check_greedy(engine, prompts)
    assert before[0].completion.tokens != after[0].completion.tokens


def test_a_prefill_may_continue_beginnings(make_model):
    model = make_model(seed=10)
    ids = torch.tensor([tokens_of(70, 40)])
    slots, cache = Slots(model, 2, 32, 1, 32), KVCache(model.config, 1, 40)
    with torch.inference_mode():
        cache.resize([0], "cpu")
        model(ids, kv_cache=cache)
        slots.claim(tuple(ids[0, :25].tolist()))
        fresh = KVCache(model.config, 1, 25)
        fresh.resize([0], "cpu")
        slots.keep_head(0, fresh, 0, 25, model(ids[:, :25], kv_cache=fresh)[0, -1])
        longer = KVCache(model.config, 1, 40)
        slots.fill(longer, [0], [25])
        longer.resize([25], "cpu")
        assert torch.allclose(model(ids[:, 25:], kv_cache=longer)[0, -1], model(ids)[0, -1], atol=1e-4)
    assert torch.allclose(longer.store, cache.store, atol=1e-5)
