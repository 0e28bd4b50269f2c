"""Every configuration key, one entry each, in the order of `--help`; `key.py` defines the fields of an entry.

Keys that SlowFast or the official ATS release have keep their names and meanings. `legacy.py` maps the keys of older
releases to these. Constraints between keys (the heads divide the width, the block exists) are checked when the network
is built.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ats.config.key import NONE, Key, Section
from ats.errors import UserError, suggest
from ats.kernels.cpu import BACKENDS
from ats.options import COUNT, FINITE, FROM_0, POSITIVE, PROBABILITY, RATE, SEED, SHARE
from ats.reduction import REDUCTIONS
from ats.reduction.base import OptionOf, options_of


def keys() -> dict[str, Key]:
    """Name -> key, including the keys of every reduction registered so far."""
    return {key.name: key for section in sections() for key in section.keys}


def sections() -> Iterator[Section]:
    """Every section with its keys. Sections that only reductions define follow ATS."""
    options: dict[str, tuple[Key, ...]] = {}
    for key in reduction_keys():
        options[key.section] = (*options.get(key.section, ()), key)
    for section in SECTIONS:
        yield replace(section, keys=section.keys + options.pop(section.name, ()))
        if section.name == "ATS":
            for name in [name for name in options if name not in {section.name for section in SECTIONS}]:
                samplers = dict.fromkeys(sampler for key in options[name] for sampler in key.samplers)
                yield Section(name, f"Options of ATS.SAMPLER {', '.join(samplers)}.", options[name])


def reduction_keys() -> list[Key]:
    """ATS.SAMPLER and the options of every registered reduction; `Key.samplers` names the reductions that read a key.

    Called for every new configuration, so it includes reductions registered by then.
    """
    options, samplers = dict[str, OptionOf](), dict[str, list[str]]()
    for name, kind in REDUCTIONS.items():
        for option in options_of(kind):
            options.setdefault(option.key, option)
            samplers.setdefault(option.key, []).append(name)
    text = "How ATS.BLOCKS reduce tokens: inverse_transform (the paper), topk (highest scores), random, tome "
    text += "(ToMe, merges similar tokens), evit (EViT, fuses the tokens it drops), ppt (PPT, prunes or pools), pitome "
    text += "(PiToMe, merges redundant tokens), merge_sample (merges in early blocks, then samples), or your own."
    result = [Key("ATS.SAMPLER", "inverse_transform", text, choices=tuple(REDUCTIONS))]
    for key, option in options.items():
        about, readers = option.about, tuple(samplers[key])
        text = about.help or f"Option {option.name} of ATS.SAMPLER {', '.join(readers)}."
        within = about.within or (FINITE if type(option.default) in (int, float) else None)
        what: dict[str, Any] = {"types": about.types, "choices": about.choices, "networks": about.networks}
        result.append(Key(key, option.default, text, within, samplers=readers, **what))
    return result


def list_sections() -> str:
    """One line per section, and one per key that has none."""
    lines = {section.name: section.help for section in sections() if section.name}
    lines |= {key.name: key.help for key in keys().values() if not key.section}
    return "\n".join(f"  {name:<20}  {line}" for name, line in lines.items())


def describe(names: list[str]) -> str:
    """The keys of some sections (ATS), or single keys (ATS.BLOCKS): type, range, default and meaning.

    `names` may be upper or lower case; "all" means every section. An unknown name raises a UserError with suggestions.
    """
    entries = {section.name: section for section in sections() if section.name} | keys()
    parts = []
    for name in names:
        if name.lower() == "all":
            parts += [section.describe() for section in sections()]
        elif name.upper() in entries:
            parts.append(entries[name.upper()].describe())
        else:
            listed = ", ".join(entry for entry in entries if "." not in entry)
            choices = textwrap.fill(f"Choose from: {listed}, or all.", 100, break_on_hyphens=False)
            raise UserError(f"--help {name}: there is no such section or key.{suggest(name, entries)}\n{choices}")
    return "\n".join(parts)


# fmt: off
SECTIONS: tuple[Section, ...] = (
    Section("MODEL", "Network, number of classes, dropout.", (
        Key("MODEL.NAME", "ViT", "Architecture: a name in ats.models.MODELS, or timm/<name>, see docs/PLUGIN.md."),
        Key("MODEL.NUM_CLASSES", 1000, range=COUNT, types=(int, NONE),
            help="Number of classes: class folders, or the highest csv label + 1. None: counted from the data."),
        Key("MODEL.ACT_CHECKPOINT", False,
            "Activation checkpointing: keep only the input of each block and recompute the block in the backward pass. "
            "Less memory, about a third more time, same losses and gradients."),
        Key("MODEL.DROPOUT_RATE", 0.0, "Dropout before the head, in training; TimeSformer has none.", RATE),
    )),
    Section("VIT", "ViT and DeiT; also the blocks of XViT and TimeSformer.", networks=("ViT", "XViT", "TimeSformer"),
            keys=(
        Key("VIT.IMG_SIZE", 224, "Image size of the position embedding in pixels: a number or [height, width].", COUNT,
            types=(int, list), lengths=(2,)),
        Key("VIT.PATCH_SIZE", 16, "Side of a patch in pixels.", COUNT),
        Key("VIT.EMBED_DIM", 768, "Width of the tokens.", COUNT),
        Key("VIT.DEPTH", 12, "Number of blocks.", COUNT),
        Key("VIT.NUM_HEADS", 12, "Attention heads per block; must divide VIT.EMBED_DIM.", COUNT),
        Key("VIT.MLP_RATIO", 4.0, "Hidden width of the MLP / VIT.EMBED_DIM.", POSITIVE),
        Key("VIT.QKV_BIAS", True, "Bias in the query, key and value projections."),
        Key("VIT.WEIGHT_INIT", "deit", choices=("deit", "big_vision"),
            help="Initial weights: deit (normal, 0.02); for narrow ones big_vision (Xavier, sine-cosine positions)."),
        Key("VIT.DISTILLED", False, "DeiT's distillation token: a second prefix token and head; logits are averaged."),
        Key("VIT.DROP_RATE", 0.0, "Dropout after positions, attention projections and MLPs, in training.", RATE),
        Key("VIT.ATTN_DROP_RATE", 0.0, "Dropout on the attention weights, in training.", RATE),
        Key("VIT.DROP_PATH_RATE", 0.0, "Stochastic depth of the last block, in training; rises linearly from 0.", RATE),
    )),
    Section("XVIT", "X-ViT: keys and values shifted in time.", networks=("XViT",), keys=(
        Key("XVIT.USE_XVIT", True, "Shift keys and values in time; False: a plain ViT on every frame."),
        Key("XVIT.NUM_SEGMENTS", 8, "Frames per segment; the shift stays inside it. Divides DATA.NUM_FRAMES.", COUNT),
        Key("XVIT.SHIFT_DIV", 8, "1 / this of the channels: from the next frame, as many from the previous.", COUNT),
        Key("XVIT.LOCATIONS_LIST", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
            "Blocks whose keys and values are shifted; block numbers beyond the depth are ignored.", FROM_0),
        Key("XVIT.TEMPORAL_EMBED_LEN", 8, "Length of the temporal embedding; repeated for longer clips.", COUNT),
        Key("XVIT.CONSENSUS_TYPE", "vit", choices=("vit", "avg"),
            help="How frames are combined: vit (a transformer over CLS tokens, see TEMPORAL_HEAD) or avg (the mean)."),
        Key("XVIT.BEFORE_SOFTMAX", True, "XVIT.CONSENSUS_TYPE avg: average logits; False: average probabilities."),
    )),
    Section("TEMPORAL_HEAD", "X-ViT's transformer over the CLS tokens of the frames.", networks=("XViT",), keys=(
        Key("TEMPORAL_HEAD.NUM_ATTENTION_HEADS", 12, "Attention heads; must divide VIT.EMBED_DIM.", COUNT),
        Key("TEMPORAL_HEAD.NUM_HIDDEN_LAYERS", 1, "Blocks of the temporal head.", COUNT),
        Key("TEMPORAL_HEAD.MLP_DIM", 768, "Hidden width of the temporal head's classifier.", COUNT),
        Key("TEMPORAL_HEAD.HIDDEN_DROPOUT_PROB", 0.0, "Dropout and stochastic depth of this head, in training.", RATE),
        Key("TEMPORAL_HEAD.ATTENTION_PROBS_DROPOUT_PROB", 0.0, "Dropout on this head's attention, in training.", RATE),
    )),
    Section("TIMESFORMER", "TimeSformer: attention in space and time.", networks=("TimeSformer",), keys=(
        Key("TIMESFORMER.ATTENTION_TYPE", "divided_space_time",
            "Attention over time, then space; over the whole clip at once; or over space only.",
            choices=("divided_space_time", "joint_space_time", "space_only")),
        Key("TIMESFORMER.TEMPORAL_EMBED_LEN", 0, "Length of the time embedding; 0: DATA.NUM_FRAMES.", FROM_0),
    )),
    Section("MVIT", "MViT v1 and v2, for clips and images.", networks=("MViT",), keys=(
        Key("MVIT.PATCH_2D", False, "True: images, patches by a 2-D convolution. False: clips [B, 3, T, H, W]."),
        Key("MVIT.PATCH_KERNEL", [3, 7, 7], "Kernel of the patch convolution, (t, h, w); (h, w) with PATCH_2D.", COUNT),
        Key("MVIT.PATCH_STRIDE", [2, 4, 4], "Stride of the patch convolution.", COUNT),
        Key("MVIT.PATCH_PADDING", [2, 4, 4], "Padding of the patch convolution.", FROM_0),
        Key("MVIT.EMBED_DIM", 96, "Width of the tokens in the first block.", COUNT),
        Key("MVIT.DEPTH", 16, "Number of blocks.", COUNT),
        Key("MVIT.NUM_HEADS", 1, "Attention heads of the first block.", COUNT),
        Key("MVIT.MLP_RATIO", 4.0, "Hidden width of the MLP / width of the attention.", POSITIVE),
        Key("MVIT.QKV_BIAS", True, "Bias in the query, key and value projection."),
        Key("MVIT.DIM_MUL", [], "Factors on the width: [[block, factor], ...].", POSITIVE, has_block_rows=True),
        Key("MVIT.HEAD_MUL", [], "Factors on the heads: [[block, factor], ...].", POSITIVE, has_block_rows=True),
        Key("MVIT.DIM_MUL_IN_ATT", False, "v2: the width grows in the attention; False (v1): in the MLP before it."),
        Key("MVIT.MODE", "conv", choices=("conv", "max", "avg"),
            help="Pooling of queries, keys, values: conv (depthwise, with LayerNorm), max or avg (without)."),
        Key("MVIT.POOL_Q_STRIDE", [], "Strides of query pooling, which set the grid: [[block, t, h, w], ...].", COUNT,
            has_block_rows=True),
        Key("MVIT.POOL_KV_STRIDE", None, "Strides of key and value pooling: [[block, t, h, w], ...].", COUNT,
            types=(list, NONE), has_block_rows=True),
        Key("MVIT.POOL_KV_STRIDE_ADAPTIVE", None, range=COUNT, types=(list, NONE), lengths=(3,),
            help="Instead of MVIT.POOL_KV_STRIDE: stride [t, h, w] of the first block; each query stride divides it."),
        Key("MVIT.POOL_KVQ_KERNEL", None, range=COUNT, types=(list, NONE), lengths=(3,),
            help="Pooling kernel [t, h, w], even at stride 1; None: stride + 1, or 1 at stride 1."),
        Key("MVIT.CLS_EMBED_ON", True, "Use a CLS token, read by the head; False: the head reads the mean token."),
        Key("MVIT.USE_MEAN_POOLING", False, "The head reads the normalised mean of the patches, even with CLS."),
        Key("MVIT.USE_ABS_POS", True, "Absolute position embedding (v1)."),
        Key("MVIT.SEP_POS_EMBED", False, "Absolute positions as the sum of a spatial and a temporal table."),
        Key("MVIT.REL_POS_SPATIAL", False, "Decomposed relative positions along height and width (v2)."),
        Key("MVIT.REL_POS_TEMPORAL", False, "Decomposed relative positions along time (v2, video)."),
        Key("MVIT.RESIDUAL_POOLING", False, "Add the pooled query to the attention's output (v2)."),
        Key("MVIT.DROPOUT_RATE", 0.0, "Dropout after positions, attention projections and MLPs, in training.", RATE),
        Key("MVIT.DROPPATH_RATE", 0.1, "Stochastic depth of the last block, in training; rises linearly from 0.", RATE),
        Key("MVIT.HEAD_INIT_SCALE", 1.0, "Scale of the head's initial weights.", FROM_0),
        Key("MVIT.ZERO_DECAY_POS_CLS", True, "SOLVER.ZERO_WD_1D_PARAM also covers position embeddings and CLS."),
    )),
    Section("CVT", "CvT: a convolution before each stage and in its projections.", networks=("CvT",), keys=(
        Key("CVT.INIT", "trunc_norm", "Initial weights of the linear layers.", choices=("trunc_norm", "xavier")),
        Key("CVT.NUM_STAGES", 3, "Number of stages; every list of CVT has one entry per stage.", COUNT),
        Key("CVT.PATCH_SIZE", [7, 3, 3], "Kernel of the convolution that embeds a stage's tokens.", COUNT),
        Key("CVT.PATCH_STRIDE", [4, 2, 2], "Stride of that convolution.", COUNT),
        Key("CVT.PATCH_PADDING", [2, 1, 1], "Padding of that convolution.", FROM_0),
        Key("CVT.DIM_EMBED", [64, 192, 384], "Width of the tokens.", COUNT),
        Key("CVT.NUM_HEADS", [1, 3, 6], "Attention heads; must divide CVT.DIM_EMBED.", COUNT),
        Key("CVT.DEPTH", [1, 2, 10], "Number of blocks.", COUNT),
        Key("CVT.MLP_RATIO", [4.0, 4.0, 4.0], "Hidden width of the MLP / CVT.DIM_EMBED.", POSITIVE),
        Key("CVT.ATTN_DROP_RATE", [0.0, 0.0, 0.0], "Dropout on the attention weights, in training.", RATE),
        Key("CVT.DROP_RATE", [0.0, 0.0, 0.0], "Dropout after embedding, attention and MLP, in training.", RATE),
        Key("CVT.DROP_PATH_RATE", [0.0, 0.0, 0.1],
            "Stochastic depth of a stage's last block, in training; rises linearly from 0.", RATE),
        Key("CVT.QKV_BIAS", [True, True, True], "Bias in the linear projections of queries, keys and values."),
        Key("CVT.CLS_TOKEN", [False, False, True], "CLS token; the head reads the last stage's, or the mean token."),
        Key("CVT.POS_EMBED", [False, False, False], "In published files, but unused: CvT has no position embedding."),
        Key("CVT.QKV_PROJ_METHOD", ["dw_bn", "dw_bn", "dw_bn"],
            "What precedes the linear projections: dw_bn (depthwise convolution, batch norm), avg (average pooling of "
            "keys and values) or linear (nothing)."),
        Key("CVT.KERNEL_QKV", [3, 3, 3], "Kernel of these convolutions.", COUNT),
        Key("CVT.PADDING_KV", [1, 1, 1], "Padding for keys and values.", FROM_0),
        Key("CVT.STRIDE_KV", [2, 2, 2], "Stride for keys and values: ATS samples the cells of their grid.", COUNT),
        Key("CVT.PADDING_Q", [1, 1, 1], "Padding for queries; must keep the grid.", FROM_0),
        Key("CVT.STRIDE_Q", [1, 1, 1], "Stride for queries; must be 1.", COUNT),
    )),
    Section("PSVIT", "PS-ViT: tokens at sampling points that move.", networks=("PSViT",), keys=(
        Key("PSVIT.NUM_POINTS", [14, 14], "Sampling points, [height, width]; each is a token.", COUNT, lengths=(2,)),
        Key("PSVIT.NUM_ITERS", 4, "Blocks that move the points; included in PSVIT.DEPTH.", COUNT),
        Key("PSVIT.STEM_DIMS", [64, 64, 256],
            "Widths of the stem: first convolution, inside the bottlenecks, first bottleneck's output.", COUNT,
            lengths=(3,)),
        Key("PSVIT.OFFSET_GAMMA", 1.0, "Factor on the offsets of the points where features are sampled.", FROM_0),
        Key("PSVIT.POINT_GRADIENT", "released", choices=("released", "grid_sample"),
            help="Backward pass of the sampling: released (like the release's CUDA kernel) or grid_sample (exact). "
            "They differ for points less than a pixel outside the border; outputs are the same."),
        Key("PSVIT.DEPTH", 14, "Number of blocks.", COUNT),
        Key("PSVIT.EMBED_DIM", 384, "Width of the tokens.", COUNT),
        Key("PSVIT.NUM_HEADS", 6, "Attention heads per block; must divide PSVIT.EMBED_DIM.", COUNT),
        Key("PSVIT.MLP_RATIO", 3.0, "Hidden width of the MLP / PSVIT.EMBED_DIM.", POSITIVE),
        Key("PSVIT.QKV_BIAS", False, "Bias in the query, key and value projections."),
        Key("PSVIT.DROP_RATE", 0.0, "Dropout after the attention projection and in the MLP, in training.", RATE),
        Key("PSVIT.ATTN_DROP_RATE", 0.0, "Dropout on the attention weights, in training.", RATE),
        Key("PSVIT.DROP_PATH_RATE", 0.1, "Stochastic depth of the last block, in training; linear from 0.", RATE),
    )),
    Section("TIMM", "Any timm vision transformer that ats.patch accepts.", networks=("timm/<name>",), keys=(
        Key("TIMM.PRETRAINED", False, "Start from timm's pretrained weights, which it downloads."),
        Key("TIMM.KWARGS", [], items=(int, float, str, list),
            help="Extra arguments for timm's constructor, [[name, value], ...], e.g. img_size, drop_path_rate."),
    )),
    Section("ATS", "Adaptive token sampling: which blocks, how many tokens, which method.", (
        Key("ATS.ENABLE", False, "Sample tokens. False gives the dense network."),
        Key("ATS.BLOCKS", None, range=FROM_0, types=(list, NONE), items=(int,),
            help="Blocks that sample, counted from 0. None: those of the last three quarters that can sample; of 12, "
            "blocks 3 to 11, as in the paper."),
        Key("ATS.STAGES", [], items=(dict,),
            help="Groups of blocks, each with its own reduction, e.g. "
            "[{SAMPLER: tome, BLOCKS: [0,1,2,3,4,5], R: 20}, {BLOCKS: [6,7,8,9,10,11], NUM_TOKENS: 257}]. What a "
            "group does not set comes from the other keys, including ATS.SAMPLER and ATS.BLOCKS."),
        Key("ATS.LAYOUT", "packed", choices=("packed", "padded", "static"),
            help="Memory layout of kept tokens. packed: no padding, fastest. padded: to the longest in the batch, for "
            "comparison. static: to the largest possible count, so no shape is data-dependent; for torch.export, CUDA "
            "graphs and whole-graph compilation, with K (ATS.NUM_TOKENS) as small as the images allow. All give the "
            "same logits. For ViT, PSViT and timm/<name>; other networks are always packed."),
        Key("ATS.CPU_BACKEND", "auto", choices=tuple(BACKENDS),
            help="Kernels for float32 linear layers and attention on a CPU, with and without ATS. torch: PyTorch's "
            "default. onednn: oneDNN. auto: the faster one, timed once per machine (cached in ~/.cache/ats). "
            "Results differ by round-off."),
    )),
    Section("TRAIN", "Training: data set, batches, checkpoints, precision.", (
        Key("TRAIN.ENABLE", False, "Train the network.", free=True),
        Key("TRAIN.DATASET", "imagenet", "Training data: imagenet or kinetics; evaluations use its val split."),
        Key("TRAIN.BATCH_SIZE", 256, "Samples per optimizer step, over all processes and accumulation steps.", COUNT),
        Key("TRAIN.GRAD_ACCUM_STEPS", 1, "Forward-backward passes per batch, to save memory.", COUNT, free=True),
        Key("TRAIN.EVAL_PERIOD", 1, range=FROM_0, free=True,
            help="Epochs between evaluations, besides the one after the last epoch; 0 with TEST.ENABLE False: never."),
        Key("TRAIN.CHECKPOINT_PERIOD", 1,
            "Epochs between checkpoints; training also saves before every evaluation and at the end.", FROM_0,
            machine=True),
        Key("TRAIN.CHECKPOINT_STEPS", 0, "Steps between checkpoints; 0: not by steps.", FROM_0, machine=True),
        Key("TRAIN.CHECKPOINT_MINUTES", 30.0, "Max. minutes between checkpoints; 0: no limit.", FROM_0, machine=True),
        Key("TRAIN.CHECKPOINT_KEEP", 3, "Newest checkpoints to keep, besides the best; 0: all.", FROM_0, machine=True),
        Key("TRAIN.CHECKPOINT_FILE_PATH", "", "Initial weights, e.g. dense ones to fine-tune.", path=True,
            machine=True),
        Key("TRAIN.RESET_HEAD", False, "Load TRAIN.CHECKPOINT_FILE_PATH without its head, for other classes."),
        Key("TRAIN.AUTO_RESUME", True, "Resume from the newest readable file in OUTPUT_DIR/checkpoints.", machine=True),
        Key("TRAIN.MIXED_PRECISION", False, "Train with autocast to TRAIN.AMP_DTYPE."),
        Key("TRAIN.AMP_DTYPE", "bfloat16", "dtype of TRAIN.MIXED_PRECISION; float16 also scales the loss.",
            choices=("bfloat16", "float16")),
    )),
    Section("EMA", "Moving average of the weights.", (
        Key("EMA.ENABLE", False, "Keep an exponential moving average of the weights and evaluate it."),
        Key("EMA.DECAY", 0.9999, "Decay of the average, per optimizer step.", RATE),
    )),
    Section("SOLVER", "Optimizer, learning rate, weight decay, gradient clipping.", (
        Key("SOLVER.OPTIMIZING_METHOD", "adamw", "Optimizer, as named in timm."),
        Key("SOLVER.BASE_LR", 1e-3, "Peak learning rate, for the whole TRAIN.BATCH_SIZE.", FROM_0),
        Key("SOLVER.LR_POLICY", "cosine", "Learning rate after the warm-up.",
            choices=("cosine", "constant", "steps_with_relative_lrs")),
        Key("SOLVER.STEPS", [], "Epochs at which SOLVER.LRS take effect, for steps_with_relative_lrs.", FROM_0),
        Key("SOLVER.LRS", [], "Learning rates as multiples of SOLVER.BASE_LR, one per SOLVER.STEPS.", FROM_0),
        Key("SOLVER.COSINE_END_LR", 1e-5, "Learning rate at the end of the cosine.", FROM_0),
        Key("SOLVER.COSINE_AFTER_WARMUP", True, "Start the cosine after the warm-up; False: at the first epoch."),
        Key("SOLVER.MAX_EPOCH", 300, "Epochs to train for.", COUNT),
        Key("SOLVER.WARMUP_EPOCHS", 5.0, "Epochs of linear warm-up.", FROM_0),
        Key("SOLVER.WARMUP_START_LR", 1e-6, "Learning rate the warm-up starts from.", FROM_0),
        Key("SOLVER.MOMENTUM", 0.9, "Momentum of SGD-like optimizers.", RATE),
        Key("SOLVER.WEIGHT_DECAY", 0.05, "Weight decay.", FROM_0),
        Key("SOLVER.ZERO_WD_1D_PARAM", True, "No weight decay on biases, norms, positions and prefix tokens."),
        Key("SOLVER.LAYER_DECAY", 1.0, "Learning rate of a block / that of the next; 1: all the same.", POSITIVE),
        Key("SOLVER.CLIP_GRAD_L2NORM", None, "Clip the gradient to this L2 norm.", POSITIVE, types=(float, NONE)),
        Key("SOLVER.CLIP_GRAD_VAL", None, "Clip each gradient entry to +- this.", POSITIVE, types=(float, NONE)),
    )),
    Section("TEST", "Evaluation: data set, views, weights.", (
        Key("TEST.ENABLE", True, "Evaluate (after training, if any) and write OUTPUT_DIR/result.json.", free=True),
        Key("TEST.DATASET", "imagenet", "Evaluation data: imagenet (its val split) or kinetics (test.csv).", free=True),
        Key("TEST.BATCH_SIZE", 64, "Samples per batch; the results do not depend on it.", COUNT, free=True),
        Key("TEST.DTYPE", "float32", choices=("float32", "bfloat16"), free=True,
            help="dtype of weights and activations in the final evaluation and calibrate.py. Scores and sampling stay "
            "float32; so do evaluations between epochs, pictures and exports."),
        Key("TEST.NUM_ENSEMBLE_VIEWS", 10, "Clips per video in testing; an image has one view.", COUNT, free=True),
        Key("TEST.NUM_SPATIAL_CROPS", 3, "Crops per test clip: 3 along the long side or 1.", choices=(1, 3), free=True),
        Key("TEST.ENSEMBLE_OF", "logits", choices=("logits", "softmax"), free=True,
            help="Scores that DATA.ENSEMBLE_METHOD combines: logits (XViT, TimeSformer) or their softmax (MViT)."),
        Key("TEST.ON_BAD_VIDEO", "raise", choices=("raise", "skip"), free=True,
            help="If a test video cannot be read: stop, or skip it and count it in result.json."),
        Key("TEST.CHECKPOINT_FILE_PATH", "", "Weights to evaluate; a training run evaluates its own.", path=True,
            machine=True),
    )),
    Section("DATA", "Data folder, clips, crops, normalisation.", (
        Key("DATA.PATH_TO_DATA_DIR", "", path=True, machine=True,
            help="Data folder: ImageNet with train/ and val/, Kinetics with train.csv, val.csv and test.csv."),
        Key("DATA.PATH_PREFIX", "", "Root folder of the paths in csv files; empty: the file's own.", path=True,
            machine=True),
        Key("DATA.ALLOW_PATHS_OUTSIDE_PREFIX", False, "Accept csv paths outside DATA.PATH_PREFIX (absolute or ..)."),
        Key("DATA.PATH_LABEL_SEPARATOR", " ", "Separator between path and label in the csv files.", required=True),
        Key("DATA.MEAN", [],
            "Mean of R, G, B (0 to 1); empty: ImageNet's [0.485, 0.456, 0.406], for clips 0.45 each. timm networks use "
            "their own unless this key is set; likewise deviation, crop sizes and ratio, and interpolation.",
            PROBABILITY, lengths=(0, 3)),
        Key("DATA.STD", [], "Deviation of R, G, B; empty: ImageNet's [0.229, 0.224, 0.225], for clips 0.225 each.",
            POSITIVE, lengths=(0, 3)),
        Key("DATA.NUM_FRAMES", 8, "Frames of a clip.", COUNT),
        Key("DATA.SAMPLING_RATE", 8, "Frame stride of a clip, at DATA.TARGET_FPS.", COUNT),
        Key("DATA.TARGET_FPS", 30.0, "Frame rate that DATA.SAMPLING_RATE refers to; others are converted.", POSITIVE),
        Key("DATA.TRAIN_JITTER_FPS", 0.0, "Training adds a random number up to this to DATA.TARGET_FPS.", FROM_0),
        Key("DATA.USE_OFFSET_SAMPLING", False, "Test clips span the whole video (MViT); False: the last ends earlier."),
        Key("DATA.TRAIN_JITTER_SCALES", [256, 320], range=COUNT, lengths=(2,),
            help="Clips: range of the short side in pixels before a random crop; one-crop tests use the first value."),
        Key("DATA.TRAIN_MULTI_SCALE_CROP", [],
            "Clips: crop sides / short side, replacing the other crops; XViT: [1, 0.875, 0.75, 0.66].", SHARE),
        Key("DATA.ENSEMBLE_METHOD", "sum", "How a video's clip scores are combined.", choices=("sum", "max")),
        Key("DATA.TRAIN_CROP_SIZE", 224, "Side of the training crop in pixels.", COUNT),
        Key("DATA.TEST_CROP_SIZE", 224, "Side of the evaluation crop in pixels.", COUNT),
        Key("DATA.TEST_CROP_RATIO", 0.875,
            "Images: evaluation resizes the short side to crop / ratio (224/0.875 = 256), then crops.", SHARE),
        Key("DATA.TEST_INTERPOLATION", "bicubic", "Images: interpolation of the evaluation resize; clips use bilinear.",
            choices=("bicubic", "bilinear", "nearest")),
        Key("DATA.TRAIN_JITTER_SCALES_RELATIVE", [],
            "Range of crop area / image area; empty: [0.08, 1], or for clips TRAIN_JITTER_SCALES.", SHARE,
            lengths=(0, 2)),
        Key("DATA.TRAIN_JITTER_ASPECT_RELATIVE", [0.75, 1.3333], "Range of the random crop's aspect ratio.", POSITIVE,
            lengths=(0, 2)),
        Key("DATA.RANDOM_FLIP", True, "Random horizontal flip in training."),
        Key("DATA.MAX_BAD_FRACTION", 0.01, range=PROBABILITY, free=True,
            help="Training stops if more than this share of the samples so far (at least 1000) is unreadable."),
    )),
    Section("DATA_LOADER", "Worker processes that read data.", (
        Key("DATA_LOADER.NUM_WORKERS", 8,
            "Worker processes, at most one per core; 0: read in the main process.", FROM_0, machine=True),
        Key("DATA_LOADER.PIN_MEMORY", True, "Pinned memory for transfers to a GPU.", machine=True),
    )),
    Section("AUG", "Augmentation of training images and clips.", (
        Key("AUG.ENABLE", True, "Augment training data by the other AUG keys; False: crop and flip only."),
        Key("AUG.NUM_SAMPLE", 1, "Repeated augmentation: draws per image; epochs keep their length (DeiT: 3).", COUNT),
        Key("AUG.COLOR_JITTER", 0.4, "Colour jitter strength, for images; only if AUG.AA_TYPE is empty.", FROM_0),
        Key("AUG.AA_TYPE", "rand-m9-mstd0.5-inc1", "AutoAugment policy, as named in timm; empty: none."),
        Key("AUG.INTERPOLATION", "bicubic", choices=("bicubic", "bilinear", "random"),
            help="Interpolation of the training crop of images; for clips (cropped bilinearly), of AUG.AA_TYPE."),
        Key("AUG.RE_PROB", 0.25, "Probability of random erasing.", PROBABILITY),
        Key("AUG.RE_MODE", "pixel", "What fills erased rectangles.", choices=("pixel", "rand", "const")),
        Key("AUG.RE_COUNT", 1, "Maximum number of erased rectangles.", COUNT),
    )),
    Section("MIXUP", "Mixup, CutMix and label smoothing.", (
        Key("MIXUP.ENABLE", False, "Mixup and CutMix in training."),
        Key("MIXUP.ALPHA", 0.8, "Mixup's alpha; 0: no mixup.", FROM_0),
        Key("MIXUP.CUTMIX_ALPHA", 1.0, "CutMix's alpha; 0: no CutMix.", FROM_0),
        Key("MIXUP.PROB", 1.0, "Probability of mixing a batch.", PROBABILITY),
        Key("MIXUP.SWITCH_PROB", 0.5, "Probability of CutMix over mixup if both are on.", PROBABILITY),
        Key("MIXUP.LABEL_SMOOTH_VALUE", 0.1, "Label smoothing, also without mixup.", RATE),
    )),
    Section("TENSORBOARD", "What TensorBoard shows.", (
        Key("TENSORBOARD.ENABLE", False, machine=True,
            help="Write scalars, histograms of token counts and pictures of kept tokens to OUTPUT_DIR/tensorboard."),
        Key("TENSORBOARD.NUM_IMAGES", 4, "Validation images to draw, always the same.", COUNT, machine=True),
    )),
    Section("", "The run as a whole.", (
        Key("OUTPUT_DIR", "output", "Folder of config.yaml, log, checkpoints, result.json; . is the current folder.",
            path=True, required=True, machine=True),
        Key("DEVICE", "auto", "auto: this process's GPU if there is one, else the CPU.",
            choices=("auto", "cpu", "cuda"), machine=True),
        Key("RNG_SEED", 0, "Seed of all random numbers.", SEED),
        Key("LOG_PERIOD", 10, "Steps between log lines.", COUNT, machine=True),
        Key("DIST_TIMEOUT_MINUTES", 10.0,
            "Maximum wait for a process that hangs; a dead one is noticed at once.", POSITIVE, machine=True),
    )),
)
# fmt: on
