"""`ats.patch` on Hugging Face transformers: the contract of timm's models, and transformers' own ways of being used."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from transformers_models import (  # noqa: E402
    CONTRACT,
    LAWS,
    TOLERANCE,
    base_of,
    batch,
    first_output,
    head_on,
    images,
    layers_of,
    masked_host,
    small_model,
)

import ats  # noqa: E402
from ats.errors import UserError  # noqa: E402
from ats.flops import gflops  # noqa: E402
from ats.plugin.transformers.model import REASONS, VERSIONS  # noqa: E402


def patched(name: str = "vit classifier", **settings: object) -> nn.Module:
    """A small model with ATS in blocks 1 and 3."""
    return ats.patch(small_model(name), **{"blocks": [1, 3], "num_tokens": 12, **settings})


def close(got: object, want: object, tolerance: float = 1e-11) -> None:
    """The same outputs to round-off, key by key."""
    assert list(got) == list(want)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=tolerance, msg=key)


def test_every_accepted_class_is_tested():
    assert {kind for kind, _ in CONTRACT.values()} == {host.__name__ for host in VERSIONS}


@pytest.mark.parametrize("name", CONTRACT)
@torch.no_grad()
def test_equals_its_host(name, keep_all):
    """With every token kept: the unpatched model, in all its outputs. With tokens dropped: the host's own layers that
    cannot see them, and its head on what is left of each image; zeros where a token was dropped.
    """
    model = small_model(name)
    x = batch(model)
    want = model(**x, output_hidden_states=True)
    assert ats.patch(model, blocks=[0, 2], sampler=keep_all) is model
    tolerance = TOLERANCE.get(name, 1e-11)
    close(model(**x, output_hidden_states=True), want, tolerance)
    ats.unpatch(model)

    ats.patch(model, blocks=[1, 3], num_tokens=12)
    model.ats.trace = True
    out, features, trace = model(**x, output_hidden_states=True), base_of(model)(**x).last_hidden_state, model.ats.last
    assert [entry.block for entry in trace] == [1, 3]
    assert trace[0].num_tokens.max() <= 12
    assert trace[1].num_tokens.min() < 12
    ats.unpatch(model)

    oracle, present, states = masked_host(model, x, trace)
    assert (~present).any(dim=1).all()
    assert (features[~present] == 0).all()
    torch.testing.assert_close(features[present], oracle[present], rtol=0, atol=10 * tolerance)
    assert len(out.hidden_states) == len(states) == 5
    for got, state in zip(out.hidden_states, states, strict=True):
        torch.testing.assert_close(got, state, rtol=0, atol=10 * tolerance)
        assert torch.equal(got == 0, state == 0)
    if base_of(model) is not model:
        logits = [head_on(model, image[left]) for image, left in zip(oracle, present, strict=True)]
        torch.testing.assert_close(out[0], torch.stack(logits), rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("name", CONTRACT)
@torch.no_grad()
def test_changes_nothing_that_one_can_see_of_the_model(name):
    """Same object, parameters, keys, isinstance, names and signature; after unpatch the same classes, attributes and
    numbers, bit for bit.
    """
    model = small_model(name)
    x = batch(model)
    want = first_output(model, x)
    before = {key: id(parameter) for key, parameter in model.named_parameters()}
    classes, attributes = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    keys, text, signature = list(model.state_dict()), repr(model), inspect.signature(model.forward)
    ats.patch(model, blocks=[1, 3], num_tokens=10)
    assert not torch.equal(first_output(model, x), want)
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), classes, strict=True))
    assert {key: id(parameter) for key, parameter in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert type(model).__name__ == classes[0].__name__
    assert inspect.signature(model.forward) == signature
    ats.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert torch.equal(first_output(model, x), want)


@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_copies_pickles_and_is_retuned(name):
    """A copy computes the same and can be tuned without the original; a re-tuned model is one patched so from the
    start.
    """
    model = patched(name)
    x = batch(model)
    want = first_output(model, x)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(first_output(clone, x), want)
        clone.ats.num_tokens = 9
        assert torch.equal(first_output(clone, x), first_output(patched(name, num_tokens=9), x))
        clone.ats.trace = True
        clone(**x)
        assert len(clone.ats.last) == 2
        assert torch.equal(first_output(ats.unpatch(clone), x), first_output(small_model(name), x))
    assert torch.equal(first_output(model, x), want)
    with pytest.raises(UserError, match=r"model\.ats\.trace = True"):
        _ = model.ats.last


@pytest.mark.parametrize("name", ["deit with teacher", "registers", "dinov2 classifier"])
@torch.no_grad()
def test_saved_as_a_dense_model(name, tmp_path):
    """save_pretrained of a patched model is that of its host; it loads in a fresh one, and that in a patched one."""
    model, dense = patched(name), small_model(name)
    model.save_pretrained(tmp_path)
    loaded = type(dense).from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.architectures == [type(dense).__name__]
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in dense.state_dict().items())
    close(loaded.eval()(images()), dense(images()))
    model.load_state_dict({key: value + 0.01 for key, value in dense.state_dict().items()})
    loaded.load_state_dict(model.state_dict())
    loaded = ats.patch(loaded, blocks=[1, 3], num_tokens=12)
    close(loaded(images()), model(images()))


@pytest.mark.parametrize("name", ["vit", "dinov2", "registers classifier"])
@torch.no_grad()
def test_outputs_can_be_asked_for_in_every_form(name, keep_all):
    """Chosen hidden states, tuples instead of named outputs, switches in the config."""
    host = small_model(name)
    model = ats.patch(copy.deepcopy(host), blocks=[1, 2], sampler=keep_all)
    x = images()
    for chosen in (True, 1, [0, -1]):
        close(model(x, output_hidden_states=chosen), host(x, output_hidden_states=chosen))
    got, want = (m(x, return_dict=False, output_hidden_states=True) for m in (model, host))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    for m in (model, host):
        m.config.output_hidden_states = True
    assert "hidden_states" in host(x)
    close(model(x), host(x))


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "registers"])
@torch.no_grad()
def test_other_image_sizes_and_masked_patches(name, keep_all):
    """interpolate_pos_encoding, DINOv2's free image size, and bool_masked_pos are the host's."""
    kind = getattr(transformers, CONTRACT[name][0])
    host = kind(small_model(name).config, **({} if "Dino" in kind.__name__ else {"use_mask_token": True}))
    host = host.double().eval()
    nn.init.normal_(host.embeddings.mask_token)
    model = ats.patch(copy.deepcopy(host), blocks=[1, 2], sampler=keep_all)
    size = {} if "Dino" in kind.__name__ else {"interpolate_pos_encoding": True}
    masked = torch.arange(16).remainder(3).eq(0).expand(3, 16)
    close(model(images(side=48), **size), host(images(side=48), **size))
    close(model(images(), bool_masked_pos=masked), host(images(), bool_masked_pos=masked))
    assert not torch.equal(model(images(), bool_masked_pos=masked)[0], model(images())[0])
    model.ats.sampler, model.ats.num_tokens, model.ats.trace = "topk", 20, True
    model(images(side=48), **size)
    assert max(patches.max() for patches in model.ats.last[0].patches) > 15


@pytest.mark.parametrize("name", ["vit classifier, eager, no bias", "vit classifier", "dinov2 classifier"])
@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"attention_mask": torch.arange(17).lt(9).expand(3, 17)}, "attention_mask"),
        ({"is_causal": True}, "is_causal"),
        ({"output_attentions": True}, r"output_attentions: ATS never .* model\.ats\.last"),
    ],
)
@torch.no_grad()
def test_refused_when_called(name, asked, text):
    model = patched(name)
    with pytest.raises(UserError, match=text):
        model(images(), **asked)
    assert model(images(), attention_mask=None, output_attentions=False).logits.isfinite().all()
    if "output_attentions" in asked and "eager" in name:
        model.config.output_attentions = True
        with pytest.raises(UserError, match=text):
            model(images())


@pytest.mark.long
@torch.no_grad()
def test_every_attention_implementation_of_the_host():
    """ATS layers have their own attention; flex attention's mask, which is always there, is none that a user gave."""
    want = patched(blocks=[0])(images()).logits
    for name in ("eager", "flex_attention"):
        model = small_model("vit classifier", attn_implementation=name)
        torch.testing.assert_close(ats.patch(model, blocks=[0], num_tokens=12)(images()).logits, want)


