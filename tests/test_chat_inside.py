"""Looking inside (probabilities, attention), and what a conversation looks like: HTML with cards, files to keep."""

import html
import json
import math
import re

import pytest
import torch
from scripted import scripted_model, until

from nanochat_lib import gpt as gpt_module
from nanochat_lib.chat import Answer, ChatModel, ChatSession, Sampling
from nanochat_lib.chat_box import ChatBox
from nanochat_lib.chat_html import bubble, named, token_bubble
from nanochat_lib.common import NanochatError
from nanochat_lib.engine import Engine
from nanochat_lib.inside import attention_maps, looks, without_head
from nanochat_lib.tasks.customjson import CustomJSON
from nanochat_lib.transcript import answered, as_json, as_markdown, save

TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "# 12/4?\n```x"},
        {"role": "assistant", "content": [
            {"type": "text", "text": "It is "}, {"type": "python", "text": "12/4 `a` ``b``"},
            {"type": "python_output", "text": "3"}, {"type": "text", "text": ".\né日"}]}]


@pytest.fixture
def network(make_model):
    return make_model(sequence_len=512)  # windows of 128, so that some keys are out of sight


# --- probabilities and attention ------------------------------------------------------------------------------------

def test_looks_are_the_probabilities_of_the_tokens_that_came(network):
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        for start in (1, 17, 39):
            seen = looks(network, ids, start, top=4)
            assert [look.id for look in seen] == ids[start:]
            for place, look in enumerate(seen, start):
                chances = network(torch.tensor([ids[:place]]))[0, -1].double().softmax(-1)  # by the text before alone
                best = chances.topk(4)
                assert look.probability == pytest.approx(chances[ids[place]].item(), rel=1e-3)
                assert [chance for _, chance in look.top] == pytest.approx(best.values.tolist(), rel=1e-3)
                assert look.top[0][0] == best.indices[0]


def test_looks_agree_with_the_log_probabilities_of_the_engine(network, tokenizer):
    model = ChatModel(Engine(network, tokenizer), tokenizer, "sft", "sft-d3", 512)
    answer = Answer(model, [{"role": "user", "content": "hi"}], Sampling(1.0, max_tokens=30, seed=1))
    _ = list(answer)
    seen = looks(network, answer.prompt + [token.id for _, token in answer.said], len(answer.prompt))
    pairs = [(token, look) for (_, token), look in zip(answer.said, seen) if not token.forced]
    own = [(math.exp(token.logprob), look.probability) for token, look in pairs]
    assert len(own) > 5 and [p for _, p in own] == pytest.approx([p for p, _ in own], rel=2e-3)


def test_attention_maps_are_the_weights_that_the_model_uses(network, monkeypatch):
    """The model's own queries, keys and values, caught on their way into attention; the maps must give its result."""
    ids, caught, real = torch.randint(0, 300, (200,)).tolist(), [], gpt_module.attention

    def listening(q, k, v, window=None, **more):
        y = real(q, k, v, window, **more)
        caught.append((v, y))
        return y

    monkeypatch.setattr(gpt_module, "attention", listening)
    maps = attention_maps(network, ids)
    assert maps.shape == (3, 4, 200, 200) and len(caught) == 3
    assert torch.allclose(maps.sum(-1), torch.ones(3, 4, 200), atol=1e-5) and (maps.triu(1) == 0).all()
    for layer, (v, y) in enumerate(caught):
        values = v[0].repeat_interleave(2, dim=1).float()  # (T, H, D)
        assert torch.allclose(torch.einsum("hts,shd->thd", maps[layer], values), y[0].float(), atol=1e-4)
    assert (maps[0, :, 180, :50] == 0).all() and (maps[2, :, 180, :50] > 0).all(), "short windows, then a full layer"
    assert torch.equal(attention_maps(network, ids, start=150), maps[:, :, 150:])
    assert not network.transformer.h[0].attn._forward_pre_hooks


def test_a_head_taken_out_is_put_back(network):
    ids = list(range(50))
    before, weight = looks(network, ids), network.transformer.h[1].attn.c_proj.weight.clone()
    with without_head(network, 1, 2):
        out, others = network.transformer.h[1].attn.c_proj.weight, [*range(32), *range(48, 64)]
        assert (out[:, 32:48] == 0).all() and torch.equal(out[:, others], weight[:, others])
        assert looks(network, ids) != before
    assert looks(network, ids) == before
    with pytest.raises(ZeroDivisionError), without_head(network, 0, 0):
        raise ZeroDivisionError
    assert looks(network, ids) == before


# --- as HTML --------------------------------------------------------------------------------------------------------

