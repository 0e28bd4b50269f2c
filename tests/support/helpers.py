"""Things that several test files use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ats.checkpoint import load_checkpoint, load_weights
from ats.config import get_cfg, load_config
from ats.engine.checkpointing import checkpoint_path
from ats.engine.evaluate import evaluate_weights
from ats.engine.train import train
from ats.models import build_model
from ats.models.block import ats_blocks
from ats.reduction import Reduction
from ats.reduction.plan import plan_reductions
from ats.tokens import KeptTokens

FIXTURES = Path(__file__).parents[1] / "fixtures"


@contextmanager
def keep_all(model: nn.Module) -> Iterator[None]:
    """Within it the ATS blocks of `model` score and keep everything, to compare the ragged path with the dense one."""
    for block in ats_blocks(model):
        block.imposed = lambda candidates, _: candidates.valid
    yield
    for block in ats_blocks(model):
        del block.imposed


def planned(
    *, depth: int, num_prefix_tokens: int = 1, has_cls: bool | None = None, **stage: object
) -> dict[int, Reduction]:
    """Block -> reduction, for one stage with the options `stage`."""
    return plan_reductions([stage], depth=depth, num_prefix_tokens=num_prefix_tokens, has_cls=has_cls)


def counted_multiply_adds(model: nn.Module, x: torch.Tensor) -> tuple[float, list[KeptTokens]]:
    """Multiply-adds by torch's counter. Unfused attention, because older counters miss the CPU's fused kernel."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, trace = model.forward_tokens(x)
    return counter.get_total_flops() / 2, trace


# Networks for clips of 8 frames and 32 x 32 pixels, 64 patches a frame: every way of putting time into ViT's blocks.
VIDEO_MODELS = {
    "xvit": ["MODEL.NAME", "XViT", "XVIT.NUM_SEGMENTS", 4, "XVIT.TEMPORAL_EMBED_LEN", 4, "MODEL.DROPOUT_RATE", 0.5],
    "divided": ["MODEL.NAME", "TimeSformer"],
    "joint": ["MODEL.NAME", "TimeSformer", "TIMESFORMER.ATTENTION_TYPE", "joint_space_time"],
    "space_only": ["MODEL.NAME", "TimeSformer", "TIMESFORMER.ATTENTION_TYPE", "space_only"],
}


