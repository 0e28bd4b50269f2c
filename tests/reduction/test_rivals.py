"""ToMe, EViT, PPT and PiToMe: golden numbers of their authors' code, and the laws that hold on any input.

Golden cases: fixtures/image/G_tome_* (facebookresearch/ToMe), H_evit_* (youweiliang/evit), I_ppt_* (xjwu1024/PPT) and
J_pitome_* (hchautran/PiToMe), unmodified; weights by the recipe in their case.json. Their images were chosen for wide
margins, so tokens are compared exactly.
"""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import yaml
from golden import golden_case, images, weights_by_seed
from helpers import check_gradients, counted_multiply_adds, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Dinov2Config, Dinov2ForImageClassification

import ats
from ats.checkpoint import load_weights
from ats.config import get_cfg, load_config, schema
from ats.errors import UserError
from ats.flops import gflops
from ats.models import build_model
from ats.reduction import REDUCTIONS
from ats.reduction.evit import EViT
from ats.reduction.merging import bipartite_soft_matching, sizes
from ats.reduction.plan import plan_reductions
from ats.tokens import RaggedTokens

TOME, EVIT = ("G_tome_r8", "G_tome_schedule"), ("H_evit_k07_fuse", "H_evit_k05_nofuse")
PPT, PITOME = ("I_ppt_r12", "I_ppt_list_noprop"), ("J_pitome_r090", "J_pitome_r070")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
TINY = [
    "VIT.IMG_SIZE", 32, "VIT.PATCH_SIZE", 4, "VIT.EMBED_DIM", 32, "VIT.NUM_HEADS", 2, "VIT.DEPTH", 4,
    "VIT.MLP_RATIO", 2, "MODEL.NUM_CLASSES", 7,
]  # fmt: skip


