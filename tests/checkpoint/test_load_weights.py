"""Weights are read strictly and safely, with helpful messages."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import shlex

import pytest
import torch
from safetensors.torch import save_file

from ats.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_safetensors
from ats.errors import UserError
from ats.models.vit import VisionTransformer


def vit(**settings) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        **{"img_size": (32, 32), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
        | settings
    )


@pytest.fixture
def weights():
    return {key: torch.randn_like(value) for key, value in vit().state_dict().items()}


@pytest.mark.parametrize("wrapper", [None, "model", "model_state", "state_dict", "state_dict_ema", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "base_model.", "module.base_model.", "_orig_mod."])
def test_wrappers_and_prefixes(tmp_path, weights, wrapper, prefix):
    state = {prefix + key: value for key, value in weights.items()}
    path = tmp_path / "weights.pth"
    torch.save({wrapper: state, "epoch": 3, "args": argparse.Namespace(lr=1.0)} if wrapper else state, path)
    model = vit()
    load_weights(model, path)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_safetensors(tmp_path, weights):
    save_file(weights, tmp_path / "a.safetensors")
    model = vit()
    load_weights(model, tmp_path / "a.safetensors")
    save_safetensors(tmp_path / "new" / "b.safetensors", model.state_dict())
    assert all(
        torch.equal(value, weights[key]) for key, value in load_checkpoint(tmp_path / "new" / "b.safetensors").items()
    )


def test_tied_weights_as_safetensors(tmp_path):
    """Two names of one tensor are written twice; safetensors itself would refuse them."""
    weight = torch.randn(2, 3)
    save_safetensors(tmp_path / "tied.safetensors", {"a": weight, "b": weight, "c": weight.t()})
    loaded = load_checkpoint(tmp_path / "tied.safetensors")
    assert torch.equal(loaded["a"], weight)
    assert torch.equal(loaded["b"], weight)
    assert torch.equal(loaded["c"], weight.t())


def test_safetensors_by_another_name(tmp_path, weights):
    """A safetensors file renamed to .pth is read all the same, not refused as a pickle that runs code."""
    save_file(weights, tmp_path / "weights.safetensors")
    (tmp_path / "weights.safetensors").rename(tmp_path / "weights.pth")
    assert load_checkpoint(tmp_path / "weights.pth").keys() == weights.keys()


def test_another_architecture_is_reported_by_groups_of_keys(weights):
    with pytest.raises(UserError) as error:
        load_weights(vit(depth=4, distilled=True), weights)
    text = str(error.value)
    assert "keys missing" in text
    assert "blocks.*.attn.qkv.weight (x2)" in text
    assert "dist_token" in text
    assert "pos_embed (1, 17, 32) instead of (1, 18, 32)" in text
    with pytest.raises(UserError, match="keys unexpected: blocks"):
        load_weights(vit(depth=1), weights)
    with pytest.raises(UserError, match="of another shape"):
        load_weights(vit(embed_dim=16), weights)


def test_another_head_names_the_key_to_change(weights):
    with pytest.raises(UserError, match=r"The file has 5 classes: set MODEL\.NUM_CLASSES 5\.$"):
        load_weights(vit(num_classes=3), weights)
    with pytest.raises(UserError, match=r"set MODEL\.NUM_CLASSES 5 or, to fine-tune it for others, A\.B True\.$"):
        load_weights(vit(num_classes=3), weights, advice="A.B True")
    model = vit(num_classes=3)
    head = model.head.weight.clone()
    load_weights(model, weights, skip=("head.",))
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.cls_token, weights["cls_token"])


class Payload:
    """A pickle that would create a file when read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, how, weights):
    path, proof = tmp_path / "evil.pth", tmp_path / "proof"
    contents = {"model": weights, "extra": Payload(proof)}
    if how == "torch":
        torch.save(contents, path)
    else:
        path.write_bytes(pickle.dumps(contents, protocol=2))
    with pytest.raises(UserError) as error:
        load_weights(vit(), path)
    assert not proof.exists()
    if how == "torch":
        assert "would run code" in str(error.value)
        assert "mkdir" in str(error.value)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 broken"])
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint or is damaged") as error:
        load_checkpoint(tmp_path / name)
    assert not re.search(r"(: \d*|Error)$", str(error.value))  # the number of a byte, the name of a class


def test_folder_instead_of_a_file(tmp_path, weights):
    with pytest.raises(UserError, match=f"{tmp_path} is a folder: type the file in it, {tmp_path}/FILE"):
        load_checkpoint(tmp_path)
    save_safetensors(tmp_path / "model.safetensors", weights)
    with pytest.raises(UserError, match=f"is a folder: type the file in it, {tmp_path}/model.safetensors"):
        load_checkpoint(tmp_path)


