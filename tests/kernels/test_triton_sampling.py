"""The sampling kernel keeps what the plain version keeps: by Triton's interpreter here, on the chip where there is one;
and it builds for GPUs that are not here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_triton_scores
import torch

from ats.reduction import Candidates
from ats.reduction.inverse_transform import official_rule

pytest.importorskip("triton", reason="Triton has no package for this platform")


def cases(size: int, *, device: str = "cpu") -> list[tuple[Candidates, int]]:
    """Random and degenerate scores of up to `size` candidates, with numbers of sample points."""
    generator = torch.Generator().manual_seed(size)
    scores = torch.rand(9, size, generator=generator) ** 4
    scores[1], scores[2], scores[3] = torch.nan, 0, 0.25
    scores[4, size // 2], scores[5, size // 2] = torch.nan, torch.inf
    scores[6, : size // 2] = 0  # some tokens without mass
    scores[7] = scores[7, :1].expand(size) * (torch.arange(size) % 3 + 1)  # ties
    lengths = torch.randint(1, size + 1, (9,), generator=generator)
    lengths[:2], lengths[8] = size, 1
    scores[torch.arange(size) >= lengths[:, None]] = 0
    return [
        (
            Candidates(
                scores.to(device),
                lengths=lengths.to(device),
                max_tokens=full_length,
                num_positions=size,
                position=lambda: torch.arange(size, device=device).expand(9, -1),
            ),
            points,
        )
        # where full_length == size some sequences are complete, else none is
        for points, full_length in ((1, size), (size // 2 + 1, size), (size // 2 + 1, 0), (2 * size, 0))
    ]


def plain_rule(candidates: Candidates, points: int) -> torch.Tensor:
    """What PyTorch's operations keep."""
    return official_rule(candidates, points)


def compare(sizes: tuple[int, ...], *, device: str = "cpu") -> None:
    """The kernel on `device` against the plain version on the CPU, exactly."""
    from ats.kernels.triton_sampling import official_rule

    for size in sizes:
        for (here, points), (there, _) in zip(cases(size), cases(size, device=device), strict=True):
            want = plain_rule(here, points)
            scores = torch.nn.functional.pad(there.scores, (2, 0), value=1)[:, 2:]  # a view, as behind prefix tokens
            kept = official_rule(scores, there.lengths, there.full_length, points)
            assert torch.equal(kept.cpu(), want), (size, points, (kept.cpu() != want).nonzero().tolist())
            assert want.any(dim=1).all()


def build(capability: int, block: int) -> None:
    """The kernel as machine code for an NVIDIA GPU of that compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ats.kernels.triton_sampling import _official_rule

    pointers = {"scores": "*fp32", "lengths": "*i64", "keep": "*i1"}
    numbers = dict.fromkeys(("num_candidates", "score_row", "full_length", "num_points"), "i32")
    source = ASTSource(
        fn=_official_rule,
        signature=pointers | numbers | {"BLOCK": "constexpr"},
        constexprs={"BLOCK": block},
    )
    options = {"num_warps": max(block // 64, 1), "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(built.asm["cubin"]) > 1000


@pytest.mark.long
def test_interpreted_kernels_agree_with_the_plain_versions(tmp_path):
    """The sampler exactly: NaN, infinity, no mass, equal scores, ties, one candidate, padding, several sizes of block.
    The scores to round-off (test_triton_scores.py). In a process of its own: Triton asks whether to interpret as it is
    imported.
    """
    code = "import test_triton_sampling as a, test_triton_scores as b; a.compare((1, 2, 6, 19)); b.compare()"
    here = Path(__file__)
    paths = os.pathsep.join([str(here.parents[2]), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_kernels_build_for_a_gpu(tmp_path, monkeypatch):
    """For compute capability 9.0 and the sizes of DeiT-S: machine code comes out, on any machine."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    build(90, 256)
    test_triton_scores.build()


@pytest.mark.gpu
def test_kernel_keeps_the_same_tokens_on_a_gpu():
    compare((1, 2, 7, 33, 196, 577, 4096), device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_without_a_gpu_the_plain_version_samples():
    """Nothing of Triton is asked of tensors on a CPU."""
    from ats.kernels.triton_sampling import try_official_rule

    candidates, points = cases(8)[0]
    assert try_official_rule(candidates.scores, candidates.lengths, candidates.full_length, points) is None


def test_a_kernel_that_cannot_be_built_is_said_once(monkeypatch, caplog):
    """Without a C compiler, say: a warning, and the plain version from then on."""
    from ats.kernels import triton_sampling

    class OnGPU(torch.Tensor):
        is_cuda = True

    def broken(*_args):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_sampling, "official_rule", broken)
    monkeypatch.setattr(triton_sampling, "_failed", False)
    candidates, points = cases(8)[0]
    scores = candidates.scores.as_subclass(OnGPU)
    for _ in range(2):
        arguments = (scores, candidates.lengths, candidates.full_length, points)
        assert triton_sampling.try_official_rule(*arguments) is None
    assert caplog.text.count("Failed to find C compiler") == 1