def tiny(*overrides: object, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A ViT of 4 blocks and 64 patches whose tokens differ."""
    cfg = get_cfg()
    cfg.merge_from_list([*TINY, "ATS.BLOCKS", [0, 1, 2, 3], *overrides])
    return randomise(build_model(cfg)).to(dtype).eval()


def pictures(num: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)


def load_case(name: str, dtype: torch.dtype):
    """Network with its weights, golden numbers, images."""
    case, golden = golden_case(name)
    c = case["config"]
    if "pp_loc_list" in c:
        blocks, requested = c["pp_loc_list"], c["r_per_pp_block_requested"]
        r = [0] * c["depth"]
        for block, own in zip(blocks, requested, strict=True):
            r[block] = own
        keys = ["ATS.SAMPLER", "ppt", "ATS.BLOCKS", blocks, "PPT.R", c["r"] if isinstance(c["r"], int) else r]
        keys += ["PPT.THRESHOLD", c["threshold"], "PPT.PROP_ATTN", c["prop_attn"]]
    elif "ratio" in c:
        keys = ["ATS.SAMPLER", "pitome", "ATS.BLOCKS", list(range(6)), "PITOME.RATIO", c["ratio"]]
    elif "r" in c:
        keys = ["ATS.SAMPLER", "tome", "ATS.BLOCKS", list(range(6)), "TOME.R", c["r"], "TOME.PROP_ATTN", c["prop_attn"]]
    else:
        keys = ["ATS.SAMPLER", "evit", "ATS.BLOCKS", c["drop_blocks"], "EVIT.KEEP_RATE", c["keep_rate"]]
        keys += ["EVIT.FUSE_TOKEN", c["fuse_token"]]
    cfg = get_cfg()
    cfg.merge_from_list([
        "VIT.IMG_SIZE", c["img_size"], "VIT.PATCH_SIZE", c["patch_size"], "VIT.EMBED_DIM", c["embed_dim"],
        "VIT.DEPTH", c["depth"], "VIT.NUM_HEADS", c["num_heads"], "MODEL.NUM_CLASSES", c["num_classes"],
        "ATS.ENABLE", True, *keys,
    ])  # fmt: skip
    model = build_model(cfg)
    load_weights(model, weights_by_seed(case["weights"], model))
    return model.to(dtype).eval(), golden, images(golden["image_u8"], dtype)


def run_with_outputs(model: torch.nn.Module, x: torch.Tensor):
    """Logits, trace, and the RaggedTokens that leave each ATS block."""
    outputs: dict[int, RaggedTokens] = {}
    hooks = [
        block.register_forward_hook(lambda _, __, out, index=index: outputs.__setitem__(index, out))
        for index, block in enumerate(model.blocks)
        if isinstance(block, ats.models.block.ATSBlock)
    ]
    with torch.no_grad():
        logits, trace = model.forward_tokens(x)
    for hook in hooks:
        hook.remove()
    return logits, trace, outputs


@DTYPES
@pytest.mark.parametrize("name", TOME)
def test_tome_equals_its_authors_code(name, dtype):
    """Which tokens merged into which, sizes, order, block outputs and logits."""
    model, golden, x = load_case(name, dtype)
    logits, trace, outputs = run_with_outputs(model, x)
    want = golden["logits" if dtype == torch.float32 else "logits_f64"]
    np.testing.assert_allclose(logits, want, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
    for block, tokens in outputs.items():
        assert tokens.layout.lengths.tolist() == [golden["n_tokens"][block]] * len(x)
        assign, size = golden[f"block{block}_assign"], golden[f"block{block}_size"]
        position = tokens.layout.pad(tokens.position)
        own_group = np.take_along_axis(assign.astype(np.int64), position.numpy(), axis=1)
        assert (own_group == np.arange(position.shape[1])).all()  # a token stands where one of its group stood
        own_size = tokens.layout.pad(torch.ones(len(tokens.x)) if tokens.size is None else tokens.size)
        assert (own_size.numpy() == size).all()
        if f"block{block}_out" in golden:
            np.testing.assert_allclose(tokens.layout.pad(tokens.x), golden[f"block{block}_out"], atol=5e-5, rtol=0)
    for entry in trace:
        assert entry.num_tokens.tolist() == [golden["n_tokens"][entry.block]] * len(x)


@pytest.mark.parametrize("name", TOME)
def test_matching_alone_equals_its_authors_code(name):
    """From the stored metric of one block: where every position of its input goes."""
    _, golden = golden_case(name)
    block = next(key for key in golden if key.endswith("_metric")).removesuffix("_metric")
    metric, want = torch.from_numpy(golden[f"{block}_metric"]), golden[f"{block}_map"]
    matching = bipartite_soft_matching(metric, metric.shape[1] - int(want.max()) - 1)
    assert (matching.target.numpy() == want).all()


@DTYPES
@pytest.mark.parametrize("name", PPT + PITOME)
def test_ppt_and_pitome_equal_their_authors_code(name, dtype):
    """Which tokens were dropped or merged into which, sizes, block outputs and logits."""
    model, golden, x = load_case(name, dtype)
    logits, trace, outputs = run_with_outputs(model, x)
    want = golden["logits" if dtype == torch.float32 else "logits_f64"]
    np.testing.assert_allclose(logits, want, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
    for entry in trace:
        assert entry.num_tokens.tolist() == [golden["n_tokens"][entry.block]] * len(x)
        tokens, assign = outputs[entry.block], golden[f"block{entry.block}_assign"].astype(np.int64)
        position, size = (tokens.layout.pad(t).numpy() for t in (tokens.position, sizes(tokens, dtype)))
        want_size = golden[f"block{entry.block}_size"]
        out = tokens.layout.pad(tokens.x).numpy()
        for image in range(len(x)):
            place = assign[image][position[image]]  # in the reference's order: a later block may not see ours
            assert sorted(place) == list(range(len(place)))
            if name in PPT:
                assert (place == np.arange(len(place))).all()  # in PPT's the order decides later merges
            assert (size[image] == want_size[image][place]).all()
            if f"block{entry.block}_out" in golden:
                want_out = golden[f"block{entry.block}_out"][image][place]
                np.testing.assert_allclose(out[image], want_out, atol=5e-5, rtol=0)


def test_ppt_that_always_merges_is_tome():
    """With an infinite threshold, in every block, to the bit."""
    x = pictures(3)
    ppt = tiny("ATS.ENABLE", True, "ATS.SAMPLER", "ppt", "PPT.R", 8, "PPT.THRESHOLD", 1e9)
    tome = tiny("ATS.ENABLE", True, "ATS.SAMPLER", "tome", "TOME.R", 8)
    assert torch.equal(ppt(x), tome(x))


@DTYPES
@pytest.mark.parametrize("name", EVIT)
def test_evit_equals_its_authors_code(name, dtype):
    """Kept tokens in their order, the fused token, block outputs and logits."""
    model, golden, x = load_case(name, dtype)
    logits, trace, outputs = run_with_outputs(model, x)
    want = golden["logits" if dtype == torch.float32 else "logits_f64"]
    np.testing.assert_allclose(logits, want, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
    assert [entry.block for entry in trace] == [1, 3]
    for entry in trace:
        tokens, ids = outputs[entry.block], golden[f"block{entry.block}_token_ids"]
        num_patches = tokens.num_positions - 1
        want_position = np.where(ids >= num_patches, -1, ids + 1)  # CLS is 0, a fused token has no position
        assert (tokens.layout.pad(tokens.position).numpy() == want_position).all()
        assert entry.num_tokens.tolist() == [golden["n_tokens"][entry.block]] * len(x)
        for patches, row in zip(entry.patches, ids, strict=True):
            assert patches.tolist() == sorted(i for i in row if 0 <= i < num_patches)
        np.testing.assert_allclose(tokens.layout.pad(tokens.x), golden[f"block{entry.block}_out"], atol=5e-5, rtol=0)


@DTYPES
@pytest.mark.parametrize("name", TOME + EVIT + PPT + PITOME)
def test_gradients_equal_the_authors_code(name, dtype):
    """With respect to the image and every stored weight; through EViT's fused weights too."""
    model, golden, x = load_case(name, dtype)
    x.requires_grad_()
    check_gradients(model, x, model(x), golden, prefix="grad_")


@pytest.mark.parametrize("sampler", ["tome", "evit", "ppt", "pitome"])
@pytest.mark.parametrize("distilled", [False, True])
def test_nothing_reduced_is_the_dense_network(sampler, distilled):
    """r = 0, keep rate and ratio 1."""
    keys = ["ATS.SAMPLER", sampler, "TOME.R", 0, "EVIT.KEEP_RATE", 1.0, "PPT.R", 0, "PITOME.RATIO", 1.0]
    keys += ["VIT.DISTILLED", distilled]
    x = pictures(2)
    reduced, dense = (tiny(*keys, "ATS.ENABLE", enable) for enable in (True, False))
    torch.testing.assert_close(reduced(x), dense(x), atol=1e-12, rtol=0)
    assert all(entry.num_tokens.tolist() == [64 + 1 + distilled] * 2 for entry in reduced.forward_tokens(x)[1])


RIVALS = pytest.mark.parametrize(
    "keys",
    [
        ["ATS.SAMPLER", "tome", "TOME.R", 9],
        ["ATS.SAMPLER", "evit"],
        ["ATS.SAMPLER", "ppt", "PPT.R", 9, "PPT.THRESHOLD", 2e-6],
        ["ATS.SAMPLER", "pitome", "PITOME.RATIO", 0.7],
    ],
    ids=["tome", "evit", "ppt", "pitome"],
)


@RIVALS
@pytest.mark.parametrize("distilled", [False, True])
def test_batch_makes_no_difference(keys, distilled):
    """Every image alone, and the batch reversed."""
    model, x = tiny(*keys, "ATS.ENABLE", True, "VIT.DISTILLED", distilled), pictures(4)
    with torch.no_grad():
        logits = model(x)
        alone = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(logits, alone, atol=1e-12, rtol=0)
        torch.testing.assert_close(logits.flip(0), model(x.flip(0)), atol=1e-12, rtol=0)
    dense = tiny("ATS.ENABLE", False, "VIT.DISTILLED", distilled)
    assert (logits - dense(x)).abs().max() > 1e-3


@RIVALS
def test_trains_and_exports(keys):
    """Every weight gets a finite gradient under stochastic depth and dropout; no shape depends on the image, so the
    static layout exports, with the same logits.
    """
    model = tiny(*keys, "ATS.ENABLE", True, "VIT.DROP_PATH_RATE", 0.5, "VIT.ATTN_DROP_RATE", 0.1)
    model.train()(pictures(3)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    static, x = tiny(*keys, "ATS.ENABLE", True, "ATS.LAYOUT", "static"), pictures(2)
    exported = torch.export.export(static, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x.flip(0)), model.eval()(x.flip(0)), atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=60)
@given(
    num_patches=st.lists(st.integers(2, 24), min_size=3, max_size=3), num_prefix=st.integers(0, 5),
    r=st.integers(0, 14), seed=st.integers(0, 2**16), constant=st.booleans(),
)  # fmt: skip
def test_merging_conserves_size_and_mass(num_patches, num_prefix, r, seed, constant):
    """For any prefix, any r and sequences of any lengths, equal tokens too: every position is left or goes, the prefix
    stays first and alone, the total size and the size-weighted sum of the tokens are what they were; and a sequence
    merges as it does alone.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = num_prefix + torch.tensor(num_patches)
    longest = int(lengths.max())
    x = torch.randn(3, longest, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 9, (3, longest), generator=generator).double()
    metric = torch.ones_like(x) if constant else x
    matching = bipartite_soft_matching(metric, r, num_prefix_tokens=num_prefix, lengths=lengths)
    new_x, new_size = matching.merge(x, size)
    assert matching.lengths.tolist() == [num_prefix + n - min(r, n // 2) for n in num_patches]
    assert new_x.shape == (3, int(matching.lengths.max()), 5)
    for i, (n, left) in enumerate(zip(lengths.tolist(), matching.lengths.tolist(), strict=True)):
        order, target = matching.order[i, :left], matching.target[i]
        assert order[:num_prefix].tolist() == list(range(num_prefix))
        assert target[order].tolist() == list(range(left))  # those that stay, at their place
        assert (target[:n] >= 0).all()
        assert (target[:n] < left).all()
        assert (target[n:] == -1).all()
        torch.testing.assert_close(new_size[i, :left].sum(), size[i, :n].sum(), atol=0, rtol=0)
        assert torch.equal(new_size[i, :num_prefix], size[i, :num_prefix])
        mass, new_mass = (x[i, :n].T @ size[i, :n], new_x[i, :left].T @ new_size[i, :left])
        torch.testing.assert_close(new_mass, mass, atol=1e-10, rtol=0)
        if constant:  # between equal tokens rounding decides
            continue
        alone = bipartite_soft_matching(metric[i : i + 1, :n], r, num_prefix_tokens=num_prefix)
        assert torch.equal(alone.order[0], order)
        assert torch.equal(alone.target[0], target[:n])
        assert torch.equal(alone.merge(x[i : i + 1, :n], size[i : i + 1, :n])[0][0], new_x[i, :left])


def test_sizes_are_conserved_through_a_network():
    """Every patch is in exactly one token behind the last block, and CLS in its own."""
    _, _, outputs = run_with_outputs(tiny("ATS.ENABLE", True, "ATS.SAMPLER", "tome", "TOME.R", 40), pictures(3))
    assert [tokens.layout.longest for tokens in outputs.values()] == [33, 17, 9, 5]  # at most half of the patches
    for tokens in outputs.values():
        size = tokens.layout.pad(tokens.size)
        assert size.sum(1).tolist() == [65] * 3
        assert size[:, 0].tolist() == [1] * 3


def timm_host() -> torch.nn.Module:
    """A timm ViT with LayerScale and norms of queries and keys, none of them near 1."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=7, init_values=0.5, qk_norm=True
    )
    return randomise(model).double().eval()


