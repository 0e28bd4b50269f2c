"""MODEL.ACT_CHECKPOINT: less is kept for the backward pass, and losses, gradients and statistics stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import test_cvt
import test_mvit
import test_psvit
import torch
from helpers import VIDEO_MODELS, clips, video_model
from test_models import small_vit
from test_timm_config import config as timm_config
from torch import Tensor, nn

from ats.benchmark.memory import saved_bytes
from ats.config import get_cfg
from ats.models import build_model
from ats.models.activation_checkpoint import set_grad_checkpointing

DROP = {"drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.3}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def video(kind: str) -> tuple[nn.Module, Tensor]:
    drop = [word for key, value in DROP.items() for word in (f"VIT.{key.upper()}", value)]
    return video_model(kind, "ATS.ENABLE", True, "ATS.NUM_TOKENS", 20, *drop), clips(2)


def timm_vit() -> tuple[nn.Module, Tensor]:
    cfg = timm_config("deit3_small_patch16_224", "TIMM.KWARGS", [*timm_config().TIMM.KWARGS, ["drop_path_rate", 0.3]])
    torch.manual_seed(0)
    return build_model(cfg).double(), IMAGES


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "ViT": lambda: (small_vit(num_tokens=0.6, **DROP), IMAGES),
    "ViT, random tokens": lambda: (small_vit(num_tokens=0.6, sampler="random", **DROP), IMAGES),
    "ViT, static": lambda: (small_vit(num_tokens=0.6, layout="static", **DROP), IMAGES),
    "ViT, dense": lambda: (small_vit(ats=False, **DROP), IMAGES),
    **{kind: (lambda kind=kind: video(kind)) for kind in VIDEO_MODELS},
    "MViT": lambda: (test_mvit.net("v2", blocks=(2, 3)), test_mvit.inputs("v2")),
    "CvT": lambda: (test_cvt.net("released", blocks=(2, 3)), test_cvt.inputs("released")),
    "PSViT": lambda: (test_psvit.net(blocks=(2, 3), settings={"PSVIT.DROP_PATH_RATE": 0.3}), test_psvit.inputs()),
    "timm": timm_vit,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputed_training_is_the_same_training(name):
    """Two steps' losses, gradients and buffers (batch norm's statistics) are equal with dropout, stochastic depth and
    every sampler; activations kept are fewer.
    """
    model, x = NETWORKS[name]()
    model.train()
    again = deepcopy(model)
    set_grad_checkpointing(again)
    outcomes = []
    for network in (model, again):
        torch.manual_seed(5)
        for _ in range(2):
            loss = network(x).square().sum()
            loss.backward()
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        outcomes.append([loss.detach(), *grads, *network.buffers()])
    assert len(outcomes[0]) == len(outcomes[1]) > 10
    for want, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert saved(again, x) < 0.7 * saved(model, x)


def saved(model: nn.Module, x: Tensor) -> int:
    return saved_bytes(lambda: model(x), without=model.parameters())


def test_a_block_keeps_its_input_alone():
    """Bytes of a ViT whose four blocks are recomputed: four inputs and what stem and head need."""
    model = small_vit(num_tokens=0.6).train()
    set_grad_checkpointing(model)
    rows = [3 * 65]  # of the first block, dense, and of the first that samples
    trace = model.forward_tokens(IMAGES)[1]
    inputs = 8 * 32 * (2 * rows[0] + sum(int(entry.num_tokens.sum()) for entry in trace[:2]))
    assert inputs <= saved(model, IMAGES) <= inputs + 1.5 * IMAGES.numel() * 8


def test_is_a_key_of_the_config():
    """MODEL.ACT_CHECKPOINT, off by default, for networks of this package and timm's; inference does not care."""
    for name, marked in (("ViT", lambda model: model.blocks[-1]), ("timm/vit_tiny_patch16_224", lambda model: model)):
        for on in (False, True):
            cfg = get_cfg()
            cfg.merge_from_list(["MODEL.NAME", name, "VIT.DEPTH", 2, "VIT.EMBED_DIM", 24, "VIT.NUM_HEADS", 2])
            cfg.merge_from_list(["TIMM.KWARGS", [["depth", 2]]] + (["MODEL.ACT_CHECKPOINT", True] if on else []))
            with torch.device("meta"):
                assert getattr(marked(build_model(cfg)), "grad_checkpointing", False) is on
