"""tools/visualize.py draws every file, prints the numbers of both networks, and reports every mistake in one line."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from clips import encode
from helpers import randomise
from PIL import Image

from ats.checkpoint import save_safetensors
from ats.cli.visualize import main, make_parser, split_words
from ats.config import get_cfg, load_config
from ats.datasets import build_dataset
from ats.datasets.class_names import class_names, labels_of_folders
from ats.errors import UserError, printable
from ats.models import build_model
from ats.visualize.compare import Guess, SampleView
from ats.visualize.figures import sheet_cell
from ats.visualize.grids import BlockView
from ats.visualize.inputs import read_input

TIMM = "[[img_size,32],[patch_size,8],[embed_dim,48],[depth,3],[num_heads,3]]"
VIDEO = {
    "MODEL": {"NAME": "XViT", "NUM_CLASSES": 2},
    "VIT": {"IMG_SIZE": 32, "PATCH_SIZE": 8, "EMBED_DIM": 32, "DEPTH": 3, "NUM_HEADS": 2},
    "XVIT": {"NUM_SEGMENTS": 4, "TEMPORAL_EMBED_LEN": 4},
    "TEMPORAL_HEAD": {"NUM_ATTENTION_HEADS": 2, "MLP_DIM": 32},
    "ATS": {"ENABLE": True, "BLOCKS": [1, 2]},
    "TEST": {"DATASET": "kinetics"},
    "DATA": {"NUM_FRAMES": 4, "SAMPLING_RATE": 4, "TEST_CROP_SIZE": 32, "TRAIN_JITTER_SCALES": [32, 32]},
    "DATA_LOADER": {"NUM_WORKERS": 0},
    "DEVICE": "cpu",
}


def with_weights(config: Path, folder: Path, network: Sequence[str] = ()) -> list[str]:
    """A command line for `config` and the KEY=VALUEs of `network`, with weights from seed 0."""
    pairs = [word for pair in network for word in pair.split("=")]
    save_safetensors(folder / "w.safetensors", randomise(build_model(load_config(config, pairs))).state_dict())
    weights = ["TEST.CHECKPOINT_FILE_PATH", str(folder / "w.safetensors"), "DEVICE=cpu"]
    return ["--cfg", str(config), *weights, *network]


@pytest.fixture
def words(tiny_config, tmp_path):
    """A command line for the tiny network on images, without files."""
    return with_weights(tiny_config, tmp_path)


@pytest.fixture
def video_words(tmp_path):
    """A command line for clips, with a val.csv of two classes."""
    for name in ("falling", "rising"):
        encode(tmp_path / "videos" / name / "clip.mp4", 20)
    (tmp_path / "val.csv").write_text("videos/falling/clip.mp4 0\nvideos/rising/clip.mp4 1\n")
    config = tmp_path / "video.yaml"
    config.write_text(yaml.safe_dump(VIDEO | {"DATA": VIDEO["DATA"] | {"PATH_TO_DATA_DIR": str(tmp_path)}}))
    return with_weights(config, tmp_path)


def test_images(words, colours, tmp_path, capsys):
    """A strip and a line for every image, given as a file or in a folder, whose class folders are kept; then a contact
    sheet.
    """
    one = colours / "val" / "red" / "0.png"
    (tmp_path / "some").mkdir()
    shutil.copytree(colours / "val" / "blue", tmp_path / "some" / "blue")
    assert main([str(one), *words, str(tmp_path / "some"), "-o", str(tmp_path / "look")]) == 0
    said = capsys.readouterr()
    assert said.err == f"Weights: {tmp_path}/w.safetensors (safetensors)\n"
    *lines, last = said.out.splitlines()
    assert len(lines) == 9
    assert last == f"Contact sheet: {tmp_path}/look/contact_sheet.png"
    names = sorted(str(path.relative_to(tmp_path / "look")) for path in (tmp_path / "look").rglob("*.png"))
    assert names == ["0.png", *(f"blue/{i}.png" for i in range(8)), "contact_sheet.png"]
    assert lines[0].startswith(f"{one}: dense ")
    assert re.search(
        r"dense (blue|green|red|yellow) [\d.]+ %; with ATS (blue|green|red|yellow) [\d.]+ %; 0\.\d+ of ", lines[0]
    )
    with Image.open(tmp_path / "look" / "0.png") as strip:
        pixels = np.asarray(strip.convert("RGB"))
    assert strip.size[0] > strip.size[1] > 300
    assert ((pixels[..., 0] > 150) & (pixels[..., 1] < 60)).sum() > 1000  # the red square


def test_a_limit_takes_files_spread_evenly(words, tiny_config, colours, tmp_path, capsys):
    """Folders of the data name the true classes; without data, folders named like a class."""
    assert main([*words, str(colours / "val"), "--limit", "4", "-o", str(tmp_path / "look")]) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    files = [Path(line.partition(":")[0]) for line in lines]
    assert [file.relative_to(colours / "val").parts[0] for file in files] == ["blue", "green", "red", "yellow"]
    names = ["a", "b", "c", "d"]
    assert labels_of_folders(load_config(tiny_config), names) == {"blue": 0, "green": 1, "red": 2, "yellow": 3}
    cfg = load_config(tiny_config, ["DATA.PATH_TO_DATA_DIR", ""])
    assert labels_of_folders(cfg, names) == {"a": 0, "b": 1, "c": 2, "d": 3}


def test_cells_of_a_contact_sheet():
    """The classes by their first name, the tokens behind the last block, and whether ATS is right."""
    block = BlockView(3, torch.tensor(5), 16, torch.ones(1, 4, 4, dtype=torch.bool), torch.zeros(1, 4, 4))
    view = SampleView(torch.zeros(3, 1, 8, 8), Guess(0, 0.9), Guess(1, 0.8), 1.0, 2.0, [block])
    names = ["tench, Tinca tinca", "a name that is much too long"]
    cell = sheet_cell(view, label=0, names=names)
    assert cell.caption == "is tench\ndense tench\nATS a name that is much…\n5 tokens"
    assert (cell.is_right, tuple(cell.pictures.shape)) == (False, (3, 8, 16))
    assert sheet_cell(view, label=1, names=names).is_right
    assert sheet_cell(view, label=None, names=names).is_right is None


def test_bad_files_do_not_stop_the_others(words, colours, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "empty.jpg").write_text("")
    good = [str(colours / "val" / "red" / f"{i}.png") for i in range(2)]
    files = [good[0], str(tmp_path / "bad.png"), str(tmp_path / "empty.jpg"), good[1]]
    assert main([*files, *words, "-o", str(tmp_path / "look")]) == 1
    said = capsys.readouterr()
    assert said.out.count("\n") == 2
    assert sorted(path.name for path in (tmp_path / "look").iterdir()) == ["0.png", "1.png"]
    weights, _, error = said.err.partition("\n")
    assert weights.startswith("Weights: ")
    assert error.startswith("error: 2 of 4 files cannot be read; the others are drawn.\n")
    assert f"Cannot read the image {tmp_path}/bad.png" in said.err
    assert f"Cannot read the image {tmp_path}/empty.jpg" in said.err


def test_every_file_gets_a_picture_of_its_own(words, colours, tmp_path, capsys):
    """Neither pictures of other files nor the files themselves are written over, whatever the names are."""
    folder, content = tmp_path / "in", (colours / "val" / "red" / "0.png").read_bytes()
    names = ["a/x.png", "a/x_2.png", "b/x.png", "b/x.jpg", "c/X.png", "x.png", "x_3.png"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert main([*words, str(folder), "-o", str(folder)]) == 0
    assert all((folder / name).read_bytes() == content for name in names)
    written = [line.rpartition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    assert len({path.casefold() for path in written}) == len(names) + 1
    assert written[-1] == str(folder / "contact_sheet.png")
    given = [str(folder / name) for name in names if name.endswith(".png")]
    assert sorted(map(str, folder.rglob("*.png"))) == sorted([*written, *given])


def test_what_lies_beside_an_input_is_not_written_over(words, colours, tmp_path):
    for name in ("cat.png", "cat_2.png"):
        shutil.copy(colours / "val" / "red" / "0.png", tmp_path / name)
    beside = {tmp_path / "cat_2.png": (tmp_path / "cat_2.png").read_bytes(), tmp_path / "cat_3.gif": b"mine"}
    (tmp_path / "cat_3.gif").write_bytes(b"mine")
    assert main([*words, str(tmp_path / "cat.png"), "-o", str(tmp_path)]) == 0
    assert all(path.read_bytes() == content for path, content in beside.items())
    assert (tmp_path / "cat_4.png").is_file()


def test_odd_names(words, colours, tmp_path, capsys):
    """Names that are not UTF-8, clear the terminal, fake a line or look like a formula are drawn and shown escaped, in
    the list, in the pictures and in the report.
    """
    classes = {"blue": "b\udcff", "green": "$\\frac$", "red": "red\x1b[31m", "yellow": "y\n[01-01] done"}
    names = [
        "plain.png",
        "\udcff\xe9.png",
        "clear\x1b[2J\x9b.png",
        "two\nerror: lines.png",
        "$x^$.png",
        "\u202egnp.png",
    ]
    for number, (old, new) in enumerate(classes.items()):
        folder = tmp_path / "data" / "val" / new
        folder.mkdir(parents=True)
        for name in names[number : number + 2]:
            (folder / name).write_bytes((colours / "val" / old / "0.png").read_bytes())
    (tmp_path / "data" / "val" / "b\udcff" / "bad\udcff\x1b[2J.png").write_text("")
    words += ["DATA.PATH_TO_DATA_DIR", str(tmp_path / "data"), "-o", str(tmp_path / "look")]
    assert main([*words, str(tmp_path / "data")]) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == len(list((tmp_path / "look").rglob("*.png"))) == 8 + 1  # and the contact sheet
    assert r"/\udcffé.png: dense " in said.out
    assert r"/clear\x1b[2J\x9b.png: dense " in said.out
    assert r"/two\nerror: lines.png: dense " in said.out
    assert r"bad\udcff\x1b[2J.png: it is not an image" in said.err
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", said.out + said.err)
    (tmp_path / "data" / "val" / "b\udcff" / "bad\udcff\x1b[2J.png").unlink()
    assert main([*words, "--report", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    content = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    cards = [card for group in content["groups"] for card in group["cards"]]
    assert {card["label"] for card in cards} >= {r"b\udcff", r"red\x1b[31m"}
    assert all(printable(text) == text for card in cards for text in (card["name"], card["label"], card["ats"][0]))


def test_clips(video_words, tmp_path, capsys):
    """A strip and an animation of the frames; the folders name the classes."""
    assert main([*video_words, str(tmp_path / "videos"), "-o", str(tmp_path / "look")]) == 0
    assert re.search(r"clip\.mp4: dense (falling|rising) ", capsys.readouterr().out)
    names = sorted(str(path.relative_to(tmp_path / "look")) for path in (tmp_path / "look").rglob("*.*"))
    assert names == ["contact_sheet.png", "falling/clip.gif", "falling/clip.png", "rising/clip.gif", "rising/clip.png"]
    with Image.open(tmp_path / "look" / "rising" / "clip.gif") as animation:
        assert animation.n_frames == 4


@pytest.mark.parametrize(
    "network",
    [
        ["MODEL.NAME=timm/deit3_small_patch16_224", f"TIMM.KWARGS={TIMM}", "ATS.NUM_TOKENS=12"],
        ["MODEL.NAME=PSViT", "PSVIT.NUM_POINTS=[6,5]", "PSVIT.NUM_ITERS=1", "PSVIT.STEM_DIMS=[8,4,12]",
         "PSVIT.DEPTH=3", "PSVIT.EMBED_DIM=24", "PSVIT.NUM_HEADS=2"],
    ],
    ids=["timm", "PSViT"],
)  # fmt: skip
def test_other_families(network, tiny_config, colours, tmp_path, capsys):
    """A strip and a report for networks other than ViT."""
    words = with_weights(tiny_config, tmp_path, network)
    output = ["-o", str(tmp_path / "look"), "--report", str(tmp_path / "page.html")]
    assert main([*words, str(colours / "val" / "red" / "0.png"), *output]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "page.html")
    assert (tmp_path / "look" / "0.png").stat().st_size > 5000
    assert (tmp_path / "page.html").stat().st_size > 30_000


def test_inputs_are_those_of_the_evaluation(words, video_words, tiny_config, colours, tmp_path):
    """A file is preprocessed as in the validation data set."""
    cfg = load_config(tiny_config)
    dataset = build_dataset(cfg, "val")
    assert torch.equal(read_input(Path(dataset.path(3)), cfg), dataset[3].x)
    cfg = load_config(tmp_path / "video.yaml", ["TRAIN.DATASET", "kinetics"])
    dataset = build_dataset(cfg, "val")
    assert torch.equal(read_input(Path(dataset.path(1)), cfg), dataset[1].x)


def test_words(tmp_path, monkeypatch):
    """Files and overrides may be mixed; an existing file is never taken for a key."""
    monkeypatch.chdir(tmp_path)
    Path("DEVICE").touch()
    assert split_words(["a.jpg", "ATS.ENABLE", "True", "b", "OUTPUT_DIR=x=y", "DEVICE"]) == (
        [Path("a.jpg"), Path("b"), Path("DEVICE")],
        ["ATS.ENABLE", "True", "OUTPUT_DIR", "x=y"],
    )
    with pytest.raises(UserError, match=r"type ATS\.BLOCKS VALUE"):
        split_words(["ATS.BLOCKS"])


def test_documented_commands_parse():
    """Every option, key and value in the commands of docs/VISUALIZE.md is accepted."""
    root = Path(__file__).parents[2]
    blocks = re.findall(r"```bash\n(.*?)```", (root / "docs" / "VISUALIZE.md").read_text(), re.DOTALL)
    lines = [
        line.split("  #")[0]
        for block in blocks
        for line in block.splitlines()
        if line.startswith("python tools/visualize.py")
    ]
    assert len(lines) >= 3
    for line in lines:
        python, script, *rest = shlex.split(line)
        assert python == "python"
        assert (root / script).is_file()
        args = make_parser().parse_intermixed_args(rest)
        paths, overrides = split_words(args.words)
        load_config(root / args.cfg, overrides)
        assert paths or args.report


def make_inputs(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "text.png").write_text("no image")
    (folder / "names.txt").write_text("a\nb\n")
    encode(folder / "clip.mp4", 8)
    Image.new("RGB", (40, 40)).save(folder / "image.png")


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (["text.png"], "Cannot read the image {}/text.png: it is not an image"),
        (["empty"], "The folder {}/empty holds no image (.jpg"),
        (["absent.png"], "There is no file or folder {}/absent.png"),
        (["clip.mp4"], "{}/clip.mp4 is a clip, but the network of this config takes images"),
        (["image.png", "ATS.ENABLE", "False"], "ATS.ENABLE is False: there are no tokens to drop. Add ATS.ENABLE True"),
        (["image.png", "ATS.BLOCKS", "[]"], "ATS.BLOCKS is empty"),
        (["image.png", "TEST.CHECKPOINT_FILE_PATH="], "TEST.CHECKPOINT_FILE_PATH is empty: what untrained weights"),
        (["image.png", "--classes", "names.txt"], "names.txt has 2 names, but MODEL.NUM_CLASSES is 4"),
        (["image.png", "--classes", "absent.txt"], "absent.txt: cannot be read"),
        (["image.png", "AST.ENABLE", "True"], "ATS.ENABLE"),
        (["image.png", "--outptu", "x"], "--outptu"),
        ([], "There is nothing to look at: give images, clips or a folder of them, or --report FILE.html"),
    ],
)
def test_mistakes(extra, text, words, tmp_path, capsys):
    """One line that names the path or the key and what to type, and exit status 1."""
    make_inputs(tmp_path)
    extra = [str(tmp_path / w) if re.search(r"\.(png|txt|mp4)$|^empty$", w) else w for w in extra]
    assert main([*words, *extra]) == 1
    err = capsys.readouterr().err
    assert err.removeprefix(f"Weights: {tmp_path}/w.safetensors (safetensors)\n").startswith("error: ")
    assert text.format(tmp_path) in err
    assert "Traceback" not in err


def test_no_config(capsys):
    assert main(["--report", "x.html"]) == 1
    assert "--cfg FILE is missing" in capsys.readouterr().err


def test_class_names(tmp_path):
    """ImageNet's names for 1,000 classes without data and for folders named by synsets; otherwise numbers."""
    cfg = get_cfg()
    cfg.MODEL.NUM_CLASSES = 1000
    names = class_names(cfg)
    assert (names[0], len(names)) == (class_names(cfg, "imagenet-1k")[0], 1000)
    assert names[0].startswith("tench")
    cfg.MODEL.NUM_CLASSES = 2
    assert class_names(cfg) == ["class 0", "class 1"]
    with pytest.raises(UserError, match="1000 names"):
        class_names(cfg, "imagenet-1k")
    for synset in ("n01440764", "n01443537"):
        (tmp_path / "val" / synset).mkdir(parents=True)
    cfg.DATA.PATH_TO_DATA_DIR = str(tmp_path)
    assert class_names(cfg) == names[:2]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_class_names_that_windows_wrote(encoding, tmp_path):
    """With a byte order mark, which is no part of the first name."""
    (tmp_path / "names.txt").write_bytes("caf\u00e9\r\n\u732b\r\n".encode(encoding))
    cfg = get_cfg()
    cfg.MODEL.NUM_CLASSES = 2
    assert class_names(cfg, str(tmp_path / "names.txt")) == ["caf\u00e9", "\u732b"]


def test_files_named_like_options(words, tmp_path, monkeypatch, capsys):
    """Names of videos often begin with a dash, and `*.png` brings them to the command line."""
    monkeypatch.chdir(tmp_path)
    Path("-Vt.png").touch()
    assert main([*words, "-Vt.png"]) == 1
    assert "Unknown option -Vt.png. For the file of this name type ./-Vt.png" in capsys.readouterr().err
