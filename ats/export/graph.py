"""Networks as files that run without this code: ONNX, and PyTorch's own .pt2 (`torch.export`).

    exported = export(cfg)                          # the network of a config, its weights, ATS.LAYOUT static
    save(exported, "deit_s.onnx")
    run = load("deit_s.onnx")                       # images [B, 3, H, W] -> logits, num_tokens
    compare(exported, run, images)                  # with the network as it is evaluated

Input `images`: normalised by the mean and the standard deviation that the file carries (`Exported.facts`), any batch
size. Outputs: `logits` [B, classes]; with ATS also `num_tokens` [B, L] int64, the tokens that each of the L sampling
blocks kept, prefix tokens counted.

A graph has one shape for all images, so tokens lie in slots, `min(K, slots before)` for each image: rows behind the
kept ones are computed and not looked at. What is saved follows ATS.NUM_TOKENS, not the image.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ats.datasets import input_shape
from ats.datasets.build import image_mean_std
from ats.engine.evaluate import build_trained, check_weights
from ats.errors import UserError, suggest
from ats.models import build_model, has_layouts
from ats.reduction.sampling import REDUCERS

FORMATS = ("onnx", "pt2")
FACTS = "ats.json"  # name of the facts inside a .pt2
# Of this package; random draws from a seeded generator, which no graph has, and reducers merge packed tokens.
SAMPLERS = ("inverse_transform", "topk")
ONNX_LIMIT = 1.8e9  # bytes of weights; a file of 2 GB is more than ONNX can hold, so weights go into one beside it

Runner = Callable[[Tensor], list[Tensor]]


@dataclass
class Exported:
    """A network as one graph.

    Attributes:
        program: the graph with its weights.
        eager: the network as it is evaluated, on packed tokens.
        facts: what who runs it must know; every value is text, as ONNX keeps it.
        slots: rows of each sampling block's output.
    """

    program: ExportedProgram
    eager: nn.Module
    facts: dict[str, str]
    slots: list[int]


class Outputs(nn.Module):
    """A network whose outputs are tensors alone: logits and, where it samples, the counts of kept tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] -> logits [B, classes] and, with ATS, num_tokens [B, L] int64."""
        logits, trace = self.model.forward_tokens(images)
        return (logits, torch.stack([entry.num_tokens for entry in trace], dim=1)) if trace else (logits,)


def export(cfg: CfgNode) -> Exported:
    """The network of `cfg` with the weights that evaluation would load, in evaluation mode, float32, on the CPU.

    Raises:
        UserError: there are no weights, or this network or sampler has no graph of fixed shapes.
    """
    check_exportable(cfg)
    check_weights(cfg, cfg.TEST.CHECKPOINT_FILE_PATH)
    eager = build_trained(cfg, cfg.TEST.CHECKPOINT_FILE_PATH)
    static = cfg.clone()
    static.defrost()
    static.ATS.LAYOUT = "static"
    static.TIMM.PRETRAINED = False  # the weights are there
    model = build_model(static)
    model.load_state_dict(eager.state_dict())
    images = torch.zeros(2, *input_shape(cfg))
    with torch.no_grad():
        # The example's batch of 2 stands for any: 1 would be taken for a constant.
        program = torch.export.export(Outputs(model.eval()), (images,), dynamic_shapes=({0: Dim("batch")},))
    return Exported(program, eager.eval(), facts(cfg), slots_of(model, images))


def check_exportable(cfg: CfgNode) -> None:
    """Refuse, by name, what cannot be exported.

    Raises:
        UserError: says what can.
    """
    name = cfg.MODEL.NAME
    if not has_layouts(name):
        raise UserError(f"MODEL.NAME {name} cannot be exported; ViT (also VIT.DISTILLED True) and timm/<name> can.")
    if cfg.ATS.ENABLE and (cfg.ATS.SAMPLER == "random" or cfg.ATS.SAMPLER in REDUCERS):
        raise UserError(f"ATS.SAMPLER {cfg.ATS.SAMPLER} cannot be exported; {' and '.join(SAMPLERS)} can.")


def facts(cfg: CfgNode) -> dict[str, str]:
    """What who runs the exported file must know of its input and output; lists are JSON."""
    mean, std = image_mean_std(cfg)
    known = {
        "model": cfg.MODEL.NAME,
        "num_classes": cfg.MODEL.NUM_CLASSES,
        "input_size": list(input_shape(cfg)),
        "channels": "RGB, 0 to 1, then minus mean, over std",
        "mean": list(mean),
        "std": list(std),
        "crop_ratio": cfg.DATA.TEST_CROP_RATIO,
        "interpolation": cfg.DATA.TEST_INTERPOLATION,
        "ats_blocks": sorted(cfg.ATS.BLOCKS) if cfg.ATS.ENABLE else [],
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in known.items()}


def slots_of(model: nn.Module, images: Tensor) -> list[int]:
    """Rows of each sampling block's output, for one image."""
    slots: list[int] = []
    blocks = [module for module in model.modules() if getattr(module, "sampler", None) is not None]
    handles = [block.register_forward_hook(lambda _block, _args, out: slots.append(out.slots)) for block in blocks]
    with torch.no_grad():
        model(images[:1])
    for handle in handles:
        handle.remove()
    return slots


