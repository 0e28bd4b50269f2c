"""Write the csv files that the Kinetics loader reads, for videos in one folder per split and class.

    python tools/prepare_kinetics.py --videos data/k400
    python tools/prepare_kinetics.py --videos raw/k400 --output data/k400 --short-side 256

    <videos>/train/<class>/*.mp4      a class is a folder; labels number the sorted class names
    <videos>/val/<class>/*.mp4
    <videos>/test/<class>/*.mp4       if there is none, test.csv lists the videos of val, as is usual for Kinetics

Every file is opened, and its first, middle and last frames are decoded. A file that fails is left out and listed with
the reason in <output>/bad_files.txt. With --short-side, larger videos are re-encoded (h264, without sound) to that
size, which makes loading several times faster. Both steps run in parallel and skip files finished by an earlier run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ats.cli.parser import command, command_parser, in_range, to_path
from ats.datasets.decode import VIDEO_EXTENSIONS, Video, import_av
from ats.datasets.folders import advise_nfc, class_folders, files_below, warn_about_numbers
from ats.errors import UserError, counted, printable
from ats.files import atomic_write, write
from ats.options import Range

SPLITS = ("train", "val", "test")
GOP_SIZE = 48  # frames from one key frame to the next; a seek decodes half of them on average
KNOWN = "checked.json"
LINE_BREAK = re.compile("[\r\n]")

logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """A video: its path below the folder of videos, its split and its label."""

    name: str
    split: str
    label: int


def find_videos(videos: Path) -> list[Item]:
    """All videos, sorted by split and name.

    Raises:
        UserError: there are none, or a split has a class that train/ does not have.
    """
    splits = [split for split in SPLITS if (videos / split).is_dir()]
    classes = {split: class_folders(videos / split) for split in splits}
    if not any(classes.values()):
        raise UserError(
            f"{videos} has no train/<class>, val/<class> or test/<class>: put the class folders into train/ and val/, "
            "or name the right folder with --videos."
        )
    names = classes[splits[0]]
    warn_about_numbers(str(videos), tuple(names))
    items = []
    for split in splits:
        if unknown := sorted(set(classes[split]) - set(names)):
            shown = ", ".join(map(printable, unknown[:5]))
            advice = advise_nfc(unknown, names, folder=f"{splits[0]}/", root=str(videos))
            raise UserError(f"{videos / split} has classes that {splits[0]}/ does not have: {shown}.{advice}")
        labels = {name: label for label, name in enumerate(names)}
        paths = files_below(videos / split, VIDEO_EXTENSIONS, noun="video")
        in_class = [path for path in paths if path.count("/") == 1]
        items += [Item(f"{split}/{path}", split, labels[path.split("/")[0]]) for path in in_class]
        if num_others := len(paths) - len(in_class):
            message = "%s: %s not directly in a class folder, and so left out."
            logger.warning(message, videos / split, counted(num_others, "video is", "videos are"))
    if not items:
        raise UserError(f"The class folders in {videos} hold no videos ({', '.join(VIDEO_EXTENSIONS)}).")
    return items


def prepare(
    name: str, *, videos: Path, output: Path, short_side: int, ambiguous: frozenset[Path] = frozenset()
) -> tuple[str, str]:
    """Check a video, and shrink it if `short_side` is not 0.

    Args:
        ambiguous: suffix-less paths shared by several videos, which must not become the same .mp4.

    Returns:
        The path of the video to list, and "" or the reason why it is bad.
    """
    path = videos / name
    try:
        with Video(path) as video:
            first = video.read([0, video.num_frames // 2, video.num_frames - 1])[0]
            if not short_side:
                return str(path), ""
            target, is_small = output / name, min(first.shape[:2]) <= short_side
            if not is_small:
                keep_suffix = Path(name).with_suffix("") in ambiguous and target.suffix != ".mp4"
                target = target.with_name(f"{target.name}.mp4") if keep_suffix else target.with_suffix(".mp4")
            with atomic_write(target, sync=False) as temporary:  # turns a full disk's FFmpegError into an OSError
                if is_small:
                    shutil.copyfile(path, temporary)
                else:
                    shrink(video, temporary, short_side=short_side)
        return str(target), ""
    except (UserError, import_av().FFmpegError) as error:
        return str(path), " ".join(str(error).split())


def shrink(video: Video, target: Path, *, short_side: int) -> None:
    """Re-encode a video as h264 in mp4: short side `short_side` pixels, upright, with the same time stamps.

    If these do not ascend (AVI), a frame is placed one period after the previous one, because mp4 requires it.
    """
    with import_av().open(str(target), "w", format="mp4") as container:
        stream = None
        for frame in video.frames():
            scale = short_side / min(frame.width, frame.height)
            width, height = (2 * round(side * scale / 2) for side in (frame.width, frame.height))
            if stream is None:
                stream = container.add_stream("libx264", rate=round(video.fps) or 1, options={"crf": "20"})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.time_base, stream.codec_context.gop_size = frame.time_base, GOP_SIZE
                stream.codec_context.thread_count = 1  # videos are encoded in parallel
                last, period = None, max(1, round(1 / (video.fps * frame.time_base)))
            if last is not None and (frame.pts is None or frame.pts <= last):
                frame.pts = last + period
            last = frame.pts
            container.mux(stream.encode(frame.reformat(stream.width, stream.height, "yuv420p")))
        container.mux(stream.encode(None))


def prepare_kinetics(
    videos: str | Path,
    output: str | Path | None = None,
    *,
    short_side: int = 0,
    separator: str = " ",
    num_workers: int | None = None,
) -> dict[str, int]:
    """Check (and shrink) all videos and write the csv files to `output`, by default `videos`.

    Returns:
        The number of videos listed, by split, and of "bad" ones.

    Raises:
        UserError: there are no videos, or the folders or options do not fit together.
    """
    videos = Path(videos)
    output = videos if output is None else Path(output)
    if short_side and output.resolve() == videos.resolve():
        raise UserError("--short-side writes new videos: type --output FOLDER, with another folder than --videos.")
    if short_side < 0 or short_side % 2:
        raise UserError(f"--short-side {short_side} must be an even number of pixels.")
    import_av()
    items = find_videos(videos)
    output.mkdir(parents=True, exist_ok=True)
    known = _read_known(output / KNOWN)
    todo = {item.name: _stamp(videos / item.name, short_side) for item in items}
    todo = {name: stamp for name, stamp in todo.items() if not _is_done(known.get(name), stamp)}
    stems = Counter(Path(item.name).with_suffix("") for item in items)
    ambiguous = frozenset(stem for stem, number in stems.items() if number > 1)
    work = partial(prepare, videos=videos, output=output, short_side=short_side, ambiguous=ambiguous)
    num_workers = min(num_workers or os.cpu_count() or 1, len(todo) or 1)
    try:
        with tqdm(total=len(todo), desc="videos", unit="video", mininterval=0.5, disable=None) as bar:
            for name, result in zip(todo, _map(work, list(todo), num_workers=num_workers), strict=True):
                known[name] = [todo[name], *result]
                bar.update()
    finally:  # even if interrupted, so that the next run skips what is done
        write(output / KNOWN, json.dumps(known))
    return _write_lists(items, known, output=output, separator=separator)


def _map(work: Callable[[str], tuple[str, str]], names: list[str], *, num_workers: int) -> Iterator[tuple[str, str]]:
    if num_workers == 1:
        yield from map(work, names)
        return
    # Ctrl-C reaches every process: workers ignore it; this one waits for their current videos.
    with ProcessPoolExecutor(num_workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield from pool.map(work, names)
        except BrokenProcessPool as error:
            raise UserError("A worker was killed, perhaps for lack of memory: try fewer --workers.") from error


def _stamp(path: Path, short_side: int) -> list[int]:
    try:
        status = path.stat()
    except OSError:  # a broken link; `prepare` reports it
        return [-1, -1, short_side]
    return [status.st_size, status.st_mtime_ns, short_side]


def _is_done(entry: list | None, stamp: list[int]) -> bool:
    return entry is not None and entry[0] == stamp and not entry[2] and os.path.isfile(entry[1])


def _read_known(path: Path) -> dict[str, list]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _write_lists(items: list[Item], known: dict[str, list], *, output: Path, separator: str) -> dict[str, int]:
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    bad = []
    for item in items:
        _, path, reason = known[item.name]
        if LINE_BREAK.search(path):
            path, reason = printable(path), reason or "a csv file cannot hold a name with a line break"
        if reason:
            bad.append(f"{path}\t{reason}")
        else:
            lines[item.split].append(f"{os.path.relpath(path, output)}{separator}{item.label}")
    if not any(lines.values()):
        raise UserError(f"None of the {len(bad)} videos can be read. The first is {bad[0]}")
    if not any(item.split == "test" for item in items):
        lines["test"] = lines["val"]
    for split, content in lines.items():
        if content:
            write(output / f"{split}.csv", "\n".join(content) + "\n")
    write(output / "bad_files.txt", "".join(f"{line}\n" for line in bad))
    return {split: len(content) for split, content in lines.items()} | {"bad": len(bad)}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = command_parser(__doc__)
    parser.option("--videos", "folder with train/<class>/, val/<class>/", type=to_path, required=True, metavar="DIR")
    parser.option("--output", "where the csv files go (default: where the videos are)", type=to_path, metavar="DIR")
    text, sides = "re-encode larger videos to this short side", Range(0, 2**12)
    parser.option("--short-side", text, type=in_range(int, sides), default=0, metavar="PIXELS")
    parser.add_argument("--separator", default=" ", help='separator of path and label: " " (default) or ","')
    processes = in_range(int, Range(1, 1024))
    parser.option("--workers", "processes (default: one per core)", type=processes, metavar="N")
    return parser.parse_args(argv)


def run(argv: list[str]) -> None:
    """Prepare the videos and print what was written."""
    args = parse_args(argv)
    counts = prepare_kinetics(
        args.videos,
        args.output,
        short_side=args.short_side,
        separator=args.separator,
        num_workers=args.workers,
    )
    output = args.output or args.videos
    for split in SPLITS:
        if counts[split]:
            print(f"{output}/{split}.csv: {counts[split]} videos")
    if counts["bad"]:
        print(f"{output}/bad_files.txt: {counts['bad']} files cannot be read and are left out")
    print(f"train or test with: DATA.PATH_TO_DATA_DIR {output} DATA.PATH_LABEL_SEPARATOR '{args.separator}'")


main = command(run)
