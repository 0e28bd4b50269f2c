"""The numbers of the paper, row by row, with what it takes to measure each here.

Sources: the authors' ECCV poster and project page, but for what is marked otherwise. Multiply-adds are counted as one
operation; GFLOPs of videos are over all views. The Kinetics-400 table was not at hand: its rows have no numbers. That
TimeSformer-L + ATS is in it (50.8 % fewer operations, 0.2 points less top-1) is known from a summary of the paper
(alphaxiv.org/overview/2111.15667v3); whether TimeSformer-HR is, is not known.

Names of files are those of the releases, but for PS-ViT's: its README links to Google Drive without one.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET, KINETICS400, KINETICS600 = "imagenet", "kinetics400", "kinetics600"
DEIT = "https://github.com/facebookresearch/deit, README_deit.md"
DEIT_S, DEIT_TI = "deit_small_patch16_224-cd65a155.pth", "deit_tiny_patch16_224-a1311bcf.pth"
PSVIT = (
    "https://github.com/yuexy/PS-ViT, README: Google Drive; whatever its name there, it is looked for under this one"
)
CVT = "https://github.com/microsoft/CvT, README: model zoo"
XVIT = "https://www.adrianbulat.com/downloads/NeurIPS2021/models/xvit_b16_16_k600.pth"
TIMESFORMER = "https://github.com/facebookresearch/TimeSformer, README"
MVIT = "https://dl.fbaipublicfiles.com/pyslowfast/model_zoo/mvit/k600.pyth"

# DeiT-S + ATS, blocks 3 to 11, ImageNet val, read off the poster's histograms: mode, mean, standard deviation, range.
TOKENS = {
    3: (166, 162, 9, "120-178"),
    4: (149, 146, 10, "100-163"),
    5: (139, 132, 12, "85-153"),
    6: (120, 117, 13, "75-138"),
    7: (109, 105, 13, "65-130"),
    8: (102, 98, 13, "55-123"),
    9: (87, 82, 14, "38-110"),
    10: (77, 72, 14, "28-102"),
    11: (66, 62, 14, "25-95"),
}


@dataclass(frozen=True)
class PaperRow:
    """A row of a table.

    Attributes:
        name: unique in its table.
        top1, top5: percent. gflops: of an image, or of all views of a video. None: the paper's number is not at hand.
        config: below `configs/`; "" for networks that are not built here, whose numbers are only quoted.
        overrides: of the config.
        weights: the file wanted. origin: where it comes from, or the command that makes it.
        dense_top1: published top-1 of the dense network, with these weights if they are dense weights.
        data: one of IMAGENET, KINETICS400, KINETICS600.
        at_gflops: set K to cost this.
        family: rows of one family are joined in the figure.
    """

    name: str
    top1: float | None = None
    gflops: float | None = None
    top5: float | None = None
    config: str = ""
    overrides: tuple = ()
    weights: str = ""
    origin: str = ""
    dense_top1: float | None = None
    data: str = IMAGENET
    at_gflops: float | None = None
    family: str = ""

    @property
    def is_dense(self) -> bool:
        """Whether it is measured without ATS, so that its accuracy is that of the weights."""
        return self.overrides[:2] == ("ATS.ENABLE", False)


DENSE = ("ATS.ENABLE", False)


def _not_released(config: str) -> str:
    return (
        f"not released; model.safetensors of: python tools/run_net.py --cfg configs/{config}.yaml TRAIN.ENABLE True ..."
    )


def _tuned(config: str, start: str, *overrides: str) -> str:
    more = "".join(f" {word}" for word in overrides)
    command = f"python tools/run_net.py --cfg configs/{config}.yaml TRAIN.CHECKPOINT_FILE_PATH <{start}>{more} ..."
    return f"model.safetensors of: {command}"


def _pair(
    name: str,
    config: str,
    weights: str,
    origin: str,
    *,
    dense: tuple,
    tuned: tuple,
    data: str = IMAGENET,
    off_the_shelf: str | None = None,
    published: float | None = None,
) -> tuple[PaperRow, ...]:
    """Dense, ATS not fine-tuned and ATS fine-tuned of one network; `dense` and `tuned` are (top-1, GFLOPs, top-5).

    `off_the_shelf`: the config of that row, by default `config`; `published`: of the weights, by default dense's top-1.
    """
    folder, stem = config.split("/")
    shelf = off_the_shelf or config
    finetune = f"{folder}/{stem}_ATS_finetune"
    base = {"data": data, "family": name, "dense_top1": published or dense[0]}
    shared = {"weights": weights, "origin": origin}
    return (
        PaperRow(name, *dense, config=f"{shelf}.yaml", overrides=DENSE, **shared, **base),
        PaperRow(
            f"{name} + ATS, not fine-tuned", config=f"{shelf}.yaml", overrides=("ATS.ENABLE", True), **shared, **base
        ),
        PaperRow(
            f"{name} + ATS, fine-tuned",
            *tuned,
            config=f"{finetune}.yaml",
            overrides=("ATS.ENABLE", True),
            weights=f"{stem}_ATS_finetune.safetensors",
            origin=_tuned(finetune, weights),
            **base,
        ),
    )


def _width(width: int, dense: tuple, tuned: tuple) -> tuple[PaperRow, ...]:
    config = f"ImageNet/DeiT_{width}"
    origin = _not_released(f"{config}_dense")
    return _pair(f"DeiT, width {width}", config, f"DeiT_{width}_dense.safetensors", origin, dense=dense, tuned=tuned)


_DEIT_S = _pair("DeiT-S", "ImageNet/DeiT_S", DEIT_S, DEIT, dense=(79.8, 4.6), tuned=(79.7, 2.9))
_DEIT_TI = _pair("DeiT-Ti", "ImageNet/DeiT_Ti", DEIT_TI, DEIT, dense=(72.2, 1.3), tuned=(72.1, 0.9))

_IMAGENET = (
    PaperRow("ViT-Base/16", 77.9, 17.6),
    PaperRow("HVT-S-1", 78.0, 2.4),
    PaperRow("IA-RED2 (DeiT-S)", 78.6, 2.9),
    PaperRow("DynamicViT-DeiT-S, 30 epochs", 79.3, 2.9),
    PaperRow("EViT-DeiT-S, 30 epochs", 79.5, 3.0),
    *_DEIT_S,
    *_pair(
        *("PS-ViT-B/18", "ImageNet/PSViT_B_18", "ps_vit_b_18.pth", PSVIT),
        dense=(82.3, 8.8),
        tuned=(82.2, 5.6),
        off_the_shelf="ImageNet/PSViT_B_18_ATS",
    ),
    *_pair(
        *("CvT-21 at 384", "ImageNet/CvT_21_384", "CvT-21-384x384-IN-1k.pth", CVT),
        dense=(83.3, 24.9),
        tuned=(83.1, 17.4),
        off_the_shelf="ImageNet/CvT_21_384_ATS",
    ),
)

_KINETICS600 = (
    PaperRow("X3D-XL", 81.9, 1452, 95.5, data=KINETICS600),
    PaperRow("X3D-XL + ATFR", 82.1, 768, 95.6, data=KINETICS600),
    *_pair(
        "TimeSformer-HR",
        "Kinetics/TimeSformer_divST_16x16_448_K600",
        "TimeSformer_divST_16x16_448_K600.pyth",
        TIMESFORMER,
        dense=(82.4, 5110, 96.0),
        tuned=(82.2, 3103, 96.0),
        data=KINETICS600,
        off_the_shelf="Kinetics/TimeSformer_divST_16x16_448_K600_ATS",
        published=81.8,  # the release's own table
    ),
    PaperRow("ViViT-L/16x2", 82.5, 17352, 95.6, data=KINETICS600),
    PaperRow("Swin-B", 84.0, 3384, 96.5, data=KINETICS600),
    PaperRow(
        *("MViT-B-24 32x3", 84.1, 7080, 96.5),
        config="Kinetics/MViTv1_B_32x3_K600.yaml",
        overrides=DENSE,
        weights="k600.pyth",
        origin=MVIT,
        dense_top1=83.9,  # SlowFast's model zoo
        data=KINETICS600,
    ),
    PaperRow("TokenLearner 16at12 (L/16)", 84.4, 9192, 96.0, data=KINETICS600),
    *_pair(
        *("X-ViT (16 frames)", "Kinetics/XViT_B16_16x16_K600", "xvit_b16_16_k600.pth", XVIT),
        dense=(84.5, 850, 96.3),
        tuned=(84.4, 521, 96.2),
        data=KINETICS600,
        off_the_shelf="Kinetics/XViT_B16_16x16_K600_ATS",
    ),
)

_UNKNOWN = {"dense": (None, None), "tuned": (None, None), "data": KINETICS400}
_KINETICS400 = (
    *_pair(
        "TimeSformer-L",
        "Kinetics/TimeSformer_divST_96x4_224",
        "TimeSformer_divST_96x4_224_K400.pyth",
        TIMESFORMER,
        off_the_shelf="Kinetics/TimeSformer_divST_96x4_224_ATS",
        published=80.6,  # the release's own table, as the next
        **_UNKNOWN,
    ),
    *_pair(
        "TimeSformer-HR",
        "Kinetics/TimeSformer_divST_16x16_448",
        "TimeSformer_divST_16x16_448_K400.pyth",
        TIMESFORMER,
        off_the_shelf="Kinetics/TimeSformer_divST_16x16_448_ATS",
        published=79.6,
        **_UNKNOWN,
    ),
    *_pair(
        "X-ViT (16 frames)",
        "Kinetics/XViT_B16_16x16_K400",
        "XViT_B16_16x16_K400.safetensors",
        _not_released("Kinetics/XViT_B16_16x16_K400"),
        off_the_shelf="Kinetics/XViT_B16_16x16_K400_ATS",
        **_UNKNOWN,
    ),
)

_SCALING = (
    *_DEIT_TI,
    *_width(258, (77.0, 2.2), (76.9, 1.5)),
    *_width(318, (78.8, 3.2), (78.6, 2.2)),
    *_DEIT_S,
)

BUDGETS = (2.0, 2.5, 3.0)  # GFLOPs of the ablations


def _ablation(family: str, top1: tuple[float, ...], *overrides: object, tuned: bool = False) -> tuple[PaperRow, ...]:
    """DeiT-S at the three budgets, not fine-tuned, or fine-tuned in block 3 alone."""
    config = "ImageNet/DeiT_S_ATS_finetune" if tuned else "ImageNet/DeiT_S"
    if tuned:
        origin = _tuned(config, DEIT_S, "ATS.BLOCKS", "[3]")
        weights = {"weights": "DeiT_S_ATS_block3_finetune.safetensors", "origin": origin}
    else:
        weights = {"weights": DEIT_S, "origin": DEIT}
    return tuple(
        PaperRow(
            f"{family}, {budget} GFLOPs",
            accuracy,
            budget,
            config=f"{config}.yaml",
            overrides=overrides,
            at_gflops=budget,
            family=family,
            dense_top1=79.8,
            **weights,
        )
        for budget, accuracy in zip(BUDGETS, top1, strict=True)
    )


SINGLE = ("ATS.BLOCKS", [3])
_SINGLE = _ablation("block 3 alone", (72.7, 76.9, 78.5), *SINGLE)

TABLES: dict[str, tuple[PaperRow, ...]] = {
    "imagenet": _IMAGENET,
    "kinetics400": _KINETICS400,
    "kinetics600": _KINETICS600,
    "scaling": _SCALING,
    "stages": (*_SINGLE, *_ablation("blocks 3-11", (72.7, 77.6, 79.2))),
    "finetuning": (
        *_SINGLE,
        *_ablation("block 3 alone, fine-tuned", (75.1, 78.0, 79.3), *SINGLE, tuned=True),
    ),
    "sampling": (
        *_ablation("inverse transform", (72.7, 76.9, 78.5), *SINGLE),
        *_ablation("top-K", (69.6, 75.6, 77.9), *SINGLE, "ATS.SAMPLER", "topk"),
    ),
    "histogram": _DEIT_S[1:],
}
