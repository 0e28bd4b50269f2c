"""ats/restore.py: a feature for every patch, also for those that were dropped or merged away."""

from __future__ import annotations

import pytest
import timm_models
import torch
import transformers_models
from helpers import clips, keep_all
from test_merging import EVERYWHERE, NETWORKS, OPTIONS, vit_by_config
from test_rivals import pictures
from torch import Tensor, nn

import ats
from ats.errors import UserError
from ats.models.block import ats_blocks
from ats.reduction import REDUCTIONS
from ats.restore import RESTORES

HAVE_FEATURES = [network for network in NETWORKS if network != "PS-ViT"]
DROP = {"sampler": "inverse_transform", "num_tokens": 0.6}


def features(model: nn.Module, x: Tensor, restore: str) -> Tensor:
    """[S, N, C] of any of the networks."""
    if not hasattr(model, "ats"):
        return model.forward_features(x, restore=restore)
    model.ats.restore = restore
    if hasattr(model, "base_model_prefix"):
        return getattr(model, model.base_model_prefix)(x).last_hidden_state
    return model.forward_features(x)


@pytest.mark.parametrize("network", HAVE_FEATURES)
def test_nothing_dropped_nothing_restored(network):
    """Every way gives the dense network's features, in their order."""
    make, inputs = NETWORKS[network]
    model, x = make("merge", "packed"), inputs()
    with torch.no_grad():
        dense = make(None, "packed")
        if hasattr(dense, "base_model_prefix"):
            want = getattr(dense, dense.base_model_prefix)(x).last_hidden_state
        else:
            want = dense.forward_features(x)
        with keep_all(model):
            for restore in RESTORES:
                torch.testing.assert_close(features(model, x, restore), want, atol=1e-10, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("network", "kind"), [pair for pair in EVERYWHERE if pair[0] in HAVE_FEATURES])
def test_what_is_there_stays_and_what_is_gone_is_filled(network, kind):
    """Tokens with a position hold the same in every mode, others are zero or filled; alone as in a batch."""
    make, inputs = NETWORKS[network]
    model, x = make(kind, "packed"), inputs()
    zero, last, nearest = (features(model, x, restore) for restore in RESTORES)
    gone = (zero == 0).all(dim=2)
    assert gone.any()
    for filled in (last, nearest):
        assert torch.equal(filled[~gone], zero[~gone])
        assert not (filled == 0).all(dim=2).any()
    assert not torch.equal(last[gone], nearest[gone])
    size = len(zero) // len(x)
    torch.testing.assert_close(features(model, x[1:2], "nearest"), nearest[size : 2 * size], atol=1e-10, rtol=0)
    torch.testing.assert_close(features(model, x[1:2], "last"), last[size : 2 * size], atol=1e-10, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["merge", "merge by score", "fuse", "tome", "pitome", "merge by thresholds"])
def test_as_many_patches_share_a_token_as_its_size_says(kind):
    tokens = vit_by_config(kind, "packed").encode(pictures(3), restore="nearest")
    assert torch.equal(tokens.places.row.bincount(minlength=len(tokens.x)).double(), tokens.size)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["topk", "inverse_transform"])
def test_dropped_patches_against_a_loop_over_images_and_tokens(rule):
    """nearest: the kept patch with the nearest key, block after block. last: the input of the block that dropped it."""
    model = timm_models.small_model("deit_tiny_patch16_224")
    x = timm_models.images(model)
    ats.patch(model, blocks=[1, 2], **DROP | {"sampler": rule})
    model.ats.trace = True
    inputs = []
    for block in ats_blocks(model):
        block.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    for image in x:
        inputs.clear()
        zero, last, nearest = (features(model, image[None], restore)[0] for restore in RESTORES)
        stands = list(range(len(zero)))  # which position's token stands for each
        for block, tokens, entry in zip(ats_blocks(model), inputs, model.ats.last, strict=False):
            keys, positions = block.project(tokens).k.flatten(1), tokens.position.tolist()
            kept = (1 + entry.patches[0]).tolist()
            rows = [positions.index(position) for position in kept]
            for row, position in enumerate(positions):
                if position == 0 or position in kept:
                    continue
                best = kept[max(range(len(rows)), key=lambda i: torch.cosine_similarity(keys[rows[i]], keys[row], 0))]
                stands = [best if own == position else own for own in stands]
                torch.testing.assert_close(last[position], model.norm(tokens.x[row]), atol=1e-10, rtol=0)
        assert stands != list(range(len(zero)))
        torch.testing.assert_close(nearest, zero[stands], atol=1e-10, rtol=0)


@torch.no_grad()
def test_last_of_a_merged_token_is_its_value_before_it_merged():
    """ToMe merges behind the attention."""
    model, other, x = (vit_by_config("tome", "packed"), vit_by_config("tome", "packed", "TOME.R", 0), pictures(2))
    outputs = []
    for net in (model, other):
        block = net.blocks[1]
        block.register_forward_pre_hook(lambda module, args: outputs.append(module.attend(args[0])[1]))
    tokens = model.run_blocks(model.embed(x), blocks=model.blocks[:2], restore="last")
    other.run_blocks(other.embed(x), blocks=other.blocks[:2])
    gone = tokens.places.row < 0
    assert gone.sum() == 2 * 6
    torch.testing.assert_close(tokens.places.gone[gone], outputs[1].x[gone], atol=1e-12, rtol=0)


