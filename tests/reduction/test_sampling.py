"""The sampling rule: against its definition written out point by point, on its laws, and on degenerate scores."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ats.errors import UserError
from ats.reduction.plan import plan_samplers
from ats.reduction.sampling import SAMPLERS, BlockSampler, Candidates


def candidates(
    rows: list[list[float]], *, slots: int | None = None, pad: int = 0, num_positions: int | None = None
) -> Candidates:
    """Score rows of different lengths as padded candidates, of which the longest fill their slots."""
    longest = max(map(len, rows)) + pad
    scores = torch.zeros(len(rows), longest, dtype=torch.float64)
    for i, row in enumerate(rows):
        scores[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return Candidates(
        scores,
        lengths=torch.tensor([len(row) for row in rows]),
        slots=max(map(len, rows)) if slots is None else slots,
        num_positions=num_positions or longest,
        position=lambda: torch.arange(longest).expand(len(rows), -1),
    )


def by_definition(scores: list[float], num_points: int, *, fills_slots: bool, rule: str) -> set[int]:
    """The paper's text or the official code in plain numpy, one sample point at a time."""
    s = np.asarray(scores, dtype=np.float64)
    s = s / s.sum()
    if rule == "paper":
        c = np.where(s > 0, np.cumsum(s), np.inf)  # probability 0: never sampled
        points = (2 * np.arange(num_points) + 1) / (2 * num_points)
        return {int(np.abs(c - y).argmin()) for y in points}
    order = np.argsort(s, kind="stable")
    c = np.cumsum(s[order])
    lo = c[0] if fills_slots else 0.0
    c = (c - lo) / (c[-1] - lo)
    first = c[c > 0].min()
    points = first + np.arange(num_points) * (1 - first) / (num_points - 1)
    return {int(order[np.abs(c - y).argmin()]) for y in points}


distinct_scores = st.lists(st.integers(1, 10**6), min_size=2, max_size=60, unique=True).map(
    lambda values: [v / 1000 for v in values]
)


@given(distinct_scores, st.integers(2, 80), st.booleans(), st.sampled_from(["official", "paper"]))
@settings(max_examples=300)
def test_inverse_transform_is_the_definition(scores, num_points, fills_slots, rule):
    """The closed form picks the tokens that trying every sample point picks.

    Sample points that lie on a midpoint to within rounding may go to either side, so such draws are left out.
    """
    sampler = BlockSampler(block=0, num_tokens=num_points + 1, rule=rule)
    kept = SAMPLERS["inverse_transform"](
        candidates([scores], slots=len(scores) if fills_slots else 0), num_points, sampler
    )
    want = by_definition(scores, num_points, fills_slots=fills_slots, rule=rule)
    nudged = by_definition(
        [s * (1 + 1e-9) ** i for i, s in enumerate(scores)], num_points, fills_slots=fills_slots, rule=rule
    )
    if want == nudged:
        assert set(kept[0].nonzero().flatten().tolist()) == want


@given(st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 1000]), min_size=1, max_size=40).filter(any), st.integers(1, 60))
@settings(max_examples=300)
def test_paper_rule_never_keeps_a_token_without_mass(scores, num_points):
    """By the paper's rule a score of 0 is a probability of 0. What is kept is what every point picks on its own."""
    sampler = BlockSampler(block=0, num_tokens=num_points + 1, rule="paper")
    kept = SAMPLERS["inverse_transform"](candidates([scores]), num_points, sampler)[0].nonzero().flatten().tolist()
    assert 1 <= len(kept) <= num_points
    assert all(scores[i] > 0 for i in kept)
    total, cdf = sum(scores), [c for c, s in zip(np.cumsum(scores).tolist(), scores, strict=True) if s]
    middles = {num_points * (a + b) for a, b in pairwise(cdf)}  # times total * num_points * 2
    assume(middles.isdisjoint((2 * i + 1) * total for i in range(num_points)))  # there rounding decides
    assert set(kept) == by_definition(scores, num_points, fills_slots=False, rule="paper")


@pytest.mark.parametrize(("small", "dtype"), [(0, torch.float64), (0, torch.float32), (1e-9, torch.float32)])
def test_paper_rule_gives_a_plateau_to_its_first_entry(small, dtype):
    """The token that carries the mass; also where a score is lost in the rounding of the CDF."""
    rows = candidates([[0.3, small, small, 0.3, small, small, small, 0.4], [small, small, 0.5, small, 0.5]])
    rows.scores = rows.scores.to(dtype)
    kept = SAMPLERS["inverse_transform"](rows, 8, BlockSampler(block=0, num_tokens=9, rule="paper"))
    in_front = [1] if small else []  # the nearest to the first point, as it does move the CDF there
    assert [row.nonzero().flatten().tolist() for row in kept] == [[0, 3, 7], [*in_front, 2, 4]]


