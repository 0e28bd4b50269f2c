"""Training loop and evaluation: schedules, steps, resuming, faults, results."""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import assert_same, read_log
from torch import nn

from ats.checkpoint import load_checkpoint, read_metadata, save_safetensors
from ats.cli.run_net import run
from ats.config import SHIPPED, CfgNode, get_cfg, load_config
from ats.datasets import Sample, build_loader, input_shape
from ats.engine import checkpointing, evaluate, train
from ats.engine.device import data_parallel, seed_everything, select_device
from ats.engine.output import config_sha256, log_to_file, setup_logging
from ats.engine.step import Recipe, StepStats, build_optimizer, clip_gradients, lr_schedule, set_lr
from ats.engine.train_log import BadFiles, TrainLog
from ats.errors import UserError
from ats.models import build_model

CPU = torch.device("cpu")
SGD = ("SOLVER.OPTIMIZING_METHOD", "sgd", "SOLVER.BASE_LR", "0.1")

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- optimizer and schedule


def schedule_of(**solver):
    """The schedule of these keys of SOLVER; the other learning rates are 1 (BASE_LR) and 0."""
    cfg = get_cfg()
    cfg.SOLVER.update({"BASE_LR": 1.0, "COSINE_END_LR": 0.0, "WARMUP_START_LR": 0.0} | solver)
    return lr_schedule(cfg)


@pytest.mark.parametrize(
    ("progress", "after_warmup", "expected"),
    [
        (0, True, 0.1),
        (1, True, 0.1 + 0.9 / 4),
        (4, True, 1.0),
        (7, True, 0.2 + 0.8 * 0.5),  # halfway from 4 to 10
        (10, True, 0.2),
        (5, False, 0.2 + 0.8 * 0.5),  # halfway from 0 to 10
        (7.5, False, 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2),  # cos(3/4 pi)
        (2, False, (0.1 + 0.2 + 0.4 * (1 + math.cos(0.4 * math.pi))) / 2),  # halfway to the cosine's value at 4
    ],
)
def test_lr_cosine(progress, after_warmup, expected):
    schedule = schedule_of(
        MAX_EPOCH=10, COSINE_END_LR=0.2, WARMUP_EPOCHS=4, WARMUP_START_LR=0.1, COSINE_AFTER_WARMUP=after_warmup
    )
    assert schedule(progress) == pytest.approx(expected, rel=1e-12)


def test_lr_constant_and_warmup_longer_than_training():
    constant = schedule_of(MAX_EPOCH=10, WARMUP_EPOCHS=2, LR_POLICY="constant")
    assert (constant(7), constant(1)) == (1.0, 0.5)
    assert schedule_of(MAX_EPOCH=2, WARMUP_EPOCHS=4)(1) == 0.25


def test_no_weight_decay_on_norms_biases_positions_and_prefix(make_cfg):
    model = build_model(make_cfg())
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def decayed(cfg):
        groups = build_optimizer(model, cfg).param_groups
        return {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"]}

    matrices = {name for name, p in model.named_parameters() if p.ndim > 1 and name not in ("pos_embed", "cls_token")}
    assert decayed(make_cfg()) == matrices
    assert decayed(make_cfg("SOLVER.ZERO_WD_1D_PARAM", "False")) == set(names.values())


def test_layer_decay(make_cfg):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            self.head = nn.Linear(2, 2)

        def group_matcher(self, coarse: bool = False) -> dict:
            return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    cfg = make_cfg("SOLVER.LAYER_DECAY", "0.5")
    model = Net()
    optimizer = build_optimizer(model, cfg)
    set_lr(optimizer, 0.8)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.blocks[1].weight)] == pytest.approx(2 * rates[id(model.blocks[0].weight)])
    assert rates[id(model.head.weight)] == pytest.approx(0.8)
    with pytest.raises(UserError, match="LAYER_DECAY"):
        build_optimizer(nn.Linear(2, 2), cfg)


