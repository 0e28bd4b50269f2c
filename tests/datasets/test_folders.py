"""ats.datasets.folders: hidden names, links, loops, and files that are none, in every command that lists a folder."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import decoding
import pytest
from image_folders import make_cfg, make_tree

from ats.cli import prepare_kinetics
from ats.datasets import ImageNet, build_dataset
from ats.datasets.class_names import class_names
from ats.datasets.decode import Video
from ats.datasets.folders import class_folders, files_below
from ats.datasets.imagenet import read_image
from ats.datasets.transforms import eval_transform
from ats.errors import UserError
from ats.visualize.inputs import list_files


@pytest.fixture
def tree(tmp_path) -> Path:
    return make_tree(tmp_path / "data")


@pytest.fixture
def val(tree) -> Path:
    return tree / "val"


def images(val: Path) -> list[str]:
    """`class/name` of every image of the data set."""
    dataset = ImageNet(val.parent, split="val", transform=eval_transform(32))
    names = [os.path.relpath(dataset.path(index), val) for index in range(len(dataset))]
    assert [name.split("/")[0] for name in names] == [dataset.classes[label] for label in dataset.labels]
    return names


def hide(folder: Path, name: str) -> None:
    """Put what Jupyter, macOS and editors leave behind into `folder`: copies of the file `name`, and links."""
    content = (folder / name).read_bytes()
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / name).write_bytes(content)
    (folder / f"._{name}").write_bytes(content)
    (folder / ".DS_Store").write_bytes(b"")
    (folder / f".#{name}").symlink_to("me@host.123")


def test_hidden_names_are_left_out_of_a_data_set(tree, caplog):
    """Neither classes nor images; the warning counts them."""
    before = images(tree / "val")
    for split in ("train", "val"):
        hide(tree / split / "n00000001", "0.png")
        (tree / split / ".ipynb_checkpoints").mkdir()
        (tree / split / ".ipynb_checkpoints" / "0.png").write_bytes((tree / split / "n00000001" / "0.png").read_bytes())
    assert images(tree / "val") == before
    assert build_dataset(make_cfg(tree), "val").classes == ["n00000000", "n00000001", "n00000002"]
    assert f"{tree}/val: 12 images; left out 5 hidden." in caplog.text
    cfg = make_cfg(tree)
    assert class_names(cfg) == class_folders(tree / "val")


def test_hidden_names_are_left_out_of_pictures_and_lists_of_videos(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b", ".ipynb_checkpoints"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "x.mp4").touch()
        hide(tmp_path / split / "a", "x.mp4")
    want = ["train/a/x.mp4", "train/b/x.mp4", "val/a/x.mp4", "val/b/x.mp4"]
    assert list(list_files([tmp_path], clips=True)) == [tmp_path / name for name in want]
    assert decoding.find_videos(str(tmp_path), make_cfg(tmp_path)) == [str(tmp_path / name) for name in want]
    items = prepare_kinetics.find_videos(tmp_path)
    assert [(item.name, item.label) for item in items] == list(zip(want, (0, 1, 0, 1), strict=True))


LINKS = {
    "to the same folder": ("n00000000/loop", "."),
    "to the split": ("n00000000/loop", ".."),
    "to all": ("n00000000/loop", "../../.."),
    "to everything": ("n00000000/loop", "/"),
    "to another class": ("n00000000/more", "../n00000001"),
    "to a class, from a folder": ("n00000000/sub/more", "../../n00000002"),
    "to itself": ("n00000000/loop", "loop"),
    "to itself, called an image": ("n00000000/loop.png", "loop.png"),
    "to an image of the class": ("n00000000/again.png", "0.png"),
    "to an image of another class": ("n00000000/again.png", "../n00000001/0.png"),
    "beside the classes": ("loop", "."),
    "beside the classes, upwards": ("loop", ".."),
    "beside the classes, to itself": ("loop", "loop"),
}


@pytest.mark.parametrize("kind", LINKS)
def test_links_add_no_image_twice(kind, val, caplog):
    """Loops end, a file keeps the label of its own folder, and the warning counts the link."""
    before, (name, target) = images(val), LINKS[kind]
    (val / name).parent.mkdir(exist_ok=True)
    (val / name).symlink_to(target)
    assert images(val) == before
    assert f"{val}: 12 images; left out 1 linked twice or in a loop." in caplog.text


def test_links_out_of_the_data_set_are_followed_once(val, tmp_path):
    """Linked classes, folders and images are read; loops and second ways to what they lead to are not."""
    store = tmp_path / "store"
    for name in ("cat/a.png", "cat/deep/b.png", ".annex/c.png", "lone.png"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes((val / "n00000000" / "0.png").read_bytes())
    (store / "cat" / "deep" / "up").symlink_to("..")
    (store / "cat" / "deep" / "home").symlink_to(val)
    before = images(val)
    (val / "cat").symlink_to(store / "cat")
    (val / "n00000000" / "c.png").symlink_to(store / ".annex" / "c.png")
    (val / "n00000000" / "deep").symlink_to(store / "cat" / "deep")  # the class cat has it
    (val / "n00000001" / "store").symlink_to(store)  # all but lone.png is listed
    (val / "n00000002" / "lone.png").symlink_to(store / "lone.png")
    new = ["cat/a.png", "cat/deep/b.png", "n00000000/c.png", "n00000001/store/lone.png"]
    assert images(val) == sorted([*before, *new], key=lambda path: (path.split("/")[0], *os.path.split(path)))
    assert class_folders(val) == ["cat", "n00000000", "n00000001", "n00000002"]


def test_pictures_of_linked_folders(val, tmp_path):
    """visualize enters them, once."""
    folder = tmp_path / "look"
    (folder / "sub").mkdir(parents=True)
    (folder / "linked").symlink_to(val / "n00000000")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "sub" / "again").symlink_to(val / "n00000000")
    assert list(list_files([folder], clips=False)) == [folder / "linked" / f"{i}.png" for i in range(4)]


def test_two_linked_loops_end(val):
    for name, target in (("n00000000/a", "../n00000001"), ("n00000001/b", "../n00000000")):
        (val / name).symlink_to(target)
    assert len(images(val)) == 12


def test_a_link_that_leads_nowhere_is_a_missing_file(val):
    """It is not left out, which would change the metric, and where it may be a class, nothing is read."""
    (val / "n00000000" / "gone.png").symlink_to("/nowhere/gone.png")
    assert "n00000000/gone.png" in images(val)
    with pytest.raises(UserError, match=r"n00000000/gone\.png: No such file"):
        read_image(str(val / "n00000000" / "gone.png"))
    (val / "n00000001x").symlink_to("/nowhere/class")
    with pytest.raises(UserError, match=r"The link .*/val/n00000001x leads nowhere .*Restore"):
        images(val)


def test_what_is_no_regular_file_is_not_opened(val, monkeypatch, caplog):
    """A FIFO would wait for ever, a device never end. They are left out and counted, and refused when named."""
    before = images(val)
    monkeypatch.chdir(val / "n00000000")
    os.mkfifo("fifo.png")
    Path("zero.png").symlink_to("/dev/zero")
    Path("linked.png").symlink_to("fifo.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    assert images(val) == before
    assert f"{val}: 12 images; left out 4 neither file nor folder." in caplog.text
    for name in ("fifo.png", "zero.png", "linked.png", "socket.png"):
        with pytest.raises(UserError, match=rf"{name}: it is not a regular file"):
            read_image(str(val / "n00000000" / name))
    os.mkdir("folder.png")
    assert images(val) == before
    with pytest.raises(UserError, match="it is not a regular file"):
        read_image("folder.png")


def test_a_folder_that_cannot_be_read_is_named(val, monkeypatch):
    """Leaving it out would change the metric."""
    (val / "n00000001" / "secret").mkdir()
    scandir = os.scandir

    def refuse(folder):
        if os.path.basename(folder) == "secret":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"Cannot read the folder .*/val/n00000001/secret: Permission denied\."):
        images(val)
    with pytest.raises(UserError, match="n00000001/secret: Permission denied"):
        list_files([val], clips=False)


def test_images_beside_the_class_folders_are_counted(val, caplog):
    (val / "lone.png").write_bytes((val / "n00000000" / "0.png").read_bytes())
    assert len(images(val)) == 12
    assert f"{val}: 1 image is not in a class folder, and so left out." in caplog.text


def test_the_order_is_that_of_torchvision(val):
    """So that the same seed goes on drawing the same batches."""
    from torchvision.datasets import ImageFolder

    for name in ("n00000000/sub/a.png", "n00000000/sub-b/a.png", "n00000000-x/a.png", "n00000000/sub/deep/B.PNG"):
        (val / name).parent.mkdir(parents=True, exist_ok=True)
        (val / name).write_bytes((val / "n00000001" / "0.png").read_bytes())
    theirs = ImageFolder(val)
    assert images(val) == [os.path.relpath(path, val) for path, _ in theirs.samples]
    assert files_below(val, (".png",), noun="image") == images(val)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["0", "1", "2", "10", "11"], "0 has label 0, 1 has label 1, 10 has label 2, 11 has label 3, 2 has label 4."),
        ([str(i) for i in range(1, 12)], "1 has label 0, 10 has label 1, 11 has label 2, 2 has label 3"),
        (["-1", "-2", "3"], "-1 has label 0, -2 has label 1, 3 has label 2"),
        (["00", "01", "10"], ""),
        (["0", "1", "9"], ""),
        (["2", "10", "cat"], ""),
    ],
)
def test_numbered_classes(names, shown, tmp_path, caplog):
    """One warning for both splits if labels in numeric order would be others."""
    for split in ("train", "val"):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "a.png").touch()
    cfg = make_cfg(tmp_path, MODEL__NUM_CLASSES=len(names))
    for split in ("train", "val", "test"):
        assert build_dataset(cfg, split).classes == sorted(names)
    assert caplog.text.count("are named by numbers") == bool(shown)
    assert shown in caplog.text
    for name in names:
        (tmp_path / "videos" / "val" / name).mkdir(parents=True)
        (tmp_path / "videos" / "val" / name / "a.mp4").touch()
    assert [item.label for item in prepare_kinetics.find_videos(tmp_path / "videos")] == list(range(len(names)))
    assert caplog.text.count("are named by numbers") == 2 * bool(shown)


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"])
def test_folders_of_operating_systems_are_hidden(name, tree, caplog):
    """Zip files made on a Mac have __MACOSX; network drives keep thumbnails of the images, as images, in @eaDir."""
    before, content = images(tree / "val"), (tree / "val" / "n00000001" / "0.png").read_bytes()
    for thumbnails in (tree / "val" / name, tree / "val" / "n00000001" / name / "0.png"):
        thumbnails.mkdir(parents=True)
        (thumbnails / "THUMB.png").write_bytes(content)
    assert images(tree / "val") == before
    assert "12 images; left out 2 hidden." in caplog.text
    assert name not in class_folders(tree / "val")


def test_a_warning_names_few_kinds_of_files(val, caplog):
    """Slices are often named scan.001, scan.002, ...: thousands of extensions."""
    for i in range(1000):
        (val / "n00000000" / f"scan.{i:03}").touch()
    images(val)
    assert ", and 995 others of 995 kinds: only .jpg" in caplog.text
    assert len(caplog.text) < 400


def test_names_that_look_the_same(tree, tmp_path):
    """A Mac writes an accent as a character of its own: the error about another class says so, whatever reads it."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (tree / "train" / "n00000000").rename(tree / "train" / composed)
    (tree / "val" / "n00000000").rename(tree / "val" / decomposed)
    advice = r"has the same name in other Unicode characters .* convmv -r -f utf8 -t utf8 --nfc --notest "
    with pytest.raises(UserError, match=rf"no folder for: {composed}\..*{advice}"):
        build_dataset(make_cfg(tree), "val")
    for split, name in (("train", composed), ("val", decomposed)):
        (tmp_path / "videos" / split / name).mkdir(parents=True)
        (tmp_path / "videos" / split / name / "a.mp4").touch()
    with pytest.raises(UserError, match=advice):
        prepare_kinetics.find_videos(tmp_path / "videos")
    with pytest.raises(UserError, match=r"there is no such file, but one with this name in other Unicode characters"):
        Video(tmp_path / "videos" / "val" / composed / "a.mp4")
    with pytest.raises(UserError, match=r"there is no such file\."):
        Video(tmp_path / "videos" / "val" / composed / "b.mp4")


def test_all_commands_know_the_same_videos(tmp_path):
    """Also those of camcorders and phones."""
    for extension in (".mp4", ".wmv", ".3gp", ".flv", ".MTS", ".ogv"):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "a" / f"x{extension}").touch()
    listed = {Path(item.name).name for item in prepare_kinetics.find_videos(tmp_path)}
    assert listed == {file.name for file in list_files([tmp_path], clips=True)}
    assert len(listed) == 6
