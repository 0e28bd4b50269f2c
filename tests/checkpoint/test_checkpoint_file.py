"""Damaged files of weights are noticed, other files are called by what they are, harmless types are read."""

from __future__ import annotations

import argparse
import bz2
import collections
import datetime
import gzip
import io
import lzma
import pathlib
import pickle
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from yacs.config import CfgNode

from ats.checkpoint import load_checkpoint, save_checkpoint, save_safetensors
from ats.checkpoint.safe_types import _DType
from ats.errors import UserError

torch.manual_seed(0)
WEIGHTS = {"a.weight": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(3.0)}


def is_same(value: object, other: object) -> bool:
    if isinstance(value, dict):
        same_keys = isinstance(other, dict) and value.keys() == other.keys()
        return same_keys and all(is_same(value[key], other[key]) for key in value)
    if isinstance(value, torch.Tensor):
        return isinstance(other, torch.Tensor) and value.dtype == other.dtype and torch.equal(value, other)
    return value == other


@pytest.mark.parametrize("name", ["a.pyth", "a.safetensors"])
def test_damage_of_any_kind_is_named_or_harmless(name, tmp_path):
    """A bit of every other byte is flipped; the file is cut; parts of it are overwritten, lost or there twice."""
    path = tmp_path / name
    if name == "a.pyth":
        save_checkpoint(path, {"model_state": WEIGHTS, "epoch": 3})
    else:
        save_safetensors(path, WEIGHTS)
    good, want, rng = path.read_bytes(), load_checkpoint(path), random.Random(0)
    damaged = [
        good[:byte] + bytes([good[byte] ^ 1 << rng.randrange(8)]) + good[byte + 1 :] for byte in range(0, len(good), 2)
    ]
    damaged += [good[:length] for length in range(0, len(good), 29)]
    for _ in range(60):
        start, length = rng.randrange(len(good)), rng.randint(1, 300)
        damaged.append(good[:start] + rng.randbytes(length) + good[start + length :])
        damaged.append(good[:start] + good[start + length :])
        damaged.append(good[: start + length] + good[start:])
    messages = []
    for content in damaged:
        path.write_bytes(content)
        try:
            assert is_same(load_checkpoint(path), want)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 0.6 * len(damaged)
    assert all(message.startswith(str(path)) for message in messages)


def test_a_file_marked_as_a_folder_in_the_zip_archive_is_damaged(tmp_path):
    """PyTorch would leave its tensor as it finds the memory, without an error."""
    save_checkpoint(tmp_path / "a.pth", WEIGHTS)
    content = bytearray((tmp_path / "a.pth").read_bytes())
    for start in (start for start in range(len(content)) if content[start : start + 4] == b"PK\x01\x02"):
        content[start + 38] ^= 0x10
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(tmp_path / "a.pth")


def test_check_sums_that_were_left_out_or_are_of_another_program_do_not_matter(tmp_path):
    path = tmp_path / "a.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert is_same(load_checkpoint(path), WEIGHTS)
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "b.pth", "w") as other:  # with its folders
        folder = archive.namelist()[0].split("/")[0]
        other.mkdir(folder)
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    assert is_same(load_checkpoint(tmp_path / "b.pth"), WEIGHTS)


def test_old_files_are_compared_with_the_hash_in_their_name(tmp_path, caplog):
    path = tmp_path / "net-0123abcd.pth"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    assert is_same(load_checkpoint(path), WEIGHTS)
    assert f"{path} is damaged or was changed" in caplog.text


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"))
    return buffer.getvalue()


FOREIGN = {  # content -> what it is called
    b"": "it is empty",
    bytes(3000): "full of zeros",
    b"<html>404</html>": "a web page",
    b"\xef\xbb\xbf\n<!DOCTYPE html>": "a web page",
    b'<?xml version="1.0"?><Error/>': "a web page or XML",
    b'{"message": "Not Found"}': 'a text file, which begins "{"message": "Not Found"}"',
    "Zugriff verweigert: für Gäste".encode(): "a text file",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n": "a Git LFS pointer.* git lfs pull",
    gzip.compress(b"x"): "compressed with gzip: unpack it",
    bz2.compress(b"x"): "compressed with bzip2",
    lzma.compress(b"x"): "compressed with xz",
    zipped("a.npy", "b.npy"): r"a zip archive of other files \(a.npy, b.npy\)",
    zipped("x/data.pkl", "x/constants.pkl", "x/code/a.py"): "a TorchScript program",
    tarred(): "a tar archive",
    b"\x89HDF\r\n\x1a\n" + bytes(100): "an HDF5 file",
    b"\x93NUMPY\x01\x00": "a NumPy array",
}


