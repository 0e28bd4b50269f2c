"""tools/demo_video.py: only frames are shuffled, the demo writes what it says, pictures show what is kept."""

from __future__ import annotations

import json

import demo
import demo_video
import numpy as np
import pytest
import torch
from PIL import Image

from ats.checkpoint import save_safetensors
from ats.cli import make_moving_digits
from ats.config import load_config
from ats.datasets import Sample
from ats.models import build_model
from ats.visualize import BlockView, animate, draw_kept_tokens, fade
from ats.visualize.pictures import FADED

pytestmark = pytest.mark.long


def test_shuffled_frames():
    """The same frames in another order, which follows from the clip's index alone and not from its batch."""
    x, index = torch.rand(5, 3, 8, 4, 4), torch.tensor([7, 1, 30, 2, 9])
    batch = Sample(x.clone(), index, index, [""] * 5)
    [first] = demo_video.Shuffled([batch])
    [again] = demo_video.Shuffled([batch])
    assert torch.equal(first.x, again.x)
    assert torch.equal(batch.x, x)
    orders = []
    for clip, shuffled in zip(x, first.x, strict=True):
        same = (clip[:, :, None] == shuffled[:, None]).flatten(3).all(-1).all(0)  # [old frame, new frame]
        assert (same.sum(0) == 1).all()
        assert (same.sum(1) == 1).all()
        orders.append(tuple(same.int().argmax(0).tolist()))
    assert len(set(orders)) == 5
    assert tuple(range(8)) not in orders
    [part] = demo_video.Shuffled([Sample(x[2:4], index[2:4], index[2:4], ["", ""])])
    assert torch.equal(part.x, first.x[2:4])


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """The demo with twenty videos, three rows and untrained weights."""
    folder = tmp_path_factory.mktemp("demo")
    splits = make_moving_digits.split_digits(seed=0)
    few = {split: make_moving_digits.Digits(*(a[:20] for a in digits)) for split, digits in splits.items()}
    torch.manual_seed(0)
    for name in ("xvit_dense", "xvit_ats"):
        model = build_model(load_config(demo.CONFIGS / "Digits" / "XViT.yaml"))
        save_safetensors(folder / f"{name}.safetensors", model.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_moving_digits, "NUM_FRAGMENTS", 50)
        patch.setattr(make_moving_digits, "split_digits", lambda seed: few)
        patch.setattr(demo, "weights_of", lambda row: folder / f"{row.weights}.safetensors")
        patch.setattr(demo_video, "ROWS", [demo_video.ROWS[i] for i in (0, 2, 6)])
        small = {"train_per_digit": 1, "val_per_digit": 1, "num_workers": 0}
        make = make_moving_digits.make_moving_digits
        patch.setattr(demo_video, "make_moving_digits", lambda output: make(output, **small))
        assert demo_video.main(["--data", str(folder / "data"), "--output", str(folder / "out")]) == 0
        yield folder / "out"


def test_demo_writes_table_and_numbers(small_demo):
    names = [demo_video.make_rows("XViT")[i].name for i in (0, 2, 6)]
    results = json.loads((small_demo / "results.json").read_text())
    lines = (small_demo / "table.md").read_text().splitlines()
    assert list(results) == names
    for line, (name, result) in zip(lines[2:], results.items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:3] == [name, f"{result['top1']:.2f}", f"{result['shuffled']['top1']:.2f}"]
        assert cells[3] == f"{result['gflops']['mean']:.4g}"
        assert result["video"]["num_videos"] == result["shuffled"]["video"]["num_videos"] == 20
    dense, *with_ats = (results[name] for name in names)
    assert dense["gflops"]["mean"] == dense["gflops"]["dense"] > max(r["gflops"]["mean"] for r in with_ats)
    assert with_ats[0]["tokens_per_block"].keys() == {str(block) for block in range(5, 12)}


def test_demo_draws(small_demo):
    """A strip, and an animation of all frames with a column per clip and four rows."""
    with Image.open(small_demo / "kept_tokens.png") as strip:
        assert min(strip.size) > 500
    with Image.open(small_demo / "kept_tokens.gif") as animation:
        assert animation.n_frames == 8
        assert animation.size == (6 * (56 * 2 + 8), 4 * (56 * 2 + 8))


def test_missing_weights_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "weights_of", lambda row: tmp_path / "weights" / f"{row.weights}.safetensors")
    cfg = demo.row_config(demo_video.ROWS[1], data=tmp_path, output=tmp_path)

    def run(**folders) -> None:
        demo.load_model(cfg)

    assert demo.run_demo(run, about="", data="data", output="out", argv=[]) == 1
    assert capsys.readouterr().err == f"error: No checkpoint file {tmp_path / 'weights' / 'xvit_dense.safetensors'}.\n"


def test_pictures_fade_what_each_frame_dropped(tmp_path):
    """Two clips of two frames, patches of 4 x 4: kept ones stay as they are, the others are faded."""
    clips = torch.rand(2, 3, 2, 8, 8)
    patches_kept = [[0, 3], [1], [0, 1, 2, 3], []]  # clip 0: frames 0 and 1; clip 1: frames 0 and 1
    kept = torch.tensor([[patch in patches for patch in range(4)] for patches in patches_kept]).reshape(2, 2, 2, 2)
    shown = fade(clips, kept)
    for number, patches in enumerate(patches_kept):
        for patch in range(4):
            area = patch_area(patch)
            before, after = clips[number // 2, :, number % 2][area], shown[number // 2, :, number % 2][area]
            torch.testing.assert_close(after, before if patch in patches else before * FADED + 1 - FADED)
    view = BlockView(5, kept.flatten(1).sum(1), 8, kept, torch.zeros(2, 2, 2, 2))
    paths = [
        draw_kept_tokens(tmp_path / "a.png", clips, [view], captions=["a", "b"]),
        animate(tmp_path / "a.gif", torch.stack([clips, shown]), scale=4),
    ]
    assert all(path.stat().st_size > 100 for path in paths)
    with Image.open(paths[1]) as animation:  # clip 1, frame 0: kept whole, so both rows are the same
        pixels = torch.from_numpy(np.array(animation.convert("RGB")))
    assert torch.equal(pixels[:40, 40:], pixels[40:, 40:])
    assert not torch.equal(pixels[:40, :40], pixels[40:, :40])


def patch_area(patch: int) -> tuple[slice, slice, slice]:
    """[3, H, W] index of a patch of a 2 x 2 grid of 4 x 4 pixels."""
    row, column = divmod(patch, 2)
    return slice(None), slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
