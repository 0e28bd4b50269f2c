"""Show which tokens a network keeps: of images, of clips, or of a whole validation run, as one page.

    python tools/visualize.py --cfg X.yaml image.jpg [more | folder | clip.mp4] -o out [KEY VALUE ...]
    python tools/visualize.py --cfg X.yaml --report out.html [KEY VALUE ...]

For each image it draws a strip: the input, the tokens kept after every ATS block with their counts, the tokens'
significance scores, and class and confidence with and without ATS (dense, same weights). For each clip it draws a strip
over time and a GIF. Pictures of a folder keep its subfolders; a contact sheet shows them all, with the true class if
the folder of a file is a class. --limit N draws N files, spread evenly over those given. --report runs both networks
over the validation data and writes an offline page: what each block keeps of the cheapest and most expensive samples,
histograms of token counts, accuracy by cost.

Weights come from TEST.CHECKPOINT_FILE_PATH, for example:

    python tools/visualize.py --cfg configs/Digits/DeiT_ATS.yaml data/digits/val/7/0017_00.png -o output/look
    python tools/visualize.py --cfg configs/Digits/DeiT_ATS.yaml --report output/digits.html
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ats.cli import as_typed
from ats.cli.parser import (
    Parser,
    check_file,
    check_folder,
    command,
    command_parser,
    in_range,
    looks_like_key,
    say_weights,
    split_overrides,
    to_path,
)
from ats.config import CfgNode, load_config
from ats.errors import UserError, counted, printable, rounded
from ats.options import COUNT

if TYPE_CHECKING:
    from ats.visualize.compare import Networks, SampleView
    from ats.visualize.figures import SheetCell


MOST_ON_SHEET = 120  # samples on a contact sheet


def make_parser() -> Parser:
    """The options; the remaining words are files and overrides."""
    usage = "python tools/visualize.py --cfg FILE [IMAGE | CLIP | FOLDER ...] [-o FOLDER] [--report FILE.html]"
    parser = command_parser(__doc__, usage=as_typed(f"{usage} [KEY VALUE ...]"))
    parser.add_argument("--cfg", metavar="FILE", help="config of the network")
    parser.add_argument(
        "-o", "--output", type=to_path, metavar="FOLDER", help="for strips and GIFs (default: OUTPUT_DIR)"
    )
    parser.add_argument("--report", type=to_path, metavar="FILE", help="write a page about the validation data")
    parser.option("--limit", "draw at most N files, spread evenly", type=in_range(int, COUNT), metavar="N")
    names = "class names, one per line, or imagenet-1k (default: the data set's)"
    parser.add_argument("--classes", type=os.path.expanduser, default="", metavar="FILE", help=names)
    parser.add_argument("words", nargs="*", metavar="FILE | KEY VALUE", help="files, folders and config keys")
    return parser


def split_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Split words into files or folders, and overrides [KEY, VALUE, ...]. Names of existing files are never keys."""
    overrides, paths = split_overrides(words, is_key=lambda word: looks_like_key(word) and not Path(word).exists())
    if "" in paths:
        raise UserError("An empty argument is not a file: type . for the current folder.")
    return list(map(to_path, paths)), overrides


