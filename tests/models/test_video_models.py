"""The contract of the video networks made of ViT's blocks: X-ViT and TimeSformer, each with every way of sampling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import VIDEO_MODELS, clips, counted_multiply_adds, keep_all, video_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ats.config import load_config
from ats.errors import UserError
from ats.flops import dense_gflops, gflops
from ats.models import build_model

# (network, do all frames keep the same patches?)
MODES = [(kind, share) for kind in VIDEO_MODELS for share in (False, True) if not (kind == "joint" and share)]
GROUP = {"xvit": 4, "divided": 8, "space_only": 8}  # frames that sample together if they do
each_mode = pytest.mark.parametrize(
    ("kind", "share"), MODES, ids=lambda value: {True: "shared"}.get(value, value or "own")
)


def sampling_model(kind: str, share: bool, *overrides: object, **kwargs) -> torch.nn.Module:
    return video_model(kind, "ATS.ENABLE", True, "ATS.SHARE_FRAMES", share, *overrides, **kwargs)


@each_mode
def test_everything_kept_equals_dense(kind, share):
    """With every token kept in blocks 1 and 2 the logits and input gradients are the dense network's."""
    x = clips(2).requires_grad_()
    sparse = sampling_model(kind, share)
    with keep_all(sparse):
        got, trace = sparse.forward_tokens(x)
    dense = video_model(kind)
    dense.load_state_dict(sparse.state_dict())
    want = dense(x)
    assert trace[0].num_tokens.tolist() == ([1 + 64 * 8] * 2 if kind == "joint" else [65] * 16)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    weight = torch.randn_like(want)
    grads = [torch.autograd.grad((logits * weight).sum(), x)[0] for logits in (got, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-9)


@each_mode
def test_empty_batch(kind, share):
    assert sampling_model(kind, share)(clips(1)[:0]).shape == (0, 7)


@each_mode
@given(st.integers(0, 10**6), st.lists(st.integers(0, 2), min_size=2, max_size=3), st.sampled_from([1.0, 0.5, 20]))
@settings(max_examples=4)
def test_results_do_not_depend_on_the_batch(kind, share, seed, order, num_tokens):
    """Any batch of any clips in any order: each keeps the tokens, gets the logits and costs what it does alone."""
    model = sampling_model(kind, share, "ATS.NUM_TOKENS", num_tokens, seed=seed % 5)
    pool = clips(3, seed=seed)
    with torch.no_grad():
        logits, trace = model.forward_tokens(pool[order])
        cost = gflops(model, trace, pool[order].shape)
        num_sequences = len(trace[0].num_tokens) // len(order)
        for place, i in enumerate(order):
            alone, trace_alone = model.forward_tokens(pool[i : i + 1])
            torch.testing.assert_close(logits[place], alone[0], rtol=0, atol=1e-10)
            cost_alone = gflops(model, trace_alone, (1, *pool.shape[1:]))
            assert cost.as_run[place].item() == pytest.approx(cost_alone.as_run.item(), rel=1e-12)
            assert cost.paper[place].item() == pytest.approx(cost_alone.paper.item(), rel=1e-12)
            for entry, entry_alone in zip(trace, trace_alone, strict=True):
                own = entry.patches[place * num_sequences : (place + 1) * num_sequences]
                assert all(torch.equal(a, b) for a, b in zip(own, entry_alone.patches, strict=True))


@each_mode
@pytest.mark.parametrize("sampler", ["inverse_transform", "topk"])
def test_kept_sets(kind, share, sampler):
    """Patches never come back, K bounds them; frames differ unless they share, then their group keeps one set."""
    model = sampling_model(kind, share, "ATS.NUM_TOKENS", [1.0, 40, 20, 1.0], "ATS.SAMPLER", sampler)
    with torch.no_grad():
        _, trace = model.forward_tokens(clips(2))
    assert [entry.block for entry in trace] == [1, 2]
    num_sequences, num_patches = (2, 512) if kind == "joint" else (16, 64)
    previous = [set(range(num_patches))] * num_sequences
    for entry, bound in zip(trace, (40, 20), strict=True):
        assert len(entry.patches) == num_sequences
        assert 2 <= entry.num_tokens.min() <= entry.num_tokens.max() <= bound
        kept = [set(patches.tolist()) for patches in entry.patches]
        assert all(now <= before for now, before in zip(kept, previous, strict=True))
        if share:
            group = GROUP[kind]
            assert all(kept[i] == kept[i - i % group] for i in range(num_sequences))
            assert kept[0] != kept[group]
        elif kind != "joint":
            assert len({frozenset(k) for k in kept}) > 8
        previous = kept


@each_mode
@pytest.mark.parametrize("score", ["cls_attention_value_norm", "mean_attention"])
def test_formula_equals_counter(kind, share, score):
    """Multiply-adds by formula are torch's count at batch size 1, to the last one; fewer than the dense network's."""
    x = clips(1, dtype=torch.float32)
    model = sampling_model(kind, share, "ATS.NUM_TOKENS", 0.4, "ATS.SCORE", score, dtype=torch.float32)
    total, trace = counted_multiply_adds(model, x)
    cost = gflops(model, trace, x.shape)
    assert cost.as_run.item() * 1e9 == pytest.approx(total, abs=0.5)
    assert cost.as_run.item() < cost.paper.item() < cost.dense or score == "mean_attention"
    total, trace = counted_multiply_adds(video_model(kind, dtype=torch.float32), x)
    assert trace == []
    assert cost.dense * 1e9 == pytest.approx(total, abs=0.5)


@each_mode
def test_only_kept_tokens_are_computed(kind, share, monkeypatch):
    """No linear layer of a block sees a dropped token: MLPs see what was kept, other layers what came in or less."""
    model = sampling_model(kind, share, "ATS.NUM_TOKENS", 0.3)
    rows: dict[int, list[int]] = {}
    linear = torch.nn.functional.linear

    def recording(x, weight, bias=None):
        rows.setdefault(weight.untyped_storage().data_ptr(), []).append(x.numel() // x.shape[-1])
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", recording)
    with torch.no_grad():
        _, trace = model.forward_tokens(clips(2))
    blocks = model.base_model.blocks if kind == "xvit" else model.blocks
    num_sequences = len(trace[0].num_tokens)
    # TimeSformer's clips have one CLS, which stands in every frame for the spatial attention alone.
    copies = num_sequences - 2 if kind == "divided" else 0
    num_in = {1: num_sequences + 64 * 8 * 2, 2: int(trace[0].num_tokens.sum()), 3: int(trace[1].num_tokens.sum())}
    num_out = {1: num_in[2], 2: num_in[3], 3: num_in[3]}
    for index in (1, 2, 3):
        block = blocks[index]

        def seen(layer):
            return rows[layer.weight.untyped_storage().data_ptr()]

        projected = [num_in[index], num_sequences, num_out[index]] if index < 3 else [num_in[index]] * 2
        assert seen(block.attn.qkv) == projected  # keys and values; queries of CLS; queries of what is kept
        assert seen(block.attn.proj) == [num_out[index]]
        assert seen(block.mlp.fc1) == seen(block.mlp.fc2) == [num_out[index] - copies]
        if kind == "divided":
            layers = (block.temporal_attn.qkv, block.temporal_attn.proj, block.temporal_fc)
            assert all(seen(layer) == [num_in[index] - num_sequences] for layer in layers)


@each_mode
def test_gradients_reach_every_parameter(kind, share):
    """ATS fine-tuning trains the whole network, also with dropout and stochastic depth; the kept set is piecewise
    constant, so central differences are exact.
    """
    model = sampling_model(kind, share, "ATS.NUM_TOKENS", 0.6)
    x, weight = clips(2), torch.randn(2, 7, dtype=torch.float64)
    (model(x) * weight).sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert dead == []
    name, parameter = next((n, p) for n, p in model.named_parameters() if "blocks.1.attn.qkv.weight" in n)
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        values = []
        for step in (1e-6, -2e-6):
            parameter.add_(direction, alpha=step)
            values.append((model(x) * weight).sum())
    numeric, exact = (values[0] - values[1]) / 2e-6, (parameter.grad * direction).sum()
    torch.testing.assert_close(numeric, exact, rtol=1e-4, atol=1e-6, msg=name)

    rates = ["VIT.DROP_PATH_RATE", 0.4, "VIT.DROP_RATE", 0.1, "VIT.ATTN_DROP_RATE", 0.1]
    model = sampling_model(kind, share, *rates).train()
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@each_mode
@pytest.mark.parametrize("value", [torch.nan, 1e30])
def test_broken_clips_harm_nobody_else(kind, share, value):
    """NaN or huge pixels in one frame of one clip: no exception, something is kept, the other clips are unchanged."""
    model, x = sampling_model(kind, share), clips(3)
    with torch.no_grad():
        good, _ = model.forward_tokens(x)
        x[1, 0, 3, 2, 5] = value
        logits, trace = model.forward_tokens(x)
    torch.testing.assert_close(logits[[0, 2]], good[[0, 2]], rtol=0, atol=1e-10)
    assert all((entry.num_tokens >= 2).all() for entry in trace)


@pytest.mark.parametrize("kind", VIDEO_MODELS)
def test_autocast_and_wrong_input(kind):
    """Under autocast the networks run with and without ATS; images are refused by name."""
    x = clips(2, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for model in (video_model(kind, dtype=torch.float32), sampling_model(kind, False, dtype=torch.float32)):
            assert model(x).isfinite().all()
    with pytest.raises(UserError, match=r"take clips \[B, 3, T, H, W\]"):
        model(x[:, :, 0])


CONFIGS = Path(__file__).parents[2] / "configs" / "Kinetics"
GFLOPS_PER_VIEW = {"XViT_B16": 281.1, "TimeSformer_divST_8": 195.8, "TimeSformer_divST_16": 1702.7,
                   "TimeSformer_divST_96": 2379.9}  # fmt: skip


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(CONFIGS.glob("*.yaml")) if p.stem.startswith(("XViT", "TimeSformer"))],
    ids=lambda p: p.stem,
)
def test_every_config_builds_and_costs_what_is_published(path):
    """Each config builds, its header names its own command, and its dense network has the published GFLOPs per view."""
    cfg = load_config(path)
    with torch.device("meta"):
        model = build_model(cfg)
    published = next(value for name, value in GFLOPS_PER_VIEW.items() if path.stem.startswith(name))
    size = cfg.DATA.TEST_CROP_SIZE
    assert dense_gflops(model, (1, 3, cfg.DATA.NUM_FRAMES, size, size)) == pytest.approx(published, abs=0.06)
    assert ("_ATS" in path.stem) == cfg.ATS.ENABLE
    assert f"--cfg configs/Kinetics/{path.name}" in path.read_text()


def test_keys_of_the_releases(tmp_path):
    """The model part of X-ViT's and TimeSformer's own YAMLs means here what it means there."""
    (tmp_path / "xvit.yaml").write_text("""
TRAIN: {DATASET: kinetics, MIXUP_ALPHA: 0.4}
DATA: {NUM_FRAMES: 16, AUTOAUGMENT: True, COLORAUGMENT: False, RANDAUGMENT: False, RANDOM_FLIP: True}
SOLVER: {WARMUP_EPOCHS: 5.0}
XVIT: {BASE_MODEL: vit_base_patch16_224_in21k, CONSENSUS_TYPE: 'vit', USE_XVIT: True, SHIFT_DIV: 8, NUM_SEGMENTS: 8,
       LOCATIONS_LIST: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], PRETRAIN: True,
       BACKBONE: {DROP_PATH_RATE: 0.1, NORM_LAYER: LN}}
TEMPORAL_HEAD: {HIDDEN_DIM: 768}
MODEL: {NUM_CLASSES: 400, ARCH: xvit, MODEL_NAME: XVIT, LOSS_FUNC: smooth_cross_entropy, DROPOUT_RATE: 0.5}
""")
    cfg = load_config(tmp_path / "xvit.yaml")
    assert (cfg.MODEL.NAME, cfg.VIT.DROP_PATH_RATE, cfg.MIXUP.LABEL_SMOOTH_VALUE) == ("XViT", 0.1, 0.3)
    assert (cfg.MIXUP.ENABLE, cfg.MIXUP.ALPHA, cfg.MIXUP.CUTMIX_ALPHA) == (True, 0.4, 0.0)
    assert (cfg.AUG.AA_TYPE, cfg.AUG.RE_PROB, cfg.SOLVER.WARMUP_EPOCHS) == ("v0", 0.0, 5.0)
    assert not cfg.SOLVER.COSINE_AFTER_WARMUP
    (tmp_path / "timesformer.yaml").write_text("""
DATA: {NUM_FRAMES: 16, TRAIN_CROP_SIZE: 448, TEST_CROP_SIZE: 448, INPUT_CHANNEL_NUM: [3]}
TIMESFORMER: {ATTENTION_TYPE: 'joint_space_time', PRETRAINED_MODEL: a.pyth}
MODEL: {MODEL_NAME: vit_base_patch16_224, NUM_CLASSES: 400, ARCH: vit, LOSS_FUNC: cross_entropy, DROPOUT_RATE: 0.5}
""")
    cfg = load_config(tmp_path / "timesformer.yaml")
    assert (cfg.MODEL.NAME, cfg.TIMESFORMER.ATTENTION_TYPE) == ("TimeSformer", "joint_space_time")
    assert (cfg.VIT.IMG_SIZE, cfg.VIT.DROP_PATH_RATE, cfg.AUG.ENABLE) == (448, 0.1, False)
    assert (cfg.TRAIN.CHECKPOINT_FILE_PATH, cfg.MIXUP.LABEL_SMOOTH_VALUE) == ("a.pyth", 0.0)
    with pytest.raises(UserError, match=r"XVIT\.BACKBONE\.NORM_LAYER GN: only LN"):
        load_config(None, ["XVIT.BACKBONE.NORM_LAYER", "GN"])