def slow_tome(model: torch.nn.Module, image: torch.Tensor, r: int, prop_attn: bool) -> torch.Tensor:
    """ToMe of one image through the host's own modules, token by token; logits [1, classes]."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
    size = torch.ones(x.shape[1], dtype=x.dtype)
    for block in model.blocks:
        inside = block.norm1(x)
        mask = size.log()[None, None, None].expand(1, 1, len(size), -1) if prop_attn else None
        x = x + block.ls1(block.attn(inside, attn_mask=mask))
        k = block.attn.qkv(inside).reshape(len(size), 3, block.attn.num_heads, -1)[:, 1]
        metric = block.attn.k_norm(k).mean(1)
        proposals = []
        for a in range(2, len(size), 2):
            cosine = {b: torch.cosine_similarity(metric[a], metric[b], dim=0).item() for b in range(1, len(size), 2)}
            b = max(cosine, key=cosine.get)
            proposals.append((cosine[b], a, b))
        merged = {a: b for _, a, b in sorted(proposals, reverse=True)[:r]}
        groups = [[i] for i in range(0, len(size), 2) if i not in merged]
        groups += [[b, *(a for a, into in merged.items() if into == b)] for b in range(1, len(size), 2)]
        x = torch.stack([(size[g, None] * x[0, g]).sum(0) / size[g].sum() for g in groups])[None]
        size = torch.stack([size[g].sum() for g in groups])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x))


def slow_evit(model: torch.nn.Module, image: torch.Tensor, num_kept: tuple[int, ...]) -> torch.Tensor:
    """EViT of one image through the host's own modules; logits [1, classes]."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
    for block, k_left in zip(model.blocks, num_kept, strict=True):
        inside, attn = block.norm1(x), block.attn
        q, k, _ = attn.qkv(inside)[0].reshape(x.shape[1], 3, attn.num_heads, -1).unbind(1)
        row = torch.einsum("hd,nhd->hn", attn.q_norm(q)[0] * attn.scale, attn.k_norm(k)).softmax(-1).mean(0)
        x = x + block.ls1(attn(inside))
        ranked = sorted(range(1, x.shape[1]), key=lambda i, row=row: -row[i].item())
        fused = sum(row[i] * x[0, i] for i in ranked[k_left:])
        x = torch.stack([x[0, 0], *(x[0, i] for i in ranked[:k_left]), fused])[None]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("prop_attn", [True, False])
