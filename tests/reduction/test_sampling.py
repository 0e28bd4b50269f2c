"""The sampling rule: against its definition written out point by point, on its laws, and on degenerate scores."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import planned
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ats.errors import UserError
from ats.reduction import REDUCTIONS, Candidates
from ats.reduction.base import options_of
from ats.reduction.inverse_transform import InverseTransform
from ats.reduction.plan import config_key, plan_reductions

SAMPLERS = ["inverse_transform", "topk", "random"]


def choose(name: str, of: Candidates, num_points: int, *, block: int = 0, **options: object) -> torch.Tensor:
    """What a sampler keeps; options that it does not have are left out."""
    kind = REDUCTIONS[name]
    own = {option.name for option in options_of(kind)}
    return kind(block, **{key: value for key, value in options.items() if key in own}).choose(of, num_points)


def candidates(
    rows: list[list[float]], *, max_tokens: int | None = None, pad: int = 0, num_positions: int | None = None
) -> Candidates:
    """Score rows of different lengths as padded candidates, of which the longest are complete."""
    longest = max(map(len, rows)) + pad
    scores = torch.zeros(len(rows), longest, dtype=torch.float64)
    for i, row in enumerate(rows):
        scores[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return Candidates(
        scores,
        lengths=torch.tensor([len(row) for row in rows]),
        max_tokens=max(map(len, rows)) if max_tokens is None else max_tokens,
        num_positions=num_positions or longest,
        position=lambda: torch.arange(longest).expand(len(rows), -1),
    )


def by_definition(scores: list[float], num_points: int, *, complete: bool, rule: str) -> set[int]:
    """The paper's text or the official code in plain numpy, one sample point at a time."""
    s = np.asarray(scores, dtype=np.float64)
    s = s / s.sum()
    if rule == "paper":
        c = np.where(s > 0, np.cumsum(s), np.inf)  # probability 0: never sampled
        points = (2 * np.arange(num_points) + 1) / (2 * num_points)
        return {int(np.abs(c - y).argmin()) for y in points}
    order = np.argsort(s, kind="stable")
    c = np.cumsum(s[order])
    lo = c[0] if complete else 0.0
    c = (c - lo) / (c[-1] - lo)
    first = c[c > 0].min()
    points = first + np.arange(num_points) * (1 - first) / (num_points - 1)
    return {int(order[np.abs(c - y).argmin()]) for y in points}


distinct_scores = st.lists(st.integers(1, 10**6), min_size=2, max_size=60, unique=True).map(
    lambda values: [v / 1000 for v in values]
)


@given(distinct_scores, st.integers(2, 80), st.booleans(), st.sampled_from(["official", "paper"]))
@settings(max_examples=300)
def test_inverse_transform_is_the_definition(scores, num_points, complete, rule):
    """The closed form picks the tokens that trying every sample point picks.

    Sample points that lie on a midpoint to within rounding may go to either side, so such draws are left out.
    """
    kept = choose(
        "inverse_transform", candidates([scores], max_tokens=len(scores) if complete else 0), num_points, rule=rule
    )
    want = by_definition(scores, num_points, complete=complete, rule=rule)
    nudged = by_definition(
        [s * (1 + 1e-9) ** i for i, s in enumerate(scores)], num_points, complete=complete, rule=rule
    )
    if want == nudged:
        assert set(kept[0].nonzero().flatten().tolist()) == want


@given(st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 1000]), min_size=1, max_size=40).filter(any), st.integers(1, 60))
@settings(max_examples=300)
def test_paper_rule_never_keeps_a_token_without_mass(scores, num_points):
    """By the paper's rule a score of 0 is a probability of 0. What is kept is what every point picks on its own."""
    kept = choose("inverse_transform", candidates([scores]), num_points, rule="paper")[0].nonzero().flatten().tolist()
    assert 1 <= len(kept) <= num_points
    assert all(scores[i] > 0 for i in kept)
    total, cdf = sum(scores), [c for c, s in zip(np.cumsum(scores).tolist(), scores, strict=True) if s]
    middles = {num_points * (a + b) for a, b in pairwise(cdf)}  # times total * num_points * 2
    assume(middles.isdisjoint((2 * i + 1) * total for i in range(num_points)))  # there rounding decides
    assert set(kept) == by_definition(scores, num_points, complete=False, rule="paper")


@pytest.mark.parametrize(("small", "dtype"), [(0, torch.float64), (0, torch.float32), (1e-9, torch.float32)])
def test_paper_rule_gives_a_plateau_to_its_first_entry(small, dtype):
    """The token that carries the mass; also where a score is lost in the rounding of the CDF."""
    rows = candidates([[0.3, small, small, 0.3, small, small, small, 0.4], [small, small, 0.5, small, 0.5]])
    rows.scores = rows.scores.to(dtype)
    kept = choose("inverse_transform", rows, 8, rule="paper")
    in_front = [1] if small else []  # the nearest to the first point, as it does move the CDF there
    assert [row.nonzero().flatten().tolist() for row in kept] == [[0, 3, 7], [*in_front, 2, 4]]


