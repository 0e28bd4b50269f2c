"""Data workers that are forked, spawned or started by a server: what they get can be pickled, and batches are equal."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from clips import encode
from image_folders import SIZE, make_tree
from torch.utils.data import ConcatDataset, DataLoader

from ats.config import load_config
from ats.datasets import Draw, Loader, build_dataset

IMAGE_KEYS = [
    [],
    ["AUG.ENABLE", "False"],
    *(["AUG.AA_TYPE", policy] for policy in ("v0", "original", "3a", "augmix-m5-w4-d2", "rand-m9-mstd0.5-inc1", "")),
    ["AUG.INTERPOLATION", "random", "DATA.RANDOM_FLIP", "False"],
    ["AUG.RE_PROB", "1.0", "AUG.RE_MODE", "const", "AUG.AA_TYPE", "", "AUG.COLOR_JITTER", "0.4"],
]
CLIP_KEYS = [
    ["AUG.ENABLE", "False"],
    ["AUG.ENABLE", "True", "AUG.AA_TYPE", "rand-m7-n4-mstd0.5-inc1", "AUG.RE_PROB", "1.0"],
    [
        "AUG.ENABLE",
        "True",
        "AUG.AA_TYPE",
        "v0",
        "DATA.TRAIN_MULTI_SCALE_CROP",
        "[1,0.875]",
        "DATA.RANDOM_FLIP",
        "False",
    ],
    ["DATA.TRAIN_JITTER_SCALES_RELATIVE", "[0.5,1.0]", "TEST.NUM_SPATIAL_CROPS", "1"],
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two images per class, and two videos, in one folder."""
    root = make_tree(tmp_path_factory.mktemp("data"), num_images=2)
    for i in range(2):
        encode(root / f"{i}.mp4", 12)
    for split in ("train", "val", "test"):
        (root / f"{split}.csv").write_text("0.mp4 0\n1.mp4 1\n")
    return root


def make_dataset(root: Path, name: str, split: str, keys: list[str]):
    words = ["TRAIN.DATASET", name, "TEST.DATASET", name, "DATA.PATH_TO_DATA_DIR", root, "MODEL.NUM_CLASSES", 3]
    words += ["DATA.TRAIN_CROP_SIZE", SIZE, "DATA.TEST_CROP_SIZE", SIZE, "DATA.TRAIN_JITTER_SCALES", [SIZE, 40]]
    words += ["DATA.NUM_FRAMES", 2, "DATA.SAMPLING_RATE", 2]
    return build_dataset(load_config(None, [*map(str, words), *keys]), split)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize(
    ("name", "keys"), [("imagenet", keys) for keys in IMAGE_KEYS] + [("kinetics", keys) for keys in CLIP_KEYS]
)
def test_every_data_set_and_transform_can_be_pickled(data, name, keys, split):
    """Also after a sample was read; and the copy gives the same samples."""
    dataset = make_dataset(data, name, split, keys)
    sample = dataset[Draw(1, 7)]
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[Draw(1, 7)].x, sample.x)


@pytest.mark.long
def test_every_start_method_gives_the_same_batches(data):
    """A worker of each kind reads images and videos. All start before the first is waited for, because a process that
    is not forked imports PyTorch for seconds.
    """
    both = ConcatDataset([make_dataset(data, "imagenet", "val", []), make_dataset(data, "kinetics", "test", [])])
    batches = [[0], [5], [6], [len(both) - 1]]
    loaders = [
        Loader(both, batch_sampler=batches, num_workers=1, multiprocessing_context=method)
        for method in ("spawn", "forkserver", "fork")
    ]
    for read in [DataLoader.__iter__(loader) for loader in loaders]:  # Loader's own waits for the first batch
        for batch, [index] in zip(read, batches, strict=True):
            assert torch.equal(batch.x[0], both[index].x)