@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_an_image_gets_the_same_in_any_batch(name):
    model = patched(name, blocks=[1, 2, 3], num_tokens=0.7)
    x = batch(model, 4)
    want = first_output(model, x)
    for i in range(4):
        alone = {key: value[i : i + 1] for key, value in x.items()}
        torch.testing.assert_close(first_output(model, alone), want[i : i + 1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", LAWS)
def test_gradients_are_those_of_checkpointed_activations(name):
    """They reach every parameter that the host's reach; recomputing activations, in either of torch's ways, changes
    none of them.
    """
    model = patched(name).train()
    labels = torch.tensor([0, 3, 1])

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        nn.functional.cross_entropy(first_output(model, batch(model)), labels).backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    unused = {key for key, _ in model.named_parameters()} - set(want)
    assert unused <= {f"{model.base_model_prefix}.embeddings.mask_token"}
    assert all(gradient.isfinite().all() for gradient in want.values())
    for reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.ats.trace = True
        got = gradients()
        assert [entry.block for entry in model.ats.last] == [1, 3]
        assert list(got) == list(want)
        for key, gradient in want.items():
            torch.testing.assert_close(got[key], gradient, rtol=1e-9, atol=1e-11, msg=key)


def test_labels_give_the_hosts_loss(keep_all):
    model, host = patched("dinov2 classifier", sampler=keep_all), small_model("dinov2 classifier")
    labels = torch.tensor([0, 3, 1])
    torch.testing.assert_close(model(images(), labels=labels).loss, host(images(), labels=labels).loss)


@pytest.mark.parametrize("name", ["vit classifier", "dinov2 classifier"])
def test_random_layers_train(name):
    """Dropout, dropout of attention and stochastic depth draw anew for packed tokens; in evaluation they are silent."""
    settings = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    model = small_model(name, **settings, **({"drop_path_rate": 0.5} if "dino" in name else {}))
    ats.patch(model, blocks=[0, 2], num_tokens=10)
    assert torch.equal(first_output(model, images()), first_output(model, images()))
    model.train()
    assert len({round(first_output(model, images()).sum().item(), 6) for _ in range(4)}) == 4
    first_output(model, images()).sum().backward()


def test_stochastic_depth_drops_whole_images(keep_all):
    """With every branch dropped or kept per image, no token of an image is treated otherwise than the others."""
    model = small_model("dinov2", drop_path_rate=0.5)
    ats.patch(model, blocks=[0], sampler=keep_all).train()
    layer = layers_of(model)[0]
    state = {}
    layer.register_forward_hook(lambda module, args, out: state.update(before=args[0], after=out.to_grid()))
    torch.manual_seed(0)
    unchanged = set()
    for _ in range(6):
        model(images(4))
        rows = (state["after"] == state["before"]).all(dim=-1)
        assert torch.equal(rows.any(dim=1), rows.all(dim=1))
        unchanged |= set(rows.all(dim=1).tolist())
    assert unchanged == {True, False}


@pytest.mark.parametrize("name", LAWS)
def test_half_precision_and_autocast(name, keep_all):
    """bfloat16 weights and autocast are near the host's with every token kept, and finite where some are dropped. (The
    host's bfloat16 may be far from float32: PyTorch 2.11's convolution of videos.)
    """
    model = patched(name, sampler=keep_all).float()
    x, half_x = (batch(model, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    host = small_model(name).float()
    with torch.no_grad():
        want_half = first_output(copy.deepcopy(host).bfloat16(), half_x).float()
        half = first_output(copy.deepcopy(model).bfloat16(), half_x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            want_cast, cast = first_output(host, x).float(), first_output(model, x)
    assert half.dtype == torch.bfloat16
    for got, want in ((half.float(), want_half), (cast.float(), want_cast)):
        assert (got - want).abs().max() < 0.1 * want.abs().max()
    model.ats.sampler = "inverse_transform"
    with torch.no_grad():
        assert first_output(copy.deepcopy(model).bfloat16(), half_x).isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = first_output(model.train(), x).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


COUNTED = [
    (name, score)
    for name in [name for name in CONTRACT if name not in ("vit classifier, eager, no bias", "dinov3, gated")]
    for score in ("cls_attention_value_norm", "mean_attention")
    if not name.startswith(("siglip", "videomae")) or score == "mean_attention"
]


@pytest.mark.parametrize(("name", "score"), COUNTED)
@torch.no_grad()
def test_multiply_adds_equal_the_counter(name, score):
    """The GFLOPs formula is torch's counter at batch size 1, dense and with ATS, from forward_tokens' trace."""
    model = small_model(name).requires_grad_(False)
    x = batch(model, 1)
    # PyTorch 2.11 does not count a CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**x)
    dense = counter.get_total_flops() / 2
    ats.patch(model, blocks=[1, 3], num_tokens=10, score=score)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out, trace = model.forward_tokens(**x)
    torch.testing.assert_close(out, first_output(model, x), rtol=0, atol=1e-11)
    cost = gflops(model, trace, x["pixel_values"].shape)
    assert cost.as_run.item() * 1e9 == pytest.approx(counter.get_total_flops() / 2, abs=0.5)
    assert cost.dense * 1e9 == pytest.approx(dense, abs=0.5)


@torch.no_grad()
def test_equals_our_own_vit():
    """The same numbers, kept tokens included, as MODEL.NAME ViT with the same weights and settings."""
    from helpers import planned

    from ats.models.vit import VisionTransformer

    host = small_model("vit classifier", layer_norm_eps=1e-6)
    ours = VisionTransformer(
        img_size=(32, 32), patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2.0, num_classes=5,
        reductions=planned(depth=4, blocks=[1, 2, 3], num_tokens=0.7),
    ).double().eval()  # fmt: skip
    names = {
        "vit.embeddings.cls_token": "cls_token", "vit.embeddings.position_embeddings": "pos_embed",
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj", "vit.layernorm.": "norm.",
        "classifier": "head", "vit.layers": "blocks", "attention.o_proj": "attn.proj", "layernorm_before": "norm1",
        "layernorm_after": "norm2",
    }  # fmt: skip
    state = {}
    for key, value in host.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new)
        state[key] = value
    for index in range(4):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{index}.attention.{part}_proj.{kind}") for part in "qkv"]
            state[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(parts)
    ours.load_state_dict(state)
    want, trace = ours.forward_tokens(images())
    got, kept = ats.patch(host, blocks=[1, 2, 3], num_tokens=0.7).forward_tokens(images())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert [entry.position.tolist() for entry in kept] == [entry.position.tolist() for entry in trace]


@torch.no_grad()
def test_the_model_inside_a_classifier():
    """It shares its classifier's settings; taken out alone, ATS is off until the classifier is re-tuned."""
    model, dense = patched(), small_model("vit classifier")
    x = images()
    want = first_output(model, x)
    assert model.vit.ats.num_tokens == 12
    ats.unpatch(model.vit)
    assert torch.equal(first_output(model, x), first_output(dense, x))
    model.ats.num_tokens = 12
    assert torch.equal(first_output(model, x), want)
    ats.unpatch(model.vit)
    assert type(ats.unpatch(model)) is type(dense)
    ats.patch(model.vit, blocks=[1])
    with pytest.raises(UserError, match=r"its vit has ATS already; .* ats\.unpatch\(model\.vit\)"):
        ats.patch(model, blocks=[1])


@torch.no_grad()
def test_averaging_what_is_left_is_of_the_call():
    """A DINOv2 classifier fills in dropped patches for its own average alone: a thread that runs the model inside it at
    that moment, and a call after one that failed, see zeros.
    """
    model, x, seen = patched("dinov2 classifier"), images(), []
    want = model(x).logits

    def meanwhile(norm: nn.Module, args: tuple) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: seen.append(model.dinov2(x).last_hidden_state))
            thread.start()
            thread.join()

    hook = model.dinov2.layernorm.register_forward_pre_hook(meanwhile)
    assert torch.equal(model(x).logits, want)
    hook.remove()
    with pytest.raises(UserError):
        model(x, output_attentions=True)
    seen.append(model.dinov2(x).last_hidden_state)
    assert len(seen) == 2
    assert all((features == 0).all(dim=-1).any(dim=1).all() for features in seen)


class Mine(transformers.ViTModel):
    """A user's subclass."""


def with_adapter() -> nn.Module:
    model = small_model("dinov2 classifier")
    model.dinov2.encoder.layer[2].attention.v_proj = nn.Sequential(model.dinov2.encoder.layer[2].attention.v_proj)
    return model


def with_other(name: str) -> nn.Module:
    model = small_model("vit")
    setattr(model.layers[1], name, nn.Identity())
    return model


def clip_pair() -> nn.Module:
    """CLIP with both of its towers."""
    own = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision = own | {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(vision_config=vision, text_config=own | {"vocab_size": 50}, projection_dim=8)
    torch.manual_seed(0)
    return transformers.CLIPModel(config).double().eval()


@torch.no_grad()
def test_the_tower_of_clip(keep_all):
    """Patched inside the whole model: its features, and its logits of images and texts, are the host's."""
    model = clip_pair()
    batch = {"pixel_values": images(), "input_ids": torch.tensor([[1, 7, 49], [1, 9, 49]])}
    want = model(**batch)
    ats.patch(model.vision_model, blocks=[1, 2], sampler=keep_all)
    torch.testing.assert_close(model(**batch).logits_per_image, want.logits_per_image, rtol=0, atol=1e-11)
    ats.unpatch(model.vision_model)
    ats.patch(model.vision_model, blocks=[1, 2], num_tokens=10)
    assert (model(**batch).logits_per_image - want.logits_per_image).abs().max() > 1e-6


@torch.no_grad()
def test_the_tower_of_llava(keep_all):
    """The projector gets features of all patches, restored; with every token kept it generates what the host does."""
    own = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**own, image_size=32, patch_size=8),
        text_config=transformers.LlamaConfig(**own, vocab_size=64, num_key_value_heads=2),
        image_token_id=60,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tower, x = model.model.vision_tower, images(1).float()
    asked = {"input_ids": torch.tensor([[1, *[60] * 16, 5, 6]]), "pixel_values": x, "max_new_tokens": 4}
    want = model.generate(**asked, do_sample=False, pad_token_id=0)
    with pytest.raises(UserError, match=r"ats\.patch\(model\.model\.vision_tower, \.\.\.\)"):
        ats.patch(model, blocks=[1])
    ats.patch(tower, blocks=[1, 2], sampler=keep_all)
    assert torch.equal(model.generate(**asked, do_sample=False, pad_token_id=0), want)
    ats.unpatch(tower)
    ats.patch(tower, blocks=[1, 2], num_tokens=9)
    tower.ats.restore, tower.ats.trace = "nearest", True
    states = tower(x, output_hidden_states=True).hidden_states[-2]
    assert tower.ats.last[-1].num_tokens.max() <= 9
    assert not (states == 0).all(dim=2).any()
    assert model.generate(**asked, do_sample=False, pad_token_id=0).shape == want.shape

    # Compact: the kept patches alone, in a shorter prompt. With every token kept, the same answer.
    for sampler in ("inverse_transform", keep_all):
        tower.ats.sampler = sampler
        states = tower(x, output_hidden_states=True).hidden_states[-2]
        kept = tower.ats.last[-1].compact(states)
        image = model.model.multi_modal_projector(kept.x[kept.position > 0])
        prompt = torch.tensor([[1, *[60] * len(image), 5, 6]])
        embeds = model.get_input_embeddings()(prompt)
        embeds[prompt == 60] = image
        got = model.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert (len(image) == 16) == (sampler == keep_all)
    assert torch.equal(got, want[:, -got.shape[1] :])


@torch.no_grad()
def test_siglip_pools_the_present_tokens():
    """As its head does on what is left of each image; restored tokens are pooled like any other; nothing merges."""
    model, x = patched("siglip"), images()
    assert model.ats.score == "mean_attention"
    out = model(x)
    for features, pooled in zip(out.last_hidden_state, out.pooler_output, strict=True):
        left = features[(features != 0).any(dim=1)]
        assert len(left) < 16
        torch.testing.assert_close(model.head(left[None])[0], pooled, rtol=0, atol=1e-11)
    model.ats.restore = "nearest"
    out = model(x)
    assert not (out.last_hidden_state == 0).all(dim=2).any()
    host = small_model("siglip")
    torch.testing.assert_close(host.head(out.last_hidden_state), out.pooler_output, rtol=0, atol=1e-11)
    for options in ({"dropped": "merge"}, {"sampler": "tome"}):
        with pytest.raises(UserError, match="its head pools the patches, but a merged token counts for several"):
            ats.patch(small_model("siglip"), blocks=[1], **options)
    with pytest.raises(UserError, match="needs a CLS token and this network has none"):
        patched("siglip", score="cls_attention")


@torch.no_grad()
def test_siglip_2_takes_images_of_one_size():
    """The same numbers as SigLIP with these weights, and no padding."""
    model = small_model("siglip 2")
    x = batch(model)
    siglip = small_model("siglip")
    names = {key: value for key, value in model.state_dict().items() if "patch_embedding" not in key}
    kernel = model.state_dict()["embeddings.patch_embedding.weight"].unflatten(1, (3, 8, 8))
    bias = model.state_dict()["embeddings.patch_embedding.bias"]
    siglip.load_state_dict(
        names | {"embeddings.patch_embedding.weight": kernel, "embeddings.patch_embedding.bias": bias}
    )
    for m in (model, siglip):
        ats.patch(m, blocks=[1, 3], num_tokens=10)
    want = siglip(images())
    close(model(**x), want, 1e-5)  # it resizes position embeddings in float32
    x["pixel_attention_mask"][1, 9:] = 0
    with pytest.raises(UserError, match=r"pixel_attention_mask hides padding, which ATS does not support: give images"):
        model(**x)


@torch.no_grad()
def test_videomae_averages_what_is_left_or_restored():
    """As its head does on what is left of each video, or on all that is restored; as an average counts each patch once,
    nothing merges.
    """
    model = patched("videomae classifier", num_tokens=10, restore="nearest")
    x = batch(model)
    features = model.videomae(**x).last_hidden_state
    assert not (features == 0).all(dim=2).any()
    want = torch.stack([head_on(model, one) for one in features])
    torch.testing.assert_close(model(**x).logits, want, rtol=0, atol=1e-11)
    with pytest.raises(UserError, match="its head averages the patches"):
        patched("videomae classifier", sampler="tome")


@torch.no_grad()
def test_averaging_classifiers_of_towers_say_what_to_restore():
    own = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.SiglipConfig(vision_config=own | {"image_size": 32, "patch_size": 8}, num_labels=5)
    torch.manual_seed(0)
    model = transformers.SiglipForImageClassification(config).eval()
    with pytest.raises(UserError, match=r'averages all patches.*ats\.patch\(model\.vision_model, restore="nearest"'):
        ats.patch(model, blocks=[1])
    ats.patch(model.vision_model, blocks=[1], num_tokens=10, restore="nearest")
    assert model(images().float()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Mine(small_model("vit").config), "Mine: ATS supports transformers' ViTModel, DeiTModel"),
        (lambda: small_model("ViTForMaskedImageModeling"), "reconstructs every patch"),
        (lambda: small_model("Dinov2Backbone", mlp_ratio=2), "gives feature maps to a head"),
        (lambda: small_model("ViTMAEForPreTraining"), "reconstructs every patch"),
        (lambda: small_model("VideoMAEForVideoClassification", use_mean_pooling=False), "reads the first patch as if"),
        (lambda: small_model("ViTMSNModel"), "ViTMSNModel: ATS supports transformers' ViTModel"),
        (lambda: nn.DataParallel(small_model("vit")), "it wraps a ViTModel; patch that one: ats.patch(model.module, "),
        (lambda: small_model("vit", num_hidden_layers=0), "it has no blocks"),
        (with_adapter, "block 2 has attention.v_proj of class Sequential instead of Linear"),
        (lambda: with_other("mlp"), "block 1 has an MLP of class Identity"),
        (lambda: with_other("attention"), "block 1 has attention of class Identity"),
        (lambda: with_other("layernorm_after"), "block 1 has layernorm_after of class Identity instead of LayerNorm"),
        (patched, "model.ats.num_tokens = ..."),
        (clip_pair, "it holds a CLIPVisionModel; patch that one: ats.patch(model.vision_model, ...)"),
    ],
)  # fmt: skip
def test_refused_by_name(make, text):
    model = make()
    kind = type(model)
    with pytest.raises(UserError) as error:
        ats.patch(model, blocks=[1])
    assert text in str(error.value)
    assert type(model) is kind


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"blocks": [4]}, "blocks [4]: block 4 does not exist, the network has blocks 0 to 3"),
        ({"num_tokens": [0.5]}, "num_tokens has 1 entries, the network 4 blocks"),
        ({"score": "cls"}, "score cls: choose from cls_attention_value_norm, cls_attention, mean_attention"),
    ],
)
def test_wrong_settings_leave_the_model_as_it_was(settings, text):
    model = small_model("deit with teacher")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UserError) as error:
        ats.patch(model, **{"blocks": [1], **settings})
    assert text in str(error.value)
    assert [type(module) for module in model.modules()] == classes


def test_another_version_of_transformers(monkeypatch):
    """Whose modules have other names: what is missing, and what to type."""
    monkeypatch.delitem(sys.modules, "ats.plugin.transformers.model")
    monkeypatch.setitem(sys.modules, "ats.plugin.transformers.blocks", None)
    with pytest.raises(UserError, match=r"transformers [\d.]+.* needs 5\.23: pip install -U transformers"):
        ats.patch(small_model("vit"), blocks=[1])


def test_reasons_name_classes_that_exist():
    assert all(hasattr(transformers, name) for name in REASONS)
    assert not set(REASONS) & {host.__name__ for host in VERSIONS}
