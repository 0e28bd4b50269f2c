"""ats.datasets.imagenet: files, labels, and errors for bad files and folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from image_folders import SIZE, damage, make_cfg, make_tree
from PIL import Image

from ats.config import load_config
from ats.datasets import ImageNet, build_dataset, build_loader
from ats.datasets.imagenet import read_image
from ats.datasets.transforms import eval_transform
from ats.errors import UserError
from ats.models import build_model


@pytest.fixture
def tree(tmp_path) -> Path:
    return make_tree(tmp_path / "data")


def test_samples_and_labels(tree):
    """Labels follow the sorted class names; grey, palette and CMYK files become RGB."""
    for i, mode in enumerate(("L", "P", "CMYK")):
        Image.new(mode, (SIZE, SIZE), 7 if mode != "CMYK" else (9, 9, 9, 9)).save(
            tree / f"val/n00000001/{mode}{i}.tiff"
        )
    dataset = ImageNet(tree, split="val", transform=eval_transform(SIZE, crop_ratio=1.0))
    assert dataset.classes == ["n00000000", "n00000001", "n00000002"]
    assert dataset.labels.tolist() == [0] * 4 + [1] * 7 + [2] * 4
    for index in range(len(dataset)):
        sample = dataset[index]
        assert (sample.x.shape, sample.label, sample.index, sample.bad) == (
            (3, SIZE, SIZE),
            dataset.labels[index],
            index,
            "",
        )
        assert Path(dataset.path(index)).parent.name == dataset.classes[sample.label]


def test_names_that_are_not_utf8(tree):
    """File names are bytes on Linux; a name that is not UTF-8 works too."""
    folder = os.fsencode(tree / "val" / "n00000000")
    shutil.copy(folder + b"/0.png", folder + b"/\xff\xe9.png")
    dataset = ImageNet(tree, split="val", transform=eval_transform(SIZE))
    assert sum(dataset[i].label == 0 for i in range(len(dataset))) == 5


REASONS = {
    "truncated png": "truncated",
    "truncated jpeg": "truncated",
    "text": "not an image",
    "empty": "not an image",
    "missing": "No such file",
    "huge": "100000 x 100000|10000000000 pixels",
}


@pytest.mark.parametrize("kind", REASONS)
def test_bad_file_in_evaluation_is_an_error(tree, kind):
    """The error names the path and the reason, with and without workers, and contains no traceback."""
    dataset = ImageNet(tree, split="val", transform=eval_transform(SIZE))
    bad = Path(dataset.path(6))
    damage(bad, kind)
    with pytest.raises(UserError, match=REASONS[kind]) as caught:
        dataset[6]
    assert str(bad) in str(caught.value)
    for num_workers in (0, 1) if kind == "text" else (0,):
        loader = build_loader(make_cfg(tree, DATA_LOADER__NUM_WORKERS=num_workers), "test")
        if kind == "missing":
            loader.dataset.files, loader.dataset.labels = dataset.files, dataset.labels  # removed after the scan
        batches = iter(loader)
        next(batches)  # samples 0 to 4 are fine
        with pytest.raises(UserError) as from_loader:
            next(batches)
        assert str(from_loader.value) == str(caught.value)


def test_huge_image_is_refused_by_its_size(tree, monkeypatch):
    """Even if a program turned off Pillow's own limit, and before anything is decoded."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tree / "val" / "n00000000" / "0.png"
    damage(path, "huge")
    with pytest.raises(UserError, match=r"0\.png: 100000 x 100000 pixels are more than"):
        read_image(str(path))


def test_bad_file_in_training_is_replaced_and_reported(tree):
    """Another sample replaces it, the same one in every run and for any number of workers; the path is reported."""
    bad = tree / "train" / "n00000001" / "2.png"
    damage(bad, "text")

    def epoch(num_workers):
        loader = build_loader(make_cfg(tree, DATA_LOADER__NUM_WORKERS=num_workers, TRAIN__BATCH_SIZE=4), "train")
        return list(loader), loader.dataset

    batches, dataset = epoch(0)
    bad_index = [dataset.path(i) for i in range(len(dataset))].index(str(bad))
    reported = [(i, path) for batch in batches for i, path in zip(batch.index.tolist(), batch.bad, strict=True) if path]
    assert [path for _, path in reported] == [str(bad)]
    assert reported[0][0] != bad_index
    for batch in batches:
        assert batch.label.tolist() == dataset.labels[batch.index].tolist()
    for batch, other in zip(batches, epoch(1)[0], strict=True):
        assert torch.equal(batch.x, other.x)


def test_nothing_readable_in_training_is_an_error(tree):
    """Replacing stops when no readable file is found."""
    for path in (tree / "train").rglob("*.png"):
        damage(path, "empty")
    with pytest.raises(UserError, match=r"cannot be read, and neither can"):
        next(iter(build_loader(make_cfg(tree), "train")))


