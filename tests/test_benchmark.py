"""tools/benchmark.py: imposed counts are the profile's, ratios are what they say, the suite writes its document."""

from __future__ import annotations

import json
import re
import statistics

import pytest
import torch
from helpers import randomise
from safetensors.torch import save_file

from ats.benchmark import report, suites
from ats.benchmark.counts import PAPER_BLOCKS, PAPER_MEAN, PAPER_STD, imposed_counts
from ats.benchmark.memory import peak_megabytes
from ats.benchmark.parts import PARTS, part_seconds
from ats.benchmark.timing import Measured, Settings, measure
from ats.cli import benchmark as tool
from ats.config import get_cfg, load_config
from ats.datasets import build_dataset
from ats.models import build_model

TINY = ["VIT.EMBED_DIM", 32, "VIT.NUM_HEADS", 2, "VIT.MLP_RATIO", 2, "MODEL.NUM_CLASSES", 5, "ATS.ENABLE", True]


def tiny(*overrides: object):
    cfg = get_cfg()
    cfg.merge_from_list([*TINY, *overrides])
    return cfg


def test_imposed_counts_have_the_profiles_mean_and_spread():
    """Blocks 3 to 11 of a random network keep what the paper's histograms say, images in the same order in every
    block; afterwards the network samples as before.
    """
    model = build_model(tiny()).eval()
    x = torch.randn(32, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model.forward_tokens(x[:2])[1]
        with imposed_counts([model]) as counts:
            counts.draw(len(x), seed=1, device=x.device)
            trace = model.forward_tokens(x)[1]
        after = model.forward_tokens(x[:2])[1]
    kept = torch.stack([entry.num_tokens for entry in trace]).double()
    assert [entry.block for entry in trace] == list(PAPER_BLOCKS)
    torch.testing.assert_close(kept.mean(dim=1), torch.tensor(PAPER_MEAN, dtype=torch.float64), atol=1.5, rtol=0)
    torch.testing.assert_close(kept.std(dim=1), torch.tensor(PAPER_STD, dtype=torch.float64), atol=1.5, rtol=0)
    assert (torch.corrcoef(kept) > 0.99).all()
    assert all(torch.equal(a.position, b.position) for a, b in zip(before, after, strict=True))


def test_imposed_counts_go_by_the_networks_depth():
    """A network that samples in blocks 3 and 4 alone keeps there what one that samples everywhere does."""
    model = build_model(tiny("ATS.BLOCKS", [3, 4])).eval()
    x = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), imposed_counts([model]) as counts:
        counts.draw(len(x), seed=1, device=x.device)
        kept = [entry.num_tokens.double().mean().item() for entry in model.forward_tokens(x)[1]]
    assert kept == pytest.approx(PAPER_MEAN[:2], abs=1.5)


def test_measure_reports_every_variant_beside_dense():
    """Times are there for every round, dense is 1 by definition, FLOPs and tokens are the variant's own."""
    cfg = tiny("ATS.NUM_TOKENS", 0.5, "DEVICE", "cpu")
    rows = measure(
        cfg, {2: torch.randn(2, 3, 224, 224)}, Settings(("ats", "topk", "padded"), rounds=3, equal_gflops=False)
    )
    by_name = {row.variant: row for row in rows}
    assert list(by_name) == ["dense", "ats", "topk", "padded"]
    dense, topk = by_name["dense"], by_name["topk"]
    assert dense.ratios == [1, 1, 1]
    assert dense.flop_ratio == dense.efficiency == 1
    assert not dense.tokens
    assert topk.tokens[3] == [98] * len(topk.tokens[3])  # K of 197 slots, not imposed upon
    for row in rows:
        assert len(row.seconds) == 3
        assert min(row.seconds) > 0
        assert sum(row.parts.values()) == pytest.approx(1)
        assert row.flop_ratio == pytest.approx(row.gflops_dense / torch.tensor(row.gflops).mean().item(), rel=0.05)
    assert by_name["ats"].parts["scoring and sampling"] > 0 == dense.parts["scoring and sampling"]
    assert by_name["ats"].gflops == by_name["padded"].gflops


def test_other_methods_cost_what_ats_costs():
    """Their samplers are set so that GFLOPs agree within 2 %, in the blocks where their authors work, and say how;
    ats is measured though it was not asked for.
    """
    torch.manual_seed(0)
    cfg = tiny("DEVICE", "cpu")
    rows = measure(cfg, {8: torch.randn(8, 3, 224, 224)}, Settings(("tome", "evit", "topk", "random"), rounds=1))
    by_name = {row.variant: row for row in rows}
    assert list(by_name) == ["dense", "ats", "tome", "evit", "topk", "random"]
    target = statistics.fmean(by_name["ats"].gflops)
    assert target < 0.75 * by_name["ats"].gflops_dense
    for name in ("tome", "evit", "topk", "random"):
        assert statistics.fmean(by_name[name].gflops) == pytest.approx(target, rel=0.02)
    assert list(by_name["tome"].tokens) == list(range(12))
    assert list(by_name["evit"].tokens) == [3, 6, 9]
    assert re.fullmatch(r"r (\d+, )+\d+ in blocks 0-11|r \d+ in blocks 0-11", by_name["tome"].setting)
    assert re.fullmatch(r"keep rate 0\.\d+ in blocks 3, 6, 9", by_name["evit"].setting)
    assert by_name["ats"].setting == "K 1 in blocks 3-11"


