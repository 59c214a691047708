"""The engine against naive generation: same tokens in any batch, tools, stop reasons, streaming."""

import numpy as np
import pytest
import torch

from nanochat_lib.common import NanochatError
from nanochat_lib.batch import Batch
from nanochat_lib.engine import Engine
from nanochat_lib.kv_cache import KVCache, cache_bytes
from nanochat_lib.request import Request
from nanochat_lib.sampling import draw_seeds, sample


@pytest.fixture(scope="module")
def engine(make_model, tokenizer):
    return Engine(make_model(), tokenizer)


def prompts_of(lengths, seed=0):
    dice = np.random.default_rng(seed)
    return [dice.integers(0, 300, length).tolist() for length in lengths]


def naive(engine, prompt, max_tokens):
    """(tokens, finish reason) by reading the whole prefix again for every token."""
    context = engine.model.config.sequence_len
    room, tokens = context + 1 - len(prompt), []
    for token in engine.model.generate(prompt, min(room, max_tokens), temperature=0.0):
        if token in engine.stops:
            return tokens, "stop"
        tokens.append(token)
    return tokens, "length" if len(tokens) == max_tokens else "context"


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 1}, {"n_kv_head": 4, "window_pattern": "L"}, {"n_layer": 1}],
                         ids=str)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_same_tokens_as_recomputing(make_model, tokenizer, changes, rows):
    engine = Engine(make_model(seed=1, **changes), tokenizer)
    prompts = prompts_of([1, 2, 5, 5, 17, 30, 40, 63, 64])
    answers = engine.generate_many(prompts, max_tokens=20, temperature=0.0, rows=rows)
    for prompt, [answer] in zip(prompts, answers):
        assert (answer.tokens, answer.finish_reason) == naive(engine, prompt, 20)


@pytest.mark.parametrize("rows", [1, 4])
def test_same_tokens_where_windows_cut(make_model, tokenizer, rows):
    engine = Engine(make_model(seed=2, sequence_len=256, window_pattern="SL"), tokenizer)
    prompts = prompts_of([1, 120, 140, 250])
    for prompt, [answer] in zip(prompts, engine.generate_many(prompts, max_tokens=24, temperature=0.0, rows=rows)):
        assert (answer.tokens, answer.finish_reason) == naive(engine, prompt, 24)


def test_one_row_sees_weights_that_change(make_model, tokenizer):
    engine = Engine(make_model(seed=3), tokenizer)
    [prompt] = prompts_of([7])
    before = engine.generate_many([prompt], max_tokens=12, temperature=0.0)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.add_(0.1)
    [[after]] = engine.generate_many([prompt], max_tokens=12, temperature=0.0)
    assert (after.tokens, after.finish_reason) == naive(engine, prompt, 12) and [[after]] != before