@pytest.mark.parametrize(("content", "what"), FOREIGN.items(), ids=range(len(FOREIGN)))
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_files_of_other_kinds_are_called_by_what_they_are(content, what, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"(?s){tmp_path}/{name} is not a checkpoint or is damaged: .*{what}"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "content", [pickle.dumps({"a": 1}, protocol=2), pickle.dumps({"a": 1}, protocol=4), b"\x80"], ids=range(3)
)
def test_a_pickle_of_another_program_is_not_read(content, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"a pickle that torch\.save did not write, and reading it could run code"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001", "model.onnx", "flax.msgpack"])
def test_formats_without_a_mark_are_known_by_their_name(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x08\x07\x00\xff" * 20)
    with pytest.raises(UserError, match=r"it is (part of a TensorFlow checkpoint|an ONNX model|a Flax file)"):
        load_checkpoint(tmp_path / name)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pth", WEIGHTS)
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"a\.pth cannot be read: Permission denied"):
        load_checkpoint(tmp_path / "a.pth")


HARMLESS = {
    "top1": np.float64(79.8),
    "epoch": np.int64(3),
    "is_best": np.bool_(True),
    "name": np.str_("ViT"),
    "curve": np.arange(3.0),
    "big_endian": np.arange(3, dtype=">i4"),
    "grid": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "empty": np.zeros((0, 2), np.float16),
    "words": np.array(["a", "bcd"]),
    "rng": np.random.RandomState(0).get_state(),
    "args": argparse.Namespace(output_dir=pathlib.PosixPath("/x/y"), lr=1e-3, device=torch.device("cuda", 0)),
    "path": pathlib.PurePosixPath("a"),
    "windows": pathlib.PureWindowsPath("C:/x"),
    "stats": collections.defaultdict(int, a=1),
    "lists": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter("ab"),
    "ordered": collections.OrderedDict(a=1),
    "config": CfgNode({"A": {"B": 1}}),
    "when": datetime.datetime(2024, 1, 2, 3, tzinfo=datetime.UTC),
    "took": datetime.timedelta(seconds=3),
    "set": {1, 2},
    "frozen": frozenset({1}),
    "slice": slice(1, 2),
    "dtype": np.float32,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_types_are_read(name, tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"model": WEIGHTS, name: HARMLESS[name]})
    value = load_checkpoint(tmp_path / "a.pth")[name]
    np.testing.assert_equal(value, HARMLESS[name])


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.array([{}], dtype=object), "numpy.dtype.object"),
        (np.zeros(1, "i4,f4"), "numpy.dtype.void"),
        (np.random.default_rng(0), "numpy.random"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (collections.UserDict, "collections.UserDict"),
    ],
)
def test_other_types_are_refused_by_name(value, what, tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"model": WEIGHTS, "value": value})
    with pytest.raises(UserError, match=rf"was refused: loading it would run code \({what}"):
        load_checkpoint(tmp_path / "a.pth")


class Call:
    """A pickle that makes this call, on the result of another."""

    def __init__(self, *reduced: object) -> None:
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def dtype(code: str, *state: object) -> Call:
    return Call(np.dtype, (code, False, True), state)


F8 = dtype("f8", 3, "<", None, None, None, -1, -1, 0)
FAR_FIELD = dtype("V8", 3, "|", None, ("a",), {"a": (F8, 10**6)}, 8, 1, 16)


@pytest.mark.parametrize(
    "value",
    [
        Call(np.ndarray, ((1,), "O", b"AAAAAAAA")),  # numbers taken for addresses of objects
        Call(np._core.multiarray._reconstruct, (np.ndarray, (10**5,), "O")),
        Call(np._core.multiarray.scalar, (FAR_FIELD, b"x" * 8)),
        dtype("f8", 3, "<", None, None, None, -1, -1, 63),  # says that its values are objects
    ],
)
def test_numpy_gets_no_addresses_from_a_file(value, tmp_path):
    """NumPy's own constructors would crash on these, or read other memory."""
    save_checkpoint(tmp_path / "a.pth", {"model": WEIGHTS, "value": value})
    try:
        read = load_checkpoint(tmp_path / "a.pth")["value"]
    except UserError:
        return
    assert isinstance(read.dtype, np.dtype)
    assert not read.dtype.hasobject
    assert isinstance(read, _DType) or read.nbytes == 0


def test_a_list_of_one(tmp_path):
    for contents in ([WEIGHTS], (WEIGHTS,)):
        torch.save(contents, tmp_path / "a.pth")
        assert is_same(load_checkpoint(tmp_path / "a.pth"), WEIGHTS)
    torch.save([WEIGHTS, WEIGHTS], tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds a list of 2, not a dictionary of weights"):
        load_checkpoint(Path(tmp_path / "a.pth"))
