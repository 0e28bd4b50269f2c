"""What each suite measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ats.benchmark.counts import PAPER_MEAN, PAPER_STD
from ats.benchmark.timing import Settings


@dataclass(frozen=True)
class Goal:
    """A bound on a measured number.

    Attributes:
        variant: or, of an Extra, the split of the row.
        quantity: "efficiency", "share of sampling", "NAME time / time" with the name of another variant, or
            "activations / dense", whose bound is on top of the ratio of tokens; of an Extra, a column of its table.
        at_most: the bound is an upper one. batch_size: 0 for every one.
    """

    variant: str
    quantity: str
    bound: float
    batch_size: int = 0
    at_most: bool = False


@dataclass(frozen=True)
class Measurement:
    """Variants of a network beside its dense self.

    Attributes:
        title: heading. cfg: below configs/. overrides: KEY, VALUE, ... image_size: None for the config's.
        family: plot that it goes into: batch, image, clip or tokens. at: its place on that plot's axis.
    """

    title: str
    cfg: str
    settings: Settings
    batch_sizes: tuple[int, ...]
    overrides: tuple = ()
    image_size: int | None = None
    family: str = ""
    at: float = 0
    goals: tuple[Goal, ...] = ()


@dataclass(frozen=True)
class Extra:
    """Something timed by itself: kind "loader" or "sampler", see `suites._EXTRAS`; goals are of its rows by split."""

    title: str
    kind: str
    arguments: dict = field(default_factory=dict)
    goals: tuple[Goal, ...] = ()


Items = list[Measurement | Extra]
DEIT, XVIT, MVIT = "ImageNet/DeiT_S.yaml", "Kinetics/XViT_B16_16x16_K400_ATS.yaml", "ImageNet/MViTv2_T_ATS.yaml"
MVIT_CLIP = "Kinetics/MViTv1_B_16x4_ATS.yaml"
TINY_VIT = ("VIT.EMBED_DIM", 192, "VIT.NUM_HEADS", 3)
TINY_XVIT = (*TINY_VIT, "TEMPORAL_HEAD.NUM_ATTENTION_HEADS", 3)
ALL_TOKENS = ("ATS.NUM_TOKENS", 1.0)  # K grows with the image; the imposed counts say what is kept
# Static shapes cost their slots, kept or not: room for the paper's mean and one standard deviation.
BUDGET = ("ATS.NUM_TOKENS", [197] * 3 + [mean + std for mean, std in zip(PAPER_MEAN, PAPER_STD, strict=True)])
NEVER_SLOWER = Goal("ats", "dense time / time", 1)
TRAINING = (Goal("ats", "efficiency", 0.85), Goal("ats", "activations / dense", 0.1, at_most=True))
LOADING = (Goal("train", "loader / bare", 0.95), Goal("val", "loader / bare", 0.95))


def _image_sizes(settings: Settings, batch_size: int, sides: tuple[int, ...], name: str, keys: tuple) -> Items:
    return [
        Measurement(
            f"{name}, {side} pixels", DEIT, settings, (batch_size,), (*ALL_TOKENS, *keys), side, family="image", at=side
        )
        for side in sides
    ]


def _clip_lengths(settings: Settings, batch_size: int, lengths: tuple[int, ...], name: str, keys: tuple) -> Items:
    return [
        Measurement(
            f"{name}, {frames} frames",
            XVIT,
            settings,
            (batch_size,),
            ("DATA.NUM_FRAMES", frames, *keys),
            family="clip",
            at=frames,
        )
        for frames in lengths
    ]


def _budgets(
    settings: Settings, batch_size: int, name: str, keys: tuple = (), scales: tuple[float, ...] = (1, 0.8, 0.6, 0.4)
) -> Items:
    return [
        Measurement(
            f"{name}, {scale:g} x the profile's tokens",
            DEIT,
            replace(settings, token_scale=scale),
            (batch_size,),
            keys,
            family="tokens",
            at=scale,
        )
        for scale in scales
    ]


def cpu() -> Items:
    """About a quarter of an hour on two slow cores. What has a goal gets rounds until its median stands still."""
    one = Settings(threads=1, rounds=41, max_seconds=30)
    two = replace(one, threads=2)
    brief = replace(one, rounds=5, max_seconds=10, parts=False)
    steady = replace(one, parts=False)
    efficient = (Goal("ats", "efficiency", 0.97), Goal("ats", "share of sampling", 0.03, at_most=True))
    items: Items = [
        Measurement("DeiT-S, 1 thread", DEIT, one, (1, 8, 32), family="batch", goals=efficient),
        Measurement("DeiT-S, 2 threads", DEIT, two, (1, 8, 32), family="batch", goals=efficient),
        Measurement("DeiT-S, padded layout", DEIT, replace(brief, variants=("ats", "padded")), (16,)),
        Measurement(
            "DeiT-S, all blocks keep 98 tokens +- 30, padded layout",
            DEIT,
            replace(brief, variants=("ats", "padded"), mean_std=(98, 30)),
            (32,),
            ("ATS.BLOCKS", list(range(12))),
            goals=(Goal("ats", "padded time / time", 1.4),),
        ),
        Measurement("DeiT-S, bfloat16", DEIT, replace(brief, dtype=torch.bfloat16), (4,)),
        Measurement(
            "DeiT-S, training step",
            DEIT,
            replace(brief, train=True),
            (4,),
            goals=TRAINING,
        ),
        Measurement("MViTv2-T", MVIT, steady, (2, 8), goals=(Goal("ats", "efficiency", 0.9),)),
        Measurement("MViTv1-B 16x4", MVIT_CLIP, steady, (1,), goals=(Goal("ats", "efficiency", 0.9),)),
        *_image_sizes(brief, 1, (224, 384, 512, 768, 1024), "DeiT-Ti", TINY_VIT),
        Measurement(
            "XViT-B/16, 16 frames", XVIT, replace(brief, rounds=3), (1,), goals=(Goal("ats", "efficiency", 0.95),)
        ),
        *_clip_lengths(brief, 1, (8, 16, 32), "XViT of width 192", TINY_XVIT),
        *_budgets(brief, 8, "DeiT-Ti", TINY_VIT),
        Extra("Sampler", "sampler", {"device": "cpu", "sizes": (196, 576, 1024, 2304, 4096), "num_sequences": 8}),
        Extra("Loader, images of ImageNet's size", "loader", {"rounds": 20}, goals=LOADING),
    ]
    on_cpu = ("DEVICE", "cpu")
    return [
        replace(item, overrides=(*item.overrides, *on_cpu)) if isinstance(item, Measurement) else item for item in items
    ]


def gpu() -> Items:
    """Under eight minutes. Dense is timm's own model, with its fused attention."""

    def timm(side: int) -> tuple:
        return ("MODEL.NAME", "timm/deit_small_patch16_224", "TIMM.KWARGS", [["img_size", side]])

    half = Settings(dtype=torch.bfloat16, rounds=15, max_seconds=6, dense_keys=timm(224))
    brief = replace(half, rounds=9, parts=False)
    own = replace(brief, dense_keys=())
    at_256 = (
        Goal("ats", "efficiency", 0.85, batch_size=256),
        Goal("ats", "share of sampling", 0.10, batch_size=256, at_most=True),
    )
    compiled = replace(half, compile=True, max_seconds=20)
    graphs = replace(own, variants=("ats", "static", "static_graph", "dense_graph"), rounds=15)
    small = (Goal("static_graph", "dense time / time", 1), Goal("static_graph", "dense_graph time / time", 1))
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    large = replace(half, dense_keys=timm(384))
    crop = ("DATA.TEST_CROP_SIZE", 384, *ALL_TOKENS)
    return [
        Measurement("DeiT-S, bfloat16", DEIT, half, sizes, family="batch", goals=(*at_256, NEVER_SLOWER)),
        Measurement(
            "DeiT-S, float16",
            DEIT,
            replace(half, dtype=torch.float16),
            (1, 8, 64, 256, 1024),
            family="batch",
            goals=(*at_256, NEVER_SLOWER),
        ),
        Measurement(
            "DeiT-S, 384 pixels, bfloat16",
            DEIT,
            large,
            (1, 8, 64, 256, 1024),
            crop,
            384,
            family="batch",
            goals=(*at_256, NEVER_SLOWER),
        ),
        Measurement("DeiT-S, static shapes and CUDA graphs, bfloat16", DEIT, graphs, (1, 2, 4, 8), BUDGET, goals=small),
        Measurement("DeiT-S, bfloat16, torch.compile", DEIT, compiled, (256,), goals=at_256[:1]),
        Measurement("DeiT-S, padded layout, bfloat16", DEIT, replace(own, variants=("ats", "padded")), (256,)),
        Measurement("DeiT-S, training step, bfloat16", DEIT, replace(brief, train=True), (256,), goals=TRAINING),
        *_image_sizes(own, 16, (224, 384, 512, 768, 1024), "DeiT-S, bfloat16", ()),
        *_clip_lengths(own, 2, (8, 16, 32, 64), "XViT, bfloat16", ()),
        *_budgets(own, 256, "DeiT-S, bfloat16"),
        Measurement("MViTv2-T, bfloat16", MVIT, own, (64, 256)),
        Extra("Sampler", "sampler", {"device": "cuda", "sizes": (196, 576, 1024, 2304, 4096), "num_sequences": 256}),
        Extra("Loader, images of ImageNet's size", "loader", {"rounds": 20}, goals=LOADING),
    ]


