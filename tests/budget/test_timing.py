"""A budget of time, on a clock that the networks' blocks move: what is found does not depend on the machine."""

from __future__ import annotations

import copy
import random
import re

import pytest
import torch
import transformers_models
from test_calibration import NETWORKS, images, small_timm, small_vit
from torch import nn

import ats
import ats.engine.evaluate
import ats.interleave
from ats.budget import timing
from ats.budget.network import give
from ats.cli import calibrate as tool
from ats.config import load_config
from ats.errors import UserError
from ats.models import build_model
from ats.models.block import ATSBlock, ats_blocks
from ats.tokens import RaggedTokens

BLOCKS = ["ATS.BLOCKS", [1, 2, 3]]


class Clock:
    """Seconds: a block takes one per image and token that leaves it, and `overhead` per image if it drops tokens."""

    def __init__(self, overhead: float = 0.0, noise: float = 0.0) -> None:
        self.now, self.overhead, self.noise, self.random = 0.0, overhead, noise, random.Random(0)

    def __call__(self) -> float:
        return self.now

    def drive(self, model: nn.Module) -> nn.Module:
        """Let the blocks of a model move the clock."""
        for block in model.block_list() if hasattr(model, "block_list") else model.blocks:
            block.register_forward_hook(self._after)
        return model

    def _after(self, block: nn.Module, _: object, out: torch.Tensor | RaggedTokens) -> None:
        is_packed = isinstance(out, RaggedTokens)
        tokens = out.layout.total if is_packed else len(out) * out.shape[1]
        num_images = out.layout.num_sequences if is_packed else len(out)
        took = tokens + num_images * (0.5 * is_packed + self.overhead * (getattr(block, "reduction", None) is not None))
        self.now += took * self.random.uniform(1 - self.noise, 1 + self.noise)

    def seconds(self, model: nn.Module, x: torch.Tensor) -> float:
        """Of a pass."""
        begin = self.now
        with torch.inference_mode():
            model(x)
        return self.now - begin


@pytest.fixture
def clock(monkeypatch, one_thread):
    """A clock, which needs no rounds where it has no noise."""
    clock = Clock()
    monkeypatch.setattr(ats.interleave, "timer", clock)
    for module, name in ((ats.interleave, "NUM_WARMUP"), (timing, "ROUNDS"), (timing, "FINAL_ROUNDS")):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(ats.interleave, "MIN_ROUNDS", 1)
    return clock


def calibrate(model: nn.Module, x: torch.Tensor, **options: object) -> ats.budget.Calibration:
    return ats.calibrate(model, x, progress=False, **options)


@pytest.mark.parametrize(("batch_size", "noise"), [(1, 0.0), (5, 0.0), (4, 0.05)])
def test_the_time_is_met_on_all_images_from_a_few_timed_ones(clock, monkeypatch, batch_size, noise):
    """By the ratio over all images, of which at most 5 were timed; on a noisy clock, too."""
    model, x = clock.drive(small_vit(*BLOCKS)), images(64)
    clock.noise = noise
    if noise:
        monkeypatch.setattr(timing, "ROUNDS", 7)
        monkeypatch.setattr(timing, "FINAL_ROUNDS", 25)
    found = calibrate(model, x, speedup=1.5, measure="time", timed_batch_size=batch_size)
    dense = clock.drive(small_vit("ATS.ENABLE", False))
    clock.noise = 0
    ratio = clock.seconds(dense, x) / clock.seconds(model, x)
    assert ratio == pytest.approx(1.5, rel=0.03 + noise)
    assert found.timing.is_met
    assert found.timing.speedup == pytest.approx(ratio, rel=0.03 + noise)
    assert found.timing.expected_ms == pytest.approx(found.timing.ms, rel=0.02 + noise)
    assert [block.reduction for block in ats_blocks(model)] == list(found.setting)


def test_a_latency_in_milliseconds_of_a_batch(clock):
    """Dense, an image takes 4 blocks times 65 tokens: 260 seconds here."""
    model, x = clock.drive(small_vit(*BLOCKS)), images(32)
    found = calibrate(model, x, latency_ms=2 * 200e3, timed_batch_size=2)
    assert found.timing.dense_ms == pytest.approx(520e3)
    assert found.timing.ms == pytest.approx(400e3, rel=0.03)


def test_the_set_of_blocks_that_changes_the_logits_least_is_taken(clock):
    """Sets are as documented; changes are those from the dense network's own logits, the smallest one's is kept."""
    model, x = clock.drive(small_vit("VIT.DEPTH", 8, "ATS.BLOCKS", [1, 2, 4, 5, 6])), images(24)
    found = calibrate(model, x, speedup=1.2, measure="time")
    tried = {tuple(reduction.block for reduction in own.setting): own for own in found.timing.tried}
    assert list(tried) == [(1, 2, 4, 5, 6), (1, 4, 6), (1, 5), (1,)]
    dense = small_vit("VIT.DEPTH", 8, "ATS.ENABLE", False)(x).softmax(-1)
    for own in tried.values():
        assert own.share == pytest.approx(1 / 1.2, rel=0.025)
        give(model, own.setting)
        assert own.change == pytest.approx((model(x).softmax(-1) - dense).abs().sum(-1).mean().item() / 2)
    best = min(tried.values(), key=lambda own: own.change)
    assert found.blocks == tuple(reduction.block for reduction in best.setting)
    assert found.found is best.found


