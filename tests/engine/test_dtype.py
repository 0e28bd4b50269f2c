"""TEST.DTYPE bfloat16: weights and activations, but not scores; of every network, of a run, and of no training."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import randomise
from safetensors.torch import load_file
from test_calibration import NETWORKS, small_vit
from test_timm_config import config
from torch import Tensor, nn

from ats.budget.network import give
from ats.cli import calibrate, run_net
from ats.config import load_config
from ats.datasets import Sample
from ats.engine.evaluate import evaluate
from ats.models import build_model
from ats.models.block import ats_blocks

HALF = torch.bfloat16


def distilled() -> tuple[nn.Module, Tensor, int]:
    return small_vit("VIT.DISTILLED", True), torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), 4


def timm_by_config() -> tuple[nn.Module, Tensor, int]:
    torch.manual_seed(0)
    return randomise(build_model(config())), torch.randn(8, 3, 32, 32), 4


CASES = NETWORKS | {"distilled": distilled, "timm by config": timm_by_config}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """In float32, with four images or clips."""
    model, x, _ = CASES[name]()
    return model.float().eval(), x[:4].float()


@pytest.mark.parametrize("name", CASES)
def test_every_network_evaluates_in_bfloat16(name, one_thread):
    """Samples of any batch size get the same logits to the bit; scores stay float32; the result says the type."""
    model, x = network(name)
    model.to(HALF)
    for block in ats_blocks(model):
        block.record_scores = True
    with torch.inference_mode():
        together, trace = model.forward_tokens(x.to(HALF))
        alone = torch.cat([model.forward_tokens(x[i : i + 1].to(HALF))[0] for i in range(len(x))])
    assert together.dtype == HALF
    assert torch.equal(together, alone)
    scores = [record.candidates.scores for record in trace.records if record.candidates is not None]
    assert scores
    assert {own.dtype for own in scores} == {torch.float32}
    loader = [Sample(x, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x)), [""] * len(x))]
    result = evaluate(model, loader, device=torch.device("cpu"))
    assert (result.dtype, result.num_nonfinite) == ("bfloat16", 0)
    assert {parameter.dtype for parameter in model.parameters()} == {HALF}


@pytest.mark.parametrize("name", CASES)
def test_keeping_all_tokens_is_the_dense_network_within_the_rounding_of_bfloat16(name, one_thread):
    """They differ by no more than twice what bfloat16 changes of the dense network's logits, on average."""
    model, x = network(name)
    setting = tuple(block.reduction for block in ats_blocks(model))
    with torch.inference_mode():
        give(model, ())
        exact = model.forward_tokens(x)[0]
        model.to(HALF)
        dense = model.forward_tokens(x.to(HALF))[0].float()
        give(model, setting)
        for block in ats_blocks(model):
            block.imposed = lambda candidates, _: candidates.valid
        everything, trace = model.forward_tokens(x.to(HALF))
    assert all(int(entry.num_tokens.min()) == int(entry.num_tokens.max()) for entry in trace)
    rounding = (dense - exact).abs().mean()
    assert 0 < rounding < 0.3 * exact.abs().mean()
    assert (everything.float() - dense).abs().mean() <= 2 * rounding


def test_points_of_psvit_stay_float32():
    """bfloat16 would round them to a quarter of a pixel."""
    model, x = network("PSViT")
    with torch.inference_mode():
        model.to(HALF)(x.to(HALF))
    assert model.points.dtype == torch.float32
    assert (model.points != model.points.to(HALF).float()).any()


def test_a_run_trains_in_float32_and_evaluates_its_weights_in_bfloat16(tiny_config, tmp_path, capsys, one_thread):
    """The weights trained are those of a run with float32, to the bit; result.json and the plan say bfloat16."""
    said, weights, results = {}, {}, {}
    for dtype in ("float32", "bfloat16"):
        output = tmp_path / dtype
        command = ["--cfg", str(tiny_config), "TRAIN.ENABLE", "True", "SOLVER.MAX_EPOCH", "1", "TEST.DTYPE", dtype]
        assert run_net.main([*command, "OUTPUT_DIR", str(output)]) == 0
        said[dtype] = capsys.readouterr().err
        weights[dtype] = load_file(output / "model.safetensors")
        results[dtype] = json.loads((output / "result.json").read_text())
        assert results[dtype]["dtype"] == dtype
        assert f", {dtype}\n" in said[dtype]
    assert {value.dtype for value in weights["bfloat16"].values()} == {torch.float32}
    assert all(torch.equal(value, weights["float32"][key]) for key, value in weights["bfloat16"].items())
    assert results["bfloat16"]["gflops"]["mean"] == pytest.approx(results["float32"]["gflops"]["mean"], rel=0.05)


def test_calibration_computes_in_the_type_of_evaluation(tiny_config, tmp_path, monkeypatch):
    torch.save(build_model(load_config(tiny_config)).state_dict(), tmp_path / "weights.pth")
    seen = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: seen.append(x.dtype) or forward(self, x))
    keys = ["TEST.CHECKPOINT_FILE_PATH", str(tmp_path / "weights.pth"), "TEST.DTYPE", "bfloat16"]
    assert calibrate.main(["--cfg", str(tiny_config), "--images", "4", "--keep", "0.7", *keys]) == 0
    assert set(seen) == {HALF}