def test_tome_in_a_host_with_layer_scale_and_qk_norm(prop_attn):
    """`ats.patch` computes what a loop over tokens computes with the host's own modules; r = 0 is the host."""
    host, model, x = timm_host(), timm_host(), pictures(2)
    ats.patch(model, blocks=range(3), sampler="tome", r=9, prop_attn=prop_attn)
    with torch.no_grad():
        want = torch.cat([slow_tome(host, image, 9, prop_attn) for image in x])
        torch.testing.assert_close(model(x), want, atol=1e-12, rtol=0)
        model.ats.r = 0
        torch.testing.assert_close(model(x), host(x), atol=1e-12, rtol=0)
        assert (want - host(x)).abs().max() > 1e-4


def test_evit_in_a_host_with_layer_scale_and_qk_norm():
    """The same of EViT, whose later blocks score and fuse earlier fused tokens; keep rate 1 is the host."""
    host, model, x = timm_host(), timm_host(), pictures(2)
    ats.patch(model, blocks=range(3), sampler="evit", keep_rate=[0.5, 0.7, 0.6])
    with torch.no_grad():
        want = torch.cat([slow_evit(host, image, (32, 24, 15)) for image in x])
        torch.testing.assert_close(model(x), want, atol=1e-12, rtol=0)
        model.ats.keep_rate = 1.0
        torch.testing.assert_close(model(x), host(x), atol=1e-12, rtol=0)
        ats.unpatch(model)
        assert torch.equal(model(x), host(x))


