"""The contract of `ats.patch` over timm's architectures: exact where it accepts, refused by name where it does not."""

from __future__ import annotations

import re
import sys

import pytest
import timm
import torch
from helpers import counted_multiply_adds, planned
from plugin_models import TARGET, candidates, models, render, small_settings, split
from timm.models import model_entrypoint
from timm_models import CONTRACT, LAWS, images, kinds, masked_host, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ats
from ats.errors import UserError
from ats.flops import gflops
from ats.plugin.timm.blocks import VERSIONS as BLOCK_VERSIONS
from ats.plugin.timm.model import REASONS, VERSIONS, attach, network
from ats.tokens import LAYOUTS

NUM_TOKENS = 12  # above the 9 prefix tokens of the model with the most, below the 16 tokens of the one with the fewest


@pytest.fixture(scope="session")
def sweep() -> dict[str, tuple[str, str, set]]:
    """Name -> (class, why it is refused, what it is made of) for all timm models that could be accepted."""
    return {name: (type(model).__name__, reason, set() if reason else kinds(model)) for name, model, reason in models()}


@pytest.mark.parametrize("name", CONTRACT)
@torch.no_grad()
def test_equals_its_host(name, keep_all):
    """With every token kept: the unpatched model. With tokens dropped: the host's own blocks that cannot see them,
    and its head on what is left of each image. Unpatched again: what it was, bit for bit.
    """
    model = small_model(name)
    x = images(model)
    want, features, keys = model(x), model.forward_features(x), list(model.state_dict())
    assert want.isfinite().all()

    assert ats.patch(model, blocks=[1, 2], sampler=keep_all) is model
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-11)
    torch.testing.assert_close(model.forward_features(x), features, rtol=0, atol=1e-11)
    ats.unpatch(model)

    ats.patch(model, blocks=[1, 3], num_tokens=NUM_TOKENS)
    model.ats.trace = True
    logits, features, trace = model(x), model.forward_features(x), model.ats.last
    assert list(model.state_dict()) == keys
    assert trace[0].num_tokens.max() <= NUM_TOKENS
    assert trace[1].num_tokens.min() < NUM_TOKENS

    ats.unpatch(model)
    oracle, present, oracle_logits = masked_host(model, x, trace)
    torch.testing.assert_close(features[present], oracle[present], rtol=0, atol=1e-10)
    assert (features[~present] == 0).all()
    torch.testing.assert_close(logits, oracle_logits, rtol=0, atol=1e-10)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_small_patch16_rope_mixed_ape_224", CONTRACT[0]])