def test_fewer_blocks_where_each_costs_more_than_it_saves(clock):
    """Every ATS block takes 60 seconds more, a token of a block one: all five take more than they save."""
    clock.overhead = 60
    model = clock.drive(small_vit("VIT.DEPTH", 8, "ATS.BLOCKS", [1, 2, 3, 4, 5]))
    found = calibrate(model, images(12), speedup=2.2, measure="time")
    assert [own.setting[-1].block for own in found.timing.tried] == [1]
    assert found.blocks == (1,)
    assert found.timing.is_met
    assert found.per_block[2:] == [1.0] * 6


@pytest.mark.parametrize("budget", [{"speedup": 1.5, "measure": "time"}, {"latency_ms": 1.0}])
def test_where_nothing_is_faster_the_network_is_left_dense(clock, budget):
    """Its blocks are those of the dense network, with its numbers to the bit; the config says ATS.ENABLE False."""
    clock.overhead = 1000
    model, dense, x = clock.drive(small_vit(*BLOCKS)), clock.drive(small_vit("ATS.ENABLE", False)), images(8)
    found = calibrate(model, x, **budget)
    assert found.is_dense
    assert re.fullmatch(r"no setting is faster here: the fastest takes [\d.]+ times .*", found.timing.why_dense)
    assert (found.timing.speedup, found.timing.is_met) == (1.0, False)
    assert found.spread()["mean"] == pytest.approx(found.dense)
    assert found.yaml() == "ATS:\n  ENABLE: false\n"
    assert [type(block) for block in model.blocks] == [type(block) for block in dense.blocks]
    assert torch.equal(model(x), dense(x))
    assert clock.seconds(model, x) == clock.seconds(dense, x)


@pytest.mark.parametrize("stages", [False, True])
def test_a_patched_model_is_left_dense_and_can_have_ats_again(clock, stages):
    """`model.ats` is still there and says that no block samples; its blocks are timm's own."""
    clock.overhead = 1000
    model, x = small_timm(), images(8)
    want = model(x)
    wanted = {"stages": [{"blocks": [1, 3], "num_tokens": 20}]} if stages else {"blocks": [1, 3], "num_tokens": 20}
    ats.patch(clock.drive(model), **wanted)
    before = model(x)
    found = calibrate(model, x, latency_ms=1.0)
    assert found.is_dense
    assert not any(isinstance(block, ATSBlock) for block in model.blocks)
    assert torch.equal(model(x), want)
    assert model.ats.settings["stages" if stages else "blocks"] == []
    for name, value in wanted.items():
        setattr(model.ats, name, value)
    assert torch.equal(model(x), before)
    ats.unpatch(model)
    assert torch.equal(model(x), want)


def test_the_handle_of_a_patched_model_has_the_blocks_found(clock):
    clock.overhead = 40
    model = ats.patch(clock.drive(small_timm()), blocks=[1, 2, 3])
    found = calibrate(model, images(16), speedup=1.1, measure="time")
    assert model.ats.blocks == list(found.blocks)
    assert len(found.blocks) < 3
    assert model.ats.num_tokens == found.per_block
    want = model(images(4))
    model.ats.num_tokens = found.per_block
    assert torch.equal(model(images(4)), want)


def test_a_budget_that_dense_meets_leaves_it_dense(clock):
    model = clock.drive(small_vit(*BLOCKS))
    found = calibrate(model, images(8), latency_ms=270e3)
    assert (found.is_dense, found.timing.is_met) == (True, True)
    assert found.timing.why_dense == "it meets the budget without ATS"


@pytest.mark.parametrize("name", ["speedup", "latency_ms"])
def test_a_time_out_of_reach_names_the_range_and_leaves_the_network_alone(clock, name):
    """The far end of the range is in reach, beyond it the message comes again."""
    model, x = clock.drive(small_vit(*BLOCKS, "ATS.NUM_TOKENS", 20)), images(16)
    before = [block.reduction for block in ats_blocks(model)]
    options = {"measure": "time"} if name == "speedup" else {}
    with pytest.raises(UserError, match=f"^{name} .* cannot be met with ATS in blocks 1, 2, 3") as error:
        calibrate(model, x, **{name: 50}, **options)
    assert [block.reduction for block in ats_blocks(model)] == before
    low, high = map(float, re.search(rf"Give {name} from ([\d.e+]+) to ([\d.e+]+);", str(error.value)).groups())
    end, sign = (high, 1) if name == "speedup" else (low, -1)
    assert calibrate(model, x, **{name: end}, **options).timing.is_met
    with pytest.raises(UserError, match="cannot be met"):
        calibrate(model, x, **{name: end * (1 + 0.05 * sign)}, **options)


