"""Read and write weights files safely.

* Files are read with `weights_only=True` or as safetensors. A pickle that would run code is refused unrun.
* A damaged file is an error that names it. Checksums are verified on every read: those of a .pth file, which is a zip
  archive since PyTorch 1.6, and the one that `save_safetensors` adds to the metadata.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ats.checkpoint.safe_types import SAFE_TYPES
from ats.config import SHIPPED, find_shipped
from ats.errors import UserError, suggest
from ats.files import atomic_write, write

logger = logging.getLogger(__name__)

SUFFIXES = (".pth", ".pyth", ".pt", ".bin", ".safetensors")
CHECKSUM = "sha256"  # in the metadata of our safetensors: hash of all keys, dtypes, shapes and values
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began a file before PyTorch 1.6
UNPACK = "unpack it, and give a file in it"
KINDS = {  # first bytes of other file types -> what they are
    b"version https://git-lfs": "a Git LFS pointer, not the file it stands for: type git lfs pull in its folder",
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"\xfd7zXZ": "compressed with xz: unpack it",
    b"BZh": "compressed with bzip2: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it",
    b"7z\xbc\xaf": f"a 7z archive: {UNPACK}",
    b"Rar!": f"a RAR archive: {UNPACK}",
    b"\x89HDF": "an HDF5 file, as Keras writes them: convert it to a PyTorch state dict",
    b"\x93NUMPY": "a NumPy array: convert it to a PyTorch state dict",
    b"GGUF": "a GGUF file: convert it to a PyTorch state dict",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"%PDF": "a PDF document",
}
NAMES = {  # the same by name, for formats without fixed first bytes
    r"\.(index|meta|data-\d+-of-\d+)": "part of a TensorFlow checkpoint: convert it to a PyTorch state dict",
    r"\.(pb|tflite)": "a TensorFlow model: convert it to a PyTorch state dict",
    r"\.(msgpack|flax)": "a Flax file: convert it to a PyTorch state dict",
    r"\.onnx": "an ONNX model; its weights are in the PyTorch file that it was exported from",
}


class _WrongChecksum(Exception):
    """A file is damaged although it could be read."""


def load_checkpoint(path: str | Path) -> dict:
    """The contents of a .pth, .pyth or .safetensors file, on the CPU. Finds shipped files from any folder.

    Raises a UserError if the file is missing, damaged or not a checkpoint, or is a pickle that would run code.
    """
    path = find_shipped(path)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
        raise UserError(f"{path} is a folder: type the file in it, {path / (files[0] if files else 'FILE')}.")
    if not path.is_file():
        how = f" Training writes it: run the dense network's config with TRAIN.ENABLE True OUTPUT_DIR {path.parent}."
        trained = how if path.name == "model.safetensors" else ""
        raise UserError(f"No checkpoint file {path}.{_nearby(path) or trained}")
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        try:
            contents = _read(file, path)
        except Exception as error:  # damage can raise anything
            raise UserError(f"{path} {_reason(error, file)}") from error
    if isinstance(contents, (list, tuple)) and len(contents) == 1:
        contents = contents[0]
    if not isinstance(contents, dict):
        many = f" of {len(contents)}" if isinstance(contents, (list, tuple)) else ""
        raise UserError(f"{path} holds a {type(contents).__name__}{many}, not a dictionary of weights.")
    return contents


def _nearby(path: Path) -> str:
    """Suggests the weights file, in the same folder or among the shipped ones, that `path` may mean."""
    inside = path.parent.relative_to("configs") if path.parts[:1] == ("configs",) else path.parent
    for folder in (path.parent, SHIPPED / inside):
        if folder.is_dir():
            return suggest(path.name, sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES))
    return ""


def save_checkpoint(path: str | Path, contents: dict) -> None:
    """Write tensors and plain values atomically: `path` is either the old file or the whole new one."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(contents, file)


