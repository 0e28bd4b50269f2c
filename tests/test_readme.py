"""What the README says is what the repository does: its code runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ats.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README + (ROOT / "docs" / "PLUGIN.md").read_text(), re.DOTALL)
BASH = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0] for block in BASH for line in block.splitlines()]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("line", [line for line in COMMANDS if "run_net.py" in line])
def test_commands_parse(line):
    """Every key and value of a command in the README is accepted."""
    from run_net import make_parser, parse_overrides

    words = shlex.split(line.replace("<dir>", "/data"))
    assert words[0] == "python"
    assert (ROOT / words[1]).is_file()
    args, rest = make_parser().parse_known_args(words[2:])
    load_config(ROOT / args.cfg, parse_overrides(rest))


@pytest.mark.parametrize("line", [line for line in COMMANDS if "tools/export.py" in line])
def test_export_commands_parse(line):
    """So are those of exports, and what they ask for can be exported."""
    from export import parse_args

    from ats.engine.export import check_exportable, format_of

    words = [str(ROOT / word) if word.endswith(".yaml") else word for word in shlex.split(line)]
    args, cfg = parse_args(words[2:])
    check_exportable(cfg)
    assert format_of(args.output, args.format) in ("onnx", "pt2")
    assert (ROOT / cfg.TEST.CHECKPOINT_FILE_PATH).is_file()


@pytest.mark.parametrize("path", sorted({"README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))}))
def test_links_and_files_exist(path):
    """Relative links and the files named in backticks are there."""
    text = (ROOT / path).read_text()
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    targets += re.findall(r"`((?:ats|tools|tests|configs|docs)/[\w/.]+)(?:::\w+)?`", text)
    missing = [t for t in targets if not (ROOT / t).exists() and not (ROOT / path).parent.joinpath(t).exists()]
    assert not missing


def test_make_targets_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
