"""Keys of older releases: SlowFast, X-ViT, TimeSformer, the official ATS code, CvT, PS-ViT.

First the table, then `translate`, which applies it. Renamed keys are logged with their new names, keys without effect
get a warning with the reason, and unsupported values are errors. Nothing is dropped silently.

CvT and PS-ViT give batch size and learning rate per GPU, and CvT multiplies the rate by the number of GPUs. Both are
taken unchanged, which is the release's training on one GPU; `configs/ImageNet` has them for the original GPU counts.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Container, Mapping
from typing import Any

from ats.config.key import parse
from ats.config.keys import keys
from ats.errors import UserError, shown

logger = logging.getLogger(__name__)

VALUE = "VALUE"  # in the table: the value of the old key
SMOOTHING, ZERO_WD = "MIXUP.LABEL_SMOOTH_VALUE", "SOLVER.ZERO_WD_1D_PARAM"
Settings = Mapping[str, object]  # new key -> its value, or a function of the old key's value
Rule = str | Settings | Callable[[object], Settings]  # a new name, settings, or settings that depend on the value


def _if_set(settings: Settings, otherwise: Settings | None = None) -> Rule:
    return lambda value: settings if value else otherwise or {}


def _by_value(cases: dict) -> Callable[[object], Any]:
    def choose(value: object) -> object:
        if not isinstance(value, (int, float, str)) or value not in cases:
            raise ValueError(f"choose from {', '.join(map(str, cases))}.")
        return cases[value]

    return choose


def _side(value: object) -> object:
    sides = value if isinstance(value, (list, tuple)) else [value]
    if not sides or any(side != sides[0] for side in sides):
        raise ValueError("only square images are supported.")
    return sides[0]


def _crop_ratio(is_centre_crop: object) -> float:
    if not is_centre_crop:
        text = "squeezes whole images; here the short side is resized and the centre cropped (DATA.TEST_CROP_RATIO 1.0)"
        logger.warning("TEST.CENTER_CROP False %s.", text)
    return 0.875 if is_centre_crop else 1.0


def _psvit(side: int, stem: tuple = (64, 64, 256), depth: int = 14, width: int = 384, heads: int = 6) -> Settings:
    """The settings of a PS-ViT network (default: B), including the defaults of its main.py."""
    return {
        "MODEL.NAME": "PSViT", "PSVIT.NUM_POINTS": [side, side], "PSVIT.NUM_ITERS": 4, "PSVIT.OFFSET_GAMMA": 1.0,
        "PSVIT.MLP_RATIO": 3.0, "PSVIT.QKV_BIAS": False, "PSVIT.STEM_DIMS": list(stem), "PSVIT.DEPTH": depth,
        "PSVIT.EMBED_DIM": width, "PSVIT.NUM_HEADS": heads, "PSVIT.DROP_RATE": 0.1, "PSVIT.DROP_PATH_RATE": 0.1,
        "SOLVER.WARMUP_EPOCHS": 3, "AUG.INTERPOLATION": "random", "AUG.RE_PROB": 0.0, "MIXUP.ENABLE": True,
        "MIXUP.ALPHA": 0.2, "EMA.ENABLE": True, "EMA.DECAY": 0.99996, "DATA.TEST_CROP_RATIO": 0.9,
    }  # fmt: skip


PSVIT_NETWORKS = {"ps_vit_ti_14": _psvit(14, (64, 64, 192), 12, 192, 3)}
PSVIT_NETWORKS |= {f"ps_vit_b_{side}": _psvit(side) for side in (14, 16, 18)}

# Names of networks in older releases -> MODEL.NAME here. TimeSformer's release calls it by its initial weights.
NETWORKS = {"XVIT": "XViT", "vit_base_patch16_224": "TimeSformer", "cls_cvt": "CvT"}

# Loss functions and the label smoothing they imply. X-ViT's release has no key for its 0.3; the last three have one.
_LOSSES = {"cross_entropy": {SMOOTHING: 0.0}, "smooth_cross_entropy": {SMOOTHING: 0.3}}
_LOSSES |= {"soft_cross_entropy": {}, "label_smoothing_cross_entropy": {}, "soft_target_cross_entropy": {}}

RENAMED: dict[str, Rule] = {
    # SlowFast, X-ViT, TimeSformer and the official ATS release; its ATS_BLOCKS None or [] is the dense network
    "MODEL.LOSS_FUNC": _by_value(_LOSSES),
    "TRAIN.MIXUP_ALPHA": _if_set({"MIXUP.ENABLE": True, "MIXUP.ALPHA": VALUE, "MIXUP.CUTMIX_ALPHA": 0.0}),
    "DATA.AUTOAUGMENT": _if_set({"AUG.ENABLE": True, "AUG.AA_TYPE": "v0"}),
    "DATA.RAND_CROP": _if_set({"AUG.ENABLE": True, "AUG.RE_PROB": VALUE}),  # X-ViT's probability of random erasing
    "VIT.ATS_BLOCKS": _if_set({"ATS.ENABLE": True, "ATS.BLOCKS": VALUE}, {"ATS.ENABLE": False}),
    "VIT.NUM_TOKENS": "ATS.NUM_TOKENS", "VIT.NUM_CLASSES": "MODEL.NUM_CLASSES",
    "MODEL.MODEL_NAME": {"MODEL.NAME": lambda value: NETWORKS.get(str(value), value)},
    "XVIT.BACKBONE.DROP_PATH_RATE": "VIT.DROP_PATH_RATE", "XVIT.BACKBONE.DROP_ATTN_RATE": "VIT.ATTN_DROP_RATE",
    "TIMESFORMER.PRETRAINED_MODEL": _if_set({"TRAIN.CHECKPOINT_FILE_PATH": VALUE}),
    # CvT
    **{f"MODEL.SPEC.{key.removeprefix('CVT.')}": key for key in keys() if key.startswith("CVT.")},
    "WORKERS": "DATA_LOADER.NUM_WORKERS", "PIN_MEMORY": "DATA_LOADER.PIN_MEMORY", "PRINT_FREQ": "LOG_PERIOD",
    "AMP.ENABLED": "TRAIN.MIXED_PRECISION", "LOSS.LABEL_SMOOTHING": SMOOTHING,
    "DATASET.ROOT": "DATA.PATH_TO_DATA_DIR", "INPUT.MEAN": "DATA.MEAN", "INPUT.STD": "DATA.STD",
    "AUG.SCALE": "DATA.TRAIN_JITTER_SCALES_RELATIVE", "AUG.RATIO": "DATA.TRAIN_JITTER_ASPECT_RELATIVE",
    "AUG.MIXUP": _if_set({"MIXUP.ENABLE": True, "MIXUP.ALPHA": VALUE}, {"MIXUP.ALPHA": VALUE}),
    "AUG.MIXCUT": _if_set({"MIXUP.ENABLE": True, "MIXUP.CUTMIX_ALPHA": VALUE}, {"MIXUP.CUTMIX_ALPHA": VALUE}),
    "AUG.MIXUP_PROB": "MIXUP.PROB", "AUG.MIXUP_SWITCH_PROB": "MIXUP.SWITCH_PROB",
    "AUG.TIMM_AUG.RE_COUNT": "AUG.RE_COUNT", "AUG.TIMM_AUG.RE_MODE": "AUG.RE_MODE",
    "AUG.TIMM_AUG.RE_PROB": "AUG.RE_PROB", "AUG.TIMM_AUG.AUTO_AUGMENT": "AUG.AA_TYPE",
    "AUG.TIMM_AUG.COLOR_JITTER": "AUG.COLOR_JITTER", "AUG.TIMM_AUG.INTERPOLATION": "AUG.INTERPOLATION",
    "TRAIN.BATCH_SIZE_PER_GPU": "TRAIN.BATCH_SIZE", "TRAIN.END_EPOCH": "SOLVER.MAX_EPOCH",
    "TRAIN.IMAGE_SIZE": {"DATA.TRAIN_CROP_SIZE": _side}, "TEST.IMAGE_SIZE": {"DATA.TEST_CROP_SIZE": _side},
    "TRAIN.OPTIMIZER": {"SOLVER.OPTIMIZING_METHOD": lambda value: str(value).lower()},
    "TRAIN.LR": "SOLVER.BASE_LR", "TRAIN.WD": "SOLVER.WEIGHT_DECAY", "TRAIN.WITHOUT_WD_LIST": {ZERO_WD: bool},
    "TRAIN.LR_SCHEDULER.ARGS.warmup_epochs": "SOLVER.WARMUP_EPOCHS",
    "TRAIN.LR_SCHEDULER.ARGS.warmup_lr": "SOLVER.WARMUP_START_LR",
    "TRAIN.LR_SCHEDULER.ARGS.min_lr": "SOLVER.COSINE_END_LR",
    "TEST.BATCH_SIZE_PER_GPU": "TEST.BATCH_SIZE", "TEST.MODEL_FILE": "TEST.CHECKPOINT_FILE_PATH",
    "TEST.CENTER_CROP": {"DATA.TEST_CROP_RATIO": _crop_ratio},
    "TEST.INTERPOLATION": {"DATA.TEST_INTERPOLATION": _by_value({0: "nearest", 2: "bilinear", 3: "bicubic"})},  # PIL's
    # PS-ViT
    "model": _by_value(PSVIT_NETWORKS), "img_size": {"DATA.TRAIN_CROP_SIZE": VALUE, "DATA.TEST_CROP_SIZE": VALUE},
    "batch_size": "TRAIN.BATCH_SIZE", "lr": "SOLVER.BASE_LR", "weight_decay": "SOLVER.WEIGHT_DECAY",
    "drop": "PSVIT.DROP_RATE", "mixup": "MIXUP.ALPHA", "reprob": "AUG.RE_PROB", "warmup_epochs": "SOLVER.WARMUP_EPOCHS",
}  # fmt: skip

# Settings for which only one value works in the releases; this project always uses that value.
FIXED: dict[str, object] = {
    "VIT.IN_CHANNELS": 3, "VIT.QK_SCALE": None, "VIT.REPRESENTATION_SIZE": None, "VIT.HYBRID_BACKBONE": None,
    "VIT.NORM_LAYER": None, "XVIT.BACKBONE.NORM_LAYER": "LN", "DATA.COLORAUGMENT": False, "DATA.RANDAUGMENT": False,
    "DATA.USE_XVIT_AGUMENTATION": True, "DATA.MULTI_LABEL": False,
    "MVIT.NORM": "layernorm", "MVIT.NORM_STEM": False, "MVIT.POOL_FIRST": False, "MVIT.SEPARATE_QKV": False,
    "MVIT.LAYER_SCALE_INIT_VALUE": 0.0, "MVIT.REL_POS_ZERO_INIT": False, "MVIT.USE_FIXED_SINCOS_POS": False,
    "MVIT.REV.ENABLE": False,
    "AUG.TIMM_AUG.HFLIP": 0.5, "AUG.TIMM_AUG.VFLIP": 0.0, "TRAIN.BEGIN_EPOCH": 0, "TRAIN.SHUFFLE": True,
    "TRAIN.LR_SCHEDULER.METHOD": "timm", "TRAIN.LR_SCHEDULER.ARGS.sched": "cosine",
}  # fmt: skip

# Keys (or patterns) without effect here -> the reason, printed in a warning.
IGNORED: dict[str, str] = {
    "NUM_GPUS": f"processes are started by torchrun --nproc_per_node={VALUE} tools/run_net.py --cfg FILE",
    "NUM_SHARDS": f"type on every machine torchrun --nnodes={VALUE} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 "
    "--nproc_per_node=GPUS tools/run_net.py --cfg FILE",
    "SHARD_ID": f"torchrun finds it; to set it, type torchrun --node_rank={VALUE}",
    "VIT.DROP_TOKENS": "tokens are always dropped, with the batch-independent numbers of DROP_TOKENS False",
    "MODEL.ARCH": "MODEL.NAME chooses the network",
    "MODEL.SINGLE_PATHWAY_ARCH": "all networks here have one pathway",
    "MODEL.DROPCONNECT_RATE": "VIT.DROP_PATH_RATE sets stochastic depth",
    "MODEL.FC_INIT_STD": "the head is initialised as in timm", "MODEL.HEAD_ACT": "models return logits",
    "XVIT.BASE_MODEL": "the VIT keys describe the backbone (default: ViT-B/16)",
    "XVIT.PRETRAIN": "TRAIN.CHECKPOINT_FILE_PATH names the initial weights",
    "TEMPORAL_HEAD.HIDDEN_DIM": "the temporal head is as wide as the backbone, VIT.EMBED_DIM",
    "SLOWFAST.*": "all networks here have one pathway", "DIST_BACKEND": "the backend follows the device",
    "LOG_MODEL_INFO": "parameters and GFLOPs are always logged", "*.CHECKPOINT_TYPE": "the file format is detected",
    "TRAIN.CHECKPOINT_INFLATE": "weights are converted to the network's shapes on loading",
    "TRAIN.CHECKPOINT_EPOCH_RESET": "TRAIN.CHECKPOINT_FILE_PATH loads weights only; resuming is TRAIN.AUTO_RESUME",
    "TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN": "the releases' key prefixes are detected",
    "TEST.SAVE_RESULTS_PATH": "results go to OUTPUT_DIR/result.json", "AUG.RE_SPLIT": "augmentation is not split",
    "SOLVER.DAMPENING": "timm's optimizers set it",
    "SOLVER.NESTEROV": "SOLVER.OPTIMIZING_METHOD sgd is SGD with Nesterov momentum, momentum is SGD without",
    "SOLVER.GAMMA": "SOLVER.LR_POLICY has no exponential decay", "SOLVER.STEP_SIZE": "SOLVER.STEPS lists the steps",
    "SOLVER.WARMUP_FACTOR": "the warm-up starts from SOLVER.WARMUP_START_LR",
    "SOLVER.BASE_LR_SCALE_NUM_SHARDS": "SOLVER.BASE_LR is the rate for the whole batch",
    "SOLVER.CLIP_GRADIENT": "SOLVER.CLIP_GRAD_L2NORM clips",
    "DATA.INPUT_CHANNEL_NUM": "images and clips have three channels",
    "DATA.TRAIN_PCA_*": "PCA jitter is not part of any of the recipes",
    "DATA.PATH_TO_PRELOAD_IMDB": "the data folder is scanned",
    "DATA.TRAIN_JITTER_MOTION_SHIFT": "not part of any of the recipes",
    "DATA.INV_UNIFORM_SAMPLE": "the short side is drawn uniformly, as in every Kinetics recipe",
    "DATA.REVERSE_INPUT_CHANNEL": "videos are read as RGB; SlowFast converts OpenCV's BGR with this key",
    "DATA.DECODING_BACKEND": "videos are decoded by PyAV",
    "DATA_LOADER.ENABLE_MULTI_THREAD_DECODE": "decoding is parallel over workers",
    "BN.*": "SlowFast's networks here have no batch norm; CvT and PS-ViT use torch's",
    "DETECTION.*": "detection is not part of this project", "AVA.*": "AVA is not part of this project",
    "BENCHMARK.*": "tools/benchmark.py runs benchmarks", "AMP.MEMORY_FORMAT": "the memory format changes no result",
    "AUG.TIMM_AUG.*": "timm's augmentation is the only one",
    "CUDNN.*": "cuDNN settings change only round-off",
    "DATASET.*": "TRAIN.DATASET and TEST.DATASET name the data set", "DEBUG.*": "there is no debug mode",
    "MODEL_SUMMARY": "parameters and GFLOPs are always logged",
    "TRAIN.LR_SCHEDULER.ARGS.*": "the schedule ends at SOLVER.MAX_EPOCH",
}  # fmt: skip

# What the releases' code does if their YAML files do not set it, or regardless of what they set.
_SLOWFAST_DEFAULTS: dict[str, object] = {"SOLVER.WARMUP_EPOCHS": 0.0, "SOLVER.COSINE_END_LR": 0.0}
_SLOWFAST_DEFAULTS |= {"SOLVER.COSINE_AFTER_WARMUP": False, ZERO_WD: False, "AUG.ENABLE": False}
_NO_AUG_NODE = {"AUG.RE_PROB": 0.0, "AUG.COLOR_JITTER": 0.0}  # X-ViT's and TimeSformer's forks are older
RELEASE_DEFAULTS: dict[str, dict[str, object]] = {
    "XVIT": _SLOWFAST_DEFAULTS | _NO_AUG_NODE | {
        "MODEL.DROPOUT_RATE": 0.5, "XVIT.LOCATIONS_LIST": [9, 10, 11], "DATA.PATH_LABEL_SEPARATOR": ",",
        "DATA.TRAIN_MULTI_SCALE_CROP": [1, 0.875, 0.75, 0.66],
    },
    "vit_base_patch16_224": _SLOWFAST_DEFAULTS | _NO_AUG_NODE | {"VIT.DROP_PATH_RATE": 0.1},
    "MViT": _SLOWFAST_DEFAULTS | {"TEST.ENSEMBLE_OF": "softmax"},
}  # fmt: skip


def translate(key: str, value: object, known: Container[str]) -> list[tuple[str, object]]:
    """Translate one pair of any release into pairs of this project; `known` and unknown keys stay unchanged.

    Raises a UserError if the value asks for something unsupported.
    """
    if key == "MODEL.NAME" and isinstance(value, str) and value in NETWORKS:
        logger.info("MODEL.NAME %s -> %s", value, NETWORKS[value])
        return [(key, NETWORKS[value])]
    replaced = None if key in known else translate_key(key, parse(value))
    return [(key, value)] if replaced is None else replaced


def translate_key(key: str, value: object) -> list[tuple[str, object]] | None:
    """The pairs that replace one old `key`; [] if it has no effect here; None if it is not an old key."""
    if key in RENAMED:
        pairs = _apply(RENAMED[key], key, value)
        what = ", ".join(f"{new} {shown(new_value)}" for new, new_value in pairs)
        logger.info("%s -> %s", key, what or f"nothing to set for {shown(value)}")
        return pairs
    if key in FIXED:
        if value != FIXED[key]:
            raise UserError(f"{key} {shown(value)}: only {FIXED[key]} is supported.")
        logger.info("%s %s is always the case here.", key, value)
        return []
    for pattern, reason in IGNORED.items():
        if fnmatch.fnmatchcase(key, pattern):
            logger.warning("%s has no effect: %s.", key, reason.replace(VALUE, shown(value)))
            return []
    return None


def _apply(rule: Rule, key: str, value: object) -> list[tuple[str, object]]:
    def fill(entry: object) -> object:
        return entry(value) if callable(entry) else value if entry == VALUE else entry

    try:
        settings = {rule: VALUE} if isinstance(rule, str) else rule(value) if callable(rule) else rule
        return [(new, fill(entry)) for new, entry in settings.items()]
    except ValueError as error:
        raise UserError(f"{key} {shown(value)}: {error}") from None


def implied(given: Mapping[str, object]) -> list[tuple[str, object]]:
    """Settings built into the code of a video release; applied before its YAML, which may override them."""
    name = given.get("MODEL.MODEL_NAME")
    if not isinstance(name, str) or name not in RELEASE_DEFAULTS:
        return []
    settings = dict(RELEASE_DEFAULTS[name])
    if NETWORKS.get(name) == "TimeSformer" and "DATA.TRAIN_CROP_SIZE" in given:
        settings["VIT.IMG_SIZE"] = given["DATA.TRAIN_CROP_SIZE"]  # its position embedding has the grid of the crop
    logger.info("MODEL.MODEL_NAME %s implies %s", name, ", ".join(f"{key} {value}" for key, value in settings.items()))
    return list(settings.items())
