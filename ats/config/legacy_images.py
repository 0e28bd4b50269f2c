"""Keys of the CvT and PS-ViT releases (their YAML files) and what they become here; used by `legacy.py`.

Both give batch size and learning rate of one GPU; CvT multiplies the rate by the number of GPUs. They are taken as they
are, which is the release's training on one GPU. `configs/ImageNet` has them for the number of GPUs that was used.
"""

from __future__ import annotations

import logging

from ats.config.defaults import KEYS
from ats.errors import UserError

logger = logging.getLogger(__name__)

Pairs = list[tuple[str, object]]


def _both(*keys: str) -> object:
    return lambda value: [(key, value) for key in keys]


def _side(key: str, value: object) -> int:
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise UserError(f"{key} {value}: only square images are supported.")
    return sides.pop()


def _mix(key: str, alpha: object) -> Pairs:
    return [("MIXUP.ENABLE", True), (key, alpha)] if alpha else [(key, alpha)]


def _centre_crop(value: object) -> Pairs:
    if not value:
        logger.warning(
            "TEST.CENTER_CROP False squeezes whole images; here the short side gets the size and the centre is cut out "
            "(DATA.TEST_CROP_RATIO 1.0)."
        )
    return [("DATA.TEST_CROP_RATIO", 0.875 if value else 1.0)]


def _interpolation(value: object) -> Pairs:
    names = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
    if value not in names:
        raise UserError(f"TEST.INTERPOLATION {value}: choose from {', '.join(map(str, names))}.")
    return [("DATA.TEST_INTERPOLATION", names[value])]


_B = {"PSVIT.STEM_DIMS": [64, 64, 256], "PSVIT.DEPTH": 14, "PSVIT.EMBED_DIM": 384, "PSVIT.NUM_HEADS": 6}
_TI = {"PSVIT.STEM_DIMS": [64, 64, 192], "PSVIT.DEPTH": 12, "PSVIT.EMBED_DIM": 192, "PSVIT.NUM_HEADS": 3}
PSVIT_NETWORKS = {"ps_vit_ti_14": (_TI, 14), "ps_vit_b_14": (_B, 14), "ps_vit_b_16": (_B, 16), "ps_vit_b_18": (_B, 18)}
# What PS-ViT's main.py does where its YAML says nothing.
PSVIT_DEFAULTS = {
    "PSVIT.DROP_RATE": 0.1,
    "PSVIT.DROP_PATH_RATE": 0.1,
    "SOLVER.WARMUP_EPOCHS": 3,
    "AUG.INTERPOLATION": "random",
    "AUG.RE_PROB": 0.0,
    "MIXUP.ENABLE": True,
    "MIXUP.ALPHA": 0.2,
    "EMA.ENABLE": True,
    "EMA.DECAY": 0.99996,
    "DATA.TEST_CROP_RATIO": 0.9,
}


def _psvit(name: object) -> Pairs:
    if name not in PSVIT_NETWORKS:
        raise UserError(f"model {name}: choose from {', '.join(PSVIT_NETWORKS)}.")
    network, side = PSVIT_NETWORKS[name]
    return [
        ("MODEL.NAME", "PSViT"),
        ("PSVIT.NUM_POINTS", [side, side]),
        ("PSVIT.NUM_ITERS", 4),
        ("PSVIT.OFFSET_GAMMA", 1.0),
        ("PSVIT.MLP_RATIO", 3.0),
        ("PSVIT.QKV_BIAS", False),
        *network.items(),
        *PSVIT_DEFAULTS.items(),
    ]


