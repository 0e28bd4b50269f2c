"""Patched models that are changed afterwards, wrapped or shared: they follow, or say what is wrong."""

from __future__ import annotations

import copy

import pytest
import timm_models
import torch
import transformers_models
from test_adapters import adapt
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parametrizations

import ats
from ats.errors import UserError

NAMES = [
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit classifier",
    "registers classifier",
]


def models_of(name: str) -> object:
    """The module of helpers for this model."""
    return transformers_models if name in transformers_models.CONTRACT else timm_models


def small_model(name: str, **settings: object) -> nn.Module:
    return models_of(name).small_model(name, **settings)


def run(name: str, model: nn.Module) -> torch.Tensor:
    """Logits of random images."""
    x = (
        transformers_models.images()
        if models_of(name) is transformers_models
        else timm_models.images(small_model(name))
    )
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def blocks_of(model: nn.Module) -> nn.Module:
    return model.blocks if hasattr(model, "blocks") else transformers_models.layers_of(model)


def set_blocks(model: nn.Module, blocks: nn.Module) -> None:
    if hasattr(model, "blocks"):
        model.blocks = blocks
    else:
        base = transformers_models.base_of(model)
        setattr(base.encoder, "layer", blocks) if hasattr(base, "encoder") else setattr(base, "layers", blocks)


CHANGES = {
    "last blocks deleted": lambda model: blocks_of(model).__delitem__(slice(-2, None)),
    "last block cut off": lambda model: set_blocks(model, blocks_of(model)[:3]),
    "first block deleted": lambda model: blocks_of(model).__delitem__(0),
    "block copied over another": lambda model: blocks_of(model).__setitem__(3, copy.deepcopy(blocks_of(model)[1])),
    "blocks swapped": lambda model: set_blocks(model, type(blocks_of(model))(*_swapped(model))),
}


def _swapped(model: nn.Module) -> list:
    blocks = list(blocks_of(model))
    blocks[1], blocks[3] = blocks[3], blocks[1]
    return blocks if hasattr(model, "blocks") else [blocks]  # nn.Sequential(*blocks), nn.ModuleList(blocks)


@pytest.mark.parametrize("settings", [{"num_tokens": 12}, {"num_tokens": [9, 11, 12, 9]}, "stages"], ids=str)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
def test_changed_block_lists(name, change, settings):
    """Whatever blocks there are: after a setting is set, the model computes what a model patched now computes."""
    settings = {"blocks": [1, 2, 3]} | settings if settings != "stages" else {"stages": [
        {"blocks": [1], "num_tokens": 12}, {"sampler": "topk", "blocks": [3], "num_tokens": 9},
    ]}  # fmt: skip
    model, fresh = small_model(name), small_model(name)
    ats.patch(model, **settings)
    CHANGES[change](model)
    CHANGES[change](fresh)
    depth, gone = len(blocks_of(model)), change in ("last blocks deleted", "last block cut off")
    if not gone:
        with pytest.raises(UserError, match=r"blocks were replaced, moved or shared .* Type model\.ats\.blocks"):
            run(name, model)
    else:
        run(name, model)
    if "stages" in settings:
        stages = [stage for stage in settings["stages"] if stage["blocks"][0] < depth]
        assert [stage["blocks"] for stage in model.ats.stages] == [stage["blocks"] for stage in stages]
        model.ats.stages = model.ats.stages
        ats.patch(fresh, stages=stages)
    else:
        assert model.ats.blocks == [block for block in settings["blocks"] if block < depth]
        model.ats.min_tokens = 3
        num_tokens = settings["num_tokens"]
        num_tokens = num_tokens[:depth] if isinstance(num_tokens, list) else num_tokens
        ats.patch(fresh, blocks=model.ats.blocks, num_tokens=num_tokens, min_tokens=3)
    model.ats.trace = fresh.ats.trace = True
    assert torch.equal(run(name, model), run(name, fresh))
    assert [(kept.block, kept.num_tokens.tolist()) for kept in model.ats.last] == [
        (kept.block, kept.num_tokens.tolist()) for kept in fresh.ats.last
    ]
    ats.unpatch(model)
    assert torch.equal(run(name, model), run(name, ats.unpatch(fresh)))


@pytest.mark.parametrize("name", timm_models.LAWS)
def test_timms_pruning(name):
    """`prune_intermediate_layers`: the settings are those of the blocks that are left."""
    model = ats.patch(small_model(name), blocks=[1, 2, 3], num_tokens=[9, 12, 11, 10])
    model.prune_intermediate_layers(2)
    assert (model.ats.blocks, model.ats.num_tokens) == ([1, 2, 3], [9, 12, 11, 10])
    model.prune_intermediate_layers([0, 1])
    assert (model.ats.blocks, model.ats.num_tokens) == ([1], [9, 12])
    model.ats.num_tokens = 12
    model.prune_intermediate_layers([0])
    assert model.ats.blocks == []
    run(name, model)
    with pytest.raises(UserError, match="blocks is empty: give the indices"):
        model.ats.num_tokens = 11
    model.ats.blocks = [0]
    run(name, model)
    model.ats.trace = True
    run(name, model)
    assert [kept.block for kept in model.ats.last] == [0]


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
def test_a_block_that_ats_does_not_know(name):
    """Put in after the patch, it is refused by name; settings and blocks stay as they were."""
    model = ats.patch(small_model(name), blocks=[1, 3], num_tokens=12)
    blocks_of(model)[2] = nn.Identity()
    with pytest.raises(UserError, match="Block 2 is not the one that got ATS"):
        run(name, model)
    with pytest.raises(UserError, match="block 2 is a Identity; supported are"):
        model.ats.num_tokens = 10
    assert model.ats.num_tokens == 12


