"""ats.datasets and tools/prepare_imagenet.py: what is read, in which order, and what bad input gets."""

from __future__ import annotations

import gc
import importlib.util
import io
import multiprocessing
import os
import random
import shutil
import struct
import tarfile
import threading
import time
import zlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ats.config import get_cfg
from ats.datasets import Draw, EvalSampler, ImageNet, Loader, Sample, TrainSampler, build_dataset, build_loader
from ats.datasets import build as build_module
from ats.datasets.imagenet import read_image
from ats.datasets.transforms import eval_transform, train_transform
from ats.errors import UserError

SIZE = 32


def make_tree(root: Path, *, num_classes: int = 3, num_images: int = 4, size: int = SIZE) -> Path:
    """A small ImageNet tree of noise images, each one different."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(num_classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(num_images):
                Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def tree(tmp_path) -> Path:
    return make_tree(tmp_path / "data")


@pytest.fixture(scope="module")
def shared_tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("shared") / "data")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427


def make_cfg(root: Path, **changes):
    cfg = get_cfg()
    cfg.DATA.PATH_TO_DATA_DIR = str(root)
    cfg.DATA.TRAIN_CROP_SIZE = cfg.DATA.TEST_CROP_SIZE = SIZE
    cfg.DATA.TEST_CROP_RATIO = 1.0
    cfg.DATA_LOADER.NUM_WORKERS = 0
    cfg.MODEL.NUM_CLASSES = 3
    cfg.TRAIN.BATCH_SIZE = cfg.TEST.BATCH_SIZE = 5
    cfg.RNG_SEED = 1
    for key, value in changes.items():
        section, name = key.split("__")
        cfg[section][name] = value
    return cfg


# ---------------------------------------------------------------------------------------------------------- transforms


def test_eval_transform_is_timms(photo):
    """DeiT's preprocessing of a real photo equals timm's bit for bit: resize 256 bicubic, centre crop 224."""
    from timm.data import create_transform

    timms = create_transform(224, is_training=False, crop_pct=0.875, interpolation="bicubic")
    ours = eval_transform(224)
    for image in (photo, photo.rotate(90, expand=True), photo.resize((100, 90))):
        assert torch.equal(ours(image), timms(image))
    assert ours(photo).shape == (3, 224, 224)


def test_eval_transform_by_hand(photo):
    """The same, written out with Pillow alone."""
    width, height = 256 * 640 // 427, 256
    left, top = round((width - 224) / 2), 16
    crop = photo.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(eval_transform(224)(photo), (pixels - mean[:, None, None]) / std[:, None, None])


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_resampled_when_the_size_fits(photo, training):
    """At crop ratio 1 (or a full training crop) an image of the right size passes pixel by pixel."""
    image = photo.crop((7, 5, 67, 65))
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    if training:
        transform = train_transform(60, scale=(1, 1), ratio=(1, 1), flip=False, **plain)
    else:
        transform = eval_transform(60, crop_ratio=1.0, **plain)
    np.testing.assert_array_equal((transform(image) * 255).round().byte().permute(1, 2, 0), np.asarray(image))


def test_training_augmentations_do_something(photo):
    """Each switch of the training transform changes its output; without any it is crop and flip."""
    image = photo.resize((64, 64))

    def run(**kwargs):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        return train_transform(64, **{"scale": (1, 1), "ratio": (1, 1), "flip": False, **kwargs})(image)

    plain = run()
    assert torch.equal(plain, eval_transform(64, crop_ratio=1.0)(image))
    flip = train_transform(64, scale=(1, 1), ratio=(1, 1), flip=True)
    flipped = [torch.equal(flip(image), plain.flip(2)) for _ in range(20)]
    assert 0 < sum(flipped) < 20
    for switch in (
        {"scale": (0.2, 0.4)},
        {"ratio": (2, 3)},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"color_jitter": 0.4},
        {"erase_prob": 1.0},
    ):
        assert not torch.equal(run(**switch), plain), switch


def test_every_augmentation_at_full_strength(photo):
    """All of RandAugment's operations run at magnitude 10 with the installed Pillow; posterizing to 0 bits is black."""
    image = photo.resize((32, 32))
    for policy in ("rand-m10-n1-p1", "rand-m10-n1-p1-inc1", "original", "v0", "augmix-m10"):
        transform = train_transform(32, auto_augment=policy, mean=(0, 0, 0), std=(1, 1, 1))
        ops = getattr(transform.transforms[2], "ops", [])
        for op in ops:
            op(image)
            if op.name in ("Posterize", "PosterizeIncreasing") and op.magnitude == 10:
                black = op.aug_fn(image, 0)
                assert (black.mode, black.getextrema()) == ("RGB", ((0, 0),) * 3)
        for _ in range(20):
            transform(image)
    assert train_transform(32, auto_augment="rand-m9-mstd0.5-inc1").transforms[2].ops


