"""Which numbers a key takes: a range (of a list, for each of its numbers), and how many numbers a list has.

Every key whose default is a number, or that takes lists of numbers, stands here once; a test looks after that. What
depends on other keys (a width that heads divide, blocks that the network has) is checked where the network is built.
"""

from __future__ import annotations

from ats.options import COUNT, FINITE, FROM_0, POSITIVE, PROBABILITY, RATE, SEED, SHARE, Range

_KEYS: dict[Range, str] = {
    FINITE: "DATA.MEAN",
    FROM_0: """
        XVIT.LOCATIONS_LIST TIMESFORMER.TEMPORAL_EMBED_LEN MVIT.PATCH_PADDING MVIT.HEAD_INIT_SCALE CVT.PATCH_PADDING
        CVT.PADDING_KV CVT.PADDING_Q PSVIT.OFFSET_GAMMA ATS.BLOCKS ATS.MIN_TOKENS TOME.R TRAIN.EVAL_PERIOD
        TRAIN.CHECKPOINT_PERIOD TRAIN.CHECKPOINT_STEPS TRAIN.CHECKPOINT_MINUTES TRAIN.CHECKPOINT_KEEP SOLVER.BASE_LR
        SOLVER.STEPS SOLVER.LRS SOLVER.COSINE_END_LR SOLVER.WARMUP_EPOCHS SOLVER.WARMUP_START_LR SOLVER.WEIGHT_DECAY
        DATA.TRAIN_JITTER_FPS DATA_LOADER.NUM_WORKERS AUG.COLOR_JITTER MIXUP.ALPHA MIXUP.CUTMIX_ALPHA
        """,
    POSITIVE: """
        VIT.MLP_RATIO MVIT.MLP_RATIO MVIT.DIM_MUL MVIT.HEAD_MUL CVT.MLP_RATIO PSVIT.MLP_RATIO ATS.NUM_TOKENS
        SOLVER.LAYER_DECAY SOLVER.CLIP_GRAD_L2NORM SOLVER.CLIP_GRAD_VAL DATA.STD DATA.TARGET_FPS
        DATA.TRAIN_JITTER_ASPECT_RELATIVE DIST_TIMEOUT_MINUTES
        """,
    COUNT: """
        MODEL.NUM_CLASSES VIT.IMG_SIZE VIT.PATCH_SIZE VIT.EMBED_DIM VIT.DEPTH VIT.NUM_HEADS XVIT.NUM_SEGMENTS
        XVIT.SHIFT_DIV XVIT.TEMPORAL_EMBED_LEN TEMPORAL_HEAD.NUM_ATTENTION_HEADS TEMPORAL_HEAD.NUM_HIDDEN_LAYERS
        TEMPORAL_HEAD.MLP_DIM MVIT.PATCH_KERNEL MVIT.PATCH_STRIDE MVIT.EMBED_DIM MVIT.DEPTH MVIT.NUM_HEADS
        MVIT.POOL_Q_STRIDE MVIT.POOL_KV_STRIDE MVIT.POOL_KV_STRIDE_ADAPTIVE MVIT.POOL_KVQ_KERNEL CVT.NUM_STAGES
        CVT.PATCH_SIZE CVT.PATCH_STRIDE CVT.DIM_EMBED CVT.NUM_HEADS CVT.DEPTH CVT.KERNEL_QKV CVT.STRIDE_KV CVT.STRIDE_Q
        PSVIT.NUM_POINTS PSVIT.NUM_ITERS PSVIT.STEM_DIMS PSVIT.DEPTH PSVIT.EMBED_DIM PSVIT.NUM_HEADS TRAIN.BATCH_SIZE
        TRAIN.GRAD_ACCUM_STEPS SOLVER.MAX_EPOCH TEST.BATCH_SIZE TEST.NUM_ENSEMBLE_VIEWS DATA.NUM_FRAMES
        DATA.SAMPLING_RATE DATA.TRAIN_JITTER_SCALES DATA.TRAIN_CROP_SIZE DATA.TEST_CROP_SIZE AUG.NUM_SAMPLE AUG.RE_COUNT
        LOG_PERIOD TENSORBOARD.NUM_IMAGES
        """,
    PROBABILITY: "DATA.MAX_BAD_FRACTION AUG.RE_PROB MIXUP.PROB MIXUP.SWITCH_PROB",
    RATE: """
        MODEL.DROPOUT_RATE VIT.DROP_RATE VIT.ATTN_DROP_RATE VIT.DROP_PATH_RATE TEMPORAL_HEAD.HIDDEN_DROPOUT_PROB
        TEMPORAL_HEAD.ATTENTION_PROBS_DROPOUT_PROB MVIT.DROPOUT_RATE MVIT.DROPPATH_RATE CVT.ATTN_DROP_RATE CVT.DROP_RATE
        CVT.DROP_PATH_RATE PSVIT.DROP_RATE PSVIT.ATTN_DROP_RATE PSVIT.DROP_PATH_RATE EMA.DECAY SOLVER.MOMENTUM
        MIXUP.LABEL_SMOOTH_VALUE
        """,
    SHARE: """
        EVIT.KEEP_RATE DATA.TRAIN_MULTI_SCALE_CROP DATA.TRAIN_JITTER_SCALES_RELATIVE DATA.TEST_CROP_RATIO
        """,
    SEED: "ATS.SEED RNG_SEED",
}
RANGES: dict[str, Range] = {key: within for within, keys in _KEYS.items() for key in keys.split()}

