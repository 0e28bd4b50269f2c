"""Adaptive files: one image at a time, as many rows as it keeps tokens, and the numbers of the network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import serve_folder
import timm
import torch
from helpers import randomise
from PIL import Image
from test_export import NETWORKS, SMALL, settings, trained

import ats
from ats.benchmark.synthetic_counts import synthetic_counts
from ats.cli import export as tool
from ats.cli import make_digits
from ats.config import SHIPPED, load_config
from ats.datasets import build_dataset
from ats.datasets.transforms import eval_transform
from ats.engine.evaluate import build_trained
from ats.errors import UserError
from ats.export import graph as export
from ats.export import runner
from ats.models import build_model
from ats.tokens import SINGLE

ENGINES = ("onnxruntime", "openvino")
STAGES = [
    *SMALL, "VIT.DEPTH", 3, "ATS.ENABLE", True, "ATS.STAGES", [
        {"BLOCKS": [0], "RULE": "paper", "NUM_TOKENS": 60}, {"SAMPLER": "evit", "BLOCKS": [1], "KEEP_RATE": 0.8},
        {"SAMPLER": "tome", "BLOCKS": [2], "R": 5},
    ],
]  # fmt: skip


def random_images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """20 real validation digits in the ImageNet layout."""
    output = tmp_path_factory.mktemp("data") / "digits"
    few = {
        split: make_digits.Digits(*(array[:10] for array in own))
        for split, own in make_digits.split_digits(seed=0).items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_digits, "NUM_FRAGMENTS", 200)
        patch.setattr(make_digits, "split_digits", lambda seed: few)
        make_digits.make_digits(output, seed=0, train_per_digit=1, val_per_digit=2, size=56, num_workers=0)
    return output


@pytest.fixture(scope="module")
def digits_file(digits, tmp_path_factory):
    """The fine-tuned Digits network as an adaptive file, by the command, and its config."""
    path = tmp_path_factory.mktemp("made") / "digits.onnx"
    cfg_path = SHIPPED / "Digits" / "DeiT_ATS.yaml"
    words = ["TEST.CHECKPOINT_FILE_PATH", str(SHIPPED / "Digits" / "weights" / "deit_ats.safetensors")]
    words += ["DATA.PATH_TO_DATA_DIR", str(digits), "ATS.BLOCKS", "[5, 8]"]
    arguments = ["--cfg", str(cfg_path), "--adaptive", "-o", str(path), "--images", "5", "--engine", "openvino"]
    assert tool.main([*arguments, *words]) == 0
    return path, load_config(cfg_path, words)


@pytest.fixture(scope="module")
def digits_truth(digits_file):
    """Digit images as they are evaluated, their logits and kept counts by the network, packed."""
    cfg = digits_file[1]
    dataset = build_dataset(cfg, "test")
    images = torch.stack([dataset[index].x for index in range(len(dataset))])
    model = build_trained(cfg, cfg.TEST.CHECKPOINT_FILE_PATH).eval()
    with torch.no_grad():
        logits, trace = model.forward_tokens(images)
    return images, logits, torch.stack([entry.num_tokens for entry in trace], dim=1)


@pytest.mark.parametrize("engine", ENGINES)
def test_real_images_keep_the_tokens_that_the_network_keeps(digits_file, digits_truth, engine):
    """Logits to 1e-3 and the same counts, which differ from image to image; round-off may move a token of one image."""
    images, logits, counts = digits_truth
    run = export.load(digits_file[0], engine=engine)
    got_logits, got_counts = (torch.cat(outs) for outs in zip(*map(run, images.split(1)), strict=True))
    same = (got_counts == counts).all(dim=1)
    assert same.sum() >= len(images) - 1
    torch.testing.assert_close(got_logits[same], logits[same], atol=1e-3, rtol=0)
    assert len(counts[:, -1].unique()) > 5
    with pytest.raises(UserError, match=r"digits.onnx is adaptive and takes one image, not a batch of 2: .*split"):
        run(images[:2])


def test_the_file_says_that_it_is_adaptive(digits_file):
    """In its metadata, and by the shapes of its input and outputs."""
    facts, _ = runner.ENGINES["onnxruntime"](str(digits_file[0]))
    assert (facts["adaptive"], facts["batch_size"], facts["ats_blocks"]) == ("true", "1", "[5, 8]")
    assert facts == runner.ENGINES["openvino"](str(digits_file[0]))[0]
    graph = onnx.load(digits_file[0]).graph
    shapes = [[d.dim_value for d in value.type.tensor_type.shape.dim] for value in (*graph.input, *graph.output)]
    assert shapes == [[1, 3, 56, 56], [1, 10], [1, 2]]


@pytest.mark.parametrize("engine", ENGINES)
def test_serve_folder_classifies_as_the_evaluation(digits_file, digits_truth, digits, engine, capsys):
    """Classes by name and tokens left of every validation image, and the accuracy."""
    serve_folder.main(str(digits_file[0]), str(digits / "val"), engine)
    *lines, last = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"(.+/(.)/.+\.png): (.), (\d+) tokens", line).groups() for line in lines]
    _, logits, counts = digits_truth
    assert [name for _, _, name, _ in found] == [str(label) for label in logits.argmax(dim=1).tolist()]
    assert sum(int(words[3]) != count for words, count in zip(found, counts[:, -1].tolist(), strict=True)) <= 1
    hits = sum(folder == name for _, folder, name, _ in found)
    assert last == f"{hits} of 20 right ({5 * hits:.2f} %)"


@pytest.mark.parametrize("words", [["absent.onnx", "."], ["{}", "absent"], ["{}", "empty"], ["{}"]])
def test_serve_folder_names_mistakes(words, digits_file, tmp_path):
    """What is missing, in one line."""
    (tmp_path / "empty").mkdir()
    script = Path(serve_folder.__file__).resolve()
    words = [word.format(digits_file[0]) for word in words]
    done = subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert re.match("error: (there is no absent|empty holds no)|usage: ", done.stderr)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize(("size", "mode"), [((301, 250), "RGB"), ((97, 333), "L"), ((64, 73), "RGBA")])
def test_serve_folder_prepares_images_as_the_evaluation(size, mode, interpolation):
    """To round-off, for images larger and smaller than the crop, upright and wide, of any mode."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    facts = {"input_size": "[3, 64, 64]", "crop_ratio": "0.875", "interpolation": interpolation}
    facts |= {"mean": json.dumps(mean), "std": json.dumps(std)}
    want = eval_transform(64, interpolation=interpolation, mean=mean, std=std)(image.convert("RGB"))
    np.testing.assert_allclose(serve_folder.preprocess(image, facts)[0], want.numpy(), atol=1e-6)