def test_unknown_optimizer_suggests_the_closest(make_cfg):
    with pytest.raises(UserError, match=r"adamww.*Did you mean.*adamw"):
        build_optimizer(nn.Linear(2, 2), make_cfg("SOLVER.OPTIMIZING_METHOD", "adamww"))


def test_a_bad_optimizer_setting_is_not_blamed_on_the_name():
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR = -1.0  # bypasses the range check
    with pytest.raises(UserError, match="settings of SOLVER: Invalid learning rate") as error:
        build_optimizer(nn.Linear(2, 2), cfg)
    assert "Did you mean" not in str(error.value)


def test_clip_gradients():
    def parameters():
        params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
        params[0].grad, params[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
        return params

    params = parameters()
    assert clip_gradients(params).item() == 5
    assert params[1].grad.item() == 4
    assert clip_gradients(params, max_norm=1.0).item() == 5
    assert params[1].grad.item() == pytest.approx(0.8, rel=1e-4)
    params = parameters()
    clip_gradients(params, max_value=2.0)
    assert [params[0].grad[0].item(), params[1].grad.item()] == [2, 2]


# ---- one step


def make_step(cfg: CfgNode):
    """The training state, and a function that makes a step on a batch."""
    state = train.build_state(cfg, CPU)
    recipe, forward = Recipe(cfg), data_parallel(state.model)

    def step(x, target):
        return train.train_step(forward, x, target, state, recipe)

    return state, step


def random_batch(size: int = 10):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(4, (size,), generator=generator)


@pytest.mark.parametrize("num_chunks", [2, 4, 10])  # 4 chunks of 10 samples: 3, 3, 3, 1
def test_accumulated_step_equals_a_single_pass(make_cfg, num_chunks):
    whole, step = make_step(make_cfg(*SGD))
    stats = step(*random_batch())
    chunked, step = make_step(make_cfg(*SGD, "TRAIN.GRAD_ACCUM_STEPS", str(num_chunks)))
    chunked_stats = step(*random_batch())
    assert chunked_stats.loss == pytest.approx(stats.loss, abs=1e-6)
    assert chunked_stats.grad_norm == pytest.approx(stats.grad_norm, rel=1e-5)
    assert chunked_stats.tokens == pytest.approx(stats.tokens, rel=1e-6)
    for a, b in zip(whole.model.parameters(), chunked.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_accumulation_in_training_with_mixup(make_cfg):
    """Samples are mixed before the batch is cut into chunks, so the number of chunks has no effect."""
    changes = (*SGD, "MIXUP.ENABLE", "True", "SOLVER.MAX_EPOCH", "1", "TRAIN.EVAL_PERIOD", "0")
    whole = load_checkpoint(train.train(make_cfg(*changes)))
    chunked = load_checkpoint(train.train(make_cfg(*changes, "TRAIN.GRAD_ACCUM_STEPS", "3", out="chunked")))
    for key in whole:
        torch.testing.assert_close(whole[key], chunked[key], atol=2e-6, rtol=0)


def test_distilled_network_trains(make_cfg):
    _, step = make_step(make_cfg("VIT.DISTILLED", "True", "MIXUP.ENABLE", "True"))
    x, label = random_batch()
    assert math.isfinite(step(x, nn.functional.one_hot(label, 4).float()).loss)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(make_cfg, dtype):
    state, step = make_step(make_cfg("TRAIN.MIXED_PRECISION", "True", "TRAIN.AMP_DTYPE", dtype))
    _, exact_step = make_step(make_cfg())
    stats, exact = step(*random_batch()), exact_step(*random_batch())
    assert stats.loss == pytest.approx(exact.loss, abs=0.02)
    assert all(p.dtype == torch.float32 for p in state.model.parameters())
    assert (stats.loss_scale is not None) == (dtype == "float16")


def test_float16_skips_a_step_with_infinite_gradient(make_cfg):
    state, step = make_step(make_cfg("TRAIN.MIXED_PRECISION", "True", "TRAIN.AMP_DTYPE", "float16"))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)  # every gradient overflows
    before = [p.clone() for p in state.model.parameters()]
    stats = step(*random_batch())
    assert stats.loss_scale == 2.0**119
    assert_same(before, list(state.model.parameters()))


def test_float16_does_not_skip_steps_for_ever(make_cfg):
    """A gradient that no loss scale makes finite is an error: the run would go on and learn nothing."""
    state, step = make_step(make_cfg("TRAIN.MIXED_PRECISION", "True", "TRAIN.AMP_DTYPE", "float16"))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-13)
    next(state.model.parameters()).register_hook(lambda grad: grad * float("inf"))
    assert step(*random_batch()).loss_scale == 2.0**-14
    with pytest.raises(train.NonFiniteError, match=r"float16's loss scale .*TRAIN.AMP_DTYPE bfloat16"):
        step(*random_batch())


