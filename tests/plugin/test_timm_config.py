"""MODEL.NAME timm/<name>: what `ats.patch` accepts builds, loads, trains and evaluates by its config."""

from __future__ import annotations

import json
import socket

import pytest
import timm
import torch
from huggingface_hub import constants as hub

import ats
from ats.checkpoint import load_weights, save_safetensors
from ats.config import get_cfg, load_config
from ats.errors import UserError
from ats.models import build_model
from ats.plugin.timm import backbone

SMALL = "[[img_size, 32], [patch_size, 8], [embed_dim, 48], [depth, 4], [num_heads, 3]]"


def config(name: str = "deit3_small_patch16_224", *overrides: object, small: str = SMALL):
    """A network of 4 blocks with ATS in two of them."""
    cfg = get_cfg()
    cfg.merge_from_list([
        "MODEL.NAME", f"timm/{name}", "MODEL.NUM_CLASSES", 4, "TIMM.KWARGS", small, "DATA.TEST_CROP_SIZE", 32,
        "ATS.ENABLE", True, "ATS.BLOCKS", [1, 3], "ATS.NUM_TOKENS", 12, *overrides,
    ])  # fmt: skip
    return cfg


def test_is_timms_model_patched():
    """The same object timm makes: its keys, and with its weights the numbers of `ats.patch`."""
    torch.manual_seed(0)
    model = build_model(config()).eval()
    host = timm.create_model(
        "deit3_small_patch16_224", num_classes=4, img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3
    ).eval()
    assert list(model.state_dict()) == list(host.state_dict())
    host.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    dense = build_model(config("deit3_small_patch16_224", "ATS.ENABLE", False)).eval()
    dense.load_state_dict(host.state_dict())
    with torch.no_grad():
        assert torch.equal(dense(x), host(x))
        assert dense.forward_tokens(x)[1] == []
        assert torch.equal(model(x), ats.patch(host, blocks=[1, 3], num_tokens=12)(x))


def test_loads_files(tmp_path):
    """timm's names from safetensors, and the release's (LayerScale as gamma_1, wrapped in "model", another grid)."""
    source = build_model(config())
    save_safetensors(tmp_path / "model.safetensors", source.state_dict())
    target = build_model(config())
    load_weights(target, tmp_path / "model.safetensors")
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())

    released = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value + 1
                for key, value in source.state_dict().items()}  # fmt: skip
    torch.save({"model": released}, tmp_path / "release.pth")
    load_weights(target, tmp_path / "release.pth")
    assert torch.equal(target.blocks[2].ls1.gamma, source.blocks[2].ls1.gamma + 1)

    larger = build_model(config("deit3_small_patch16_224", "DATA.TEST_CROP_SIZE", 48, small=SMALL.replace("32", "48")))
    load_weights(larger, tmp_path / "model.safetensors")
    assert larger.pos_embed.shape[1] == 36
    with pytest.raises(UserError, match="does not belong to this model"):
        load_weights(build_model(config("vit_small_patch14_reg4_dinov2")), tmp_path / "model.safetensors")


def test_loads_dinov2s_release_with_registers():
    """Its names, and its place for the embeddings of CLS; timm knows the release by its mask token."""
    source, target = (build_model(config("vit_small_patch14_reg4_dinov2")) for _ in range(2))
    released = {key.replace("reg_token", "register_tokens"): value + 1 for key, value in source.state_dict().items()}
    own_cls, released["cls_token"] = released["cls_token"], released["cls_token"] - 3
    released["pos_embed"] = torch.cat([torch.full_like(own_cls, 3), released["pos_embed"]], dim=1)
    load_weights(target, {"teacher": released | {"mask_token": torch.zeros(1, 48)}})
    torch.testing.assert_close(target.state_dict(), {key: value + 1 for key, value in source.state_dict().items()})


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_loads_what_masked_pretraining_of_eva_leaves(pool):
    """The final norm goes where the network has one, behind the average or before CLS is read."""
    small = SMALL.replace("]]", f"], [global_pool, {pool}]]").replace("embed_dim, 48", "embed_dim, 60")
    model = build_model(config("eva02_tiny_patch14_224", "ATS.SCORE", "mean_attention", small=small))
    released = {key.replace("fc_norm", "norm"): value + 1 for key, value in model.state_dict().items()}
    load_weights(model, {"model": released | {"mask_token": torch.zeros(1, 1, 60)}})
    assert torch.equal((model.norm if pool == "token" else model.fc_norm).weight, released["norm.weight"])