def test_serve_folder_needs_the_engine_alone(digits_file, digits):
    """Neither ats nor torch is imported."""
    script = (
        "import sys; sys.path.insert(0, 'examples'); import serve_folder; serve_folder.main(*sys.argv[1:]);"
        "assert not {'torch', 'ats'} & set(sys.modules)"
    )
    words = [sys.executable, "-c", script, str(digits_file[0]), str(digits / "val")]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 21), done.stderr


@pytest.mark.long
def test_methods_in_turn_in_both_engines_and_as_pt2(tmp_path, monkeypatch):
    """The paper's rule, then EViT and ToMe on the number of tokens that it left."""
    monkeypatch.setitem(NETWORKS, "stages", STAGES)
    cfg = trained(settings("stages"), tmp_path / "weights.safetensors")
    exported = export.export(cfg, adaptive=True)
    images = random_images(8)
    for path, engine in (("a.onnx", "onnxruntime"), ("a.onnx", "openvino"), ("a.pt2", "")):
        if not (tmp_path / path).exists():
            export.save(exported, tmp_path / path)
        run = export.load(tmp_path / path, engine=engine)
        difference = export.compare(exported, run, images)
        assert difference.distance.max() < 1e-4
        assert not difference.has_other_counts.any()
        counts = torch.cat([run(image)[1] for image in images.split(1)])
        assert (counts.diff(dim=1) < 0).all()
        assert len(counts[:, 2].unique()) > 2
        with pytest.raises(UserError, match="not a batch of 2"):
            run(images[:2])


MERGING = {
    "merge": [("ATS.DROPPED", "merge"), ("ATS.MERGE_WEIGHT", "size_score")],
    "fuse": [("ATS.DROPPED", "fuse"), ("ATS.MERGE_WEIGHT", "size_score")],
    "ppt": [("ATS.SAMPLER", "ppt"), ("PPT.R", 9), ("PPT.THRESHOLD", 1e-4)],
    "pitome": [("ATS.SAMPLER", "pitome"), ("PITOME.RATIO", 0.8)],
    "merge_sample": [("ATS.SAMPLER", "merge_sample"), ("MERGE_SAMPLE.RATIO", 0.8), ("MERGE_SAMPLE.POINTS", 0.8)],
    "thresholds": [("ATS.SAMPLER", "merge_sample"), ("MERGE_SAMPLE.THRESHOLD", 0.5), ("MERGE_SAMPLE.POINTS", 0.8)],
}


@pytest.mark.parametrize("adaptive", [False, True], ids=["static", "adaptive"])
@pytest.mark.parametrize("kind", MERGING)
def test_graphs_of_reductions_that_merge_equal_the_eager_network(kind, adaptive, tmp_path):
    """Both kinds of graph, run by PyTorch."""
    cfg = settings("ViT")
    words = [word for pair in MERGING[kind] for word in pair]
    cfg.merge_from_list([*words, "ATS.NUM_TOKENS", 0.6, "ATS.LAYOUT", "packed" if adaptive else "static"])
    exported = export.export(trained(cfg, tmp_path / "weights.safetensors"), adaptive=adaptive)
    module = exported.program.module()
    difference = export.compare(exported, lambda images: list(module(images)), random_images(4))
    assert difference.distance.max() < 1e-4
    assert not difference.has_other_counts.any()


