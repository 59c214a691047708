"""The model against a plain one written from the formulas, in float64 and with loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanochat_lib.common import NanochatError
from nanochat_lib.gpt import GPT, GPTConfig, build_model, window_sizes

LAPTOP = dict(sequence_len=256, vocab_size=1024, n_layer=4, n_head=4, n_kv_head=4, n_embd=128)


def ids_of(rows, length, vocab=309, seed=0):
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain_norm(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def plain_rope(x):
    """x (T, H, D) at positions 0 … T − 1."""
    T, H, D = x.shape
    out = torch.empty_like(x)
    for t in range(T):
        for i in range(D // 2):
            angle = t * 100_000 ** (-2 * i / D)
            a, b = x[t, :, i], x[t, :, i + D // 2]
            out[t, :, i] = a * math.cos(angle) + b * math.sin(angle)
            out[t, :, i + D // 2] = -a * math.sin(angle) + b * math.cos(angle)
    return out


def plain_attention(q, k, v, window):
    """q (T, H, D), k and v (T, KVH, D)."""
    T, H, D = q.shape
    out = torch.zeros_like(q)
    for head in range(H):
        shared = head // (H // k.size(1))
        for t in range(T):
            seen = slice(max(0, t - window), t + 1)
            weights = torch.softmax(k[seen, shared] @ q[t, head] / math.sqrt(D), dim=0)
            out[t, head] = weights @ v[seen, shared]
    return out


def plain_logits(weights, config, ids):
    """Logits (T, vocab) of one row of ids, from a float64 state_dict."""
    T, D, L = len(ids), config.n_embd // config.n_head, config.n_layer
    embedded = plain_norm(weights["transformer.wte.weight"][ids])
    x = embedded.clone()
    for t in range(1, T):
        gate = torch.sigmoid(weights["smear_gate.weight"][0] @ embedded[t, :24])
        x[t] = embedded[t] + weights["smear_lambda"][0] * gate * embedded[t - 1]
    x0 = x
    short = math.ceil(config.sequence_len / 4 / 128) * 128
    for i in range(L):
        layer = {name.removeprefix(f"transformer.h.{i}."): w for name, w in weights.items()}
        full = i == L - 1 or config.window_pattern[i % len(config.window_pattern)] == "L"
        x = weights["resid_lambdas"][i] * x + weights["x0_lambdas"][i] * x0
        y = plain_norm(x)
        q, k, v = ((y @ layer[f"attn.{c}.weight"].T).view(T, -1, D) for c in ("c_q", "c_k", "c_v"))
        if (L - 1 - i) % 2 == 0:
            gate = 3 * torch.sigmoid(y[:, :12] @ layer["attn.ve_gate.weight"].T)
            v = v + gate[:, :, None] * weights[f"value_embeds.{i}.weight"][ids].view(T, -1, D)
        q, k = 1.2 * plain_norm(plain_rope(q)), 1.2 * plain_norm(plain_rope(k))
        y = plain_attention(q, k, v, T if full else short).reshape(T, -1)
        x = x + y @ layer["attn.c_proj.weight"].T
        hidden = (plain_norm(x) @ layer["mlp.c_fc.weight"].T).clamp(min=0) ** 2
        x = x + hidden @ layer["mlp.c_proj.weight"].T
        if i == L // 2:
            halfway = x
    x = plain_norm(x - weights["backout_lambda"][0] * halfway)
    logits = x @ weights["lm_head.weight"][:config.vocab_size].T
    return 15 * torch.tanh(logits / 15)


@pytest.mark.parametrize("changes, length", [
    ({}, 40), ({"n_layer": 1}, 10), ({"n_layer": 2, "n_kv_head": 4}, 12), ({"n_kv_head": 1, "window_pattern": "L"}, 20),
    ({"n_layer": 4, "sequence_len": 200, "window_pattern": "SSSL"}, 160),  # longer than the short window of 128
])
def test_logits_are_those_of_the_plain_model(make_model, changes, length):
    model = make_model(**changes)
    ids = ids_of(1, length)
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    assert torch.allclose(model(ids)[0].double(), plain_logits(weights, model.config, ids[0]), atol=1e-4)


def test_gradients_are_those_of_the_plain_model(make_model):
    model = make_model(n_layer=2)
    ids = ids_of(1, 13)
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    weights = {name: weight.detach().double().requires_grad_() for name, weight in model.named_parameters()}
    plain = F.cross_entropy(plain_logits(weights, model.config, ids[0, :-1]), ids[0, 1:])
    plain.backward()
    assert abs(loss.item() - plain.item()) < 1e-5
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad.double(), weights[name].grad, rtol=1e-3, atol=1e-5), name


def test_names_and_shapes_of_the_state():
    model = build_model(GPTConfig(**{**LAPTOP, "n_kv_head": 2, "vocab_size": 1000}), "cpu")
    expected = {"transformer.wte.weight": (1024, 128), "lm_head.weight": (1024, 128), "smear_gate.weight": (1, 24),
                "resid_lambdas": (4,), "x0_lambdas": (4,), "smear_lambda": (1,), "backout_lambda": (1,),
                "value_embeds.1.weight": (1024, 64), "value_embeds.3.weight": (1024, 64)}
    for i in range(4):
        expected |= {f"transformer.h.{i}.{name}.weight": shape for name, shape in {
            "attn.c_q": (128, 128), "attn.c_k": (64, 128), "attn.c_v": (64, 128), "attn.c_proj": (128, 128),
            "mlp.c_fc": (512, 128), "mlp.c_proj": (128, 512), **({"attn.ve_gate": (2, 12)} if i % 2 else {})}.items()}
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == expected
    assert model(ids_of(2, 5)).shape == (2, 5, 1000)


def test_windows():
    assert window_sizes(GPTConfig()) == [512, 512, 512, 2048] * 3
    assert window_sizes(GPTConfig(sequence_len=2049, n_layer=2)) == [640, 2049]
    assert window_sizes(GPTConfig(n_layer=5, window_pattern="sL")) == [512, 2048, 512, 2048, 2048]
    assert window_sizes(GPTConfig(n_layer=1)) == [2048]


def test_no_token_sees_what_follows(make_model):
    model, ids = make_model(), ids_of(1, 30)
    changed = ids.clone()
    changed[0, 17] = (changed[0, 17] + 1) % 309
    difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert (difference[:17] < 1e-5).all() and difference[17] > 1e-3


def test_a_short_window_ends_sight(make_model):
    """One attending layer of window 128 (the last is silenced): position t sees tokens t − 128 … t, smear one more."""
    model = make_model(n_layer=2, sequence_len=300, window_pattern="S")
    for name in ("attn.c_proj", "mlp.c_proj"):
        model.get_parameter(f"transformer.h.1.{name}.weight").data.zero_()
    ids = ids_of(1, 200)
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 309
    seen = ((model(ids) - model(changed)).abs().amax(-1)[0] > 1e-5).nonzero().flatten()
    assert seen.min() == 20 and seen.max() == 20 + 128 + 1


def test_fresh_weights():
    torch.manual_seed(0)
    model = build_model(GPTConfig(**LAPTOP), "cpu")
    state, width = model.state_dict(), math.sqrt(3) / math.sqrt(128)
    assert state["transformer.wte.weight"].std().item() == pytest.approx(0.8, rel=0.02)
    assert state["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.02)
    for name, weight in state.items():
        if name.endswith("c_proj.weight"):
            assert not weight.any()
        for ends, low, high in (((".c_q.weight", ".c_k.weight", ".c_v.weight"), -width, width),
                                (".c_fc.weight", -0.4 * width, 0.4 * width), ("gate.weight", 0, 0.02)):
            if name.endswith(ends):
                assert low <= weight.min() and weight.max() <= high
                assert weight.numel() < 1000 or weight.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.03)
    assert state["value_embeds.1.weight"].abs().max().item() == pytest.approx(width, rel=0.01)
    assert torch.allclose(state["resid_lambdas"], torch.tensor([1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05]))
    assert torch.allclose(state["x0_lambdas"], torch.tensor([0.20, 0.15, 0.10, 0.05]))
    assert state["smear_lambda"].item() == 0 and state["backout_lambda"].item() == pytest.approx(0.2)
    ids = ids_of(2, 65, 1024)
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(1024), abs=0.01)


def test_counts_and_flops_by_hand():
    model = build_model(GPTConfig(**LAPTOP), "cpu")
    block = 128 * 128 * 4 + 128 * 512 * 2
    counts = model.num_scaling_params()
    assert counts["wte"] == counts["lm_head"] == 1024 * 128 and counts["value_embeds"] == 2 * 1024 * 128
    assert counts["transformer_matrices"] == 4 * block + 2 * 4 * 12
    assert counts["scalars"] == 4 + 4 + 1 + 1 + 24
    assert counts["total"] == sum(p.numel() for p in model.parameters()) == model.num_parameters()
    matrices = counts["transformer_matrices"] + counts["lm_head"] + 24
    assert model.estimate_flops() == 6 * matrices + 12 * 4 * 32 * (128 + 128 + 128 + 256)
    short = GPT(GPTConfig(**{**LAPTOP, "sequence_len": 64}))  # windows of 128 in a context of 64
    assert short.estimate_flops() == 6 * matrices + 12 * 4 * 32 * 4 * 64


class TinyCache:
    """The least that forward needs: a padded list of keys and values."""

    def __init__(self, rows, capacity, config):
        shape = (config.n_layer, rows, capacity, config.n_kv_head, config.n_embd // config.n_head)
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)
        self.lengths, self.counts, self.previous = torch.zeros(rows, dtype=torch.long), None, None

    def insert(self, layer, k, v):
        for row, start in enumerate(self.lengths.tolist()):
            self.k[layer, row, start:start + k.size(1)] = k[row]
            self.v[layer, row, start:start + v.size(1)] = v[row]
        return self.k[layer], self.v[layer]

    def advance(self, T):
        self.lengths = self.lengths + (T if self.counts is None else self.counts)
        self.counts = None


@torch.no_grad()
def test_cached_rows_of_several_lengths_equal_the_whole_forward(make_model):
    model = make_model(sequence_len=300, n_layer=4, window_pattern="SSSL")
    ids, lengths = ids_of(3, 200), torch.tensor([140, 1, 37])
    whole = model(ids)
    cache = TinyCache(3, 260, model.config)
    cache.counts = lengths.clone()
    first = model(ids[:, :150], kv_cache=cache)  # right-padded: what stands behind a row's length is not part of it
    for row, length in enumerate(lengths.tolist()):
        assert torch.allclose(first[row, :length], whole[row, :length], atol=1e-4)
    assert cache.lengths.tolist() == lengths.tolist()
    for step in (1, 1, 5, 1):  # single tokens and a few at once
        new = torch.stack([ids[row, n:n + step] for row, n in enumerate(cache.lengths.tolist())])
        before = cache.lengths.tolist()
        logits = model(new, kv_cache=cache)
        for row, n in enumerate(before):
            assert torch.allclose(logits[row], whole[row, n:n + step], atol=1e-4)
    cache.counts = torch.tensor([2, 0, 1])  # rows that pause keep their place, and what smear needs
    start = cache.lengths.tolist()
    logits = model(torch.stack([ids[row, n:n + 2] for row, n in enumerate(start)]), kv_cache=cache)
    logits = model(torch.stack([ids[row, n:n + 1] for row, n in enumerate(cache.lengths.tolist())]), kv_cache=cache)
    for row, n in enumerate((start[0] + 2, start[1], start[2] + 1)):
        assert torch.allclose(logits[row], whole[row, n:n + 1], atol=1e-4)


@torch.no_grad()
def test_a_row_used_again_forgets_its_last_token(make_model):
    model, ids = make_model(), ids_of(2, 8)
    cache = TinyCache(2, 20, model.config)
    model(ids_of(2, 5, seed=1), kv_cache=cache)
    cache.lengths = torch.zeros(2, dtype=torch.long)
    assert torch.allclose(model(ids, kv_cache=cache), model(ids), atol=1e-4)


def test_losses_and_ignored_targets(make_model):
    model, ids = make_model(), ids_of(2, 13)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, 3:7] = -1
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    expected = expected.view(2, 12)
    losses = model(inputs, targets, loss_reduction="none")
    assert losses.shape == (2, 12) and torch.allclose(losses, expected, atol=1e-5) and not losses[0, 3:7].any()
    assert model(inputs, targets).item() == pytest.approx(expected.sum().item() / 20, abs=1e-5)
    assert model(inputs, targets, loss_reduction="sum").item() == pytest.approx(expected.sum().item(), abs=1e-3)
    with pytest.raises(NanochatError, match="mean, sum or none"):
        model(inputs, targets, loss_reduction="max")
    nothing = model(inputs, torch.full_like(targets, -1))
    nothing.backward()
    assert nothing.item() == 0 and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_weighted_losses_have_the_right_gradient(make_model):
    """Policy gradients weight each token's loss: the fused backward must take a weight per row."""
    model, ids = make_model(), ids_of(2, 13)
    weights = torch.randn(2, 12)
    (model(ids[:, :-1], ids[:, 1:], loss_reduction="none") * weights).sum().backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    losses = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    (losses * weights.flatten()).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(got[name], parameter.grad, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("name, stored", [("bfloat16", torch.bfloat16), ("float16", torch.float32),
                                          ("float32", torch.float32)])
def test_dtypes(monkeypatch, name, stored):
    monkeypatch.setenv("NANOCHAT_DTYPE", name)
    torch.manual_seed(0)
    model = build_model(GPTConfig(**LAPTOP), "cpu")
    assert model.transformer.wte.weight.dtype == model.value_embeds["1"].weight.dtype == stored
    small = {"transformer.wte.weight", "value_embeds.1.weight", "value_embeds.3.weight"}
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n not in small)
    ids = ids_of(2, 33, 1024)
    assert model(ids).dtype == torch.float32 and model.hidden(ids).dtype == getattr(torch, name)
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log(1024), abs=0.02)
    assert all(p.grad.dtype == p.dtype and torch.isfinite(p.grad).all() for p in model.parameters())


