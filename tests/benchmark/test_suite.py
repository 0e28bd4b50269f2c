"""A suite measures what its file lists, judges its goals and writes its document."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from ats.benchmark import suite, tables, variants
from ats.benchmark.engines import ENGINES
from ats.benchmark.suite import Goal, judge, load_suite, run_suite
from ats.benchmark.timing import BenchmarkSettings, Measured
from ats.benchmark.variants import build_variant
from ats.config import load_config
from ats.errors import UserError


@pytest.mark.long
def test_suite_writes_its_section_and_keeps_the_rest(tmp_path, capsys):
    """The quick suite runs every kind of measurement and draws every plot; the text around its section stays."""
    document = tmp_path / "BENCHMARKS.md"
    document.write_text("# Benchmarks\n\nWritten by hand.\n\n<!-- quick -->\nold\n<!-- /quick -->\n\nThe end.\n")
    run_suite("quick", folder=tmp_path, document=document)
    text = document.read_text()
    assert text.startswith("# Benchmarks\n\nWritten by hand.")
    assert text.endswith("The end.\n")
    assert "old" not in text
    assert "Tiny ViT, training step" in text
    results = json.loads((tmp_path / "quick.json").read_text())["measurements"]
    assert len(results) == len(load_suite("quick"))
    assert not any(entry["errors"] for entry in results)
    assert [(g["quantity"], g["batch"]) for g in results[0]["goals"]] == [
        ("efficiency", 1), ("share of sampling", 1), ("efficiency", 2), ("share of sampling", 2),
    ]  # fmt: skip
    goals = {(g["variant"], g["quantity"]): g for entry in results for g in entry["goals"]}
    memory = goals["ats", "activations / dense"]
    assert 0.5 < memory["measured"] < 1
    assert memory["met"]
    assert "activations / dense" in text
    assert all("imposed" in entry["token_counts"] for entry in results if "rows" in entry)
    assert text.count("imposed, drawn for every image") == 2  # in the head, and where the counts differ
    assert "absolute efficiency" in text
    assert [table["batch_size"] for entry in results for table in entry.get("peers", ())] == [1]
    for family in ("batch", "image", "clip", "tokens", "sampler"):
        assert (tmp_path / f"quick_{family}.png").stat().st_size > 5000
        assert f"quick_{family}.png" in text
    tables.replace_section(document, "another", "new")
    assert document.read_text().endswith("<!-- another -->\nnew\n<!-- /another -->\n")


def test_a_failed_measurement_leaves_the_others(tmp_path, monkeypatch):
    """One batch size and one table fail: both are named, their tracebacks are in the JSON, the rest is measured."""
    (tmp_path / "two.yaml").write_text("""
measurements:
- {title: Broken, sampler: {device: cpu, sizes: [-1], num_sequences: 1}}
- title: Tiny
  cfg: ImageNet/DeiT_S.yaml
  VIT.EMBED_DIM: 32
  VIT.NUM_HEADS: 2
  rounds: 1
  parts: false
  batch_sizes: [1, 2]
""")
    monkeypatch.setattr(suite, "SUITES", tmp_path)

    def read(cfg, batch_size, side):
        if batch_size == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return variants.read_batch(cfg, batch_size, side)

    monkeypatch.setattr(suite, "read_batch", read)
    with pytest.raises(UserError, match="Failed: Broken, sampler; Tiny, batch 1"):
        run_suite("two", folder=tmp_path, document=tmp_path / "BENCHMARKS.md")
    broken, tiny_entry = json.loads((tmp_path / "two.json").read_text())["measurements"]
    assert "Traceback" in broken["errors"]["sampler"]
    assert "CUDA out of memory" in tiny_entry["errors"]["batch 1"]
    assert [row["batch_size"] for row in tiny_entry["rows"]] == [2, 2]
    assert "**Failed:** batch 1: torch.OutOfMemoryError" in (tmp_path / "BENCHMARKS.md").read_text()


def test_what_has_not_begun_in_time_is_named(tmp_path, monkeypatch):
    """The suite ends with an error that lists it, and what was measured before stays."""
    sampler = "sampler: {device: cpu, sizes: [16], num_sequences: 1, min_seconds: 0.01}"
    (tmp_path / "late.yaml").write_text(f"""