def test_tokens_have_colours_and_cards_and_nothing_is_markup(make_model, tokenizer):
    model = scripted_model(make_model, tokenizer)
    for question, said in (("markup", "<b>bold</b><script>"), ("sum", "So "), ("né日本", "日本")):
        answer = Answer(model, [{"role": "user", "content": question}], Sampling(0, max_tokens=200))
        _ = list(answer)
        seen = looks(model.engine.model, answer.prompt + [token.id for _, token in answer.said], len(answer.prompt))
        page = token_bubble(answer, seen)
        bare = re.sub(r'<style>.*?</style>|<span class="chat-(card|mark)">.*?</span>', "", page, flags=re.S)
        assert said in html.unescape(re.sub(r"<[^>]*>", "", bare)).replace("▪", "")
        assert set(re.findall(r"<(/?\w+)", page)) == {"style", "/style", "div", "/div", "span", "/span"}
        assert page.count('class="chat-card"') == sum(not token.forced for _, token in answer.said)
        assert page.count('class="chat-forced"') == sum(token.forced for _, token in answer.said)
        cards = re.findall(r'<span class="chat-card">(.*?)</span>', page, re.S)
        cards = [html.unescape(card).splitlines() for card in cards]
        assert all(5 <= len(card) <= 6 and sum("▸" in line for line in card) == 1 for card in cards)
    assert [named(tokenizer, tokenizer.encode(text)[0]) for text in ("日", "\n", "\x07")] == ["E6", "⏎", "07"]


def test_box_shows_probabilities_on_demand_of_its_own_answers(base_dir, make_model, tokenizer):
    box = ChatBox(ChatSession(scripted_model(make_model, tokenizer)))
    for text in ("sum", "hello"):
        box.entry.value = text
        box.send()
        box.thread.join(10)
    plain = box.view.value
    assert "chat-card" not in plain
    box.chances.value = True
    assert box.view.value.count("chat-cards") >= 2 and "python_start" in box.view.value
    drawn = dict(box.inside)
    box.regenerate()
    box.thread.join(10)
    assert box.inside[1] is drawn[1] and box.inside[3] is not drawn[3], "only the new answer is looked at anew"
    box.chances.value = False
    assert "chat-card" not in box.view.value and 'class="python"' in box.view.value
    box.session.change_model(box.session.model)
    box.chances.value = True
    assert "chat-card" not in box.view.value, "another model did not say this"


def test_box_saves_and_says_where(base_dir, make_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    box = ChatBox(ChatSession(scripted_model(make_model, tokenizer)))
    box.save()
    assert "nothing to save yet" in box.view.value
    box.entry.value = "sum"
    box.send()
    box.thread.join(10)
    box.save()
    names = sorted(path.name for path in tmp_path.glob("chat-*"))
    assert len(names) == 2 and all(name in box.view.value for name in names) and "chat-error" not in box.view.value

    def full(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr("nanochat_lib.chat_box.save", full)
    box.save()
    assert "the disk is full" in box.view.value


def test_box_sends_all_its_settings(base_dir, make_model, tokenizer):
    session = ChatSession(scripted_model(make_model, tokenizer), Sampling(0.3, 7, 2000, top_p=0.5))
    box = ChatBox(session)
    assert {name: slider.value for name, slider in box.sliders.items()} == {
        "temperature": 0.3, "top_k": 7, "top_p": 0.5, "max_tokens": 2000}
    box.sliders["top_p"].value, box.sliders["max_tokens"].value = 0.9, 3
    box.entry.value = "hello"
    box.send()
    until(lambda: session.messages and not session.busy)
    assert session.sampling == Sampling(0.3, 7, 3, top_p=0.9) and session.answers[1].finish_reason == "length"


def test_bubbles_escape_what_was_said():
    page = bubble("user", '<img src=x onerror="1">') + bubble("assistant", TALK[2]["content"]) + bubble("error", "<b>")
    assert "<img" not in page and "<b>" not in page and 'class="python_output"' in page


# --- as files -------------------------------------------------------------------------------------------------------

def test_what_is_saved_can_be_trained_on(tmp_path, tokenizer):
    open_question = [*TALK, {"role": "user", "content": "and?"}]
    jsonl, markdown = save(open_question, tmp_path, "sft-d4")
    assert jsonl.suffix == ".jsonl" and json.loads(jsonl.read_text())["model"] == "sft-d4"
    task = CustomJSON(jsonl)
    assert len(task) == 1 and task[0]["messages"] == TALK
    ids, mask = tokenizer.render_conversation(task[0])
    assert sum(mask) > 10
    with pytest.raises(NanochatError, match="nothing to save yet"):
        save(open_question[-1:], tmp_path)


def test_an_empty_answer_is_left_out_with_its_question():
    turns = (("user", "a"), ("assistant", []), ("user", "b"), ("assistant", "c"), ("user", "d"))
    messages = [*TALK, *({"role": role, "content": content} for role, content in turns)]
    assert answered(messages) == [*TALK, *messages[5:7]] and answered([]) == []
    assert json.loads(as_json(messages)) == {"messages": answered(messages)}


def test_markdown_quotes_questions_and_fences_code():
    text = as_markdown(TALK, "A talk")
    assert text.startswith("# A talk\n\n**system**\n\n> be brief\n\n**user**\n\n> # 12/4?\n> ```x\n\n**assistant**\n\n")
    assert "It is  ```12/4 `a` ``b`````  `= 3` .\né日" in text
