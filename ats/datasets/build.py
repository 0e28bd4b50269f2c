"""From a config to a loader: `build_loader(cfg, "train" | "val" | "test")`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from fvcore.common.config import CfgNode
from torch.utils.data import Dataset, Subset

from ats.checkpoint import to_fine_tune
from ats.datasets import transforms
from ats.datasets.base import Split
from ats.datasets.decode import ClipSampling
from ats.datasets.folders import advise_nfc, class_folders
from ats.datasets.imagenet import ImageNet
from ats.datasets.kinetics import Kinetics, Listing, read_csv
from ats.datasets.loader import EvalBatchSampler, Loader, TrainBatchSampler, num_cores
from ats.errors import UserError, counted, printable, suggest

logger = logging.getLogger(__name__)

MAX_COUNTED = 2**20  # most classes `count_classes` accepts: one wrong label must not allocate a head of gigabytes
DATASETS: dict[str, Callable[[CfgNode, Split], Dataset]] = {}  # TRAIN.DATASET, in lower case -> builder


def register_dataset(name: str) -> Callable:
    """Decorator: register a builder `(cfg, split) -> Dataset of Sample` as TRAIN.DATASET / TEST.DATASET `name`."""

    def register(builder: Callable[[CfgNode, Split], Dataset]) -> Callable[[CfgNode, Split], Dataset]:
        DATASETS[name.lower()] = builder
        return builder

    return register


def mean_std(cfg: CfgNode, *, clips: bool | None = None) -> tuple[Sequence[float], Sequence[float]]:
    """Channel mean and standard deviation for normalising images or clips (None: whichever the test samples are)."""
    clips = len(input_shape(cfg)) == 4 if clips is None else clips
    mean, std = transforms.CLIP_MEAN_STD if clips else transforms.IMAGE_MEAN_STD
    return cfg.DATA.MEAN or mean, cfg.DATA.STD or std


def preprocessing(cfg: CfgNode) -> dict[str, object]:
    """The preprocessing of a test image or clip as plain values, for using the weights elsewhere."""
    mean, std = mean_std(cfg)
    shape = input_shape(cfg)
    facts = {"input_size": list(shape), "mean": list(mean), "std": list(std)}
    if len(shape) == 3:
        facts |= {"crop_ratio": cfg.DATA.TEST_CROP_RATIO, "interpolation": cfg.DATA.TEST_INTERPOLATION}
    return facts


def _augmentation(cfg: CfgNode) -> transforms.Augmentation:
    data, aug = cfg.DATA, cfg.AUG
    ratio = data.TRAIN_JITTER_ASPECT_RELATIVE or (3 / 4, 4 / 3)
    more = (aug.AA_TYPE, aug.COLOR_JITTER or None, aug.RE_PROB, aug.RE_MODE, aug.RE_COUNT) if aug.ENABLE else ()
    hflip = 0.5 if data.RANDOM_FLIP else 0.0
    return transforms.Augmentation(data.TRAIN_JITTER_SCALES_RELATIVE, ratio, hflip, aug.INTERPOLATION, *more)


def build_transform(cfg: CfgNode, split: Split) -> transforms.Transform:
    """The image transform of a split."""
    data, (mean, std) = cfg.DATA, mean_std(cfg, clips=False)
    if split == "train":
        return transforms.train_transform(data.TRAIN_CROP_SIZE, _augmentation(cfg), mean=mean, std=std)
    how = {"crop_ratio": data.TEST_CROP_RATIO, "interpolation": data.TEST_INTERPOLATION}
    return transforms.eval_transform(data.TEST_CROP_SIZE, **how, mean=mean, std=std)


@register_dataset("imagenet")
def build_imagenet(cfg: CfgNode, split: Split) -> ImageNet:
    """The ImageNet folder layout; "test" reads `val/`. Unreadable files are replaced in training only.

    Raises:
        UserError: the folder is not laid out as expected, does not have MODEL.NUM_CLASSES classes, or val/ has other
            classes than train/.
    """
    dataset = ImageNet(
        cfg.DATA.PATH_TO_DATA_DIR,
        split="train" if split == "train" else "val",
        transform=build_transform(cfg, split),
        on_bad="replace" if split == "train" else "raise",
        seed=cfg.RNG_SEED,
    )
    num_classes = len(dataset.classes)
    if split == "val" or (split == "test" and num_classes != cfg.MODEL.NUM_CLASSES):
        _check_same_classes(dataset)
    if num_classes != cfg.MODEL.NUM_CLASSES:
        advice = f"Set MODEL.NUM_CLASSES {num_classes}, or give another DATA.PATH_TO_DATA_DIR."
        if not cfg.TRAIN.ENABLE:  # the weights fit the model, or the run would already have stopped
            advice = (
                "Give another DATA.PATH_TO_DATA_DIR or, to fine-tune for these classes with tools/run_net.py, type "
                f"MODEL.NUM_CLASSES {num_classes} {to_fine_tune(cfg)}."
            )
        raise UserError(
            f"{dataset.folder} has {counted(num_classes, 'class folder')}, but the model has MODEL.NUM_CLASSES "
            f"{cfg.MODEL.NUM_CLASSES}. {advice}"
        )
    return dataset


def _check_same_classes(val: ImageNet) -> None:
    """Refuse a val folder whose classes, and so whose labels, differ from those of the train folder beside it."""
    folder = os.path.join(os.path.dirname(val.folder), "train")
    theirs, ours = set(class_folders(folder) if os.path.isdir(folder) else ()), set(val.classes)
    if not theirs:  # nothing to compare with
        return
    for more, fewer, missing in ((folder, val.folder, theirs - ours), (val.folder, folder, ours - theirs)):
        if missing:
            names = ", ".join(map(printable, sorted(missing)[:5])) + (
                f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            )
            advice = advise_nfc(missing, theirs ^ ours, folder=fewer, root=os.path.dirname(fewer))
            rule = (
                f" Labels follow the sorted names, so it needs the class folders of {more}; one without images may be "
            )
            raise UserError(f"{fewer} has no folder for: {names}.{advice or f'{rule}empty.'}")


def build_clip_transforms(cfg: CfgNode, split: Split) -> list[transforms.ClipTransform]:
    """The clip transforms of a split: one per spatial crop for "test", else one."""
    data, (mean, std) = cfg.DATA, mean_std(cfg, clips=True)
    if split == "train":
        scales = {"jitter_scales": data.TRAIN_JITTER_SCALES, "multi_scales": data.TRAIN_MULTI_SCALE_CROP}
        return [transforms.train_clip_transform(data.TRAIN_CROP_SIZE, _augmentation(cfg), **scales, mean=mean, std=std)]
    has_crops = split == "test" and cfg.TEST.NUM_SPATIAL_CROPS > 1
    short_side = data.TEST_CROP_SIZE if has_crops else data.TRAIN_JITTER_SCALES[0]
    return [
        transforms.eval_clip_transform(data.TEST_CROP_SIZE, short_side=short_side, crop=crop, mean=mean, std=std)
        for crop in (range(cfg.TEST.NUM_SPATIAL_CROPS) if has_crops else [1])
    ]


def clip_sampling(cfg: CfgNode) -> ClipSampling:
    """How the frames of a clip are sampled."""
    data = cfg.DATA
    rate = data.SAMPLING_RATE, data.TARGET_FPS, data.TRAIN_JITTER_FPS
    return ClipSampling(data.NUM_FRAMES, *rate, data.USE_OFFSET_SAMPLING)


@register_dataset("kinetics")
def build_kinetics(cfg: CfgNode, split: Split) -> Kinetics:
    """Clips listed in DATA.PATH_TO_DATA_DIR/{train,val,test}.csv. Bad files are replaced in training only.

    Raises:
        UserError: the csv file is missing or wrong, or settings contradict each other.
    """
    if not cfg.DATA.PATH_TO_DATA_DIR:
        raise UserError("DATA.PATH_TO_DATA_DIR is not set: type DATA.PATH_TO_DATA_DIR FOLDER, the one with test.csv.")
    return Kinetics(
        _read_csv(cfg, split, num_classes=cfg.MODEL.NUM_CLASSES),
        split=split,
        sampling=clip_sampling(cfg),
        transforms=build_clip_transforms(cfg, split),
        num_clips=cfg.TEST.NUM_ENSEMBLE_VIEWS if split == "test" else 1,
        on_bad={"train": "replace", "val": "raise", "test": cfg.TEST.ON_BAD_VIDEO}[split],
        seed=cfg.RNG_SEED,
    )


def _read_csv(cfg: CfgNode, split: str, *, num_classes: int) -> Listing:
    data, path = cfg.DATA, os.path.join(cfg.DATA.PATH_TO_DATA_DIR, f"{split}.csv")
    how = {"prefix": data.PATH_PREFIX, "allow_outside": data.ALLOW_PATHS_OUTSIDE_PREFIX}
    return read_csv(path, separator=data.PATH_LABEL_SEPARATOR, num_classes=num_classes, **how)


def count_classes(cfg: CfgNode) -> int | None:
    """What MODEL.NUM_CLASSES None stands for: the number of class folders in train/ (or val/ if there is no train/), or
    the highest label in any csv file + 1. None if there is no such data.
    """
    root, name = cfg.DATA.PATH_TO_DATA_DIR, cfg.TRAIN.DATASET if cfg.TRAIN.ENABLE else cfg.TEST.DATASET
    if name.lower() == "imagenet" and root:
        folders = [os.path.join(root, split) for split in ("train", "val")]
        return next((len(class_folders(folder)) for folder in folders if os.path.isdir(folder)), None) or None
    if name.lower() == "kinetics" and root:
        splits = [split for split in get_args(Split) if os.path.isfile(os.path.join(root, f"{split}.csv"))]
        return max(
            (int(_read_csv(cfg, split, num_classes=MAX_COUNTED).labels.max()) + 1 for split in splits), default=None
        )
    return None


def build_dataset(cfg: CfgNode, split: Split) -> Any:
    """The `Dataset` of a split, with a length: TRAIN.DATASET for "train" and "val", TEST.DATASET for "test"."""
    return dataset_builder(cfg, split)(cfg, split)


def dataset_builder(cfg: CfgNode, split: Split) -> Callable[[CfgNode, Split], Dataset]:
    """The builder that `build_dataset` calls; raises a UserError if no data set is registered under that name."""
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}; got {split!r}.")
    key = "TEST.DATASET" if split == "test" else "TRAIN.DATASET"
    name = cfg.TEST.DATASET if split == "test" else cfg.TRAIN.DATASET
    if name.lower() not in DATASETS:
        raise UserError(f"{key} {name!r} is not known.{suggest(name, DATASETS)} Choose one of: {', '.join(DATASETS)}.")
    return DATASETS[name.lower()]


def build_sample_loader(cfg: CfgNode, split: Literal["train", "val"], *, num_samples: int) -> Loader:
    """A loader of some samples of a split, transformed as in evaluation.

    Splits the data set into `num_samples` equal parts (at least 1) and draws one sample from each, which covers all
    classes. The same RNG_SEED gives the same samples.
    """
    if num_samples < 1:
        raise UserError(f"{num_samples} samples: give at least 1.")
    dataset = build_dataset(cfg, split)
    if isinstance(dataset, ImageNet):
        dataset.transform = build_transform(cfg, "val")
    elif isinstance(dataset, Kinetics):
        dataset.split, dataset.transforms = "val", build_clip_transforms(cfg, "val")
    elif split == "train":
        logger.warning("TRAIN.DATASET %s: its training samples keep their augmentation.", cfg.TRAIN.DATASET)
    count = min(num_samples, len(dataset))
    places = torch.rand(count, generator=torch.Generator().manual_seed(cfg.RNG_SEED)).tolist()
    chosen = [int((index + place) * len(dataset) / count) for index, place in enumerate(places)]
    num_workers = min(cfg.DATA_LOADER.NUM_WORKERS, num_cores())
    return Loader(Subset(dataset, chosen), batch_size=cfg.TEST.BATCH_SIZE, num_workers=num_workers)


def input_shape(cfg: CfgNode) -> tuple[int, ...]:
    """Shape of one test sample: (3, H, W) for images, (3, T, H, W) for clips."""
    name = cfg.TRAIN.DATASET if cfg.TRAIN.ENABLE else cfg.TEST.DATASET
    num_frames = (cfg.DATA.NUM_FRAMES,) if name.lower() == "kinetics" else ()
    return (3, *num_frames, cfg.DATA.TEST_CROP_SIZE, cfg.DATA.TEST_CROP_SIZE)


def noun_of(cfg: CfgNode) -> str:
    """What a test sample is: "image" or "clip"."""
    return "clip" if len(input_shape(cfg)) == 4 else "image"


def build_loader(cfg: CfgNode, split: Split, *, rank: int = 0, world_size: int = 1) -> Loader:
    """A loader of process `rank`'s share of every batch.

    Yields `Sample`s. `loader.batch_sampler` is a `TrainBatchSampler` for "train" (call its `set_epoch`), otherwise an
    `EvalBatchSampler`. The batches do not depend on the number of workers.

    Raises:
        UserError: the data set or the batch size is wrong; while iterating: a file cannot be read.
    """
    dataset, share = build_dataset(cfg, split), dict[str, Any](rank=rank, world_size=world_size)
    sampler: TrainBatchSampler | EvalBatchSampler
    if split == "train":
        num_repeats = cfg.AUG.NUM_SAMPLE if cfg.AUG.ENABLE else 1
        order: dict[str, Any] = {"seed": cfg.RNG_SEED, "num_repeats": num_repeats, "pairs": cfg.MIXUP.ENABLE}
        sampler = TrainBatchSampler(len(dataset), batch_size=cfg.TRAIN.BATCH_SIZE, **order, **share)
    else:
        sampler = EvalBatchSampler(len(dataset), batch_size=cfg.TEST.BATCH_SIZE, **share)
    num_workers = min(cfg.DATA_LOADER.NUM_WORKERS, num_cores())
    if num_workers < cfg.DATA_LOADER.NUM_WORKERS:
        workers = counted(num_workers, "worker")
        logger.info("%s data: %s, one per core (DATA_LOADER.NUM_WORKERS asks for more)", split, workers)
    return Loader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=cfg.DATA_LOADER.PIN_MEMORY and cfg.DEVICE != "cpu" and torch.cuda.is_available(),
    )
