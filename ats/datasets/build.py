"""From the config to a loader: `build_loader(cfg, "train" | "val" | "test")`."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from fvcore.common.config import CfgNode
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision.datasets.folder import find_classes

from ats.checkpoint import to_fine_tune
from ats.datasets.base import Sample
from ats.datasets.imagenet import ImageNet
from ats.datasets.kinetics import ClipSampling, Kinetics
from ats.datasets.sampler import EvalSampler, TrainSampler
from ats.datasets.transforms import Transform, eval_transform, train_transform
from ats.datasets.video_transforms import MEAN as CLIP_MEAN
from ats.datasets.video_transforms import STD as CLIP_STD
from ats.datasets.video_transforms import ClipTransform, eval_clip_transform, train_clip_transform
from ats.errors import UserError, counted, suggest

logger = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]
SPLITS = ("train", "val", "test")
WORKER_DEATH_WAIT = 5.0  # seconds within which a worker whose pipe is closed has died
DATASETS: dict[str, Callable[[CfgNode, Split], Dataset]] = {}  # TRAIN.DATASET, in lower case -> builder


def register_dataset(name: str) -> Callable:
    """Decorator: make a builder `(cfg, split) -> Dataset of Sample` known as TRAIN.DATASET / TEST.DATASET `name`."""

    def register(builder: Callable[[CfgNode, Split], Dataset]) -> Callable[[CfgNode, Split], Dataset]:
        DATASETS[name.lower()] = builder
        return builder

    return register


class Loader(DataLoader):
    """A DataLoader that raises a worker's UserError as it is, and the death of a worker always as a RuntimeError.

    A plain DataLoader would raise it with the worker's traceback as its text. So the data set returns it in place of
    the batch (`__getitems__`), and it is raised here, when its batch is due.
    """

    def __iter__(self) -> Iterator[Sample]:
        try:
            for batch in super().__iter__():
                if isinstance(batch, UserError):
                    # A new one: raising `batch` itself would make a reference cycle with this frame, and an iterator
                    # that the garbage collector finds in a cycle waits five seconds for each of its workers.
                    raise type(batch)(*batch.args)
                yield batch
        except (OSError, EOFError) as error:
            if not self.num_workers:
                raise
            # A worker that dies while it hands a batch over does not always give PyTorch's own error: its pipe closes
            # before its signal comes. That signal is PyTorch's error, and says what killed it. It is waited for here:
            # later, while the iterator is deleted, Python would only print it.
            time.sleep(WORKER_DEATH_WAIT)
            raise RuntimeError(
                f"DataLoader worker exited unexpectedly while a batch was read from it ({error!r})."
            ) from error


def collate(samples: list[Sample] | UserError) -> Sample | UserError:
    """Stack samples: x [B, 3, (T,) H, W], label and index int64 [B], bad B strings; a UserError passes through."""
    return samples if isinstance(samples, UserError) else default_collate(samples)


def image_mean_std(cfg: CfgNode) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the channels that images are normalised with."""
    return cfg.DATA.MEAN or IMAGENET_DEFAULT_MEAN, cfg.DATA.STD or IMAGENET_DEFAULT_STD


def mean_std(cfg: CfgNode) -> tuple[Sequence[float], Sequence[float]]:
    """Those of the evaluation's samples, be they images or clips."""
    if len(input_shape(cfg)) == 3:
        return image_mean_std(cfg)
    return cfg.DATA.MEAN or CLIP_MEAN, cfg.DATA.STD or CLIP_STD


def build_transform(cfg: CfgNode, split: Split) -> Transform:
    """The image transform of a split."""
    data, aug = cfg.DATA, cfg.AUG
    mean, std = image_mean_std(cfg)
    if split != "train":
        return eval_transform(
            data.TEST_CROP_SIZE,
            crop_ratio=data.TEST_CROP_RATIO,
            interpolation=data.TEST_INTERPOLATION,
            mean=mean,
            std=std,
        )
    augment = {}
    if aug.ENABLE:
        augment = {
            "auto_augment": aug.AA_TYPE,
            "color_jitter": aug.COLOR_JITTER,
            "erase_prob": aug.RE_PROB,
            "erase_mode": aug.RE_MODE,
            "erase_count": aug.RE_COUNT,
        }
    return train_transform(
        data.TRAIN_CROP_SIZE,
        scale=data.TRAIN_JITTER_SCALES_RELATIVE or (0.08, 1.0),
        ratio=data.TRAIN_JITTER_ASPECT_RELATIVE or (3 / 4, 4 / 3),
        flip=data.RANDOM_FLIP,
        interpolation=aug.INTERPOLATION,
        mean=mean,
        std=std,
        **augment,
    )


