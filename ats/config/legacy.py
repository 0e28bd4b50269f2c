"""Keys of older releases (SlowFast, XViT, the official ATS code) and what they become here.

`translate` rewrites one `(key, value)` into the keys of this project. A renamed key is logged once with what it became;
a key that has no meaning here is named in a warning with the reason; a value we cannot honour is an error. Nothing is
dropped silently.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable

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


RENAMED: dict[str, Translation] = {
    "VIT.ATS_BLOCKS": _ats_blocks,
    "VIT.NUM_TOKENS": _rename("ATS.NUM_TOKENS"),
    "VIT.NUM_CLASSES": _rename("MODEL.NUM_CLASSES"),
    "MODEL.MODEL_NAME": _rename("MODEL.NAME"),
}

# Settings of the official code that only run with one value: that value is what this project does.
FIXED: dict[str, tuple[object, ...]] = {
    "VIT.IN_CHANNELS": (3,),
    "VIT.QK_SCALE": (None,),
    "VIT.REPRESENTATION_SIZE": (None,),
    "VIT.HYBRID_BACKBONE": (None,),
    "VIT.NORM_LAYER": (None,),
    "MVIT.NORM": ("layernorm",),
    "MVIT.NORM_STEM": (False,),
    "MVIT.POOL_FIRST": (False,),
    "MVIT.SEPARATE_QKV": (False,),
    "MVIT.LAYER_SCALE_INIT_VALUE": (0.0,),
    "MVIT.REL_POS_ZERO_INIT": (False,),
    "MVIT.USE_FIXED_SINCOS_POS": (False,),
    "MVIT.REV.ENABLE": (False,),
    "MODEL.LOSS_FUNC": (
        "cross_entropy",
        "soft_cross_entropy",
        "label_smoothing_cross_entropy",
        "soft_target_cross_entropy",
    ),
    "DATA.MULTI_LABEL": (False,),
    "DATA.REVERSE_INPUT_CHANNEL": (False,),
    "TEST.NUM_ENSEMBLE_VIEWS": (1, 10),  # of images there is one view; 10 is SlowFast's default
    "TEST.NUM_SPATIAL_CROPS": (1, 3),
}

# Keys that a published YAML holds twice with two values, as (key, first, last); the last one is meant, as YAML has it.
REPEATED: dict[tuple[object, ...], str] = {("DEPTH", 16, 24): "SlowFast, configs/Kinetics/MVIT_B_32x3_CONV.yaml"}

# Keys (or patterns) without meaning here -> the reason, printed in a warning.
IGNORED: dict[str, str] = {
    "VIT.DROP_TOKENS": "tokens are always dropped, with the numbers of DROP_TOKENS False, which do not depend on the batch",
    "MODEL.ARCH": "MODEL.NAME says which network is built",
    "MODEL.SINGLE_PATHWAY_ARCH": "all networks here have one pathway",
    "MODEL.ACT_CHECKPOINT": "activations are always kept; it saves memory and changes no number",
    "MODEL.DROPCONNECT_RATE": "stochastic depth is VIT.DROP_PATH_RATE",
    "MODEL.FC_INIT_STD": "the head is initialised as in timm",
    "MODEL.HEAD_ACT": "models return logits",
    "NUM_GPUS": "processes are started by torchrun --nproc_per_node=N",
    "NUM_SHARDS": "machines are given to torchrun --nnodes=N",
    "SHARD_ID": "machines are given to torchrun --node_rank=R",
    "DIST_BACKEND": "the backend follows the device",
    "LOG_MODEL_INFO": "parameters and GFLOPs are always logged",
    "TRAIN.CHECKPOINT_TYPE": "the file's format is recognised",
    "TEST.CHECKPOINT_TYPE": "the file's format is recognised",
    "TRAIN.CHECKPOINT_INFLATE": "weights are converted to the network's shapes as they are loaded",
    "TRAIN.CHECKPOINT_EPOCH_RESET": "TRAIN.CHECKPOINT_FILE_PATH loads weights only; resuming is TRAIN.AUTO_RESUME",
    "TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN": "the releases' key prefixes are recognised",
    "TRAIN.MIXUP_ALPHA": "mixup is MIXUP.ALPHA",
    "TEST.SAVE_RESULTS_PATH": "results go to OUTPUT_DIR/result.json",
    "AUG.RE_SPLIT": "augmentation is not split",
    "SOLVER.DAMPENING": "timm's optimizers set it",
    "SOLVER.NESTEROV": "SOLVER.OPTIMIZING_METHOD sgd is SGD with Nesterov momentum, momentum is SGD without",
    "SOLVER.GAMMA": "SOLVER.LR_POLICY has no exponential decay",
    "SOLVER.STEP_SIZE": "SOLVER.LR_POLICY has no step policy",
    "SOLVER.STEPS": "SOLVER.LR_POLICY has no step policy",
    "SOLVER.LRS": "SOLVER.LR_POLICY has no step policy",
    "SOLVER.WARMUP_FACTOR": "the warm-up starts from SOLVER.WARMUP_START_LR",
    "SOLVER.BASE_LR_SCALE_NUM_SHARDS": "SOLVER.BASE_LR is the rate of the whole batch",
    "SOLVER.CLIP_GRADIENT": "clipping is SOLVER.CLIP_GRAD_L2NORM",
    "DATA.INPUT_CHANNEL_NUM": "images have three channels",
    "DATA.TRAIN_PCA_*": "PCA jitter is not part of any of the recipes",
    "DATA.PATH_TO_PRELOAD_IMDB": "the data folder is scanned",
    "DATA.TRAIN_JITTER_MOTION_SHIFT": "not part of any of the recipes",
    "DATA.INV_UNIFORM_SAMPLE": "not part of any of the recipes",
    "DATA_LOADER.ENABLE_MULTI_THREAD_DECODE": "decoding is parallel over workers",
    "BN.*": "these networks have no batch norm",
    "DETECTION.*": "detection is not part of this project",
    "AVA.*": "AVA is not part of this project",
    "BENCHMARK.*": "benchmarks are tools/benchmark.py",
}


def normalise(value: object) -> object:
    """The official YAMLs write None as the string "None"; YAML's own null arrives as None already."""
    return None if isinstance(value, str) and value.strip() == "None" else value


def translate(key: str, value: object) -> list[tuple[str, object]] | None:
    """Pairs of this project that replace an old `key`; [] if it has no meaning here; None if it is not an old key.

    Raises:
        UserError: the value asks for something that is not built.
    """
    value = normalise(value)
    if key in RENAMED:
        pairs = RENAMED[key](value)
        logger.info("%s -> %s", key, ", ".join(f"{new} {new_value}" for new, new_value in pairs))
        return pairs
    if key in FIXED:
        if value not in FIXED[key]:
            allowed = " or ".join(str(v) for v in FIXED[key])
            raise UserError(f"{key} {value}: only {allowed} is supported.")
        return []
    for pattern, reason in IGNORED.items():
        if fnmatch.fnmatchcase(key, pattern):
            logger.warning("%s has no effect: %s.", key, reason)
            return []
    return None