def format_of(path: str | Path, wanted: str | None = None) -> str:
    """The format to write `path` in: `wanted`, or what its suffix says.

    Raises:
        UserError: neither is a format, or ONNX without its packages.
    """
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


def save(exported: Exported, path: str | Path, wanted: str | None = None) -> None:
    """Write the graph with its weights and facts; `path` is the old file or the whole new one, whatever happens.

    Weights too large for one ONNX file go into `<path>.data` beside it.
    """
    path = Path(path)
    kind = format_of(path, wanted)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".export_") as folder:
        target = Path(folder) / path.name
        if kind == "onnx":
            save_onnx(exported, target)
        else:
            with open(target, "wb") as file:  # torch wants the suffix .pt2 of a name, not of a file
                torch.export.save(exported.program, file, extra_files={FACTS: json.dumps(exported.facts)})
        for written in sorted(Path(folder).iterdir(), reverse=True):  # the weights before what points to them
            os.replace(written, path.parent / written.name)


def save_onnx(exported: Exported, path: Path) -> None:
    """Translate to ONNX and write; the facts are its metadata."""
    outputs = ["logits", "num_tokens"] if exported.slots else ["logits"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the translator's own parts
        program = torch.onnx.export(
            exported.program,
            dynamo=True,
            input_names=["images"],
            dynamic_shapes=({0: "batch"},),  # dynamic it is already; this is its name
            output_names=outputs,
            custom_translation_table={torch.ops.aten.sort.stable: onnx_stable_sort},
            verbose=False,
        )
    program.model.metadata_props.update(exported.facts)
    num_bytes = sum(value.nbytes for value in exported.program.state_dict.values())
    program.save(path, external_data=num_bytes > ONNX_LIMIT)


def onnx_stable_sort(x: object, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple:
    """A stable sort in ONNX's operators, for which the translator has none. TopK of all entries is one: equal entries
    come in the order of their indices, whatever the direction. It does not know bytes; they are compared as int32.
    """
    from onnx_ir import DataType
    from onnxscript import opset18 as op

    is_byte = x.dtype == DataType.UINT8
    comparable = op.Cast(x, to=DataType.INT32) if is_byte else x
    size = op.Slice(op.Shape(x), [dim], [dim + 1], [0])
    values, indices = op.TopK(comparable, size, axis=dim, largest=int(descending), sorted=1)
    return op.Cast(values, to=DataType.UINT8) if is_byte else values, indices


def load(path: str | Path, wanted: str | None = None) -> Runner:
    """The file as a function: images [B, 3, H, W] float32 -> logits and, with ATS, num_tokens. On the CPU."""
    if format_of(path, wanted) == "pt2":
        with open(path, "rb") as file:
            module = torch.export.load(file).module()
        return torch.no_grad()(lambda images: list(module(images)))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]


@dataclass
class Difference:
    """How far the file is from the network, over some images; of an image, by its logit that is furthest off.

    Attributes:
        num_images: of them. median, largest: distance of an image. scale: largest logit.
        num_other_counts: images of which a block kept another number of tokens.
        num_far: images further off than 1e-3 x scale.
    """

    num_images: int
    median: float
    largest: float
    scale: float
    num_other_counts: int
    num_far: int

    @property
    def is_right(self) -> bool:
        """At most one image in four is far off. Where a sample point lies between two tokens to round-off, the file may
        take the other one; with 200 tokens and 9 blocks that happens to a few images in a hundred.
        """
        return self.num_far <= self.num_images / 4

    def __str__(self) -> str:
        return (
            f"difference of logits {self.largest:.2g} at most, {self.median:.2g} in the median (largest logit "
            f"{self.scale:.2g}); other token counts in {self.num_other_counts} of {self.num_images} images"
        )


def compare(exported: Exported, run: Runner, images: Tensor, batch_sizes: Sequence[int] = (1, 2, 5)) -> Difference:
    """Run the file and the network on `images` [N, 3, H, W], the file in batches of these sizes, in turn."""
    with torch.no_grad():
        logits, trace = exported.eager.forward_tokens(images)
    got, start = [], 0
    while start < len(images):
        size = batch_sizes[len(got) % len(batch_sizes)]
        got.append(run(images[start : start + size]))
        start += size
    distance = (torch.cat([out[0] for out in got]) - logits).abs().nan_to_num(nan=torch.inf).amax(dim=1)
    scale = logits.abs().max()
    other = torch.zeros(len(images), dtype=torch.bool)
    if trace:
        want = torch.stack([entry.num_tokens for entry in trace], dim=1)
        other = (torch.cat([out[1] for out in got]) != want).any(dim=1)
    return Difference(
        num_images=len(images),
        median=distance.median().item(),
        largest=distance.max().item(),
        scale=scale.item(),
        num_other_counts=int(other.sum()),
        num_far=int((distance > 1e-3 * scale).sum()),
    )
