"""The report page: its numbers equal the evaluation's, and it works in a real browser."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from clips import encode
from helpers import randomise
from hypothesis import given
from hypothesis import strategies as st
from test_cli_visualize import VIDEO

from ats.checkpoint import save_safetensors
from ats.cli.visualize import main
from ats.config import load_config
from ats.datasets import build_loader
from ats.engine.evaluate import evaluate
from ats.models import build_model
from ats.visualize.compare import Guess
from ats.visualize.page import Row, choose, deciles, fill_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
IMAGES = {
    "MODEL": {"NUM_CLASSES": 4},
    "VIT": {"IMG_SIZE": 32, "PATCH_SIZE": 4, "EMBED_DIM": 32, "DEPTH": 4, "NUM_HEADS": 2},
    "ATS": {"ENABLE": True, "BLOCKS": [1, 2, 3], "NUM_TOKENS": 40},
    "TEST": {"BATCH_SIZE": 12},
    "DATA": {"TRAIN_CROP_SIZE": 32, "TEST_CROP_SIZE": 32, "TEST_CROP_RATIO": 1.0},
    "DATA_LOADER": {"NUM_WORKERS": 0},
    "DEVICE": "cpu",
}


def make_report(settings: dict, folder: Path, data: Path) -> tuple[Path, dict, object]:
    """A page about a network with random weights, its content, and the network's config."""
    config = folder / "network.yaml"
    settings = settings | {"DATA": settings["DATA"] | {"PATH_TO_DATA_DIR": str(data)}}
    config.write_text(yaml.safe_dump(settings))
    save_safetensors(folder / "w.safetensors", randomise(build_model(load_config(config))).state_dict())
    weights = ["TEST.CHECKPOINT_FILE_PATH", str(folder / "w.safetensors")]
    assert main(["--cfg", str(config), "--report", str(folder / "page.html"), *weights]) == 0
    return folder / "page.html", content_of((folder / "page.html").read_text()), load_config(config, weights)


def content_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def report(colours, tmp_path_factory):
    """A report on the 32 images of `colours`."""
    return make_report(IMAGES, tmp_path_factory.mktemp("report"), colours)


@pytest.fixture(scope="module")
def clip_report(tmp_path_factory):
    """A report on two clips."""
    folder = tmp_path_factory.mktemp("clip_report")
    for name in ("falling", "rising"):
        encode(folder / name / "clip.mp4", 20)
    (folder / "val.csv").write_text("falling/clip.mp4 0\nrising/clip.mp4 1\n")
    return make_report(VIDEO, folder, folder)


def test_numbers_are_those_of_the_evaluation(report):
    """Top-1, GFLOPs and token counts of both networks."""
    _, content, cfg = report
    loader = build_loader(cfg, "val")
    for kind, overrides in (("ats", []), ("dense", ["ATS.ENABLE", False])):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.merge_from_list(overrides)
        result = evaluate(randomise(build_model(cfg)), loader, device=torch.device("cpu"))
        assert content["top1"][kind] == pytest.approx(result.top1)
        if kind == "ats":
            assert content["gflops"] == pytest.approx(result.gflops["mean"])
            assert content["denseGflops"] == pytest.approx(result.gflops["dense"])
            assert [b["block"] for b in content["blocks"]] == [1, 2, 3]
            for block in content["blocks"]:
                assert block["mean"] == pytest.approx(result.tokens_per_block[block["block"]] - 1)  # CLS
                assert sum(block["counts"]) == content["numSamples"] == 32
    assert sum(part["num"] for part in content["deciles"]) == 32
    first, second = (group["cards"] for group in content["groups"][:2])
    assert max(card["gflops"] for card in first) <= min(card["gflops"] for card in second)
    assert content["groups"][0]["cards"][0]["name"].split("/")[0] in ("blue", "green", "red", "yellow")


def row(index: int, gflops: float, ats: int = 0, dense: int = 0, label: int = 0) -> Row:
    return Row(index, label, Guess(ats, 0.5), Guess(dense, 0.5), gflops, [1])


