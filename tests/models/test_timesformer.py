"""TimeSformer: golden numbers of the release, divided attention on packed tokens, released weights, configuration."""

from __future__ import annotations

import pytest
import torch
from helpers import build_empty, check_golden, clips, golden_config, released_state, video_model

from ats.checkpoint import load_weights
from ats.config import get_cfg
from ats.errors import UserError
from ats.flops import dense_gflops
from ats.models import build_model
from ats.models.timesformer import tubes
from ats.models.vit import VisionTransformer
from ats.tokens import RaggedTokens


def build(*overrides: object) -> torch.nn.Module:
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.NAME", "TimeSformer", *overrides])
    return build_model(cfg)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["timesformer_divided_interp", "timesformer_joint"])
def test_golden(name, dtype):
    """Divided attention on 6 frames of 48 x 32 with embeddings for 4 frames of 32 x 32; joint attention."""
    c = golden_config(name)
    model = build(
        "MODEL.NUM_CLASSES", c["classes"], "DATA.NUM_FRAMES", c["frames"], "VIT.IMG_SIZE", c["crop"],
        "VIT.PATCH_SIZE", c["patch_size"], "VIT.EMBED_DIM", c["embed_dim"], "VIT.DEPTH", c["depth"],
        "VIT.NUM_HEADS", c["num_heads"], "TIMESFORMER.ATTENTION_TYPE", c["attention_type"],
        "TIMESFORMER.TEMPORAL_EMBED_LEN", c["num_frames"],
    )  # fmt: skip
    check_golden(name, model, dtype)