def test_missing_and_empty_folders(tree, tmp_path, caplog):
    """The message names the folder and shows the expected layout."""

    def message(root, split="test"):
        with pytest.raises(UserError) as caught:
            build_loader(make_cfg(root), split)
        assert "train/<class>/*.jpg" in str(caught.value)
        return str(caught.value)

    assert "DATA.PATH_TO_DATA_DIR is not set" in message("")
    assert f"{tmp_path}/nowhere/val does not exist" in message(tmp_path / "nowhere")
    assert "move them" not in message(tmp_path / "nowhere")
    flat = message(tree / "train")  # class folders that no split holds
    assert "train has the folders n00000000, n00000001, n00000002. If these are the classes, move them" in flat
    shutil.rmtree(tree / "train")
    assert f"{tree}/train does not exist" in message(tree, "train")
    (tmp_path / "flat" / "val").mkdir(parents=True)
    assert "has no class folders" in message(tmp_path / "flat")
    (tmp_path / "flat" / "val" / "cat").mkdir()
    (tmp_path / "flat" / "val" / "cat" / "notes.txt").write_text("")
    assert "hold no images (.jpg" in message(tmp_path / "flat")
    shutil.rmtree(tree / "val" / "n00000001")
    (tree / "val" / "n00000001").mkdir()
    dataset = build_loader(make_cfg(tree), "test").dataset  # an empty class folder: the other labels do not change
    assert set(dataset.labels) == {0, 2}
    assert "1 of the 3 class folders" in caplog.text
    assert "n00000001" in caplog.text


def test_class_count_mismatch(tree):
    """The error has both numbers and the key to change."""
    cfg = make_cfg(tree, MODEL__NUM_CLASSES=1000, TEST__CHECKPOINT_FILE_PATH="w.pth", TRAIN__RESET_HEAD=True)
    advice = r"type MODEL\.NUM_CLASSES 3 TRAIN\.ENABLE True TRAIN\.CHECKPOINT_FILE_PATH w\.pth\."
    with pytest.raises(UserError, match=rf"val has 3 class folders.*NUM_CLASSES 1000\. Give another.*{advice}"):
        build_loader(cfg, "test")
    cfg.TRAIN.ENABLE = True
    with pytest.raises(UserError, match=r"train has 3 class folders.*NUM_CLASSES 1000\. Set MODEL\.NUM_CLASSES 3, or"):
        build_loader(cfg, "train")


@pytest.mark.parametrize("missing", ["val", "train"])
def test_classes_are_counted(tree, missing):
    """MODEL.NUM_CLASSES None: the folders of train/, or of val/ where that is all there is."""
    words = ["MODEL.NUM_CLASSES", "None", "DATA.PATH_TO_DATA_DIR", str(tree)]
    shutil.rmtree(tree / missing)
    assert load_config(None, words).MODEL.NUM_CLASSES == 3
    assert load_config(None, [*words, "MODEL.NUM_CLASSES", 5]).MODEL.NUM_CLASSES == 5  # as given, and then refused


def test_a_misspelt_folder_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "custom").mkdir(parents=True)
    for words in ([], ["MODEL.NUM_CLASSES", None]):
        cfg = load_config(None, ["MODEL.NUM_CLASSES", 3, "DATA.PATH_TO_DATA_DIR", "data/costum", *words])
        with pytest.raises(UserError, match=r"Did you mean custom\?"):
            build_loader(cfg, "test") if cfg.MODEL.NUM_CLASSES else build_model(cfg)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", r"\(not set\): it needs train/<class>.* or MODEL\.NUM_CLASSES N"),
        (".", r"\(\.\): it needs train/<class>.* or MODEL\.NUM_CLASSES N"),
        ("nowhere", r"There is no folder nowhere \(DATA\.PATH_TO_DATA_DIR\)"),
    ],
)
def test_classes_that_cannot_be_counted(tmp_path, monkeypatch, data, message):
    """Without data the configuration loads, but builds no network; the message says what to give."""
    monkeypatch.chdir(tmp_path)
    cfg = load_config(None, ["MODEL.NUM_CLASSES", None, "DATA.PATH_TO_DATA_DIR", data])
    assert cfg.MODEL.NUM_CLASSES is None
    with pytest.raises(UserError, match=message):
        build_model(cfg)


def test_other_files_are_counted(tree, caplog):
    """Once per split, by extension; hidden files apart."""
    for i in range(3):
        Image.new("RGB", (SIZE, SIZE)).save(tree / "train" / "n00000001" / f"{i}.GIF")
    for name in ("notes.txt", ".DS_Store"):
        (tree / "train" / "n00000000" / name).write_text("")
    build_dataset(make_cfg(tree), "train")
    build_dataset(make_cfg(tree), "val")
    assert caplog.text.count("skipped") == 1
    assert f"{tree}/train: 12 images; skipped 3 .gif, 1 .txt: only .jpg, .jpeg, .png" in caplog.text
    assert ".webp are read; left out 1 hidden." in caplog.text


def test_val_without_some_classes_of_train(tree):
    """The error is about the folders, not MODEL.NUM_CLASSES, in training and evaluation, even if the counts agree."""
    (tree / "val" / "n00000001").rename(tree / "val" / "n00000009")
    with pytest.raises(UserError, match=r"val has no folder for: n00000001\. .* of .*/train"):
        build_dataset(make_cfg(tree), "val")
    shutil.rmtree(tree / "val" / "n00000009")
    for split in ("val", "test"):
        with pytest.raises(UserError, match=r"val has no folder for: n00000001\."):
            build_dataset(make_cfg(tree), split)
    (tree / "val" / "n00000001").mkdir()
    assert len(build_dataset(make_cfg(tree), "val")) == 8
    (tree / "val" / "n00000009").mkdir()
    with pytest.raises(UserError, match=r"train has no folder for: n00000009\."):
        build_dataset(make_cfg(tree), "val")
