"""Lesson 07: the scaling study finds the optimum of losses that are known, and its command runs."""

import math

import numpy as np
import pytest

from nanochat_lib.common import NanochatError, read_json
from nanochat_lib.scripts.scaling_study import ScalingStudy, scaling_study
from nanochat_lib.study import Point, exponent, fit_parabola, small_recipe
from nanochat_lib.world import write_world


def points(budget, sizes, best, curvature=0.3):
    """Points on a parabola in log N with its bottom at `best`; D from 6·N·D = FLOPs."""
    return [Point(budget, depth, size, int(budget / (6 * size)), 1.0 + curvature * math.log(size / best) ** 2)
            for depth, size in enumerate(sizes, 1)]


def test_the_bottom_of_a_parabola_and_the_exponents():
    sizes = [20_000, 80_000, 220_000, 490_000]
    optima = [fit_parabola(points(budget, sizes, 0.07 * budget**0.5)) for budget in (3e11, 1e12, 3e12)]
    for each in optima:
        assert each.params == pytest.approx(0.07 * each.budget**0.5, rel=1e-6)
        assert each.tokens == pytest.approx(each.budget / 6 / each.params, rel=1e-3)
        assert np.polyval(each.coefficients, math.log(each.params)) == pytest.approx(1.0)
    assert exponent(optima, lambda each: each.params) == pytest.approx(0.5)
    assert exponent(optima, lambda each: each.tokens) == pytest.approx(0.5, abs=0.01)


def test_far_from_the_bottom_points_do_not_count():
    """A model far too large for its budget learns nothing at all; the fit is through the sizes round the best one."""
    good = points(1e12, [20_000, 80_000, 220_000], 70_000)
    assert fit_parabola([*good, Point(1e12, 9, 5_000_000, 10, 3.0)]).params == pytest.approx(70_000)


def test_what_cannot_be_fitted_is_named():
    sizes = [20_000, 80_000, 220_000]
    with pytest.raises(NanochatError, match="2 sizes at 1e.12 FLOPs: .*more --depths"):
        fit_parabola(points(1e12, sizes[:2], 40_000))
    with pytest.raises(NanochatError, match="beyond the depths tried: add larger"):
        fit_parabola(points(1e12, sizes, 900_000))
    with pytest.raises(NanochatError, match="beyond the depths tried: add smaller"):
        fit_parabola(points(1e12, sizes, 900))
    with pytest.raises(NanochatError, match="add smaller"):  # steeper and then flat: no bottom anywhere
        fit_parabola([Point(1e12, depth, size, 1, bpb) for depth, size, bpb in zip((1, 2, 3), sizes, (1.4, 2.0, 2.2))])
    with pytest.raises(NanochatError, match="two budgets"):
        exponent([fit_parabola(points(1e12, sizes, 60_000))], lambda each: each.params)


def test_a_budget_is_spent(base_dir):
    for depth in (1, 3):
        dial = small_recipe(depth, 1e11, 512)
        assert dial.flops == pytest.approx(1e11, rel=0.02) and dial.config.n_embd == 24 * depth


def test_the_command(base_dir, capsys):
    shards = str(write_world(base_dir / "world", count=1500, shards=1) / "shards")
    with pytest.raises(NanochatError, match="two budgets"):  # of 3e8 FLOPs nothing can be learned about sizes
        scaling_study(ScalingStudy(depths="1,2", budgets="3e8", data_dir=shards))
    said = capsys.readouterr().out
    assert "3e+08 FLOPs, depth 2: N 79,896" in said and "left out: 2 sizes" in said
    stored = read_json(base_dir / "report" / "scaling_study.json")
    assert len(stored["points"]) == 2 and 2 < stored["points"][0]["bpb"] < 6
    assert (base_dir / "report" / "scaling_study.png").exists()
    for changes in ({"depths": "1,x"}, {"budgets": ""}, {"depths": "0"}):
        with pytest.raises(NanochatError, match="no list of positive numbers"):
            scaling_study(ScalingStudy(**changes))
