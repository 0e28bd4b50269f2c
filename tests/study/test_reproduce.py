"""tools/reproduce.py: paper beside measured, what is missing by name, and bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import reproduce as tool
import torch
from safetensors.torch import load_file

from ats.checkpoint import save_safetensors
from ats.config import load_config
from ats.models import build_model
from ats.study import reproduce as study
from ats.study.reproduce import TABLES, Outcome, PaperRow, accuracy_warning, missing, row_config, run_table
from ats.study.reproduced_table import draw, draw_accuracy, render
from ats.study.results import token_counts

ROOT = Path(__file__).parents[2]
ROWS = {f"{table}: {row.name}": row for table, rows in TABLES.items() for row in rows}
DEIT_S = next(row.weights for row in TABLES["imagenet"] if row.name == "DeiT-S")
# A network of 12 blocks, as DeiT-S has, for the 32 x 32 pixels and 4 classes of the fixture `colours`.
TINY = {
    **{"MODEL.NUM_CLASSES": 4, "VIT.IMG_SIZE": 32, "VIT.PATCH_SIZE": 4, "VIT.EMBED_DIM": 12, "VIT.NUM_HEADS": 2},
    **{"DATA.TRAIN_CROP_SIZE": 32, "DATA.TEST_CROP_SIZE": 32, "DATA.TEST_CROP_RATIO": 1.0, "TEST.BATCH_SIZE": 8},
    **{"DATA_LOADER.NUM_WORKERS": 0, "DEVICE": "cpu"},
}
OVERRIDES = tuple(word for pair in TINY.items() for word in pair)


@pytest.fixture
def folders(colours, tmp_path) -> dict[str, Path]:
    """The tiny network's weights under the name of DeiT-S, and `colours` as ImageNet."""
    cfg = load_config(ROOT / "configs/ImageNet/DeiT_S.yaml", list(OVERRIDES))
    torch.manual_seed(0)
    (tmp_path / "weights").mkdir()
    save_safetensors(tmp_path / "weights" / "tiny.safetensors", build_model(cfg).state_dict())
    (tmp_path / "weights" / "tiny.safetensors").rename(tmp_path / "weights" / "deit_s.safetensors")
    return {"weights": tmp_path / "weights", "imagenet": colours}


def tiny_rows(table: str) -> list[PaperRow]:
    from dataclasses import replace

    return [
        replace(row, weights="deit_s.safetensors" if row.weights == DEIT_S else row.weights, at_gflops=None)
        for row in TABLES[table]
    ]


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.config])
def test_every_row_has_its_config(name):
    """The YAML of a row loads with the row's overrides, and quotes the row's accuracy."""
    row = ROWS[name]
    cfg = row_config(row, {})
    assert row.is_dense != cfg.ATS.ENABLE
    assert row.weights
    assert row.origin
    text = (ROOT / "configs" / row.config).read_text()
    if row.top1 is not None and row.at_gflops is None and not row.is_dense:
        assert re.search(rf"\b{row.top1} %", text), row
    assert f"configs/{row.config}" in text  # its command


def test_names_are_unique():
    for rows in TABLES.values():
        assert len({row.name for row in rows}) == len(rows)


def test_paper_beside_measured(folders, tmp_path):
    """Rows that can be measured are measured, the others say which file they want. A second run measures nothing."""
    rows = tiny_rows("imagenet")
    outcomes = run_table(rows, folders, OVERRIDES, results_folder=tmp_path / "rows")
    found = {outcome.row.name: outcome for outcome in outcomes}
    dense, ats = found["DeiT-S"], found["DeiT-S + ATS, not fine-tuned"]
    assert dense.measured["num_samples"] == ats.measured["num_samples"] == 32
    assert ats.gflops < dense.gflops == pytest.approx(dense.measured["gflops"]["dense"])
    assert len(ats.measured["hits"]) == 32
    assert dense.measured["top1"] == pytest.approx(100 * dense.measured["hits"].count("1") / 32)
    text = render("imagenet", outcomes)
    line = next(line for line in text.splitlines() if line.startswith("| DeiT-S "))
    assert f"{dense.measured['top1']:.2f}" in line
    assert f"{dense.measured['top1'] - 79.8:+.2f}" in line
    wanted = found["DeiT-S + ATS, fine-tuned"].missing
    assert str(folders["weights"] / "DeiT_S_ATS_finetune.safetensors") in wanted
    assert "configs/ImageNet/DeiT_S_ATS_finetune.yaml" in wanted
    assert wanted in text
    assert "79.8 %" in dense.warning  # 25 % or so of four colours, untrained
    assert dense.warning in text
    assert draw("imagenet", outcomes, tmp_path / "figure.png").stat().st_size > 5000

    original, study.measure = study.measure, None  # a call would fail
    try:
        again = run_table(rows, folders, OVERRIDES, results_folder=tmp_path / "rows")
    finally:
        study.measure = original
    assert [outcome.measured for outcome in again] == [outcome.measured for outcome in outcomes]


def test_histogram(folders, tmp_path):
    """The tokens of every block beside the paper's, and a picture with images by cost."""
    rows = tiny_rows("histogram")
    outcomes = run_table(rows, folders, OVERRIDES, results_folder=tmp_path / "rows")
    text = render("histogram", outcomes)
    assert re.search(r"\|\s+3 \|\s+166 / \d+ \|\s+162 / [\d.]+ \|", text)
    counts = token_counts([outcomes[0].measured])
    assert set(counts) == set(range(3, 12))
    assert all(sum(values) == 32 for values in counts.values())
    assert draw("histogram", outcomes, tmp_path / "figure.png").stat().st_size > 5000