@pytest.mark.parametrize("name", ["timm/vit_small_patch16_dinov3", "timm/beit_base_patch16_224"])
def test_graphs_of_timms_models_equal_the_eager_network(name, tmp_path):
    """Registers, rotary embedding and average pooling; relative position bias."""
    exported = export.export(trained(settings(name), tmp_path / "weights.safetensors"), adaptive=True)
    module = exported.program.module()
    difference = export.compare(exported, lambda images: list(module(images)), random_images(4))
    assert difference.distance.max() < 1e-4
    assert not difference.has_other_counts.any()


@pytest.mark.parametrize("name", ["ViT", "distilled, mean attention, top k", "ToMe", "PS-ViT"])
def test_one_sequence_is_the_packed_layout(name, tmp_path):
    """Run eagerly, the layout of adaptive files gives the numbers of the packed one, image by image."""
    cfg = trained(settings(name), tmp_path / "weights.safetensors")
    model = build_trained(cfg, cfg.TEST.CHECKPOINT_FILE_PATH).eval()
    for image in random_images(3).split(1):
        with torch.no_grad():
            model.layout = "packed"
            logits, trace = model.forward_tokens(image)
            model.layout = SINGLE
            own_logits, own_trace = model.forward_tokens(image)
        torch.testing.assert_close(own_logits, logits, atol=1e-5, rtol=0)
        for entry, own in zip(trace, own_trace, strict=True):
            assert torch.equal(own.num_tokens, entry.num_tokens)
            assert torch.equal(own.position, entry.position)


def test_imposed_counts_are_kept_and_the_sampling_is_computed():
    """For benchmarks: the graph keeps what is imposed, and its outputs still follow from ranked scores."""
    cfg = settings("ViT")
    cfg.ATS.BLOCKS = [1]
    model = build_model(cfg).eval()
    with synthetic_counts([model], mean_std=(80, 0)):
        exported = export.export_adaptive(model, (3, 32, 32))
        module = exported.program.module()
        difference = export.compare(exported, lambda images: list(module(images)), random_images(2))
    assert difference.distance.max() < 1e-4
    assert not difference.has_other_counts.any()
    assert model.layout == "packed"
    read, todo = set(), [exported.program.graph.output_node()]
    while todo:
        node = todo.pop()
        todo += [source for source in node.all_input_nodes if source not in read]
        read.add(node)
    assert {"sort", "cumsum", "nonzero"} <= {str(node.target).split(".")[1] for node in read if "." in str(node.target)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ATS.ENABLE", "False"], "MODEL.NAME ViT without ATS has no adaptive file: .* leave out --adaptive"),
        (["--dense"], "without ATS has no adaptive file"),
        (["MODEL.NAME", "XViT"], "MODEL.NAME XViT cannot be exported; ViT .*, PSViT and timm/<name> can"),
        (["ATS.BLOCKS", "[0]", "ATS.SAMPLER", "random"], "ATS.SAMPLER random cannot be exported; .*evit, .* can"),
        (["--engine", "openvno"], "--engine openvno: choose from onnxruntime, openvino. Did you mean openvino"),
    ],
)
def test_mistakes_are_explained(words, message, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("VIT: {DEPTH: 1, EMBED_DIM: 24, NUM_HEADS: 2}\nATS: {ENABLE: true, BLOCKS: [0]}")
    arguments = ["--cfg", str(tmp_path / "c.yaml"), "--adaptive", "-o", str(tmp_path / "a.onnx"), *words]
    assert tool.main(arguments) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(capsys.readouterr().err)


def test_a_missing_engine_is_named(monkeypatch):
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"engine openvino is not installed. Type:\n  pip install openvino"):
        runner.check_engine("openvino")


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_timms_models_in_both_engines(name, tmp_path):
    """Registers and LayerScale, rotary embedding, relative position bias: as the patched network in both engines."""
    size = 56 if "14" in name else 64
    model = timm.create_model(name, img_size=size, depth=2, num_classes=7, embed_dim=64, num_heads=2).eval()
    randomise(model)
    ats.patch(model, blocks=[1], num_tokens=0.8)
    made = export.export_adaptive(model, (3, size, size))
    export.save(made, tmp_path / "x.onnx")
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    for engine in ENGINES:
        found = export.compare(made, export.load(tmp_path / "x.onnx", engine=engine), images)
        assert found.distance.max() <= 1e-4 * found.scale
        assert not found.has_other_counts.any()


def test_what_cannot_be_translated_says_so(monkeypatch, tmp_path):
    """An error of PyTorch's translator becomes one line that names another format."""

    def fail(*_: object, **__: object) -> None:
        raise torch.onnx.OnnxExporterError("no such operator\nand a long report")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match=r"to ONNX \(no such operator\)\. Export it to a \.pt2 file instead"):
        export.save_onnx(export.Exported(None, None, {}, {}), tmp_path / "x.onnx")
