"""What runs a network on a CPU, for `peers`: PyTorch, PyTorch compiled, ONNX Runtime and OpenVINO.

An engine takes a network (PyTorch) or its ONNX file (the others) and images, and returns a pass: a function without
arguments that computes the logits of these images, [B, classes]. One-time work, such as compiling, is done before that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ats.compat import inductor_freezing
from ats.errors import UserError
from ats.export.graph import TRANSLATIONS, export_adaptive, save_onnx

Pass = Callable[[], Tensor]


class Engine(NamedTuple):
    """A way to run a network."""

    make: Callable[..., Pass]  # (network or path of its file, images, number of threads) -> pass
    dtypes: tuple[str, ...]  # that it computes in
    networks: tuple[str, ...] = ("dense", "ats static", "ats adaptive")  # that it runs
    reads_file: bool = True
    packages: tuple[str, ...] = ()


def eager(model: nn.Module, x: Tensor, threads: int) -> Pass:
    """The network as it is."""
    return torch.inference_mode()(lambda: model(x))


def compiled(model: nn.Module, x: Tensor, threads: int) -> Pass:
    """torch.compile for inference: Inductor with the weights as constants ("freezing")."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"there is no C++ compiler {compiler}; type: apt-get install g++")
    torch.compiler.reset()
    forward = torch.compile(model)
    with inductor_freezing(), torch.inference_mode():
        forward(x)
    return torch.inference_mode()(lambda: forward(x))


def onnx_runtime(path: Path, x: Tensor, threads: int) -> Pass:
    """ONNX Runtime's CPU provider."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else its threads run on into the next pass
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.float().numpy()}
    names = [session.get_outputs()[0].name]
    return lambda: torch.from_numpy(session.run(names, feed)[0])


def openvino(path: Path, x: Tensor, threads: int, precision: str | None = "f32") -> Pass:
    """OpenVINO's CPU plugin in float32; `precision` None: its default."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    options |= {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    options = _openvino_options(path, list(x.shape), options)
    network = openvino.Core().compile_model(str(path), "CPU", options)
    request, images = network.create_infer_request(), x.float().numpy()
    return lambda: torch.from_numpy(request.infer([images])[0])


def _openvino_options(path: Path, shape: list[int], options: dict[str, object]) -> dict[str, object]:
    """`options` with what OpenVINO 2026.4 needs to run the file: its code generator ("snippets") crashes on MViT, while
    compiling or running. UserError if nothing helps.
    """
    for tried in (options, options | {"SNIPPETS_MODE": "DISABLE"}):
        code = f"""import sys, numpy, openvino
network = openvino.Core().compile_model(sys.argv[1], "CPU", {tried!r})
network.create_infer_request().infer([numpy.zeros({shape}, numpy.float32)])"""
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
        if done.returncode == 0:
            return tried
    reason = (done.stderr.strip().splitlines() or [""])[-1]
    raise UserError(f"OpenVINO cannot run it (exit status {done.returncode}). {reason}")


def openvino_default(path: Path, x: Tensor, threads: int) -> Pass:
    """OpenVINO's CPU plugin in its default precision."""
    return openvino(path, x, threads, precision=None)


BOTH = ("float32", "bfloat16")
FILES = ("onnx", "onnxscript")  # packages that write them
ENGINES = {
    "PyTorch": Engine(eager, BOTH, ("dense", "ats"), reads_file=False),
    # Not ATS: its many graphs, for any number of tokens, take minutes to compile.
    "PyTorch compiled": Engine(compiled, BOTH, ("dense",), reads_file=False),
    "ONNX Runtime": Engine(onnx_runtime, ("float32",), packages=(*FILES, "onnxruntime")),
    "OpenVINO": Engine(openvino, ("float32",), packages=(*FILES, "openvino")),
    "OpenVINO default": Engine(openvino_default, ("bfloat16",), packages=(*FILES, "openvino")),
}


def obstacle(name: str) -> str:
    """Why the engine cannot be used on this machine, and what to type; "" if it can."""
    missing = [package for package in ENGINES[name].packages if find_spec(package) is None]
    if missing:
        return f"not installed; type: pip install {' '.join(missing)}"
    if name == "OpenVINO default" and (precision := default_precision()) != "bfloat16":
        return f"OpenVINO computes in {precision} by default on this CPU, which has no bfloat16: see float32"
    return ""


def default_precision() -> str:
    """OpenVINO's default precision on this CPU: "float32", "bfloat16" or "float16"."""
    import openvino

    name = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    return {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}.get(name, name)


def versions() -> dict[str, str]:
    """Versions of the engines that are installed, PyTorch left out."""
    return {name: version(name) for name in ("onnxruntime", "openvino") if find_spec(name) is not None}


def write_onnx(model: nn.Module, x: Tensor, path: Path) -> Path:
    """Write a network whose shapes do not depend on the images, for images of exactly this shape; returns `path`."""
    # Other attention kernels return strides that the translation to ONNX does not support.
    with warnings.catch_warnings(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")  # from the translator's own parts
        program = torch.onnx.export(
            torch.export.export(model, (x,)),
            dynamo=True,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    program.save(path)
    return path


def write_adaptive(model: nn.Module, x: Tensor, path: Path) -> Path:
    """Write a network with ATS for one image of this shape, with as many rows as it keeps tokens; returns `path`."""
    save_onnx(export_adaptive(model, x.shape[1:]), path)
    return path