def test_budget_rows_set_k(folders, tmp_path):
    """K is searched, so the rows of the ablations cost what they should."""
    from dataclasses import replace

    dense = 0.0
    for row in tiny_rows("sampling")[::3]:  # inverse transform and top-K
        if not dense:
            dense_row = replace(row, name="dense", overrides=("ATS.ENABLE", False))
            dense = run_table([dense_row], folders, OVERRIDES, results_folder=tmp_path / "rows")[0].gflops
        outcome = run_table(
            [replace(row, at_gflops=0.6 * dense)], folders, OVERRIDES, results_folder=tmp_path / "rows"
        )[0]
        assert outcome.num_tokens > 2
        assert outcome.gflops == pytest.approx(0.6 * dense, rel=0.05)


def test_weights_that_do_not_fit_are_an_error_of_their_row(folders, tmp_path, capsys):
    """The rest of the table is measured and written; the command fails, with the rows named."""
    weights = folders["weights"]
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 7)}}, weights / "ps_vit_b_18.pth")
    torch.save({"model": load_file(weights / "deit_s.safetensors")}, weights / DEIT_S)
    names = ["DeiT-S", "PS-ViT-B/18", "CvT-21 at 384"]
    words = ["imagenet", *(word for name in names for word in ("--row", name)), "--output", tmp_path / "out"]
    words += ["--weights", weights, "--imagenet", folders["imagenet"]]
    assert tool.main([*map(str, [*words, *OVERRIDES])]) == 1
    assert re.search(r"Not measured, though .*: PS-ViT-B/18\.$", capsys.readouterr().err.strip())
    rows = json.loads((tmp_path / "out" / "imagenet" / "results.json").read_text())["rows"]
    assert [row["measured"] is not None for row in rows] == [True, False, False]
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert "ps_vit_b_18.pth" in rows[1]["error"]
    assert rows[1]["error"] in (tmp_path / "out" / "imagenet" / "table.md").read_text()


def test_every_family_has_its_colour():
    """Also families without a number in the paper. The paper's points and ours have the same colour."""
    from matplotlib.figure import Figure

    measured = {"top1": 80.0, "video": {"gflops_per_video": {"paper_mean": 5000.0}}}
    for table in ("kinetics400", "kinetics600"):
        rows = [row for row in TABLES[table] if row.config and row.family]
        axes = Figure().subplots()
        draw_accuracy(axes, table, [Outcome(row, measured=measured) for row in rows])
        colours = {}
        for curve in axes.containers:
            colours.setdefault(curve.get_label().rpartition(",")[0], set()).add(curve.lines[0].get_color())
        assert set(colours) == {row.family for row in rows}
        assert all(len(found) == 1 for found in colours.values())
        assert len(set.union(*colours.values())) == len(colours)


def test_warning_only_where_accuracy_is_far():
    """Compared with the published accuracy of the dense network; ATS may cost a few points, not more."""
    dense = next(row for row in TABLES["imagenet"] if row.name == "DeiT-S")
    ats = next(row for row in TABLES["imagenet"] if row.name == "DeiT-S + ATS, not fine-tuned")
    file = Path("a.pth")
    assert accuracy_warning(dense, file, 79.8) == accuracy_warning(ats, file, 72.7) == ""
    tuned = next(row for row in TABLES["imagenet"] if row.name == "DeiT-S + ATS, fine-tuned")
    assert accuracy_warning(tuned, file, 79.7) == ""
    for row, top1 in ((dense, 72.2), (dense, 83.1), (ats, 60.0), (ats, 83.0), (tuned, 60.0), (tuned, 95.9)):
        warning = accuracy_warning(row, file, top1)
        assert f"{top1:.2f} %" in warning
        assert "79.8 %" in warning
        assert "a.pth" in warning


def test_bad_input(tmp_path, capsys):
    """A table, row or folder that does not exist: the choices, or the files wanted."""

    def error(*words) -> str:
        assert tool.main([*map(str, words), "--output", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err

    assert re.search(r"no table imagnet.*imagenet, kinetics400.*Did you mean imagenet", error("imagnet"))
    assert re.search(r"no row 'DeiT-s'.*Did you mean DeiT-S", error("imagenet", "--row", "DeiT-s"))
    message = error("imagenet", "--weights", tmp_path / "none")
    assert str(tmp_path / "none") in message
    assert DEIT_S in message
    assert re.search(
        r"--imagenet .*none is not a folder.*val/<class>", error("stages", "--imagenet", tmp_path / "none")
    )
    assert re.search(
        r"DEVCE.*DEVICE", error("stages", "--row", "blocks 3-11, 2.0 GFLOPs", *_there(tmp_path), "DEVCE", "x")
    )


def _there(tmp_path: Path) -> list:
    """Empty files in place of weights and data."""
    (tmp_path / "data" / "val").mkdir(parents=True)
    (tmp_path / DEIT_S).touch()
    return ["--weights", tmp_path, "--imagenet", tmp_path / "data"]


@pytest.mark.parametrize("table", TABLES)
def test_tables_without_anything(table, tmp_path, capsys):
    """Without weights and data every row says what it wants, and the table is written."""
    assert tool.main([table, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for row in TABLES[table]:
        wants = missing(row, {})
        assert row.weights in wants
        assert wants in out
    rows = json.loads((tmp_path / table / "results.json").read_text())["rows"]
    assert [row["paper"]["name"] for row in rows] == [row.name for row in TABLES[table]]
    assert all(row["measured"] is None for row in rows)


def test_videos_are_counted_over_all_views():
    views = {"gflops_per_video": {"paper_mean": 520.0}}
    row = TABLES["kinetics600"][0]
    assert Outcome(row, measured={"video": views}).gflops == 520.0