def test_features_stand_where_the_tokens_stood():
    """`forward_features` is the host's shape: zeros where a token was merged away or fused, though as many tokens may
    leave as came in (63 of 64 kept, and one fused).
    """
    model, x = timm_host(), pictures(2)
    ats.patch(model, blocks=[1], sampler="evit", keep_rate=63 / 64)
    model.ats.trace = True
    features = model.forward_features(x)
    assert features.shape == (2, 65, 32)
    assert model.ats.last[0].num_tokens.tolist() == [65, 65]
    gone = (features == 0).all(-1)
    assert gone.sum(1).tolist() == [1, 1]
    for row, patches in zip(gone, model.ats.last[0].patches, strict=True):
        assert sorted([*patches.tolist(), row.nonzero().item() - 1]) == list(range(64))
    model.ats.sampler = "tome"
    assert (model.forward_features(x) == 0).all(-1).sum(1).tolist() == [8, 8]


def test_number_kept_is_a_ceiling_of_the_float_product():
    """0.55 * 100 is a little more than 55: the authors' code keeps 56."""
    for num_prefix, keep_rate, num_tokens, want in ((1, 0.55, 101, 57), (1, 0.5, 65, 33), (2, 0.7, 66, 2 + 45)):
        evit = EViT(num_prefix_tokens=num_prefix, keep_rate=keep_rate)
        assert evit.num_kept(torch.tensor(num_tokens)) == want
        assert evit.limit(num_tokens) == want + 1  # the fused token