@register_dataset("imagenet")
def build_imagenet(cfg: CfgNode, split: Split) -> ImageNet:
    """The ImageNet folder layout; "test" reads `val/`. Unreadable files are replaced in training only.

    Raises:
        UserError: the folder is not as expected, or has not MODEL.NUM_CLASSES classes, or val not those of train.
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
        has = f"{dataset.folder} has {counted(num_classes, 'class folder')}"
        model_has = f"the model has MODEL.NUM_CLASSES {cfg.MODEL.NUM_CLASSES}"
        if not cfg.TRAIN.ENABLE:  # the weights fit the model, or this would not be read
            raise UserError(
                f"{has}, but {model_has}. Give another DATA.PATH_TO_DATA_DIR or, to fine-tune for these classes with "
                f"tools/run_net.py, type MODEL.NUM_CLASSES {num_classes} {to_fine_tune(cfg)}."
            )
        raise UserError(
            f"{has}, but {model_has}. Set MODEL.NUM_CLASSES {num_classes}, or give another DATA.PATH_TO_DATA_DIR."
        )
    return dataset


def _check_same_classes(val: ImageNet) -> None:
    """Refuse a val folder whose labels do not mean what those of the train folder beside it mean."""
    folder = os.path.join(os.path.dirname(val.folder), "train")
    try:
        classes = set(find_classes(folder)[0])
    except FileNotFoundError:  # nothing to compare with
        return
    for more, fewer, missing in (
        (folder, val.folder, classes.difference(val.classes)),
        (val.folder, folder, set(val.classes) - classes),
    ):
        if missing:
            names = ", ".join(sorted(missing)[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise UserError(
                f"{fewer} has no folder for: {names}. Labels follow the sorted names, so it needs the class folders "
                f"of {more}; one without images may be empty."
            )


def build_clip_transforms(cfg: CfgNode, split: Split) -> list[ClipTransform]:
    """The clip transforms of a split; for "test" one per spatial crop."""
    data, aug = cfg.DATA, cfg.AUG
    normalise = {"mean": data.MEAN or CLIP_MEAN, "std": data.STD or CLIP_STD}
    if split != "train":
        has_crops = split == "test" and cfg.TEST.NUM_SPATIAL_CROPS > 1
        short_side = data.TEST_CROP_SIZE if has_crops else data.TRAIN_JITTER_SCALES[0]
        return [
            eval_clip_transform(data.TEST_CROP_SIZE, short_side=short_side, crop=crop, **normalise)
            for crop in (range(cfg.TEST.NUM_SPATIAL_CROPS) if has_crops else [1])
        ]
    augment = {}
    if aug.ENABLE:
        augment = {
            "auto_augment": aug.AA_TYPE,
            "interpolation": aug.INTERPOLATION,
            "erase_prob": aug.RE_PROB,
            "erase_mode": aug.RE_MODE,
            "erase_count": aug.RE_COUNT,
        }
    transform = train_clip_transform(
        data.TRAIN_CROP_SIZE,
        jitter_scales=data.TRAIN_JITTER_SCALES,
        scale=data.TRAIN_JITTER_SCALES_RELATIVE,
        ratio=data.TRAIN_JITTER_ASPECT_RELATIVE or (3 / 4, 4 / 3),
        multi_scales=data.TRAIN_MULTI_SCALE_CROP,
        flip=data.RANDOM_FLIP,
        **normalise,
        **augment,
    )
    return [transform]


@register_dataset("kinetics")
def build_kinetics(cfg: CfgNode, split: Split) -> Kinetics:
    """Clips listed in DATA.PATH_TO_DATA_DIR/{train,val,test}.csv. Bad files are replaced in training only.

    Raises:
        UserError: the csv file is missing or wrong, or settings do not fit together.
    """
    data = cfg.DATA
    if not data.PATH_TO_DATA_DIR:
        raise UserError("DATA.PATH_TO_DATA_DIR is not set: type DATA.PATH_TO_DATA_DIR FOLDER, the one with test.csv.")
    on_bad = {"train": "replace", "val": "raise", "test": cfg.TEST.ON_BAD_VIDEO}
    return Kinetics(
        os.path.join(os.path.expanduser(data.PATH_TO_DATA_DIR), f"{split}.csv"),
        split=split,
        sampling=ClipSampling(
            num_frames=data.NUM_FRAMES,
            sampling_rate=data.SAMPLING_RATE,
            target_fps=data.TARGET_FPS,
            fps_jitter=data.TRAIN_JITTER_FPS,
            use_offset_sampling=data.USE_OFFSET_SAMPLING,
        ),
        transforms=build_clip_transforms(cfg, split),
        num_classes=cfg.MODEL.NUM_CLASSES,
        separator=data.PATH_LABEL_SEPARATOR.replace("\\t", "\t"),
        path_prefix=data.PATH_PREFIX,
        allow_outside=data.ALLOW_PATHS_OUTSIDE_PREFIX,
        num_views=cfg.TEST.NUM_ENSEMBLE_VIEWS if split == "test" else 1,
        on_bad=on_bad[split],
        seed=cfg.RNG_SEED,
    )


def build_dataset(cfg: CfgNode, split: Split) -> Dataset:
    """The data set of a split: TRAIN.DATASET for "train" and "val", TEST.DATASET for "test".

    Raises:
        UserError: no data set has that name.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}; got {split!r}.")
    key = "TEST.DATASET" if split == "test" else "TRAIN.DATASET"
    name = cfg.TEST.DATASET if split == "test" else cfg.TRAIN.DATASET
    if name.lower() not in DATASETS:
        raise UserError(f"{key} {name!r} is not known.{suggest(name, DATASETS)} Choose one of: {', '.join(DATASETS)}.")
    return DATASETS[name.lower()](cfg, split)