def test_non_finite_step_does_not_change_the_weights(make_cfg):
    state, step = make_step(make_cfg())
    before = [p.clone() for p in state.model.parameters()]
    x, label = random_batch()
    x[3] = float("nan")
    with pytest.raises(train.NonFiniteError, match="loss is nan"):
        step(x, label)
    assert_same(before, list(state.model.parameters()))


# ---- a whole training


def test_resume_is_bit_identical(make_cfg):
    """Two epochs in one run equal a second epoch resumed from the first, with everything random switched on."""
    changes = ["EMA.ENABLE", "True", "EMA.DECAY", "0.9", "MIXUP.ENABLE", "True"]
    changes += ["AUG.ENABLE", "True", "AUG.AA_TYPE", "", "AUG.NUM_SAMPLE", "2"]
    changes += ["VIT.DROP_PATH_RATE", "0.2", "VIT.DROP_RATE", "0.1", "SOLVER.CLIP_GRAD_L2NORM", "1"]
    straight, resumed = make_cfg(*changes, out="straight"), make_cfg(*changes, out="resumed")
    train.train(straight)
    source, target = Path(straight.OUTPUT_DIR), Path(resumed.OUTPUT_DIR)
    (target / "checkpoints").mkdir(parents=True)
    name = "checkpoints/checkpoint_epoch_00001.pyth"
    shutil.copy(source / name, target / name)
    first_epoch = [line for line in (source / "log.jsonl").read_text().splitlines() if json.loads(line)["epoch"] == 1]
    killed_in_epoch_2 = '{"event": "train", "epoch": 2, "step": 2, "loss": 7}\n{"event": "tra'
    crashed = b'\n\xff\0\n[1]\n{"epoch": "x"}\n'  # what a crash of the machine can leave
    (target / "log.jsonl").write_bytes("\n".join([*first_epoch, killed_in_epoch_2]).encode() + crashed)

    np.random.seed(99)  # noqa: NPY002 - the state of the global generators must not matter
    torch.manual_seed(99)
    train.train(resumed)
    name = "checkpoints/checkpoint_epoch_00002.pyth"
    contents, expected = load_checkpoint(target / name), load_checkpoint(source / name)
    for key in ("model_state", "ema_state", "optimizer_state", "scaler_state", "epoch"):
        assert_same(contents[key], expected[key])
    assert_same(load_checkpoint(target / "model.safetensors"), expected["ema_state"])
    assert read_log(resumed.OUTPUT_DIR) == read_log(straight.OUTPUT_DIR)