@given(
    st.lists(distinct_scores, min_size=2, max_size=5),
    st.integers(2, 40),
    st.sampled_from(sorted(SAMPLERS)),
    st.sampled_from(["official", "paper"]),
    st.integers(0, 7),
)
@settings(max_examples=150)
def test_a_sequence_does_not_see_the_batch(rows, num_points, name, rule, pad):
    """What is kept of a sequence is the same alone, in a batch, and with more padding: exactly, for every sampler."""
    sampler = BlockSampler(block=3, num_tokens=num_points + 1, rule=rule, sampler=name)
    together = SAMPLERS[name](candidates(rows, pad=pad), num_points, sampler)
    size = together.shape[1]
    for i, row in enumerate(rows):
        alone = candidates([row], slots=max(map(len, rows)), num_positions=size)
        assert torch.equal(SAMPLERS[name](alone, num_points, sampler)[0], together[i, : len(row)])


@given(distinct_scores, st.integers(2, 40), st.floats(1e-3, 1e3), st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_official_rule_ignores_scale_and_order(scores, num_points, scale, random):
    """Scores are sorted and normalised first: neither their unit nor the order of the tokens matters."""
    sampler = BlockSampler(block=0, num_tokens=num_points + 1)
    kept = SAMPLERS["inverse_transform"](candidates([scores]), num_points, sampler)[0]
    shuffled = list(range(len(scores)))
    random.shuffle(shuffled)
    other = SAMPLERS["inverse_transform"](
        candidates([[scores[i] * 2.0 ** round(scale) for i in shuffled]]), num_points, sampler
    )[0]
    assert {shuffled[i] for i in other.nonzero().flatten().tolist()} == set(kept.nonzero().flatten().tolist())


@given(distinct_scores, st.integers(2, 80), st.sampled_from(sorted(SAMPLERS)), st.sampled_from(["official", "paper"]))
@settings(max_examples=150)
def test_number_kept(scores, num_points, name, rule):
    """At least one and at most K tokens stay; topk and random keep exactly K, or all there are."""
    sampler = BlockSampler(block=0, num_tokens=num_points + 1, rule=rule, sampler=name)
    kept = SAMPLERS[name](candidates([scores]), num_points, sampler)
    assert 1 <= kept.sum() <= num_points
    if name in ("topk", "random"):
        assert kept.sum() == min(num_points, len(scores))


def test_topk_keeps_the_highest():
    kept = SAMPLERS["topk"](candidates([[0.3, 0.9, 0.1, 0.5]]), 2, BlockSampler(block=0, num_tokens=3))
    assert kept.tolist() == [[False, True, False, True]]


def test_random_follows_seed_and_block():
    """Another seed or block draws other tokens, the same ones the same; over many draws every token is as likely."""
    rows = candidates([[1.0] * 20])
    draws = {
        (seed, block): tuple(
            SAMPLERS["random"](rows, 5, BlockSampler(block=block, num_tokens=6, seed=seed))[0].tolist()
        )
        for seed in range(40)
        for block in range(10)
    }
    assert draws[3, 4] == tuple(SAMPLERS["random"](rows, 5, BlockSampler(block=4, num_tokens=6, seed=3))[0].tolist())
    assert len(set(draws.values())) > 300
    share = np.mean(list(draws.values()), axis=0)
    assert np.abs(share - 0.25).max() < 0.1


@pytest.mark.parametrize("rule", ["official", "paper"])
@pytest.mark.parametrize(
    "row",
    [[0.0] * 6, [torch.nan] * 6, [1.0, torch.nan, 2.0, 1.0, 1.0, 1.0], [torch.inf, 1.0, 1.0, 1.0, 1.0, 1.0]],
    ids=["all zero", "all nan", "one nan", "one inf"],
)
def test_scores_that_say_nothing_count_the_same(row, rule):
    """Without usable scores, tokens are kept as with equal scores, and the other sequences of the batch are not
    touched.
    """
    good, equal = [0.1, 0.5, 0.2, 0.9, 0.3, 0.4], [1.0] * 6
    sampler = BlockSampler(block=0, num_tokens=5, rule=rule)
    kept = SAMPLERS["inverse_transform"](candidates([row, good, equal]), 4, sampler)
    alone = SAMPLERS["inverse_transform"](candidates([good]), 4, sampler)
    assert kept[0].any()
    assert torch.equal(kept[0], kept[2])
    assert torch.equal(kept[1], alone[0])


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("rule", ["official", "paper"])
@pytest.mark.parametrize("fills_slots", [True, False])
def test_one_candidate_is_kept(name, rule, fills_slots):
    kept = SAMPLERS[name](
        candidates([[0.7]], slots=int(fills_slots)), 6, BlockSampler(block=0, num_tokens=8, rule=rule)
    )
    assert kept.tolist() == [[True]]


def test_lowest_score_goes_first_and_then_stays():
    """The official code's own behaviour: with full slots the lowest is never kept, with an empty slot always."""
    scores = [0.001, 0.2, 0.3, 0.25, 0.249]
    full = SAMPLERS["inverse_transform"](candidates([scores]), 40, BlockSampler(block=0, num_tokens=41))
    after = SAMPLERS["inverse_transform"](candidates([scores], slots=0), 40, BlockSampler(block=0, num_tokens=41))
    assert full.tolist() == [[False, True, True, True, True]]
    assert after.tolist() == [[True] * 5]


@pytest.mark.parametrize(
    ("num_tokens", "slots", "budget"),
    [
        (197, 197, 197),
        (1.0, 65, 65),
        (1, 65, 65),
        (0.5, 65, 32),
        (20, 65, 20),
        (0.5, 10, 8),
        (300, 197, 300),
        (2, 197, 8),
    ],
)
def test_budget(num_tokens, slots, budget):
    """K: a count as it is (not clamped to the slots), a ratio of the slots rounded as Python does, at least 8."""
    assert BlockSampler(block=0, num_tokens=num_tokens).budget(slots) == budget


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"blocks": [12]}, "block 12 does not exist, the network has blocks 0 to 11"),
        ({"blocks": [-1]}, "block -1 does not exist"),
        ({"blocks": [3, 3]}, "a block stands twice"),
        ({"num_tokens": [197] * 9}, "has 9 entries, the network 12 blocks"),
        ({"num_tokens": 0}, "NUM_TOKENS 0 (block 3)"),
        ({"num_tokens": -4}, "NUM_TOKENS -4"),
        ({"num_tokens": float("nan")}, "NUM_TOKENS nan (block 3)"),
        ({"num_tokens": float("inf")}, "NUM_TOKENS inf"),
        ({"num_tokens": True}, "NUM_TOKENS True (block 3): give a ratio in (0, 1] or a number of tokens above 1"),
        ({"num_tokens": ["9"] * 12}, "NUM_TOKENS '9' (block 3)"),
        ({"sampler": "inverse_transfrom"}, "Did you mean inverse_transform"),
        ({"score": "cls"}, "choose from cls_attention_value_norm"),
        ({"rule": "offical"}, "Did you mean official"),
        ({"num_prefix_tokens": 0}, "use ATS.SCORE mean_attention"),
    ],
)
def test_wrong_settings_are_named(changes, text):
    with pytest.raises(UserError) as error:
        plan_samplers(**{"depth": 12, "blocks": [3, 4], "num_tokens": 197} | changes)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("settings", "budgets", "text"),
    [
        ({"num_tokens": 4}, [8, 8, 8], "ATS.NUM_TOKENS 4 is below ATS.MIN_TOKENS 8: blocks 0-2 use 8."),
        ({"num_tokens": [17, 3, 17]}, [17, 8, 17], "ATS.NUM_TOKENS 3 is below ATS.MIN_TOKENS 8: block 1 uses 8."),
        ({"num_tokens": 20.5}, [20, 20, 20], "ATS.NUM_TOKENS 20.5 is not a whole number: blocks 0-2 use 20."),
        (
            {"num_tokens": [1.5, 21.5, 1.5]},
            [8, 22, 8],
            "ATS.NUM_TOKENS 1.5 is below ATS.MIN_TOKENS 8: blocks 0, 2 use 8; "
            "ATS.NUM_TOKENS 21.5 is not a whole number: block 1 uses 22.",
        ),
        (
            {"num_tokens": 6, "min_tokens": 1, "num_prefix_tokens": 5, "spell": str},
            [7, 7, 7],
            "num_tokens 6 is below 5 prefix tokens and two more: blocks 0-2 use 7.",
        ),
        ({"num_tokens": [8, 20.0, 0.01]}, [8, 20, 8], None),
    ],
)
def test_k_is_rounded_and_raised_to_the_least(settings, budgets, text, caplog):
    """And what is not used as it was given is said, in one line."""
    samplers = plan_samplers(depth=3, blocks=[2, 0, 1], **settings)
    assert [samplers[block].budget(197) for block in range(3)] == budgets
    assert [record.message for record in caplog.records] == ([text] if text else [])


def test_only_the_sampled_blocks_need_a_possible_number():
    """Entries of other blocks are not used; a ratio is raised to the least instead of refused."""
    samplers = plan_samplers(depth=4, blocks=[1, 3], num_tokens=[-1, 8, 0, 0.01])
    assert {block: sampler.budget(197) for block, sampler in samplers.items()} == {1: 8, 3: 8}
