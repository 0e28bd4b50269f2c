"""Keys of older releases (SlowFast, XViT, the official ATS code; `legacy_images.py`) and what they become here.

`translate` rewrites one `(key, value)` into the keys of this project. A renamed key is logged once with what it became;
a key that has no meaning here is named in a warning with the reason; a value we cannot honour is an error. Nothing is
dropped silently. What the releases' code does where their YAMLs say nothing is set, too (`implied`).
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable

from ats.config import legacy_images
from ats.errors import UserError

logger = logging.getLogger(__name__)

# value -> the pairs that replace it
Translation = Callable[[object], list[tuple[str, object]]]


def _rename(new_key: str) -> Translation:
    return lambda value: [(new_key, value)]


def _ats_blocks(value: object) -> list[tuple[str, object]]:
    if not value:  # None or []: the release's dense network
        return [("ATS.ENABLE", False)]
    return [("ATS.ENABLE", True), ("ATS.BLOCKS", value)]


# Names of networks in older releases -> MODEL.NAME here; TimeSformer's release names it after its first weights.
NETWORKS = {"XVIT": "XViT", "vit_base_patch16_224": "TimeSformer", "cls_cvt": "CvT"}


def _network(value: object) -> list[tuple[str, object]]:
    return [("MODEL.NAME", NETWORKS.get(str(value), value))]


def _loss(value: object) -> list[tuple[str, object]]:
    if value not in LOSSES:
        raise UserError(f"MODEL.LOSS_FUNC {value}: only {' or '.join(LOSSES)} is supported.")
    return [("MIXUP.LABEL_SMOOTH_VALUE", LOSSES[value])] if LOSSES[value] is not None else []


def _auto_augment(value: object) -> list[tuple[str, object]]:
    return [("AUG.ENABLE", True), ("AUG.AA_TYPE", "v0")] if value else []


def _erasing(value: object) -> list[tuple[str, object]]:
    return [("AUG.ENABLE", True), ("AUG.RE_PROB", value)] if value else []


def _mixup(value: object) -> list[tuple[str, object]]:
    return [("MIXUP.ENABLE", True), ("MIXUP.ALPHA", value), ("MIXUP.CUTMIX_ALPHA", 0.0)] if value else []


def _start_from(value: object) -> list[tuple[str, object]]:
    return [("TRAIN.CHECKPOINT_FILE_PATH", value)] if value else []


# Loss functions of older releases -> the label smoothing they imply; None: MIXUP.LABEL_SMOOTH_VALUE says it there too.
LOSSES = {
    "cross_entropy": 0.0,
    "smooth_cross_entropy": 0.3,  # of X-ViT's release, which has no key for it
    "soft_cross_entropy": None,
    "label_smoothing_cross_entropy": None,
    "soft_target_cross_entropy": None,
}


def _gpus(value: object) -> list[tuple[str, object]]:
    logger.warning("NUM_GPUS has no effect: processes are started by torchrun --nproc_per_node=%s %s", value, COMMAND)
    return []


def _machines(value: object) -> list[tuple[str, object]]:
    where = "--rdzv_backend=c10d --rdzv_endpoint=HOST:29500 --nproc_per_node=GPUS"
    logger.warning("NUM_SHARDS has no effect: type on every machine torchrun --nnodes=%s %s %s", value, where, COMMAND)
    return []


COMMAND = "tools/run_net.py --cfg ..."

RENAMED: dict[str, Translation] = {
    "MODEL.LOSS_FUNC": _loss,
    "TRAIN.MIXUP_ALPHA": _mixup,
    "DATA.AUTOAUGMENT": _auto_augment,
    "DATA.RAND_CROP": _erasing,  # the probability of random erasing in X-ViT's release
    "NUM_GPUS": _gpus,
    "NUM_SHARDS": _machines,
    "VIT.ATS_BLOCKS": _ats_blocks,
    "VIT.NUM_TOKENS": _rename("ATS.NUM_TOKENS"),
    "VIT.NUM_CLASSES": _rename("MODEL.NUM_CLASSES"),
    "MODEL.MODEL_NAME": _network,
    "XVIT.BACKBONE.DROP_PATH_RATE": _rename("VIT.DROP_PATH_RATE"),
    "XVIT.BACKBONE.DROP_ATTN_RATE": _rename("VIT.ATTN_DROP_RATE"),
    "TIMESFORMER.PRETRAINED_MODEL": _start_from,
    **legacy_images.RENAMED,
}

# Settings of the official code that only run with one value: that value is what this project does.
FIXED: dict[str, tuple[object, ...]] = {
    "VIT.IN_CHANNELS": (3,),
    "VIT.QK_SCALE": (None,),
    "VIT.REPRESENTATION_SIZE": (None,),
    "VIT.HYBRID_BACKBONE": (None,),
    "VIT.NORM_LAYER": (None,),
    "XVIT.BACKBONE.NORM_LAYER": ("LN",),
    "DATA.COLORAUGMENT": (False,),
    "DATA.RANDAUGMENT": (False,),
    "DATA.USE_XVIT_AGUMENTATION": (True,),
    "MVIT.NORM": ("layernorm",),
    "MVIT.NORM_STEM": (False,),
    "MVIT.POOL_FIRST": (False,),
    "MVIT.SEPARATE_QKV": (False,),
    "MVIT.LAYER_SCALE_INIT_VALUE": (0.0,),
    "MVIT.REL_POS_ZERO_INIT": (False,),
    "MVIT.USE_FIXED_SINCOS_POS": (False,),
    "MVIT.REV.ENABLE": (False,),
    "DATA.MULTI_LABEL": (False,),
    **legacy_images.FIXED,
}

# Keys that a published YAML holds twice with two values, as (key, first, last); the last one is meant, as YAML has it.
REPEATED: dict[tuple[object, ...], str] = {("DEPTH", 16, 24): "SlowFast, configs/Kinetics/MVIT_B_32x3_CONV.yaml"}

# Keys (or patterns) without meaning here -> the reason, printed in a warning.
IGNORED: dict[str, str] = {
    "VIT.DROP_TOKENS": "tokens are always dropped, with the batch-independent numbers of DROP_TOKENS False",
    "MODEL.ARCH": "MODEL.NAME says which network is built",
    "MODEL.SINGLE_PATHWAY_ARCH": "all networks here have one pathway",
    "MODEL.DROPCONNECT_RATE": "stochastic depth is VIT.DROP_PATH_RATE",
    "MODEL.FC_INIT_STD": "the head is initialised as in timm",
    "MODEL.HEAD_ACT": "models return logits",
    "XVIT.BASE_MODEL": "the backbone is described by the VIT keys (their defaults are ViT-B/16)",
    "XVIT.PRETRAIN": "weights to start from are TRAIN.CHECKPOINT_FILE_PATH",
    "TEMPORAL_HEAD.HIDDEN_DIM": "the temporal head is as wide as the backbone, VIT.EMBED_DIM",
    "SLOWFAST.*": "all networks here have one pathway",
    "SHARD_ID": "torchrun finds it; or type it there: torchrun --node_rank=R",
    "DIST_BACKEND": "the backend follows the device",
    "LOG_MODEL_INFO": "parameters and GFLOPs are always logged",
    "TRAIN.CHECKPOINT_TYPE": "the file's format is recognised",
    "TEST.CHECKPOINT_TYPE": "the file's format is recognised",
    "TRAIN.CHECKPOINT_INFLATE": "weights are converted to the network's shapes as they are loaded",
    "TRAIN.CHECKPOINT_EPOCH_RESET": "TRAIN.CHECKPOINT_FILE_PATH loads weights only; resuming is TRAIN.AUTO_RESUME",
    "TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN": "the releases' key prefixes are recognised",
    "TEST.SAVE_RESULTS_PATH": "results go to OUTPUT_DIR/result.json",
    "AUG.RE_SPLIT": "augmentation is not split",
    "SOLVER.DAMPENING": "timm's optimizers set it",
    "SOLVER.NESTEROV": "SOLVER.OPTIMIZING_METHOD sgd is SGD with Nesterov momentum, momentum is SGD without",
    "SOLVER.GAMMA": "SOLVER.LR_POLICY has no exponential decay",
    "SOLVER.STEP_SIZE": "steps are SOLVER.STEPS",
    "SOLVER.WARMUP_FACTOR": "the warm-up starts from SOLVER.WARMUP_START_LR",
    "SOLVER.BASE_LR_SCALE_NUM_SHARDS": "SOLVER.BASE_LR is the rate of the whole batch",
    "SOLVER.CLIP_GRADIENT": "clipping is SOLVER.CLIP_GRAD_L2NORM",
    "DATA.INPUT_CHANNEL_NUM": "images and clips have three channels",
    "DATA.TRAIN_PCA_*": "PCA jitter is not part of any of the recipes",
    "DATA.PATH_TO_PRELOAD_IMDB": "the data folder is scanned",
    "DATA.TRAIN_JITTER_MOTION_SHIFT": "not part of any of the recipes",
    "DATA.INV_UNIFORM_SAMPLE": "the short side is drawn evenly, as in every Kinetics recipe",
    "DATA.REVERSE_INPUT_CHANNEL": "videos are read as RGB, which SlowFast makes of OpenCV's BGR with it",
    "DATA.DECODING_BACKEND": "videos are decoded by PyAV",
    "DATA_LOADER.ENABLE_MULTI_THREAD_DECODE": "decoding is parallel over workers",
    "BN.*": "SlowFast's networks here have no batch norm; that of CvT and PS-ViT is torch's",
    "DETECTION.*": "detection is not part of this project",
    "AVA.*": "AVA is not part of this project",
    "BENCHMARK.*": "benchmarks are tools/benchmark.py",
    **legacy_images.IGNORED,
}


# What the releases' code does where their YAMLs say nothing, or whatever they say.
_SLOWFAST_DEFAULTS = {
    "SOLVER.WARMUP_EPOCHS": 0.0,
    "SOLVER.COSINE_END_LR": 0.0,
    "SOLVER.COSINE_AFTER_WARMUP": False,
    "SOLVER.ZERO_WD_1D_PARAM": False,
    "AUG.ENABLE": False,
}
_NO_AUG_NODE = {"AUG.RE_PROB": 0.0, "AUG.COLOR_JITTER": 0.0}  # X-ViT's and TimeSformer's forks are older
RELEASE_DEFAULTS: dict[str, dict[str, object]] = {
    "XVIT": _SLOWFAST_DEFAULTS
    | _NO_AUG_NODE
    | {
        "MODEL.DROPOUT_RATE": 0.5,
        "XVIT.LOCATIONS_LIST": [9, 10, 11],
        "DATA.TRAIN_MULTI_SCALE_CROP": [1, 0.875, 0.75, 0.66],
        "DATA.PATH_LABEL_SEPARATOR": ",",
    },
    "vit_base_patch16_224": _SLOWFAST_DEFAULTS | _NO_AUG_NODE | {"VIT.DROP_PATH_RATE": 0.1},
    "MViT": _SLOWFAST_DEFAULTS | {"TEST.ENSEMBLE_OF": "softmax"},
}


def implied(pairs: list[tuple[str, object]]) -> list[tuple[str, object]]:
    """Settings that the YAML of a video release implies; they come before its own `pairs`, which may change them."""
    given = dict(pairs)
    name = given.get("MODEL.MODEL_NAME")
    if name not in RELEASE_DEFAULTS:
        return []
    settings = dict(RELEASE_DEFAULTS[name])
    if NETWORKS.get(name) == "TimeSformer" and "DATA.TRAIN_CROP_SIZE" in given:
        settings["VIT.IMG_SIZE"] = given["DATA.TRAIN_CROP_SIZE"]  # its position embedding has the grid of the crop
    logger.info("MODEL.MODEL_NAME %s implies %s", name, ", ".join(f"{key} {value}" for key, value in settings.items()))
    return list(settings.items())


def normalise(value: object) -> object:
    """The official YAMLs write None as the string "None"; YAML's own null arrives as None already."""
    return None if isinstance(value, str) and value.strip() == "None" else value


def network_name(value: object) -> object:
    """MODEL.NAME of this project for the name of a network in an older release; other values as they are."""
    if value in NETWORKS:
        logger.info("MODEL.NAME %s -> %s", value, NETWORKS[value])
    return NETWORKS.get(value, value)


def translate(key: str, value: object) -> list[tuple[str, object]] | None:
    """Pairs of this project that replace an old `key`; [] if it has no meaning here; None if it is not an old key.

    Raises:
        UserError: the value asks for something that is not built.
    """
    value = normalise(value)
    if key in RENAMED:
        pairs = RENAMED[key](value)
        what = ", ".join(f"{new} {new_value}" for new, new_value in pairs)
        logger.info("%s -> %s", key, what or f"nothing to set for {value}")
        return pairs
    if key in FIXED:
        if value not in FIXED[key]:
            allowed = " or ".join(str(v) for v in FIXED[key])
            raise UserError(f"{key} {value}: only {allowed} is supported.")
        logger.info("%s %s is how it is here.", key, value)
        return []
    for pattern, reason in IGNORED.items():
        if fnmatch.fnmatchcase(key, pattern):
            logger.warning("%s has no effect: %s.", key, reason)
            return []
    return None