def test_wrong_transform_settings_are_named():
    with pytest.raises(UserError, match=r"DATA\.TEST_CROP_RATIO.*got 2"):
        eval_transform(224, crop_ratio=2)
    with pytest.raises(UserError, match=r"AUG\.INTERPOLATION 'cubic'.*bicubic, bilinear, random"):
        train_transform(224, interpolation="cubic")
    with pytest.raises(UserError, match=r"DATA\.TRAIN_JITTER_SCALES_RELATIVE.*got \[1.0, 0.1\]"):
        train_transform(224, scale=(1.0, 0.1))
    with pytest.raises(UserError, match=r"AUG\.AA_TYPE 'randaug-oops'"):
        train_transform(224, auto_augment="randaug-oops")


# ------------------------------------------------------------------------------------------------------------ samplers

sizes = {
    "num_samples": st.integers(1, 80),
    "share": st.integers(1, 5),
    "world_size": st.integers(1, 4),
    "num_repeats": st.integers(1, 4),
    "seed": st.integers(0, 9),
    "epoch": st.integers(0, 9),
}


@given(**sizes)
@settings(max_examples=150)
def test_train_sampler_laws(num_samples, share, world_size, num_repeats, seed, epoch):
    """Over the ranks an epoch is the order of one process; R draws per image; only (seed, epoch) counts."""
    batch_size = share + world_size - 1
    if num_samples < batch_size:
        return
    kwargs = {"batch_size": batch_size, "seed": seed, "num_repeats": num_repeats}

    def batches(rank=0, world_size=1, epochs=(epoch,), start_batch=0):
        sampler = TrainSampler(num_samples, rank=rank, world_size=world_size, **kwargs)
        for e in epochs:
            sampler.set_epoch(e, start_batch=start_batch)
            result = list(sampler)
        assert len(result) == len(sampler)
        return result

    whole = batches()
    of_rank = [batches(rank, world_size) for rank in range(world_size)]
    for step, batch in enumerate(zip(*of_rank, strict=True)):
        joined = list(chain(*batch))
        sizes = [len(part) for part in batch]
        assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
        assert joined == whole[step]
    draws = list(chain(*whole))
    assert all(0 <= draw.index < num_samples for draw in draws)
    counts = np.bincount([draw.index for draw in draws], minlength=num_samples)
    assert sorted(counts[counts > 0])[1:] == [num_repeats] * (np.count_nonzero(counts) - 1)  # the last may be cut
    assert counts.max(initial=0) <= num_repeats
    assert len(draws) == num_samples // batch_size * batch_size
    assert batches(epochs=(epoch + 1, epoch)) == whole  # history does not count
    if whole:
        assert batches(start_batch=len(whole) // 2) == whole[len(whole) // 2 :]  # resumed in mid-epoch


def test_train_sampler_orders_differ():
    """Another epoch or another seed gives another order and other draws; repeats of an image draw differently."""
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = TrainSampler(100, batch_size=10, seed=seed, num_repeats=2)
        sampler.set_epoch(epoch)
        orders.append(sampler.global_order())
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert len({draw.seed for draw in orders[0]}) == 100


@given(num_samples=st.integers(0, 60), batch_size=st.integers(1, 20), world_size=st.integers(1, 7))
@settings(max_examples=150)
def test_eval_sampler_reads_each_sample_once(num_samples, batch_size, world_size):
    """Whatever the number of processes, every sample is evaluated exactly once and no batch is too large."""
    seen = []
    for rank in range(world_size):
        sampler = EvalSampler(num_samples, batch_size=batch_size, rank=rank, world_size=world_size)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(0 < len(batch) <= -(-batch_size // world_size) for batch in batches)
        seen += chain(*batches)
    assert sorted(seen) == list(range(num_samples))


def test_wrong_batch_sizes_are_named():
    with pytest.raises(UserError, match=r"12 samples.*batch of 16.*TRAIN\.BATCH_SIZE to at most 12"):
        TrainSampler(12, batch_size=16, seed=0)
    with pytest.raises(UserError, match=r"TRAIN\.BATCH_SIZE 5 is too small for 3. Set TRAIN\.BATCH_SIZE to at least 6"):
        TrainSampler(12, batch_size=5, seed=0, world_size=3, pairs=True)
    with pytest.raises(UserError, match=r"TEST\.BATCH_SIZE.*got 0"):
        EvalSampler(12, batch_size=0)
    with pytest.raises(ValueError, match=r"start_batch must be in 0\.\.3"):
        TrainSampler(12, batch_size=4, seed=0).set_epoch(0, start_batch=4)


# ------------------------------------------------------------------------------------------------------------- reading


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
    """File names are bytes on Linux; one that is no UTF-8 is read all the same."""
    folder = os.fsencode(tree / "val" / "n00000000")
    shutil.copy(folder + b"/0.png", folder + b"/\xff\xe9.png")
    dataset = ImageNet(tree, split="val", transform=eval_transform(SIZE))
    assert sum(dataset[i].label == 0 for i in range(len(dataset))) == 5


def test_draw_decides_the_augmentation(shared_tree):
    """A draw's transform depends on its seed alone, and leaves the generators of the caller as they were."""
    cfg = make_cfg(shared_tree)
    dataset = build_loader(cfg, "train").dataset
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    first = dataset[Draw(3, 8)].x
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002
    assert torch.equal(dataset[Draw(3, 8)].x, first)
    assert not torch.equal(dataset[Draw(3, 9)].x, first)


def test_workers_change_nothing(shared_tree):
    """Two epochs with 0, 1 and 2 workers, and with two processes side by side, give the same batches to the bit."""

    def epochs(num_workers, rank=0, world_size=1):
        cfg = make_cfg(shared_tree, DATA_LOADER__NUM_WORKERS=num_workers, AUG__NUM_SAMPLE=3, TRAIN__BATCH_SIZE=4)
        loader = build_loader(cfg, "train", rank=rank, world_size=world_size)
        batches = []
        for epoch in (0, 1):
            loader.batch_sampler.set_epoch(epoch)
            batches += list(loader)
        return batches

    expected = epochs(0)
    assert [batch.x.shape for batch in expected] == [(4, 3, SIZE, SIZE)] * 6
    assert isinstance(expected[0], Sample)
    assert list(expected[0].bad) == [""] * 4
    assert not torch.equal(expected[0].index, expected[3].index)
    for batches in (epochs(1), epochs(2)):
        for batch, other in zip(expected, batches, strict=True):
            assert torch.equal(batch.x, other.x)
            assert torch.equal(batch.index, other.index)
    for batch, *parts in zip(expected, epochs(0, 0, 2), epochs(0, 1, 2), strict=True):
        assert torch.equal(batch.x, torch.cat([part.x for part in parts]))


class Slow(Dataset):
    """Samples that take long enough for a worker to be killed while it reads one."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        time.sleep(0.5)
        return index


def test_worker_that_closes_its_pipe_before_it_dies(monkeypatch):
    """As a killed worker does, by chance: one error, which names what killed it, and none while the loader is deleted,
    where Python only prints it.
    """
    ignored = []
    monkeypatch.setattr("sys.unraisablehook", ignored.append)
    batches, others = DataLoader.__iter__, set(multiprocessing.active_children())

    def broken_pipe(loader):
        iterator = batches(loader)
        yield next(iterator)
        (worker,) = set(multiprocessing.active_children()) - others
        threading.Timer(0.3, worker.kill).start()
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(DataLoader, "__iter__", broken_pipe)
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid \d+\) is killed by signal: Killed"):
        list(Loader(Slow(), num_workers=1))
    gc.collect()
    assert not ignored


def test_an_error_of_the_pipe_alone_is_named(monkeypatch):
    """No worker died: the error is one of the data all the same, and says which."""
    monkeypatch.setattr(build_module, "WORKER_DEATH_WAIT", 0)
    monkeypatch.setattr(DataLoader, "__iter__", lambda loader: iter(_raise_eof()))
    with pytest.raises(RuntimeError, match=r"^DataLoader worker exited unexpectedly .*EOFError"):
        list(Loader(Slow(), num_workers=1))


def _raise_eof():
    raise EOFError
    yield


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "truncated png":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "truncated jpeg":
        buffer = io.BytesIO()
        Image.open(io.BytesIO(content)).save(buffer, format="jpeg", quality=95)
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    elif kind == "text":
        path.write_text("<html>404 Not Found</html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "missing":
        path.unlink()
    else:  # a PNG of 400 bytes that says it has 10 gigapixels
        chunk = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
        huge = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(content[:8] + huge + content[33:])


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
    """It names the path and the reason, with and without workers, and has no traceback in its text."""
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
    """Also where a program has switched Pillow's own limit off, and before anything is decoded."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tree / "val" / "n00000000" / "0.png"
    damage(path, "huge")
    with pytest.raises(UserError, match=r"0\.png: 100000 x 100000 pixels are more than"):
        read_image(str(path))


def test_bad_file_in_training_is_replaced_and_reported(tree):
    """Another sample stands in, the same one in every run and for any worker, and the path is reported."""
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
    """Replacing ends when there is nothing to replace by."""
    for path in (tree / "train").rglob("*.png"):
        damage(path, "empty")
    with pytest.raises(UserError, match=r"cannot be read, and nor can"):
        next(iter(build_loader(make_cfg(tree), "train")))


# ------------------------------------------------------------------------------------------------------------ building


def test_missing_and_empty_folders(tree, tmp_path, caplog):
    """The message names the folder and draws the tree that is expected."""

    def message(root, split="test"):
        with pytest.raises(UserError) as caught:
            build_loader(make_cfg(root), split)
        assert "train/<class>/*.jpg" in str(caught.value)
        return str(caught.value)

    assert "DATA.PATH_TO_DATA_DIR is not set" in message("")
    assert f"{tmp_path}/nowhere/val does not exist" in message(tmp_path / "nowhere")
    shutil.rmtree(tree / "train")
    assert f"{tree}/train does not exist" in message(tree, "train")
    (tmp_path / "flat" / "val").mkdir(parents=True)
    assert "has no class folders" in message(tmp_path / "flat")
    (tmp_path / "flat" / "val" / "cat").mkdir()
    (tmp_path / "flat" / "val" / "cat" / "notes.txt").write_text("")
    assert "hold no images (.jpg" in message(tmp_path / "flat")
    shutil.rmtree(tree / "val" / "n00000001")
    (tree / "val" / "n00000001").mkdir()
    dataset = build_loader(make_cfg(tree), "test").dataset  # part of the images: the labels keep their places
    assert set(dataset.labels) == {0, 2}
    assert "1 of the 3 class folders" in caplog.text
    assert "n00000001" in caplog.text


def test_class_count_mismatch(shared_tree):
    """Both numbers and the key to change."""
    cfg = make_cfg(shared_tree, MODEL__NUM_CLASSES=1000, TEST__CHECKPOINT_FILE_PATH="w.pth", TRAIN__RESET_HEAD=True)
    advice = r"type MODEL\.NUM_CLASSES 3 TRAIN\.ENABLE True TRAIN\.CHECKPOINT_FILE_PATH w\.pth\."
    with pytest.raises(UserError, match=rf"val has 3 class folders.*NUM_CLASSES 1000\. Give another.*{advice}"):
        build_loader(cfg, "test")
    cfg.TRAIN.ENABLE = True
    with pytest.raises(UserError, match=r"train has 3 class folders.*NUM_CLASSES 1000\. Set MODEL\.NUM_CLASSES 3, or"):
        build_loader(cfg, "train")


def test_files_that_are_left_out_are_counted(tree, caplog):
    """Once per split, by extension; hidden files are nobody's images."""
    for i in range(3):
        Image.new("RGB", (SIZE, SIZE)).save(tree / "train" / "n00000001" / f"{i}.GIF")
    for name in ("notes.txt", ".DS_Store"):
        (tree / "train" / "n00000000" / name).write_text("")
    build_dataset(make_cfg(tree), "train")
    build_dataset(make_cfg(tree), "val")
    assert caplog.text.count("skipped") == 1
    assert f"{tree}/train: 12 images; skipped 3 .gif, 1 .txt: only .jpg, .jpeg, .png" in caplog.text


def test_val_without_some_classes_of_train(tree):
    """Not MODEL.NUM_CLASSES is wrong then, in training and evaluation; nor do as many other folders pass."""
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


def test_unknown_dataset(shared_tree):
    """The choices are listed; case does not matter."""
    with pytest.raises(UserError, match=r"TRAIN\.DATASET 'imagnet'.*Did you mean imagenet.*Choose one of: imagenet"):
        build_loader(make_cfg(shared_tree, TRAIN__DATASET="imagnet"), "train")
    assert len(build_loader(make_cfg(shared_tree, TEST__DATASET="ImageNet"), "test").dataset) == 12


def test_config_reaches_the_transform(shared_tree):
    """AUG.ENABLE off leaves crop and flip; an empty jitter range means the default."""
    cfg = make_cfg(shared_tree, AUG__ENABLE=False, DATA__TRAIN_JITTER_SCALES_RELATIVE=[])
    names = [type(step).__name__ for step in build_module.build_transform(cfg, "train").transforms]
    assert names == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "MaybeToTensor", "Normalize"]
    cfg.AUG.ENABLE, cfg.DATA.RANDOM_FLIP = True, False
    steps = build_module.build_transform(cfg, "train").transforms
    assert [type(step).__name__ for step in steps] == [
        "RandomResizedCropAndInterpolation",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    assert steps[0].scale == (0.08, 1.0)


def test_loader_settings(shared_tree, monkeypatch):
    """No more workers than cores; repeated augmentation belongs to AUG.ENABLE; no pinned memory without a GPU."""
    monkeypatch.setattr(build_module, "_num_cores", lambda: 2)
    loader = build_loader(make_cfg(shared_tree, DATA_LOADER__NUM_WORKERS=8, AUG__NUM_SAMPLE=3), "train")
    assert isinstance(loader, Loader)
    assert (loader.num_workers, loader.persistent_workers) == (2, True)
    assert loader.pin_memory == torch.cuda.is_available()
    assert loader.batch_sampler.num_repeats == 3
    cfg = make_cfg(shared_tree, AUG__NUM_SAMPLE=3, AUG__ENABLE=False)
    assert build_loader(cfg, "train").batch_sampler.num_repeats == 1


# --------------------------------------------------------------------------------------------------- the official files


def load_tool(name: str):
    path = Path(__file__).parents[2] / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, format="jpeg")
    return buffer.getvalue()


@pytest.fixture
def archives(tmp_path) -> Path:
    """The official archives in small: 2 classes and an inner node, 5 validation images, 3 training images per class."""
    from scipy.io import savemat

    folder = tmp_path / "archives"
    folder.mkdir()
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    rows = [
        (1, "n00000007", "cat, true cat", "", 0, 0, 0),
        (2, "n00000003", "dog", "", 0, 0, 0),
        (3, "n00000001", "animal", "", 2, 0, 1),
    ]
    synsets = np.array(rows, dtype=[(name, object) for name in fields])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"2\n1\n1\n2\n2\n")
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (3, 1, 2, 5, 4):
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", jpeg(number))
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as tar:
        for wnid in ("n00000003", "n00000007"):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as inner_tar:
                for number in range(3):
                    add(inner_tar, f"{wnid}_{number}.JPEG", jpeg(number))
            add(tar, f"{wnid}.tar", inner.getvalue())
    return folder


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_prepare_imagenet(archives, tmp_path, capsys):
    """Each image comes to its class, the tree can be read, and a second or interrupted run finishes the rest."""
    tool, output = load_tool("prepare_imagenet"), tmp_path / "imagenet"
    arguments = ["--archives", str(archives), "--output", str(output)]
    assert tool.main(arguments) == 0
    expected = [f"train/{wnid}/{wnid}_{number}.JPEG" for wnid in ("n00000003", "n00000007") for number in range(3)]
    for number, wnid in enumerate(("n00000003", "n00000007", "n00000007", "n00000003", "n00000003"), start=1):
        expected.append(f"val/{wnid}/ILSVRC2012_val_{number:08d}.JPEG")
        assert (output / expected[-1]).read_bytes() == jpeg(number)
    assert listing(output) == sorted(expected)
    assert len(build_loader(make_cfg(output, MODEL__NUM_CLASSES=2), "test").dataset) == 5

    capsys.readouterr()
    assert tool.main(arguments) == 0
    assert capsys.readouterr().out == f"{output}/val: up to date\n{output}/train: up to date\n"
    (output / expected[0]).unlink()
    (output / expected[-1]).write_bytes(b"half")
    assert tool.prepare_imagenet(archives, output) == {"val": 1, "train": 1}
    assert listing(output) == sorted(expected)
    assert (output / expected[-1]).read_bytes() == jpeg(5)


def test_prepare_imagenet_names_what_is_wrong(archives, tmp_path, capsys):
    """Missing, truncated, incomplete and foreign archives: one line, exit status 1, and no half image in the tree."""
    tool, output = load_tool("prepare_imagenet"), tmp_path / "imagenet"

    def error(*arguments) -> str:
        assert tool.main(["--archives", str(archives), "--output", str(output), *arguments]) == 1
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return err

    assert "holds neither ILSVRC2012_img_val.tar nor" in error("--archives", str(tmp_path / "none"))
    assert f"{tmp_path}/none/ILSVRC2012_devkit_t12.tar.gz does not exist" in error(
        "--archives", str(tmp_path / "none"), "--split", "val"
    )
    val = archives / "ILSVRC2012_img_val.tar"
    whole = val.read_bytes()
    for size in (1200, 2100, 3072):  # cut in the second header, in the second image, at the end of it
        val.write_bytes(whole[:size])
        assert any(f"{val} is {what}" in error("--split", "val") for what in ("damaged", "incomplete"))
        assert all((output / name).read_bytes() in map(jpeg, range(6)) for name in listing(output))
    val.write_bytes(b"<html>Please log in</html>" * 99)
    assert f"{val} is damaged or is not the official archive" in error("--split", "val")
    with tarfile.open(val, "w") as tar:
        add(tar, "../../evil.JPEG", b"")
    assert "'../../evil.JPEG', none of the 5 validation images" in error("--split", "val")
    assert not (tmp_path / "evil.JPEG").exists()
    with tarfile.open(archives / "ILSVRC2012_img_train.tar", "w") as tar:
        add(tar, "n00000009.tar", b"")
    assert "'n00000009.tar', which is not the archive of a class" in error("--split", "train")