def test_checkpoint_contents(make_cfg):
    cfg = make_cfg("SOLVER.MAX_EPOCH", "1", "EMA.ENABLE", "True", "EMA.DECAY", "0.5")
    train.train(cfg)
    path = Path(cfg.OUTPUT_DIR) / "checkpoints" / "checkpoint_epoch_00001.pyth"
    contents = torch.load(path, weights_only=True)
    assert {"model_state", "optimizer_state", "epoch", "cfg", "ema_state", "scaler_state"} <= contents.keys()
    assert contents["epoch"] == 0
    saved = path.with_name("saved.yaml")
    saved.write_text(contents["cfg"])
    assert load_config(saved) == cfg == load_config(Path(cfg.OUTPUT_DIR) / "config.yaml")
    lines = (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()
    assert "EMA weights reach top-1" in lines
    assert "tokens" in lines


def test_weights_say_how_they_were_trained(make_cfg, caplog):
    """A dense network that gets weights of a training with ATS says so, with the keys that sample; no other does."""
    cfg = make_cfg("SOLVER.MAX_EPOCH", "1")
    weights = str(train.train(cfg))
    evaluate.build_trained(cfg, weights)
    state, before = load_checkpoint(weights), Path(weights).read_bytes()
    for _ in range(4):  # the header's order is fixed
        save_safetensors(weights, state, read_metadata(weights))
        assert Path(weights).read_bytes() == before
    dense = make_cfg("ATS.ENABLE", "False")
    assert "was trained with ATS" not in caplog.text
    evaluate.build_trained(dense, weights)
    keys = re.search(r"was trained with ATS, and this network keeps all tokens\. To sample: (.*)", caplog.text)[1]
    assert make_cfg("ATS.ENABLE", "False", *shlex.split(keys)).ATS == cfg.ATS
    caplog.clear()
    save_safetensors(weights, build_model(dense).state_dict())
    evaluate.build_trained(dense, weights)
    assert not caplog.text


def test_other_settings_than_those_of_the_training_are_named(make_cfg, caplog):
    """Weights that fit another image size or network by chance would mislead in silence."""
    weights = str(train.train(make_cfg("SOLVER.MAX_EPOCH", "1", "DATA.MEAN", "[0.5,0.5,0.5]")))
    evaluate.build_trained(make_cfg("DATA.MEAN", "[0.5,0.5,0.5]", "ATS.NUM_TOKENS", "9"), weights)
    assert "other settings" not in caplog.text
    evaluate.build_trained(make_cfg(), weights)
    assert "was trained with other settings. To use them, type: DATA.MEAN '[0.5,0.5,0.5]'" in caplog.text


def test_ema_follows_the_weights(make_cfg):
    cfg = make_cfg("EMA.ENABLE", "True", "EMA.DECAY", "0.75", "SOLVER.MAX_EPOCH", "1", "TRAIN.BATCH_SIZE", "64")
    initial = train.build_state(cfg, CPU).model.state_dict()
    train.train(cfg)  # one step
    contents = load_checkpoint(checkpointing.checkpoint_path(Path(cfg.OUTPUT_DIR), 1))
    for key, value in contents["ema_state"].items():
        torch.testing.assert_close(value, 0.75 * initial[key] + 0.25 * contents["model_state"][key])


def test_damaged_checkpoint_is_named_and_skipped(make_cfg, caplog):
    cfg = make_cfg()
    train.train(cfg)
    first, second = (checkpointing.checkpoint_path(Path(cfg.OUTPUT_DIR), epoch) for epoch in (1, 2))
    final = load_checkpoint(second)["model_state"]
    second.write_bytes(second.read_bytes()[:1000])
    caplog.clear()
    train.train(cfg)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert str(second) in warnings[0]
    assert f"Resumed from {first}" in caplog.text
    assert re.search(f"weights +resumed from {first}", caplog.text)
    assert_same(load_checkpoint(second)["model_state"], final)


def test_another_config_in_the_same_folder_is_refused_unless_forced(make_cfg):
    """The settings that differ are listed and config.yaml stays. --force resumes."""
    first = make_cfg("SOLVER.MAX_EPOCH", "1")
    train.train(first)
    refused = r"Cannot resume from .*checkpoint_epoch_00001.*\n  SOLVER.MAX_EPOCH: 1 there, 2 now\n.*another OUTPUT_DIR"
    with pytest.raises(UserError, match=refused):
        train.train(make_cfg())
    assert load_config(Path(first.OUTPUT_DIR) / "config.yaml") == first
    train.train(make_cfg(), force=True)
    assert [line["epoch"] for line in read_log(first.OUTPUT_DIR) if line["event"] == "val"] == [1, 2]
    machine_settings = ("LOG_PERIOD", "1", "TRAIN.CHECKPOINT_STEPS", "2", "TRAIN.GRAD_ACCUM_STEPS", "2")
    train.train(make_cfg(*machine_settings))


def test_starting_over_in_a_folder_with_checkpoints(make_cfg):
    """Without AUTO_RESUME, old checkpoints that a later run could resume from are refused, or deleted by --force."""
    train.train(make_cfg())
    again = make_cfg("TRAIN.AUTO_RESUME", "False", "SOLVER.MAX_EPOCH", "1")
    with pytest.raises(UserError, match="holds 2 checkpoints of an earlier training"):
        train.train(again)
    train.train(again, force=True)
    assert [path.name for path in checkpointing.list_checkpoints(Path(again.OUTPUT_DIR))] == [
        "checkpoint_epoch_00001.pyth"
    ]


def test_non_finite_loss_stops_with_a_message(make_cfg, tmp_path):
    weights = build_model(make_cfg()).state_dict()
    weights["head.bias"][0] = float("nan")
    save_safetensors(tmp_path / "nan.safetensors", weights)
    cfg = make_cfg("TRAIN.CHECKPOINT_FILE_PATH", str(tmp_path / "nan.safetensors"))
    with pytest.raises(UserError) as error:
        train.train(cfg)
    message = str(error.value)
    order = build_loader(cfg, "train").batch_sampler.global_order()
    samples = ", ".join(str(draw.index) for draw in order[:16])
    assert "The loss is nan in epoch 1, step 1 of 4" in message
    assert f"samples {samples})" in message
    assert "Last checkpoint: none yet" in message


def test_bad_files_are_named_once_and_limited(caplog):
    bad_files = BadFiles(max_fraction=0.02, grace=100)
    bad_files.add(["a.png", "", "a.png", ""], num_read=4, num_bad=2)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["a.png"]
    with pytest.raises(UserError, match=r"3 of the 8 .*MAX_BAD_FRACTION 0.02(?s:.*)a.png\n  b.png"):
        bad_files.add(["", "b.png", "", ""], num_read=4, num_bad=1)
    bad_files = BadFiles(max_fraction=0.02, grace=100)
    for _ in range(100):
        bad_files.add(["bad.png", *[""] * 99], num_read=100, num_bad=1)  # 1 % is allowed, however many they are


def test_training_with_broken_files(make_cfg, colours, tmp_path, caplog):
    shutil.copytree(colours, tmp_path / "data")
    broken = tmp_path / "data" / "train" / "red" / "3.png"
    broken.write_bytes(b"not an image")
    changes = ("DATA.PATH_TO_DATA_DIR", str(tmp_path / "data"), "SOLVER.MAX_EPOCH", "1")
    train.train(make_cfg(*changes))
    assert caplog.text.count(str(broken)) == 1
    with pytest.raises(UserError, match=r"1 of the \d+ training samples(?s:.*)3\.png"):
        train.train(make_cfg(*changes, "DATA.MAX_BAD_FRACTION", "0", out="strict"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (("MIXUP.ENABLE", "True", "TRAIN.BATCH_SIZE", "15"), "TRAIN.BATCH_SIZE 15 must be even"),
        (("MIXUP.ENABLE", "True", "MIXUP.ALPHA", "0", "MIXUP.CUTMIX_ALPHA", "0"), "MIXUP.CUTMIX_ALPHA above 0"),
        (("MIXUP.LABEL_SMOOTH_VALUE", "1"), "MIXUP.LABEL_SMOOTH_VALUE"),
        (("TRAIN.GRAD_ACCUM_STEPS", "0"), "TRAIN.GRAD_ACCUM_STEPS 0"),
    ],
)
def test_settings_that_contradict_each_other(make_cfg, changes, match):
    with pytest.raises(UserError, match=match):
        Recipe(make_cfg(*changes))


def test_new_head_for_other_classes(make_cfg, tmp_path):
    dense = build_model(make_cfg("MODEL.NUM_CLASSES", "7", "ATS.ENABLE", "False"))
    save_safetensors(tmp_path / "dense.safetensors", dense.state_dict())
    changes = ("TRAIN.CHECKPOINT_FILE_PATH", str(tmp_path / "dense.safetensors"))
    model = train.build_state(make_cfg(*changes, "TRAIN.RESET_HEAD", "True"), CPU).model
    assert torch.equal(model.blocks[2].mlp.fc1.weight, dense.blocks[2].mlp.fc1.weight)
    assert model.head.out_features == 4
    with pytest.raises(
        UserError, match=r"MODEL\.NUM_CLASSES 7 or, to fine-tune it for others, TRAIN\.RESET_HEAD True\."
    ):
        train.build_state(make_cfg(*changes), CPU)
    file = tmp_path / "dense.safetensors"
    advice = rf"TRAIN\.ENABLE True TRAIN\.CHECKPOINT_FILE_PATH {file}\."
    with pytest.raises(UserError, match=rf"MODEL\.NUM_CLASSES 7 or, to fine-tune it for others, {advice}"):
        evaluate.evaluate_weights(make_cfg("TEST.CHECKPOINT_FILE_PATH", str(file), "TRAIN.RESET_HEAD", "True"))


def test_out_of_memory_says_what_to_do(make_cfg, monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train, "train_step", no_memory)
    with pytest.raises(UserError, match=r"TRAIN\.GRAD_ACCUM_STEPS"):
        train.train(make_cfg())


def test_tensorboard(make_cfg):
    """Scalars per line of the log; per evaluation, a histogram of token counts and a picture of the kept tokens."""
    pytest.importorskip("tensorboard")
    cfg = make_cfg(
        "TENSORBOARD.ENABLE", "True", "SOLVER.MAX_EPOCH", "1", "TRAIN.ENABLE", "True", "TEST.ENABLE", "False"
    )
    run(cfg)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(cfg.OUTPUT_DIR) / "tensorboard")).Reload()
    scalars = {"train/loss", "train/lr", "train/data_wait_share", "train/tokens_per_block/1", "val/top1"}
    assert scalars <= set(events.Tags()["scalars"])
    (histogram,) = events.Histograms("val/tokens_kept/1")
    assert (histogram.step, histogram.histogram_value.num) == (4, 32)
    (picture,) = events.Images("val/kept_tokens")
    assert (picture.width, picture.height) == (4 * 32, 4 * 32)  # image, significance, two ATS blocks; four images
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]


