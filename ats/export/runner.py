"""Exported files as functions, and how far they are from the network they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ats.errors import UserError, suggest

if TYPE_CHECKING:
    from ats.export.graph import Exported

FORMATS = ("onnx", "pt2")
FACTS = "ats.json"  # name of the facts inside a .pt2

Runner = Callable[[Tensor], list[Tensor]]


def format_of(path: str | Path, wanted: str | None = None) -> str:
    """The format to write `path` in: `wanted`, or its suffix. UserError if unknown, or packages are missing."""
    name = wanted or Path(path).suffix.removeprefix(".").lower()
    if name not in FORMATS:
        what = f"--format {wanted}" if wanted else f"-o {path}"
        raise UserError(f"{what}: choose .onnx or .pt2 (or --format onnx, --format pt2).{suggest(name, FORMATS)}")
    missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]
    if name == "onnx" and missing:
        raise UserError(
            f"ONNX needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. Type:\n"
            f"  pip install {' '.join(missing)}"
        )
    return name


def check_engine(name: str, *, naming: str = "engine") -> str:
    """`name`, if it is in ENGINES and installed; else a UserError. `naming`: the option that the user typed."""
    if name not in ENGINES:
        raise UserError(f"{naming} {name}: choose from {', '.join(ENGINES)}.{suggest(name, ENGINES)}")
    if find_spec(name) is None:
        raise UserError(f"{naming} {name} is not installed. Type:\n  pip install {name}")
    return name


def load(path: str | Path, wanted: str | None = None, *, engine: str = "onnxruntime") -> Runner:
    """The file as a function: images [B, 3, H, W] float32 -> logits and, with ATS, num_tokens. On the CPU.

    Args:
        wanted: the format, if the suffix does not say. engine: name in ENGINES, what runs an ONNX file.

    Raises:
        UserError: unknown format or engine, or its package is missing. The returned function raises one if it gets
            several images and the file is adaptive.
    """
    if format_of(path, wanted) == "pt2":
        extra = {FACTS: ""}
        with open(path, "rb") as file:
            module = torch.export.load(file, extra_files=extra).module()
        facts, run = json.loads(extra[FACTS]), torch.no_grad()(lambda images: list(module(images)))
    else:
        facts, run = ENGINES[check_engine(engine)](str(path))
    if "adaptive" not in facts:
        return run

    def run_one(images: Tensor) -> list[Tensor]:
        if len(images) != 1:
            raise UserError(
                f"{path} is adaptive and takes one image, not a batch of {len(images)}: run it once per image "
                "(images.split(1)), or export without --adaptive for batches."
            )
        return run(images)

    return run_one


def _onnxruntime(path: str) -> tuple[dict[str, str], Runner]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    return facts, lambda images: [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]


def _openvino(path: str) -> tuple[dict[str, str], Runner]:
    import openvino

    model = openvino.Core().read_model(path)
    facts = model.get_rt_info("framework").value if model.has_rt_info("framework") else {}
    # Some CPUs would compute in bfloat16.
    network = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return facts, lambda images: [torch.from_numpy(out.copy()) for out in network(images.numpy()).values()]


# What runs an ONNX file, by the name of its package: path -> its facts and the file as a function.
ENGINES: dict[str, Callable[[str], tuple[dict[str, str], Runner]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


@dataclass
class Difference:
    """How far the file is from the network, on N images."""

    distance: Tensor  # [N], of the logit that is furthest off, absolute
    scale: Tensor  # largest logit
    has_other_counts: Tensor  # [N] bool, some block kept a different number of tokens

    @property
    def num_far(self) -> int:
        """Images further off than 1e-3 x scale."""
        return int((~(self.distance <= 1e-3 * self.scale)).sum())  # NaN is far from everything

    @property
    def is_right(self) -> bool:
        """At most one image in four is far off. Where a sample point lies on the boundary of two tokens, up to
        round-off, the file may take the other one; with 200 tokens and 9 blocks that happens to a few images in a
        hundred.
        """
        return self.num_far <= len(self.distance) / 4

    def __str__(self) -> str:
        return (
            f"difference of logits {self.distance.max():.2g} at most, {self.distance.median():.2g} in the median "
            f"(largest logit {self.scale:.2g}); other token counts in {self.has_other_counts.sum()} of "
            f"{len(self.distance)} images"
        )


def compare(exported: Exported, run: Runner, images: Tensor, batch_sizes: Sequence[int] | None = None) -> Difference:
    """Run the file and the network on `images` [N, 3, H, W], the file in batches of these sizes, in turn; by default 1,
    2, 5, or only 1 for an adaptive file.
    """
    with torch.no_grad():
        logits, trace = exported.eager.forward_tokens(images)
    ends = torch.tensor(batch_sizes or ((1,) if exported.adaptive else (1, 2, 5))).repeat(len(images)).cumsum(0)
    batches = images.tensor_split(ends[ends < len(images)])
    got_logits, *got_counts = map(torch.cat, zip(*map(run, batches), strict=True))
    distance = (got_logits - logits).abs().nan_to_num(nan=torch.inf).amax(dim=1)
    differs = torch.zeros(len(images), dtype=torch.bool)
    if trace:
        counts = torch.stack([entry.num_tokens for entry in trace], dim=1)
        differs = (got_counts[0] != counts).any(dim=1)
    return Difference(distance, logits.abs().max(), differs)
