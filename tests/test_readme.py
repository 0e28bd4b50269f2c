"""What README.md, CONTRIBUTING.md and docs/*.md say is what the repository does: their code runs, their commands
parse, their links lead somewhere.

A code block is run unless a reader can see why not: it holds a placeholder for something of the reader's (`<dir>`), it
begins with `# not run by the tests: <why>`, or it is nothing but make targets, which have to exist.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documents import NOT_RUN, PLACEHOLDER, ROOT, Block, blocks_of

from ats.config import load_config

DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
WALKED = "docs/OWN_DATA.md:"  # its commands follow from each other: tests/test_own_data.py runs them

BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
BASH = [block for block in BLOCKS if block.language == "bash"]
COMMANDS = [(block.place, line) for block in BASH for line in block.commands()]


def each(blocks: list[Block]) -> pytest.MarkDecorator:
    """A test for each of the blocks that are run."""
    blocks = [block for block in blocks if block.is_run and not block.place.startswith(WALKED)]
    return pytest.mark.parametrize("block", blocks, ids=[block.place for block in blocks])


@each(PYTHON)
def test_python_blocks_run(block, monkeypatch, tmp_path):
    """Each on its own, in an empty folder, as a reader would paste it."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block.code, block.place, "exec"), {})


@pytest.mark.long
@each(BASH)
def test_bash_blocks_run(block, tmp_path):
    """Each in the repository, with the interpreter that runs the tests."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr


def test_no_block_is_left_out_in_silence():
    """Python and bash are all the code there is; a reason for not running a block is one."""
    assert {block.language for block in BLOCKS} <= {"python", "bash", ""}
    assert not [b.place for b in BLOCKS if not b.language and re.search(r"^(python|make|import|pip) ", b.code, re.M)]
    assert all(len(match[1]) > 10 for block in BLOCKS if (match := NOT_RUN.match(block.code)))
    assert not [block.place for block in PYTHON if not block.is_run]
    ran = [block.place.split(":")[0] for block in BLOCKS if block.language and block.is_run]
    assert {"README.md", "docs/PLUGIN.md", "docs/EXTENDING.md"} <= set(ran)


@pytest.mark.parametrize(("place", "line"), [pair for pair in COMMANDS if "run_net.py" in pair[1]])
def test_commands_parse(place, line):
    """Every key and value of a run_net command is accepted, also where the command is not run."""
    from ats.cli.parser import parse_overrides
    from ats.cli.run_net import make_parser

    line = re.sub(r"\$folder/my_run\.py", "tools/run_net.py", re.sub(PLACEHOLDER, "/data", line))
    words = shlex.split(line.replace("CONFIG", "configs/Digits/DeiT.yaml"))
    script = words.index("tools/run_net.py")
    args, rest = make_parser().parse_known_args(words[script + 1 :])
    if args.cfg.startswith("output/"):  # written by the command before it
        return
    load_config(ROOT / args.cfg, parse_overrides(rest, make_parser()))


@pytest.mark.parametrize(("place", "line"), COMMANDS)
def test_scripts_of_commands_exist(place, line):
    for script in re.findall(r"(?:^|\s)((?:tools|tests|examples)/[\w/]+\.py)", line):
        assert (ROOT / script).is_file()


@pytest.mark.parametrize(("place", "line"), [pair for pair in COMMANDS if "tools/export.py" in pair[1]])
def test_export_commands_parse(place, line):
    """So are those of exports, and what they ask for can be exported."""
    from ats.cli.export import parse_args
    from ats.export.graph import check_exportable, format_of

    if "--cfg output/" in line:  # written by the command before it
        return
    words = [str(ROOT / word) if word.endswith(".yaml") else word for word in shlex.split(line)]
    args, cfg = parse_args(words[2:])
    check_exportable(cfg, adaptive=args.adaptive)
    assert format_of(args.output, args.format) in ("onnx", "pt2")
    assert (ROOT / cfg.TEST.CHECKPOINT_FILE_PATH).is_file()


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links_and_files_exist(path):
    """Relative links and the files named in backticks are there."""
    text = (ROOT / path).read_text()
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    targets += re.findall(r"`((?:ats|tools|tests|configs|docs|examples)/[\w/.]+)(?:::\w+)?`", text)
    missing = [t for t in targets if not (ROOT / t).exists() and not (ROOT / path).parent.joinpath(t).exists()]
    assert not missing


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for path in DOCUMENTS:
        for target in re.findall(r"(?:`|^)make ([\w-]+)", (ROOT / path).read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (path, target)
