"""Lesson 02: our BPE against rustbpe and tiktoken, the tokenizer, conversations, and the two commands."""

import json
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
import rustbpe
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_lib import bpe
from nanochat_lib.common import NanochatError
from nanochat_lib.scripts.tok_train import crop_texts
from nanochat_lib.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, load_tokenizer
from nanochat_lib.world_facts import World
from nanochat_lib.world_text import documents

TRICKY = ["", " ", "\n", "a" * 300, "it's   WE'LL \t\r\n\r\n x", "1234567 1,000.50", "éàü 漢字かな 🙂👩‍👩‍👧 ﷽",
          "\x00\x7f\u2028", "<|bos|><|assistant_end|>", "def f(x):\n    return x  # ok\n\n\n"]


@pytest.fixture(scope="module")
def world_texts():
    return list(documents(World(1), 3000))


def rust_tokens(texts, size):
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), size, pattern=SPLIT_PATTERN)
    return [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]


def tiktoken_of(tokens):
    return tiktoken.Encoding("test", pat_str=SPLIT_PATTERN, special_tokens={},
                             mergeable_ranks={token: rank for rank, token in enumerate(tokens)})


# --- byte pair encoding -------------------------------------------------------------------------------------------

def test_merges_equal_rustbpe_on_the_world_to_its_last_merge(world_texts):
    merges = bpe.train(bpe.count_words(world_texts, SPLIT_PATTERN), 10_000)
    tokens = bpe.tokens_of(merges)
    assert 1000 < len(tokens) < 10_256
    assert tokens == rust_tokens(world_texts, 10_256)
    assert len(set(tokens)) == len(tokens)


def test_merges_equal_rustbpe_on_real_text(shared_data):
    texts = pq.read_table(shared_data / "public_domain_text" / "shard_00000.parquet")["text"].to_pylist()[:60]
    assert bpe.tokens_of(bpe.train(bpe.count_words(texts, SPLIT_PATTERN), 2000)) == rust_tokens(texts, 2256)


def test_encodings_equal_tiktoken(world_texts):
    merges = bpe.train(bpe.count_words(world_texts, SPLIT_PATTERN), 1200)
    theirs = tiktoken_of(bpe.tokens_of(merges))
    for text in [*world_texts[:100], *TRICKY]:
        assert bpe.encode(text, merges, SPLIT_PATTERN) == theirs.encode_ordinary(text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="aab bc1.\né", max_size=30), min_size=1, max_size=8))
def test_any_text_trains_alike_three_ways_and_encodes_alike(texts):
    words = bpe.count_words(texts, SPLIT_PATTERN)
    merges = bpe.train(words, 40)
    assert merges == bpe.train_simple(words, 40)
    assert bpe.tokens_of(merges) == rust_tokens(texts, 296)
    for text in texts:
        assert bpe.encode(text, merges, SPLIT_PATTERN) == tiktoken_of(bpe.tokens_of(merges)).encode_ordinary(text)


def test_ties_go_to_the_smaller_pair():
    words = bpe.count_words(["ba", "dc", "ab"], SPLIT_PATTERN)
    assert bpe.train(words, 3) == bpe.train_simple(words, 3) == [(97, 98), (98, 97), (100, 99)]


def test_merge_goes_from_the_left_and_does_not_overlap():
    assert bpe.merge([1, 1, 1, 2, 1, 1], (1, 1), 9) == [9, 1, 2, 9]
    assert bpe.merge([], (1, 1), 9) == []


# --- the pattern --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, pieces", [
    ("12345", ["12", "34", "5"]),                           # digits by two
    ("it's We'LL", ["it", "'s", " We", "'LL"]),
    ("a \n\n b", ["a", " \n\n", " b"]),                     # blanks that end in line breaks
    ("end.\n\nNext", ["end", ".\n\n", "Next"]),             # but punctuation takes those after it
    ("a   b", ["a", "  ", " b"]),
    ("$x", ["$x"]),                                         # one sign may lead a word
    (" +=", [" +="]),
    ("x  ", ["x", "  "]),
])
def test_pattern_cuts(text, pieces):
    assert regex.findall(SPLIT_PATTERN, text) == pieces


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_pattern_loses_nothing(text):
    assert "".join(regex.findall(SPLIT_PATTERN, text)) == text


# --- the tokenizer ------------------------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_text_survives_and_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_specials_follow_the_merges_in_the_order_of_the_specification(tokenizer):
    names = ("bos user_start user_end assistant_start assistant_end python_start python_end output_start "
             "output_end").split()
    assert [tokenizer.encode_special(f"<|{name}|>") for name in names] == list(range(300, 309))
    assert tokenizer.get_vocab_size() == 309 and tokenizer.get_bos_token_id() == 300
    assert tokenizer.token_bytes().shape == (309,) and not tokenizer.token_bytes()[300:].any()
    assert tokenizer.token_bytes()[:300].min() == 1
    assert tokenizer.id_to_token(300) == "<|bos|>"
    with pytest.raises(NanochatError, match="<|nobody|>.*<|bos|>"):
        tokenizer.encode_special("<|nobody|>")


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_a_special_typed_by_a_user_stays_text(tokenizer, name):
    text = f"Hello {name} there{name}"
    assert max(tokenizer.encode(text)) < 300 and tokenizer.decode(tokenizer.encode(text)) == text
    conversation = {"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": name}]}
    ids, _ = tokenizer.render_conversation(conversation)
    assert sum(token >= 300 for token in ids) == 5  # bos and the four markers of two turns