@given(
    st.lists(distinct_scores, min_size=2, max_size=5),
    st.integers(2, 40),
    st.sampled_from(SAMPLERS),
    st.sampled_from(["official", "paper"]),
    st.integers(0, 7),
)
@settings(max_examples=150)
def test_a_sequence_does_not_see_the_batch(rows, num_points, name, rule, pad):
    """What is kept of a sequence is the same alone, in a batch, and with more padding: exactly, for every sampler."""
    together = choose(name, candidates(rows, pad=pad), num_points, rule=rule)
    size = together.shape[1]
    for i, row in enumerate(rows):
        alone = candidates([row], max_tokens=max(map(len, rows)), num_positions=size)
        assert torch.equal(choose(name, alone, num_points, rule=rule)[0], together[i, : len(row)])


@given(distinct_scores, st.integers(2, 40), st.floats(1e-3, 1e3), st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_official_rule_ignores_scale_and_order(scores, num_points, scale, random):
    """Scores are sorted and normalised first: neither their unit nor the order of the tokens matters."""
    kept = choose("inverse_transform", candidates([scores]), num_points)[0]
    shuffled = list(range(len(scores)))
    random.shuffle(shuffled)
    other = choose("inverse_transform", candidates([[scores[i] * 2.0 ** round(scale) for i in shuffled]]), num_points)[
        0
    ]
    assert {shuffled[i] for i in other.nonzero().flatten().tolist()} == set(kept.nonzero().flatten().tolist())


@given(distinct_scores, st.integers(2, 80), st.sampled_from(SAMPLERS), st.sampled_from(["official", "paper"]))
@settings(max_examples=150)
def test_number_kept(scores, num_points, name, rule):
    """At least one and at most K tokens stay; topk and random keep exactly K, or all there are."""
    kept = choose(name, candidates([scores]), num_points, rule=rule)
    assert 1 <= kept.sum() <= num_points
    if name in ("topk", "random"):
        assert kept.sum() == min(num_points, len(scores))


def test_topk_keeps_the_highest():
    kept = choose("topk", candidates([[0.3, 0.9, 0.1, 0.5]]), 2)
    assert kept.tolist() == [[False, True, False, True]]


def test_random_follows_seed_and_block():
    """Another seed or block draws other tokens, the same ones the same; over many draws every token is as likely."""
    rows = candidates([[1.0] * 20])
    draws = {
        (seed, block): tuple(choose("random", rows, 5, block=block, seed=seed)[0].tolist())
        for seed in range(40)
        for block in range(10)
    }
    assert draws[3, 4] == tuple(choose("random", rows, 5, block=4, seed=3)[0].tolist())
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
    kept = choose("inverse_transform", candidates([row, good, equal]), 4, rule=rule)
    alone = choose("inverse_transform", candidates([good]), 4, rule=rule)
    assert kept[0].any()
    assert torch.equal(kept[0], kept[2])
    assert torch.equal(kept[1], alone[0])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("rule", ["official", "paper"])
@pytest.mark.parametrize("complete", [True, False])
def test_one_candidate_is_kept(name, rule, complete):
    kept = choose(name, candidates([[0.7]], max_tokens=int(complete)), 6, rule=rule)
    assert kept.tolist() == [[True]]


def test_lowest_score_goes_first_and_then_stays():
    """The official code's own behaviour: while nothing has been dropped the lowest is never kept, afterwards always."""
    scores = [0.001, 0.2, 0.3, 0.25, 0.249]
    full = choose("inverse_transform", candidates([scores]), 40)
    after = choose("inverse_transform", candidates([scores], max_tokens=0), 40)
    assert full.tolist() == [[False, True, True, True, True]]
    assert after.tolist() == [[True] * 5]


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "budget"),
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
def test_budget(num_tokens, max_tokens, budget):
    """K: a count as it is (not clamped to max_tokens), a ratio of max_tokens rounded as Python does, at least 8."""
    assert InverseTransform(num_tokens=num_tokens).budget(max_tokens) == budget
    assert InverseTransform(num_tokens=num_tokens).limit(max_tokens) == min(budget, max_tokens)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"blocks": [12]}, "block 12 does not exist, the network has blocks 0 to 11"),
        ({"blocks": [-1]}, "block -1 does not exist"),
        ({"blocks": [3, 3]}, "a block is listed twice"),
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
        planned(**{"depth": 12, "blocks": [3, 4], "num_tokens": 197} | changes)
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
            {"num_tokens": 6, "min_tokens": 1, "num_prefix_tokens": 5, "naming": str},
            [7, 7, 7],
            "num_tokens 6 is below 5 prefix tokens and two more: blocks 0-2 use 7.",
        ),
        ({"num_tokens": [8, 20.0, 0.01]}, [8, 20, 8], None),
    ],
)
def test_k_is_rounded_and_raised_to_the_least(settings, budgets, text, caplog):
    """And what is not used as it was given is said, in one line."""
    naming, num_prefix = settings.pop("naming", config_key), settings.pop("num_prefix_tokens", 1)
    stage = {"blocks": [2, 0, 1]} | settings
    samplers = plan_reductions([stage], depth=3, num_prefix_tokens=num_prefix, namings=[naming])
    assert [samplers[block].budget(197) for block in range(3)] == budgets
    assert [record.message for record in caplog.records] == ([text] if text else [])


def test_only_the_sampled_blocks_need_a_possible_number():
    """Entries of other blocks are not used; a ratio is raised to the least instead of refused."""
    samplers = planned(depth=4, blocks=[1, 3], num_tokens=[-1, 8, 0, 0.01])
    assert {block: sampler.budget(197) for block, sampler in samplers.items()} == {1: 8, 3: 8}
