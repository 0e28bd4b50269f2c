"""Networks as files that run without this code: ONNX, and PyTorch's own .pt2 (`torch.export`).

    exported = export(cfg)                          # the network of a config, its weights, ATS.LAYOUT static
    save(exported, "deit_s.onnx")
    run = load("deit_s.onnx")                       # images [B, 3, H, W] -> logits, num_tokens
    compare(exported, run, images)                  # with the network as it is evaluated

Input `images`: normalised by the mean and the standard deviation that the file carries (`Exported.facts`). Outputs:
`logits` [B, classes]; with ATS also `num_tokens` [B, L] int64, the tokens that each of the L sampling blocks kept,
prefix tokens counted. Files come in two kinds:

* static (`export(cfg)`): any batch size, one shape for all images. Each image has `min(K, slots before)` slots for
  tokens; rows after the kept ones are computed and ignored. The saving depends on ATS.NUM_TOKENS, not on the image.
* adaptive (`export(cfg, adaptive=True)`): one image at a time, B is 1. Dropped tokens leave the tensors, so an easy
  image takes less time than a hard one.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from ats.datasets import input_shape
from ats.datasets.build import preprocessing
from ats.datasets.class_names import class_names, folders_of_classes
from ats.engine.evaluate import build_trained, check_weights
from ats.errors import UserError
from ats.export.runner import FACTS, Difference, Runner, check_engine, compare, format_of, load
from ats.files import naming, replace
from ats.models import build_model
from ats.models.block import ats_blocks
from ats.reduction import REDUCTIONS
from ats.tokens import SINGLE

__all__ = [
    "Difference",
    "Exported",
    "Runner",
    "check_engine",
    "check_exportable",
    "compare",
    "export",
    "export_adaptive",
    "format_of",
    "load",
    "save",
]

ONNX_LIMIT = 1.8e9  # bytes of weights; ONNX files stay below 2 GB, so larger weights go into a file beside it


@dataclass
class Exported:
    """A network as one graph."""

    program: ExportedProgram  # the graph with its weights
    eager: nn.Module  # the network as it is evaluated, on packed tokens
    facts: dict[str, str]  # what a user of the file must know; as text, for ONNX: lists and numbers are JSON
    slots: dict[int, int]  # sampling block -> rows of its output; in an adaptive graph, the maximum
    adaptive: bool = False  # one image at a time, as many rows as it keeps tokens


class Outputs(nn.Module):
    """A network that returns tensors only: logits and, where it samples, the counts of kept tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] -> logits [B, classes] and, with ATS, num_tokens [B, L] int64."""
        logits, trace = self.model.forward_tokens(images)
        return (logits, torch.stack([entry.num_tokens for entry in trace], dim=1)) if trace else (logits,)


def export(cfg: CfgNode, *, adaptive: bool = False) -> Exported:
    """The network of `cfg` with the weights that evaluation would load, in evaluation mode, float32, on the CPU.

    Raises:
        UserError: there are no weights, or this network or sampler has no such graph.
    """
    check_exportable(cfg, adaptive=adaptive)
    check_weights(cfg, cfg.TEST.CHECKPOINT_FILE_PATH)
    eager = build_trained(cfg, cfg.TEST.CHECKPOINT_FILE_PATH).eval()
    exported = export_adaptive(eager, input_shape(cfg)) if adaptive else _export_static(cfg, eager)
    folders = folders_of_classes(cfg)
    exported.facts |= _as_text(
        model=cfg.MODEL.NAME,
        num_classes=cfg.MODEL.NUM_CLASSES,
        class_names=class_names(cfg),
        class_folders=folders if len(folders) == cfg.MODEL.NUM_CLASSES else [],
        channels="RGB, 0 to 1, then minus mean, over std",
        **preprocessing(cfg),
    )
    return exported


def _export_static(cfg: CfgNode, eager: nn.Module) -> Exported:
    static = cfg.clone()
    static.defrost()
    static.merge_from_list(["ATS.LAYOUT", "static", "TIMM.PRETRAINED", False])  # weights come from `eager`
    model = build_model(static)
    model.load_state_dict(eager.state_dict())
    shape = input_shape(cfg)
    images = torch.zeros(2, *shape)
    with torch.no_grad():
        # The example's batch of 2 stands for any size; 1 would become a constant.
        program = _graph(model.eval(), images, dynamic_shapes=({0: Dim("batch")},))
        records = model.forward_tokens(images[:1])[1].records
    slots = {record.block: record.max_tokens for record in records if record.kept is not None}
    return Exported(program, eager, _as_text(input_size=list(shape), ats_blocks=list(slots)), slots)


def export_adaptive(model: nn.Module, input_shape: Sequence[int]) -> Exported:
    """A network as a graph for one image, in which dropped tokens cost nothing.

    What `ATSBlock.imposed` keeps becomes part of the graph, which still scores and samples.

    Args:
        model: with ATS, float32, on the CPU, in any layout; it is put in evaluation mode. input_shape: [3, H, W].

    Raises:
        UserError: nothing in it samples, or this network or sampler has no such graph.
    """
    _check(model, type(model).__name__, adaptive=True)
    images, layout = torch.zeros(1, *input_shape), model.layout
    with torch.no_grad():
        records = model.eval().forward_tokens(images)[1].records
        model.layout = SINGLE  # type: ignore[assignment]
        try:
            program = _graph(model, images)
        finally:
            model.layout = layout
    most = {record.block: record.max_tokens for record in records if record.kept is not None}
    facts = _as_text(input_size=list(input_shape), ats_blocks=list(most), adaptive=True, batch_size=1)
    return Exported(program, model, facts, most, adaptive=True)


def _graph(model: nn.Module, images: Tensor, **options: Any) -> ExportedProgram:
    # With a mask, other attention kernels return strides that the translation to ONNX does not support.
    with sdpa_kernel(SDPBackend.MATH):
        return torch.export.export(Outputs(model), (images,), **options)


def _as_text(**facts: object) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def check_exportable(cfg: CfgNode, *, adaptive: bool = False) -> None:
    """Raise a UserError that names what cannot be exported, and says what can."""
    with torch.device("meta"):
        model = build_model(cfg)
    _check(model, f"MODEL.NAME {cfg.MODEL.NAME}", adaptive=adaptive)


def _check(model: nn.Module, name: str, *, adaptive: bool) -> None:
    if "static" not in getattr(model, "layouts", ()):
        raise UserError(f"{name} cannot be exported; ViT (also VIT.DISTILLED True), PSViT and timm/<name> can.")
    reductions = [block.reduction for block in ats_blocks(model)]
    for reduction in reductions:
        if not reduction.graphable:
            can = [name for name, kind in REDUCTIONS.items() if kind.graphable]
            raise UserError(f"ATS.SAMPLER {reduction.name} cannot be exported; {', '.join(can)} can.")
    if adaptive and not reductions:
        raise UserError(
            f"{name} without ATS has no adaptive file: it keeps all tokens of every image. Set ATS.ENABLE True, or "
            "leave out --adaptive."
        )


def save(exported: Exported, path: str | Path, wanted: str | None = None) -> None:
    """Write the graph with its weights and facts, atomically: `path` is the old file or the complete new one. Weights
    too large for one ONNX file go into `<path>.data` beside it.
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
        for written in sorted(Path(folder).iterdir(), reverse=True):  # the weights before the file that points to them
            replace(written, path.parent / written.name)