_CVT_RENAMED = {
    "WORKERS": "DATA_LOADER.NUM_WORKERS",
    "PIN_MEMORY": "DATA_LOADER.PIN_MEMORY",
    "PRINT_FREQ": "LOG_PERIOD",
    "AMP.ENABLED": "TRAIN.MIXED_PRECISION",
    "LOSS.LABEL_SMOOTHING": "MIXUP.LABEL_SMOOTH_VALUE",
    "DATASET.ROOT": "DATA.PATH_TO_DATA_DIR",
    "INPUT.MEAN": "DATA.MEAN",
    "INPUT.STD": "DATA.STD",
    "AUG.SCALE": "DATA.TRAIN_JITTER_SCALES_RELATIVE",
    "AUG.RATIO": "DATA.TRAIN_JITTER_ASPECT_RELATIVE",
    "AUG.MIXUP_PROB": "MIXUP.PROB",
    "AUG.MIXUP_SWITCH_PROB": "MIXUP.SWITCH_PROB",
    "AUG.TIMM_AUG.RE_COUNT": "AUG.RE_COUNT",
    "AUG.TIMM_AUG.RE_MODE": "AUG.RE_MODE",
    "AUG.TIMM_AUG.RE_PROB": "AUG.RE_PROB",
    "AUG.TIMM_AUG.AUTO_AUGMENT": "AUG.AA_TYPE",
    "AUG.TIMM_AUG.COLOR_JITTER": "AUG.COLOR_JITTER",
    "AUG.TIMM_AUG.INTERPOLATION": "AUG.INTERPOLATION",
    "TRAIN.BATCH_SIZE_PER_GPU": "TRAIN.BATCH_SIZE",
    "TRAIN.LR": "SOLVER.BASE_LR",
    "TRAIN.WD": "SOLVER.WEIGHT_DECAY",
    "TRAIN.END_EPOCH": "SOLVER.MAX_EPOCH",
    "TRAIN.LR_SCHEDULER.ARGS.warmup_epochs": "SOLVER.WARMUP_EPOCHS",
    "TRAIN.LR_SCHEDULER.ARGS.warmup_lr": "SOLVER.WARMUP_START_LR",
    "TRAIN.LR_SCHEDULER.ARGS.min_lr": "SOLVER.COSINE_END_LR",
    "TEST.BATCH_SIZE_PER_GPU": "TEST.BATCH_SIZE",
    "TEST.MODEL_FILE": "TEST.CHECKPOINT_FILE_PATH",
}
_PSVIT_RENAMED = {
    "batch_size": "TRAIN.BATCH_SIZE",
    "lr": "SOLVER.BASE_LR",
    "weight_decay": "SOLVER.WEIGHT_DECAY",
    "drop": "PSVIT.DROP_RATE",
    "mixup": "MIXUP.ALPHA",
    "reprob": "AUG.RE_PROB",
    "warmup_epochs": "SOLVER.WARMUP_EPOCHS",
}
_SPEC = {f"MODEL.SPEC.{key.name.removeprefix('CVT.')}": key.name for key in KEYS if key.name.startswith("CVT.")}

RENAMED = {old: _both(new) for old, new in (_SPEC | _CVT_RENAMED | _PSVIT_RENAMED).items()} | {
    "AUG.MIXUP": lambda value: _mix("MIXUP.ALPHA", value),
    "AUG.MIXCUT": lambda value: _mix("MIXUP.CUTMIX_ALPHA", value),
    "TRAIN.IMAGE_SIZE": lambda value: [("DATA.TRAIN_CROP_SIZE", _side("TRAIN.IMAGE_SIZE", value))],
    "TRAIN.OPTIMIZER": lambda value: [("SOLVER.OPTIMIZING_METHOD", str(value).lower())],
    "TRAIN.WITHOUT_WD_LIST": lambda value: [("SOLVER.ZERO_WD_1D_PARAM", bool(value))],
    "TEST.IMAGE_SIZE": lambda value: [("DATA.TEST_CROP_SIZE", _side("TEST.IMAGE_SIZE", value))],
    "TEST.CENTER_CROP": _centre_crop,
    "TEST.INTERPOLATION": _interpolation,
    "model": _psvit,
    "img_size": _both("DATA.TRAIN_CROP_SIZE", "DATA.TEST_CROP_SIZE"),
}

FIXED: dict[str, tuple[object, ...]] = {
    "AUG.TIMM_AUG.HFLIP": (0.5,),
    "AUG.TIMM_AUG.VFLIP": (0.0,),
    "TRAIN.BEGIN_EPOCH": (0,),
    "TRAIN.SHUFFLE": (True,),
    "TRAIN.LR_SCHEDULER.METHOD": ("timm",),
    "TRAIN.LR_SCHEDULER.ARGS.sched": ("cosine",),
}

IGNORED: dict[str, str] = {
    "AMP.MEMORY_FORMAT": "the memory format changes no number",
    "AUG.TIMM_AUG.*": "timm's augmentation is the only one",
    "CUDNN.*": "the settings of cuDNN change no more than round-off",
    "DATASET.*": "the data set is TRAIN.DATASET and TEST.DATASET",
    "DEBUG.*": "there is no such mode",
    "MODEL_SUMMARY": "parameters and GFLOPs are always logged",
    "TRAIN.LR_SCHEDULER.ARGS.*": "the schedule ends with SOLVER.MAX_EPOCH",
}