minutes: 0.5
measurements:
- {{title: First, {sampler}}}
- {{title: Second, {sampler}}}
""")
    monkeypatch.setattr(suite, "SUITES", tmp_path)
    clock = iter([0.0, 0.0, 30.0, 60.0, 60.0])  # seconds: the suite, the first begins and ends, the second
    monkeypatch.setattr(suite, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with pytest.raises(UserError, match="Failed: Second, not begun"):
        run_suite("late", folder=tmp_path, document=tmp_path / "BENCHMARKS.md")
    first, second = json.loads((tmp_path / "late.json").read_text())["measurements"]
    assert first["table"][0]["patches"] == 16
    assert second["errors"] == {"not begun": "The suite's 0.5 minutes were over."}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_network_of_a_suite_can_be_built(name):
    """Configs and overrides exist, variants are known, and dense networks have the size of those with ATS."""
    seen = set()
    for item in load_suite(name):
        if item.sampler is not None:
            continue
        assert item.engines in ((), "all") or set(item.engines) <= set(ENGINES)
        key = str((item.cfg, item.overrides, item.settings.variants, item.settings.dense_keys))
        if key in seen:
            continue
        seen.add(key)
        cfg = load_config(f"configs/{item.cfg}", ["ATS.ENABLE", True, *item.overrides])
        sizes = set()
        for variant in ("dense", *item.settings.variants):
            keys = item.settings.dense_keys if variant.startswith("dense") else ()
            with torch.device("meta"):
                model = build_variant(cfg, variant, torch.device("meta"), keys)
            sizes.add(sum(parameter.numel() for parameter in model.parameters()))
        assert max(sizes) < 1.01 * min(sizes), item.title  # timm's position embedding has the size of the images
    assert len(seen) >= 6


def test_goals_are_judged_by_what_was_measured():
    """Lower and upper bounds, for one batch size or all, and relative to other variants."""
    goals = (
        Goal("ats", "efficiency", ">=", 0.85, batch_size=2),
        Goal("ats", "dense time / time", ">=", 1),
        Goal("ats", "share of sampling", "<=", 0.1),
        Goal("ats", "dense_graph time / time", ">=", 2),
    )
    row = Measured("ats", 2, 1.0, seconds=[1.0], ratios=[2.0], flop_ratios=[2.5], parts={"scoring and sampling": 0.2})
    dense, graph = Measured("dense", 2, 1.0, seconds=[2.0]), Measured("dense_graph", 2, 1.0, seconds=[1.5])
    judged = judge(goals, row, [dense, row, graph])
    assert [(g["measured"], g["met"]) for g in judged] == [(0.8, False), (2.0, True), (0.2, False), (1.5, False)]
    assert [g["goal"] for g in judged] == [">= 0.85", ">= 1", "<= 0.1", ">= 2"]
    row.activations_mb, dense.activations_mb, row.token_ratio = 7.0, 10.0, 0.65
    [memory] = judge([Goal("ats", "activations / dense", "<=", 0.1)], row, [dense, row])
    assert (memory["goal"], memory["measured"], memory["met"]) == ("<= 0.75", 0.7, True)
    dense.batch_size = row.batch_size = graph.batch_size = 1
    assert [g["quantity"] for g in judge(goals, row, [dense, row, graph])] == [
        "dense time / time", "share of sampling", "dense_graph time / time",
    ]  # fmt: skip


def test_a_measurement_is_a_flat_mapping(tmp_path, monkeypatch):
    """Capitals are config keys, names of settings say how to measure, a sweep makes one measurement per value."""
    (tmp_path / "two.yaml").write_text("""
brief: &brief {rounds: 2, dtype: bfloat16}
measurements:
- <<: *brief
  title: "{} x"
  cfg: X.yaml
  sweep: {token_scale: [1, 0.5]}
  ATS.NUM_TOKENS: 1.0
  rounds: 3
  batch_sizes: [4]
  goals: [[ats, efficiency, ">=", 0.5, 4]]
""")
    monkeypatch.setattr(suite, "SUITES", tmp_path)
    whole, half = load_suite("two")
    assert (whole.title, half.title, half.at) == ("1 x", "0.5 x", 0.5)
    assert half.overrides == ["ATS.NUM_TOKENS", 1.0]
    assert half.settings == BenchmarkSettings(rounds=3, dtype="bfloat16", token_scale=0.5)
    assert half.goals == [Goal("ats", "efficiency", ">=", 0.5, batch_size=4)]
    with pytest.raises(UserError, match=r"--suite tow: choose from two. Did you mean two"):
        load_suite("tow")
