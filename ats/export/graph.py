"""Networks as files that run without this code: ONNX, and PyTorch's own .pt2 (`torch.export`).

    exported = export(cfg)                          # the network of a config, its weights, ATS.LAYOUT static
    save(exported, "deit_s.onnx")
    run = load("deit_s.onnx")                       # images [B, 3, H, W] -> logits, num_tokens
    compare(exported, run, images)                  # with the network as it is evaluated

Input `images`: normalised by the mean and the standard deviation that the file carries (`Exported.facts`), any batch
size. Outputs: `logits` [B, classes]; with ATS also `num_tokens` [B, L] int64, the tokens that each of the L sampling
blocks kept, prefix tokens counted.

A graph has one shape for all images, so tokens lie in slots, `min(K, slots before)` for each image: rows after the
kept ones are computed and ignored. The saving follows ATS.NUM_TOKENS, not the image.
"""

from __future__ import annotations

import io
import json
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
from ats.datasets.build import mean_std
from ats.engine.evaluate import build_trained, check_weights
from ats.errors import UserError, suggest
from ats.files import naming, replace
from ats.models import build_model
from ats.models.block import ats_blocks
from ats.reduction import REDUCTIONS

FORMATS = ("onnx", "pt2")
FACTS = "ats.json"  # name of the facts inside a .pt2
ONNX_LIMIT = 1.8e9  # bytes of weights; a file of 2 GB is more than ONNX can hold, so weights go into one beside it

Runner = Callable[[Tensor], list[Tensor]]


@dataclass
class Exported:
    """A network as one graph."""

    program: ExportedProgram  # the graph with its weights
    eager: nn.Module  # the network as it is evaluated, on packed tokens
    facts: dict[str, str]  # what a user of the file must know; as text, for ONNX: lists and numbers are JSON
    slots: dict[int, int]  # sampling block -> rows of its output


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
    static.merge_from_list(["ATS.LAYOUT", "static", "TIMM.PRETRAINED", False])  # the weights are there
    model = build_model(static)
    model.load_state_dict(eager.state_dict())
    images = torch.zeros(2, *input_shape(cfg))
    with torch.no_grad():
        # The example's batch of 2 stands for any: 1 would be taken for a constant.
        program = torch.export.export(Outputs(model.eval()), (images,), dynamic_shapes=({0: Dim("batch")},))
        records = model.forward_tokens(images[:1])[1].records
    slots = {record.block: record.max_tokens for record in records if record.kept is not None}
    mean, std = mean_std(cfg, clips=False)
    facts = {
        "model": cfg.MODEL.NAME,
        "num_classes": cfg.MODEL.NUM_CLASSES,
        "input_size": list(input_shape(cfg)),
        "channels": "RGB, 0 to 1, then minus mean, over std",
        "mean": list(mean),
        "std": list(std),
        "crop_ratio": cfg.DATA.TEST_CROP_RATIO,
        "interpolation": cfg.DATA.TEST_INTERPOLATION,
        "ats_blocks": list(slots),
    }
    facts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    return Exported(program, eager.eval(), facts, slots)


def check_exportable(cfg: CfgNode) -> None:
    """Raise a UserError that names what cannot be exported, and says what can."""
    with torch.device("meta"):
        model = build_model(cfg)
    if "static" not in model.layouts:
        raise UserError(
            f"MODEL.NAME {cfg.MODEL.NAME} cannot be exported; ViT (also VIT.DISTILLED True), PSViT and timm/<name> can."
        )
    for reduction in (block.reduction for block in ats_blocks(model)):
        if not reduction.graphable:
            can = [name for name, kind in REDUCTIONS.items() if kind.graphable]
            raise UserError(f"ATS.SAMPLER {reduction.name} cannot be exported; {', '.join(can)} can.")


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


def save(exported: Exported, path: str | Path, wanted: str | None = None) -> None:
    """Write the graph with its weights and facts; `path` is the old file or the whole new one, whatever happens.
    Weights too large for one ONNX file go into `<path>.data` beside it.
    """
    path, kind = Path(path), format_of(path, wanted)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), TemporaryDirectory(dir=path.parent, prefix=".export_") as folder:
        target = Path(folder) / path.name
        if kind == "onnx":
            save_onnx(exported, target)
        else:
            buffer = io.BytesIO()  # on a full disk, torch's own writer ends the process
            torch.export.save(exported.program, buffer, extra_files={FACTS: json.dumps(exported.facts)})
            target.write_bytes(buffer.getvalue())
        for written in sorted(Path(folder).iterdir(), reverse=True):  # the weights before what points to them
            replace(written, path.parent / written.name)


def save_onnx(exported: Exported, path: Path) -> None:
    """Translate to ONNX and write; the facts are its metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the translator's own parts
        program = torch.onnx.export(
            exported.program,
            dynamo=True,
            input_names=["images"],
            dynamic_shapes=({0: "batch"},),  # dynamic it is already; this is its name
            output_names=["logits", "num_tokens"] if exported.slots else ["logits"],
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
    """How far the file is from the network, on N images."""

    distance: Tensor  # [N], of the logit that is furthest off
    scale: Tensor  # largest logit
    has_other_counts: Tensor  # [N] bool, a block kept another number of tokens

    @property
    def num_far(self) -> int:
        """Images further off than 1e-3 x scale."""
        return int((~(self.distance <= 1e-3 * self.scale)).sum())  # NaN is far from everything

    @property
    def is_right(self) -> bool:
        """At most one image in four is far off. Where a sample point lies between two tokens to round-off, the file may
        take the other one; with 200 tokens and 9 blocks that happens to a few images in a hundred.
        """
        return self.num_far <= len(self.distance) / 4

    def __str__(self) -> str:
        return (
            f"difference of logits {self.distance.max():.2g} at most, {self.distance.median():.2g} in the median "
            f"(largest logit {self.scale:.2g}); other token counts in {self.has_other_counts.sum()} of "
            f"{len(self.distance)} images"
        )


def compare(exported: Exported, run: Runner, images: Tensor, batch_sizes: Sequence[int] = (1, 2, 5)) -> Difference:
    """Run the file and the network on `images` [N, 3, H, W], the file in batches of these sizes, in turn."""
    with torch.no_grad():
        logits, *counts = Outputs(exported.eager)(images)
    ends = torch.tensor(batch_sizes).repeat(len(images)).cumsum(0)
    batches = images.tensor_split(ends[ends < len(images)])
    got_logits, *got_counts = map(torch.cat, zip(*map(run, batches), strict=True))
    distance = (got_logits - logits).abs().nan_to_num(nan=torch.inf).amax(dim=1)
    differs = [(got != want).any(dim=1) for got, want in zip(got_counts, counts, strict=True)]
    return Difference(distance, logits.abs().max(), sum(differs, torch.zeros(len(images), dtype=torch.bool)))