def video_model(kind: str, *overrides: object, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small network of VIDEO_MODELS with weights large enough for tokens to differ. Blocks 1 and 2 of 4 sample if
    ATS.ENABLE.
    """
    cfg = get_cfg()
    cfg.merge_from_list([
        *VIDEO_MODELS[kind], "MODEL.NUM_CLASSES", 7, "DATA.NUM_FRAMES", 8, "VIT.IMG_SIZE", 32, "VIT.PATCH_SIZE", 4,
        "VIT.EMBED_DIM", 32, "VIT.DEPTH", 4, "VIT.NUM_HEADS", 4, "VIT.MLP_RATIO", 2, "ATS.BLOCKS", [1, 2],
        "TEMPORAL_HEAD.NUM_ATTENTION_HEADS", 2, "TEMPORAL_HEAD.MLP_DIM", 24, *overrides,
    ])  # fmt: skip
    model = build_model(cfg)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):  # of a norm
            parameter.data += 1
    return model.to(dtype).eval()


def clips(num_clips: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random clips [B, 3, 8, 32, 32]."""
    return torch.randn(num_clips, 3, 8, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def check_golden(name: str, model: nn.Module, dtype: torch.dtype) -> None:
    """`model` with the weights of fixtures/video/<name>.npz gives the reference implementation's logits and (float32)
    its gradients of sum(logits * loss_w).
    """
    case = np.load(FIXTURES / "video" / f"{name}.npz")
    prefix = "weight."
    load_weights(model, {k.removeprefix(prefix): torch.from_numpy(case[k]) for k in case.files if k.startswith(prefix)})
    model = model.to(dtype).eval()
    x, loss_w = (torch.from_numpy(case[key]).to(dtype) for key in ("x", "loss_w"))
    logits = model(x)
    if dtype == torch.float64:
        np.testing.assert_allclose(logits.detach(), case["logits_f64"], atol=1e-12, rtol=0)
        return
    np.testing.assert_allclose(logits.detach(), case["logits"], atol=1e-5, rtol=0)
    (logits * loss_w).sum().backward()
    parameters = dict(model.named_parameters())
    golden = {key.removeprefix("grad."): case[key] for key in case.files if key.startswith("grad.")}
    assert len(golden) >= 4
    for key, want in golden.items():
        scale = np.abs(want).max()
        np.testing.assert_allclose(parameters[key].grad / scale, want / scale, atol=1e-4, err_msg=key)


def golden_config(name: str) -> dict:
    """The settings a case of fixtures/video was made with, in the reference's terms."""
    return json.loads(str(np.load(FIXTURES / "video" / f"{name}.npz")["case"]))["config"]


def released_state(name: str, value: float = 0.5) -> tuple[dict, dict]:
    """A released checkpoint's key names, shapes and wrapper from fixtures/keys, every weight `value`; and what else is
    known of the release (`num_parameters`, `gmacs_per_view`, `input`).
    """
    about = json.loads((FIXTURES / "keys" / f"{name}.json").read_text())
    layout = about["release_file_layout"]
    return {w: {key: torch.full(shape, value) for key, shape in keys.items()} for w, keys in layout.items()}, about


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and batch-norm statistics large enough for tokens to differ, from the seed and the order of the state."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point() or name == "point_coord":
                continue
            noise = torch.randn(value.shape, generator=generator).to(value.dtype)
            if name.endswith("running_var"):
                value.copy_((0.3 * noise).exp())
            elif value.ndim > 1:
                value.copy_(noise * min(1.5 * value[0].numel() ** -0.5, 0.5))
            else:
                value.copy_(0.1 * noise + (name.endswith("weight")))  # a one-dimensional weight is of a norm
    return model


def check_image_case(model: nn.Module, name: str, dtype: torch.dtype, *, prefix: str = "grad_") -> None:
    """`model` with the weights of fixtures/image/<name> gives the reference's logits and (float32) the gradients of
    sum(logits * loss_weight) that are stored under `prefix`.
    """
    folder = FIXTURES / "image" / name
    load_weights(model, folder / "weights.safetensors")
    golden = np.load(folder / "golden.npz")
    model = model.to(dtype).eval()
    x = torch.from_numpy(((golden["image_u8"] / 255.0 - 0.5) / 0.25).astype(np.float32)).to(dtype).requires_grad_()
    logits = model(x)
    if dtype == torch.float64:
        np.testing.assert_allclose(logits.detach(), golden["logits_f64"], atol=1e-12, rtol=0)
        return
    np.testing.assert_allclose(logits.detach(), golden["logits"], atol=1e-5, rtol=0)
    check_gradients(model, x, logits, golden, prefix=prefix)


def check_gradients(model: nn.Module, x: torch.Tensor, logits: torch.Tensor, golden: dict, *, prefix: str) -> None:
    """The gradients of sum(logits * loss_weight) with respect to `x` and every weight that `golden` has, relative to
    the largest entry.
    """
    (logits * torch.from_numpy(golden["loss_weight"])).sum().backward()
    grads = {"input": x.grad} | {f"_{key}": parameter.grad for key, parameter in model.named_parameters()}
    wanted = [key for key in golden if key.startswith(prefix)]
    assert len(wanted) >= 2
    for key in wanted:
        scale = np.abs(golden[key]).max()
        grad = grads[key.removeprefix(prefix)]
        np.testing.assert_allclose(grad / scale, golden[key] / scale, atol=1e-4, err_msg=key)


def check_training(config: Path, out: Path, settings: dict) -> None:
    """A network with batch norm trains with averaged weights, goes on from a checkpoint to the same bits, and its
    exported weights can be evaluated.

    Args:
        config: a YAML file with data. settings: the network, over it.
    """
    changes = [word for key, value in (settings | {"EMA.ENABLE": True}).items() for word in (key, value)]
    weights = {}
    for name in ("straight", "resumed"):
        cfg = load_config(config, [*changes, "OUTPUT_DIR", str(out / name), "SOLVER.MAX_EPOCH", 2])
        if name == "resumed":
            shutil.copytree(out / "straight" / "checkpoints", out / name / "checkpoints")
            checkpoint_path(out / name, 2).unlink()
        weights[name] = load_checkpoint(train(cfg))
    assert weights["straight"].keys() == weights["resumed"].keys() == build_model(cfg).state_dict().keys()
    assert all(torch.equal(value, weights["resumed"][key]) for key, value in weights["straight"].items())
    result = evaluate_weights(cfg, weights=out / "straight" / "model.safetensors")
    assert 0 < result.gflops["mean"] < result.gflops["dense"]


def build_empty(*overrides: object) -> nn.Module:
    """The network of these settings with memory for its weights but nothing in them: for those that are loaded."""
    cfg = get_cfg()
    cfg.merge_from_list(list(overrides))
    with torch.device("meta"):
        model = build_model(cfg)
    return model.to_empty(device="cpu")


def demo_table(heading: str, names: list[str]) -> dict[str, list[str]]:
    """Name -> the other cells of a table in the section of docs/DEMOS.md that begins with the line `heading`."""
    text = (Path(__file__).parents[2] / "docs" / "DEMOS.md").read_text()
    section = text.split(f"\n{heading}\n", 1)[1]
    section = section.split("\n## ", 1)[0].split("\n### ", 1)[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if cells[0] in names}
