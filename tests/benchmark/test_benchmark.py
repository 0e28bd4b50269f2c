"""tools/benchmark.py: imposed counts are the profile's, ratios are what they say, the suite writes its document."""

from __future__ import annotations

import json
import re
import statistics

import pytest
import torch
from helpers import randomise, video_model
from safetensors.torch import save_file

from ats.benchmark import report, suite_items, suites, timing
from ats.benchmark.blocks import block_gflops, token_ratio
from ats.benchmark.counts import PAPER_BLOCKS, PAPER_MEAN, PAPER_STD, ImposedCounts, imposed_counts
from ats.benchmark.memory import peak_megabytes
from ats.benchmark.parts import PARTS, part_seconds
from ats.benchmark.products import LinearCalls
from ats.benchmark.sampler import sampler_rows
from ats.benchmark.timing import Measured, Settings, measure
from ats.benchmark.variants import build_variant
from ats.cli import benchmark as tool
from ats.config import get_cfg, load_config
from ats.datasets import build_dataset
from ats.errors import UserError
from ats.flops import gflops
from ats.models import build_model
from ats.models.timesformer import TimeSformer
from ats.reduction.sampling import BlockSampler, Candidates

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


def test_imposed_counts_scale_and_stay_within_the_budget():
    """Half the profile's tokens where asked for; never more than K."""
    x = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for overrides, scale, want in ((), 0.5, 0.5 * PAPER_MEAN[0]), (("ATS.NUM_TOKENS", 50), 1.0, 50):
        model = build_model(tiny("ATS.BLOCKS", [3], *overrides)).eval()
        with torch.inference_mode(), imposed_counts([model], scale=scale) as counts:
            counts.draw(len(x), seed=1, device=x.device)
            model(x)
            addresses = [wanted.data_ptr() for wanted in counts._wanted.values()]
            counts.draw(len(x), seed=2, device=x.device)
            kept = model.forward_tokens(x)[1][0].num_tokens.double()
        # where a CUDA graph goes on reading
        assert addresses == [wanted.data_ptr() for wanted in counts._wanted.values()] != []
        assert kept.mean().item() == pytest.approx(want, abs=1.5)


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
    assert dense.linear_efficiency == 1
    assert by_name["ats"].linear_efficiency > 0
    assert "linear alone" in report.table(rows)


def test_imposed_counts_in_a_compiled_network():
    """Every draw reaches a compiled graph, also the first after it was compiled."""
    torch._dynamo.reset()
    counts, lengths = ImposedCounts(depth=12), torch.tensor([196, 150])

    def keep(scores):
        about = {"lengths": lengths, "slots": 196, "num_positions": 197, "position": lambda: scores}
        return counts.choose(Candidates(scores, **about), 196, BlockSampler(5, 1.0))

    compiled = torch.compile(keep, backend="aot_eager")
    for seed in range(3):
        counts.draw(2, seed=seed, device=lengths.device)
        with torch.inference_mode():
            kept = compiled(torch.rand(2, 196))
            assert torch.equal(kept, keep(torch.rand(2, 196)))
        wanted = (counts.share_kept(5) * 197).round()
        assert torch.equal(kept.sum(dim=1), wanted.minimum(lengths).long())


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


def test_linear_layers_are_those_of_the_network():
    """All of them, with the rows that are left: their FLOPs are the network's less embedding and attention."""
    torch.manual_seed(0)
    model, x = build_model(tiny("ATS.NUM_TOKENS", 0.5)).eval(), torch.randn(2, 3, 224, 224)
    with torch.inference_mode(), LinearCalls() as linear:
        trace = model.forward_tokens(x)[1]
    kept = {entry.block: entry.num_tokens.double() for entry in trace}
    num_in = torch.full((2,), 197.0, dtype=torch.float64)
    attention = 0
    for block in range(len(model.blocks)):
        num_out = kept.get(block, num_in)
        attention += (2 * num_in * num_out + (num_in if block in kept else 0)).sum().item() * model.embed_dim
        num_in = num_out
    total = gflops(model, trace, x.shape).as_run.sum().item() * 1e9
    assert linear.multiply_adds() + attention + 2 * 196 * model.embed_dim * 768 == pytest.approx(total)
    shapes = [shape for shape, _, _ in linear.calls]
    with LinearCalls() as again:
        linear.again()()
    assert [shape for shape, _, _ in again.calls] == shapes


