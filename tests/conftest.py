"""Fixtures that several test files use: a small real image folder that is easy to learn, and a config that fits it."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings
from PIL import Image

from ats.config.keys import keys
from ats.reduction import REDUCTIONS, register_sampler

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))  # tests import the tools by their names

# Machines that tests run on are slow at times; that is not what they test.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# The longest files, begun first: whole files go to the processes of `make test`, and a long one that is begun last
# keeps one of them busy while the others have nothing left to do.
LONGEST = ("compile", "distributed", "faults", "demo", "study", "mvit", "cvt", "demo_video_weights", "calibration")
LONGEST += (
    "seed_command",
    "triton_sampling",
    "start_methods",
    "model_zoo",
    "run_net_video",
    "export",
    "make_digits",
    "suite",
)

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0), "yellow": (255, 255, 0)}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--kills N`: moments at which tests/engine/test_faults.py kills a training."""
    parser.addoption("--kills", type=int, default=3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of LONGEST first, file by file. Skip those marked gpu where there is none."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU; there is none"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape the surrogates of odd file names in captured output, which would end the processes of pytest-xdist."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test():
    yield
    if "processes" in sys.modules:
        sys.modules["processes"].kill_all()


@pytest.fixture(scope="session", autouse=True)
def _meta_tensors_get_no_values():
    """Most of the time of building a network on the meta device goes into clamping the values it does not have."""
    from timm.layers import weight_init

    draw = weight_init._trunc_normal_

    def draw_values(tensor, *args):
        return tensor if tensor.is_meta else draw(tensor, *args)

    weight_init._trunc_normal_ = draw_values
    yield
    weight_init._trunc_normal_ = draw


@pytest.fixture(autouse=True, scope="session")
def _device_cpu():
    """What tests compare is exact on a CPU; DEVICE auto takes a GPU where there is one. Tests of a GPU ask for it."""
    key = keys()["DEVICE"]
    object.__setattr__(key, "default", "cpu")  # an entry is frozen
    yield
    object.__setattr__(key, "default", "auto")


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet layout, 4 classes: 32 x 32 PNGs, a coloured square on noise; per class 16 to train on, 8 in val."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (32, 32, 3), dtype=np.uint8)
                top, left = rng.integers(0, 16, 2)
                pixels[top : top + 16, left : left + 16] = colour
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def tiny_config(colours: Path, tmp_path: Path) -> Path:
    """A YAML file for `colours`: a ViT of 3 blocks, ATS in two of them; 4 steps per epoch; OUTPUT_DIR in tmp_path."""
    settings = {
        "DEVICE": "cpu",
        "MODEL": {"NUM_CLASSES": 4},
        "VIT": {"IMG_SIZE": 32, "PATCH_SIZE": 8, "EMBED_DIM": 32, "DEPTH": 3, "NUM_HEADS": 2},
        "ATS": {"ENABLE": True, "BLOCKS": [1, 2]},
        "TRAIN": {"BATCH_SIZE": 16},
        "TEST": {"BATCH_SIZE": 12},
        "SOLVER": {"MAX_EPOCH": 2, "BASE_LR": 0.003, "WARMUP_EPOCHS": 1},
        "DATA": {
            "PATH_TO_DATA_DIR": str(colours),
            "TRAIN_CROP_SIZE": 32,
            "TEST_CROP_SIZE": 32,
            "TEST_CROP_RATIO": 1.0,
            "TRAIN_JITTER_SCALES_RELATIVE": [0.5, 1.0],
        },
        "DATA_LOADER": {"NUM_WORKERS": 0},
        "AUG": {"ENABLE": False},
        "LOG_PERIOD": 2,
        "OUTPUT_DIR": str(tmp_path / "out"),
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def keep_all():
    """Name of a sampler that keeps everything, to compare the ragged path with the dense one."""
    register_sampler("keep_all")(lambda candidates, num_points, options: candidates.valid)
    yield "keep_all"
    del REDUCTIONS["keep_all"]


@pytest.fixture
def merge_dropped():
    """Name of a reduction in one file that selects and merges (support/merge_dropped.py)."""
    from merge_dropped import MergeDropped

    REDUCTIONS["merge_dropped"] = MergeDropped
    yield "merge_dropped"
    del REDUCTIONS["merge_dropped"]


@pytest.fixture
def one_thread():
    """Tiny tensors gain nothing from threads, and lose a lot where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
