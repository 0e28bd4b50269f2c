"""docs/OWN_DATA.md is a path that can be walked: its commands run in their order, on a few images and videos.

They run in a folder like a clone's, whose data and output are the test's. Behind each command the test types what makes
the network small (SMALL): as they stand they would take hours.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
from clips import encode
from documents import ROOT, blocks_of
from PIL import Image

from ats.checkpoint import load_weights
from ats.config import load_config
from ats.models import build_model

PAGE = "docs/OWN_DATA.md"
COMMANDS = [block.code for block in blocks_of(PAGE) if block.language == "bash" and block.is_run]
SMALL = {
    "ViT": 'TIMM.PRETRAINED False TIMM.KWARGS "[[img_size,32],[patch_size,8],[embed_dim,32],[depth,4],[num_heads,2]]"',
    "XViT": "VIT.IMG_SIZE 32 VIT.PATCH_SIZE 8 VIT.EMBED_DIM 32 VIT.DEPTH 4 VIT.NUM_HEADS 2 DATA.TRAIN_CROP_SIZE 32 "
    'DATA.TEST_CROP_SIZE 32 DATA.TRAIN_JITTER_SCALES "[32,40]" TEMPORAL_HEAD.NUM_ATTENTION_HEADS 2',
}
QUICK = "SOLVER.MAX_EPOCH 1 TRAIN.BATCH_SIZE 8 DATA_LOADER.NUM_WORKERS 0 DEVICE cpu"
CLASSES = {"blue cup": (20, 40, 200), "green": (30, 160, 40), "red": (200, 30, 30)}


def pictures(seed: int, count: int, colour: tuple[int, int, int]) -> np.ndarray:
    """uint8 [count, 40, 48, 3]: a square of the class's colour that moves over noise."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 90, (count, 40, 48, 3), dtype=np.uint8)
    for number, frame in enumerate(frames):
        frame[8:28, 4 + number % 20 : 24 + number % 20] = colour
    return frames


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder like a clone's: the repository's code and configs, data of its own, no output."""
    for name in ("ats", "tools", "configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def write_photographs(clone: Path, split: str, count: int) -> None:
    for label, (name, colour) in enumerate(CLASSES.items()):
        folder = clone / "data" / "custom" / split / name
        folder.mkdir(parents=True)
        for number, picture in enumerate(pictures(label, count, colour)):
            Image.fromarray(picture).save(folder / f"photo {number}.jpg")


def shrink(code: str, network: str) -> str:
    """Commands of the page, with SMALL and QUICK behind those that read a config."""
    return re.sub(r"^(python tools/\w+\.py --cfg .*)$", rf"\1 {SMALL[network]} {QUICK}", code, flags=re.MULTILINE)


def run(clone: Path, code: str, network: str) -> str:
    """Run a block of the page, made small. Returns what it prints."""
    code = shrink(code, network)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], cwd=clone, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done.stdout


def results(clone: Path) -> dict[str, dict]:
    """Name of an output folder -> its result.json."""
    return {path.parent.name: json.loads(path.read_text()) for path in clone.glob("output/*/result.json")}


@pytest.mark.usefixtures("one_thread")
def test_images_in_one_process(clone, monkeypatch):
    """The commands for images that take little time without the start of a process: all but export and benchmark."""
    for split, count in (("train", 8), ("val", 2)):
        write_photographs(clone, split, count)
    monkeypatch.chdir(clone)
    for line in shrink("\n".join(code for code in COMMANDS if "custom_videos" not in code), "ViT").splitlines():
        tool = re.match(r"python tools/(run_net|calibrate|visualize)\.py ", line)
        assert not tool or import_module(f"ats.cli.{tool[1]}").main(shlex.split(line)[2:]) == 0, line
    assert set(results(clone)) == {"custom", "custom_ats", "custom_finetuned", "custom_budget"}
    assert (clone / "output" / "custom.html").is_file()


@pytest.mark.long
def test_images(clone):
    """From train/ alone, through all steps, to an ONNX file that classifies and a page that opens."""
    write_photographs(clone, "train", 20)
    said = "".join(run(clone, code, "ViT") for code in COMMANDS if "custom_videos" not in code)
    assert len(list(clone.glob("data/custom/val/*/*.jpg"))) == 6
    assert len(list(clone.glob("data/custom/train/*/*.jpg"))) == 54
    found = results(clone)
    assert set(found) == {"custom", "custom_ats", "custom_finetuned", "custom_budget"}
    assert [result["num_samples"] for result in found.values()] == [6] * 4
    assert set(found["custom_ats"]["tokens_per_block"]) == {"1", "2", "3"}
    assert found["custom_budget"]["gflops"]["mean"] < found["custom_ats"]["gflops"]["mean"]
    assert {node.name for node in onnx.load(clone / "output" / "custom.onnx").graph.output} == {"logits", "num_tokens"}
    assert said.count(" tokens\n") == 6  # of examples/serve_folder.py
    assert " of 6 right (" in said
    assert len(list((clone / "output" / "look").glob("*/*.png"))) == 6
    assert "blue cup" in (clone / "output" / "custom.html").read_text()


@pytest.mark.long
def test_videos(clone):
    for split, count in (("train", 6), ("val", 2)):
        for label, (name, colour) in enumerate(CLASSES.items()):
            for number in range(count):
                frames = pictures(10 * number + label, 64, colour)
                encode(clone / "data" / "custom_videos" / split / name / f"{number}.mp4", list(frames))
    for code in COMMANDS:
        if "custom_videos" in code:
            run(clone, code, "XViT")
    found = results(clone)
    assert set(found) == {"custom_videos", "custom_videos_ats", "custom_videos_finetuned"}
    assert set(found["custom_videos_ats"]["tokens_per_block"]) == {"1", "2", "3"}
    assert (clone / "output" / "custom_videos.html").is_file()


@pytest.mark.parametrize("name", ["ViT", "ViT_small", "XViT"])
def test_the_configs_follow_from_each_other(name):
    """The page has the commands of their headers, and the config with ATS begins with what the dense one wrote."""
    page, folder = (ROOT / PAGE).read_text(), ROOT / "configs" / "Custom"
    dense, ats = (load_config(folder / f"{name}{suffix}.yaml") for suffix in ("", "_ATS"))
    weights = f"{dense.OUTPUT_DIR}/model.safetensors"
    assert {cfg.TEST.CHECKPOINT_FILE_PATH for cfg in (dense, ats)} == {ats.TRAIN.CHECKPOINT_FILE_PATH} == {weights}
    assert (dense.ATS.ENABLE, ats.ATS.ENABLE) == (False, True)
    assert dense.TRAIN.RESET_HEAD
    assert not ats.TRAIN.RESET_HEAD
    for path in folder.glob(f"{name}*.yaml"):
        assert not [line for line in re.findall(r"^#   (python .*)$", path.read_text(), re.M) if line not in page]


def test_the_small_network_starts_from_the_weights_that_are_here():
    """All of them but the head fit, so step 2 needs neither internet nor a file."""
    cfg = load_config(ROOT / "configs" / "Custom" / "ViT_small.yaml", ["MODEL.NUM_CLASSES", 3])
    load_weights(build_model(cfg), cfg.TRAIN.CHECKPOINT_FILE_PATH, skip=("head.",))
    assert not cfg.TIMM.PRETRAINED


def test_the_page_is_short():
    assert len((ROOT / PAGE).read_text().split()) <= 950