@pytest.mark.parametrize(
    ("make", "shape", "num_blocks"),
    [
        (lambda: build_model(tiny("ATS.NUM_TOKENS", 0.5)), (2, 3, 224, 224), 12),
        (lambda: video_model("xvit", "ATS.ENABLE", True, dtype=torch.float32), (2, 3, 8, 32, 32), 4),
        (lambda: video_model("divided", "ATS.ENABLE", True, dtype=torch.float32), (2, 3, 8, 32, 32), 4),
        (lambda: build_model(load_config("configs/ImageNet/MViTv2_T_ATS.yaml")), (1, 3, 224, 224), 10),
        (lambda: build_model(load_config("configs/ImageNet/CvT_13_ATS.yaml")), (1, 3, 224, 224), 13),
        (lambda: build_model(load_config("configs/ImageNet/PSViT_Ti_14_ATS.yaml")), (1, 3, 224, 224), 12),
    ],
)
def test_gflops_of_blocks_add_up(make, shape, num_blocks):
    """To the whole less what lies outside the blocks, which the dense network has too."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.inference_mode():
        trace = model.forward_tokens(torch.randn(shape))[1]
    whole = gflops(model, trace, shape)
    for paper, total in ((False, whole.as_run), (True, whole.paper)):
        blocks = torch.stack(block_gflops(model, trace, shape, paper=paper))
        dense = torch.stack(block_gflops(model, [], (1, *shape[1:]), paper=True))
        assert blocks.shape == (num_blocks, shape[0])
        assert (blocks.sum(dim=0) < total).all()
        if not isinstance(model, TimeSformer):  # temporal attention is outside, and has fewer tokens
            torch.testing.assert_close(total - blocks.sum(dim=0), (whole.dense - dense.sum()).expand(shape[0]))


def test_tokens_over_dense_tokens():
    """By hand, from what each block keeps; not where the grid shrinks by itself."""
    model, x = build_model(tiny("ATS.NUM_TOKENS", 0.5)).eval(), torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        trace = model.forward_tokens(x)[1]
    tokens = [197.0] * 3 + [entry.num_tokens.double().mean().item() for entry in trace]
    assert token_ratio(model, trace, x.shape) == pytest.approx(sum(tokens) / (12 * 197))
    assert token_ratio(build_model(load_config("configs/ImageNet/MViTv2_T_ATS.yaml")), [], (1, 3, 224, 224)) is None


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
    assert "they are imposed, drawn for every image from the paper's histograms" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["variant"], row["batch_size"]) for row in results["rows"]] == [
        ("dense", 1), ("ats", 1), ("dense", 2), ("ats", 2),
    ]  # fmt: skip
    assert results["rows"][1]["tokens_per_block"]["11"]["mean"] < 130
    assert "paper's histograms" in results["token_counts"]
    for accounting in ("gflops", "gflops_paper"):
        blocks = results["rows"][1][f"{accounting}_per_block"].values()
        assert len(blocks) == 12
        assert 0.5 < sum(blocks) / results["rows"][1][accounting]["mean"] < 1
    assert (tmp_path / "out" / "speed.png").stat().st_size > 5000
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.startswith("Token counts: no checkpoint")
    assert all(text in table for text in ("efficiency", "tokens kept", "GFLOPs, paper"))


def test_sizes_and_dtypes_without_data(tmp_path, capsys):
    """A table for each image size and dtype, and a plot by size; --synthetic looks for no data."""
    keys = [*map(str, TINY), "DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")]
    keys += ["DATA.PATH_TO_DATA_DIR", str(tmp_path / "nowhere")]
    command = ["--cfg", "configs/ImageNet/DeiT_S.yaml", "--rounds", "1", "--batch-size", "1", *keys]
    assert tool.main([*command, "--synthetic", "--dtype", "float32", "bfloat16", "--image-size", "64", "96"]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["image_size"], row["dtype"], row["variant"]) for row in rows] == [
        (size, dtype, name) for size in (64, 96) for dtype in ("float32", "bfloat16") for name in ("dense", "ats")
    ]
    assert (tmp_path / "out" / "size.png").stat().st_size > 5000
    for text in (capsys.readouterr().out, (tmp_path / "out" / "table.md").read_text()):
        assert text.index("### 64 pixels, float32") < text.index("### 96 pixels, bfloat16")
        assert "is the limit" not in text
    assert tool.main([*command, "--synthetic"]) == 0
    assert tool.main(command) == 1
    assert "nowhere" in capsys.readouterr().err


def test_what_is_measured_is_not_lost(tmp_path, monkeypatch, capsys):
    """The second batch does not fit: the first is printed and written."""
    measure_batch = timing._measure_batch

    def limited(models, x, *args):
        if len(x) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return measure_batch(models, x, *args)

    monkeypatch.setattr(timing, "_measure_batch", limited)
    keys = [*map(str, TINY), "DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")]
    with pytest.raises(torch.OutOfMemoryError):
        tool.main(["--cfg", "configs/ImageNet/DeiT_S.yaml", "--batch-size", "1", "2", "--rounds", "1", *keys])
    assert "dense FLOPs / FLOPs" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["rows"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfg", "configs/ImageNet/DeiT_S.yaml", "--compare", "topq"], "topk"),
        (["--cfg", "configs/ImageNet/DeiT_S_dense.yaml"], "ATS.ENABLE"),
        (["--suite", "cpus"], "Did you mean"),
        (["--cfg", "configs/ImageNet/DeiT_S.yaml", "--accuracy"], "TEST.CHECKPOINT_FILE_PATH"),
        (["--cfg", "configs/ImageNet/MViTv2_T_ATS.yaml", "--compare", "tome"], "not for MODEL.NAME MViT"),
        ([], "Give --cfg FILE, --suite NAME, --decode, --loader, or --train-loop --cfg FILE."),
        (["--suite", "cpu", "DEVICE", "cpu", "--rounds", "15"], "--suite cpu takes no --rounds, KEY VALUE."),
        (["--suite", "cpu", "--cfg", "X.yaml"], "--suite cpu takes no --cfg."),
        (["--decode", "--threads", "1", "--dtype", "float32"], "--decode takes no --threads, --dtype."),
        (["--loader", "--compare", "ats", "--train"], "--loader takes no --compare, --train."),
        (["--train-loop", "--cfg", "X.yaml", "--compile"], "--train-loop takes no --compile."),
        (["--suite", "cpu", "--decode"], "--suite and --decode: one at a time."),
        (["--cfg", "X.yaml", "--image-size", "64", "large"], "argument --image-size: invalid int value: 'large'"),
        (["--cfg", "X.yaml", "--dtypes", "float16"], "Unknown option --dtypes. Did you mean --dtype"),
        (["--cfg", "configs/ImageNet/DeiT_S.yaml", "--batch-size", "0"], "must be at least 1"),
    ],
)
def test_mistakes_get_one_message(arguments, message, capsys):
    """Exit status 1 and what to type."""
    assert tool.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_keys_behind_an_option_with_several_values():
    """They are keys, wherever they stand."""
    command = ["--cfg", "X", "A.B=1", "--batch-size", "1", "8", "DEVICE", "cpu", "--dtype", "float16", "C.D", "-1"]
    args = tool.parse_args(command)
    assert args.overrides == ["A.B", "1", "DEVICE", "cpu", "C.D", "-1"]
    assert (args.batch_size, args.dtype, args.rounds) == ([1, 8], ["float16"], 15)


def test_suite_writes_its_section_and_keeps_the_rest(tmp_path, capsys):
    """The quick suite runs every kind of measurement and draws every plot; text around its section stays, a second run
    replaces it.
    """
    document = tmp_path / "BENCHMARKS.md"
    document.write_text("# Benchmarks\n\nWritten by hand.\n\n<!-- quick -->\nold\n<!-- /quick -->\n\nThe end.\n")
    suites.run_suite("quick", tool.read_batch, folder=tmp_path, document=document)
    text = document.read_text()
    assert text.startswith("# Benchmarks\n\nWritten by hand.")
    assert text.endswith("The end.\n")
    assert "old" not in text
    assert "Tiny ViT, training step" in text
    assert " is the limit: " in text
    results = json.loads((tmp_path / "quick.json").read_text())["measurements"]
    assert len(results) == len(suite_items.quick())
    assert not any(entry["errors"] for entry in results)
    assert [(g["quantity"], g["batch"]) for g in results[0]["goals"]] == [
        ("efficiency", 1), ("share of sampling", 1), ("efficiency", 2), ("share of sampling", 2),
    ]  # fmt: skip
    goals = {(g["variant"], g["quantity"]): g for entry in results for g in entry.get("goals", ())}
    assert {("train", "loader / bare"), ("val", "loader / bare")} <= set(goals)
    memory = goals["ats", "activations / dense"]
    assert 0.5 < memory["measured"] < 1
    assert memory["met"]
    assert "activations / dense" in text
    assert all("imposed" in entry["token_counts"] for entry in results if "rows" in entry)
    assert text.count("imposed, drawn for every image") == 2  # once, and where the counts are others
    for family in ("batch", "image", "clip", "tokens", "sampler"):
        assert (tmp_path / f"quick_{family}.png").stat().st_size > 5000
        assert f"quick_{family}.png" in text
    report.replace_section(document, "another", "new")
    assert document.read_text().endswith("<!-- another -->\nnew\n<!-- /another -->\n")


def test_a_failed_measurement_leaves_the_others(tmp_path, monkeypatch):
    """One batch size does not fit and one table cannot be made: both are named, their tracebacks are in the JSON, the
    rest is measured.
    """
    tiny_vit = ("VIT.EMBED_DIM", 32, "VIT.NUM_HEADS", 2)
    item = suite_items.Measurement("Tiny", "ImageNet/DeiT_S.yaml", Settings(rounds=1, parts=False), (1, 2), tiny_vit)
    broken = suite_items.Extra("Broken", "sampler", {"device": "cpu", "sizes": (-1,), "num_sequences": 1})
    monkeypatch.setitem(suites.SUITES, "quick", lambda: [broken, item])

    def read(cfg, batch_size, side):
        if batch_size == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tool.read_batch(cfg, batch_size, side)

    with pytest.raises(UserError, match="Failed: Broken, sampler; Tiny, batch 1"):
        suites.run_suite("quick", read, folder=tmp_path, document=tmp_path / "BENCHMARKS.md")
    broken, tiny_entry = json.loads((tmp_path / "quick.json").read_text())["measurements"]
    assert "Traceback" in broken["errors"]["sampler"]
    assert "CUDA out of memory" in tiny_entry["errors"]["batch 1"]
    assert [row["batch_size"] for row in tiny_entry["rows"]] == [2, 2]
    assert "**Failed:** batch 1: torch.OutOfMemoryError" in (tmp_path / "BENCHMARKS.md").read_text()


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_network_of_a_suite_can_be_built(name):
    """Configs and overrides exist, variants are known, and dense networks are as large as those with ATS."""
    seen = set()
    for item in suites.SUITES[name]():
        if isinstance(item, suite_items.Extra):
            continue
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
    assert len(seen) >= 8


def test_goals_are_judged_by_what_was_measured():
    """Bounds from below and above, for one batch size or all, and over other variants."""
    goals = (
        suite_items.Goal("ats", "efficiency", 0.85, batch_size=2),
        suite_items.Goal("ats", "dense time / time", 1),
        suite_items.Goal("ats", "share of sampling", 0.1, at_most=True),
        suite_items.Goal("ats", "dense_graph time / time", 2),
    )
    item = suite_items.Measurement("x", "x", Settings(), (1, 2), goals=goals)
    row = Measured("ats", 2, 1.0, seconds=[1.0], ratios=[2.0], flop_ratios=[2.5], parts={"scoring and sampling": 0.2})
    dense, graph = Measured("dense", 2, 1.0, seconds=[2.0]), Measured("dense_graph", 2, 1.0, seconds=[1.5])
    judged = suites._judge(item, row, [dense, row, graph])
    assert [(g["measured"], g["met"]) for g in judged] == [(0.8, False), (2.0, True), (0.2, False), (1.5, False)]
    assert [g["goal"] for g in judged] == [">= 0.85", ">= 1", "<= 0.1", ">= 2"]
    row.activations_mb, dense.activations_mb, row.token_ratio = 7.0, 10.0, 0.65
    training = suite_items.Measurement("x", "x", Settings(), (2,), goals=suite_items.TRAINING[1:])
    [memory] = suites._judge(training, row, [dense, row])
    assert (memory["goal"], memory["measured"], memory["met"]) == ("<= 0.75", 0.7, True)
    dense.batch_size = row.batch_size = graph.batch_size = 1
    assert [g["quantity"] for g in suites._judge(item, row, [dense, row, graph])] == [
        "dense time / time", "share of sampling", "dense_graph time / time",
    ]  # fmt: skip


def test_rounds_stop_when_the_time_is_up():
    """At least three count, however little time there is."""
    rows = measure(tiny("DEVICE", "cpu"), {1: torch.randn(1, 3, 224, 224)}, Settings(rounds=50, max_seconds=0))
    assert [len(row.ratios) for row in rows] == [3, 3]
    assert [len(row.efficiencies) for row in rows] == [3, 3]


def test_half_precision_has_its_weights_in_it():
    """Inference casts the network once, so that no pass pays for it; a graph needs a GPU and is not for training."""
    cfg, x = tiny("DEVICE", "cpu"), {1: torch.randn(1, 3, 224, 224)}
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda _m, _a, out: seen.append(out))
    try:
        measure(cfg, x, Settings(dtype=torch.bfloat16, rounds=1, parts=False))
    finally:
        hook.remove()
    assert {out.dtype for out in seen if isinstance(out, torch.Tensor)} == {torch.bfloat16}
    with pytest.raises(UserError, match="are for inference"):
        measure(cfg, x, Settings(("dense_graph",), train=True))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="PyTorch sees no GPU"):
            measure(cfg, x, Settings(("dense_graph",)))


def test_sampler_alone():
    """A row per size; on a CPU there is the plain version alone."""
    rows = sampler_rows((16, 64), num_sequences=2, device=torch.device("cpu"), rounds=2)
    assert [row["patches"] for row in rows] == [16, 64]
    assert all(row[key] > 0 for row in rows for key in ("sampling ms", "packing ms"))
    assert "plain ms" not in rows[0]
