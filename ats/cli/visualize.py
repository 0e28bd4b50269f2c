"""Look at what a network keeps: images, clips, or a whole validation run as one page.

    python tools/visualize.py --cfg X.yaml image.jpg [more | folder | clip.mp4] -o out [KEY VALUE ...]
    python tools/visualize.py --cfg X.yaml --report out.html [KEY VALUE ...]

For each image a strip: the input, the tokens kept behind every ATS block with their counts, the significance of the
tokens, class and confidence of the network with ATS and of the dense one with the same weights. For each clip a strip
over time and a GIF. --report runs both networks over the validation data and writes a page that needs no network:
what each block keeps of the least and most costly samples, histograms of tokens, accuracy by cost.

Weights come from TEST.CHECKPOINT_FILE_PATH, for example:

    python tools/visualize.py --cfg configs/Digits/DeiT_ATS.yaml data/digits/val/7/0017_00.png -o output/look
    python tools/visualize.py --cfg configs/Digits/DeiT_ATS.yaml --report output/digits.html
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ats.cli import as_typed
from ats.cli.parser import Parser
from ats.config import CfgNode, load_config
from ats.config.schema import KEY
from ats.errors import UserError, exit_status

if TYPE_CHECKING:
    from ats.visualize.compare import Networks, SampleView

SECTIONS = {key.split(".")[0] for key in KEY}


def make_parser() -> argparse.ArgumentParser:
    """The options; files and overrides are the words that are left."""
    parser = Parser(
        description=as_typed(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=as_typed(
            "python tools/visualize.py --cfg FILE [IMAGE | CLIP | FOLDER ...] [-o FOLDER] [--report FILE.html]"
            " [KEY VALUE ...]"
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--cfg", metavar="FILE", help="config of the network")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="for strips and GIFs (default: OUTPUT_DIR)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page about the validation data")
    parser.add_argument(
        "--classes", default="", metavar="FILE", help="class names, one per line, or imagenet-1k (default: of the data)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("words", nargs="*", metavar="FILE | KEY VALUE", help="files, folders and config keys")
    return parser


def split_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files and folders, and overrides as [KEY, VALUE, ...]; a file that exists is a file whatever its name.

    Raises:
        UserError: a key without a value.
    """
    paths, overrides = [], []
    rest = iter(words)
    for word in rest:
        key, equals, value = word.partition("=")
        is_key = key.split(".")[0] in SECTIONS or re.fullmatch(r"[A-Z]+(\.[A-Z0-9_]+)+", key)
        if Path(word).exists() or not is_key:
            paths.append(Path(word))
            continue
        value = value if equals else next(rest, None)
        if value is None:
            raise UserError(f"{key} has no value: type {key} VALUE or {key}=VALUE.")
        overrides += [key, value]
    return paths, overrides


def run(args: argparse.Namespace) -> None:
    """What the command line asks for; a line is printed for every file drawn.

    Raises:
        UserError: something is missing, or wrong; at the end if files could not be read.
    """
    paths, overrides = split_words(args.words)
    if args.cfg is None:
        raise UserError("--cfg FILE is missing: which network? For example --cfg configs/Digits/DeiT_ATS.yaml")
    cfg = load_config(args.cfg, overrides)
    if not paths and args.report is None:
        raise UserError("There is nothing to look at: give images, clips or a folder of them, or --report FILE.html.")
    from ats.visualize.compare import Networks
    from ats.visualize.inputs import class_names, list_files, takes_clips

    files = list_files(paths, clips=takes_clips(cfg))
    names = class_names(cfg, args.classes)
    networks = Networks(cfg)
    bad = look_at(cfg, networks, files, output=args.output or Path(cfg.OUTPUT_DIR), names=names)
    if args.report is not None:
        report(cfg, networks, args.report, config=args.cfg, names=names)
    if bad:
        head = f"{len(bad)} of {len(files)} files cannot be read; the others are drawn.\n  " if len(files) > 1 else ""
        raise UserError(head + "\n  ".join(bad))


def look_at(
    cfg: CfgNode, networks: Networks, files: Sequence[Path], *, output: Path, names: Sequence[str]
) -> list[str]:
    """Write the pictures of each file; returns what is wrong with those that cannot be read."""
    from ats.visualize.compare import class_label
    from ats.visualize.figures import draw_strip
    from ats.visualize.inputs import read_input

    taken: dict[str, int] = {}
    bad: list[str] = []
    for file in files:
        try:
            x = read_input(file, cfg)
        except UserError as error:
            bad.append(str(error))
            continue
        [view] = networks.compare(x[None])
        taken[file.stem] = taken.get(file.stem, 0) + 1
        stem = file.stem if taken[file.stem] == 1 else f"{file.stem}_{taken[file.stem]}"
        written = [draw_strip(output / f"{stem}.png", view, title=file.name, names=names)]
        if view.picture.shape[1] > 1:
            written.append(animate_view(output / f"{stem}.gif", view))
        dense, ats = (
            f"{class_label(names, guess.label)} {100 * guess.confidence:.1f} %" for guess in (view.dense, view.ats)
        )
        cost = f"{view.gflops:.4g} of {view.dense_gflops:.4g} GFLOPs"
        print(f"{file}: dense {dense}; with ATS {ats}; {cost}; {', '.join(map(str, written))}")
    return bad


def animate_view(path: Path, view: SampleView) -> Path:
    """A GIF: the clip, its significance, and what the first, middle and last ATS block kept of it."""
    import torch

    from ats.visualize.animation import animate
    from ats.visualize.figures import first_middle_last
    from ats.visualize.pictures import fade, heat

    blocks = first_middle_last(view.blocks)
    clips = [view.picture, heat(blocks[0].scores, view.picture.shape[1:])]
    clips += [fade(view.picture, block.kept) for block in blocks]
    titles = ["clip", "significance", *(f"block {block.block}" for block in blocks)]
    scale = max(1, round(144 / view.picture.shape[-1]))
    return animate(path, torch.stack(clips)[None], titles=titles, scale=scale)


def report(cfg: CfgNode, networks: Networks, path: Path, *, config: str, names: Sequence[str]) -> None:
    """Write the page about the validation data."""
    from ats.datasets import build_loader
    from ats.engine.device import explain_lost_worker
    from ats.engine.evaluate import describe_model, versions
    from ats.visualize.report import write_report

    validation = cfg.clone()
    validation.defrost()
    validation.TRAIN.DATASET = cfg.TEST.DATASET
    loader = build_loader(validation, "val")  # of videos the clip in the middle, not all views of the test
    details = [
        describe_model(cfg, networks.ats),
        f"Weights: {Path(cfg.TEST.CHECKPOINT_FILE_PATH).name or 'of timm'}. "
        f"Data: {cfg.DATA.PATH_TO_DATA_DIR}, {len(loader.dataset)} samples.",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]
    with explain_lost_worker():
        print(write_report(path, networks, loader, title=Path(config).stem, names=names, details=details))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: run(make_parser().parse_intermixed_args(argv)), debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