def test_truncated_file(tmp_path, weights):
    torch.save(weights, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a checkpoint or is damaged"):
        load_checkpoint(tmp_path / "a.pth")


def test_missing_file_and_wrong_contents(tmp_path):
    with pytest.raises(UserError, match="No checkpoint file"):
        load_checkpoint(tmp_path / "none.pth")
    how = r"Training writes it: .* TRAIN\.ENABLE True OUTPUT_DIR output/a\."
    with pytest.raises(UserError, match=rf"file output/a/model\.safetensors\. {how}"):
        load_checkpoint("output/a/model.safetensors")
    with pytest.raises(UserError, match=r"deit_at\.safetensors\. Did you mean deit_ats\.safetensors"):  # shipped
        load_checkpoint("configs/Digits/weights/deit_at.safetensors")
    (tmp_path / "best_model.pth").touch()
    with pytest.raises(UserError, match=r"bestmodel\.pth\. Did you mean best_model\.pth\?"):
        load_checkpoint(tmp_path / "bestmodel.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds no weights"):
        load_weights(vit(), tmp_path / "empty.pth")


def test_saving_is_all_or_nothing(tmp_path):
    """A save that fails halfway leaves the old file intact and no temporary file."""
    path = tmp_path / "a.pyth"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(AttributeError):
        save_checkpoint(path, {"epoch": 2, "function": lambda: None})
    assert load_checkpoint(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pyth"]


@pytest.mark.parametrize(
    "prefix",
    ["backbone.", "net.", "base_encoder.", "module.base_encoder.", "encoder.", "module.backbone.", "teacher.backbone."],
)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "teacher", "params_ema", "net"])
def test_weights_of_other_trainings(wrapper, prefix, tmp_path, weights, caplog):
    """Any prefix; what is not below it, such as a projection head or a loss, is left out with a note."""
    caplog.set_level("INFO")
    state = {prefix + key: value for key, value in weights.items()} | {"criterion.weight": torch.ones(3)}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}}
    torch.save({wrapper: state, "optimizer": optimizer, "epoch": 3} if wrapper else state, tmp_path / "a.pth")
    model = vit()
    load_weights(model, tmp_path / "a.pth")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert f"{tmp_path}/a.pth: not used by this network: criterion.weight." in caplog.text


def test_names_that_pytorch_puts_between(weights):
    """torch.compile, checkpointing and FSDP of single blocks; and the count of torch's moving average."""
    state = {f"module.{key}".replace(".0.attn", ".0._orig_mod.attn"): value for key, value in weights.items()}
    state = {key.replace(".1.", ".1._fsdp_wrapped_module._checkpoint_wrapped_module."): v for key, v in state.items()}
    model = vit()
    load_weights(model, state | {"n_averaged": torch.tensor(3)})
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def backbone(weights: dict, prefix: str = "") -> dict:
    """The weights without a head, as self-supervised training leaves them."""
    return {prefix + key: value for key, value in weights.items() if not key.startswith("head")}


@pytest.mark.parametrize(
    ("places", "named", "suggested"),
    [
        ({"student": ["module.backbone."], "teacher": ["backbone."]}, "student, teacher", "teacher"),
        ({"net": [""], "net_ema": [""]}, "net, net_ema", "net_ema"),
        ({"": ["student.backbone.", "teacher.backbone."]}, "student.backbone, teacher.backbone", "teacher.backbone"),
        ({"model": ["base_encoder.", "momentum_encoder."]}, "base_encoder, momentum_encoder", "base_encoder"),
    ],
)
def test_one_of_several_sets_of_weights_must_be_chosen(places, named, suggested, tmp_path, weights):
    """The message names them, and suggests one with a command that saves it in a file of its own."""
    contents: dict = {"epoch": 3}
    for wrapper, prefixes in places.items():
        part = {key: torch.clone(v) for prefix in prefixes for key, v in backbone(weights, prefix).items()}
        contents |= {wrapper: part} if wrapper else part
    torch.save(contents, tmp_path / "it's.pth")
    with pytest.raises(UserError) as error:
        load_weights(vit(), tmp_path / "it's.pth", skip=("head.",))
    assert f"holds several sets of weights: {named}. Its top-level keys: " in str(error.value)
    assert f"For {suggested}, type:" in str(error.value)
    *_, option, code = shlex.split(str(error.value).splitlines()[-1])
    assert option == "-c"
    exec(code, {})
    (written,) = [path for path in tmp_path.iterdir() if path.name != "it's.pth"]
    model = vit()
    load_weights(model, written, skip=("head.",))
    assert torch.equal(model.cls_token, weights["cls_token"])