def test_bfloat16_models_generate(make_model, tokenizer, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    engine = Engine(make_model(), tokenizer)
    [[answer]] = engine.generate_many(prompts_of([5]), max_tokens=6)
    assert engine.runner.numpy_step is None and answer.finish_reason in ("stop", "length")


def tokens_of(answers):
    return [[answer.tokens for answer in samples] for samples in answers]


def test_a_seed_fixes_a_row_in_any_batch(engine):
    prompts = prompts_of([3, 11, 11, 20, 45])
    settings = dict(num_samples=4, max_tokens=12, temperature=0.9, top_k=40, seed=7)
    together = engine.generate_many(prompts, **settings)
    backwards = engine.generate_many(prompts[::-1], **settings, rows=3)[::-1]
    assert tokens_of(backwards) == tokens_of(together)
    for prompt, answers in zip(prompts, together):
        assert tokens_of(engine.generate_many([prompt], **settings)) == tokens_of([answers])
        assert len({tuple(a.tokens) for a in answers}) == 4  # samples differ
    other = engine.generate_many(prompts, **{**settings, "seed": 8})
    assert all(a.tokens != b.tokens for left, right in zip(together, other) for a, b in zip(left, right))


def test_requests_with_different_settings_share_a_batch(engine):
    settings = [dict(temperature=0.0), dict(top_k=5), dict(top_p=0.5), dict(temperature=0.3), dict(seed=1), dict(top_k=5)]
    requests = [Request(prompt, max_tokens=8 + i, **kw) for i, (prompt, kw) in
                enumerate(zip(prompts_of([4, 9, 9, 2, 30, 9]), settings))]
    engine.run(requests)
    for request in requests:
        alone = Request(request.prompt, request.max_tokens, *request.settings, seed=request.seed)
        engine.run([alone])
        assert alone.completion.tokens == request.completion.tokens


def test_logprobs_are_the_models_own(engine):
    [prompt] = prompts_of([9])
    [[answer]] = engine.generate_many([prompt], max_tokens=10, temperature=0.7, top_k=9)
    ids = torch.tensor([prompt + answer.tokens])
    with torch.no_grad():
        logprobs = engine.model(ids)[0, len(prompt) - 1:-1].log_softmax(-1)
    expected = logprobs.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(answer.logprobs), expected, atol=1e-4)


def test_finish_reasons(engine):
    short, full, long = prompts_of([4, 64, 65])
    [[a], [b], [c]] = engine.generate_many([short, full, long], temperature=0.0)
    assert a.finish_reason in ("context", "stop") and (len(a.tokens) == 61 or a.stop_token in engine.stops)
    assert len(b.tokens) + (b.stop_token is not None) == 1  # the last place of the context still yields one token
    assert (c.tokens, c.finish_reason) == ([], "context")
    [[a]] = engine.generate_many([short], max_tokens=0)
    assert (a.tokens, a.finish_reason) == ([], "length")
    assert engine.generate_many([]) == [] and engine.generate_many([short], num_samples=0) == [[]]
    with pytest.raises(NanochatError, match="at least one token"):
        engine.generate_many([[]])
    with pytest.raises(NanochatError, match="out of range"):
        engine.generate_many([short], temperature=-1)
    with pytest.raises(NanochatError, match="max_tokens"):
        engine.generate_many([short], max_tokens=-1)
    with pytest.raises(NanochatError, match="65 tokens, the context 64"):
        list(engine.stream(long))


def test_columns_sequences_and_stream_agree(engine):
    [prompt] = prompts_of([6])
    settings = dict(max_tokens=15, temperature=1.0, top_k=50, seed=3)
    sequences, masks = engine.generate_batch(prompt, num_samples=3, **settings)
    columns = list(engine.generate(prompt, num_samples=3, **settings))
    for number, (sequence, mask) in enumerate(zip(sequences, masks)):
        assert sequence[:6] == prompt and len(mask) == len(sequence) and not any(mask[:6])
        assert [column[number] for column, _ in columns][:len(sequence) - 6] == sequence[6:]
    events = list(engine.stream(prompt, **settings, top=4))
    assert [event.id for event in events if event.id not in engine.stops] == sequences[0][6:]
    assert events[-1].finish_reason and not any(event.finish_reason for event in events[:-1])
    for event in events:
        assert len(event.top) == 4 and event.top[0][1] >= event.top[1][1] > 0
    assert engine.tokenizer.decode([t for t in sequences[0][6:] if t < 300]) == "".join(event.text for event in events)


def test_a_stream_can_be_left(engine):
    stream = engine.stream(prompts_of([6])[0])
    assert next(stream).id >= 0
    stream.close()


