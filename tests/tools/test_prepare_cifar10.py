"""tools/prepare_cifar10.py: from a zip file, a folder or the official archive to class folders."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets.cifar
from image_folders import make_cfg
from PIL import Image

from ats.cli import prepare_cifar10
from ats.cli.prepare_cifar10 import CLASSES
from ats.datasets import build_loader


def image(value: int) -> Image.Image:
    return Image.fromarray(np.full((32, 32, 3), value, np.uint8))


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    image(value).save(file, "JPEG")
    return file.getvalue()


def files(split: str = "val") -> dict[str, bytes]:
    """Two images of every class in both splits."""
    return {
        f"{where}/{label}/{number:04d}.jpg": jpeg(10 * index + number)
        for where in ("train", split)
        for index, label in enumerate(CLASSES)
        for number in range(2)
    }


def zipped(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = prepare_cifar10.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_zip_file(tmp_path, capsys):
    """Its images as they are; what is there already is not written again; the loader reads the result."""
    extra = {"__MACOSX/train/cat/._0001.jpg": b"x", "train/cat/.DS_Store": b"x", "readme.txt": b"x"}
    source = zipped(tmp_path / "c.zip", files() | extra)
    output = tmp_path / "out"
    status, out, err = run(capsys, "--source", source, "--output", output)
    assert status == 0
    assert out == f"{output}: made\n"
    assert "warning: train has 20 images, CIFAR-10 50,000" in err
    found = {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*.jpg")}
    assert found == files()
    assert run(capsys, "--source", source, "--output", output)[1] == f"{output}: up to date\n"
    dataset = build_loader(make_cfg(output, MODEL__NUM_CLASSES=10), "test").dataset
    assert len(dataset) == 20
    assert [dataset.label(i) for i in range(0, 20, 2)] == list(range(10))


def test_a_folder_whose_split_is_called_test(tmp_path, capsys):
    source, output = tmp_path / "images", tmp_path / "out"
    for name, content in files("test").items():
        path = source / "cifar" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert run(capsys, "--source", source, "--output", output)[0] == 0
    assert (output / "val" / "truck" / "0001.jpg").read_bytes() == jpeg(91)


@pytest.mark.parametrize("unpacked", [True, False])
def test_the_official_archive(unpacked, tmp_path, capsys, monkeypatch):
    """Pixels to the bit, as PNG. Its check sums are torchvision's business."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 20, 3072), dtype=np.uint8)
    labels = [list(range(10)) * 2] * 6
    for name, data, label in zip(
        [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], pixels, labels, strict=True
    ):
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": label}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASSES)}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    if not unpacked:  # torchvision finds the archive and unpacks it
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
        monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", lambda *_, **__: None)
    output = tmp_path / "out"
    assert run(capsys, "--source", tmp_path if unpacked else folder, "--output", output)[0] == 0
    first = np.asarray(Image.open(output / "train" / "airplane" / "00000.png"))
    assert np.array_equal(first, pixels[0, 0].reshape(3, 32, 32).transpose(1, 2, 0))
    assert len(list((output / "train").rglob("*.png"))) == 100
    last = np.asarray(Image.open(output / "val" / "truck" / "00019.png"))
    assert np.array_equal(last, pixels[5, 19].reshape(3, 32, 32).transpose(1, 2, 0))


def test_what_is_not_cifar_10_is_said(tmp_path, capsys, monkeypatch):
    """One line, exit status 1, and nothing is left behind."""
    output = tmp_path / "out"

    def error(*arguments: object) -> str:
        status, _, err = run(capsys, "--output", output, *arguments)
        assert status == 1
        assert "Traceback" not in err
        assert not output.exists()
        return err

    assert "Say where CIFAR-10 is with --source" in error()
    assert f"There is no {tmp_path}/none" in error("--source", tmp_path / "none")
    text = tmp_path / "text.zip"
    text.write_text("no zip")
    assert "is not a zip file" in error("--source", text)
    foreign = zipped(tmp_path / "a.zip", files() | {"train/unicorn/1.jpg": jpeg(1)})
    assert "it has train/unicorn/1.jpg. It must hold train/<class>/*" in error("--source", foreign)
    broken = zipped(tmp_path / "b.zip", files() | {"train/cat/9.jpg": b"no image"})
    assert "train/cat/9.jpg in" in error("--source", broken)
    half = zipped(tmp_path / "c.zip", {name: own for name, own in files().items() if "truck" not in name})
    assert "There are no images for train/truck, val/truck" in error("--source", half)
    twice = zipped(tmp_path / "d.zip", files() | {"copy/train/cat/0001.jpg": jpeg(1)})
    assert "several copies of CIFAR-10" in error("--source", twice)
    huge = zipped(tmp_path / "e.zip", {"train/cat/1.jpg": bytes(2**20 + 1)})
    assert "has 1,048,577 bytes" in error("--source", huge)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    assert "cannot be downloaded (no network). Get cifar-10-python.tar.gz" in error("--download")
