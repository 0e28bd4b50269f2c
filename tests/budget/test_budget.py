"""The search for a budget, on costs that are formulas: it finds the best K there are, and refining never loses."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ats.budget.search import MAX_SCALE, Knobs, Setting, Trial, amounts, bisect, refine
from ats.reduction.inverse_transform import InverseTransform

slot_lists = st.lists(st.integers(9, 60), min_size=1, max_size=4)


def knobs_of(slots: list[int]) -> Knobs:
    return Knobs(tuple(InverseTransform(block=block) for block in range(len(slots))), tuple(slots))


def saturating(knobs: Knobs, prices: list[float]):
    """A cost as ATS's: it grows with every K, ever slower."""

    def measure(setting: Setting) -> Trial:
        kept = [n * k / (k + n) for n, k in zip(knobs.max_tokens, amounts(setting), strict=True)]
        return Trial(setting, 10 + sum(p * t for p, t in zip(prices, kept, strict=True)))

    return measure


@given(slot_lists, st.floats(0.01, MAX_SCALE), st.floats(1.0001, 2))
def test_a_larger_scale_never_lowers_any_k(slots, scale, factor):
    knobs = knobs_of(slots)
    lower, higher = amounts(knobs.at(scale)), amounts(knobs.at(scale * factor))
    assert all(a <= b for a, b in zip(lower, higher, strict=True))
    assert all(k >= 8 for k in lower)


@given(st.integers(9, 60), st.integers(1, 5))
def test_blocks_step_one_after_the_other(slots, num_blocks):
    """Where all blocks have as many slots, every sum of K is reached; the scale 1 is K = slots everywhere."""
    knobs = knobs_of([slots] * num_blocks)
    assert amounts(knobs.at(1.0)) == (slots,) * num_blocks
    scales = [(8 + i / (4 * num_blocks)) / slots for i in range(40 * num_blocks)]
    sums = [sum(amounts(knobs.at(scale))) for scale in scales]
    assert {b - a for a, b in itertools.pairwise(sums)} <= {0, 1}


@given(slot_lists, st.lists(st.floats(0.1, 3), min_size=4, max_size=4), st.floats(0, 1))
@settings(max_examples=50)
def test_bisection_finds_the_nearest_k_on_its_scale(slots, prices, place):
    """As near as the tolerance, or else as near as any scale comes, which a scan over all of them shows."""
    knobs = knobs_of(slots)
    prices = prices[: len(slots)]
    calls = []
    plain = saturating(knobs, prices)
    measure = cache(lambda k: calls.append(k) or plain(k))
    least, most = measure(knobs.least).cost, measure(knobs.most).cost
    target = least + place * (most - least)
    scale, found = bisect(measure, knobs, target, tolerance=1e-4)
    assert found.setting == knobs.at(scale)
    scan = (plain(knobs.at(MAX_SCALE * 1.008**-i)).cost for i in range(1500))
    nearest = min(abs(cost - target) for cost in scan)
    assert abs(found.cost - target) <= max(1e-4 * target, nearest * (1 + 1e-9))
    assert len(calls) == len(set(calls)) < 45


@given(slot_lists, st.floats(0.2, 0.8), st.integers(0, 10**6))
@settings(max_examples=30)
def test_refining_never_changes_the_logits_more_and_stays_in_the_budget(slots, place, seed):
    """Whatever the change is a function of."""
    knobs = knobs_of(slots)
    plain = saturating(knobs, [1.0] * len(slots))
    measure = cache(lambda k: Trial(k, plain(k).cost, (hash((amounts(k), seed)) % 1000,)))
    target = 10 + place * (plain(knobs.most).cost - 10)
    if target < plain(knobs.least).cost:
        return
    start = bisect(measure, knobs, target)
    best = refine(measure, knobs, start, target)
    assert best.changes <= start[1].changes
    assert best.cost <= max(1.002 * target, start[1].cost)
    assert best.cost > target - 1  # one more sample point never costs more


def test_refining_moves_tokens_to_the_block_that_needs_them():
    """Three blocks that cost the same, of which the last alone matters to the logits."""
    knobs = knobs_of([60, 60, 60])
    plain = saturating(knobs, [1.0] * 3)
    measure = cache(lambda k: Trial(k, plain(k).cost, (1 / amounts(k)[2],)))
    start = bisect(measure, knobs, 60.0)
    best = refine(measure, knobs, start, 60.0, rounds=4)
    assert amounts(best.setting)[2] > 2 * amounts(start[1].setting)[2]
    assert max(amounts(best.setting)[:2]) < amounts(start[1].setting)[0]
    assert best.cost == pytest.approx(60, rel=0.01)


def test_a_difference_within_the_noise_is_none():
    """Four images, by hand: -1 +- 0.58 is not surely nearer, -2 +- 0.58 is."""
    other = Trial((), 1.0, (5.0, 5.0, 5.0, 5.0))
    assert not Trial((), 1.0, (5.0, 5.0, 3.0, 3.0)).surely_nearer_than(other)
    assert Trial((), 1.0, (4.0, 4.0, 2.0, 2.0)).surely_nearer_than(other)
    assert not other.surely_nearer_than(other)