# ---- evaluation


def batches(dataset: list[Sample], size: int):
    """Collated batches of samples."""
    for start in range(0, len(dataset), size):
        x, label, index, bad = zip(*dataset[start : start + size], strict=True)
        yield Sample(torch.stack(x), torch.tensor(label), torch.tensor(index), list(bad))


def test_evaluation_does_not_depend_on_batches(make_cfg):
    cfg = make_cfg()
    seed_everything(5)
    model = build_model(cfg).double()
    dataset = [s._replace(x=s.x.double()) for s in build_loader(cfg, "val").dataset]
    results = [
        evaluate.evaluate(model, list(batches(samples, size)), device=CPU)
        for samples, size in ((dataset, 1), (dataset, 7), (dataset[::-1], 32))
    ]
    for result in results:
        result.wall_seconds = result.images_per_second = 0
    assert results[0] == results[1] == results[2]
    assert results[0].num_samples == 32
    assert max(results[0].gflops["mean"], results[0].gflops["paper_mean"]) < results[0].gflops["dense"]
    assert results[0].gflops["min"] <= results[0].gflops["p50"] <= results[0].gflops["max"]
    assert all(8 <= mean <= 17 for mean in results[0].tokens_per_block.values())


class _FixedLogits(nn.Module):
    """Returns given logits and claims to cost 2 GFLOPs."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward_tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, list]:
        assert not self.training
        return self.logits, []

    def multiply_adds(self, trace: list, input_shape: tuple[int, ...], *, paper: bool) -> torch.Tensor:
        return torch.full((input_shape[0],), 2e9, dtype=torch.float64)


def test_evaluation_counts(caplog):
    nan = float("nan")
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [nan, 9.0, 1.0], [1.0, 2.0, float("inf")]])
    batch = Sample(torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 1, 2]), torch.arange(4), [""] * 4)
    model = _FixedLogits(logits).train()
    result = evaluate.evaluate(model, [batch], device=CPU)
    assert model.training
    assert (result.top1, result.top5, result.num_nonfinite) == (25.0, 50.0, 2)
    assert "2 of 4 samples have NaN or infinite logits" in caplog.text
    assert result.gflops == dict.fromkeys(("mean", "min", "p5", "p50", "p95", "max", "paper_mean", "dense"), 2.0) | {
        "std": 0.0
    }
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate.evaluate(model, [], device=CPU)


def test_training_without_validation_data(make_cfg, colours, tmp_path):
    """Allowed if nothing is evaluated; otherwise the two keys to set are named before training starts."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(colours / "train")
    changes = ["DATA.PATH_TO_DATA_DIR", str(tmp_path / "data"), "SOLVER.MAX_EPOCH", "1", "TRAIN.EVAL_PERIOD", "0"]
    with pytest.raises(UserError, match=r"val does not exist(.|\n)*type TRAIN\.EVAL_PERIOD 0 TEST\.ENABLE False\."):
        train.train(make_cfg(*changes))
    assert train.train(make_cfg(*changes, "TEST.ENABLE", "False")).is_file()
    assert checkpointing.list_checkpoints(tmp_path / "out")


