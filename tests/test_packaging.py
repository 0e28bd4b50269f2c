"""What `pip install` and torch.hub provide: the package with configs, types and commands; the entry points."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from helpers import randomise

import ats
from ats.cli import COMMANDS, as_typed
from ats.config import SHIPPED, load_config
from ats.errors import UserError
from ats.models import build_model

ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command that must succeed; returns its output."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path, str]:
    """(wheel, sdist, setuptools' output), built offline from a copy of the files that git tracks.

    The copy has a test file without its fixtures, as setuptools would add by itself.
    """
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    if not any(names):  # not a clone
        names = [
            str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts
        ]
    for name in names:
        if name and not name.startswith(("tests/", "data/", "output/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    (source / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "test_tokens.py", source / "tests")
    said = run(sys.executable, "setup.py", "-q", "sdist", "-d", dist, "bdist_wheel", "-d", dist, cwd=source)
    return *dist.glob("*.whl"), *dist.glob("*.tar.gz"), said


@pytest.fixture(scope="module")
def site(built, tmp_path_factory) -> Path:
    """A folder with the wheel unpacked by pip."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    run(*pip, "--disable-pip-version-check", "--target", folder, built[0], cwd=folder)
    return folder


def test_wheel_and_sdist_hold_everything_and_nothing_else(built):
    wheel, sdist, said = built
    assert "warning" not in said.lower()
    inside = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ats").rglob("*.py")}
    configs = {
        str(p.relative_to(ROOT)) for kind in ("yaml", "safetensors") for p in (ROOT / "configs").rglob(f"*.{kind}")
    }
    assert modules
    assert configs
    assert modules | {"ats/py.typed"} | {f"ats/{name}" for name in configs} <= inside
    assert modules | configs | {"ats/py.typed", "hubconf.py", "LICENSE", "README.md", "tools/run_net.py"} <= source
    examples = {str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("*.py")}
    assert examples | {"docs/PLUGIN.md", "docs/images/kept_tokens.png", "pyproject.toml", "setup.py"} <= source
    assert {"CITATION.cff", "CONTRIBUTING.md"} <= source
    assert not {name for name in source if name.startswith("tests")}  # they need 17 MB of fixtures
    other = {name for name in inside if not name.startswith("ats/") and ".dist-info/" not in name}
    assert not other
    assert not {name for name in inside | source if "__pycache__" in name or name.endswith(".pyc")}
    assert "configs/Digits/weights/deit_dense.safetensors" in configs
    weights = {name for name in configs if name.endswith(".safetensors")}
    assert {name for name in inside if name.endswith(".safetensors")} == {f"ats/{name}" for name in weights}
    assert {name for name in source if name.endswith(".safetensors")} == weights


def test_the_metadata_say_who_and_what(built):
    """setuptools takes them from pyproject.toml, the version from `ats`."""
    with zipfile.ZipFile(built[0]) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        lines = archive.read(name).decode().split("\n\n")[0].splitlines()
    found = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines}
    assert (found["Name"], found["Version"]) == ("adaptive-token-sampling", ats.__version__)
    assert (found["Author"], found["License-Expression"]) == ("The ATS maintainers", "Apache-2.0")
    assert {"Requires-Python: >=3.11", "Project-URL: Paper, https://arxiv.org/abs/2111.15667"} <= set(lines)


@pytest.mark.long
def test_commands_of_the_wheel_answer_help(site, tmp_path):
    """Every console command starts from the installed package, outside a clone, and its help names it."""
    for command, script in COMMANDS.items():
        assert (ROOT / script).is_file()
        said = run(sys.executable, site / "bin" / command, "--help", cwd=tmp_path, PYTHONPATH=str(site))
        assert command in said
        assert "tools/" not in said


def test_wheel_finds_its_configs_from_anywhere(site, tmp_path):
    code = (
        "import ats, ats.config as c; print(ats.__file__); "
        "print([c.load_config(p).VIT.EMBED_DIM for p in ('ImageNet/DeiT_S.yaml', 'configs/ImageNet/DeiT_Ti.yaml')])"
    )
    said = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert said == [str(site / "ats" / "__init__.py"), "[384, 192]"]


def test_wheel_finds_the_weights_that_its_configs_name(site, tmp_path):
    code = (
        "import ats.config as c; cfg = c.load_config('Digits/DeiT_ATS.yaml'); "
        "print(c.find_shipped(cfg.TEST.CHECKPOINT_FILE_PATH))"  # as `load_checkpoint` does
    )
    [found] = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    weights = Path("configs", "Digits", "weights", "deit_dense.safetensors")
    assert found == str(site / "ats" / weights)
    assert Path(found).read_bytes() == (ROOT / weights).read_bytes()


def test_a_local_config_comes_before_a_shipped_one(tmp_path, monkeypatch):
    """The configs of a clone are found from other folders too."""
    monkeypatch.chdir(tmp_path)
    assert load_config("ImageNet/DeiT_S.yaml").VIT.EMBED_DIM == 384
    (tmp_path / "ImageNet").mkdir()
    (tmp_path / "ImageNet" / "DeiT_S.yaml").write_text("VIT:\n  EMBED_DIM: 60\n")
    assert load_config("ImageNet/DeiT_S.yaml").VIT.EMBED_DIM == 60
    for path in ("ImageNet/DeiT_X.yaml", "configs/ImageNet/DeiT_X.yaml", "../configs/ImageNet/DeiT_X.yaml"):
        with pytest.raises(UserError, match=r"No config file \S*ImageNet/DeiT_X\.yaml\. .*ImageNet/DeiT_S\.yaml"):
            load_config(path)
    with pytest.raises(UserError, match=r"No config file CvT13\.yaml\. Did you mean ImageNet/CvT_13\.yaml"):
        load_config("CvT13.yaml")
    assert SHIPPED == ROOT / "configs"


