"""Untrusted files: nothing in them is run, they cannot exhaust memory or escape their folder, and nothing is
downloaded.
"""

from __future__ import annotations

import ast
import io
import os
import pickle
import socket
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
from clips import encode
from image_folders import add, jpeg, make_archives
from PIL import Image

from ats.checkpoint import load_checkpoint, save_safetensors
from ats.cli import make_digits, prepare_imagenet, prepare_kinetics
from ats.config import load_config
from ats.datasets import build_dataset
from ats.datasets.decode import Video
from ats.datasets.imagenet import read_image
from ats.datasets.kinetics import read_csv
from ats.engine.evaluate import evaluate_weights
from ats.engine.train import train
from ats.errors import UserError
from ats.models import build_model

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------------ pickles that run code


class Payload:
    """A pickle that creates a folder when it is read."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


HOW = {
    "zip": torch.save,
    "legacy": lambda contents, path: torch.save(contents, path, _use_new_zipfile_serialization=False),
    "pickle": lambda contents, path: path.write_bytes(pickle.dumps(contents)),
}


@pytest.fixture
def proof(tmp_path):
    """What a payload would create; it must not exist after the test."""
    path = tmp_path / "proof"
    yield path
    assert not path.exists()


@pytest.fixture
def evil(tmp_path, proof, tiny_config):
    """A function that writes a checkpoint with the config's weights and a payload."""

    def write(path: Path, how: str) -> Path:
        state = build_model(load_config(tiny_config)).state_dict()
        path.parent.mkdir(parents=True, exist_ok=True)
        HOW[how]({"model_state": state, "epoch": 0, "optimizer_state": Payload(proof)}, path)
        return path

    return write


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "here")))
    assert (tmp_path / "here").is_dir()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("key", ["TEST.CHECKPOINT_FILE_PATH", "TRAIN.CHECKPOINT_FILE_PATH"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_to_test_or_to_start_from(how, key, suffix, evil, tiny_config, tmp_path):
    path = evil(tmp_path / f"evil.{suffix}", how)
    run = train if key.startswith("TRAIN") else evaluate_weights
    with pytest.raises(UserError, match=rf"{path} (was refused: loading it would run code|is not a checkpoint)"):
        run(load_config(tiny_config, [key, str(path)]))


@pytest.mark.parametrize("how", HOW)
def test_resume(how, evil, tiny_config, caplog):
    """A checkpoint with a payload is named and skipped like any unreadable one, and the run starts over."""
    cfg = load_config(tiny_config, ["SOLVER.MAX_EPOCH", "1"])
    train(cfg)
    path, best = (Path(cfg.OUTPUT_DIR) / "checkpoints" / f"checkpoint_{name}.pyth" for name in ("epoch_00001", "best"))
    good = load_checkpoint(path)
    evil(path, how)
    evil(best, how)
    train(cfg)
    assert str(path) in caplog.text
    again = load_checkpoint(path)
    assert all(torch.equal(value, again["model_state"][key]) for key, value in good["model_state"].items())


def test_files_of_text(proof, tmp_path):
    """A pickle in place of a csv, YAML or JSON file is treated as bad text."""
    content = pickle.dumps(Payload(proof))
    (tmp_path / "test.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"test\.csv, line 1: "):
        read_csv(str(tmp_path / "test.csv"), separator=" ", num_classes=3)
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError, match="is not a YAML file"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "checked.json").write_bytes(content)
    assert prepare_kinetics._read_known(tmp_path / "checked.json") == {}
    (tmp_path / "digits.json").write_bytes(content)
    assert make_digits.make_digits(
        tmp_path, train_per_digit=1, val_per_digit=1, size=32, num_workers=0
    )  # not "up to date"


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"]
)
def test_yaml_and_overrides_make_no_objects(tag, proof, tmp_path):
    text = f"{tag} [{proof}]" if "name" not in tag else f"{tag} ''"
    for content in (f"OUTPUT_DIR: {text}", f"_BASE_: {text}", f"VIT: {text}"):
        (tmp_path / "a.yaml").write_text(content)
        with pytest.raises(UserError, match="is not a YAML file"):
            load_config(tmp_path / "a.yaml")
    output_dir = load_config(None, ["OUTPUT_DIR", text]).OUTPUT_DIR
    assert output_dir == text
    with pytest.raises(UserError, match=r"ATS\.BLOCKS must be list"):
        load_config(None, ["ATS.BLOCKS", f"[{text}]"])


FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "os.system", "torch.hub.load", "yaml.unsafe_load"}
FORBIDDEN |= {"yaml.full_load", "joblib.load", "torch.hub.load_state_dict_from_url", "torch.jit.load"}


