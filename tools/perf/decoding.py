"""Time clip decoding: the loader against a bare PyAV loop that decodes the same frames without checks.

    python tools/perf/decoding.py [FOLDER_OR_CSV] [--cfg FILE] [--rounds N] [KEY VALUE ...]

DATA.NUM_FRAMES and DATA.SAMPLING_RATE set the length of a clip. Without a source, the tool makes videos like those of
Kinetics: h264, 340 x 256 pixels, 10 seconds.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from fvcore.common.config import CfgNode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a clone that is not installed

from command import make_parser, run_tool  # beside this file

from ats.datasets.build import clip_sampling
from ats.datasets.decode import Video
from ats.datasets.folders import files_below
from ats.datasets.kinetics import read_csv
from ats.errors import UserError

VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".avi"}


def find_videos(source: str, cfg: CfgNode, *, limit: int = 16) -> list[str]:
    """Paths of at most `limit` videos of a folder or csv file, evenly spaced.

    Raises:
        UserError: there are none.
    """
    if Path(source).is_dir():
        paths = [os.path.join(source, name) for name in files_below(source, sorted(VIDEO_SUFFIXES), noun="video")]
    else:
        separator = cfg.DATA.PATH_LABEL_SEPARATOR
        listing = read_csv(source, separator=separator, num_classes=cfg.MODEL.NUM_CLASSES)
        folder = Path(cfg.DATA.PATH_PREFIX or Path(source).parent)
        paths = [str(folder / os.fsdecode(p)) for p in listing.paths]
    if not paths:
        raise UserError(f"{source} holds no videos ({', '.join(sorted(VIDEO_SUFFIXES))}).")
    return paths[:: -(-len(paths) // limit)]


def write_videos(folder: Path, *, num_videos: int = 4, num_frames: int = 300) -> None:
    """Write videos of drifting coloured waves with grain, with about the bit rate of Kinetics at short side 256."""
    y, x = np.mgrid[:256, :340]
    for seed in range(num_videos):
        rng = np.random.default_rng(seed)
        frequency, speed = rng.uniform(0.01, 0.08, (3, 2)), rng.uniform(-0.3, 0.3, 3)
        grain = rng.normal(0, 8, (256, 340 + num_frames, 1))
        with av.open(str(folder / f"{seed}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
            for t in range(num_frames):
                waves = [np.sin(y * f[0] + x * f[1] + v * t) for f, v in zip(frequency, speed, strict=True)]
                pixels = 127 + 90 * np.stack(waves, axis=-1) + grain[:, t : t + 340]
                frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


def bare_decode(path: str, times: list[float]) -> np.ndarray:
    """Frames [T, H, W, 3] shown at `times` (seconds, ascending): seek, decode up to the last one, check nothing."""
    wanted, frames = iter(times), []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(int(times[0] / stream.time_base), stream=stream)
        next_time = next(wanted)
        for frame in container.decode(stream):
            while next_time is not None and frame.time >= next_time:
                frames.append(frame.to_ndarray(format="rgb24"))
                next_time = next(wanted, None)
            if next_time is None:
                return np.stack(frames)
    raise UserError(f"{path} ends before {next_time:.2f} s.")


def compare_decoding(paths: list[str], cfg: CfgNode, *, rounds: int) -> dict[str, float]:
    """Clips per second of the loader's decoding and of the bare loop, on the same random clips, one thread each."""
    sampling, rng, seconds_of = clip_sampling(cfg), random.Random(cfg.RNG_SEED), {"bare": [], "loader": []}
    for path in tqdm(paths * max(rounds, 2), leave=False, disable=None):
        with Video(path) as video:
            num_video_frames, fps = video.num_frames, video.fps
        size = sampling.size(fps)
        start = rng.uniform(0, max(num_video_frames - size, 0))
        index = sampling.indices(num_video_frames, size, start)

        def loader(path: str = path, index: list[int] = index) -> None:
            with Video(path) as video:
                video.read(index)

        def bare(path: str = path, times: tuple = tuple((i - 0.5) / fps for i in index)) -> None:
            bare_decode(path, list(times))

        for run in rng.sample([bare, loader], 2):
            begin = time.perf_counter()
            run()
            seconds_of[run.__name__].append(time.perf_counter() - begin)
    ratios = [a / b for a, b in zip(seconds_of["bare"], seconds_of["loader"], strict=True)]
    low, *_, high = statistics.quantiles(ratios, n=10, method="inclusive")  # inclusive: no extrapolation
    return {
        "videos": len(paths),
        "clips": len(ratios),
        "clips_per_second_bare": 1 / statistics.median(seconds_of["bare"]),
        "clips_per_second_loader": 1 / statistics.median(seconds_of["loader"]),
        "loader_over_bare": statistics.median(ratios),
        "p10": low,
        "p90": high,
    }


def benchmark_decoding(source: str, cfg: CfgNode, *, rounds: int) -> dict[str, float]:
    """`compare_decoding` on the videos in `source`, or on generated ones if it is empty."""
    if source:
        return compare_decoding(find_videos(source, cfg), cfg, rounds=rounds)
    with tempfile.TemporaryDirectory() as folder:
        write_videos(Path(folder))
        return compare_decoding(find_videos(folder, cfg), cfg, rounds=rounds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = make_parser(__doc__, source="FOLDER_OR_CSV")
    return run_tool(parser, lambda args, cfg: [benchmark_decoding(args.source, cfg, rounds=args.rounds)], argv)


if __name__ == "__main__":
    sys.exit(main())
