"""tools/benchmark.py: what it writes, and what it says of mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import randomise
from safetensors.torch import save_file
from tiny_vit import TINY

from ats.benchmark import timing
from ats.cli import benchmark as tool
from ats.config import load_config
from ats.datasets import build_dataset
from ats.models import build_model


def test_command_writes_json_table_and_plot(tmp_path, capsys):
    """The whole command on a tiny network."""
    keys = [*map(str, TINY), "DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")]
    command = ["--cfg", "configs/ImageNet/DeiT_S.yaml", "--batch-size", "1", "2", "--rounds", "2", *keys]
    assert tool.main(command) == 0
    said = capsys.readouterr().out
    assert "Token counts: imposed, drawn for every image from the paper's histograms" in said
    assert f"Threads: {torch.get_num_threads()}\n" in said
    assert "At 1, time falls as much as FLOPs do." in said
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
    assert table.startswith("Token counts: imposed")
    assert all(text in table for text in ("efficiency", "tokens kept", "GFLOPs, paper"))


def test_the_widest_range():
    """Of all rows, relative to its lower end: what a warning about a busy machine goes by."""
    rows = [{"speedup": {"p5": low, "p95": high}} for low, high in ((1.0, 1.0), (4.0, 5.0), (0.5, 0.9))]
    assert tool.widest_range([{"rows": rows[:1]}, {"rows": rows[1:]}]) == (0.5, 0.9)


def test_sizes_and_dtypes_without_data(tmp_path, capsys):
    """A table for each image size and dtype, and a plot by size; --synthetic does not look for data."""
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
    assert tool.main([*command, "--synthetic"]) == 0
    assert tool.main(command) == 1
    assert "nowhere" in capsys.readouterr().err


def test_accuracy_is_that_of_the_images_asked_for(tiny_config, tmp_path, capsys):
    """Six images spread over the evaluation data: the share that the variant's network gets right."""
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
        (["--cfg", "configs/ImageNet/MViTv2_T_ATS.yaml", "--compare", "tome"], "tome: not for MViT"),
        ([], "Give --cfg FILE or --suite NAME."),
        (["--suite", "cpu", "DEVICE", "cpu", "--rounds", "15"], "--suite cpu takes no --rounds, KEY VALUE."),
        (["--suite", "cpu", "--cfg", "X.yaml"], "--suite cpu takes no --cfg."),
        (
            ["--decode", "my videos", "A.B", "1"],
            "--decode has moved. Type in a clone: python tools/perf/decoding.py 'my",
        ),
        (["--loader=X", "--rounds", "2"], "python tools/perf/loading.py X --rounds 2"),
        (["--train-loop", "--cfg", "X.yaml"], "python tools/perf/train_loop.py --cfg X.yaml"),
        (["--cfg", "X.yaml", "--image-size", "64", "large"], "argument --image-size: invalid int value: 'large'"),
        (["--cfg", "X.yaml", "--dtypes", "float16"], "Unknown option --dtypes. Did you mean --dtype"),
        (["--cfg", "configs/ImageNet/DeiT_S.yaml", "--batch-size", "0"], "give a whole number from 1 to 65536, not 0"),
    ],
)
def test_mistakes_get_one_message(arguments, message, capsys):
    """Exit status 1 and what to type."""
    assert tool.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_keys_behind_an_option_with_several_values():
    """They are keys, wherever they are."""
    command = ["--cfg", "X", "A.B=1", "--batch-size", "1", "8", "DEVICE", "cpu", "--dtype", "float16", "C.D", "-1"]
    args = tool.parse_args(command)
    assert args.overrides == ["A.B", "1", "DEVICE", "cpu", "C.D", "-1"]
    assert (args.batch_size, args.dtype, args.rounds) == ([1, 8], ["float16"], 15)
