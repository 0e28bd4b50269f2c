"""The scoring kernels give the plain version's scores: on the chip where there is one, elsewhere by Triton's
interpreter; they build for GPUs that are not here. The latter two are run by test_triton_sampling.py.
"""

from __future__ import annotations

import pytest
import torch

from ats.reduction.scores import _plain_scores
from ats.tokens import RaggedTokens

pytest.importorskip("triton", reason="Triton has no package for this platform")


def compare(*, device: str = "cpu") -> None:
    """Sequences of 1 to 70 tokens, 24 channels a head, in each precision and layout; keys and values as the host's
    joint projection leaves them, one after the other.
    """
    from ats.kernels.triton_scores import cls_scores

    generator = torch.Generator().manual_seed(0)
    for layout in ("packed", "static"):
        tokens = RaggedTokens.from_dense(torch.zeros(3, 70, 1, device=device), 1, layout=layout)
        keep = torch.arange(70) < torch.tensor([[41], [70], [1]])
        tokens = tokens.keep(keep.to(device), max_tokens=70)[0]
        rows = tokens.layout.total
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            q = torch.randn(3, 2, 24, generator=generator).to(device, dtype)
            k, v = torch.randn(rows, 2, 2, 24, generator=generator).to(device, dtype).unbind(1)
            k[1, 1] *= 30  # one token takes nearly all attention
            for score, value in (("cls_attention_value_norm", v), ("cls_attention", None)):
                want = _plain_scores(score, tokens, q, k, v, scale=0.3, queries=None, bias=None)
                want = want.masked_fill(~tokens.layout.mask[:, 1:], 0)
                got = cls_scores(
                    q, k, value, start=tokens.layout.start, lengths=tokens.layout.lengths,
                    longest=tokens.layout.longest, scale=0.3,
                )  # fmt: skip
                assert got.dtype == torch.float32
                torch.testing.assert_close(got[:, 1:], want, rtol=1e-5, atol=1e-6)
        if layout == "packed":  # NaN stays in its sequence
            k[0, 0, 0] = torch.nan
            got = cls_scores(
                q, k, v, start=tokens.layout.start, lengths=tokens.layout.lengths, longest=70, scale=0.3
            )  # fmt: skip
            assert got[0, :41].isnan().all()
            assert got[1:].isfinite().all()


def build() -> None:
    """Machine code of both kernels for compute capability 9.0: DeiT-S in bfloat16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ats.kernels.triton_scores import TILE, _logits, _scores

    numbers = ["longest", "head_dim", "q_row", "q_head", "k_row", "k_head", "v_row", "v_head"]
    tensors = dict.fromkeys("qkv", "*bf16") | {"start": "*i64", "lengths": "*i64"}
    tensors |= {"logits": "*fp32", "norms": "*fp32", "scale": "fp32"}
    constants = {"TILE": TILE, "WIDTH": 64, "WITH_NORM": True, "num_heads": 6}
    kernels = [(_logits, tensors | dict.fromkeys(numbers, "i32"), constants)]
    tensors = {"logits": "*fp32", "norms": "*fp32", "lengths": "*i64", "scores": "*fp32"}
    constants = {"BLOCK": 256, "WITH_NORM": True, "num_heads": 6}
    kernels += [(_scores, tensors | {"longest": "i32"}, constants)]
    for kernel, signature, constants in kernels:
        source = ASTSource(fn=kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
        built = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True}
        )
        assert len(built.asm["cubin"]) > 1000


@pytest.mark.gpu
def test_kernels_give_the_same_scores_on_a_gpu():
    compare(device="cuda")


def test_what_the_kernels_do_not_take(monkeypatch, caplog):
    """Float64, channels apart, too many tokens, a CPU: None. A kernel that cannot be built is said once."""
    from ats.kernels import triton_scores

    class OnGPU(torch.Tensor):
        is_cuda = True

    def ask(dtype: torch.dtype = torch.float32, longest: int = 4, transposed: bool = False) -> torch.Tensor | None:
        q, k = torch.zeros(1, 2, 8, dtype=dtype), torch.zeros(4, 2, 8, dtype=dtype).as_subclass(OnGPU)
        k = k.transpose(1, 2) if transposed else k
        return triton_scores.try_cls_scores(
            q, k, None, start=torch.zeros(1), lengths=torch.ones(1), longest=longest, scale=1.0
        )

    monkeypatch.setattr(triton_scores, "_failed", False)
    monkeypatch.setattr(triton_scores, "cls_scores", lambda *_, **__: "asked")
    assert ask() == ask(torch.bfloat16) == "asked"
    assert ask(torch.float64) is ask(longest=10_000) is ask(transposed=True) is None
    monkeypatch.setattr(OnGPU, "is_cuda", False)
    assert ask() is None
    monkeypatch.setattr(OnGPU, "is_cuda", True)

    def broken(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_scores, "cls_scores", broken)
    assert ask() is ask() is None
    assert caplog.text.count("Failed to find C compiler") == 1