@torch.no_grad()
def test_cls_scores_are_its_row_of_the_attention_matrix(name):
    """The one row that is computed for CLS, with its bias and without a rotation, is that of the whole matrix."""
    model = small_model(name)
    x = images(model)
    ats.patch(model, blocks=[1], num_tokens=10, score="cls_attention")
    model.blocks[1].record_scores = True
    scores = model.forward_tokens(x)[1].records[0].candidates.scores
    tokens_in = model._run(x, num_blocks=1)[0]
    block = model.blocks[1]
    rope = model._embed(x)[1]
    if rope is not None:
        from dataclasses import replace

        from ats.plugin.timm.model import rotary_table

        tokens_in = replace(tokens_in, rotary=rotary_table(rope[1], 1))
    normed = block.attention_input(tokens_in.x)
    q, (k, _) = block.project_q(normed, tokens_in), block.project_kv(normed, tokens_in)
    q, k = (tokens_in.layout.pad(t) for t in (q, k))
    logits = torch.einsum("sqhd,skhd->shqk", q, k) * block.attn.scale
    bias = block.attention_bias(tokens_in, tokens_in)
    matrix = (logits if bias is None else logits + bias).softmax(-1)
    torch.testing.assert_close(scores, matrix[:, :, 0, 1:].sum(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_an_image_gets_the_same_in_any_batch(name):
    model = ats.patch(small_model(name), blocks=[1, 2, 3], num_tokens=0.7)
    x = images(model, 4)
    want = model(x)
    torch.testing.assert_close(model(x.flip(0)).flip(0), want, rtol=0, atol=1e-11)
    for i in range(4):
        torch.testing.assert_close(model(x[i : i + 1]), want[i : i + 1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_to_every_parameter(name, checkpointing):
    """And are those of a model whose activations are recomputed."""
    model = ats.patch(small_model(name), blocks=[1, 3], num_tokens=12).train()
    x = images(model)
    model(x).square().sum().backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    if checkpointing:
        model.zero_grad()
        model.set_grad_checkpointing(True)
        model(x).square().sum().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-9, atol=1e-11)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("name", "score"),
    [(name, "mean_attention") for name in LAWS]
    + [(name, "cls_attention") for name in ("deit_tiny_distilled_patch16_224", "beit_base_patch16_224")]
    + [(name, "cls_attention") for name in ("vit_base_patch16_sapiens2", "eva02_base_patch14_224")]
    + [(name, "mean_attention") for name in ("aimv2_large_patch14_224", "vit_tiny_r_s16_p8_224")],
)
@torch.no_grad()
def test_multiply_adds_equal_the_counter(name, score):
    """The GFLOPs formula is torch's counter at batch size 1, dense and with ATS."""
    model = small_model(name).requires_grad_(False)  # the counter's hooks trip over expanded parameters
    x = images(model, 1)
    # PyTorch 2.11 does not count a CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    dense = counter.get_total_flops() / 2
    ats.patch(model, blocks=[1, 3], num_tokens=NUM_TOKENS, score=score)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, trace = model.forward_tokens(x)
    cost = gflops(model, trace, x.shape)
    assert cost.as_run.item() * 1e9 == pytest.approx(counter.get_total_flops() / 2, abs=0.5)
    assert cost.dense * 1e9 == pytest.approx(dense, abs=0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", ["token", "avg", "map", ""])
@torch.no_grad()
def test_pooled_padding_is_counted(pool, layout):
    """GFLOPs as run equal torch's counter in every layout: a pool or a head may read zeros for dropped tokens."""
    model = small_model("vit_tiny_patch16_224", global_pool=pool).requires_grad_(False)
    score = "mean_attention" if pool in ("avg", "map") else "cls_attention"
    attach(model, planned(blocks=[1, 3], num_tokens=12, score=score, **network(model)))
    model.layout = layout
    x = images(model, 1 if layout == "packed" else 3)
    total, trace = counted_multiply_adds(model, x)
    cost = gflops(model, trace, x.shape)
    assert cost.as_run.sum().item() * 1e9 == pytest.approx(total, abs=0.5)
    model.layout = "packed"
    assert torch.equal(cost.paper, gflops(model, model.forward_tokens(x)[1], x.shape).paper)


def test_every_accepted_model_is_of_a_tested_kind(sweep):
    """All timm models: whatever an accepted one is made of is in a model of the contract test."""
    tested = set().union(*(sweep[name][2] for name in CONTRACT))
    missing = {name: made_of - tested for name, (_, _, made_of) in sweep.items() if made_of - tested}
    assert not missing
    assert sum(not reason for _, reason, _ in sweep.values()) > 250


def test_the_lists_in_the_docs_are_true(sweep):
    """docs/PLUGIN.md, for the version of timm it was written with."""
    lists = split(TARGET.read_text())[1]
    version = re.search(r"timm ([\d.]+\d)", lists)[1]
    if version != timm.__version__:
        pytest.skip(f"docs/PLUGIN.md lists the models of timm {version}, this is {timm.__version__}")
    found = [(name, kind, reason) for name, (kind, reason, _) in sweep.items()]
    assert lists == render(found), "docs/PLUGIN.md is out of date, type: python tools/plugin_models.py"


def test_no_other_module_of_timm_builds_an_accepted_class():
    """The sweep looks at the modules that know an accepted class; timm's own annotations agree."""
    looked_at = set(candidates())
    for name in set(timm.list_models()) - looked_at:
        assert model_entrypoint(name).__annotations__.get("return") not in VERSIONS, name


REFUSED = {
    "resnet10t": "ResNet: ATS supports timm's VisionTransformer",
    "swin_tiny_patch4_window7_224": "SwinTransformer: attends in windows",
    "naflexvit_base_patch16_gap": "NaFlexVit: packs images",
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos: its relative position",
    "vit_base_patch16_18x2_224": "block 0 is a ParallelThingsBlock",
    "vit_base_patch16_xp_224": "block 0 is a ParallelScalingBlock",
    "vit_dwee_patch16_reg1_gap_256": "block 0 has attention of class DiffAttention",
}


@pytest.mark.parametrize(("name", "text"), REFUSED.items())
def test_refused_by_name(name, text):
    with torch.device("meta"):
        model = timm.create_model(name)
    keys = list(model.state_dict())
    with pytest.raises(UserError) as error:
        ats.patch(model, blocks=[1])
    assert text in str(error.value)
    assert list(model.state_dict()) == keys


def test_reasons_name_classes_that_exist():
    classes = {annotation.__name__ for name in timm.list_models() if isinstance(
        annotation := model_entrypoint(name).__annotations__.get("return"), type)}  # fmt: skip
    modules = {value.__name__ for module in list(sys.modules.values()) if module.__name__.startswith("timm.models.")
               for value in vars(module).values() if isinstance(value, type)}  # fmt: skip
    assert set(REASONS) <= classes | modules
    assert not set(REASONS) & {host.__name__ for host in (*VERSIONS, *BLOCK_VERSIONS)}


def test_small_settings_are_small():
    """The contract test runs on what it says: 16 patches, whatever the name."""
    model = timm.create_model(CONTRACT[0], **small_settings(CONTRACT[0]))
    assert model.patch_embed.num_patches == 16
    assert sum(parameter.numel() for parameter in model.parameters()) < 250_000
