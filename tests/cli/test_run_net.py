"""The command line: what works as written, and what each mistake gets."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ats.checkpoint import save_safetensors
from ats.config import load_config
from ats.config.keys import keys, sections
from ats.errors import UserError
from ats.models import MODELS, build_model
from ats.models.backbone import Backbone

SCRIPT = Path(__file__).parents[2] / "tools" / "run_net.py"


@pytest.fixture(scope="module")
def run_net():
    """`run_net.main([...])` is the command line without the start of a process."""
    from ats.cli import run_net

    return run_net


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


def run(*args: object, cwd: Path, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run the script as a user does, in a folder that is not the repository's and without the package on the path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, *python, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


# ---- what works


def test_train_and_test_learn(tiny_config, tmp_path):
    process = run(
        *("--cfg", "tiny.yaml", "TRAIN.ENABLE", "True", "SOLVER.MAX_EPOCH=8", "LOG_PERIOD", "1"),
        *("MIXUP.LABEL_SMOOTH_VALUE", "0", "TRAIN.EVAL_PERIOD", "4", "--opts", "OUTPUT_DIR", "learned"),
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    output = tmp_path / "learned"
    losses = [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines() if '"train"' in line]
    assert len(losses) == 32
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    result = json.loads((output / "result.json").read_text())
    assert result["num_samples"] == 32
    assert result["top1"] > 80  # chance: 25
    assert result["top5"] == 100
    assert "ViT + ATS" in process.stdout
    assert {path.name for path in output.iterdir()} == {
        *(".lock", "checkpoints", "config.yaml", "log.jsonl", "log.txt", "model.safetensors", "result.json")
    }
    for words in ("64 samples to train on", "0.05 M parameters", "GFLOPs dense", "float32", str(output)):
        assert words in process.stderr


def test_the_same_command_again_goes_on_and_its_weights_can_be_tested(run_net, tiny_config, tmp_path, capsys):
    command = ["--cfg", str(tiny_config), "TRAIN.ENABLE", "True", "SOLVER.MAX_EPOCH", "1"]
    assert run_net.main(command) == 0
    capsys.readouterr()
    assert run_net.main(command) == 0
    assert "1 of 1 epochs are done" in capsys.readouterr().err
    results = []
    for name in ("model.safetensors", "checkpoints/checkpoint_epoch_00001.pyth"):
        weights = tmp_path / "out" / name
        changes = ["TEST.CHECKPOINT_FILE_PATH", str(weights), "OUTPUT_DIR", str(tmp_path / "tested")]
        assert run_net.main(["--cfg", str(tiny_config), *changes]) == 0
        results.append(json.loads((tmp_path / "tested" / "result.json").read_text())["gflops"])
    assert results[0] == results[1]


@pytest.mark.parametrize("num_classes", [4, 10])
def test_a_run_that_trains_evaluates_what_it_trained(run_net, tiny_config, tmp_path, capsys, num_classes):
    """Also if TEST.CHECKPOINT_FILE_PATH names the weights it began with, be they of other classes."""
    start = str(tmp_path / "start.safetensors")
    save_safetensors(start, build_model(load_config(tiny_config, ["MODEL.NUM_CLASSES", num_classes])).state_dict())
    result = tmp_path / "out" / "result.json"
    command = ["--cfg", str(tiny_config), "SOLVER.MAX_EPOCH", "6", "SOLVER.BASE_LR", "0.01", "TRAIN.ENABLE", "True"]
    command += ["TRAIN.CHECKPOINT_FILE_PATH", start, "TRAIN.RESET_HEAD", str(num_classes != 4)]
    assert run_net.main([*command, "TRAIN.EVAL_PERIOD", "0"]) == 0
    top1 = json.loads(result.read_text())["top1"]
    assert top1 > 50  # chance: 25
    capsys.readouterr()
    result.unlink()
    assert run_net.main([*command, "TEST.CHECKPOINT_FILE_PATH", start]) == 0  # goes on from there: nothing is left
    assert json.loads(result.read_text())["top1"] == top1
    said = capsys.readouterr().err
    trained = tmp_path / "out" / "model.safetensors"
    assert f"TEST.CHECKPOINT_FILE_PATH {start} is for runs that do not train; evaluating {trained}." in said
    assert run_net.main([*command, "TEST.CHECKPOINT_FILE_PATH", str(trained)]) == 0
    assert "for runs that do not train" not in capsys.readouterr().err


@pytest.mark.long
def test_help_lists_sections_and_keys_and_is_quick(tmp_path):
    """No process imports PyTorch, whether it prints the sections, all keys, one section or what is wrong with a key."""

    def said(*words: str, status: int = 0) -> str:
        process = run(*words, cwd=tmp_path, python=("-X", "importtime"))
        assert process.returncode == status
        assert "| torch\n" not in process.stderr
        return process.stdout + process.stderr

    overview, everything = said("--help"), said("--help", "all")
    for section in sections():
        assert f"\n  {section.name or 'OUTPUT_DIR'} " in overview
    for key in keys().values():
        assert f"\n{key.name}  (" in everything
        assert key.help in " ".join(everything.split())
    some = said("--help", "ATS", "SOLVER")
    assert "ATS.BLOCKS  (list | None from 0, default None)" in some
    assert "SOLVER.BASE_LR  (float from 0, " in some
    assert "VIT.DEPTH  (" not in some
    assert "error: --help SOLVR: there is no such section or key. Did you mean SOLVER" in said(
        "--help", "SOLVR", status=1
    )
    assert "error: VIT.DEPTH 0" in said("--cfg", "Digits/DeiT.yaml", "--print-config", "VIT.DEPTH", "0", status=1)


@pytest.mark.parametrize("whole", [False, True])
def test_print_config_loads_again(run_net, tiny_config, tmp_path, capsys, whole):
    words = ["--print-config", *(["all"] if whole else []), "ATS.BLOCKS", "[2]", "SOLVER.CLIP_GRAD_L2NORM=1"]
    assert run_net.main(["--cfg", str(tiny_config), *words]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    expected = load_config(tiny_config, ["ATS.BLOCKS", "[2]", "SOLVER.CLIP_GRAD_L2NORM", "1"])
    assert load_config(printed) == expected
    assert ("LABEL_SMOOTH_VALUE" in printed.read_text()) == whole  # at its default
    assert not (tmp_path / "out").exists()


def test_print_config_refuses_what_a_run_would(run_net, tiny_config, capsys):
    """Without data and weights, which it does not read."""
    for words, text in (
        (["ATS.BLOCKS", "[3]"], "block 3 does not exist"),
        (["MODEL.NAME", "VTi"], "MODEL.NAME VTi"),
        (["ATS.SAMPLER", "topp"], "ATS.SAMPLER topp: choose from"),
        (["TEST.ENABLE", "False"], "TRAIN.ENABLE and TEST.ENABLE are both False"),
        (["TRAIN.ENABLE", "1", "SOLVER.OPTIMIZING_METHOD", "adm"], "SOLVER.OPTIMIZING_METHOD adm"),
        (["TRAIN.ENABLE", "1", "MIXUP.ENABLE", "1", "TRAIN.BATCH_SIZE", "5"], "TRAIN.BATCH_SIZE 5 must be even"),
        (["MODEL.NAME", "timm/deit3_smal_patch16_224"], "timm has no deit3_smal_patch16_224"),
    ):
        assert run_net.main(["--cfg", str(tiny_config), "--print-config", *words]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert text in printed.err
    words = ["MODEL.NAME", "timm/deit_tiny_patch16_224", "TIMM.PRETRAINED", "True", "DATA.TEST_CROP_SIZE", "224"]
    assert run_net.main(["--cfg", str(tiny_config), "--print-config", *words]) == 0  # and downloads nothing
    assert "PRETRAINED: true" in capsys.readouterr().out


def test_print_config_of_a_network_that_reads_values_while_it_is_built(run_net, tiny_config, monkeypatch, capsys):
    def build(cfg):
        torch.linspace(0, 1, cfg.VIT.DEPTH).tolist()
        return Backbone()

    monkeypatch.setitem(MODELS, "Mine", build)
    assert run_net.main(["--cfg", str(tiny_config), "--print-config", "MODEL.NAME", "Mine"]) == 0
    assert "NAME: Mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--cfg", "F", "RNG_SEED", "3", "ATS.NUM_TOKENS", "9"],
        ["RNG_SEED", "3", "--cfg", "F", "ATS.NUM_TOKENS", "9"],
        ["RNG_SEED=3", "--cfg", "F", "--opts", "ATS.NUM_TOKENS", "9"],
        ["--cfg=F", "--opts", "RNG_SEED", "3", "ATS.NUM_TOKENS=9"],
    ],
)
def test_overrides_anywhere(run_net, tiny_config, capsys, words):
    assert run_net.main(["--print-config", "all", *(word.replace("F", str(tiny_config)) for word in words)]) == 0
    printed = capsys.readouterr().out
    assert "RNG_SEED: 3\n" in printed
    assert "NUM_TOKENS: 9\n" in printed


def test_values_may_begin_with_a_dash_or_hold_equals_signs(run_net):
    words = ["A", "-1", "B", "x=y", "C=x=y", "D", "-x"]
    assert run_net.parse_overrides(words, run_net.make_parser()) == ["A", "-1", "B", "x=y", "C", "x=y", "D", "-x"]


def test_slowfast_options_are_explained(run_net, tiny_config, capsys):
    """The message is the command to type, with the values that were given."""
    words = ["--init_method", "tcp://10.0.0.1:9999", "--shard_id", "1", "--num_shards", "2", "--print-config"]
    assert run_net.main(["--cfg", str(tiny_config), *words, "NUM_GPUS", "8", "NUM_SHARDS", "2"]) == 0
    said = capsys.readouterr().err
    assert "torchrun --nnodes=2 --node_rank=1 --rdzv_backend=c10d --rdzv_endpoint=10.0.0.1:9999" in said
    assert f"tools/run_net.py --cfg {tiny_config}" in said
    assert "NUM_GPUS has no effect: processes are started by torchrun --nproc_per_node=8 tools/run_net.py" in said
    assert "NUM_SHARDS has no effect: type on every machine torchrun --nnodes=2" in said


# ---- what does not


MISTAKES = {
    "no config": ([], r"--cfg FILE is missing.*\n.*--cfg configs/"),
    "config without name": (["--cfg"], r"--cfg: expected one argument"),
    "no such config": (["--cfg", "missing.yaml"], r"No config file missing\.yaml"),
    "unknown key": (["--cfg", "F", "SOLVER.BASELR", "1"], r"SOLVER\.BASELR.*SOLVER\.BASE_LR"),
    "key without value": (["--cfg", "F", "RNG_SEED"], r"RNG_SEED has no value"),
    "unknown option": (["--cfg", "F", "--print-confg"], r"Unknown option --print-confg\. Did you mean --print-config"),
    "wrong type": (["--cfg", "F", "RNG_SEED", "abc"], r"RNG_SEED must be int, not 'abc'"),
    "out of range": (["--cfg", "F", "VIT.NUM_HEADS", "0"], r"VIT\.NUM_HEADS 0: give a number from 1\."),
    "nothing to do": (["--cfg", "F", "TEST.ENABLE", "False"], r"TRAIN\.ENABLE and TEST\.ENABLE are both False"),
    "no weights": (["--cfg", "F"], r"TEST\.CHECKPOINT_FILE_PATH is empty"),
    "missing weights": (["--cfg", "F", "TEST.CHECKPOINT_FILE_PATH", "no.pth"], r"no\.pth"),
    "missing data": (["--cfg", "F", "TRAIN.ENABLE", "1", "DATA.PATH_TO_DATA_DIR", "no"], r"no.train does not exist"),
    "class count": (["--cfg", "F", "TRAIN.ENABLE", "1", "MODEL.NUM_CLASSES", "5"], r"4 class.*MODEL\.NUM_CLASSES 5"),
    "block": (["--cfg", "F", "TRAIN.ENABLE", "1", "ATS.BLOCKS", "[3]"], r"ATS\.BLOCKS"),
    "model": (["--cfg", "F", "TRAIN.ENABLE", "1", "MODEL.NAME", "VTi"], r"MODEL\.NAME VTi"),
    "optimizer": (["--cfg", "F", "TRAIN.ENABLE", "1", "SOLVER.OPTIMIZING_METHOD", "adm"], r"OPTIMIZING_METHOD adm"),
    "batch": (["--cfg", "F", "TRAIN.ENABLE", "1", "TRAIN.BATCH_SIZE", "65"], r"64 samples.*65"),
    "output": (["--cfg", "F", "TRAIN.ENABLE", "1", "OUTPUT_DIR", "F"], r"OUTPUT_DIR F cannot be made.*Type OUTPUT_DIR"),
    "output in /proc": (
        ["--cfg", "F", "TRAIN.ENABLE", "1", "OUTPUT_DIR", "/proc/x"],
        r"OUTPUT_DIR /proc/x cannot be made",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_clear_message(run_net, tiny_config, tmp_path, monkeypatch, capsys, mistake):
    words, pattern = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    tiny_config.rename(tmp_path / "F")
    assert run_net.main(words) == 1
    error = capsys.readouterr().err
    start = error.index("error: ")
    assert "Traceback" not in error
    assert re.search(pattern, error[start:], flags=re.DOTALL)
    log = tmp_path / "out" / "log.txt"
    assert not log.exists() or "error: " in log.read_text()


def test_unreadable_file_in_evaluation(run_net, tiny_config, colours, tmp_path, capsys):
    assert run_net.main(["--cfg", str(tiny_config), "TRAIN.ENABLE", "True", "SOLVER.MAX_EPOCH", "1"]) == 0
    shutil.copytree(colours, tmp_path / "data")
    broken = tmp_path / "data" / "val" / "green" / "5.png"
    broken.write_bytes(broken.read_bytes()[:60])
    capsys.readouterr()
    changes = ["TEST.CHECKPOINT_FILE_PATH", str(tmp_path / "out" / "model.safetensors")]
    changes += ["DATA.PATH_TO_DATA_DIR", str(tmp_path / "data"), "DATA_LOADER.NUM_WORKERS", "1"]
    assert run_net.main(["--cfg", str(tiny_config), *changes]) == 1
    error = capsys.readouterr().err
    assert str(broken) in error
    assert "Traceback" not in error


@pytest.mark.long
def test_error_as_a_process_and_debug(tmp_path):
    process = run("--cfg", "missing.yaml", cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr.startswith("error: No config file")
    assert "Traceback" not in process.stderr
    process = run("--cfg", "missing.yaml", "--debug", cwd=tmp_path)
    assert process.returncode == 1
    assert "Traceback" in process.stderr


def test_debug_shows_where(run_net):
    with pytest.raises(UserError):
        run_net.main(["--debug"])


def test_interrupt(run_net, tiny_config, monkeypatch, capsys):
    def interrupt(cfg, *, force):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_net, "run", interrupt)
    assert run_net.main(["--cfg", str(tiny_config)]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_an_environment_without_the_packages_says_so():
    """Not activated, for example: what is missing and what to type, no traceback."""
    script = Path(__file__).parents[2] / "tools" / "run_net.py"
    done = subprocess.run([sys.executable, "-S", str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"^error: .* has no torch.*fvcore.*\. Type source \.venv/bin/activate", done.stderr)
    assert "Traceback" not in done.stderr
