"""A run that trains, evaluates and tests finds out before its first step what it could not do after its last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ats.cli import run_net
from ats.engine import train

pytestmark = pytest.mark.usefixtures("one_thread")


def _no_val(data: Path, out: Path) -> None:
    shutil.rmtree(data / "val")


def _no_class_in_val(data: Path, out: Path) -> None:
    shutil.rmtree(data / "val" / "red")


def _more_classes_in_val(data: Path, out: Path) -> None:
    shutil.copytree(data / "val" / "red", data / "val" / "violet")


def _broken_first_image(data: Path, out: Path) -> None:
    (data / "val" / "blue" / "0.png").write_bytes(b"broken")


def _file_for_checkpoints(data: Path, out: Path) -> None:
    out.mkdir()
    (out / "checkpoints").write_text("")


def _folder_for_weights(data: Path, out: Path) -> None:
    (out / "model.safetensors").mkdir(parents=True)


def _fifo_for_log(data: Path, out: Path) -> None:
    out.mkdir()
    os.mkfifo(out / "log.jsonl")


MISTAKES = {
    "no such data set": (["TEST.DATASET", "imagnet"], r"TEST.DATASET 'imagnet' is not known. Did you mean imagenet?"),
    "views of images": (["TEST.NUM_ENSEMBLE_VIEWS", "3"], "TEST.NUM_ENSEMBLE_VIEWS 3: images have one view; type 1."),
    "no val folder": (_no_val, "val does not exist"),
    "no test.csv": (["TEST.DATASET", "kinetics"], "test.csv. DATA.PATH_TO_DATA_DIR must be a folder"),
    "a class less in val": (_no_class_in_val, "val has no folder for: red"),
    "a class more in val": (_more_classes_in_val, "train has no folder for: violet"),
    "broken first image": (_broken_first_image, "0.png: it is not an image"),
    "test size": (
        ["DATA.TEST_CROP_SIZE", "30"],
        "ViT cannot take the val samples of TRAIN.DATASET imagenet and DATA.TEST_CROP_SIZE 30, which are 3 x 30 x 30: "
        "Images of 30 x 30 pixels cannot be cut into patches of 8. Change one of these keys.",
    ),
    "test size, nothing evaluated before": (
        ["DATA.TEST_CROP_SIZE", "30", "TRAIN.EVAL_PERIOD", "0"],
        "cannot take the val samples",
    ),
    "training size": (
        ["DATA.TRAIN_CROP_SIZE", "30"],
        "cannot take the train samples of TRAIN.DATASET imagenet and DATA.TRAIN_CROP_SIZE 30",
    ),
    "size that timm's network refuses": (
        ["MODEL.NAME", "timm/test_vit", "ATS.ENABLE", "False", "DATA.TRAIN_CROP_SIZE", "40"],
        "timm/test_vit cannot take the train samples of TRAIN.DATASET imagenet and DATA.TRAIN_CROP_SIZE 40, which are "
        "3 x 40 x 40: ",
    ),
    "checkpoints is a file": (_file_for_checkpoints, "checkpoints"),
    "model.safetensors is a folder": (_folder_for_weights, "model.safetensors is a folder, but a file goes there."),
    "log.jsonl is a FIFO": (_fifo_for_log, "log.jsonl is a FIFO, but a file goes there."),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_before_the_first_step(tiny_config, colours, tmp_path, monkeypatch, capsys, mistake):
    def no_step(*args: object) -> None:
        raise AssertionError("made a step")

    monkeypatch.setattr(train, "train_step", no_step)
    cause, text = MISTAKES[mistake]
    argv = ["--cfg", str(tiny_config), "TRAIN.ENABLE", "True"]
    if isinstance(cause, Callable):
        data = Path(shutil.copytree(colours, tmp_path / "data"))
        cause(data, tmp_path / "out")
        argv += ["DATA.PATH_TO_DATA_DIR", str(data)]
    else:
        argv += cause
    assert run_net.main(argv) == 1
    said = capsys.readouterr().err
    assert text in said[said.index("error: ") :]
    assert "Traceback" not in said


def test_print_config_knows_the_data_sets(tiny_config, capsys):
    assert run_net.main(["--cfg", str(tiny_config), "--print-config", "TEST.DATASET", "imagnet"]) == 1
    assert "TEST.DATASET 'imagnet' is not known" in capsys.readouterr().err