def build_sample_loader(cfg: CfgNode, split: Literal["train", "val"], *, num_samples: int) -> Loader:
    """Some samples of a split, seen as evaluation sees them.

    One is drawn from each of `num_samples` equal stretches of the split, so that all classes are there; the same ones
    in every run of the same RNG_SEED.

    Raises:
        UserError: as `build_dataset`; fewer samples than none.
    """
    if num_samples < 1:
        raise UserError(f"{num_samples} samples: give at least 1.")
    dataset = build_dataset(cfg, split)
    if isinstance(dataset, ImageNet):
        dataset.transform = build_transform(cfg, "val")
    elif isinstance(dataset, Kinetics):
        dataset.split, dataset.transforms = "val", build_clip_transforms(cfg, "val")
    elif split == "train":
        logger.warning("TRAIN.DATASET %s: its training samples are taken as they come, augmented.", cfg.TRAIN.DATASET)
    count = min(num_samples, len(dataset))
    places = torch.rand(count, generator=torch.Generator().manual_seed(cfg.RNG_SEED)).tolist()
    chosen = [int((index + place) * len(dataset) / count) for index, place in enumerate(places)]
    return Loader(
        Subset(dataset, chosen),
        batch_size=cfg.TEST.BATCH_SIZE,
        collate_fn=collate,
        num_workers=min(cfg.DATA_LOADER.NUM_WORKERS, _num_cores()),
        worker_init_fn=_ignore_stop_signals,
    )


def input_shape(cfg: CfgNode) -> tuple[int, ...]:
    """Shape of one test sample of the data set: (3, H, W), of clips (3, T, H, W)."""
    name = cfg.TRAIN.DATASET if cfg.TRAIN.ENABLE else cfg.TEST.DATASET
    num_frames = (cfg.DATA.NUM_FRAMES,) if name.lower() == "kinetics" else ()
    return (3, *num_frames, cfg.DATA.TEST_CROP_SIZE, cfg.DATA.TEST_CROP_SIZE)


def build_loader(cfg: CfgNode, split: Split, *, rank: int = 0, world_size: int = 1) -> Loader:
    """A loader of one process's share of every batch.

    Its batches are `Sample`s; `loader.batch_sampler` is a `TrainSampler` for "train" (call its `set_epoch`), an
    `EvalSampler` otherwise. The batches do not depend on the number of workers.

    Raises:
        UserError: the data set or the batch size does not fit; while iterating: a file cannot be read.
    """
    dataset = build_dataset(cfg, split)
    if split == "train":
        sampler = TrainSampler(
            len(dataset),
            batch_size=cfg.TRAIN.BATCH_SIZE,
            seed=cfg.RNG_SEED,
            num_repeats=cfg.AUG.NUM_SAMPLE if cfg.AUG.ENABLE else 1,
            rank=rank,
            world_size=world_size,
            pairs=cfg.MIXUP.ENABLE,
        )
    else:
        sampler = EvalSampler(len(dataset), batch_size=cfg.TEST.BATCH_SIZE, rank=rank, world_size=world_size)
    num_workers = min(cfg.DATA_LOADER.NUM_WORKERS, _num_cores())
    if num_workers < cfg.DATA_LOADER.NUM_WORKERS:
        logger.info("%s data: %d workers, one per core (DATA_LOADER.NUM_WORKERS asks for more)", split, num_workers)
    return Loader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=cfg.DATA_LOADER.PIN_MEMORY and cfg.DEVICE != "cpu" and torch.cuda.is_available(),
        worker_init_fn=_ignore_stop_signals,
    )


def _ignore_stop_signals(worker: int) -> None:
    """Schedulers and terminals signal whole process groups; how to stop is decided by the process that trains.

    A SIGTERM from that process itself still counts: it is how workers are ended that do not end by themselves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parents_sigterm, daemon=True).start()


def _end_with_parents_sigterm() -> None:
    parent = multiprocessing.parent_process().pid  # not os.getppid(): that may be a fork server
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _num_cores() -> int:
    """Cores for each of the processes that torchrun started on this machine."""
    if hasattr(os, "sched_getaffinity"):  # a container's share of the machine, not the machine
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    return max(num_cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