# Lists of a fixed length; 0 where an empty list has a meaning, too.
LENGTHS: dict[str, tuple[int, ...]] = {
    "VIT.IMG_SIZE": (2,),
    "MVIT.POOL_KV_STRIDE_ADAPTIVE": (3,),
    "MVIT.POOL_KVQ_KERNEL": (3,),
    "PSVIT.NUM_POINTS": (2,),
    "PSVIT.STEM_DIMS": (3,),
    "DATA.MEAN": (0, 3),
    "DATA.STD": (0, 3),
    "DATA.TRAIN_JITTER_SCALES": (2,),
    "DATA.TRAIN_JITTER_SCALES_RELATIVE": (0, 2),
    "DATA.TRAIN_JITTER_ASPECT_RELATIVE": (0, 2),
}
# Lists [[block, number, ...], ...]; the range is that of the numbers behind the block.
OF_BLOCKS = ("MVIT.DIM_MUL", "MVIT.HEAD_MUL", "MVIT.POOL_Q_STRIDE", "MVIT.POOL_KV_STRIDE")


def is_in_range(name: str, value: object) -> bool:
    """Whether the key `name` takes `value`, which is of its type."""
    if name not in RANGES or value is None:
        return True
    if isinstance(value, list) and len(value) not in LENGTHS.get(name, (len(value),)):
        return False
    numbers = value if isinstance(value, list) else [value]
    if name in OF_BLOCKS:
        rows = [row for row in numbers if isinstance(row, (list, tuple)) and row]  # others are named by `mvit_plan`
        if not all(FROM_0.holds(row[0]) for row in rows):
            return False
        numbers = [number for row in rows for number in row[1:]]
    return all(RANGES[name].holds(number) for number in numbers)


def describe_range(name: str) -> str:
    """The range of the numbers of the key `name`: "from 0 to below 1"; "" if it has none."""
    return str(RANGES.get(name, ""))


def wanted(name: str, types: tuple[type, ...]) -> str:
    """What to give for the key `name`, which takes `types`: "a number from 0 to below 1"."""
    within = f" {RANGES[name]}".rstrip()
    one, many = f"a number{within}", f"numbers{within}" + " behind each block from 0" * (name in OF_BLOCKS)
    counts = " or ".join(str(length) if length else "no" for length in LENGTHS.get(name, ()))
    several = f"{counts} {many}" if counts else many
    options = [one] * (int in types or float in types) + [several] * (list in types) + ["None"] * (type(None) in types)
    return " or ".join(options)