@pytest.mark.parametrize("restore", ["last", "nearest"])
@pytest.mark.parametrize("layout", ["padded", "static"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_layouts_agree(kind, layout, restore):
    """Gradients too: a decoder can be trained on restored features."""
    x, found = pictures(3), []
    for name in ("packed", layout):
        model = vit_by_config(kind, name).train()
        own = model.forward_features(x, restore=restore)
        own.square().sum().backward()
        found.append((own.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    (want, grads), (got, other_grads) = found
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    for own, other in zip(grads, other_grads, strict=True):
        assert own.isfinite().all()
        torch.testing.assert_close(other, own, atol=1e-9 * own.abs().max().item() + 1e-12, rtol=0)


@torch.no_grad()
def test_merged_tokens_stand_in_the_right_order():
    """A block that pairs by energy but merges none leaves all tokens in another order."""
    model = timm_models.small_model("deit_tiny_patch16_224")
    x = timm_models.images(model)
    want = model.forward_features(x)
    ats.patch(model, blocks=range(4), sampler="merge_sample", threshold=0.99999, switch=1.0)
    for restore in RESTORES:
        torch.testing.assert_close(features(model, x, restore), want, atol=1e-10, rtol=0)


@torch.no_grad()
def test_intermediate_features_are_restored_too():
    model = timm_models.small_model("deit_tiny_patch16_224")
    x = timm_models.images(model)
    ats.patch(model, blocks=[1, 2], **DROP)
    model.ats.restore = "nearest"
    final, maps = model.forward_intermediates(x, indices=4, norm=True)
    assert not any((own == 0).all(dim=1).any() for own in maps)
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), final[:, 1:], atol=1e-12, rtol=0)
    model = transformers_models.small_model("dinov2")
    ats.patch(model, blocks=[1, 2], **DROP)
    model.ats.restore = "last"
    out = model(transformers_models.images(), output_hidden_states=True)
    assert not any((own == 0).all(dim=2).any() for own in (*out.hidden_states, out.last_hidden_state))


@pytest.mark.parametrize("sampler", ["inverse_transform", "tome", "evit"])
@torch.no_grad()
def test_compact_features_are_those_of_the_kept_tokens(sampler):
    """By a loop over images: ascending positions, then padding; EViT's fused token has no place."""
    model = timm_models.small_model("deit_tiny_patch16_224")
    x = timm_models.images(model)
    ats.patch(model, blocks=[1, 2], sampler=sampler, **({"num_tokens": 0.6} if sampler == "inverse_transform" else {}))
    model.ats.trace = True
    dense = model.forward_features(x)
    for kept in model.ats.last[-1:]:
        compact = kept.compact(dense)
        assert compact.mask.shape == compact.position.shape == compact.x.shape[:2]
        for image in range(len(x)):
            own = torch.cat([torch.zeros(1, dtype=torch.int64), kept.patches[image] + 1])
            mask = compact.mask[image]
            assert mask.tolist() == [True] * len(own) + [False] * (len(mask) - len(own))
            assert torch.equal(compact.position[image, mask], own)
            assert torch.equal(compact.x[image, mask], dense[image, own])
            assert (compact.x[image, ~mask] == 0).all()


def test_results_have_a_short_repr():
    model = timm_models.small_model("deit_tiny_patch16_224")
    ats.patch(model, blocks=[1, 2], num_tokens=0.6)
    model.ats.trace, seen = True, []
    model.blocks[3].register_forward_hook(lambda module, args, out: seen.append(repr(out)))
    model(timm_models.images(model))
    counts = model.ats.last[0].num_tokens.tolist()
    assert repr(model.ats.last).startswith(f"[KeptTokens(block=1, num_tokens={counts}), KeptTokens(block=2")
    assert seen[0].startswith(f"RaggedTokens([{model.ats.last[1].num_tokens.sum()}, ")


def test_a_reduction_that_does_not_say_where_tokens_went(merge_dropped, monkeypatch):
    monkeypatch.setattr(REDUCTIONS[merge_dropped], "merge", lambda self, step: step.kept)
    model = timm_models.small_model("deit_tiny_patch16_224")
    ats.patch(model, blocks=[1], sampler="merge_dropped", num_tokens=0.6)
    x = timm_models.images(model)
    with pytest.raises(UserError, match=r"merge_dropped merges tokens .* must set step\.taken_by"):
        features(model, x, "nearest")
    assert not (features(model, x, "last") == 0).all(dim=2).any()


def test_mistakes_are_said():
    model = timm_models.small_model("deit_tiny_patch16_224")
    ats.patch(model, blocks=[1], **DROP)
    with pytest.raises(UserError, match=r"restore 'nearst': choose from zero, last, nearest\. Did you mean nearest"):
        model.ats.restore = "nearst"
    with pytest.raises(UserError, match="choose from zero, last, nearest"):
        vit_by_config("merge", "packed").forward_features(pictures(1), restore="mean")
    with pytest.raises(UserError, match="clips"):
        NETWORKS["xvit"][0]("merge", "packed").forward_features(clips(1)[:, :, 0], restore="last")