def test_lists_and_ends(tokenizer):
    one, two = tokenizer.encode(["ab", "cd"], prepend="<|bos|>", append=7)
    assert one == [300, *tokenizer.encode("ab"), 7] and two == tokenizer.encode("cd", prepend=300, append=7)
    assert tokenizer.encode([]) == []
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"  # half a surrogate pair is no character


def test_ids_of_another_vocabulary_are_refused(tokenizer):
    for ids in ([309], [-1]):
        with pytest.raises(NanochatError, match="vocabulary of 309"):
            tokenizer.decode(ids)


def test_a_vocabulary_that_the_text_cannot_fill_names_what_it_can():
    text = ["one two three two three"] * 5
    with pytest.raises(NanochatError, match=r"fills (\d+) tokens, not 5000") as failure:
        Tokenizer.train_from_iterator(text, 5000)
    reachable = int(regex.search(r"fills (\d+)", str(failure.value))[1])
    assert Tokenizer.train_from_iterator(text, reachable).get_vocab_size() == reachable
    with pytest.raises(NanochatError):
        Tokenizer.train_from_iterator(text, reachable + 1)
    with pytest.raises(NanochatError, match="fills 265"):
        Tokenizer.train_from_iterator([], 300)
    with pytest.raises(NanochatError, match="265"):
        Tokenizer.train_from_iterator(text, 200)
    assert Tokenizer.train_from_iterator([], 265).encode("ab") == [97, 98]


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path, base_dir):
    tokenizer.save(base_dir / "tokenizer")
    assert os.listdir(base_dir / "tokenizer") == ["tokenizer.json"]
    again = load_tokenizer()
    assert again.fingerprint == tokenizer.fingerprint and len(again.fingerprint) == 16
    assert again.encode(TRICKY) == tokenizer.encode(TRICKY)
    other = Tokenizer(tokenizer.tokens[:-1])
    assert other.fingerprint != tokenizer.fingerprint
    assert Tokenizer(tokenizer.tokens, SPLIT_PATTERN.replace("{1,2}", "{1,3}")).fingerprint != tokenizer.fingerprint


def test_missing_or_damaged_files_name_the_command(tokenizer, tmp_path):
    with pytest.raises(NanochatError, match="no tokenizer in .*nowhere: run python -m nanochat_lib.scripts.tok_train"):
        load_tokenizer(tmp_path / "nowhere")
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_text()
    path.write_text(whole[:len(whole) // 2])
    with pytest.raises(NanochatError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    for change in ({"tokens": []}, {"tokens": ["a", "a"]}, {"tokens": ["漢"]}, {"specials": None}, {"pattern": 3}):
        path.write_text(json.dumps({**json.loads(whole), **change}))
        with pytest.raises(NanochatError, match="tokenizer.json.*tok_train"):
            load_tokenizer(tmp_path)


def test_nanochats_pickle_is_read_and_a_hostile_one_is_not(tokenizer, tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer.encoding))
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(NanochatError, match="tokenizer.pkl.*mkdir"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "harm").exists()


# --- conversations ------------------------------------------------------------------------------------------------

TOOLS = [{"type": "text", "text": "It is "}, {"type": "python", "text": "2+2"}, {"type": "python_output", "text": "4"},
         {"type": "text", "text": "4."}]
CHAT = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
                     {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "2+2?"},
                     {"role": "assistant", "content": TOOLS}]}


def test_conversation_token_by_token(tokenizer):
    special, text = tokenizer.encode_special, tokenizer.encode
    wanted = [  # (ids, mask), as the specification says it
        ([special("<|bos|>"), special("<|user_start|>"), *text("Be kind.\n\nHi"), special("<|user_end|>")], 0),
        ([special("<|assistant_start|>")], 0), ([*text("Hello"), special("<|assistant_end|>")], 1),
        ([special("<|user_start|>"), *text("2+2?"), special("<|user_end|>"), special("<|assistant_start|>")], 0),
        (text("It is "), 1), ([special("<|python_start|>"), *text("2+2"), special("<|python_end|>")], 1),
        ([special("<|output_start|>"), *text("4"), special("<|output_end|>")], 0),
        ([*text("4."), special("<|assistant_end|>")], 1),
    ]
    ids, mask = tokenizer.render_conversation(CHAT)
    assert ids == [token for tokens, _ in wanted for token in tokens]
    assert mask == [learn for tokens, learn in wanted for _ in tokens]
    assert tokenizer.render_conversation(CHAT, max_tokens=9) == (ids[:9], mask[:9])
    assert CHAT["messages"][1]["content"] == "Hi"  # the caller's own is left as it was