def save_safetensors(
    path: str | Path, state_dict: dict[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write weights atomically as safetensors with a checksum; `metadata`: more entries for the header."""
    # Copies, because safetensors refuses tensors that share memory, such as tied weights.
    tensors = {
        key: torch.clone(tensor.detach().cpu(), memory_format=torch.contiguous_format)
        for key, tensor in state_dict.items()
    }
    contents = safetensors.torch.save(tensors, {**(metadata or {}), CHECKSUM: _checksum(tensors)})
    # The library writes metadata in arbitrary order; sort it, so that the same training gives the same bytes.
    end = 8 + int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    write(path, len(text).to_bytes(8, "little") + text + contents[end:])


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; {} for other files."""
    try:
        with safe_open(find_shipped(path), "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _read(file: BufferedReader, path: Path) -> object:
    head = file.read(9)
    file.seek(0)
    is_zip = head.startswith(b"PK")
    # Length of the header, then the header as JSON. The file name does not matter.
    is_safetensors = head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    if is_safetensors or (path.suffix == ".safetensors" and not is_zip):
        return _read_safetensors(path)
    if is_zip:
        _verify_zip(file)
    else:
        _compare_with_name(file, path)
    file.seek(0)
    with torch.serialization.safe_globals(SAFE_TYPES), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles that are about to be refused
        return torch.load(file, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dictionary
        expected = (file.metadata() or {}).get(CHECKSUM)
    if expected and expected != _checksum(tensors):
        raise _WrongChecksum("its checksum is wrong")
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _verify_zip(file: BufferedReader) -> None:
    """Verify the checksums of a zip archive, which torch.load ignores."""
    try:
        with zipfile.ZipFile(file) as archive:
            files = archive.infolist()
            has_checksums = any(info.CRC for info in files)  # torch.save can leave them out
            is_right = not has_checksums or archive.testzip() is None
    except Exception as error:  # a damaged directory can raise anything
        raise zipfile.BadZipFile(f"its zip archive is damaged or cut short ({error})") from error
    # PyTorch skips reading a file marked as a folder (0x10) and leaves its tensor uninitialised.
    if not is_right or any(info.external_attr & 0x10 and info.file_size for info in files):
        raise _WrongChecksum("its checksums are wrong")


def _compare_with_name(file: BufferedReader, path: Path) -> None:
    """Compare the SHA-256 in a release's file name; PyTorch before 1.6 wrote no checksums."""
    digits = re.search(r"-([0-9a-f]{8,64})\.pth$", path.name)
    if digits and not digits[1].isdigit() and not hashlib.file_digest(file, "sha256").hexdigest().startswith(digits[1]):
        logger.warning("%s is damaged or was changed: its SHA-256 is not the one in its name.", path)


def _reason(error: Exception, file: BufferedReader) -> str:
    """Why a file could not be read, worded to follow its path: what it is, what it would run, or how it is damaged."""
    if isinstance(error, _WrongChecksum):
        return f"is damaged: {error}"
    if not isinstance(error, zipfile.BadZipFile) and (kind := _kind(file)):
        return f"is not a checkpoint or is damaged: it is {kind}"
    if isinstance(error, pickle.UnpicklingError) and (match := re.search(r"GLOBAL ([\w.]+)", str(error))):
        reason = f"loading it would run code ({match[1]}). None of it was run."
        advice = "Ask for a file that holds only tensors and plain values (a state_dict, or .safetensors)."
        return f"was refused: {reason} {advice}"
    file.seek(0)
    head, text = file.read(len(LEGACY)), ""
    if head.startswith(b"\x80") and head != LEGACY:
        text = "it is a pickle that torch.save did not write, and reading it could run code"
    elif isinstance(error, (RuntimeError, OSError, SafetensorError, zipfile.BadZipFile)):  # others tell nothing
        text = str(error).split("\n")[0]
    return f"is not a checkpoint or is damaged{f': {text}' if text else ''}"


def _kind(file: BufferedReader) -> str:
    """What kind of file a non-checkpoint is, by its bytes and name; "" if unknown."""
    file.seek(0)
    head = file.read(512)
    if not any(head):
        return "full of zeros: copy or download it again" if head else "empty"
    for start, kind in KINDS.items():
        if head.startswith(start):
            return kind
    if head.startswith(b"PK"):
        names = zipfile.ZipFile(file).namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return "a TorchScript program: save the state_dict() of its module"
        if not any(name.endswith("/data.pkl") for name in names):
            return f"a zip archive of other files ({', '.join(names[:3])}{', ...' if names[3:] else ''})"
    if head[257:262] == b"ustar":
        return f"a tar archive: {UNPACK}"
    words = head.decode("utf-8-sig", "ignore").split()
    text = " ".join(words)
    if words and len(head) - len(head.decode(errors="ignore").encode()) < 4 and text.isprintable():
        if text.startswith("<"):
            return "a web page or XML, perhaps instead of a file that a server refused: download it again"
        return f'a text file, which begins "{text[:60]}"'
    return next((kind for name, kind in NAMES.items() if re.search(f"{name}$", str(file.name))), "")
