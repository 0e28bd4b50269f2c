"""tools/perf/loading.py compares the same work, and says when data is the limit."""

from __future__ import annotations

import loading
import pytest
import torch
from PIL import Image

from ats.config import get_cfg
from ats.datasets.build import build_loader, build_transform


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    loading.write_images(root, num_images=8)
    return root


def test_images_are_like_imagenets(images):
    """Size and bytes of a file, both splits, two classes."""
    paths = sorted(images.glob("*/*/*.jpg"))
    assert len(paths) == 16
    assert all(60_000 < path.stat().st_size < 200_000 for path in paths)
    with Image.open(paths[0]) as image:
        assert image.size == (500, 375)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_bare_loop_reads_what_the_loader_reads(images, split):
    """The inputs of both are the same numbers, random crops included."""
    cfg = get_cfg()
    cfg.merge_from_list(["DATA.PATH_TO_DATA_DIR", str(images), "MODEL.NUM_CLASSES", 2, "DATA_LOADER.NUM_WORKERS", 0])
    cfg.TRAIN.BATCH_SIZE = cfg.TEST.BATCH_SIZE = 4
    loader = build_loader(cfg, split)
    keys, batch = next(iter(loader.batch_sampler)), next(iter(loader))
    paths = [loader.dataset.path(i) for i in batch.index.tolist()]
    seeds = [key.seed if split == "train" else None for key in keys]
    got, seconds, decoding = loading.bare_batch(paths, build_transform(cfg, split), seeds)
    assert torch.equal(got, batch.x)
    assert 0 < decoding < seconds


def test_loading_is_compared(images, capsys):
    """Both splits, each with its ratio; the command prints them."""
    for row, split in zip(loading.benchmark_loading(str(images), get_cfg(), rounds=2), ("train", "val"), strict=True):
        assert row["split"] == split
        assert row["loader images/s"] > 0
        assert 0 < row["p10"] <= row["loader / bare"] <= row["p90"]
        assert 0 < row["decoding / bare"] < 1
    assert loading.main([str(images), "--rounds", "1", "--needed", "1e6"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Data is the limit: ")
    assert "loader / bare" in said


def test_who_is_the_limit():
    assert loading.data_limit(100, 350, cores=4).startswith("The network is the limit")
    assert loading.data_limit(100, 450, cores=4) == (
        "Data is the limit: 4 cores read 400 images/s, the network computes 450; 4.5 cores would keep up."
    )


def test_mistakes(tmp_path, capsys):
    assert loading.main([str(tmp_path)]) == 1
    assert "neither a folder train/ nor val/" in capsys.readouterr().err
