"""Golden numbers of the official ATS code (fixtures/image): kept sets, logits and gradients.

The arrays were made by running the official repository unchanged, but for A3, which needs the repair of NUM_TOKENS
described in docs/FIDELITY.md. DROP_TOKENS is False, the only mode that does not depend on the batch, or makes no
difference to the arrays compared (A3, A4, A5). `case.json` says how each was produced.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from golden import FIXTURES, golden_case, images, weights_by_recipe, weights_by_seed
from safetensors.torch import load_file

from ats.checkpoint import load_weights
from ats.config import get_cfg
from ats.models import build_model

CASES = [
    "A2_vit_dropF",
    "A3_ntok20",
    "A3_ratio05",
    "A4_deit_small_recipe",
    "A5_batch_dependence",
    "A7_interleaved_dropF",
]


def model_of(config: dict, dtype: torch.dtype = torch.float32, **ats: object) -> torch.nn.Module:
    """The network a case was made with."""
    cfg = get_cfg()
    cfg.merge_from_list([
        "MODEL.NAME", "ViT", "MODEL.NUM_CLASSES", config["num_classes"], "VIT.IMG_SIZE", config["img_size"],
        "VIT.PATCH_SIZE", config["patch_size"], "VIT.EMBED_DIM", config["embed_dim"], "VIT.DEPTH", config["depth"],
        "VIT.NUM_HEADS", config["num_heads"], "VIT.MLP_RATIO", config["mlp_ratio"], "ATS.ENABLE", True,
        "ATS.BLOCKS", config["ats_blocks"], "ATS.NUM_TOKENS", config["n_tokens"],
    ])  # fmt: skip
    for key, value in ats.items():
        cfg.merge_from_list([f"ATS.{key}", value])
    return build_model(cfg).to(dtype).eval()


def load_case(name: str, dtype: torch.dtype) -> tuple[dict, torch.nn.Module, np.lib.npyio.NpzFile, torch.Tensor]:
    case, golden = golden_case(name)
    model, recipe = model_of(case["config"], dtype), case["weights"]
    load_weights(model, weights_by_recipe(recipe) if "SEED" in recipe else weights_by_seed(recipe, model))
    return case, model, golden, images(golden["image_u8"], dtype)


@pytest.mark.parametrize(
    ("dtype", "cpu_backend"),
    [(torch.float32, "torch"), (torch.float32, "onednn"), (torch.float64, "torch")],
    ids=["float32", "float32-onednn", "float64"],
)
@pytest.mark.parametrize("name", CASES)
def test_kept_sets_and_logits(name, dtype, cpu_backend):
    """Every kept set is exact, every logit within what the official softmax's epsilon moves it."""
    case, model, golden, x = load_case(name, dtype)
    model.cpu_backend = cpu_backend
    with torch.no_grad():
        logits, trace = model.forward_tokens(x)
    np.testing.assert_allclose(logits.numpy(), golden["logits"], atol=3e-5, rtol=0)
    assert [entry.block for entry in trace] == case["config"]["ats_blocks"]
    for entry in trace:
        for patches, want in zip(entry.patches, golden[f"ats{entry.block}_kept"], strict=True):
            assert patches.tolist() == sorted(want[want >= 0].tolist())
        assert entry.num_tokens.tolist() == [len(patches) + 1 for patches in entry.patches]


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in ("A4_deit_small_recipe", "A5_batch_dependence")]
)
@pytest.mark.parametrize("cpu_backend", ["torch", "onednn"])
def test_gradients(name, cpu_backend):
    """Gradients with respect to the image and every stored weight."""
    _, model, golden, x = load_case(name, torch.float32)
    model.cpu_backend = cpu_backend
    x.requires_grad_()
    (model(x) * torch.from_numpy(golden["loss_weight"])).sum().backward()
    parameters = dict(model.named_parameters())
    grads = {"grad_input": x.grad} | {f"grad__{k}": p.grad for k, p in parameters.items() if f"grad__{k}" in golden}
    assert len(grads) >= 4
    for key, grad in grads.items():
        scale = np.abs(golden[key]).max()
        np.testing.assert_allclose(grad.numpy() / scale, golden[key] / scale, atol=2e-3, err_msg=key)


@pytest.mark.parametrize("subcase", ["equal_tokens", "zero_v_block0", "zero_v_block1", "collapse"])
@pytest.mark.parametrize("batch", [1, 3])
def test_degenerate_images(subcase, batch):
    """Constant images, values that are all zero, sequences that shrink to nothing.

    Equal tokens and collapse: the official counts and logits. Values that are all zero make the official scores 0/0,
        and its
    sort of NaNs happens to keep one token; here such tokens count the same, so nearly all of them stay
    (docs/FIDELITY.md).
    """
    folder = FIXTURES / "image" / "A6_degenerate"
    configs = json.loads((folder / "case.json").read_text())["configs"]
    golden = np.load(folder / "golden.npz")
    prefix = f"{subcase}__dropF_b{batch}__"
    model = model_of(next(config for names, config in configs.items() if subcase in names))
    model.load_state_dict(
        {
            key: value
            for key, value in load_file(folder / f"weights_{subcase}.safetensors").items()
            if "out_zero_mask" not in key
        }
    )
    with torch.no_grad():
        logits, trace = model.forward_tokens(images(golden[f"{subcase}__image_u8"], torch.float32)[:batch])
    assert logits.isfinite().all()
    num_kept = {entry.block: (entry.num_tokens - 1).tolist() for entry in trace}
    if subcase.startswith("zero_v"):
        block = int(subcase[-1])
        present = num_kept.get(block - 1, [16] * batch)
        assert all(kept >= before - 1 for kept, before in zip(num_kept[block], present, strict=True))
        assert min(map(min, num_kept.values())) >= 1
    else:
        np.testing.assert_allclose(logits.numpy(), golden[prefix + "logits"], atol=5e-5, rtol=0)
        for block, counts in num_kept.items():
            assert counts == golden[f"{prefix}ats{block}_num_kept"].tolist()