@pytest.mark.parametrize("name", NAMES)
def test_one_block_in_two_places(name):
    """A block knows one place; before the patch or after it."""
    model = small_model(name)
    blocks_of(model)[2] = blocks_of(model)[1]
    for blocks in ([1], [2], [1, 2], [3]):
        with pytest.raises(UserError, match=r"blocks 1 and 2 are the same .* object.*copy\.deepcopy"):
            ats.patch(model, blocks=blocks)
    model = ats.patch(small_model(name), blocks=[1, 3], num_tokens=12)
    blocks_of(model)[3] = blocks_of(model)[2]
    with pytest.raises(UserError, match="Block 3 is not the one that got ATS"):
        run(name, model)
    with pytest.raises(UserError, match="blocks 2 and 3 are the same"):
        model.ats.blocks = model.ats.blocks


@pytest.mark.parametrize("name", NAMES)
def test_two_models_that_share_blocks(name):
    """The second is refused; if both were patched before, or one never was, running it says so."""
    first, second = small_model(name), small_model(name)
    set_blocks(second, blocks_of(first))
    ats.patch(first, blocks=[1, 2], num_tokens=12)
    want = run(name, first)
    with pytest.raises(UserError, match=r"it shares block 1 with another model, which has ATS"):
        ats.patch(second, blocks=[0])
    with pytest.raises(UserError, match=r"has ATS, but the model that runs it does not|tokens of blocks with ATS"):
        run(name, second)
    assert torch.equal(run(name, first), want)
    ats.unpatch(first)
    ats.patch(second, blocks=[0])
    run(name, second)

    first, second = small_model(name), small_model(name)
    ats.patch(first, blocks=[1, 2], num_tokens=12)
    ats.patch(second, blocks=[1, 2], num_tokens=12)
    set_blocks(second, blocks_of(first))
    with pytest.raises(UserError, match="shared with another model"):
        run(name, second)


def test_models_that_share_blocks_in_part():
    """A model whose blocks get ATS by another one's patch does not run them unnoticed."""
    first, second = small_model(NAMES[0]), small_model(NAMES[0])
    second.blocks[1] = first.blocks[1]
    ats.patch(first, blocks=[3], num_tokens=12)
    ats.patch(second, blocks=[0], num_tokens=12)
    with pytest.raises(UserError, match="Block 1 is not the one that got ATS"):
        run(NAMES[0], first)


