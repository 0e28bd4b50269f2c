"""ats.study, tools/study.py: verdicts follow from the numbers, work is done once, the page says what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ats.study.charts import token_statistics
from ats.study.compare import FAILS, HOLDS, NOISE, Claims, Estimate, contrast, of_seeds
from ats.study.digits import AT_BUDGETS, QUICK, VARIANTS, Row, StudySize
from ats.study.results import ResultStore

ROOT = Path(__file__).parents[2]

# ------------------------------------------------------------------------------------------------------------- compare


def draw_hits(
    rng: np.random.Generator, rate: float, *, seeds: int = 3, digits: int = 40, copies: int = 4
) -> np.ndarray:
    return rng.random((seeds, digits * copies)) < rate


UNITS = np.repeat(np.arange(40), 4)


@given(st.integers(0, 10**6), st.floats(0.1, 0.9), st.floats(0.1, 0.9), st.booleans())
@settings(max_examples=50)
def test_differences_are_antisymmetric_and_of_the_accuracies(seed, rate_a, rate_b, has_seeds):
    rng = np.random.default_rng(seed)
    a, b = draw_hits(rng, rate_a), draw_hits(rng, rate_b)
    forth = contrast([(1, a), (-1, b)], UNITS, has_seeds=has_seeds)
    back = contrast([(1, b), (-1, a)], UNITS, has_seeds=has_seeds)
    assert forth.mean == pytest.approx(100 * (a.mean() - b.mean()))
    assert (back.mean, back.half_width) == pytest.approx((-forth.mean, forth.half_width))
    same = contrast([(1, a), (-1, a)], UNITS, has_seeds=has_seeds)
    assert (same.mean, same.half_width) == (0, 0)


def test_the_interval_covers_the_truth_where_digits_differ():
    """Some digits are hard for one network only. 95 % intervals cover the true difference in about 95 of 100 draws;
    with canvases as units they would be too narrow.
    """
    rng = np.random.default_rng(0)
    covered, naive = 0, 0
    for _ in range(300):
        rates = rng.random((2, 40)) ** 0.5  # per digit, from one distribution: no difference
        a, b = (rng.random((3, 160)) < np.repeat(rate, 4) for rate in rates)
        estimate = contrast([(1, a), (-1, b)], UNITS, has_seeds=False)
        covered += abs(estimate.mean) <= estimate.half_width
        by_canvas = contrast([(1, a), (-1, b)], np.arange(160), has_seeds=False)
        naive += abs(by_canvas.mean) <= by_canvas.half_width
    assert 0.90 < covered / 300 < 0.99
    assert naive < covered


def test_trainings_widen_the_interval():
    """If every seed gives another answer, a few seeds say little."""
    a, b = np.zeros((3, 160), bool), np.zeros((3, 160), bool)
    a[0] = True
    narrow = contrast([(1, a), (-1, b)], UNITS, has_seeds=False)
    wide = contrast([(1, a), (-1, b)], UNITS, has_seeds=True)
    assert narrow.half_width == 0
    assert wide.half_width == pytest.approx(4.30 * 100 / 3, rel=0.01)
    assert math.isinf(of_seeds([1.0]).half_width)


def test_verdicts():
    assert Estimate(1.0, 0.5).verdict() == HOLDS
    assert Estimate(-1.0, 0.5).verdict() == FAILS
    assert Estimate(0.4, 0.5).verdict() == NOISE
    assert Estimate(-0.1, 0.05).verdict(at_least=-0.2) == HOLDS
    assert Estimate(0.0, 0.0).verdict() == NOISE


SIZE = StudySize(num_seeds=3, canvases=4, budgets=(10, 4), sweep=(8, 65))


def make_claims(rates: dict) -> list:
    """Claims about made-up rows; `rates` is (variant, budget) -> accuracy, by default 0.8."""
    rng = np.random.default_rng(1)
    keys = [("dense", None), ("dense_tuned", None), ("saving", "saving"), ("saving_tuned", "saving")]
    keys += [(variant.id, budget) for variant in AT_BUDGETS for budget in SIZE.budgets]
    rows, noise = [], rng.random((3, 160))
    for key in keys:
        hits = noise < rates.get(key, 0.8)  # the easiest canvases first: paired, as networks are
        tokens = {"tokens_per_block": {3: 20.0, 4: 15.0, 5: 14.0}}
        measured = [
            tokens | {"hits": "".join("1" if hit else "0" for hit in seed), "costs": costs.tolist()}
            for seed, costs in zip(hits, noise, strict=True)
        ]
        rows.append(Row(VARIANTS[key[0]], key[1], num_tokens=[None] * 3, measured=measured))
    return Claims(rows, SIZE, UNITS, noise).all()


def test_differences_are_at_the_same_cost():
    """A variant that misses the budgets but has the same accuracy at the same cost is neither better nor worse."""
    rng = np.random.default_rng(0)
    noise = rng.random((3, 160))

    def row(variant, budget, cost: float) -> Row:
        hits = noise < 0.5 + 0.3 * cost
        measured = [{"hits": "".join("1" if hit else "0" for hit in seed), "costs": [cost] * 160} for seed in hits]
        return Row(VARIANTS[variant], budget, [None] * 3, measured)

    rows = [
        row("top_k", 10, 1.0),
        row("top_k", 4, 0.5),
        row("inverse", 10, 0.9),
        row("inverse", 4, 0.4),
    ]
    claims = Claims(rows, SIZE, UNITS, noise)
    claim = claims.better("inverse", "top_k")
    raw = 100 * np.mean([rows[i].hits.mean() - rows[i - 2].hits.mean() for i in (2, 3)])
    assert raw < -1.5
    assert claim.overall.mean == pytest.approx(0, abs=1)


def test_claims_follow_the_numbers():
    """What was measured decides whether a claim holds, fails or is within the noise."""
    by_text = {claim.text: claim for claim in make_claims({})}
    name = next(text for text in by_text if "beats top-K" in text)
    grows = next(text for text in by_text if "over top-K grows" in text)
    assert by_text[name].verdict == NOISE
    for better, worse, verdict in (("inverse", "top_k", HOLDS), ("top_k", "inverse", FAILS)):
        rates = {(better, 10): 0.9, (better, 4): 0.9, (worse, 10): 0.8, (worse, 4): 0.5}
        claims = {claim.text: claim for claim in make_claims(rates)}
        assert claims[name].verdict == verdict
        assert claims[grows].verdict == verdict
        assert dict(claims[name].parts)["4 patches"].mean == pytest.approx(40 if verdict == HOLDS else -40, abs=8)
    follow = next(claim for text, claim in by_text.items() if "Images with more" in text)
    assert follow.overall.mean == pytest.approx(1.0)  # costs and distractors are the same numbers here
    fall = next(claim for text, claim in by_text.items() if "fewer tokens" in text)
    assert fall.overall.mean == pytest.approx(1.0)  # from 15 to 14


# ------------------------------------------------------------------------------------------------------------- results


def test_work_is_done_once(tmp_path):
    """A result is kept. Other inputs or a damaged file mean measuring again."""
    calls = []

    def get(value: int) -> dict:
        store = ResultStore(tmp_path, total_cost=1)
        return store.get("a/row", {"value": (value,)}, lambda: calls.append(value) or {value: value})

    for value in (1, 1, 2, 2):
        assert get(value) == {str(value): value}  # always as JSON has it
    assert calls == [1, 2]
    (tmp_path / "a" / "row.json").write_text('{"inputs": {"value"')
    get(2)
    assert calls == [1, 2, 2]


def test_an_interrupted_study_resumes(tmp_path):
    def interrupt() -> dict:
        raise KeyboardInterrupt

    store = ResultStore(tmp_path, total_cost=2)
    store.get("one", {}, lambda: {"n": 1})
    with pytest.raises(KeyboardInterrupt):
        store.get("two", {}, interrupt)
    store = ResultStore(tmp_path, total_cost=2)
    assert store.get("one", {}, interrupt) == {"n": 1}
    assert store.get("two", {}, lambda: {"n": 2}) == {"n": 2}


def test_token_statistics():
    kept = [3, 3, 3, 5, 6]
    mode, mean, std, span = token_statistics(np.bincount(kept).tolist())
    assert (mode, span) == (3, "3-6")
    assert (mean, std) == pytest.approx((4.0, np.std(kept)))


# ----------------------------------------------------------------------------------------------------------- the study


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """A folder in which the short form of the study has run."""
    import study as tool

    folder = tmp_path_factory.mktemp("study")
    words = [
        "--data",
        folder / "data",
        "--results",
        folder / "results",
        "--output",
        folder / "docs",
        "--quick",
        "--debug",
    ]
    assert tool.main([str(word) for word in words]) == 0
    return folder


@pytest.mark.long
def test_the_short_form_runs(quick):
    """Every part of the study runs, and its page has what its JSON says."""
    found = json.loads((quick / "docs" / "study.json").read_text())
    text = (quick / "docs" / "STUDY.md").read_text()
    assert (quick / "docs" / "images" / "study.png").stat().st_size > 10_000
    names = {row["variant"] for row in found["rows"]}
    assert names == {variant.name for variant in VARIANTS.values()}
    assert all(len(row["top1"]) == QUICK.num_seeds for row in found["rows"])
    for claim in found["claims"]:
        assert claim["text"] in text
    budget = {
        row["budget"]: np.mean(row["gflops_paper"]) for row in found["rows"] if row["variant"] == VARIANTS["top_k"].name
    }
    inverse = {row["budget"]: np.mean(row["gflops_paper"]) for row in found["rows"] if row["variant"] == "blocks 3-11"}
    assert inverse[10] == pytest.approx(budget[10], rel=0.1)  # K was set on 16 images
    assert budget[4] < budget[10]


@pytest.mark.long
def test_the_study_resumes(quick, capsys, monkeypatch):
    """Only the row whose file is missing is measured again."""
    import study as tool

    from ats.study import digits

    measured = []
    original = digits.measure
    monkeypatch.setattr(digits, "measure", lambda *args, **kwargs: measured.append(1) or original(*args, **kwargs))
    before = json.loads((quick / "docs" / "study.json").read_text())
    (quick / "results" / "rows" / "block_3__random__4_1.json").unlink()
    words = ["--data", quick / "data", "--results", quick / "results", "--output", quick / "again", "--quick"]
    assert tool.main([str(word) for word in words]) == 0
    after = json.loads((quick / "again" / "study.json").read_text())
    assert len(measured) == 1
    assert after["rows"] == before["rows"]
    assert "Report:" in capsys.readouterr().out


def test_quick_does_not_overwrite_the_docs(capsys):
    import study as tool

    assert tool.main(["--quick"]) == 1
    assert "--output DIR" in capsys.readouterr().err


def test_the_committed_study_is_whole():
    """docs/STUDY.md has the full size, and its verdicts follow from its numbers."""
    found = json.loads((ROOT / "docs" / "study.json").read_text())
    text = (ROOT / "docs" / "STUDY.md").read_text()
    full = StudySize()
    assert found["settings"] == json.loads(json.dumps(vars(replace(full))))
    assert len(found["claims"]) == len(make_claims({}))
    for claim in found["claims"]:
        assert Estimate(**claim["overall"]).verdict(at_least=claim["at_least"]) == claim["verdict"]
        line = next(line for line in text.splitlines() if line.startswith("| " + claim["text"]))
        assert claim["verdict"] in line
        assert str(Estimate(**claim["overall"])) in line
    for row in found["rows"]:
        if row["budget"] in full.budgets:
            top_k = next(
                r for r in found["rows"] if r["variant"] == VARIANTS["top_k"].name and r["budget"] == row["budget"]
            )
            assert np.mean(row["gflops_paper"]) == pytest.approx(np.mean(top_k["gflops_paper"]), rel=0.03)