def test_result_file(make_cfg, tmp_path, capsys):
    cfg = make_cfg("TEST.CHECKPOINT_FILE_PATH", str(tmp_path / "weights.safetensors"))
    save_safetensors(cfg.TEST.CHECKPOINT_FILE_PATH, build_model(cfg).state_dict())
    evaluate.evaluate_weights(cfg)
    result = json.loads((Path(cfg.OUTPUT_DIR) / "result.json").read_text())
    for key in ("top1", "top5", "num_samples", "images_per_second", "params_m", "config_sha256"):
        assert key in result
    assert set(result["gflops"]) == {"mean", "std", "min", "p5", "p50", "p95", "max", "paper_mean", "dense"}
    assert set(result["tokens_per_block"]) == {"1", "2"}
    assert set(result["versions"]) == {"python", "torch", "torchvision", "timm", "ats", "device"}
    assert result["preprocessing"] == {
        "input_size": list(input_shape(cfg)), "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        "crop_ratio": cfg.DATA.TEST_CROP_RATIO, "interpolation": cfg.DATA.TEST_INTERPOLATION,
    }  # fmt: skip
    assert result["params_m"] == pytest.approx(0.04506)
    table = capsys.readouterr().out
    assert f"{result['top1']:.2f}" in table
    assert "images/s is no benchmark" in table
    assert table.strip() in (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()


def test_weights_are_described_by_path_and_kind(make_cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("w.pth").touch()
    cfg = make_cfg()
    assert evaluate.describe_weights(cfg, "w.pth") == f"{tmp_path}/w.pth (PyTorch checkpoint)"
    shipped = "configs/Digits/weights/deit_ats.safetensors"
    said = f"{SHIPPED.parent / shipped} (safetensors, shipped with this package)"
    assert evaluate.describe_weights(cfg, shipped) == said
    assert evaluate.describe_weights(cfg, "") == f"random, RNG_SEED {cfg.RNG_SEED}"
    cfg = make_cfg("MODEL.NAME", "timm/vit_tiny_patch16_224", "TIMM.PRETRAINED", "True")
    assert evaluate.describe_weights(cfg, "") == "timm's for vit_tiny_patch16_224"


@pytest.mark.parametrize(("num_workers", "said"), [(0, "1 with 0 data workers each"), (1, "1 with 1 data worker each")])
def test_the_plan_counts_workers(make_cfg, caplog, num_workers, said):
    caplog.set_level("INFO", logger="ats")
    train.train(make_cfg("SOLVER.MAX_EPOCH", "1", "DATA_LOADER.NUM_WORKERS", str(num_workers), "TEST.ENABLE", "False"))
    assert re.search(f"process +{said}", caplog.text)


def test_config_hash_covers_what_changes_results(make_cfg):
    reference = config_sha256(make_cfg())
    assert config_sha256(make_cfg("DATA_LOADER.NUM_WORKERS", "3", out="elsewhere")) == reference
    assert config_sha256(make_cfg("ATS.NUM_TOKENS", "9")) != reference


def test_the_default_blocks_have_the_hash_that_they_had_as_a_list():
    """ATS.BLOCKS None, where it stands for blocks 3 to 11: results and checkpoints of earlier versions hold."""
    listed = ["ATS.BLOCKS", list(range(3, 12))]

    def is_same(*overrides):
        return config_sha256(load_config(None, [*overrides])) == config_sha256(load_config(None, [*overrides, *listed]))

    assert is_same()  # dense
    assert is_same("ATS.ENABLE", True)
    assert not is_same("ATS.ENABLE", True, "VIT.DEPTH", 24)
    assert not is_same("ATS.ENABLE", True, "MODEL.NAME", "MViT")


# ---- device, seeds, logging


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_cuda_without_gpu():
    with pytest.raises(UserError, match="DEVICE cpu"):
        select_device("cuda")
    assert select_device("auto").type == "cpu"


def test_seed_everything_depends_on_the_whole_key():
    def draw(*key):
        seed_everything(*key)
        return torch.rand(1).item(), np.random.rand()  # noqa: NPY002

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(1, 3, 2), draw(2, 2, 3), draw(-1, 2, 3)}) == 4


