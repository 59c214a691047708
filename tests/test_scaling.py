"""Lesson 07: the depth dial and the schedules, with numbers worked out by hand."""

import math

import pytest

from nanochat_lib.common import NanochatError
from nanochat_lib.scaling import (learning_rate_multiplier, model_config, muon_momentum, optimal_batch_size, recipe,
                                  warmup_of, weight_decay_at)

# by hand: 12 · 768² a layer and 6 heads × 12 value-gate channels on every other layer; lm_head 32,768 × 768
N12 = 12 * 12 * 768**2 + 6 * 6 * 12 + 32768 * 768
N24 = 24 * 12 * 1536**2 + 12 * 12 * 12 + 32768 * 1536


def test_d12_is_the_reference():
    dial = recipe(12)
    assert (dial.config.n_embd, dial.config.n_head, dial.config.n_kv_head, dial.config.sequence_len) == (768, 6, 6, 2048)
    assert dial.scaling_params == N12 == 110_100_912
    assert dial.target_tokens == 12 * N12
    assert dial.total_batch_size == 2**19 and dial.learning_rate_scale == 1 and dial.weight_decay == pytest.approx(0.28)
    assert dial.steps == 12 * N12 // 2**19 == 2520
    matrices = N12 + 24  # and smear_gate
    assert dial.flops_per_token == 6 * matrices + 12 * 768 * (9 * 512 + 3 * 2048)


def test_d24_by_hand():
    dial = recipe(24)
    assert dial.scaling_params == N24 == 729_810_624
    # (N24 / N12)^0.383 = 2.063, so 2^20 is the nearest power of two
    assert dial.total_batch_size == 2**20
    assert dial.learning_rate_scale == pytest.approx(math.sqrt(2))
    assert dial.weight_decay == pytest.approx(0.28 * math.sqrt(2) * N12 / N24) == pytest.approx(0.05974, rel=1e-3)
    assert dial.steps == 12 * N24 // 2**20
    assert dial.tokens == dial.steps * 2**20
    assert recipe(24, target_param_data_ratio=8).steps == 8 * N24 // 2**20 == 5568


@pytest.mark.parametrize("depth, width, heads", [(1, 128, 1), (4, 256, 2), (5, 384, 3), (20, 1280, 10)])
def test_width_is_rounded_up_to_whole_heads(depth, width, heads):
    config = model_config(depth)
    assert (config.n_embd, config.n_head, config.n_layer) == (width, heads, depth)


def test_what_is_given_overrules():
    assert recipe(12, num_iterations=7, target_flops=1e18).steps == 7
    dial = recipe(12, target_flops=1e18)
    assert dial.steps == round(1e18 / (dial.flops_per_token * 2**19))
    small = recipe(12, total_batch_size=2**17)
    assert small.total_batch_size == 2**17 and small.learning_rate_scale == 0.5
    assert small.weight_decay == pytest.approx(0.14) and small.steps == 12 * N12 // 2**17


def test_batch_size_is_a_power_of_two_that_grows_slowly():
    assert optimal_batch_size(1, 1) == 2**19
    assert optimal_batch_size(8, 1) == 2**20 and optimal_batch_size(1 / 8, 1) == 2**18
    assert optimal_batch_size(2, 1) == 2**19  # 2^0.383 is nearer to 1 than to 2


@pytest.mark.parametrize("bad, word", [
    (dict(depth=0), "depth"), (dict(depth=2, window_pattern="SX"), "SX"), (dict(depth=2, head_dim=0), "head-dim"),
    (dict(depth=1, num_iterations=0), "steps"), (dict(depth=1, target_param_data_ratio=0), "ratio")])
def test_impossible_settings_are_named(bad, word):
    with pytest.raises(NanochatError, match=word):
        recipe(**bad)


def test_learning_rate_goes_up_stays_and_comes_down():
    rates = [learning_rate_multiplier(step, 1000) for step in range(1000)]
    assert rates[0] == 1 / 40 and rates[39] == rates[40] == rates[350] == 1
    assert rates[675] == pytest.approx(0.5 + 0.5 * 0.05)  # half of the warm-down
    assert rates[999] == pytest.approx(1 / 650 + 649 / 650 * 0.05)
    assert learning_rate_multiplier(3, 10, 0, 0.0) == 1


def test_warm_up_is_never_longer_than_a_tenth_of_the_run():
    assert [warmup_of(steps) for steps in (5, 20, 399, 400, 5000)] == [0, 2, 39, 40, 40]
    assert max(learning_rate_multiplier(step, 20, warmup_of(20)) for step in range(20)) == 1


def test_momentum_and_weight_decay():
    assert muon_momentum(0, 2000) == 0.85
    assert muon_momentum(200, 2000) == pytest.approx(0.91)
    assert muon_momentum(400, 2000) == muon_momentum(700, 2000) == pytest.approx(0.97)
    assert muon_momentum(2000, 2000) == pytest.approx(0.90)
    assert all(0.85 <= muon_momentum(step, 100) <= 0.97 for step in range(100))
    assert [weight_decay_at(step, 100) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0], abs=1e-12)


def test_the_recipe_in_words():
    words = recipe(24, target_param_data_ratio=8).describe()
    assert "729,810,624" in words["parameters"] and "5,568 steps of 1,048,576" in words["tokens"]
