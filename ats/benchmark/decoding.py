"""Reading videos, timed by itself: the loader's decoding of a clip beside a loop that seeks and decodes the same frames
with PyAV and checks nothing.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from fvcore.common.config import CfgNode
from tqdm import tqdm

from ats.datasets.decode import Video, clip_size, frame_indices
from ats.datasets.kinetics import read_csv
from ats.errors import UserError

VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".avi"}


def find_videos(source: str, cfg: CfgNode, *, limit: int = 16) -> list[str]:
    """Paths of at most `limit` of the videos in a folder or csv file, evenly from its whole.

    Raises:
        UserError: there are none.
    """
    if Path(source).is_dir():
        paths = sorted(str(p) for p in Path(source).rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    else:
        separator = cfg.DATA.PATH_LABEL_SEPARATOR
        listing = read_csv(source, separator=separator, num_classes=cfg.MODEL.NUM_CLASSES)
        folder = Path(cfg.DATA.PATH_PREFIX or Path(source).parent)
        paths = [str(folder / os.fsdecode(p)) for p in listing.paths]
    if not paths:
        raise UserError(f"{source} holds no videos ({', '.join(sorted(VIDEO_SUFFIXES))}).")
    return paths[:: -(-len(paths) // limit)]


def write_videos(folder: Path, *, num_videos: int = 4, num_frames: int = 300) -> None:
    """Videos of drifting coloured waves with grain, about as many bits as Kinetics resized to short side 256."""
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
    """The frames shown at `times` (ascending, in seconds): seek, decode up to the last of them, check nothing."""
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
    """Clips per second of the loader's decoding and of the bare loop, one thread each, on the same random clips."""
    data, rng, seconds_of = cfg.DATA, random.Random(cfg.RNG_SEED), {"bare": [], "loader": []}
    for path in tqdm(paths * max(rounds, 2), leave=False, disable=None):
        with Video(path) as video:
            num_video_frames, fps = video.num_frames, video.fps
        size = clip_size(fps, num_frames=data.NUM_FRAMES, sampling_rate=data.SAMPLING_RATE, target_fps=data.TARGET_FPS)
        start = rng.uniform(0, max(num_video_frames - size, 0))
        index = frame_indices(start, size, num_frames=data.NUM_FRAMES, num_video_frames=num_video_frames)

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
    low, *_, high = statistics.quantiles(ratios, n=10)
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
    """`compare_decoding` of the videos in `source`, or of new ones if it is empty."""
    if source:
        return compare_decoding(find_videos(source, cfg), cfg, rounds=rounds)
    with tempfile.TemporaryDirectory() as folder:
        write_videos(Path(folder))
        return compare_decoding(find_videos(folder, cfg), cfg, rounds=rounds)