def test_log_file_has_the_messages_from_before_it_was_opened(tmp_path, capsys):
    setup_logging()
    logger = logging.getLogger("ats.somewhere")
    logger.info("early")
    for name in ("first.txt", "second.txt"):
        log_to_file(tmp_path / name)
        logger.debug("into %s", name)
        logger.warning("careful")
    assert [line.split("] ")[1] for line in (tmp_path / "first.txt").read_text().splitlines()] == [
        "early",
        "into first.txt",
        "warning: careful",
    ]
    assert "into first.txt" not in (tmp_path / "second.txt").read_text()
    console = capsys.readouterr().err
    assert "early" in console
    assert "into" not in console


def test_bar_replaces_the_lines_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    setup_logging()
    log_to_file(tmp_path / "log.txt")
    cfg = load_config(None, ["SOLVER.MAX_EPOCH", "1", "LOG_PERIOD", "1"])
    log = TrainLog(tmp_path, cfg, num_steps=2, device=CPU, steps_done=0, window={})
    for _ in range(2):
        log.step(StepStats(1.5, 0.5, {3: 20.0}), lr=0.1, num_images=8)
    log.close()
    console = capsys.readouterr().err
    assert "2/2" in console
    assert "gradient norm" not in console
    assert "gradient norm" in (tmp_path / "log.txt").read_text()