@given(st.lists(st.tuples(st.floats(0, 9), st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_deciles_are_equal_parts_by_cost(samples):
    """Ten parts (fewer for fewer samples) in order, sizes within one of each other, every sample once."""
    rows = [row(i, cost, ats=int(ats), dense=int(dense)) for i, (cost, ats, dense) in enumerate(samples)]
    parts = deciles(rows)
    sizes = [part["num"] for part in parts]
    assert len(parts) == min(10, len(rows))
    assert sum(sizes) == len(rows)
    assert max(sizes) - min(sizes) <= 1
    assert all(a["high"] <= b["low"] for a, b in itertools.pairwise(parts))
    right = sum(part["num"] * part["ats"] for part in parts) / 100
    assert right == pytest.approx(sum(not ats for _, ats, _ in samples))


def test_what_is_shown():
    """The cheapest samples, the most expensive, and those ATS changes; none is both cheap and expensive."""
    rows = [row(i, float(i % 7), ats=int(i == 5), dense=int(i == 6)) for i in range(30)]
    cheap, expensive, changed = (chosen for _, _, chosen in choose(rows))
    assert [r.gflops for r in cheap] == sorted(r.gflops for r in cheap)
    assert not {r.index for r in cheap} & {r.index for r in expensive}
    assert {r.index for r in changed} == {5, 6}
    assert "2 of 30: 1 right only without ATS, 1 right only with it" in choose(rows)[2][1]
    assert len(choose([row(0, 1.0)])) == 2


def test_no_text_breaks_the_page():
    """Names of classes and files stay text, whatever they contain."""
    nasty = "</script><script>alert(1)</script>__TITLE____DATA__"
    page = fill_page({"title": nasty, "names": [nasty]})
    assert content_of(page)["names"] == [nasty]
    assert page.count("<script") == 2
    assert "alert(1)</script>" not in page


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of the browsers {', '.join(BROWSERS)} is installed, so the page cannot be tested")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Visit:
    """An open page, with its console messages and requests."""

    def __init__(self, browser: object, path: Path) -> None:
        self.page = browser.new_page(viewport={"width": 1100, "height": 800}, reduced_motion="reduce")
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def veiled(self) -> list[int]:
        """Covered cells of each sample. Reads a copy, because Chromium warns about reading the canvas itself."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll(".frame canvas")].map((canvas) => {
                const { width, height } = canvas;
                const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
                copy.drawImage(canvas, 0, 0);
                const pixels = copy.getImageData(0, 0, width, height).data;
                return pixels.filter((value, i) => i % 4 === 3 && value > 0).length;
            })"""
        )


@pytest.fixture
def visit(browser, report):
    """The page about images."""
    visit = Visit(browser, report[0])
    yield visit
    visit.page.close()


def test_page_loads_alone_and_without_complaint(visit, report):
    """Right picture sizes, no requests to the network, an empty console, labelled controls."""
    page, cards = visit.page, [card for group in report[1]["groups"] for card in group["cards"]]
    sizes = page.evaluate("() => [...document.images].map((i) => [i.complete, i.naturalWidth, i.naturalHeight])")
    assert sizes == [[True, 32, 32]] * len(cards)
    assert page.locator(".cards > li").count() == len(cards) >= 24
    assert page.get_by_role("slider", name="Block").is_visible()
    assert page.get_by_role("slider", name="Frame").count() == 0  # images have none
    assert [url for url in visit.requests if not url.startswith("data:")] == [report[0].as_uri()]
    assert visit.complaints == []
    assert page.locator("#histograms rect").count() > 3
    assert page.locator("#deciles circle").count() == 20
    wrong = [card for card in cards if not card["right"]]
    assert page.locator(".wrong").all_inner_texts() == [f"is {card['label']}" for card in wrong]
    assert page.get_by_text(f"predicted {wrong[0]['ats'][0]}", exact=True).count()
    texts = page.locator(".cards > li").all_inner_texts()
    assert all(f"dense: {card['dense'][0]}\n" in text for card, text in zip(cards, texts, strict=True))
    assert "in 10 parts of 3 or 4." in page.locator("#deciles-note").inner_text()


def test_slider_moves_through_the_blocks(visit, report):
    """Moves by keyboard from the input to the last block; at each position every sample shows what that block kept."""
    page, content = visit.page, report[1]
    cards = [card for group in content["groups"] for card in group["cards"]]
    slider = page.get_by_role("slider", name="Block")
    slider.focus()
    page.keyboard.press("Home")
    assert visit.veiled() == [0] * len(cards)
    assert "input" in slider.get_attribute("aria-valuetext")
    for i, block in enumerate(content["blocks"]):
        page.keyboard.press("ArrowRight")
        assert visit.veiled() == [block["numTokens"] - card["numKept"][i] for card in cards]
        text = re.fullmatch(
            r"after block (\d+): ([\d.]+) of 64 tokens on average", slider.get_attribute("aria-valuetext")
        )
        assert page.locator("#block-text").inner_text() == text[0]
        assert (int(text[1]), float(text[2])) == (block["block"], pytest.approx(block["mean"], abs=0.051))
        assert f"Block {block['block']} " in page.locator(".chart.now figcaption").inner_text()
        assert f"{cards[0]['numKept'][i]} of 64 tokens" in page.locator(".cards > li").first.inner_text()
    page.get_by_label("significance").check()
    assert visit.veiled() == [64] * len(cards)  # colours where there was a token, the veil elsewhere: all cells covered
    assert visit.complaints == []


def test_tooltips(visit, report):
    """Hovering over or focusing a sample shows classes, confidences and cost."""
    page, card = visit.page, report[1]["groups"][0]["cards"][1]
    page.locator(".cards > li").nth(1).hover()
    text = page.locator("#tip").inner_text()
    assert f"with ATS: {card['ats'][0]}, {100 * card['ats'][1]:.1f} %" in text
    assert f"dense: {card['dense'][0]}, {100 * card['dense'][1]:.1f} %" in text
    assert "GFLOPs" in text
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden()
    page.get_by_label("tokens kept").focus()
    page.keyboard.press("Tab")
    assert page.locator("#tip").is_visible()
    assert report[1]["groups"][0]["cards"][0]["name"] in page.locator("#tip").inner_text()


def test_clips_have_a_second_slider(browser, clip_report):
    """Frame by frame or as an animation; each frame shows its own mask."""
    path, content, _ = clip_report
    visit = Visit(browser, path)
    page, card = visit.page, content["groups"][0]["cards"][0]
    assert card["size"] == [4, 32, 32]
    assert page.evaluate("() => document.images[0].naturalWidth") == 4 * 32
    slider = page.get_by_role("slider", name="Frame")
    slider.focus()
    kept = []
    for _ in range(4):
        kept.append(16 - visit.veiled()[0])
        page.keyboard.press("ArrowRight")
    assert sum(kept) == card["numKept"][0]
    assert page.locator("#frame-text").inner_text() == "4 of 4"
    page.get_by_label("play").check()
    page.wait_for_function("() => document.querySelector('#frame-text').textContent !== '4 of 4'", timeout=60_000)
    assert visit.complaints == []
    page.close()


def test_fits_a_phone(browser, clip_report):
    """Nothing is wider than the window."""
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(clip_report[0].as_uri())
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    page.close()


def test_dark_scheme(browser, report):
    """Dropped patches fade to the page's dark background."""
    dark = browser.new_page(color_scheme="dark")
    dark.goto(report[0].as_uri())
    pixel = dark.evaluate(
        """() => { const c = document.querySelector(".frame canvas"), all = c.getContext("2d")
            .getImageData(0, 0, c.width, c.height).data;
            const i = all.findIndex((v, i) => i % 4 === 3 && v > 0); return [...all.slice(i - 3, i + 1)]; }"""
    )
    assert max(pixel[:3]) < 60
    assert pixel[3] > 200
    dark.close()
