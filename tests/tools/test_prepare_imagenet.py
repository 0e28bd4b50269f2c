"""tools/prepare_imagenet.py: from the official archives to class folders."""

from __future__ import annotations

import tarfile
from pathlib import Path

import prepare_imagenet
import pytest
from image_folders import add, jpeg, make_archives, make_cfg

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