@pytest.mark.parametrize("how", ["reset_classifier", "global_pool"])
def test_merging_and_a_pool_that_averages(how):
    """A head that does not read CLS alone is refused after the patch as before it."""
    model = ats.patch(small_model(NAMES[0]), blocks=[0, 1], sampler="tome", r=2)
    want = run(NAMES[0], model)
    if how == "reset_classifier":
        with pytest.raises(UserError, match=r"sampler tome does not work .* its head does not read CLS alone"):
            model.reset_classifier(9, "avg")
        assert torch.equal(run(NAMES[0], model), want)
        model.reset_classifier(9, "token")
        model.double()
    else:
        model.global_pool = "avg"
        with pytest.raises(UserError, match=r"sampler tome does not work .* its head does not read CLS alone"):
            run(NAMES[0], model)
        model.global_pool = "token"
    run(NAMES[0], model)
    model.ats.sampler = "topk"
    model.reset_classifier(9, "avg")
    with pytest.raises(UserError, match="its head does not read CLS alone"):
        model.ats.sampler = "tome"


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize(("name", "adapted"), [(NAMES[0], ()), (NAMES[0], ("qkv", "fc1")), (NAMES[3], ())])
def test_fully_sharded(name, adapted, patch_first, one_process):
    """FSDP2 changes classes too: patched before or after it, the model samples, trains, is re-tuned and restored, also
    with adapters in it.
    """
    model, plain = (adapt(small_model(name).train(), *adapted) for _ in range(2))
    if patch_first:
        ats.patch(model, blocks=[1, 3], num_tokens=12)
    classes = {True: [], False: [type(model), *map(type, blocks_of(model))]}[patch_first]
    for block in blocks_of(model):
        fully_shard(block, mesh=one_process)
    fully_shard(model, mesh=one_process)
    if not patch_first:
        ats.patch(model, blocks=[1, 3], num_tokens=12)
    ats.patch(plain, blocks=[1, 3], num_tokens=12)
    x = transformers_models.images() if name == NAMES[3] else timm_models.images(plain)
    for each in (model, plain):
        out = each(x)
        (out if isinstance(out, torch.Tensor) else out.logits).square().sum().backward()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        assert (got.grad is None and want.grad is None) or torch.equal(got.grad.full_tensor(), want.grad)
    for change in ({"num_tokens": 9}, {"blocks": [2]}):
        for each in (model, plain):
            setattr(each.ats, *next(iter(change.items())))
        assert torch.equal(run(name, model), run(name, plain))
    assert ats.unpatch(model) is model
    assert torch.equal(run(name, model), run(name, adapt(small_model(name).train(), *adapted)))
    for module in (model, *blocks_of(model)):
        assert isinstance(module, FSDPModule)
        assert not any(kind.__module__.startswith("ats.") for kind in type(module).__mro__)
        assert type(module).__name__ == f"FSDP{type(module).__mro__[2].__name__}"
    assert not classes or [kind.__mro__[2] for kind in map(type, (model, *blocks_of(model)))] == classes


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
def test_parametrized(name):
    """A parametrization makes a class for its module: what is computed is the dense model's, and unpatch finds it."""
    for patch_first in (True, False):
        model, plain = small_model(name), small_model(name)
        for each in (model, plain):
            if patch_first:
                ats.patch(each, blocks=[1, 3], num_tokens=12)
        for block in blocks_of(model):
            layer = block.attn.qkv if hasattr(block, "attn") and hasattr(model, "blocks") else block.attention.q_proj
            parametrizations.weight_norm(layer)
        parametrizations.weight_norm(model.head if hasattr(model, "head") else model.classifier)
        if not patch_first:
            ats.patch(model, blocks=[1, 3], num_tokens=12)
            ats.patch(plain, blocks=[1, 3], num_tokens=12)
        torch.testing.assert_close(run(name, model), run(name, plain), rtol=1e-9, atol=1e-10)
        copied = copy.deepcopy(model)
        copied.ats.num_tokens = plain.ats.num_tokens = 9
        torch.testing.assert_close(run(name, copied), run(name, plain), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(run(name, ats.unpatch(model)), run(name, small_model(name)), rtol=1e-9, atol=1e-10)


def test_a_parameter_of_the_model_is_parametrized():
    """Then the model itself has another class."""
    model = ats.patch(small_model(NAMES[0]), blocks=[1, 3], num_tokens=12)
    want = run(NAMES[0], model)
    nn.utils.parametrize.register_parametrization(model, "pos_embed", nn.Identity())
    assert torch.equal(run(NAMES[0], model), want)
    model.ats.num_tokens = 9
    ats.unpatch(model)
    assert type(model).__name__ == "ParametrizedVisionTransformer"
    assert torch.equal(run(NAMES[0], model), run(NAMES[0], small_model(NAMES[0])))
    ats.patch(model, blocks=[1, 3], num_tokens=12)
    assert torch.equal(run(NAMES[0], model), want)


@pytest.mark.parametrize("patched", [True, False])
def test_wrappers_say_what_to_type(patched):
    """Around a supported model, one in another: patch and unpatch name the way in."""
    inner = small_model(NAMES[0])
    if patched:
        ats.patch(inner, blocks=[1])
    for wrapper, path in (
        (nn.DataParallel(inner), r"model\.module"),
        (torch.compile(inner, backend="eager"), r"model\._orig_mod"),
        (torch.compile(nn.DataParallel(inner), backend="eager"), r"model\.module"),
    ):
        with pytest.raises(
            UserError, match=rf"it wraps a VisionTransformer; patch that one: ats\.patch\({path}, \.\.\.\)"
        ):
            ats.patch(wrapper, blocks=[1])
        with pytest.raises(
            UserError, match=rf"ats\.unpatch\({path}\)" if patched else r"ats\.patch\(model, \.\.\.\) was"
        ):
            ats.unpatch(wrapper)


def test_blocks_in_wrappers():
    """A block in a checkpointing wrapper, or torch.compile's, is still the block that got ATS."""
    for name in (NAMES[0], NAMES[2], NAMES[3]):
        model = ats.patch(small_model(name), blocks=[1, 3], num_tokens=12)
        want = run(name, model)
        for index, block in enumerate(blocks_of(model)):
            blocks_of(model)[index] = checkpoint_wrapper(block)
        assert torch.equal(run(name, model), want)


def test_a_handle_that_outlives_its_patch():
    model = ats.patch(small_model(NAMES[0]), blocks=[1], num_tokens=9)
    handle = model.ats
    assert copy.copy(handle).num_tokens == 9
    ats.unpatch(model)
    for use in (lambda: handle.num_tokens, lambda: repr(handle), lambda: setattr(handle, "num_tokens", 5)):
        with pytest.raises(UserError, match="no longer has ATS"):
            use()