@pytest.mark.parametrize(("few", "many"), [(0, 20), (20, 0)])
def test_many_rounds_correct_what_few_rounds_say(clock, monkeypatch, few, many):
    """Every ATS block takes so many seconds more while settings are sought, and while the one found is timed."""
    labels = []

    def interleave_otherwise(runs, *, label, **options):
        labels.append(label)
        clock.overhead = many if label == "the setting found" else few
        return interleave(runs, label=label, **options)

    interleave = ats.interleave.interleave
    monkeypatch.setattr(timing, "interleave", interleave_otherwise)
    found = calibrate(clock.drive(small_vit(*BLOCKS)), images(32), speedup=1.5, measure="time")
    assert labels.count("the setting found") > 1
    assert found.timing.speedup == pytest.approx(1.5, rel=0.025)
    [first] = [own for own in found.timing.tried if len(own.setting) == len(found.setting)]
    assert (found.found.keep.mean() < first.found.keep.mean()) == (few < many)


@pytest.mark.parametrize("name", [*NETWORKS, "transformers"])
def test_every_network_becomes_dense_and_has_its_reductions_again(name):
    """Dense as its blocks are: only the divided TimeSformer's dense blocks are ATSBlocks, too."""
    if name == "transformers":
        model, x = transformers_models.small_model("dinov2 giant"), transformers_models.images(2, side=64)
        ats.patch(model, blocks=[1, 2])
    else:
        model, x, _ = NETWORKS[name]()
        x = x[:2]
    setting = tuple(block.reduction for block in ats_blocks(model))
    with torch.inference_mode():
        before, trace = model.forward_tokens(x)
        give(model, ())
        dense, empty = model.forward_tokens(x)
        assert (len(trace), len(empty)) == (len(setting), 0)
        assert any(isinstance(block, ATSBlock) for block in model.block_list()) == ("divided" in name)
        give(model, setting[1:])
        assert [entry.block for entry in model.forward_tokens(x)[1]] == [own.block for own in setting[1:]]
        give(copy.deepcopy(model), ())
        give(model, setting)
        assert torch.equal(model.forward_tokens(x)[0], before)
    assert not torch.allclose(dense, before)


def test_command_writes_a_config_with_the_blocks_found_or_without_ats(
    clock, tiny_config, tmp_path, capsys, monkeypatch
):
    """Both build; without ATS the reason is in the file, and the status is 0."""
    torch.save(build_model(load_config(tiny_config)).state_dict(), tmp_path / "weights.pth")
    build = ats.engine.evaluate.build_trained
    monkeypatch.setattr(ats.engine.evaluate, "build_trained", lambda *given, **own: clock.drive(build(*given, **own)))
    command = ["--cfg", str(tiny_config), "--images", "16", "--batch-size", "2", "--threads", "1"]
    keys = ["TEST.CHECKPOINT_FILE_PATH", str(tmp_path / "weights.pth")]
    for overhead, budget in ((0, ["--time-speedup", "1.3"]), (1000, ["--latency-ms", "3"])):
        clock.overhead, output = overhead, tmp_path / f"{overhead}.yaml"
        assert tool.main([*command, *budget, "--output", str(output), *keys]) == 0
        printed, cfg, text = capsys.readouterr().out, load_config(output), output.read_text()
        assert "time of a batch of 2, cpu, 1 thread" in printed
        assert len(ats_blocks(build_model(cfg))) == (0 if overhead else len(cfg.ATS.BLOCKS))
        if overhead:
            assert "# The network is left dense: no setting is faster here" in text
            assert re.search(r"budget +3 ms: missed", printed)
        else:
            assert re.search(r"measured +[\d.e+]+ ms, 1\.[34]\d* times as fast as dense", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speedup": 2, "measure": "seconds"}, "measure seconds: choose from gflops, time"),
        ({"gflops": 2, "measure": "time"}, "measure time does not go with gflops"),
        ({"latency_ms": 2, "measure": "gflops"}, "measure gflops does not go with latency_ms"),
        ({"latency_ms": 2, "refine_rounds": 1}, "Refining keeps the GFLOPs, not the time"),
        ({"latency_ms": 2, "timed_batch_size": 0}, "timed_batch_size 0: give a whole number from 1"),
        ({"latency_ms": 2, "threads": 0}, "threads 0: give a whole number from 1"),
        ({"latency_ms": 0}, "latency_ms 0: a budget is above 0"),
    ],
)
def test_mistakes_of_a_call(arguments, message):
    with pytest.raises(UserError, match=message):
        calibrate(small_vit(), images(2), **arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "0.5", "--threads", "1"], "--threads affects only timing"),
        (["--speedup", "1.5", "--batch-size", "1"], "--batch-size affects only timing"),
        (["--latency-ms", "5", "--refine"], "--refine keeps the GFLOPs, not the time"),
        (["--latency-ms", "5", "--time-speedup", "2"], "not allowed with argument"),
    ],
)
def test_mistakes_on_the_command_line(capsys, words, message):
    assert tool.main(["--cfg", "configs/Digits/DeiT_ATS.yaml", *words]) == 1
    assert message in capsys.readouterr().err