def test_keys_that_are_not_wanted_choose_no_set_of_weights(weights):
    """A teacher without a head is not worse than a student with one if the head is left out anyway."""
    contents = {"student": weights, "teacher": backbone(weights)}
    with pytest.raises(UserError, match="holds several sets of weights: student, teacher"):
        load_weights(vit(), contents, skip=("head.",))
    load_weights(vit(), contents)  # only one fits


def test_the_decoder_of_mae_is_left_out_with_a_note(weights, caplog):
    caplog.set_level("INFO")
    extra = {key: torch.ones(2) for key in ("mask_token", "decoder_embed.weight", "decoder_blocks.0.norm1.bias")}
    load_weights(vit(), {"model": backbone(weights) | extra}, skip=("head.",))
    assert "not used by this network: mask_token, decoder_embed.weight, decoder_blocks.*.norm1.bias" in caplog.text
    with pytest.raises(UserError, match=r"The file has no classifier: to train one, type A\.B True\."):
        load_weights(vit(), backbone(weights), advice="A.B True")


def test_what_profilers_leave_in_a_model_is_left_out(weights):
    """thop's counts, one in every layer."""
    counts = {f"{key.rpartition('.')[0]}.total_{kind}": torch.ones(1) for key in weights for kind in ("ops", "params")}
    model = vit()
    load_weights(model, weights | counts | {"total_ops": torch.ones(1)})
    assert torch.equal(model.cls_token, weights["cls_token"])


def test_a_head_of_another_kind_gives_way_to_a_fresh_one(weights):
    head = {"base_encoder.head.0.weight": torch.ones(3, 3), "base_encoder.head.1.bias": torch.ones(3)}
    load_weights(vit(), backbone(weights, "base_encoder.") | head, skip=("head.",))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda value: torch.tensor(1.0), "{} () instead of ("),
        (lambda value: value[:0], "{} (0, "),
        (lambda value: value.to("meta"), "{} without values"),
        (lambda value: value.to(torch.complex64) + 5j, "{} complex64 instead of float32"),
        (lambda value: value.to(torch.int8), "{} int8 instead of float32"),
        (lambda value: value.to_sparse(), "{} sparse"),
    ],
)
@pytest.mark.parametrize("only", ["", "head.weight", "pos_embed"])
def test_tensors_that_would_lose_something_are_refused(change, text, only, weights):
    state = {key: change(value) if only in key else value for key, value in weights.items()}
    with pytest.raises(UserError, match=re.escape(text.format(only or "cls_token"))):
        load_weights(vit(), state)


def test_weights_of_another_precision_are_taken(weights):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        load_weights(vit(), {key: value.to(dtype) for key, value in weights.items()})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value, weights, caplog):
    weights["blocks.1.mlp.fc1.bias"][2] = weights["head.weight"][0, 0] = value
    load_weights(vit(), weights)
    text = "holds NaN or infinite weights, perhaps from a diverged training: head.weight, blocks.*.mlp.fc1.bias."
    assert text in caplog.text
    caplog.clear()
    weights["blocks.1.mlp.fc1.bias"][2] = 0
    load_weights(vit(), weights, skip=("head.",))
    assert not caplog.text


def test_several_sets_in_a_given_dict(weights):
    """There is no file to name in a command."""
    with pytest.raises(UserError, match=r"sets of weights: a, b\. Its top-level keys: a, b\. Give the one you want\.$"):
        load_weights(vit(), {"a": weights, "b": dict(weights)})


def nested(depth: int) -> dict:
    """Wrappers in wrappers."""
    contents: dict = {"weight": torch.ones(1)}
    for _ in range(depth):
        contents = {"model": contents}
    return contents


def in_circles() -> dict:
    """A dictionary that holds itself."""
    contents: dict = {}
    contents |= {"model": contents, "module": contents, "other": [contents, {"a": contents}]}
    return contents


@pytest.mark.parametrize(
    ("contents", "text"),
    [
        (in_circles(), "holds no weights. Its top-level keys: model, module, other."),
        (nested(500), "holds no weights. Its top-level keys: model."),
        ({0: torch.ones(1), b"a": torch.ones(2)}, "holds no weights. Its top-level keys: 0, b'a'."),
        ({"optimizer": {"state": {0: {"m": torch.ones(1)}}}}, "holds no weights. Its top-level keys: optimizer."),
        ({}, "holds no weights. It is empty."),
    ],
)
def test_contents_without_weights_are_described(contents, text):
    with pytest.raises(UserError, match=re.escape(text)):
        load_weights(vit(), contents)