def test_a_cancelled_row_leaves_the_batch(engine):
    batch, requests = engine.batch(2), [Request(prompt, seed=5, temperature=0.5) for prompt in prompts_of([3, 4, 5])]
    for request in requests:
        batch.add(request)
    batch.step()
    batch.cancel(requests[0])
    batch.cancel(requests[2])  # still waiting
    assert {id(request) for request in batch.step()} == {id(requests[0]), id(requests[2])}
    assert requests[0].completion.finish_reason == "cancelled" and len(requests[0].completion.tokens) == 1
    while batch:
        batch.step()
    alone = Request(requests[1].prompt, seed=5, temperature=0.5)
    engine.run([alone])
    assert alone.completion.tokens == requests[1].completion.tokens and len(batch.notes.free) == 2


# Tools: an engine whose model says what a script tells it


class ScriptedBatch(Batch):
    """Its model wants script[position] at each position of the sequence."""

    def choose(self):
        tokens, logprobs = super().choose()
        place = self.notes.lengths[self.notes.lines] + self.notes.counts[self.notes.lines] - 1
        return np.array([(self.engine.script + [self.engine.assistant_end] * 99)[p] for p in place]), logprobs


class Scripted(Engine):
    script: list[int] = []

    def batch(self, *settings):
        return ScriptedBatch(self, super().batch(*settings).slots)


def play(engine, tokenizer, *parts, max_tokens=None):
    """The answer of a model that says these parts (text, or names of markers) and of its tools, as text and mask."""
    marks = {"start": engine.python_start, "end": engine.python_end, "out": engine.output_start, "...": None}
    engine.script = [token for part in parts
                     for token in ([marks[part]] if part in marks else tokenizer.encode(part))]
    [[answer]] = engine.generate_many([[tokenizer.get_bos_token_id()]], max_tokens=max_tokens, temperature=0.0)
    return answer


@pytest.fixture(scope="module")
def scripted(make_model, tokenizer):
    return Scripted(make_model(), tokenizer)


def test_a_tool_answers_a_call(scripted, tokenizer):
    result = [scripted.output_start, *tokenizer.encode("56"), scripted.output_end]
    call = [scripted.python_start, *tokenizer.encode("7*8"), scripted.python_end]
    scripted.script = call + [0] * len(result) + tokenizer.encode("ok")
    [[answer]] = scripted.generate_many([[tokenizer.get_bos_token_id()]], temperature=0.0)
    assert answer.tokens == call + result + tokenizer.encode("ok") and answer.finish_reason == "stop"
    assert answer.mask == [1] * len(call) + [0] * len(result) + [1] * len(tokenizer.encode("ok"))
    assert all(logprob == 0 for logprob, mask in zip(answer.logprobs, answer.mask) if not mask)


@pytest.mark.parametrize("parts, said", [
    (("1+", "start", "2", "end"), "2"),
    (("start", "1+", "start", "2+2", "end"), "4"),  # nested: the call begins anew
    (("start", "2", "end", "end"), "2"),
    (("end", "start", "2", "end"), "2"),
    (("start", "nonsense", "end", "a"), None),
    (("start", "end"), None),
    (("start", "1+1"), None),  # never closed
    (("end", "a"), None),
    (("out", "start", "out", "1", "end"), None),
], ids=str)
def test_markers_out_of_order_wedge_nothing(scripted, tokenizer, parts, said):
    answer = play(scripted, tokenizer, *parts)
    assert answer.finish_reason == "stop"
    forced = [token for token, mask in zip(answer.tokens, answer.mask) if not mask]
    assert forced == ([] if said is None else [scripted.output_start, *tokenizer.encode(said), scripted.output_end])


@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_markers_wedges_a_row(scripted, tokenizer, seed):
    dice = np.random.default_rng(seed)
    for _ in range(12):
        parts = dice.choice(["start", "end", "out", "1+1", "a", "'b'.count('b')", "2*"], dice.integers(1, 25)).tolist()
        answer = play(scripted, tokenizer, *parts, max_tokens=int(dice.integers(1, 70)))
        assert answer.finish_reason in ("stop", "length", "context") and len(answer.tokens) == len(answer.mask) <= 64
        assert (answer.finish_reason == "stop") == (answer.stop_token is not None)