def test_bfloat16_is_close_to_float32(make_model, monkeypatch):
    wide, ids = make_model(), ids_of(2, 20)
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    narrow = make_model()
    narrow.load_state_dict(wide.state_dict())
    expected = wide(ids)
    assert (narrow(ids) - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("changes, says", [
    ({"n_embd": 130}, "multiple of 8"), ({"n_embd": 16}, "at least 24"), ({"window_pattern": "SX"}, r"S \(short"),
    ({"window_pattern": ""}, "not a pattern"), ({"n_kv_head": 3}, "choose 1, 2, 4"),
    ({"n_kv_head": 8}, "choose 1, 2, 4"), ({"n_layer": 0}, "at least 1"), ({"vocab_size": -5}, "at least 1"),
])
def test_bad_configs_name_the_allowed_values(changes, says):
    with pytest.raises(NanochatError, match=says):
        GPTConfig(**{**LAPTOP, **changes})


def test_too_many_tokens(make_model):
    with pytest.raises(NanochatError, match="at most 640"):
        make_model()(torch.zeros(1, 641, dtype=torch.long))


def test_generate(make_model):
    model = make_model()
    prompt = [5, 6, 7]
    greedy = list(model.generate(prompt, 6, temperature=0))
    ids = list(prompt)
    for token in greedy:
        assert token == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids.append(token)
    assert greedy == list(model.generate(prompt, 6, top_k=1, seed=7))
    one, again, other = (list(model.generate(prompt, 8, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other
    likeliest = set(model(torch.tensor([prompt]))[0, -1].topk(3).indices.tolist())
    assert {next(model.generate(prompt, 1, top_k=3, temperature=5.0, seed=seed)) for seed in range(20)} <= likeliest
    assert list(model.generate(prompt, 0)) == []
    with pytest.raises(NanochatError, match="at least one token"):
        next(model.generate([], 1))


def test_compiled_formulas_agree(make_model, monkeypatch):
    """What a compiler would trace instead of the gradients by hand."""
    model, ids = make_model(), ids_of(2, 20)
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        model.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append((loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    for name, gradient in results[0][1].items():
        assert torch.allclose(gradient, results[1][1][name], rtol=1e-3, atol=1e-5), name


def test_a_compiler_takes_the_whole_model(make_model):
    model, ids = make_model(n_layer=2), ids_of(2, 20)
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(ids[:, :-1], ids[:, 1:])
    loss.backward()
    compiled = model.lm_head.weight.grad.clone()
    model.zero_grad()
    plain = model(ids[:, :-1], ids[:, 1:])
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    assert torch.allclose(compiled, model.lm_head.weight.grad, atol=1e-5)