@pytest.mark.parametrize("size", [32, 40])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        ["ATS.SAMPLER", "tome", "TOME.R", 5],
        ["ATS.SAMPLER", "tome", "TOME.R", [0, 30, 1, 40], "TOME.PROP_ATTN", False],
        ["ATS.SAMPLER", "tome", "ATS.BLOCKS", [1], "TOME.R", 3],
        ["ATS.SAMPLER", "evit", "EVIT.KEEP_RATE", [0.6, 1, 0.99, 0.5]],
        ["ATS.SAMPLER", "evit", "ATS.BLOCKS", [1, 3], "EVIT.FUSE_TOKEN", False],
        ["ATS.SAMPLER", "ppt", "ATS.BLOCKS", [0, 2], "PPT.R", 7],
        ["ATS.SAMPLER", "pitome", "PITOME.RATIO", [0.9, 1.0, 0.7, 0.8]],
    ],
    ids=str,
)
def test_formula_equals_counter(keys, distilled, size):
    """To the last multiply-add; without what finding the tokens costs in the paper's accounting."""
    model = tiny("ATS.ENABLE", True, "VIT.DISTILLED", distilled, *keys, dtype=torch.float32)
    x = torch.randn(1, 3, size, size)
    total, trace = counted_multiply_adds(model, x)
    cost = gflops(model, trace, x.shape)
    assert cost.as_run.item() * 1e9 == pytest.approx(total, abs=0.5)
    assert cost.paper.item() < cost.as_run.item() < cost.dense