def run(argv: list[str]) -> None:
    """Draw the files and write the report; prints a line per file.

    Raises a UserError if something is missing or wrong; for unreadable files, only after drawing the others.
    """
    args = make_parser().parse_intermixed_args(argv)
    paths, overrides = split_words(args.words)
    if args.cfg is None:
        raise UserError("--cfg FILE is missing: which network? For example --cfg configs/Digits/DeiT_ATS.yaml")
    cfg = load_config(args.cfg, overrides)
    if not paths and args.report is None:
        raise UserError("There is nothing to look at: give images, clips or a folder of them, or --report FILE.html.")
    from ats.datasets.class_names import class_names, takes_clips
    from ats.visualize.compare import Networks
    from ats.visualize.inputs import list_files

    pairs = list(list_files(paths, clips=takes_clips(cfg)).items())
    num_drawn = min(args.limit or len(pairs), len(pairs))
    files = dict(pairs[index * len(pairs) // num_drawn] for index in range(num_drawn))
    names = class_names(cfg, args.classes)
    output = args.output or Path(cfg.OUTPUT_DIR)
    if files:
        check_folder(output, name="OUTPUT_DIR" if args.output is None else "--output")
    if args.report is not None:
        check_file(args.report, name="--report")
    networks = Networks(cfg)
    say_weights(cfg)
    with_sheet = any(path.is_dir() for path in paths)
    bad = draw_files(cfg, networks, files, output=output, names=names, with_sheet=with_sheet)
    if args.report is not None:
        report_validation(cfg, networks, args.report, config=args.cfg, names=names)
    if bad:
        head = f"{len(bad)} of {len(files)} files cannot be read; the others are drawn.\n  " if len(files) > 1 else ""
        raise UserError(head + "\n  ".join(bad))


def draw_files(
    cfg: CfgNode,
    networks: Networks,
    files: Mapping[Path, Path],
    *,
    output: Path,
    names: Sequence[str],
    with_sheet: bool,
) -> list[str]:
    """Write the pictures of each file under its name below `output`, and a contact sheet; returns an error message for
    each unreadable file.
    """
    from ats.datasets.class_names import labels_of_folders
    from ats.visualize.figures import draw_sheet, draw_strip, sheet_cell
    from ats.visualize.inputs import read_input

    labels = labels_of_folders(cfg, names)
    cells: list[SheetCell] = []
    stems: Counter[str] = Counter()
    taken = set(map(real_name, files))  # the inputs, and what has been drawn
    for folder in {file.resolve().parent for file in files}:
        if folder.is_relative_to(output.resolve()):  # pictures that are not ours
            taken.update(map(real_name, folder.iterdir()))
    bad: list[str] = []
    for file, name in files.items():
        try:
            x = read_input(file, cfg)
        except UserError as error:
            bad.append(str(error))
            continue
        [view] = networks.compare(x[None])
        picture = free_path(output, str(name.with_suffix("")), stems=stems, taken=taken)
        written = [draw_strip(picture, view, title=file.name, names=names)]
        if view.picture.shape[1] > 1:
            written.append(animate_view(picture.with_suffix(".gif"), view))
        dense, ats = (f"{names[guess.label]} {100 * guess.confidence:.1f} %" for guess in (view.dense, view.ats))
        cost = f"{rounded(view.gflops)} of {rounded(view.dense_gflops)} GFLOPs"
        print(printable(f"{file}: dense {dense}; with ATS {ats}; {cost}; {', '.join(map(str, written))}"))
        if with_sheet and len(cells) < MOST_ON_SHEET:
            cells.append(sheet_cell(view, label=labels.get(file.parent.name), names=names))
    if cells:
        known = [cell.is_right for cell in cells if cell.is_right is not None]
        title = f"{counted(len(cells), 'sample')}" + (f", {sum(known)} of {len(known)} right with ATS" if known else "")
        path = free_path(output, "contact_sheet", stems=stems, taken=taken)
        print(printable(f"Contact sheet: {draw_sheet(path, cells, title=title)}"))
    return bad


def free_path(folder: Path, stem: str, *, stems: Counter[str], taken: set[str]) -> Path:
    """The first of `folder/stem.png`, `stem_2.png`, `stem_3.png`, ... that is not in `taken`, and whose .gif is not;
    adds both to `taken`. A stem may include folders.

    `stems` counts how often each stem was requested.
    """
    while True:
        number = stems[stem] = stems[stem] + 1
        path = folder / f"{stem}{f'_{number}' if number > 1 else ''}.png"
        names = {real_name(path), real_name(path.with_suffix(".gif"))}
        if taken.isdisjoint(names):
            taken |= names
            return path


def real_name(path: Path) -> str:
    """The same string for all paths of a file, even if the file system ignores case."""
    return str(path.resolve()).casefold()


def animate_view(path: Path, view: SampleView) -> Path:
    """Write a GIF: the clip, its significance scores, and what the first, middle and last ATS blocks keep."""
    import torch

    from ats.visualize.figures import animate, first_middle_last
    from ats.visualize.pictures import draw, heat

    blocks = first_middle_last(view.blocks)
    clips = [view.picture, heat(blocks[0].scores, view.picture.shape[1:])]
    clips += [draw(view.picture, block) for block in blocks]
    titles = ["clip", "significance", *(f"block {block.block}" for block in blocks)]
    scale = max(1, round(144 / view.picture.shape[-1]))
    return animate(path, torch.stack(clips)[None], titles=titles, scale=scale)


def report_validation(cfg: CfgNode, networks: Networks, path: Path, *, config: str, names: Sequence[str]) -> None:
    """Write the page about the validation data to `path`."""
    from ats.datasets import build_loader
    from ats.engine.device import explain_lost_process
    from ats.engine.evaluate import describe_model, describe_weights, versions
    from ats.visualize.page import write_page

    validation = cfg.clone()
    validation.defrost()
    validation.TRAIN.DATASET = cfg.TEST.DATASET
    loader = build_loader(validation, "val")  # for videos: the middle clip, not all test views
    details = [
        describe_model(cfg, networks.ats),
        f"Weights: {describe_weights(cfg, cfg.TEST.CHECKPOINT_FILE_PATH)}",
        printable(f"Data: {os.path.abspath(cfg.DATA.PATH_TO_DATA_DIR)}, {len(loader.dataset)} samples"),
        ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]
    title = printable(Path(config).stem)
    with explain_lost_process():
        print(printable(str(write_page(path, networks, loader, title=title, names=names, details=details))))


main = command(run)
