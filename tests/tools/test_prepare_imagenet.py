"""tools/prepare_imagenet.py: from the official archives to class folders."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_folders import add, jpeg, make_archives, make_cfg
from scipy.io import savemat

from ats.cli import prepare_imagenet
from ats.datasets import build_loader


@pytest.fixture
def archives(tmp_path) -> Path:
    return make_archives(tmp_path / "archives")


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_prepare_imagenet(archives, tmp_path, capsys):
    """Each image lands in its class folder, the tree is readable, and a second run finishes an interrupted one."""
    output = tmp_path / "imagenet"
    arguments = ["--archives", str(archives), "--output", str(output)]
    assert prepare_imagenet.main(arguments) == 0
    expected = [f"train/{wnid}/{wnid}_{number}.JPEG" for wnid in ("n00000003", "n00000007") for number in range(3)]
    for number, wnid in enumerate(("n00000003", "n00000007", "n00000007", "n00000003", "n00000003"), start=1):
        expected.append(f"val/{wnid}/ILSVRC2012_val_{number:08d}.JPEG")
        assert (output / expected[-1]).read_bytes() == jpeg(number)
    assert listing(output) == sorted(expected)
    assert len(build_loader(make_cfg(output, MODEL__NUM_CLASSES=2), "test").dataset) == 5

    capsys.readouterr()
    assert prepare_imagenet.main(arguments) == 0
    assert capsys.readouterr().out == f"{output}/val: up to date\n{output}/train: up to date\n"
    (output / expected[0]).unlink()
    (output / expected[-1]).write_bytes(b"half")
    assert prepare_imagenet.prepare_imagenet(archives, output) == {"val": 1, "train": 1}
    assert listing(output) == sorted(expected)
    assert (output / expected[-1]).read_bytes() == jpeg(5)


def test_prepare_imagenet_names_what_is_wrong(archives, tmp_path, capsys):
    """Missing, truncated, incomplete and wrong archives: one line, exit status 1, and no partial image in the tree."""
    output = tmp_path / "imagenet"

    def error(*arguments) -> str:
        assert prepare_imagenet.main(["--archives", str(archives), "--output", str(output), *arguments]) == 1
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


DEVKIT, VAL, TRAIN = (f"ILSVRC2012_{name}" for name in ("devkit_t12.tar.gz", "img_val.tar", "img_train.tar"))


def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            tar.addfile(member) if isinstance(member, tarfile.TarInfo) else add(tar, *member)
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def val_images(*numbers: int) -> list[tuple[str, bytes]]:
    return [(f"ILSVRC2012_val_{number:08d}.JPEG", jpeg(number)) for number in numbers]


def class_tar(wnid: str, *numbers: int) -> tuple[str, bytes]:
    return f"{wnid}.tar", tar_of(*((f"{wnid}_{number}.JPEG", jpeg(number)) for number in numbers))


def devkit(rows: object = None, truth: bytes = b"2\n1\n1\n2\n2\n", meta: bytes | None = None) -> bytes:
    """`rows`: (id, wnid, number of children, number of training images) of each class."""
    rows = [(1, "n00000007", 0, 3), (2, "n00000003", 0, 3), (3, "n00000001", 2, 0)] if rows is None else rows
    if meta is None:
        fields = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "num_children", "num_train_images")]
        buffer = io.BytesIO()
        savemat(buffer, {"synsets": np.array(rows, dtype=fields) if isinstance(rows, list) else rows})
        meta = buffer.getvalue()
    folder = "ILSVRC2012_devkit_t12/data"
    return gzip.compress(
        tar_of((f"{folder}/meta.mat", meta), (f"{folder}/ILSVRC2012_validation_ground_truth.txt", truth))
    )


def garbled(content: bytes, start: int) -> bytes:
    return content[:start] + b"\xff" * 64 + content[start + 64 :]


CLASSES = class_tar("n00000003", 0, 1, 2), class_tar("n00000007", 0, 1, 2)
BAD = {
    "id that climbs": (DEVKIT, devkit([(1, "../../../x", 0, 3), (2, "n00000003", 0, 3)]), "the class '../../../x'"),
    "absolute id": (DEVKIT, devkit([(1, "/absolute/x", 0, 3), (2, "n00000003", 0, 3)]), "the class '/absolute/x'"),
    "empty id": (DEVKIT, devkit([(1, "", 0, 3), (2, "n00000003", 0, 3)]), "the class '"),
    "id with a new line": (DEVKIT, devkit([(1, "n00000007\n", 0, 3), (2, "n00000003", 0, 3)]), "the class 'n00000007"),
    "one id twice": (DEVKIT, devkit([(1, "n00000003", 0, 3), (2, "n00000003", 0, 3)]), "one of them twice"),
    "no classes": (DEVKIT, devkit([(1, "n00000003", 2, 3), (2, "n00000007", 2, 3)]), "no classes"),
    "other meta.mat": (DEVKIT, devkit(np.zeros(3)), "is damaged or is not the official archive"),
    "empty meta.mat": (DEVKIT, devkit(meta=b""), "is damaged"),
    "meta.mat of text": (DEVKIT, devkit(meta=b"<html>" * 99), "is damaged"),
    "hdf5 meta.mat": (DEVKIT, devkit(meta=b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(400)), "is damaged"),
    "cut meta.mat": (DEVKIT, devkit(meta=gzip.decompress(devkit())[512:900]), "is damaged"),
    "label of no class": (DEVKIT, devkit(truth=b"2\n1\n1\n2\n9\n"), "the label '9', which is no class"),
    "label of an inner node": (DEVKIT, devkit(truth=b"2\n1\n1\n2\n3\n"), "the label '3', which is no class"),
    "labels of text": (DEVKIT, devkit(truth=b"cat\ndog\n"), "the label 'cat'"),
    "labels of bytes": (DEVKIT, devkit(truth=b"\xff\xfe1"), "is damaged"),
    "too few labels": (DEVKIT, devkit(truth=b"2\n1\n1\n2\n"), "none of the 4 validation images that ILSVRC2012_devkit"),
    "too many labels": (DEVKIT, devkit(truth=b"2\n1\n1\n2\n2\n1\n"), "5 of the 6 images that ILSVRC2012_devkit"),
    "no labels": (DEVKIT, devkit(truth=b""), "none of the 0 validation images"),
    "devkit without files": (DEVKIT, gzip.compress(tar_of()), "is damaged"),
    "devkit cut": (DEVKIT, devkit()[:-200], "is damaged"),
    "devkit garbled": (DEVKIT, garbled(devkit(), 60), "is damaged"),
    "devkit uncompressed length": (DEVKIT, devkit()[:-8] + b"\0" * 8, "is damaged"),
    "empty": (VAL, b"", "is damaged"),
    "no images": (VAL, tar_of(), "is incomplete: 0 of the 5"),
    "one twice, one missing": (VAL, tar_of(*val_images(1, 2, 3, 4, 4)), "twice"),
    "one twice in another folder": (
        VAL,
        tar_of(*val_images(1, 2, 3, 4, 5), ("a/" + val_images(5)[0][0], b"")),
        "twice",
    ),
    "missing": (VAL, tar_of(*val_images(1, 2, 3, 4)), "is incomplete: 4 of the 5"),
    "symbolic link": (VAL, tar_of(link("ILSVRC2012_val_00000001.JPEG", "/etc/passwd")), "is not a file"),
    "hard link": (VAL, tar_of(link("ILSVRC2012_val_00000001.JPEG", "../x", tarfile.LNKTYPE)), "is not a file"),
    "fifo": (VAL, tar_of(link("ILSVRC2012_val_00000001.JPEG", "", tarfile.FIFOTYPE)), "is not a file"),
    "absolute path": (VAL, tar_of(("/absolute/evil.JPEG", b"")), "none of the 5 validation images"),
    "other digits": (VAL, tar_of(("ILSVRC2012_val_0000000\u0661.JPEG", b"")), "none of the 5 validation images"),
    "header in the middle": (VAL, garbled(tar_of(*val_images(1, 2, 3, 4, 5)), 3 * 512 + 100), "is cut off or damaged"),
    "size": (VAL, garbled(tar_of(*val_images(1, 2, 3, 4, 5)), 124), "is damaged"),
    "no end": (VAL, tar_of(*val_images(1, 2, 3, 4, 5))[: 5 * 1536], "is cut off or damaged"),
    "class twice": (TRAIN, tar_of(CLASSES[0], CLASSES[0]), "twice"),
    "class missing": (TRAIN, tar_of(CLASSES[0]), "1 of 2 classes"),
    "folder for a class": (TRAIN, tar_of(link("n00000003.tar", "", tarfile.DIRTYPE), CLASSES[1]), "1 of 2 classes"),
    "link for a class": (TRAIN, tar_of(link("n00000003.tar", "x"), CLASSES[1]), "is not a file"),
    "class of text": (TRAIN, tar_of(("n00000003.tar", b"<html>" * 200), CLASSES[1]), "is damaged"),
    "class without content": (TRAIN, tar_of(("n00000003.tar", b""), CLASSES[1]), "is damaged"),
    "class without images": (
        TRAIN,
        tar_of(class_tar("n00000003"), CLASSES[1]),
        "n00000003.tar in it has 0 of 3 images",
    ),
    "image missing": (TRAIN, tar_of(class_tar("n00000003", 0, 2), CLASSES[1]), "n00000003.tar in it has 2 of 3 images"),
    "image twice": (TRAIN, tar_of(class_tar("n00000003", 0, 1, 1), CLASSES[1]), "twice"),
    "image cut": (TRAIN, tar_of((CLASSES[0][0], CLASSES[0][1][:2000]), CLASSES[1]), "is damaged"),
    "class cut": (TRAIN, tar_of((CLASSES[0][0], CLASSES[0][1][:3072]), CLASSES[1]), "is cut off or damaged"),
    "link in a class": (
        TRAIN,
        tar_of(("n00000003.tar", tar_of(link("n00000003_0.JPEG", "/etc/passwd"))), CLASSES[1]),
        "is not a file",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_every_bad_archive_is_named(kind, archives, tmp_path, capsys):
    """One line with its path, exit status 1, and nothing written outside the output folder."""
    name, content, text = BAD[kind]
    (archives / DEVKIT).write_bytes(devkit())
    (archives / name).write_bytes(content)
    before = listing(tmp_path)
    output = tmp_path / "deep" / "down" / "imagenet"
    assert prepare_imagenet.main(["--archives", str(archives), "--output", str(output)]) == 1
    err = capsys.readouterr().err.rpartition("error: ")[2]
    assert text in err
    assert name in err
    assert len(err.splitlines()) == 1
    written = set(listing(tmp_path)) - set(before)
    assert all(path.startswith(("deep/down/imagenet/train/n0000", "deep/down/imagenet/val/n0000")) for path in written)


def test_hidden_files_in_archives_are_left_out(archives, tmp_path):
    """macOS adds "._" files when it packs an archive again."""
    (archives / DEVKIT).write_bytes(devkit())
    images = [(f"x/{name}", content) for name, content in val_images(1, 2, 3, 4, 5)]
    (archives / VAL).write_bytes(tar_of(link("x", "", tarfile.DIRTYPE), ("x/._a.JPEG", b"x"), *images))
    (archives / TRAIN).write_bytes(tar_of(("._n00000003.tar", b"x"), *CLASSES))
    assert prepare_imagenet.prepare_imagenet(archives, tmp_path / "imagenet") == {"val": 5, "train": 6}
