"""Engines compute what PyTorch computes, and what they take is compared with the fastest dense one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_vit import tiny

from ats.benchmark import engines
from ats.benchmark.peers import Peer, Peers, measure_peers
from ats.benchmark.timing import BenchmarkSettings
from ats.cli.benchmark import main, parse_args
from ats.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = ("DEVICE", "cpu", "VIT.DEPTH", 2, "VIT.IMG_SIZE", 64, "DATA.TEST_CROP_SIZE", 64, "ATS.BLOCKS", [1])


def peers_of(batch_size: int, *names: str, dtype: str = "float32") -> Peers:
    settings = BenchmarkSettings(rounds=1, threads=1, dtype=dtype)
    x = torch.randn(batch_size, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    [table] = measure_peers(tiny(*SMALL), {batch_size: x}, settings, names)
    return table


def test_every_file_engine_computes_the_logits_of_pytorch():
    """Dense, static and adaptive files, so what is timed is right. PyTorch itself has no difference."""
    table = peers_of(1, "PyTorch", "ONNX Runtime", "OpenVINO")
    files = ("dense", "ats static", "ats adaptive")
    want = [("dense", "PyTorch"), ("ats", "PyTorch")]
    want += [(network, engine) for engine in ("ONNX Runtime", "OpenVINO") for network in files]
    assert [(row.network, row.engine) for row in table.rows] == want
    assert [row.difference for row in table.rows[:2]] == [0, 0]
    assert all(row.difference < 1e-4 for row in table.rows)
    assert table.flop_ratio > 1.05
    assert not table.left_out


def test_the_compiled_network_computes_the_logits_of_the_eager_one():
    """With the weights as constants, a setting that is not left behind. In a process of its own: where many engines had
    run before, compiling has ended the process.
    """
    script = """
import torch
from torch import nn
from ats.benchmark import engines
model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(2, 8)
run = engines.compiled(model, x, threads=1)
torch.testing.assert_close(run(), model(x).detach())
assert not torch._inductor.config.freezing
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_both_efficiencies_by_hand():
    """Engine B is twice as fast dense. There ATS takes 4 of 8 ms with half the FLOPs; in A it takes 8 of 16."""
    rows = [
        Peer("dense", "A", 0.0, [0.016] * 3),
        Peer("ats", "A", 0.0, [0.008] * 3),
        Peer("dense", "B", 0.0, [0.008, 0.008, 0.016]),
        Peer("ats", "B", 0.0, [0.005, 0.005, 0.010]),
        Peer("ats", "C", 0.0, [0.010] * 3),
    ]
    table = Peers(1, "float32", 2, "Counts.", 2.0, rows, ["D: not installed; type: pip install d"])
    assert table.fastest_dense is rows[2]
    lines = table.judged()
    assert [line["dense time / time"] for line in lines] == [1, 2, 1, 1.6, None]
    assert [line["efficiency"] for line in lines] == [1, 1, 1, 0.8, None]
    assert [line["absolute efficiency"] for line in lines] == pytest.approx([0.5, 0.5, 1, 0.8, 0.4])
    assert [line["ms"] for line in lines] == pytest.approx([16, 8, 8, 5, 10])
    assert table.summary() == (
        "Fastest dense: B, 8 ms. Best ATS: ats in B, 5 ms: 1.60 times as fast for 2.00 times fewer FLOPs, "
        "absolute efficiency 0.80."
    )
    assert "Batch 1, float32, 2 threads. Counts." in table.text()
    assert "* Left out: D: not installed; type: pip install d." in table.text()


def test_what_cannot_run_is_named_and_left_out(monkeypatch):
    """A package that is missing, a compiler that is missing, an engine that fails; the rest is measured."""
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "onnxruntime" else name)
    monkeypatch.setenv("CXX", "no-such-compiler")
    fail = engines.Engine(lambda model, x, threads: 1 / 0, engines.BOTH, ("dense",), reads_file=False)
    monkeypatch.setitem(engines.ENGINES, "Broken", fail)
    table = peers_of(2, "PyTorch", "PyTorch compiled", "ONNX Runtime", "Broken")
    assert [(row.network, row.engine) for row in table.rows] == [("dense", "PyTorch"), ("ats", "PyTorch")]
    assert table.left_out == [
        "ONNX Runtime: not installed; type: pip install onnxruntime",
        "dense in PyTorch compiled: there is no C++ compiler no-such-compiler; type: apt-get install g++",
        "dense in Broken: ZeroDivisionError: division by zero",
    ]


def test_openvino_computes_bfloat16_where_the_cpu_has_it(monkeypatch):
    """Elsewhere its default is float32, which does not belong beside bfloat16, and the table says so."""
    assert engines.default_precision() in ("float32", "bfloat16")
    monkeypatch.setattr(engines, "default_precision", lambda: "bfloat16")
    assert not engines.obstacle("OpenVINO default")
    monkeypatch.setattr(engines, "default_precision", lambda: "float32")
    table = peers_of(1, "PyTorch", "OpenVINO", "OpenVINO default", dtype="bfloat16")
    assert [(row.network, row.engine) for row in table.rows] == [("dense", "PyTorch"), ("ats", "PyTorch")]
    assert all(1e-4 < row.difference < 0.1 for row in table.rows)
    [reason] = table.left_out
    assert "OpenVINO computes in float32 by default on this CPU" in reason
    with pytest.raises(UserError, match="--dtype float16: choose from float32, bfloat16"):
        peers_of(1, dtype="float16")


def test_the_command_writes_one_table_per_batch(tmp_path, monkeypatch, capsys):
    """--peers for a config: tables on the screen and in OUTPUT_DIR; options of other measurements are refused."""
    names = ("PyTorch",)
    monkeypatch.setattr("ats.benchmark.peers.measure_peers.__defaults__", (names,))
    words = ["VIT.EMBED_DIM", "32", "VIT.NUM_HEADS", "2", *map(str, SMALL), "OUTPUT_DIR", str(tmp_path)]
    line = ["--cfg", "configs/ImageNet/DeiT_S.yaml", "--peers", "--threads", "1", "--rounds", "1", *words]
    assert main([*line, "--batch-size", "1", "2"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["peers"]
    assert [table["batch_size"] for table in found] == [1, 2]
    assert all(table["judged"][1]["absolute efficiency"] > 0 for table in found)
    assert "Fastest dense: PyTorch" in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text().count("Fastest dense") == 2
    with pytest.raises(UserError, match="--peers takes no --train"):
        parse_args(["--cfg", "x.yaml", "--peers", "--train"])