def test_completion_ends_where_the_assistant_speaks(tokenizer):
    ids, _ = tokenizer.render_conversation(CHAT)
    prompt = tokenizer.render_for_completion(CHAT)
    last = len(ids) - 1 - ids[::-1].index(tokenizer.encode_special("<|assistant_start|>"))
    assert prompt == ids[:last + 1]
    assert tokenizer.render_for_completion({"messages": CHAT["messages"][:-1]}) == prompt
    long = {"messages": [{"role": "user", "content": "word " * 3000}]}
    assert len(tokenizer.render_for_completion(long)) > 3000  # a prompt is never cut behind the caller's back


@pytest.mark.parametrize("messages, said", [
    ([{"role": "assistant", "content": "x"}], "message 0.*'user'"),
    ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "message 1.*'assistant'"),
    ([{"role": "robot", "content": "x"}], "robot"),
    ([{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image", "text": ""}]}], "image"),
    ([{"role": "user", "content": TOOLS}], "is text"),
    ([{"role": "user", "content": 3}], "is text"),
    ([{"role": "user", "content": "x"}, {"role": "assistant", "content": None}], "None"),
])
def test_what_is_no_conversation_is_said(tokenizer, messages, said):
    with pytest.raises(NanochatError, match=said):
        tokenizer.render_conversation({"messages": messages})


# --- the commands -------------------------------------------------------------------------------------------------

@pytest.fixture
def shards(tmp_path, world_texts):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, part in enumerate((world_texts[:1000], world_texts[1000:1200])):
        pq.write_table(pa.table({"text": part}), folder / f"shard_{number:05d}.parquet", row_group_size=100)
    return folder


def test_texts_are_cropped():
    assert list(crop_texts(["abcdef", "gh", "ijkl"], 3, 7)) == ["abc", "gh", "ij"]
    assert list(crop_texts(["abc", "def"], 3, 3)) == ["abc"]


def test_tok_train_and_tok_eval_without_network(base_dir, shards, world_texts, run_module, tmp_path):
    done = run_module("nanochat_lib.scripts.tok_train", f"--data-dir={shards}", "--vocab-size=700")
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer()
    assert tokenizer.tokens == rust_tokens(world_texts[:1000], 691)
    result = json.loads((base_dir / "report" / "result_tok.json").read_text())
    held_out = world_texts[1000:1200]
    ratio = sum(len(text.encode()) for text in held_out) / sum(map(len, tokenizer.encode(held_out)))
    assert result["vocab_size"] == 700 and result["bytes_per_token"] == pytest.approx(ratio)
    assert result["fingerprint"] == tokenizer.fingerprint
    done = run_module("nanochat_lib.scripts.tok_eval", f"--data-dir={shards}",
                      env={"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty")}, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "left out: gpt2, cl100k_base" in done.stdout and "ours (700)" in done.stdout and "validation" in done.stdout
    kinds = json.loads((base_dir / "report" / "result_tok_eval.json").read_text())["bytes_per_token"]
    assert kinds["validation"]["ours (700)"] > kinds["Korean"]["ours (700)"] >= 1


@pytest.mark.parametrize("make, said", [
    (lambda folder: ["--vocab-size=100000"], "fills [0-9]+ tokens, not 100000"),
    (lambda folder: ["--vocab-size=10"], "265"),
    (lambda folder: [path.unlink() for path in folder.iterdir()] and [], "no parquet shards"),
    (lambda folder: (folder / "shard_00000.parquet").write_bytes(b"PAR1 torn") and [], "shard_00000.parquet"),
])
def test_tok_train_fails_in_one_line(base_dir, shards, run_module, make, said):
    done = run_module("nanochat_lib.scripts.tok_train", f"--data-dir={shards}", *make(shards))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert regex.search(f"error: .*{said}", done.stderr), done.stderr
    assert not (base_dir / "tokenizer").exists()


def test_tok_eval_compares_with_what_can_be_had(base_dir, tokenizer, monkeypatch, capsys):
    from nanochat_lib.scripts import tok_eval

    tokenizer.save(base_dir / "tokenizer")
    monkeypatch.setattr(tok_eval, "is_cached", lambda name: name == "gpt2")
    monkeypatch.setattr(tok_eval, "is_online", lambda: False)
    monkeypatch.setattr(tok_eval.tiktoken, "get_encoding", lambda name: tiktoken_of([bytes([i]) for i in range(256)]))
    tok_eval.tok_eval(tok_eval.TokEval())
    said = capsys.readouterr().out
    assert "gpt2 (256)" in said and "left out: cl100k_base" in said and "left out: validation text" in said
