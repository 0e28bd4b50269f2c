"""Converts the weights of MViT's releases to SlowFast's names and shapes, which this project uses.

| release | what differs |
|---|---|
| SlowFast | nothing |
| facebookresearch/mvit (MViTv2, ImageNet) | pooling weights are two-dimensional |
| pytorchvideo | names; separate q, k, v; each pooling stored twice; images have separate position tables too |
| torchvision mvit_v1_b, mvit_v2_s | names; position tables without their first axis |
| timm mvitv2_* | names; blocks in stages; two-dimensional poolings |

Position tables of another size are resized: distances linearly, absolute positions trilinearly (then the old grid of
patches must be square).
"""

from __future__ import annotations

import logging
import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.models.dense_grid import Grid
from ats.models.mvit.dense import resize_table

logger = logging.getLogger(__name__)

# (Pattern, replacement), applied to every key in this order. No pattern matches a key of SlowFast.
RENAMES = (
    # pytorchvideo
    (r"^patch_embed\.patch_model\.", "patch_embed.proj."),
    (r"^cls_positional_encoding\.", ""),
    (r"^norm_embed\.", "norm."),
    (r"^head\.proj\.", "head.projection."),
    (r"\._attention_pool_([qkv])\.pool\.", r".pool_\1."),
    (r"\._attention_pool_([qkv])\.norm\.", r".norm_\1."),
    # torchvision
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^pos_encoding\.class_token$", "cls_token"),
    (r"^pos_encoding\.(spatial|temporal|class)_pos$", r"pos_embed_\1"),
    (r"\.attn\.project\.0\.", ".attn.proj."),
    (r"\.pool_([qkv])\.pool\.", r".pool_\1."),
    (r"\.pool_([qkv])\.norm_act\.0\.", r".norm_\1."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^(blocks\.\d+)\.project\.", r"\1.proj."),
    (r"^head\.1\.", "head.projection."),
    # timm
    (r"\.shortcut_proj_(attn|mlp)\.", ".proj."),
    (r"^head\.fc\.", "head.projection."),
)


def adapt_mvit_state_dict(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of any release in the table above for `model`."""
    expected = model.state_dict()
    state = join_qkv(rename(state))
    for key, value in state.items():
        want = expected.get(key)
        if want is None or want.shape == value.shape:
            continue
        if ".pool_" in key and value.ndim == 4 and want.ndim == 5:
            state[key] = value.unsqueeze(2)
        elif key.startswith(("pos_embed", "cls_token")) and value.ndim < 3:
            state[key] = value.reshape(1, -1, value.shape[-1])
        elif ".rel_pos_" in key and value.ndim == 2 and value.shape[1] == want.shape[1]:
            logger.info("%s interpolated from %d to %d distances.", key, len(value), len(want))
            state[key] = resize_table(value, len(want))
    return fit_positions(model, state)


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename keys to SlowFast's; of a tensor stored under two names, keep one."""
    stages: dict[int, int] = {}
    for stage, block in re.findall(r"^stages\.(\d+)\.blocks\.(\d+)\.norm1\.weight$", "\n".join(state), re.MULTILINE):
        stages[int(stage)] = max(stages.get(int(stage), 0), int(block) + 1)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key):
            before = sum(count for stage, count in stages.items() if stage < int(match[1]))
            key = f"blocks.{before + int(match[2])}.{key[match.end() :]}"
        for pattern, replacement in RENAMES:
            key = re.sub(pattern, replacement, key)
        renamed.setdefault(key, value)
    return renamed


def join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Separate projections `attn.q`, `attn.k`, `attn.v` as one `attn.qkv`."""
    joined = {}
    for key, value in state.items():
        if match := re.match(r"(blocks\.\d+\.attn)\.([qkv])\.(weight|bias)$", key):
            parts = [state.get(f"{match[1]}.{name}.{match[3]}") for name in "qkv"]
            if all(part is not None for part in parts):
                joined[f"{match[1]}.qkv.{match[3]}"] = torch.cat(parts)
                continue
        joined[key] = value
    return joined


def fit_positions(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert absolute positions to the model's form (one table or two) and size."""
    frames, height, width = model.patch_grid
    spatial, temporal = state.get("pos_embed_spatial"), state.get("pos_embed_temporal")
    if model.pos_embed is not None and spatial is not None and temporal is not None:
        tables = [state.pop("pos_embed_class")] if "pos_embed_class" in state else []
        tables.append((temporal[:, :, None] + spatial[:, None]).flatten(1, 2))
        del state["pos_embed_spatial"], state["pos_embed_temporal"]
        state["pos_embed"] = torch.cat(tables, dim=1)
    sizes = {"pos_embed_spatial": (1, height, width), "pos_embed_temporal": (frames, 1, 1), "pos_embed": None}
    for key, size in sizes.items():
        table, want = state.get(key), getattr(model, key)
        if table is None or want is None or table.ndim != 3 or table.shape == want.shape:
            continue
        num_prefix = model.num_prefix_tokens if size is None else 0
        num_frames = {"pos_embed_spatial": 1, "pos_embed_temporal": table.shape[1]}.get(key, frames)
        num_patches = table.shape[1] - num_prefix
        side = math.isqrt(max(num_patches // num_frames, 0))
        if table.shape[2] != want.shape[2] or num_frames * side**2 != num_patches or not num_patches:
            continue
        logger.info("%s resized from %d to %d positions.", key, num_patches, want.shape[1] - num_prefix)
        patches = resize_positions(table[:, num_prefix:], (num_frames, side, side), size or model.patch_grid)
        state[key] = torch.cat([table[:, :num_prefix], patches], dim=1)
    return state


def resize_positions(table: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """A table of positions [1, T * H * W, C] resized from `grid` to `new_grid`, trilinear."""
    if tuple(grid) == tuple(new_grid):
        return table
    volume = table.transpose(1, 2).unflatten(-1, grid)
    return F.interpolate(volume, size=new_grid, mode="trilinear").flatten(2).transpose(1, 2)
