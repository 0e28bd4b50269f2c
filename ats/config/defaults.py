"""Every configuration key: name, default, what it means (and, where the default does not tell, which types and choices
it takes).

One line per key, in the order in which `--help` prints them. Names and meanings are SlowFast's and the official ATS
release's wherever those have the key. `schema.py` turns the list into a CfgNode; `ranges.py` says
which numbers they take; `legacy.py` maps the keys of older
releases to these.
"""

from __future__ import annotations

from typing import NamedTuple


class Key(NamedTuple):
    """One configuration key. `types`: what it accepts, by default the type of `default`; `choices`: the allowed values,
    if few.
    """

    name: str
    default: object
    help: str
    types: tuple[type, ...] = ()
    choices: tuple[object, ...] = ()


NONE = type(None)

KEYS: list[Key] = [
    # ---- what is built
    Key("MODEL.NAME", "ViT", "Architecture; see ats.models.MODELS, or timm/<name>, see docs/PLUGIN.md."),
    Key(
        "MODEL.NUM_CLASSES",
        1000,
        "Classes of the head: as many as class folders, or more than the labels of the csv files.",
    ),
    Key(
        "MODEL.ACT_CHECKPOINT",
        False,
        "Activation checkpointing in training: blocks keep their inputs alone and are computed again in the backward "
        "pass. Less memory, about a third more time, the same losses and gradients.",
    ),
    Key("MODEL.DROPOUT_RATE", 0.0, "Dropout before the classification head, in training; TimeSformer has none."),
    Key(
        "VIT.IMG_SIZE",
        224,
        "Image size the position embedding belongs to, in pixels: one number or [height, width].",
        (int, list),
    ),
    Key("VIT.PATCH_SIZE", 16, "Side of a patch in pixels.", (int,)),
    Key("VIT.EMBED_DIM", 768, "Width of the tokens."),
    Key("VIT.DEPTH", 12, "Number of blocks."),
    Key("VIT.NUM_HEADS", 12, "Attention heads of a block; divides VIT.EMBED_DIM."),
    Key("VIT.MLP_RATIO", 4.0, "Hidden width of the MLP over VIT.EMBED_DIM."),
    Key("VIT.QKV_BIAS", True, "Bias in the query, key and value projections."),
    Key(
        "VIT.WEIGHT_INIT",
        "deit",
        "Initial weights: deit (normal, 0.02) or big_vision (Xavier, sine-cosine positions), for narrow networks.",
        choices=("deit", "big_vision"),
    ),
    Key(
        "VIT.DISTILLED", False, "DeiT's distillation token: two prefix tokens and two heads, whose logits are averaged."
    ),
    Key(
        "VIT.DROP_RATE", 0.0, "Dropout after the position embedding, the attention projection and the MLP, in training."
    ),
    Key("VIT.ATTN_DROP_RATE", 0.0, "Dropout on the attention weights, in training."),
    Key(
        "VIT.DROP_PATH_RATE",
        0.0,
        "Stochastic depth of the last block, in training; rises linearly from 0 in the first.",
    ),
    Key("XVIT.USE_XVIT", True, "Shift keys and values in time; False: a plain ViT on every frame."),
    Key("XVIT.NUM_SEGMENTS", 8, "Frames of a segment: the shift does not look beyond it. Divides DATA.NUM_FRAMES."),
    Key("XVIT.SHIFT_DIV", 8, "One part in so many of the channels comes from the next frame, one from the previous."),
    Key(
        "XVIT.LOCATIONS_LIST",
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
        "Blocks whose keys and values are shifted; those the network does not have are ignored.",
    ),
    Key("XVIT.TEMPORAL_EMBED_LEN", 8, "Length of the temporal embedding; it repeats along longer clips."),
    Key(
        "XVIT.CONSENSUS_TYPE",
        "vit",
        "From frames to the clip: a transformer over their CLS tokens (TEMPORAL_HEAD), or the mean of their logits.",
        choices=("vit", "avg"),
    ),
    Key("XVIT.BEFORE_SOFTMAX", True, "Of XVIT.CONSENSUS_TYPE avg: average logits; False: probabilities."),
    Key("TEMPORAL_HEAD.NUM_ATTENTION_HEADS", 12, "Attention heads of the temporal head; divides VIT.EMBED_DIM."),
    Key("TEMPORAL_HEAD.NUM_HIDDEN_LAYERS", 1, "Blocks of the temporal head."),
    Key("TEMPORAL_HEAD.MLP_DIM", 768, "Hidden width of the temporal head's classifier."),
    Key("TEMPORAL_HEAD.HIDDEN_DROPOUT_PROB", 0.0, "Dropout and stochastic depth of the temporal head, in training."),
    Key("TEMPORAL_HEAD.ATTENTION_PROBS_DROPOUT_PROB", 0.0, "Dropout on the temporal head's attention, in training."),
    Key(
        "TIMESFORMER.ATTENTION_TYPE",
        "divided_space_time",
        "Attention in time and then in space, over the whole clip at once, or in space alone.",
        choices=("divided_space_time", "joint_space_time", "space_only"),
    ),
    Key("TIMESFORMER.TEMPORAL_EMBED_LEN", 0, "Length of the time embedding; 0: DATA.NUM_FRAMES."),
    Key("MVIT.PATCH_2D", False, "Images: patches by a 2-D convolution; False: clips [B, 3, T, H, W]."),
    Key("MVIT.PATCH_KERNEL", [3, 7, 7], "Kernel of the patch convolution, (t, h, w), or (h, w) with MVIT.PATCH_2D."),
    Key("MVIT.PATCH_STRIDE", [2, 4, 4], "Stride of the patch convolution."),
    Key("MVIT.PATCH_PADDING", [2, 4, 4], "Padding of the patch convolution."),
    Key("MVIT.EMBED_DIM", 96, "Width of the tokens in the first block."),
    Key("MVIT.DEPTH", 16, "Number of blocks."),
    Key("MVIT.NUM_HEADS", 1, "Attention heads of the first block."),
    Key("MVIT.MLP_RATIO", 4.0, "Hidden width of the MLP over the attention's."),
    Key("MVIT.QKV_BIAS", True, "Bias in the query, key and value projection."),
    Key("MVIT.DIM_MUL", [], "Width: [[block, factor], ...], relative to the block before."),
    Key("MVIT.HEAD_MUL", [], "Heads: [[block, factor], ...], relative to the block before."),
    Key(
        "MVIT.DIM_MUL_IN_ATT",
        False,
        "v2: the width grows in the block's attention; v1: in the MLP of the block before.",
    ),
    Key(
        "MVIT.MODE",
        "conv",
        "Pooling of queries, keys and values: a depthwise convolution with LayerNorm, or max or average without.",
        choices=("conv", "max", "avg"),
    ),
    Key("MVIT.POOL_Q_STRIDE", [], "Pooling of queries, and the grid of the output: [[block, t, h, w], ...]."),
    Key("MVIT.POOL_KV_STRIDE", None, "Pooling of keys and values: [[block, t, h, w], ...].", (list, NONE)),
    Key(
        "MVIT.POOL_KV_STRIDE_ADAPTIVE",
        None,
        "Instead of MVIT.POOL_KV_STRIDE: stride [t, h, w] of the first block, divided by each query stride on the way.",
        (list, NONE),
    ),
    Key(
        "MVIT.POOL_KVQ_KERNEL",
        None,
        "Kernel [t, h, w] of all poolings, of those with stride 1 too; None: stride + 1, and 1 where the stride is 1.",
        (list, NONE),
    ),
    Key("MVIT.CLS_EMBED_ON", True, "CLS token, read out by the head; False: the mean of the tokens."),
    Key("MVIT.USE_MEAN_POOLING", False, "Read out the norm of the patches' mean, also where there is CLS."),
    Key("MVIT.USE_ABS_POS", True, "Absolute position embedding (v1)."),
    Key("MVIT.SEP_POS_EMBED", False, "Absolute positions as the sum of a spatial and a temporal table."),
    Key("MVIT.REL_POS_SPATIAL", False, "Decomposed relative positions along height and width (v2)."),
    Key("MVIT.REL_POS_TEMPORAL", False, "Decomposed relative positions along time (v2, video)."),
    Key("MVIT.RESIDUAL_POOLING", False, "Add the pooled query to the attention's output (v2)."),
    Key("MVIT.DROPOUT_RATE", 0.0, "Dropout after the positions, the attention projection and the MLP, in training."),
    Key("MVIT.DROPPATH_RATE", 0.1, "Stochastic depth of the last block, in training; rises linearly from 0."),
    Key("MVIT.HEAD_INIT_SCALE", 1.0, "Factor on the initial weights of the head."),
    Key("MVIT.ZERO_DECAY_POS_CLS", True, "No weight decay on position tables and CLS, given SOLVER.ZERO_WD_1D_PARAM."),
    Key("CVT.INIT", "trunc_norm", "Initial weights of the linear layers.", choices=("trunc_norm", "xavier")),
    Key("CVT.NUM_STAGES", 3, "Number of stages; every list of CVT has one entry for each."),
    Key("CVT.PATCH_SIZE", [7, 3, 3], "Kernel of the convolution that makes the tokens of a stage."),
    Key("CVT.PATCH_STRIDE", [4, 2, 2], "Stride of that convolution."),
    Key("CVT.PATCH_PADDING", [2, 1, 1], "Padding of that convolution."),
    Key("CVT.DIM_EMBED", [64, 192, 384], "Width of the tokens."),
    Key("CVT.NUM_HEADS", [1, 3, 6], "Attention heads; divide CVT.DIM_EMBED."),
    Key("CVT.DEPTH", [1, 2, 10], "Number of blocks."),
    Key("CVT.MLP_RATIO", [4.0, 4.0, 4.0], "Hidden width of the MLP over CVT.DIM_EMBED."),
    Key("CVT.ATTN_DROP_RATE", [0.0, 0.0, 0.0], "Dropout on the attention weights, in training."),
    Key("CVT.DROP_RATE", [0.0, 0.0, 0.0], "Dropout after tokens, attention projection and MLP, in training."),
    Key("CVT.DROP_PATH_RATE", [0.0, 0.0, 0.1], "Stochastic depth of a stage's last block; rises linearly from 0."),
    Key("CVT.QKV_BIAS", [True, True, True], "Bias in the linear projections of queries, keys and values."),
    Key("CVT.CLS_TOKEN", [False, False, True], "CLS token of a stage; the last stage's is read out, else the mean."),
    Key("CVT.POS_EMBED", [False, False, False], "In the published files only: CvT has no position embedding."),
    Key(
        "CVT.QKV_PROJ_METHOD",
        ["dw_bn", "dw_bn", "dw_bn"],
        "Before the linear projections: dw_bn (depthwise convolution, batch norm), avg (of keys and values), or linear "
        "(nothing).",
    ),
    Key("CVT.KERNEL_QKV", [3, 3, 3], "Kernel of these convolutions."),
    Key("CVT.PADDING_KV", [1, 1, 1], "Padding for keys and values."),
    Key("CVT.STRIDE_KV", [2, 2, 2], "Stride for keys and values: ATS samples the cells of their grid."),
    Key("CVT.PADDING_Q", [1, 1, 1], "Padding for queries; keeps the grid."),
    Key("CVT.STRIDE_Q", [1, 1, 1], "Stride for queries; 1."),
    Key("PSVIT.NUM_POINTS", [14, 14], "Sampling points along height and width: the tokens of the network."),
    Key("PSVIT.NUM_ITERS", 4, "Blocks in which the points move; counted in PSVIT.DEPTH."),
    Key(
        "PSVIT.STEM_DIMS",
        [64, 64, 256],
        "Widths of the stem: first convolution, bottlenecks inside, first one's output.",
    ),
    Key("PSVIT.OFFSET_GAMMA", 1.0, "Factor on the offsets of the points where features are sampled."),
    Key(
        "PSVIT.POINT_GRADIENT",
        "released",
        "Backward pass of the sampling: that of the release's CUDA kernel, or the gradient, from which it differs for "
        "points less than a pixel beyond the border. The outputs are the same.",
        choices=("released", "grid_sample"),
    ),
    Key("PSVIT.DEPTH", 14, "Number of blocks."),
    Key("PSVIT.EMBED_DIM", 384, "Width of the tokens."),
    Key("PSVIT.NUM_HEADS", 6, "Attention heads of a block; divides PSVIT.EMBED_DIM."),
    Key("PSVIT.MLP_RATIO", 3.0, "Hidden width of the MLP over PSVIT.EMBED_DIM."),
    Key("PSVIT.QKV_BIAS", False, "Bias in the query, key and value projections."),
    Key("PSVIT.DROP_RATE", 0.0, "Dropout after the attention projection and in the MLP, in training."),
    Key("PSVIT.ATTN_DROP_RATE", 0.0, "Dropout on the attention weights, in training."),
    Key("PSVIT.DROP_PATH_RATE", 0.1, "Stochastic depth of the last block, in training; rises linearly from 0."),
    Key("TIMM.PRETRAINED", False, "Of MODEL.NAME timm/<name>: start from the weights that timm downloads."),
    Key(
        "TIMM.KWARGS",
        [],
        "Of MODEL.NAME timm/<name>: further arguments of timm's constructor, [[name, value], ...], e.g. img_size, "
        "drop_path_rate.",
    ),
    # ---- adaptive token sampling
    Key("ATS.ENABLE", False, "Sample tokens. False gives the dense network."),
    Key("ATS.BLOCKS", [3, 4, 5, 6, 7, 8, 9, 10, 11], "Blocks that sample, counted from 0."),
    Key(
        "ATS.NUM_TOKENS",
        1.0,
        "K, the most tokens a block keeps, prefix tokens counted: a number (above 1; rounded) or a ratio (up to 1) of "
        "the token slots; one value for all blocks, or a list with one entry per block of the network. Counted per "
        "image, per frame (XViT, TimeSformer) or per clip (TimeSformer with joint_space_time, MViT). In MViT K counts "
        "the cells that keys are pooled to, and CLS: a kept cell keeps all the tokens it stands for.",
        (int, float, list),
    ),
    Key(
        "ATS.SAMPLER",
        "inverse_transform",
        "How kept tokens are chosen: inverse_transform (the paper), topk (highest scores), random, or one of yours. "
        "For comparison, two other methods instead of sampling: tome (ToMe, merges tokens, see TOME) and evit (EViT, "
        "fuses those it drops, see EVIT), both in ATS.BLOCKS, for ViT and timm's VisionTransformer.",
    ),
    Key(
        "ATS.SCORE",
        "cls_attention_value_norm",
        "Significance score of a token: attention of CLS x norm of its value (the paper), attention of CLS alone, or "
        "the mean attention it receives from all tokens (the only one for networks without CLS).",
        choices=("cls_attention_value_norm", "cls_attention", "mean_attention"),
    ),
    Key(
        "ATS.RULE",
        "official",
        "Details of inverse transform sampling: as the official code with DROP_TOKENS False, or as the paper's text.",
        choices=("official", "paper"),
    ),
    Key(
        "ATS.MIN_TOKENS",
        8,
        "Lower bound of K, to which what is below is raised; at least the prefix tokens + 2.",
    ),
    Key("ATS.SEED", 0, "Seed of ATS.SAMPLER random."),
    Key(
        "ATS.SHARE_FRAMES",
        False,
        "Video: all frames of a segment (XViT) or clip (TimeSformer) keep the same patches, by their mean score; "
        "False: every frame its own.",
    ),
    Key(
        "ATS.LAYOUT",
        "packed",
        "How the tokens that are left lie in memory. packed: no padding, fastest. padded: padded to the longest of the "
        "batch, for comparison. static: padded to the token slots, so that no shape depends on the image: for "
        "torch.export, CUDA graphs and whole-graph compilation, with K (ATS.NUM_TOKENS) as small as the images allow. "
        "All give the same logits. MODEL.NAME ViT and timm/<name> only, the others are packed.",
        choices=("packed", "padded", "static"),
    ),
    Key(
        "TOME.R",
        8,
        "Of ATS.SAMPLER tome: tokens that merge away in each of ATS.BLOCKS (at most half of those present); or a list "
        "with one entry per block of the network.",
        (int, list),
    ),
    Key("TOME.PROP_ATTN", True, "Of ATS.SAMPLER tome: proportional attention, logits plus the log of a token's size."),
    Key(
        "EVIT.KEEP_RATE",
        0.7,
        "Of ATS.SAMPLER evit: share of the tokens present, prefix tokens not counted, that each of ATS.BLOCKS keeps; "
        "or a list with one entry per block of the network.",
        (float, list),
    ),
    Key("EVIT.FUSE_TOKEN", True, "Of ATS.SAMPLER evit: the others become one token, weighted by CLS's attention."),
    # ---- training
    Key("TRAIN.ENABLE", False, "Train the network."),
    Key(
        "TRAIN.DATASET",
        "imagenet",
        "Data set to train on, imagenet or kinetics; its val split is evaluated while training.",
    ),
    Key("TRAIN.BATCH_SIZE", 256, "Samples per optimizer step, over all processes and accumulation steps."),
    Key("TRAIN.GRAD_ACCUM_STEPS", 1, "Forward-backward passes that one batch is cut into to save memory."),
    Key(
        "TRAIN.EVAL_PERIOD",
        1,
        "Evaluate every so many epochs while training, and after the last; 0 with TEST.ENABLE False: never.",
    ),
    Key(
        "TRAIN.CHECKPOINT_PERIOD",
        1,
        "Save a checkpoint every so many epochs (and before every evaluation, and after the last).",
    ),
    Key("TRAIN.CHECKPOINT_STEPS", 0, "Save a checkpoint every so many steps; 0: not by steps."),
    Key("TRAIN.CHECKPOINT_MINUTES", 30.0, "Save a checkpoint when the last one is so many minutes old; 0: never."),
    Key("TRAIN.CHECKPOINT_KEEP", 3, "Checkpoints to keep, besides the one with the best top-1; 0: all."),
    Key("TRAIN.CHECKPOINT_FILE_PATH", "", "Weights to start from, e.g. the dense model for ATS fine-tuning."),
    Key("TRAIN.RESET_HEAD", False, "Leave the head of TRAIN.CHECKPOINT_FILE_PATH out: fine-tuning for other classes."),
    Key("TRAIN.AUTO_RESUME", True, "Go on from the newest readable checkpoint in OUTPUT_DIR/checkpoints."),
    Key("TRAIN.MIXED_PRECISION", False, "Autocast in training, to TRAIN.AMP_DTYPE."),
    Key(
        "TRAIN.AMP_DTYPE",
        "bfloat16",
        "Type used by TRAIN.MIXED_PRECISION; float16 brings its gradient scaler.",
        choices=("bfloat16", "float16"),
    ),
    Key("EMA.ENABLE", False, "Keep an exponential moving average of the weights and evaluate with it."),
    Key("EMA.DECAY", 0.9999, "Decay of the average, per optimizer step."),
    Key("SOLVER.OPTIMIZING_METHOD", "adamw", "Optimizer, by timm's names."),
    Key("SOLVER.BASE_LR", 1e-3, "Peak learning rate, for the whole TRAIN.BATCH_SIZE."),
    Key(
        "SOLVER.LR_POLICY",
        "cosine",
        "Learning rate after the warm-up.",
        choices=("cosine", "constant", "steps_with_relative_lrs"),
    ),
    Key("SOLVER.STEPS", [], "Epochs from which the SOLVER.LRS hold, with SOLVER.LR_POLICY steps_with_relative_lrs."),
    Key("SOLVER.LRS", [], "Learning rates over SOLVER.BASE_LR, one for each of SOLVER.STEPS."),
    Key("SOLVER.COSINE_END_LR", 1e-5, "Learning rate at the end of the cosine."),
    Key(
        "SOLVER.COSINE_AFTER_WARMUP",
        True,
        "Start the cosine from its peak after the warm-up; False: run it over all epochs.",
    ),
    Key("SOLVER.MAX_EPOCH", 300, "Epochs to train for."),
    Key("SOLVER.WARMUP_EPOCHS", 5.0, "Epochs of linear warm-up."),
    Key("SOLVER.WARMUP_START_LR", 1e-6, "Learning rate the warm-up starts from."),
    Key("SOLVER.MOMENTUM", 0.9, "Momentum of SGD-like optimizers."),
    Key("SOLVER.WEIGHT_DECAY", 0.05, "Weight decay."),
    Key("SOLVER.ZERO_WD_1D_PARAM", True, "No weight decay on biases, norms, positions and prefix tokens."),
    Key("SOLVER.LAYER_DECAY", 1.0, "Learning rate of a block over that of the block after it; 1: the same everywhere."),
    Key("SOLVER.CLIP_GRAD_L2NORM", None, "Clip the gradient to this norm.", (float, NONE)),
    Key("SOLVER.CLIP_GRAD_VAL", None, "Clip each gradient entry to this size.", (float, NONE)),
    # ---- evaluation
    Key("TEST.ENABLE", True, "Evaluate (after training, if TRAIN.ENABLE) and write OUTPUT_DIR/result.json."),
    Key("TEST.DATASET", "imagenet", "Data set to evaluate on, imagenet (its val split) or kinetics (test.csv)."),
    Key("TEST.BATCH_SIZE", 64, "Samples per batch; the results do not depend on it."),
    Key("TEST.NUM_ENSEMBLE_VIEWS", 10, "Clips per video in testing; of images there is one view."),
    Key("TEST.NUM_SPATIAL_CROPS", 3, "Crops of every test clip: 1 (centre) or 3 along the long side.", choices=(1, 3)),
    Key(
        "TEST.ENSEMBLE_OF",
        "logits",
        "Scores that DATA.ENSEMBLE_METHOD puts together: logits (XViT, TimeSformer) or their softmax (MViT).",
        choices=("logits", "softmax"),
    ),
    Key(
        "TEST.ON_BAD_VIDEO",
        "raise",
        "A video that cannot be read in testing: stop, or leave it out and count it in result.json.",
        choices=("raise", "skip"),
    ),
    Key("TEST.CHECKPOINT_FILE_PATH", "", "Weights to evaluate. A run that trains evaluates what it trained instead."),
    # ---- data
    Key(
        "DATA.PATH_TO_DATA_DIR",
        "",
        "Folder of the data set: for ImageNet with train/ and val/, for Kinetics with train.csv, val.csv and test.csv.",
    ),
    Key("DATA.PATH_PREFIX", "", "Folder that the paths in the csv files begin from; empty: that of the csv files."),
    Key(
        "DATA.ALLOW_PATHS_OUTSIDE_PREFIX",
        False,
        "Accept paths in a csv file that lead out of DATA.PATH_PREFIX (absolute, or with ..).",
    ),
    Key("DATA.PATH_LABEL_SEPARATOR", " ", "What stands between path and label in the csv files."),
    Key(
        "DATA.MEAN",
        [],
        "Mean of the R, G, B channels, subtracted; empty: ImageNet's [0.485, 0.456, 0.406], for clips 0.45 each.",
    ),
    Key(
        "DATA.STD",
        [],
        "Standard deviation of the channels; empty: ImageNet's [0.229, 0.224, 0.225], for clips 0.225 each.",
    ),
    Key("DATA.NUM_FRAMES", 8, "Frames of a clip."),
    Key("DATA.SAMPLING_RATE", 8, "Frames from one frame of a clip to the next, at DATA.TARGET_FPS."),
    Key(
        "DATA.TARGET_FPS", 30.0, "Frame rate in which DATA.SAMPLING_RATE counts; videos of another rate are converted."
    ),
    Key("DATA.TRAIN_JITTER_FPS", 0.0, "Training adds a random number up to this to DATA.TARGET_FPS."),
    Key(
        "DATA.USE_OFFSET_SAMPLING",
        False,
        "Test clips reach from the first to the last frame (MViT); False: the last one ends before the video does.",
    ),
    Key(
        "DATA.TRAIN_JITTER_SCALES",
        [256, 320],
        "Clips: range of the short side in pixels before a random training crop; the first is that of tests with one "
        "spatial crop.",
    ),
    Key(
        "DATA.TRAIN_MULTI_SCALE_CROP",
        [],
        "Clips: sides of the training crop over the frame's short side, in place of the other crops; XViT: "
        "[1, 0.875, 0.75, 0.66].",
    ),
    Key(
        "DATA.ENSEMBLE_METHOD",
        "sum",
        "How the scores of a video's clips become one: sum or largest, class by class.",
        choices=("sum", "max"),
    ),
    Key("DATA.TRAIN_CROP_SIZE", 224, "Side of the training crop in pixels."),
    Key("DATA.TEST_CROP_SIZE", 224, "Side of the evaluation crop in pixels."),
    Key(
        "DATA.TEST_CROP_RATIO",
        0.875,
        "Images: evaluation resizes the short side to crop / ratio, then crops the centre (224/0.875 = 256).",
    ),
    Key(
        "DATA.TEST_INTERPOLATION",
        "bicubic",
        "Images: interpolation of the evaluation resize; that of clips is bilinear.",
        choices=("bicubic", "bilinear", "nearest"),
    ),
    Key(
        "DATA.TRAIN_JITTER_SCALES_RELATIVE",
        [],
        "Range of the random crop's area over the image's; empty: [0.08, 1]; for clips DATA.TRAIN_JITTER_SCALES.",
    ),
    Key("DATA.TRAIN_JITTER_ASPECT_RELATIVE", [0.75, 1.3333], "Range of the random crop's aspect ratio."),
    Key("DATA.RANDOM_FLIP", True, "Random horizontal flip in training."),
    Key(
        "DATA.MAX_BAD_FRACTION",
        0.01,
        "Training stops when more than this share of the samples read so far (the first 1000 counted as read from the "
        "start) was unreadable.",
    ),
    Key(
        "DATA_LOADER.NUM_WORKERS",
        8,
        "Worker processes that read data, at most one per core; 0: the main process reads.",
    ),
    Key("DATA_LOADER.PIN_MEMORY", True, "Pinned memory for transfers to a GPU."),
    Key("AUG.ENABLE", True, "Augment training as the other AUG keys say; False: crop and flip alone."),
    Key("AUG.NUM_SAMPLE", 1, "Repeated augmentation: draws per image and epoch; the epoch keeps its length (DeiT: 3)."),
    Key("AUG.COLOR_JITTER", 0.4, "Strength of the colour jitter of images; used when AUG.AA_TYPE is empty."),
    Key("AUG.AA_TYPE", "rand-m9-mstd0.5-inc1", "AutoAugment policy by timm's names; empty: none."),
    Key(
        "AUG.INTERPOLATION",
        "bicubic",
        "Interpolation of images' training crop; for clips, whose crop is bilinear, of AUG.AA_TYPE's rotations.",
        choices=("bicubic", "bilinear", "random"),
    ),
    Key("AUG.RE_PROB", 0.25, "Probability of random erasing."),
    Key("AUG.RE_MODE", "pixel", "Filling of the erased rectangle.", choices=("pixel", "rand", "const")),
    Key("AUG.RE_COUNT", 1, "Most rectangles erased."),
    Key("MIXUP.ENABLE", False, "Mixup and CutMix in training."),
    Key("MIXUP.ALPHA", 0.8, "Mixup's alpha; 0: no mixup."),
    Key("MIXUP.CUTMIX_ALPHA", 1.0, "CutMix's alpha; 0: no CutMix."),
    Key("MIXUP.PROB", 1.0, "Probability of mixing a batch."),
    Key("MIXUP.SWITCH_PROB", 0.5, "Probability of CutMix where both are on."),
    Key("MIXUP.LABEL_SMOOTH_VALUE", 0.1, "Label smoothing, also without mixup."),
    # ---- the run
    Key("OUTPUT_DIR", "output", "Where config.yaml, log, checkpoints and result.json go."),
    Key("DEVICE", "auto", "Device: auto takes the GPU if there is one.", choices=("auto", "cpu", "cuda")),
    Key("RNG_SEED", 0, "Seed of everything random."),
    Key("LOG_PERIOD", 10, "Steps between two lines of the log."),
    Key(
        "TENSORBOARD.ENABLE",
        False,
        "Write scalars, histograms of token counts and pictures of kept tokens to OUTPUT_DIR/tensorboard.",
    ),
    Key("TENSORBOARD.NUM_IMAGES", 4, "Validation images, always the same, drawn with their kept tokens."),
    Key("DIST_TIMEOUT_MINUTES", 10.0, "Longest wait for another process that hangs; a dead one is noticed at once."),
]