def test_no_call_that_would_trust_a_file():
    """Every torch.load is weights_only, every yaml.load is safe, np.load allows no pickles, nothing downloads."""
    for path in [*ROOT.glob("ats/**/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, where = ast.unparse(node.func), f"{path}:{node.lineno}"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name not in FORBIDDEN, where
            assert name != "torch.load" or keywords.get("weights_only") == "True", where
            assert name != "yaml.load" or keywords.get("Loader") in ("yaml.SafeLoader", "_UniqueKeyLoader"), where
            assert keywords.get("allow_pickle", "False") == "False", where
            assert keywords.get("pretrained", "False") in ("False", "cfg.TIMM.PRETRAINED"), where  # only on request
            assert keywords.get("shell", "False") == "False", where


# ---------------------------------------------------------------------------------------------------------- image bombs


def bomb(side: int = 50_000) -> bytes:
    """A PNG of a few hundred bytes whose header claims side x side pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="png")
    chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return buffer.getvalue()[:8] + header + buffer.getvalue()[33:]


def test_image_bombs_are_refused_by_their_header(tmp_path, monkeypatch):
    """Also if a program has turned Pillow's own limit off."""
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb())
    with pytest.raises(UserError, match=rf"Cannot read the image {path}: .*2500000000 pixels"):
        read_image(str(path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UserError, match=rf"Cannot read the image {path}: 50000 x 50000 pixels are more than"):
        read_image(str(path))
    path.write_bytes(bomb(1000))  # not too large, so it is decoded, but the data end early
    with pytest.raises(UserError, match="truncated"):
        read_image(str(path))


def test_image_bombs_in_the_official_archives(tmp_path, capsys, monkeypatch):
    """An error that names archive and file; and nothing of it is written."""
    archives, output = make_archives(tmp_path / "archives"), tmp_path / "imagenet"
    name = "ILSVRC2012_val_00000001.JPEG"

    def error(content: bytes) -> str:
        with tarfile.open(archives / "ILSVRC2012_img_val.tar", "w") as tar:
            add(tar, name, content)
        arguments = ["--archives", str(archives), "--output", str(output), "--split", "val"]
        assert prepare_imagenet.main(arguments) == 1
        assert not (output / "val").exists() or not list((output / "val").rglob("*.JPEG"))
        return capsys.readouterr().err

    assert f"ILSVRC2012_img_val.tar is damaged or is not the official archive ({name} cannot be read" in error(bomb())
    assert f"{name} is not an image" in error(b"<html>")
    monkeypatch.setattr(prepare_imagenet, "MAX_BYTES", 2000)
    assert f"{name} has 2001 bytes, more than 2000" in error(jpeg(1).ljust(2001, b"\0"))


def test_formats_that_start_programs_are_not_opened(tmp_path):
    """Pillow would pass EPS data to Ghostscript, whatever the file is called."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8)).save(path, format="eps")
    assert Image.open(path).format == "EPS"
    with pytest.raises(UserError, match="it is not an image"):
        read_image(str(path))


# -------------------------------------------------------------------------------------------- paths that lead elsewhere


def test_video_files_that_are_lists_of_others(tmp_path):
    encode(tmp_path / "secret.mp4", 5)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with pytest.raises(UserError, match="it is not in one of the supported containers"):
        Video(tmp_path / "list.mp4")


def test_links_are_followed_but_not_climbed(tmp_path):
    """A symbolic link in the folder is trusted; `..` after one does not lead out of the prefix."""
    inside, outside = tmp_path / "videos", tmp_path / "outside" / "deep"
    inside.mkdir()
    encode(outside / "v.mp4", 20)
    encode(outside.parent / "secret.mp4", 20)
    encode(inside / "secret.mp4", 20)
    (inside / "link").symlink_to(outside)
    (tmp_path / "test.csv").write_text("link/v.mp4 0\nlink/../secret.mp4 0\n")
    words = ["TEST.DATASET", "kinetics", "DATA.PATH_TO_DATA_DIR", tmp_path, "DATA.PATH_PREFIX", inside]
    words += ["TEST.NUM_ENSEMBLE_VIEWS", 1, "TEST.NUM_SPATIAL_CROPS", 1, "DATA.NUM_FRAMES", 2]
    dataset = build_dataset(load_config(None, [str(word) for word in words]), "test")
    assert dataset.path(0) == f"{inside}/link/v.mp4"
    assert os.path.realpath(dataset.path(1)) == str(inside / "secret.mp4")
    assert dataset[0].x.isfinite().all()


# -------------------------------------------------------------------------------------------------------------- network


@pytest.fixture
def no_network(monkeypatch):
    """Any name lookup or connection to another machine fails the test, even if its error is caught."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network in this test")

    connect = socket.socket.connect

    def local_only(self, address):
        return connect(self, address) if self.family == socket.AF_UNIX else refuse(address)

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", local_only)
    yield
    assert tried == []


def test_nothing_is_fetched(no_network, tiny_config, tmp_path):
    """Train, resume and test with augmentation, mixup and EMA; then build a network of every family."""
    words = ["AUG.ENABLE", "True", "MIXUP.ENABLE", "True", "EMA.ENABLE", "True"]
    weights = train(load_config(tiny_config, words))
    train(load_config(tiny_config, [*words, "SOLVER.MAX_EPOCH", "3"]), force=True)
    assert evaluate_weights(load_config(tiny_config, ["TEST.CHECKPOINT_FILE_PATH", str(weights)])).num_samples == 32
    configs = [load_config(path, ["MODEL.NUM_CLASSES", 7]) for path in sorted((ROOT / "configs").glob("*/[!_]*.yaml"))]
    with torch.device("meta"):
        networks = [build_model(cfg) for cfg in {cfg.MODEL.NAME: cfg for cfg in configs}.values()]
    assert len(networks) >= 4


def test_addresses_are_not_paths(no_network, tiny_config, tmp_path):
    """A URL is treated as a file that does not exist."""
    for key in ("TEST.CHECKPOINT_FILE_PATH", "TRAIN.CHECKPOINT_FILE_PATH"):
        run = train if key.startswith("TRAIN") else evaluate_weights
        with pytest.raises(UserError, match="No checkpoint file https:/"):
            run(load_config(tiny_config, [key, "https://127.0.0.1/w.pth"]))
    with pytest.raises(UserError, match="there is no such file"):
        Video("http://127.0.0.1/v.mp4")
    with pytest.raises(UserError, match="No config file"):
        load_config("https://127.0.0.1/a.yaml")
    save_safetensors(tmp_path / "w.safetensors", build_model(load_config(tiny_config)).state_dict())
    data = ["DATA.PATH_TO_DATA_DIR", "https://127.0.0.1/data", "TEST.CHECKPOINT_FILE_PATH", f"{tmp_path}/w.safetensors"]
    with pytest.raises(UserError, match="does not exist"):
        evaluate_weights(load_config(tiny_config, data))