@pytest.mark.parametrize(("pair", "text"), [("num_classes, 3", "3 logits"), ("global_pool, ''", "17 x 4 logits")])
def test_a_network_without_one_logit_per_class_is_refused_first(pair, text, tiny_config, tmp_path, capsys):
    from run_net import main

    kwargs = SMALL.replace("]]", f"], [{pair}]]")
    common = ["--cfg", str(tiny_config), "MODEL.NAME=timm/deit3_small_patch16_224", f"TIMM.KWARGS={kwargs}"]
    assert main([*common, "DEVICE=cpu", "TRAIN.ENABLE=True", f"OUTPUT_DIR={tmp_path / 'out'}"]) == 1
    assert f"gives {text} for a sample instead of MODEL.NUM_CLASSES 4: take num_classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["MODEL.NAME", "timm/deit3_smal_patch16_224"], "timm has no deit3_smal_patch16_224. Did you mean deit3_small"),
        (["MODEL.NAME", "timm/resnet10t", "TIMM.KWARGS", []], "a ResNet, is not supported"),
        (["TIMM.KWARGS", [["img_sise", 32]]], "timm cannot build deit3_small_patch16_224 with these"),
        (["TIMM.KWARGS", [["norm_layer", "nosuch"]]], "timm cannot build deit3_small_patch16_224 with these: 'nosuch'"),
        (["TIMM.KWARGS", [["patch_size", 0]]], "timm cannot build deit3_small_patch16_224 with these: "),
        (["TIMM.KWARGS", [["checkpoint_path", "no.pth"]]], "timm cannot build deit3_small_patch16_224 with these: Fil"),
        (["MODEL.NAME", "timm/deit3_small_patch16_224.nosuch"], "Invalid pretrained tag (nosuch)"),
        (["TIMM.KWARGS", ["img_size", 32]], "give pairs of name and value, e.g. [[img_size, 384]]"),
        (["DATA.TEST_CROP_SIZE", 64], 'takes images of 32 x 32 pixels. Set DATA.TEST_CROP_SIZE 32, or TIMM.KWARGS "[['),
        (["TRAIN.ENABLE", True], "DATA.TRAIN_CROP_SIZE 224"),
        (["ATS.BLOCKS", [7]], "block 7 does not exist"),
        (["MODEL.NAME", "timm/vit_base_patch16_siglip_gap_224"], "use ATS.SCORE mean_attention"),
        (["MODEL.NAME", "timmy"], "choose from ViT"),
    ],
)
def test_wrong_keys_say_what_to_type(overrides, text):
    with pytest.raises(UserError) as error:
        build_model(config("deit3_small_patch16_224", *overrides))
    assert text in str(error.value)


def test_nothing_is_downloaded_unless_asked(monkeypatch):
    """TIMM.PRETRAINED reaches timm as it stands, and a download that fails says what else can be done."""
    asked = []

    def create_model(name, pretrained, **kwargs):
        asked.append(pretrained)
        if pretrained:
            raise OSError("no network")
        return original(name, pretrained=False, **kwargs)

    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", create_model)
    build_model(config())
    with pytest.raises(UserError, match=r"Type TIMM\.PRETRAINED False and.*TEST\.CHECKPOINT_FILE_PATH.*no network"):
        build_model(config("deit3_small_patch16_224", "TIMM.PRETRAINED", True))
    assert asked == [False, True]