def quick() -> Items:
    """Every kind of measurement on tiny networks: whether the others would run."""
    tiny = ("VIT.EMBED_DIM", 32, "VIT.NUM_HEADS", 2, "VIT.DEPTH", 12)
    kwargs = [["img_size", 224], ["embed_dim", 32], ["num_heads", 2]]
    timm = ("MODEL.NAME", "timm/deit_tiny_patch16_224", "TIMM.KWARGS", kwargs)
    brief = Settings(rounds=2, parts=False)
    half = replace(brief, dtype=torch.bfloat16, dense_keys=timm)
    goals = (Goal("ats", "efficiency", 0.5), Goal("ats", "share of sampling", 1, at_most=True))
    return [
        Measurement(
            "Tiny ViT",
            DEIT,
            Settings(("ats", "padded", "static"), rounds=3),
            (1, 2),
            (*tiny, *BUDGET),
            family="batch",
            goals=goals,
        ),
        Measurement("Tiny ViT, bfloat16", DEIT, half, (2,), tiny),
        Measurement("Tiny ViT, training step", DEIT, replace(brief, train=True), (2,), tiny, goals=TRAINING),
        *_image_sizes(brief, 1, (64, 128), "Tiny ViT", tiny),
        *_clip_lengths(
            brief, 1, (8, 16), "Tiny XViT", (*tiny, "DATA.TEST_CROP_SIZE", 64, "TEMPORAL_HEAD.NUM_ATTENTION_HEADS", 2)
        ),
        *_budgets(brief, 1, "Tiny ViT", tiny, (1, 0.5)),
        Extra("Sampler", "sampler", {"device": "cpu", "sizes": (16, 64), "num_sequences": 2}),
        Extra("Loader, images of ImageNet's size", "loader", {"rounds": 1}, goals=LOADING),
    ]


SUITES: dict[str, Callable[[], Items]] = {"cpu": cpu, "gpu": gpu, "quick": quick}