def test_degenerate_images_and_half_precision():
    """A constant image, NaN, autocast to bfloat16: nothing raises, counts are the configuration's; sizes stay whole."""
    for keys in (["ATS.SAMPLER", "tome", "TOME.R", 20], ["ATS.SAMPLER", "evit"]):
        model = tiny("ATS.ENABLE", True, *keys, dtype=torch.float32)
        want = [entry.num_tokens[0].item() for entry in model.forward_tokens(pictures(1, torch.float32))[1]]
        for x in (torch.zeros(2, 3, 32, 32), torch.full((2, 3, 32, 32), torch.nan)):
            assert [entry.num_tokens.tolist() for entry in model.forward_tokens(x)[1]] == [[n, n] for n in want]
        assert model(torch.zeros(2, 3, 32, 32)).isfinite().all()
        with torch.autocast("cpu", torch.bfloat16):
            logits, _, outputs = run_with_outputs(model, pictures(2, torch.float32))
        assert logits.isfinite().all()
        if keys[1] == "tome":
            assert outputs[3].size.unflatten(0, (2, -1)).sum(1).tolist() == [65, 65]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["MODEL.NAME", "MViT"], "ATS.SAMPLER tome: not for MViT: its keys are pooled .*inverse_transform"),
        (["MODEL.NAME", "CvT"], "ATS.SAMPLER tome: not for CvT: its keys are convolved .*inverse_transform"),
        (["MODEL.NAME", "MViT", "ATS.SAMPLER", "evit"], "ATS.SAMPLER evit: not for MViT"),
        (["TOME.R", -1], "TOME.R -1"),
        (["TOME.R", [1, 2]], "TOME.R has 2 entries, the network 4 blocks"),
        (["ATS.SAMPLER", "evit", "EVIT.KEEP_RATE", 0], "EVIT.KEEP_RATE 0"),
        (["ATS.SAMPLER", "evit", "EVIT.KEEP_RATE", [1, 0.5]], "EVIT.KEEP_RATE has 2 entries"),
        (["ATS.SAMPLER", "tomee"], "Did you mean tome"),
        (["MODEL.NAME", "timm/vit_tiny_patch16_dinov3_qkvb"], "Eva"),
        (["ATS.DROPPED", "merge"], "DROPPED merge has no effect with ATS.SAMPLER tome: use .*drop, or .*topk"),
        (["ATS.SAMPLER", "topk", "ATS.SCHEDULE", "late"], "SCHEDULE late has no effect with .* topk: .*tome, evit"),
        (["ATS.SCHEDULE", "late", "TOME.R", [1, 2, 3, 4]], "ATS.SCHEDULE late spreads one amount .* TOME.R is a list"),
        (["ATS.SAMPLER", "ppt", "PPT.THRESHOLD", -1], "PPT.THRESHOLD -1"),
        (["ATS.SAMPLER", "pitome", "PITOME.RATIO", 1.2], "PITOME.RATIO 1.2"),
        (["ATS.SAMPLER", "merge_sample", "MERGE_SAMPLE.POINTS", 0], "MERGE_SAMPLE.POINTS 0"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(keys, message):
    """One message that names the key."""
    overrides = [*TINY, "ATS.ENABLE", True, "ATS.BLOCKS", [1], "ATS.SAMPLER", "tome", *keys]
    with torch.device("meta"), pytest.raises(UserError, match=message):
        build_model(load_config(None, overrides))


@pytest.mark.parametrize(
    ("sampler", "amount"),
    [("tome", 7), ("ppt", 9), ("evit", 0.8), ("pitome", 0.85)],
    ids=["tome", "ppt", "evit", "pitome"],
)
def test_a_late_schedule_moves_the_same_total_to_later_blocks(sampler, amount):
    """In proportion to ((l + 1) / depth)^2, at the same total."""
    name = REDUCTIONS[sampler].amount
    stage = {"sampler": sampler, "blocks": [1, 3, 8, 11], name: amount}
    flat = plan_reductions([stage], depth=12)
    late = plan_reductions([stage | {"schedule": "late"}], depth=12)
    own = [[getattr(r, name) for r in plan.values()] for plan in (flat, late)]
    assert own[0] == [amount] * 4
    gone = [x if amount > 1 else 1 - x for x in own[1]]
    total = 4 * (amount if amount > 1 else 1 - amount)
    assert sum(gone) == pytest.approx(total)
    weights = [4, 16, 81, 144]
    for share, weight in zip(gone, weights, strict=True):
        assert share == pytest.approx(total * weight / sum(weights), abs=1 if amount > 1 else 1e-9)


def test_calibrate_writes_a_late_schedule_out():
    """As amounts per block that follow it; the model has them, and its lines make the same network."""
    model = tiny("ATS.ENABLE", True, "ATS.SAMPLER", "tome", "ATS.SCHEDULE", "late", dtype=torch.float32)
    x = pictures(4, torch.float32)
    found = ats.calibrate(model, x, speedup=1.3, progress=False, tolerance=0.02)
    assert list(found.num_tokens) == sorted(found.num_tokens)
    assert found.num_tokens[0] < found.num_tokens[-1]
    lines = yaml.safe_load(found.yaml())
    assert lines["ATS"]["SCHEDULE"] == "flat"
    again = tiny("ATS.ENABLE", True, "ATS.SAMPLER", "tome", "TOME.R", lines["TOME"]["R"], dtype=torch.float32)
    again.load_state_dict(model.state_dict())
    assert torch.equal(model(x), again(x))


def test_another_sampler_brings_its_own_defaults():
    """r of ToMe is not that of PPT; what was set by hand stays."""
    model = timm_host()
    ats.patch(model, blocks=[1], sampler="tome")
    model.ats.sampler = "ppt"
    assert model.ats.r == 50
    model.ats.r = 5
    model.ats.sampler = "tome"
    assert model.ats.r == 5
    with pytest.raises(UserError, match="dropped merge has no effect with sampler tome"):
        ats.patch(timm_host(), blocks=[1], sampler="tome", dropped="merge")


def test_patch_refuses_heads_that_read_more_than_cls():
    """Merged tokens count for several in an average; the model stays what it was."""
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, global_pool="avg"
    )
    with pytest.raises(UserError, match=r"VisionTransformer.*head does not read CLS"):
        ats.patch(model, blocks=[1], sampler="tome")
    assert type(model) is timm.models.VisionTransformer
    host = timm_host()
    with pytest.raises(UserError, match="r -3 "):
        ats.patch(host, blocks=[1], sampler="tome", r=-3)
    ats.patch(host, blocks=[1], sampler="tome")
    with pytest.raises(UserError, match="keep_rate 'x'"):
        host.ats.keep_rate = "x"


def test_patch_refuses_transformers_heads_that_read_more_than_cls():
    """By a message that says why; the model stays what it was."""
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = Dinov2ForImageClassification(Dinov2Config(**settings))
    for sampler in ("tome", "evit"):
        with pytest.raises(UserError, match=rf"sampler {sampler}.*Dinov2ForImageClassification.*averages the patches"):
            ats.patch(model, blocks=[1], sampler=sampler)
    assert type(model) is Dinov2ForImageClassification


def test_a_budget_that_means_nothing_is_said(caplog):
    """ATS.NUM_TOKENS does not steer ToMe or EViT: a warning says so."""
    schema._warn_once.cache_clear()  # once in a process
    tiny("ATS.ENABLE", True, "ATS.SAMPLER", "evit", "ATS.NUM_TOKENS", 0.5)
    assert "ATS.SAMPLER evit does not read ATS.NUM_TOKENS" in caplog.text