def unknown_host(*args):
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize(
    ("resolve", "proxies", "offline"),
    [(unknown_host, {}, True), (unknown_host, {"https": "proxy:80"}, False), (lambda *args: [], {}, False)],
    ids=["no address", "no address, proxy", "address"],
)
def test_without_a_way_to_the_hub_its_cache_is_asked_at_once(resolve, proxies, offline, monkeypatch):
    """And not for a minute. Other code in the process finds the hub as it was."""
    seen = []

    def create_model(name, pretrained, **kwargs):
        seen.append(hub.is_offline_mode())
        raise OSError("not in the cache")

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(backbone.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(backbone, "getproxies", lambda: proxies)
    with pytest.raises(UserError, match="not in the cache"):
        build_model(config("deit3_small_patch16_224", "TIMM.PRETRAINED", True))
    assert seen == [offline]
    assert not hub.is_offline_mode()


def test_evaluates_what_timm_downloads(monkeypatch, tiny_config):
    """TIMM.PRETRAINED stands in for a checkpoint file; without either there is nothing to evaluate."""
    from run_net import main

    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **kwargs: original(name, **kwargs))
    common = ["--cfg", str(tiny_config), "MODEL.NAME=timm/deit3_small_patch16_224", f"TIMM.KWARGS={SMALL}"]
    assert main([*common, "DEVICE=cpu"]) == 1
    assert main([*common, "DEVICE=cpu", "TIMM.PRETRAINED=True"]) == 0


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_base_patch16_siglip_gap_224"])
def test_trains_and_evaluates_by_run_net(name, tiny_config, tmp_path, capsys):
    """The ordinary commands: training, evaluation with its exported weights, the same numbers; layer decay included."""
    from run_net import main

    common = [
        "--cfg", str(tiny_config), f"MODEL.NAME=timm/{name}", f"TIMM.KWARGS={SMALL}", "ATS.BLOCKS=[1,3]",
        "ATS.NUM_TOKENS=0.7", "DEVICE=cpu", *(["ATS.SCORE=mean_attention"] if "gap" in name else []),
    ]  # fmt: skip
    assert main([*common, "TRAIN.ENABLE=True", "SOLVER.LAYER_DECAY=0.8", "SOLVER.MAX_EPOCH=1"]) == 0
    trained = json.loads((tmp_path / "out" / "result.json").read_text())
    weights = tmp_path / "out" / "model.safetensors"
    assert main([*common, f"TEST.CHECKPOINT_FILE_PATH={weights}", f"OUTPUT_DIR={tmp_path / 'again'}"]) == 0
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert again["top1"] == trained["top1"]
    capsys.readouterr()


def test_images_as_the_model_wants_them(caplog):
    """timm's mean, size, ratio and interpolation for that model, except those that are set; said in the log."""
    caplog.set_level("INFO")
    clip = ["MODEL.NAME", "timm/vit_base_patch16_clip_224"]
    data = load_config(None, clip).DATA
    own = timm.get_pretrained_cfg("vit_base_patch16_clip_224")
    assert list(own.mean) == data.MEAN
    assert list(own.std) == data.STD
    assert own.crop_pct == data.TEST_CROP_RATIO
    assert "As timm's vit_base_patch16_clip_224: DATA.MEAN [0.481" in caplog.text
    data = load_config(None, [*clip, "DATA.MEAN", "[0.5,0.5,0.5]", "DATA.TEST_CROP_RATIO", "0.875"]).DATA
    assert data.MEAN == [0.5] * 3
    assert list(own.std) == data.STD
    assert data.TEST_CROP_RATIO == 0.875  # the default, but set
    dino = ["MODEL.NAME", "timm/vit_small_patch14_dinov2"]
    assert load_config(None, dino).DATA.TEST_CROP_SIZE == 518
    smaller = load_config(None, [*dino, "TIMM.KWARGS", "[[img_size, 224]]"]).DATA
    assert (smaller.TRAIN_CROP_SIZE, smaller.TEST_CROP_SIZE, smaller.TEST_CROP_RATIO) == (224, 224, 1.0)
    caplog.clear()
    assert load_config(None, ["MODEL.NAME", "timm/deit_tiny_patch16_224", "DATA.TEST_CROP_RATIO", 0.9]).DATA.MEAN == []
    assert load_config("ImageNet/timm_DeiT3_S.yaml").DATA.TEST_CROP_RATIO == 0.9
    assert load_config("CIFAR10/ViT.yaml").DATA.TEST_CROP_SIZE == 32
    assert load_config(None, ["MODEL.NAME", "timm/no_such_model"]).DATA.MEAN == []  # the network says what is wrong
    assert "As timm's" not in caplog.text