def test_budget_and_context_cut_a_tools_answer(scripted, tokenizer):
    answer = play(scripted, tokenizer, "start", "2+2", "end", max_tokens=len(tokenizer.encode("2+2")) + 3)
    assert answer.finish_reason == "length" and answer.mask[-1] == 0 and answer.tokens[-1] == scripted.output_start
    answer = play(scripted, tokenizer, *["a"] * 59, "start", "2", "end")
    assert answer.finish_reason == "context" and answer.mask.count(0) == 2  # of three: one had no room


# Sampling and the cache


def frequencies(logits, **settings):
    rows = 100_000
    seeds = torch.from_numpy(draw_seeds(np.full(rows, 99, np.uint64), np.arange(rows)))
    return sample(logits.expand(rows, -1), seeds, **settings).bincount(minlength=len(logits)) / rows


def test_samples_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.0, -3.0])
    tolerance = dict(atol=0.006, rtol=0)
    assert torch.allclose(frequencies(logits), logits.softmax(0), **tolerance)
    assert torch.allclose(frequencies(logits, temperature=0.5), (2 * logits).softmax(0), **tolerance)
    kept = torch.tensor([True, True, False, False, True, False])
    assert torch.allclose(frequencies(logits, top_k=3), logits.masked_fill(~kept, -torch.inf).softmax(0), **tolerance)
    assert torch.allclose(frequencies(logits, top_p=0.75), logits.masked_fill(~kept, -torch.inf).softmax(0), **tolerance)
    assert frequencies(logits, top_k=1)[0] == frequencies(logits, temperature=1e-30)[0] == 1
    assert torch.allclose(frequencies(logits, top_k=100), logits.softmax(0), **tolerance)
    assert sample(logits[None], torch.zeros(1, dtype=torch.int32), temperature=0.0).item() == 0


def test_draws_of_neighbours_are_independent():
    rows = 100_000
    for keys, counts in ((np.arange(rows, dtype=np.uint64), np.zeros(rows, int)),
                         (np.full(rows, 3, np.uint64), np.arange(rows))):
        token = sample(torch.zeros(1, 8).expand(rows, -1), torch.from_numpy(draw_seeds(keys, counts)))
        pairs = (token[:-1] * 8 + token[1:]).bincount(minlength=64).double()
        assert ((pairs - rows / 64) ** 2 / (rows / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5  # chi-squared, 63 degrees


def test_cache_holds_what_it_says(make_model):
    model = make_model()
    cache = KVCache(model.config, rows=5, capacity=20)
    cache.resize([0] * 5, "cpu")
    with torch.no_grad():
        model(torch.zeros(5, 20, dtype=torch.int64), kv_cache=cache)
        assert cache.store.nbytes == cache_bytes(model.config, 5, 20) and cache.lengths.tolist() == [20] * 5
        with pytest.raises(ValueError, match="20 positions has no place for 21"):
            model(torch.zeros(5, 1, dtype=torch.int64), kv_cache=cache)


def test_characters_appear_whole(engine):
    from nanochat_lib.engine import Speller

    speller, tokens = Speller(engine.tokenizer), engine.tokenizer.encode("né 🙂!")
    pieces = [speller.read(token) for token in tokens]
    assert "".join(pieces) == "né 🙂!" and not any("\ufffd" in piece for piece in pieces)
    euro = engine.tokenizer.encode("€")
    assert len(euro) == 3 and speller.read(euro[0]) == "" and speller.read(euro[1], last=True) == "\ufffd"
    assert speller.read(euro[0]) == "" and speller.read(engine.assistant_end) == "\ufffd"


def test_infer_bench_runs(run_module):
    done = run_module("nanochat_lib.scripts.infer_bench", "--depth=1", "--max-seq-len=64", "--vocab-size=300", "--requests=3",
                      "--questions=2", "--max-new-tokens=8", "--repeats=1", "--device-type=cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("reached") == 3 and "tokens/s batched" in done.stdout