def save_onnx(exported: Exported, path: Path) -> None:
    """Translate to ONNX and write; the facts are its metadata."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it reports constants it does not fold
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):  # as in the graph, see `_graph`
        warnings.simplefilter("ignore")  # from the translator's own parts
        try:
            program = torch.onnx.export(
                exported.program,
                dynamo=True,
                input_names=["images"],
                # Only names the dimension, which is dynamic already.
                dynamic_shapes=None if exported.adaptive else ({0: "batch"},),
                output_names=["logits", "num_tokens"] if exported.slots else ["logits"],
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise UserError(
                f"PyTorch cannot translate this network to ONNX ({reason}). Export it to a .pt2 file instead."
            ) from error
    if exported.adaptive:
        _fold_parts_of_weights(program.model)
    program.model.metadata_props.update(exported.facts)
    num_bytes = sum(value.nbytes for value in exported.program.state_dict.values())
    program.save(path, external_data=num_bytes > ONNX_LIMIT)


def _fold_parts_of_weights(model: Any) -> None:
    """Turn each part of a weight that blocks read into its own weight: quantisation does not look through a Slice."""
    from onnx_ir.passes.common import DeduplicateInitializersPass
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    folds = ("Slice", "Concat")
    fold_constants(model, should_fold=lambda node: True if node.op_type in folds else None, output_size_limit=2**31)
    remove_unused_nodes(model)
    DeduplicateInitializersPass(size_limit=2**31)(model)


def onnx_stable_sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple:
    """A stable sort in ONNX operators; the translator has none. By ONNX's rules TopK of all entries is stable: equal
    entries keep the order of their indices. OpenVINO breaks this rule, so ties between bytes (the masks of kept rows)
    are broken by their places; they are compared as int32, since TopK does not take bytes.
    """
    from onnx_ir import DataType
    from onnxscript import opset18 as op

    size = op.Slice(op.Shape(x), [dim], [dim + 1], [0])
    if x.dtype != DataType.UINT8:
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)
    places = op.Cast(op.Range(0, op.Squeeze(size), 1), to=DataType.INT32)
    ranks = op.Mul(op.Cast(x, to=DataType.INT32), op.Cast(size, to=DataType.INT32))
    ranks = op.Sub(ranks, places) if descending else op.Add(ranks, places)
    _, indices = op.TopK(ranks, size, axis=dim, largest=int(descending), sorted=1)
    return op.GatherElements(x, indices, axis=dim), indices


def onnx_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention [..., N, D] as plain products, which engines fuse. The translator's own version computes shapes at run
    time where N depends on the image, and scales queries and keys.
    """
    from onnx_ir import DataType
    from onnxscript import opset18 as op

    if is_causal or enable_gqa:  # no network here asks for these
        raise NotImplementedError("attention with is_causal or enable_gqa has no translation to ONNX here")
    axes = [*range(len(key.shape) - 2), -1 % len(key.shape), -2 % len(key.shape)]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = op.Mul(op.MatMul(query, op.Transpose(key, perm=axes)), op.CastLike(scale, query))
    if attn_mask is not None and attn_mask.dtype == DataType.BOOL:
        logits = op.Where(attn_mask, logits, op.CastLike(float("-inf"), query))
    elif attn_mask is not None:
        logits = op.Add(logits, attn_mask)
    return op.MatMul(op.Softmax(logits, axis=-1), value)


# Operators that PyTorch's own translator lacks, or translates badly.
TRANSLATIONS: dict[Callable, Callable] = {
    torch.ops.aten.sort.stable: onnx_stable_sort,
    torch.ops.aten.scaled_dot_product_attention.default: onnx_attention,
}
