"""Time ATS against its dense network: the same weights and images, in one process, the two in turn.

    python tools/benchmark.py --cfg configs/ImageNet/DeiT_S.yaml --batch-size 8 [KEY VALUE ...]

With TEST.CHECKPOINT_FILE_PATH and DATA.PATH_TO_DATA_DIR it uses those weights and images, otherwise random ones (with
random weights hardly a token is dropped: the speed then says little). Images are read before the clock starts. Prints
for each variant GFLOPs and milliseconds per image, and for the pair the median of the ratios of neighbouring runs:

    speed-up    dense time / ATS time
    efficiency  speed-up / (dense GFLOPs / ATS GFLOPs); 1 means that seconds follow FLOPs
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ats.config import CfgNode, load_config  # noqa: E402
from ats.errors import UserError  # noqa: E402

if TYPE_CHECKING:
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


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, help="config with ATS.ENABLE True")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], help="images per forward pass")
    parser.add_argument("--rounds", type=int, default=20, help="timed passes of each variant")
    parser.add_argument("overrides", nargs="*", help="KEY VALUE ...")
    args = parser.parse_args(argv)
    try:
        cfg = load_config(args.cfg, args.overrides)
        if not cfg.ATS.ENABLE:
            raise UserError(f"{args.cfg} has ATS.ENABLE False: there is nothing to compare. Add ATS.ENABLE True.")
        rows = [compare(cfg, batch_size=size, rounds=args.rounds) for size in args.batch_size]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from tabulate import tabulate

    print(tabulate(rows, headers="keys", floatfmt=".4g"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