def test_accuracy_is_that_of_the_images_asked_for(tiny_config, tmp_path, capsys):
    """Six images spread over the evaluation data: the share of them that the variant's network gets right."""
    cfg = load_config(str(tiny_config))
    torch.manual_seed(1)
    save_file(randomise(build_model(cfg)).state_dict(), tmp_path / "w.safetensors")
    keys = ["TEST.CHECKPOINT_FILE_PATH", str(tmp_path / "w.safetensors"), "DEVICE", "cpu"]
    keys += ["OUTPUT_DIR", str(tmp_path / "out")]
    command = ["--cfg", str(tiny_config), "--compare", "tome,evit,topk", "--accuracy", "6", "--batch-size", "2"]
    assert tool.main([*command, "--rounds", "1", *keys]) == 0
    assert "top-1 %" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["dense", "ats", "tome", "evit", "topk"]

    cfg = load_config(str(tiny_config), ["ATS.ENABLE", False, *keys])
    dataset = build_dataset(cfg, "test")
    samples = [dataset[index * len(dataset) // 6] for index in range(6)]
    dense = randomise(build_model(cfg)).eval()
    right = dense(torch.stack([s.x for s in samples])).argmax(1) == torch.tensor([s.label for s in samples])
    assert rows[0]["top1"] == pytest.approx(100 * right.double().mean().item())
    assert rows[0]["top1_gflops"] == rows[0]["gflops_dense"]
    assert all(0 <= row["top1"] <= 100 for row in rows)


def test_peak_memory_counts_what_is_alive():
    """Weights, and two of the three activations of 1 MB each: the first is freed before the third is made."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000, bias=False) for _ in range(3))).requires_grad_(False)
    x = torch.zeros(250, 1000)
    peak = peak_megabytes(lambda: model(x), model, torch.device("cpu"))
    assert peak == pytest.approx(3 * 4 + 2)


def test_training_reports_what_backward_keeps():
    """Fewer tokens, less kept for the backward pass; both passes are timed."""
    cfg = tiny("DEVICE", "cpu")
    rows = measure(cfg, {2: torch.randn(2, 3, 224, 224)}, Settings(train=True, rounds=2))
    assert 0 < rows[1].saved_mb < rows[0].saved_mb


def test_parts_add_up_and_leave_the_network_alone():
    """Each named part takes time, the model computes what it did before."""
    model = build_model(tiny()).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        want = model(x)
        seconds = part_seconds(model, x, rounds=1)
        assert torch.equal(model(x), want)
    assert set(seconds) == set(PARTS)
    assert seconds.pop("scatter and gather") == 0  # a ViT has no use for the grid
    assert min(seconds.values()) > 0


def test_efficiency_is_time_ratio_over_flop_ratio():
    """By hand: twice as fast for a quarter of the FLOPs is one half."""
    row = Measured("ats", 1, 1.0, ratios=[2.0, 2.0, 4.0], flop_ratios=[4.0, 4.0, 4.0])
    assert row.speedup == 2
    assert row.efficiency == 0.5


def test_command_writes_json_table_and_plot(tmp_path, capsys):
    """The whole command on a tiny network."""
    keys = [*map(str, TINY), "DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")]
    command = ["--cfg", "configs/ImageNet/DeiT_S.yaml", "--batch-size", "1", "2", "--rounds", "2", *keys]
    assert tool.main(command) == 0
    assert "paper's histograms" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["variant"], row["batch_size"]) for row in results["rows"]] == [
        ("dense", 1), ("ats", 1), ("dense", 2), ("ats", 2),
    ]  # fmt: skip
    assert results["rows"][1]["tokens_per_block"]["11"]["mean"] < 130
    assert (tmp_path / "out" / "speed.png").stat().st_size > 5000
    assert "efficiency" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfg", "configs/ImageNet/DeiT_S.yaml", "--compare", "topq"], "topk"),
        (["--cfg", "configs/ImageNet/DeiT_S_dense.yaml"], "ATS.ENABLE"),
        (["--suite", "cpus"], "Did you mean"),
        (["--cfg", "configs/ImageNet/DeiT_S.yaml", "--accuracy"], "TEST.CHECKPOINT_FILE_PATH"),
        (["--cfg", "configs/ImageNet/MViTv2_T_ATS.yaml", "--compare", "tome"], "not for MODEL.NAME MViT"),
    ],
)
def test_mistakes_get_one_message(arguments, message, capsys):
    """Exit status 1 and what to type."""
    assert tool.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_suite_writes_its_section_and_keeps_the_rest(tmp_path):
    """The quick suite runs every kind of measurement; text around its section stays, a second run replaces it."""
    document = tmp_path / "BENCHMARKS.md"
    document.write_text("# Benchmarks\n\nWritten by hand.\n\n<!-- quick -->\nold\n<!-- /quick -->\n\nThe end.\n")
    suites.run_suite("quick", tool.read_batch, folder=tmp_path, document=document)
    text = document.read_text()
    assert text.startswith("# Benchmarks\n\nWritten by hand.")
    assert text.endswith("The end.\n")
    assert "old" not in text
    assert "Tiny ViT, training step" in text
    assert len(json.loads((tmp_path / "quick.json").read_text())["measurements"]) == 3
    report.replace_section(document, "another", "new")
    assert document.read_text().endswith("<!-- another -->\nnew\n<!-- /another -->\n")