def test_help_names_the_command_that_was_typed(monkeypatch):
    text = "python tools/run_net.py --cfg X, then tools/benchmark.py"
    monkeypatch.setattr(sys, "argv", ["tools/run_net.py"])
    assert as_typed(text) == text
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ats-run"])
    assert as_typed(text) == "ats-run --cfg X, then ats-benchmark"


# ---- what else a repository has


def test_one_ruff_for_commits_and_make():
    [repo] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"ruff=={repo['rev'].removeprefix('v')}\n" in (ROOT / "requirements.txt").read_text()


def test_the_citation_names_the_paper():
    """All its authors, in the order of the paper."""
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert paper["title"] == "Adaptive Token Sampling for Efficient Vision Transformers"
    assert [author["family-names"] for author in paper["authors"]] == [
        *("Fayyaz", "Abbasi Koohpayegani", "Rezaei Jafari", "Sengupta", "Vaezi Joze", "Sommerlade", "Pirsiavash"),
        "Gall",
    ]


def test_workflows_call_what_is_there_and_forms_have_fields():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run", "make test-lowest"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    for name in ("bug", "question"):
        form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
        assert all(field["attributes"]["label"] for field in form["body"])


def test_the_lowest_versions_are_those_of_pyproject():
    """`make -n test-lowest` pins every dependency to its bound, also those of videos and Hugging Face models."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    bounds = [*project["dependencies"], *extras["video"], *extras["hf"]]
    assert all(re.fullmatch(r"[\w-]+>=[\w.]+", bound) for bound in bounds)
    said = run("make", "-s", "lowest-versions", f"PYTHON={sys.executable}", cwd=ROOT).split()
    assert said == [bound.replace(">=", "==") for bound in bounds]


# ---- torch.hub


def load(name: str, *args: object, **kwargs: object) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), name, *args, source="local", **kwargs)


def test_hub_lists_only_entry_points():
    """torch.hub would list the entry points, each with a docstring and an existing config, and no imported names."""
    import hubconf

    names = [name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")]
    assert {"config", "timm_model", "deit_small", "xvit_b16", "timesformer", "cvt_13"} <= set(names)
    for name in names:
        text = getattr(hubconf, name).__doc__
        config = re.search(r"configs/([\w/]+\.yaml)", text)
        assert name in ("config", "timm_model") or load_config(config[1]).ATS.ENABLE


@pytest.mark.parametrize(
    ("name", "config"),
    [("deit_tiny", "ImageNet/DeiT_Ti.yaml"), ("cvt_13", "ImageNet/CvT_13_ATS.yaml")],
)
def test_hub_model_is_the_configs(name, config):
    """It has the config's parameters, is in evaluation mode, has ATS unless `dense`, and takes the settings."""
    model = load(name)
    want = build_model(load_config(config)).state_dict()
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in want.items()}
    assert not model.training
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert load(name, dense=True).forward_tokens(x)[1] == []
        trace = load(name, blocks=[7, 9], num_tokens=30, overrides=["MODEL.NUM_CLASSES", 5]).forward_tokens(x)[1]
    assert [entry.block for entry in trace] == [7, 9]


def test_hub_weights_from_a_file_and_from_a_release(tmp_path, monkeypatch):
    """`checkpoint` and `pretrained` load the file's weights; a download with a wrong checksum is refused."""
    import hubconf

    model = randomise(build_model(load_config("ImageNet/DeiT_Ti.yaml")))
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        want = model.eval()(x)
        assert torch.equal(load("deit_tiny", checkpoint=str(path))(x), want)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        for stem in (digest, "00000000"):
            released = shutil.copy(path, tmp_path / f"deit-{stem}.pth")
            entry = hubconf._entry_point("ImageNet/DeiT_Ti.yaml", "test", Path(released).as_uri())
            if stem == digest:
                assert torch.equal(entry(pretrained=True)(x), want)
            else:
                with pytest.raises(RuntimeError, match="hash"):
                    entry(pretrained=True)
    assert [p.name for p in (tmp_path / "hub" / "checkpoints").iterdir()] == [f"deit-{digest}.pth"]


def test_hub_timm_model():
    model = load("timm_model", "deit3_small_patch16_224", blocks=[3, 5], num_tokens=0.5, depth=6, num_classes=3)
    assert model.ats.blocks == [3, 5]
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cvt_13", {"pretrained": True}, "no weights that can be downloaded"),
        ("deit_tiny", {"pretrained": True, "checkpoint": "x.pth"}, "not both"),
        ("deit_tiny", {"checkpoint": "missing.pth"}, "No checkpoint file missing"),
        ("deit_tiny", {"blocks": [12]}, "block 12 does not exist"),
    ],
)
def test_hub_mistakes(name, arguments, message):
    with pytest.raises(UserError, match=message):
        load(name, **arguments)