def kept_tokens(num_clips: int, num_frames: int, *, seed: int = 0) -> RaggedTokens:
    """Frames of 1 + 10 tokens of which every frame has lost others; CLS is the clip's, the same in all its frames."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_clips, num_frames, 11, 32, generator=generator, dtype=torch.float64)
    x[:, :, 0] = x[:, :1, 0]
    mask = torch.rand(num_clips * num_frames, 11, generator=generator) < 0.5
    mask[:, :2] = True
    dense = RaggedTokens.from_dense(x.flatten(0, 1), 1, frames_per_clip=num_frames)
    return dense.keep(mask, max_tokens=11)[0]


def test_tubes():
    """Every patch once; a tube's tokens next to each other and in time; tubes of equal length next to each other."""
    tokens = kept_tokens(3, 5)
    rows, layout = tubes(tokens)
    assert sorted(rows.tolist()) == torch.nonzero(tokens.position > 0).squeeze(1).tolist()
    frame, position = tokens.layout.sequence[rows], tokens.position[rows]
    seen = set()
    for frames, positions in zip(frame.split(layout.sizes), position.split(layout.sizes), strict=True):
        assert len(set(positions.tolist())) == 1
        assert len(set((frames // 5).tolist())) == 1
        assert frames.tolist() == sorted(set(frames.tolist()))
        seen.add((int(frames[0]) // 5, int(positions[0])))
    assert len(seen) == len(layout.lengths)
    assert layout.sizes == sorted(layout.sizes)


def attention(attn: torch.nn.Module, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Written out: queries [Q, C] attend to tokens [K, C]."""
    q, k, v = (t @ attn.qkv.weight.T + attn.qkv.bias for t in (queries, tokens, tokens))
    q, k, v = (t.chunk(3, dim=-1)[i].unflatten(-1, (attn.num_heads, -1)) for i, t in enumerate((q, k, v)))
    weights = (torch.einsum("qhd,khd->hqk", q, k) * attn.scale).softmax(-1)
    return attn.proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))


def test_divided_attention_on_kept_tokens():
    """A block on packed tokens is the release's block, written out patch by patch and frame by frame."""
    num_clips, num_frames = 2, 4
    block = video_model("divided", "ATS.ENABLE", True).blocks[3]
    tokens = kept_tokens(num_clips, num_frames)
    with torch.no_grad():
        got = block(tokens)
        for clip in range(num_clips):
            frames = range(clip * num_frames, (clip + 1) * num_frames)
            of_frame = {f: tokens.x[tokens.layout.sequence == f] for f in frames}
            positions = {f: tokens.position[tokens.layout.sequence == f].tolist() for f in frames}
            moved = {f: x.clone() for f, x in of_frame.items()}
            for position in range(1, tokens.num_positions):
                places = [(f, positions[f].index(position)) for f in frames if position in positions[f]]
                if places:
                    tube = block.temporal_norm1(torch.stack([of_frame[f][i] for f, i in places]))
                    for (f, i), out in zip(
                        places, block.temporal_fc(attention(block.temporal_attn, tube, tube)), strict=True
                    ):
                        moved[f][i] += out
            spatial = {f: attention(block.attn, x := block.norm1(moved[f]), x) for f in frames}
            cls = of_frame[frames[0]][0] + torch.stack([spatial[f][0] for f in frames]).mean(0)
            for f in frames:
                want = torch.cat([cls[None], moved[f][1:] + spatial[f][1:]])
                want = want + block.mlp(block.norm2(want))
                torch.testing.assert_close(got.x[got.layout.sequence == f], want, rtol=0, atol=1e-10)


def test_space_only_is_an_image_network():
    """Space only on equal frames is ViT on one of them; joint attention on one frame too."""
    vit = VisionTransformer(
        img_size=(32, 32), patch_size=4, embed_dim=32, depth=4, num_heads=4, mlp_ratio=2, num_classes=7
    )  # fmt: skip
    vit = vit.double().eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image = clips(2)[:, :, :1]
    for kind, x in (("space_only", image.expand(-1, -1, 8, -1, -1)), ("joint", image)):
        model = video_model(kind)
        load_weights(model, vit.state_dict())
        torch.testing.assert_close(model(x), vit(image[:, :, 0]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("ats", [False, True])
def test_drop_path_drops_tubes_frames_and_clips(ats):
    """In training a residual branch is dropped as a whole: of a tube, of a frame, of a clip."""
    torch.manual_seed(0)
    block = video_model("divided", "ATS.ENABLE", ats, "VIT.DROP_PATH_RATE", 0.5).blocks[3].train()
    tokens = kept_tokens(40, 4)
    moved = block.prepare(tokens)
    rows, layout = tubes(tokens)
    still = [(moved.x[r] == tokens.x[r] + block.temporal_fc.bias).all(1) for r in rows.split(layout.sizes)]
    assert all(s.all() or not s.any() for s in still)
    assert 0.3 < sum(bool(s.all()) for s in still) / len(still) < 0.7
    # After the spatial step all copies of CLS are one token again, also where some frames' branches were dropped.
    out = block(tokens)
    cls = out.prefix().unflatten(0, (40, 4))
    assert torch.equal(cls, cls[:, :1].expand_as(cls))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("TimeSformer_divST_8x32_224_K400", []),
        ("TimeSformer-HR_divST_16x16_448_K400", ["DATA.NUM_FRAMES", 16, "VIT.IMG_SIZE", 448]),
        ("TimeSformer-L_divST_96x4_224_K400", ["DATA.NUM_FRAMES", 96]),
        ("TimeSformer_jointST_8x32_224", ["TIMESFORMER.ATTENTION_TYPE", "joint_space_time"]),
        ("TimeSformer_spaceOnly_8x32_224", ["TIMESFORMER.ATTENTION_TYPE", "space_only"]),
    ],
)
def test_released_checkpoints(name, overrides):
    """Keys, wrapper, size and GFLOPs of the release."""
    state, about = released_state(name)
    model = build_empty("MODEL.NAME", "TimeSformer", "MODEL.NUM_CLASSES", 400, "ATS.ENABLE", True, *overrides)
    load_weights(model, state)
    assert all((value == 0.5).all() for value in model.state_dict().values())
    assert sum(p.numel() for p in model.parameters()) == about["num_parameters"]
    assert dense_gflops(model, tuple(about["input"])) == pytest.approx(about["gmacs_per_view"], abs=0.01)


def test_an_image_network_starts_a_training(caplog):
    """As in the release: temporal attention and norm copied, temporal_fc and time embedding zero."""
    vit = VisionTransformer(
        img_size=(32, 32), patch_size=4, embed_dim=32, depth=4, num_heads=4, mlp_ratio=2, num_classes=7
    )
    torch.nn.init.normal_(vit.blocks[2].norm1.bias)
    model = video_model("divided", "ATS.ENABLE", True, dtype=torch.float32)
    load_weights(model, vit.state_dict())
    for i, block in enumerate(model.blocks):
        host = vit.blocks[i]
        for ours, theirs in (
            (block.temporal_attn, host.attn),
            (block.temporal_norm1, host.norm1),
            (block.attn, host.attn),
        ):
            assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert not block.temporal_fc.weight.any()
        assert not block.temporal_fc.bias.any()
    assert not model.time_embed.any()
    assert "Weights of an image network" in caplog.text
    joint = video_model("joint", dtype=torch.float32)
    load_weights(joint, vit.state_dict())
    assert not joint.time_embed.any()


def test_clips_of_another_length_and_size():
    """Embeddings are resized (nearest) at run time and as weights are loaded, with the same result."""
    model = video_model("divided", "ATS.ENABLE", True)
    x = torch.randn(1, 3, 12, 48, 48, dtype=torch.float64)
    larger = video_model("divided", "ATS.ENABLE", True, "DATA.NUM_FRAMES", 12, "VIT.IMG_SIZE", 48, seed=1)
    load_weights(larger, model.state_dict())
    assert larger.time_embed.shape[1] == 12
    torch.testing.assert_close(model(x), larger(x), rtol=0, atol=1e-10)


def test_dropout_of_the_released_configs(caplog):
    """The release's YAMLs set MODEL.DROPOUT_RATE, which its network does not read; here that is said."""
    model = video_model("divided", "MODEL.DROPOUT_RATE", 0.5).train()
    assert "MODEL.DROPOUT_RATE has no effect" in caplog.text
    assert torch.equal(model(clips(1)), model(clips(1)))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["TIMESFORMER.ATTENTION_TYPE", "divided"], "choose from divided_space_time, joint_space_time, space_only"),
        (
            ["TIMESFORMER.ATTENTION_TYPE", "joint_space_time", "ATS.ENABLE", True, "ATS.SHARE_FRAMES", True],
            "ATS.SHARE_FRAMES True has no meaning with TIMESFORMER.ATTENTION_TYPE joint_space_time",
        ),
        (["ATS.ENABLE", True, "ATS.BLOCKS", [12]], "block 12 does not exist"),
        (["VIT.DISTILLED", True], "MODEL.NAME TimeSformer has no distillation token"),
    ],
)
def test_wrong_configs_are_named(overrides, text):
    with pytest.raises(UserError) as error:
        build(*overrides)
    assert text in str(error.value)
