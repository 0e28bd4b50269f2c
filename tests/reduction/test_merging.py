"""Reductions that merge, on every network: what sampling drops (ATS.DROPPED), ToMe, EViT, PPT and PiToMe; several in
one network (ATS.STAGES); against plain loops over images and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import run_net
import test_psvit
import test_timm_config
import timm_models
import torch
import transformers_models
from helpers import clips, counted_multiply_adds, keep_all, randomise, video_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import small_vit
from test_rivals import pictures, tiny
from test_sampling import by_definition
from torch import Tensor, nn

import ats
from ats.config import get_cfg
from ats.engine.evaluate import model_name
from ats.errors import UserError
from ats.flops import gflops
from ats.models import build_model
from ats.models.block import ats_blocks
from ats.reduction.merging import nearest_kept, weighted_mean
from ats.reduction.plan import config_key
from ats.tokens import RaggedTokens

OPTIONS = {
    "merge": {"sampler": "inverse_transform", "dropped": "merge", "num_tokens": 0.6},
    "merge by score": {
        "sampler": "topk", "dropped": "merge", "num_tokens": 0.6, "merge_weight": "size_score", "size_bias": 0.5,
    },
    "fuse": {"sampler": "inverse_transform", "dropped": "fuse", "num_tokens": 0.6, "merge_weight": "size_score"},
    "tome": {"sampler": "tome", "r": 6},
    "evit": {"sampler": "evit", "keep_rate": 0.7},
    "evit, nothing fused": {"sampler": "evit", "keep_rate": 0.7, "fuse_token": False},
    "ppt": {"sampler": "ppt", "r": 6, "threshold": 1e-4},
    "pitome": {"sampler": "pitome", "ratio": 0.7},
    "merge, then sample": {"sampler": "merge_sample", "ratio": 0.8, "points": 0.8},
    "merge by thresholds": {"sampler": "merge_sample", "ratio": 0.8, "points": 0.8, "threshold": 0.4},
}  # fmt: skip
FUSE = ("fuse", "evit")  # tokens without a position


def keys_of(kind: str) -> list[object]:
    """A row of OPTIONS as config keys."""
    own = OPTIONS[kind]
    pairs = {config_key(name, own["sampler"]): value for name, value in own.items()}
    return [word for pair in pairs.items() for word in pair]


def timm_by_config(name: str, kind: str | None, layout: str) -> nn.Module:
    cfg = test_timm_config.config(name, *(["ATS.ENABLE", False] if kind is None else keys_of(kind)))
    cfg.ATS.LAYOUT = layout
    return randomise(build_model(cfg)).double().eval()


def patched(model: nn.Module, kind: str | None) -> nn.Module:
    if kind is not None:
        ats.patch(model, blocks=[1, 3], **OPTIONS[kind])
    return model


def vit_by_config(kind: str | None, layout: str, *overrides: object) -> nn.Module:
    on = ["ATS.ENABLE", False] if kind is None else ["ATS.ENABLE", True, *keys_of(kind), "ATS.BLOCKS", [1, 3]]
    return tiny(*on, "ATS.LAYOUT", layout, *overrides)


def video_by_config(network: str, kind: str | None) -> nn.Module:
    on = ["ATS.ENABLE", False] if kind is None else ["ATS.ENABLE", True, *keys_of(kind)]
    return video_model(network, *on)


def psvit_by_config(kind: str | None, layout: str) -> nn.Module:
    if kind is None:
        return test_psvit.net()
    words = keys_of(kind)
    return test_psvit.net(blocks=(2, 4), LAYOUT=layout, settings=dict(zip(words[::2], words[1::2], strict=True)))


# (reduction or None for the dense network, layout) -> the network; and its input.
NETWORKS: dict[str, tuple[Callable[[str | None, str], nn.Module], Callable[[], Tensor]]] = {
    "ViT": (vit_by_config, lambda: pictures(3)),
    "distilled ViT": (lambda *how: vit_by_config(*how, "VIT.DISTILLED", True), lambda: pictures(3)),
    **{
        name: (lambda kind, _, name=name: video_by_config(name, kind), lambda: clips(2))
        for name in ("xvit", "divided", "joint", "space_only")
    },
    "PS-ViT": (psvit_by_config, lambda: test_psvit.inputs(3)),
    "timm ViT": (lambda *how: timm_by_config("deit3_small_patch16_224", *how), lambda: pictures(3)),
    "timm Eva": (lambda *how: timm_by_config("vit_small_patch16_rope_mixed_ape_224", *how), lambda: pictures(3)),
    "ats.patch, timm ViT": (
        lambda kind, _: patched(timm_models.small_model("deit_tiny_distilled_patch16_224"), kind),
        lambda: timm_models.images(timm_models.small_model("deit_tiny_distilled_patch16_224")),
    ),
    "ats.patch, transformers ViT": (
        lambda kind, _: patched(transformers_models.small_model("vit classifier"), kind),
        lambda: transformers_models.images(),
    ),
    "ats.patch, transformers DeiT": (
        lambda kind, _: patched(transformers_models.small_model("deit with teacher"), kind),
        lambda: transformers_models.images(),
    ),
}  # fmt: skip
# With all tokens of the longest sequence.
COMPARED = ("merge", "merge by score", "ppt", "pitome", "merge, then sample", "merge by thresholds")
EVERYWHERE = [
    (network, kind) for network in NETWORKS for kind in OPTIONS if network != "timm Eva" or kind not in FUSE
]  # a fused token has no position, which Eva's blocks look up


@pytest.mark.parametrize(("network", "kind"), EVERYWHERE)
def test_an_input_gets_the_same_in_any_batch(network, kind):
    """Alone, and the batch reversed; and fewer tokens than the dense network has, with other logits."""
    make, inputs = NETWORKS[network]
    model, x = make(kind, "packed"), inputs()
    with torch.no_grad():
        logits, trace = model.forward_tokens(x)
        torch.testing.assert_close(model.forward_tokens(x.flip(0))[0], logits.flip(0), atol=1e-10, rtol=0)
        for i, own in enumerate(x):
            torch.testing.assert_close(model.forward_tokens(own[None])[0][0], logits[i], atol=1e-10, rtol=0)
        dense = make(None, "packed")
        dense = dense(x) if "transformers" not in network else dense(x).logits
    assert (logits - dense).abs().max() > 1e-6
    assert len(trace) == 2
    assert all((after.num_tokens <= before.num_tokens).all() for before, after in pairwise(trace))


@pytest.mark.parametrize(("network", "kind"), [pair for pair in EVERYWHERE if pair[1] in ("merge", "fuse")])
def test_nothing_dropped_nothing_merged(network, kind):
    """The dense network: every group is one token, and the log of 1 is 0."""
    make, inputs = NETWORKS[network]
    model, x = make(kind, "packed"), inputs()
    dense = make(None, "packed")
    with torch.no_grad(), keep_all(model):
        logits, _ = model.forward_tokens(x)
        want = dense(x) if "transformers" not in network else dense(x).logits
    torch.testing.assert_close(logits, want, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("network", "kind"), EVERYWHERE)
def test_formula_equals_counter(network, kind):
    """To the last multiply-add of one input; the paper's accounting leaves out what finding the groups costs.

    Frames are compared padded to the longest of the clip, of which the formula counts the tokens alone.
    """
    make, inputs = NETWORKS[network]
    model, x = make(kind, "packed").float(), inputs()[:1].float()
    total, trace = counted_multiply_adds(model, x)
    cost = gflops(model, trace, x.shape)
    is_padded = kind in COMPARED and network in ("xvit", "divided", "space_only")
    assert total * (0.99 if is_padded else 1) - 0.5 <= cost.as_run.item() * 1e9 <= total + 0.5
    assert cost.paper.item() < cost.dense


@pytest.mark.parametrize(("network", "kind"), EVERYWHERE)
def test_gradients_are_finite(network, kind):
    """In training, with respect to every weight; and some reaches each block."""
    make, inputs = NETWORKS[network]
    model = make(kind, "packed").train()
    model.forward_tokens(inputs())[0].square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in grads.values())
    assert sum(bool(grad.any()) for grad in grads.values()) > 0.8 * len(list(model.parameters()))


@pytest.mark.parametrize("layout", ["padded", "static"])
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("network", ["ViT", "distilled ViT", "PS-ViT", "timm ViT", "timm Eva"])
def test_layouts_agree(network, kind, layout):
    """Padding changes where tokens lie, not what they are; gradients too."""
    if network == "timm Eva" and kind in FUSE:
        with pytest.raises(UserError, match=r"(sampler|dropped) \w+ does not work with this Eva: .*positions"):
            NETWORKS[network][0](kind, layout)
        return
    make, inputs = NETWORKS[network]
    packed, other, x = make(kind, "packed"), make(kind, layout), inputs()
    (want, trace), (got, other_trace) = packed.forward_tokens(x), other.forward_tokens(x)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    for entry, padded in zip(trace, other_trace, strict=True):
        assert torch.equal(entry.num_tokens, padded.num_tokens)
        assert torch.equal(entry.position, padded.position)
    for logits in (want, got):
        logits.square().sum().backward()
    for p, q in zip(packed.parameters(), other.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, atol=1e-9 * p.grad.abs().max().item() + 1e-12, rtol=0)


@pytest.mark.parametrize("layout", ["packed", "padded", "static"])
@pytest.mark.parametrize("kind", ["merge", "merge by score", "fuse", "ppt", "pitome", "merge, then sample"])
def test_a_broken_image_harms_nobody_else(kind, layout):
    model, x = vit_by_config(kind, layout), pictures(3)
    with torch.no_grad():
        good = model(x)
        x[1, 0, 3, 3] = torch.nan
        logits = model(x)
    torch.testing.assert_close(logits[[0, 2]], good[[0, 2]], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["MViT", "CvT"])
def test_networks_that_pool_their_keys_refuse_it(name):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.NAME", name, "ATS.ENABLE", True, "ATS.DROPPED", "merge", "ATS.BLOCKS", [9]])
    with torch.device("meta"), pytest.raises(UserError) as error:
        build_model(cfg)
    assert f"ATS.DROPPED merge: not for {name}: its keys are" in str(error.value)
    assert "use ATS.DROPPED drop" in str(error.value)
    cfg.merge_from_list(["ATS.SAMPLER", "pitome", "ATS.DROPPED", "drop"])
    with torch.device("meta"), pytest.raises(UserError) as error:
        build_model(cfg)
    assert f"ATS.SAMPLER pitome: not for {name}: its keys are" in str(error.value)
    assert "Choose from inverse_transform, topk, random." in str(error.value)


def test_help_and_messages_know_what_is_registered(merge_dropped, capsys):
    """As a value of ATS.SAMPLER, with the options of inverse transform sampling."""
    run_net.main(["--help", "ATS"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Choices: inverse_transform, topk, random, tome, evit, ppt, pitome, merge_sample, merge_dropped." in text
    assert "Read by ATS.SAMPLER inverse_transform, merge_dropped." in text  # ATS.RULE
    with pytest.raises(UserError, match="Did you mean merge_dropped"):
        ats.patch(timm_models.small_model("deit_tiny_patch16_224"), blocks=[1], sampler="merge_droped")
    model = vit_by_config("merge", "packed")
    own = tiny("ATS.ENABLE", True, "ATS.SAMPLER", "merge_dropped", "ATS.NUM_TOKENS", 0.6, "ATS.BLOCKS", [1, 3])
    torch.testing.assert_close(own(pictures(2)), model(pictures(2)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("layout", ["packed", "padded", "static"])
@pytest.mark.parametrize("kind", ["merge", "merge by score", "fuse"])
def test_the_order_of_the_patches_makes_no_difference(kind, layout):
    """Their positions are in their embeddings. (ToMe splits by order, so it is another matter.)"""
    model, x = vit_by_config(kind, layout), pictures(3)
    with torch.no_grad():
        tokens = model.embed(x)
        order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(64)])
        want, got = (model.run_blocks(own).prefix() for own in (tokens, tokens[:, order]))
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["merge", "merge by score", "fuse"])
def test_every_patch_is_in_one_token(kind):
    """Sizes add up to the patches and CLS, block by block; averages by size alone conserve the sum of the tokens."""
    model, outputs = vit_by_config(kind, "packed"), []
    for block in ats_blocks(model):
        block.register_forward_hook(lambda _module, _args, out: outputs.append(out))
    model(pictures(3))
    for tokens in outputs:
        sums = tokens.layout.pad(tokens.size).sum(1)
        torch.testing.assert_close(sums, torch.full_like(sums, 65), atol=1e-9, rtol=0)
        assert tokens.size[tokens.prefix_index()].tolist() == [1] * 3
        fused = (tokens.position < 0).reshape(-1)
        assert bool(fused.any()) == (kind == "fuse")


# ---- laws of the parts


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(3, 12), min_size=1, max_size=4), num_prefix=st.integers(1, 2),
    layout=st.sampled_from(["packed", "padded", "static"]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_every_token_goes_to_one_that_stays(lengths, num_prefix, layout, seed):
    """To itself if it stays, else to the most similar one of its sequence but prefix tokens; mass is conserved."""
    generator = torch.Generator().manual_seed(seed)
    longest, num = max(lengths), len(lengths)
    dense = RaggedTokens.from_dense(torch.randn(num, longest, 6, generator=generator), num_prefix, layout=layout)
    tokens, _ = dense.keep(torch.arange(longest) < torch.tensor(lengths)[:, None], max_tokens=longest)
    mask = tokens.layout.mask & (torch.rand(num, tokens.layout.longest, generator=generator) < 0.5)
    mask[:, : num_prefix + 1] = True  # at least one that can take others in
    kept, index = tokens.keep(mask, max_tokens=longest)
    k = torch.randn(tokens.layout.total, 2, 3, generator=generator)
    step = ats.reduction.Step(tokens, tokens.x, tokens, tokens, k, k, 1.0, kept, mask=mask, index=index)
    target = nearest_kept(step)
    sequence = tokens.layout.sequence.tolist()
    is_token = [True] * len(target) if tokens.layout.full else tokens.layout.mask.flatten().tolist()
    place = {int(p): i for i, p in zip(range(kept.layout.total), kept.grid_index, strict=True)
             if kept.layout.full or kept.layout.mask.flatten()[i]}  # fmt: skip
    for row, goes_to in enumerate(target.tolist()):
        if not is_token[row]:
            assert goes_to == -1
            continue
        own = int(tokens.grid_index[row])
        if own in place:
            assert goes_to == place[own]
            continue
        others = {i: torch.cosine_similarity(k[row].flatten(), k[index[i]].flatten(), dim=0).item()
                  for i in place.values()
                  if kept.layout.sequence[i] == sequence[row] and kept.position[i] >= num_prefix}  # fmt: skip
        assert others[goes_to] == pytest.approx(max(others.values()), abs=1e-6)
    size = torch.randint(1, 5, (len(target),), generator=generator).double() * torch.tensor(is_token)
    x = tokens.x.double()
    merged, total = weighted_mean(x, size, target, index)
    for i in range(num):
        own, left = (t.layout.sequence == i for t in (tokens, kept))
        left = left if kept.layout.full else left & kept.layout.mask.flatten()
        torch.testing.assert_close(total[left].sum(), size[own].sum(), atol=0, rtol=0)
        torch.testing.assert_close(merged[left].T @ total[left], x[own].T @ size[own], atol=1e-12, rtol=0)


# ---- several reductions in one network, against a loop over images and tokens

MERGE = {"SAMPLER": "inverse_transform", "DROPPED": "merge"}
STAGES = {
    "merge": [MERGE | {"BLOCKS": [1, 2, 3], "NUM_TOKENS": 30}],
    "merge by score": [
        MERGE | {"BLOCKS": [1, 2, 3], "NUM_TOKENS": 30, "MERGE_WEIGHT": "size_score", "SIZE_BIAS": 0.5},
    ],
    "fuse": [{"DROPPED": "fuse", "BLOCKS": [0, 1, 3], "NUM_TOKENS": 30}],
    "fuse by score": [
        {"DROPPED": "fuse", "BLOCKS": [1, 2], "NUM_TOKENS": 30, "MERGE_WEIGHT": "size_score", "PROP_ATTN": False},
    ],
    "ToMe, merge": [{"SAMPLER": "tome", "BLOCKS": [0, 1], "R": 9}, MERGE | {"BLOCKS": [2, 3], "NUM_TOKENS": 25}],
    "ToMe, merge with a weak bias": [
        {"SAMPLER": "tome", "BLOCKS": [0, 1], "R": 9}, MERGE | {"BLOCKS": [2], "NUM_TOKENS": 25, "SIZE_BIAS": 0.5},
    ],
    "ToMe without sizes, merge": [
        {"SAMPLER": "tome", "BLOCKS": [0, 1], "R": 9, "PROP_ATTN": False}, MERGE | {"BLOCKS": [3]},
    ],
    "sampling, ToMe": [
        {"SAMPLER": "inverse_transform", "BLOCKS": [0, 1]}, {"SAMPLER": "tome", "BLOCKS": [2, 3], "R": 7},
    ],
    "sampling, EViT": [
        {"BLOCKS": [0], "NUM_TOKENS": 50}, {"SAMPLER": "evit", "BLOCKS": [1, 3], "KEEP_RATE": [1.0, 0.6, 1.0, 0.7]},
    ],
    "merge, then sample": [
        {"SAMPLER": "merge_sample", "BLOCKS": [0, 1, 2, 3], "RATIO": 0.8, "POINTS": 0.7, "SWITCH": 0.5},
    ],
    "merge above a cosine, then sample": [
        {"SAMPLER": "merge_sample", "BLOCKS": [0, 1, 2, 3], "RATIO": 0.8, "POINTS": 0.7, "SWITCH": 0.5,
         "THRESHOLD": 0.5},
    ],
    "EViT, merge, ToMe": [
        {"SAMPLER": "evit", "BLOCKS": [0]}, MERGE | {"BLOCKS": [1, 2], "NUM_TOKENS": 28},
        {"SAMPLER": "tome", "BLOCKS": [3], "R": 4},
    ],
}  # fmt: skip


def slow(model: nn.Module, image: Tensor, stages: list[dict]) -> Tensor:
    """Logits [classes] of one image by the network's own modules, token by token."""
    plan = {block: stage for stage in stages for block in stage["BLOCKS"]}
    x, size, key_bias = model.embed(image[None])[0], None, None
    num_prefix, max_tokens = model.num_prefix_tokens, len(x)
    if stages[0].get("SAMPLER") == "merge_sample":  # merging by energy; then by size x score
        late = MERGE | {"MERGE_WEIGHT": "size_score", "SIZE_BIAS": 0.75, "POINTS": stages[0]["POINTS"]}
        if "THRESHOLD" in stages[0]:
            late |= {"NUM_TOKENS": round(late["POINTS"] * (num_prefix + (max_tokens - num_prefix) * 0.8**2))}
        plan = {block: stages[0] if block < 2 else late for block in plan}
    for index, block in enumerate(model.blocks):
        stage = plan.get(index, {})
        sampler = stage.get("SAMPLER", "inverse_transform") if stage else ""
        attn, n = block.attn, len(x)
        q, k, v = attn.qkv(block.norm1(x)).reshape(n, 3, attn.num_heads, -1).unbind(1)
        factor = float(stage.get("PROP_ATTN", True)) * stage.get("SIZE_BIAS", 1.0)
        if size is not None and sampler in ("inverse_transform", "tome", "merge_sample"):
            key_bias = factor * size.log()
        bias = torch.zeros(n, dtype=x.dtype) if key_bias is None else key_bias
        groups = [[i] for i in range(n)]
        dropped = stage.get("DROPPED", "drop")
        if sampler == "inverse_transform":
            row = (torch.einsum("hd,nhd->hn", q[0], k) * attn.scale + bias).softmax(-1).sum(0)
            score = (row * v.flatten(1).norm(dim=1))[num_prefix:]
            budget = stage.get("NUM_TOKENS", round(stage.get("POINTS", 1) * max_tokens))
            complete = size is None and n == max_tokens
            chosen = by_definition(score.tolist(), budget - num_prefix, complete=complete, rule="official")
            stay = [*range(num_prefix), *sorted(i + num_prefix for i in chosen)]
            max_tokens, groups = min(budget + (dropped == "fuse"), max_tokens), [[i] for i in stay]
            gone = sorted(set(range(n)) - set(stay))
            size = torch.ones(n, dtype=x.dtype) if size is None and dropped != "drop" else size
            for i in gone if dropped == "merge" else ():
                near = [torch.cosine_similarity(k[i].flatten(), k[j].flatten(), dim=0) for j in stay[num_prefix:]]
                groups[num_prefix + int(torch.stack(near).argmax())].append(i)
            groups += [gone] if dropped == "fuse" and gone else []
            weight = torch.ones(n, dtype=x.dtype) if size is None else size
            if stage.get("MERGE_WEIGHT") == "size_score":
                weight = weight * torch.cat([torch.ones(num_prefix, dtype=x.dtype), score])
            x = torch.stack([(weight[g, None] * x[g]).sum(0) / weight[g].sum() for g in groups])
            q = attn.qkv(block.norm1(x)).reshape(len(x), 3, attn.num_heads, -1)[:, 0]
        attention = (torch.einsum("qhd,khd->hqk", q, k) * attn.scale + bias).softmax(-1)
        x = x + attn.proj(torch.einsum("hqk,khd->qhd", attention, v).flatten(1))
        if sampler == "tome":
            size = torch.ones(n, dtype=x.dtype) if size is None else size
            metric, proposals = k.mean(1), []
            for a in range(2 * -(-num_prefix // 2), n, 2):
                near = {b: torch.cosine_similarity(metric[a], metric[b], dim=0).item()
                        for b in range(1, n, 2) if b >= num_prefix}  # fmt: skip
                best = max(near, key=near.get)
                proposals.append((near[best], a, best))
            r = min(stage["R"], (n - num_prefix) // 2)
            into = {a: b for _, a, b in sorted(proposals, reverse=True)[:r]}
            rest = [i for parity in (0, 1) for i in range(num_prefix, n) if i % 2 == parity and i not in into]
            groups = [[i] for i in range(num_prefix)] + [[b, *(a for a in into if into[a] == b)] for b in rest]
            x = torch.stack([(size[g, None] * x[g]).sum(0) / size[g].sum() for g in groups])
            max_tokens -= min(stage["R"], (max_tokens - num_prefix) // 2)
        elif sampler == "merge_sample":
            size = torch.ones(n, dtype=x.dtype) if size is None else size
            unit = torch.nn.functional.normalize(k.mean(1), dim=1)
            near = {(a, b): float(unit[a] @ unit[b]) for a in range(num_prefix, n) for b in range(num_prefix, n)}
            over = {pair: own - 0.75 * (1 - index / len(model.blocks)) for pair, own in near.items()}
            energy = {a: sum(over[a, b] if over[a, b] > 0 else math.expm1(over[a, b]) for b in range(num_prefix, n))
                      for a in range(num_prefix, n)}  # fmt: skip
            ranked = sorted(energy, key=energy.get, reverse=True)
            partner = {a: max(ranked[1::2], key=lambda b, a=a: near[a, b]) for a in ranked[::2]}
            best = sorted(partner, key=lambda a: near[a, partner[a]], reverse=True)
            if "THRESHOLD" in stage:
                r = sum(near[a, partner[a]] > stage["THRESHOLD"] for a in partner)
            else:
                r = math.floor((n - num_prefix) - (n - num_prefix) * stage["RATIO"])
                max_tokens -= r
            into = {a: partner[a] for a in best[: min(r, (n - num_prefix) // 2)]}
            rest = [a for a in ranked[::2] if a not in into] + ranked[1::2]
            groups = [[i] for i in range(num_prefix)] + [[b, *(a for a in into if into[a] == b)] for b in rest]
            x = torch.stack([(size[g, None] * x[g]).sum(0) / size[g].sum() for g in groups])
        elif sampler == "evit":
            rate = stage.get("KEEP_RATE", [0.7] * len(model.blocks))[index]
            row = attention[:, 0].mean(0)
            ranked = num_prefix + row[num_prefix:].argsort(descending=True, stable=True)
            num_kept = int(np.ceil(rate * (n - num_prefix)))
            gone = ranked[num_kept:]
            fused = [(row[gone, None] * x[gone]).sum(0, keepdim=True)] if len(gone) else []
            x = torch.cat([x[:num_prefix], x[ranked[:num_kept]], *fused])
            left = num_prefix + int(np.ceil(rate * (max_tokens - num_prefix)))
            max_tokens = left + (left < max_tokens)
        if sampler in ("tome", "merge_sample") or (sampler == "inverse_transform" and size is not None):
            size = torch.stack([size[g].sum() for g in groups])
            key_bias = factor * size.log()
        x = x + block.mlp(block.norm2(x))
    prefix = model.norm(x[:num_prefix])
    return model.classify(prefix[None])[0]


@pytest.mark.parametrize("layout", ["packed", "padded", "static"])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_stages_are_what_a_loop_computes(name, distilled, layout):
    """For every image on its own, whatever the others keep."""
    model = tiny("ATS.ENABLE", True, "ATS.STAGES", STAGES[name], "ATS.LAYOUT", layout, "VIT.DISTILLED", distilled)
    dense, x = tiny("ATS.ENABLE", False, "VIT.DISTILLED", distilled), pictures(3)
    dense.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits, trace = model.forward_tokens(x)
        want = torch.stack([slow(dense, image, STAGES[name]) for image in x])
    torch.testing.assert_close(logits, want, atol=1e-10, rtol=0)
    assert [entry.block for entry in trace] == sorted(block for stage in STAGES[name] for block in stage["BLOCKS"])
    if name == "sampling, ToMe":
        assert len(trace[-1].num_tokens.unique()) > 1  # ragged behind sampling, and behind ToMe


def test_sizes_carry_over_from_stage_to_stage():
    """Every patch is in one token; a key's bias is the log of its size."""
    model, outputs = tiny("ATS.ENABLE", True, "ATS.STAGES", STAGES["ToMe, merge"]), []
    for block in ats_blocks(model):
        block.register_forward_hook(lambda _module, _args, out: outputs.append(out))
    with torch.no_grad():
        model(pictures(3))
    assert len(outputs) == 4
    for tokens in outputs:
        assert tokens.layout.pad(tokens.size).sum(1).tolist() == [65] * 3
        assert torch.equal(tokens.key_bias, tokens.size.log())
        assert tokens.size[tokens.prefix_index()].tolist() == [1] * 3
    assert outputs[-1].size.max() > 4


@torch.no_grad()
def test_stages_of_a_patched_model():
    """`ats.patch(model, stages=...)` is MODEL.NAME timm/<name> with ATS.STAGES; it can be changed and taken out."""
    stages = STAGES["ToMe, merge"]
    spoken = [{name.lower(): value for name, value in stage.items()} for stage in stages]
    ours = timm_by_config_with_stages(stages)
    host = timm_models.timm.create_model(
        "deit3_small_patch16_224", num_classes=4, img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3
    )
    host = host.double().eval()
    host.load_state_dict(ours.state_dict())
    x = pictures(2)
    dense = host(x)
    ats.patch(host, stages=spoken)
    want, trace = ours.forward_tokens(x)
    torch.testing.assert_close(host(x), want, atol=1e-12, rtol=0)
    assert [entry.block for entry in trace] == [0, 1, 2, 3]
    assert trace[1].num_tokens.tolist() == [17 - 8 - 4] * 2  # at most half of the 16, then of the 8 patches
    host.ats.stages = [{"blocks": [3], "num_tokens": 9}]
    assert [type(block).__name__ for block in host.blocks] == ["Block"] * 3 + ["ATSViTBlock"]
    with pytest.raises(UserError, match=r"stages\[1\] blocks: block 0 is in two stages"):
        host.ats.stages = [{"sampler": "tome", "blocks": [0]}, {"blocks": [0]}]
    with pytest.raises(UserError, match=r"stages\[0\] r -1 \(block 0\)"):
        host.ats.stages = [{"sampler": "tome", "blocks": [0], "r": -1}]
    with pytest.raises(UserError, match=r"stages\[0\] num_tokens is not an option of stages\[0\] sampler tome"):
        host.ats.stages = [{"sampler": "tome", "blocks": [0], "num_tokens": 9}]
    with pytest.raises(UserError, match="not both"):
        ats.patch(ats.unpatch(host), stages=spoken, blocks=[1])
    assert torch.equal(host(x), dense)


def timm_by_config_with_stages(stages: list[dict]) -> nn.Module:
    return (
        randomise(build_model(test_timm_config.config("deit3_small_patch16_224", "ATS.STAGES", stages))).double().eval()
    )


def test_trains_with_dropout_and_stochastic_depth():
    model = small_vit(dropped="merge", num_tokens=0.5, drop_path_rate=0.5, attn_drop_rate=0.1, drop_rate=0.1)
    model.train()(pictures(4)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_half_precision():
    """Under autocast sizes stay whole numbers and logits finite."""
    model, outputs = tiny("ATS.ENABLE", True, *keys_of("merge"), dtype=torch.float32), []
    ats_blocks(model)[-1].register_forward_hook(lambda _module, _args, out: outputs.append(out))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(pictures(2, torch.float32)).isfinite().all()
    assert outputs[0].layout.pad(outputs[0].size).sum(1).tolist() == [65, 65]


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ([], "ViT + ATS"),
        (["ATS.SAMPLER", "topk"], "ViT + ATS (topk)"),
        (["ATS.SAMPLER", "keep_all"], "ViT + ATS (keep_all)"),
        (["ATS.DROPPED", "merge"], "ViT + ATS merge"),
        (["ATS.SAMPLER", "topk", "ATS.DROPPED", "fuse"], "ViT + ATS (topk) fuse"),
        (["ATS.STAGES", STAGES["sampling, EViT"]], "ViT + ATS + EViT"),
        (["ATS.ENABLE", False], "ViT dense"),
    ],
)
def test_tables_name_them(keys, name, keep_all):
    cfg = get_cfg()
    cfg.merge_from_list(["ATS.ENABLE", True, *keys])
    assert model_name(cfg) == name
