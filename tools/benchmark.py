"""Time ATS against its dense network: the same weights and images, in one process, the two in turn.

    python tools/benchmark.py --cfg configs/ImageNet/DeiT_S.yaml --batch-size 8 [KEY VALUE ...]

With TEST.CHECKPOINT_FILE_PATH and DATA.PATH_TO_DATA_DIR it uses those weights and images, otherwise random ones (with
random weights hardly a token is dropped: the speed then says little). Images are read before the clock starts. Prints
for each variant GFLOPs and milliseconds per image, and for the pair the median of the ratios of neighbouring runs:

    speed-up    dense time / ATS time
    efficiency  speed-up / (dense GFLOPs / ATS GFLOPs); 1 means that seconds follow FLOPs

Reading videos is timed by itself, again in turn: the loader's decoding of a clip against a loop that seeks and decodes
the same frames with PyAV and checks nothing:

    python tools/benchmark.py --decode [FOLDER_OR_CSV] [--cfg FILE] [KEY VALUE ...]

Clips are as long as DATA.NUM_FRAMES and DATA.SAMPLING_RATE say. Without videos it makes some of Kinetics' size (h264,
340 x 256 pixels, 10 seconds).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ats.config import CfgNode, load_config  # noqa: E402
from ats.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn


def build(cfg: CfgNode, device: str) -> nn.Module:
    """The network of `cfg` in evaluation, with its weights if they are given."""
    import torch

    from ats.checkpoint import load_weights
    from ats.models import build_model

    torch.manual_seed(cfg.RNG_SEED)
    model = build_model(cfg)
    if cfg.TEST.CHECKPOINT_FILE_PATH:
        load_weights(model, cfg.TEST.CHECKPOINT_FILE_PATH)
    return model.to(device).eval()


def read_images(cfg: CfgNode, batch_size: int) -> Tensor:
    """[batch_size, 3, H, W] from the evaluation data, repeated if there are fewer; random without a data folder."""
    import torch

    from ats.datasets import build_loader

    if not cfg.DATA.PATH_TO_DATA_DIR:
        return torch.randn(batch_size, 3, cfg.DATA.TEST_CROP_SIZE, cfg.DATA.TEST_CROP_SIZE)
    dataset = build_loader(cfg, "test").dataset
    step = max(len(dataset) // batch_size, 1)
    return torch.stack([dataset[(i * step) % len(dataset)].x for i in range(batch_size)])


def seconds(model: nn.Module, x: Tensor) -> float:
    """Wall-clock time of one forward pass."""
    import torch

    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(cfg: CfgNode, *, batch_size: int, rounds: int) -> dict[str, float]:
    """Figures of ATS and dense on one batch; two warm-up rounds are not counted."""
    import torch
    from tqdm import trange

    from ats.engine.device import select_device
    from ats.flops import gflops

    device = select_device(cfg.DEVICE)
    dense_cfg = cfg.clone()
    dense_cfg.defrost()
    dense_cfg.ATS.ENABLE = False
    sparse, dense = build(cfg, device), build(dense_cfg, device)
    x = read_images(cfg, batch_size).to(device)
    with torch.inference_mode():
        cost = gflops(sparse, sparse.forward_tokens(x)[1], x.shape)
        times = [(seconds(dense, x), seconds(sparse, x)) for _ in trange(rounds + 2, leave=False, disable=None)][2:]
    dense_times, sparse_times = (torch.tensor(column, dtype=torch.float64) for column in zip(*times, strict=True))
    ratios = dense_times / sparse_times
    flop_ratio = cost.dense / cost.as_run.mean().item()
    return {
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "gflops_dense": cost.dense,
        "gflops_ats": cost.as_run.mean().item(),
        "ms_dense": 1e3 * dense_times.median().item() / batch_size,
        "ms_ats": 1e3 * sparse_times.median().item() / batch_size,
        "speedup": ratios.median().item(),
        "speedup_p10": ratios.quantile(0.1).item(),
        "speedup_p90": ratios.quantile(0.9).item(),
        "flop_ratio": flop_ratio,
        "efficiency": ratios.median().item() / flop_ratio,
    }


VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".avi"}


def find_videos(source: str, cfg: CfgNode, *, limit: int = 16) -> list[str]:
    """Paths of at most `limit` of the videos in a folder or csv file, evenly from its whole.

    Raises:
        UserError: there are none.
    """
    from ats.datasets.kinetics import read_csv

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
    import av
    import numpy as np

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
    import av
    import numpy as np

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
    from tqdm import tqdm

    from ats.datasets.decode import Video, clip_size, frame_indices

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


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", help="config with ATS.ENABLE True")
    parser.add_argument("--decode", nargs="?", const="", metavar="FOLDER_OR_CSV", help="time the decoding of clips")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], help="images per forward pass")
    parser.add_argument("--rounds", type=int, default=20, help="timed passes of each variant")
    parser.add_argument("overrides", nargs="*", help="KEY VALUE ...")
    args = parser.parse_args(argv)
    try:
        cfg = load_config(args.cfg, args.overrides)
        if args.decode is not None:
            rows = [benchmark_decoding(args.decode, cfg, rounds=args.rounds)]
        elif args.cfg is None:
            raise UserError("--cfg FILE is missing: which network? Or type --decode to time the reading of videos.")
        elif not cfg.ATS.ENABLE:
            raise UserError(f"{args.cfg} has ATS.ENABLE False: there is nothing to compare. Add ATS.ENABLE True.")
        else:
            rows = [compare(cfg, batch_size=size, rounds=args.rounds) for size in args.batch_size]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from tabulate import tabulate

    print(tabulate(rows, headers="keys", floatfmt=".4g"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
