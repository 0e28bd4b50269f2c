"""The paper's tables, measured: `tools/reproduce.py`. `paper.yaml` has the numbers, and what each row needs.

Every row whose data and weights are there is evaluated once, and its result kept. The others are listed with the files
they need.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import yaml

from ats.config import SHIPPED, CfgNode, load_config
from ats.datasets import build_loader, input_shape
from ats.engine.output import config_sha256
from ats.engine.tally import build_ensemble
from ats.errors import UserError, suggest
from ats.flops import dense_gflops
from ats.models import build_model
from ats.study.results import ResultStore, file_sha256, load_model, measure, search_num_tokens

logger = logging.getLogger(__name__)

IMAGENET, KINETICS400, KINETICS600 = "imagenet", "kinetics400", "kinetics600"
# "weights" -> the folder of the checkpoints, under the names in `paper.yaml`; data set -> its folder.
Folders = dict[str, Path]
# What a row looks for in the folder of its data set, and what belongs there.
VIDEOS = ("test.csv", "test.csv and the videos it names")
DATA_FILES = {IMAGENET: ("val", "val/<class>/*.JPEG"), KINETICS400: VIDEOS, KINETICS600: VIDEOS}
NUM_IMAGES = 256  # on which K is searched
FAR = 1.5  # points by which a dense accuracy may differ from the published one
FAR_WITH_ATS = 10.0  # points below it that ATS alone cannot explain: the paper loses up to 7.1, at 2.0 GFLOPs


@dataclass(frozen=True)
class PaperRow:
    """A row of a table. Numbers that we do not have are None."""

    name: str  # unique in its table
    top1: float | None = None  # percent
    gflops: float | None = None  # per image, or over all views of a video
    top5: float | None = None  # percent
    config: str = ""  # below `configs/`; "": not built here, only quoted
    overrides: tuple = ()  # config keys on top of it, (KEY, VALUE, ...)
    weights: str = ""  # name of the checkpoint
    origin: str = ""  # where to get it, or the command that makes it
    dense_top1: float | None = None  # published accuracy of the dense network; with these weights, if they are dense
    data: str = IMAGENET  # or KINETICS400, KINETICS600
    at_gflops: float | None = None  # search the K that costs this
    family: str = ""  # the figure joins the rows of one family

    @property
    def is_dense(self) -> bool:
        """Whether ATS is off, so that the accuracy is that of the weights."""
        return self.overrides[:2] == ("ATS.ENABLE", False)


def _rows(entry: dict, table: str) -> list[PaperRow]:
    """The rows that an entry of `paper.yaml` makes."""
    row = entry | {"data": table if table.startswith("kinetics") else IMAGENET}
    row["overrides"] = tuple(entry.get("overrides", ()))
    if "tuned" in row:
        return _dense_and_ats(row)
    if "top1_at" not in row:
        return [PaperRow(**row)]
    name, budgets = row.pop("name"), row.pop("top1_at")
    return [
        PaperRow(f"{name}, {gflops} GFLOPs", top1, gflops, at_gflops=gflops, family=name, **row)
        for gflops, top1 in budgets.items()
    ]


def _dense_and_ats(row: dict) -> list[PaperRow]:
    """One network dense, with ATS, and with ATS fine-tuned."""
    name, dense, tuned = row.pop("name"), row.pop("dense", None), row.pop("tuned")
    row |= {"family": name, "dense_top1": row.get("dense_top1") or (dense[0] if dense else None)}
    finetune = f"{row['config'].removesuffix('.yaml').removesuffix('_ATS')}_ATS_finetune"
    command = f"python tools/run_net.py --cfg configs/{finetune}.yaml TRAIN.CHECKPOINT_FILE_PATH <{row['weights']}> ..."
    tuned_row = row | {
        "config": f"{finetune}.yaml",
        "weights": f"{Path(finetune).name}.safetensors",
        "origin": f"model.safetensors of: {command}",
    }
    dense_rows = [] if dense is None else [PaperRow(name, *dense, **row | {"overrides": ("ATS.ENABLE", False)})]
    with_ats = {"overrides": ("ATS.ENABLE", True)}
    return [
        *dense_rows,
        PaperRow(f"{name} + ATS, not fine-tuned", **row | with_ats),
        PaperRow(f"{name} + ATS, fine-tuned", *tuned, **tuned_row | with_ats),
    ]


_CONTENTS = yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text())
TABLES: dict[str, tuple[PaperRow, ...]] = {
    table: tuple(row for entry in entries for row in _rows(entry, table))
    for table, entries in _CONTENTS["tables"].items()
}
# Of DeiT-S + ATS: block -> mode, mean, standard deviation and range.
TOKENS_KEPT: dict[int, list] = _CONTENTS["tokens_kept"]


@dataclass(frozen=True)
class Outcome:
    """A row and its measurement, or why there is none."""

    row: PaperRow
    measured: dict | None = None  # by `results.measure`
    missing: str = ""  # the files it needs
    num_tokens: int | None = None  # the K that was found, if the row has a budget
    warning: str = ""  # about its accuracy
    error: str = ""  # why the files that are there cannot be used

    @property
    def gflops(self) -> float | None:
        """Measured, in the paper's accounting, over all views."""
        if self.measured is None:
            return None
        video = self.measured["video"]
        return video["gflops_per_video"]["paper_mean"] if video else self.measured["gflops"]["paper_mean"]


def select_rows(table: str, only: Sequence[str] = ()) -> tuple[PaperRow, ...]:
    """The rows of a table, or only those named. UserError, with the choices, if there is no such table or row."""
    if table not in TABLES:
        raise UserError(f"There is no table {table}: choose from {', '.join(TABLES)}.{suggest(table, TABLES)}")
    rows = {row.name: row for row in TABLES[table]}
    for name in only:
        if name not in rows:
            names = "\n  ".join(rows)
            raise UserError(f"Table {table} has no row {name!r}.{suggest(name, rows)} Its rows:\n  {names}")
    return tuple(rows[name] for name in only) if only else TABLES[table]


def check_folders(rows: Sequence[PaperRow], folders: Folders) -> None:
    """UserError, with the files that the rows need, if a folder does not exist."""
    weights = ", ".join(sorted({row.weights for row in rows if row.config}))
    for name, folder in folders.items():
        if not folder.is_dir():
            wanted = weights if name == "weights" else DATA_FILES[name][1]
            raise UserError(f"--{name} {folder} is not a folder. It should hold {wanted}.")


def missing(row: PaperRow, folders: Folders) -> str:
    """What a row still needs; "" if it can be measured."""
    if not row.config:
        return "not built here, only quoted from the paper"
    data_file, data_files = DATA_FILES[row.data]
    wants = []
    for name, file, files, hint in (
        ("weights", row.weights, f"{row.weights} ({row.origin})", row.origin),
        (row.data, data_file, data_files, data_files),
    ):
        if name not in folders:
            wants.append(f"--{name} DIR with {files}")
        elif not (path := folders[name] / file).exists():
            wants.append(f"{path} ({hint})")
    return "; ".join(wants)


def row_config(row: PaperRow, folders: Folders, overrides: Sequence = (), *, num_tokens: int | None = None) -> CfgNode:
    """The configuration that a row is evaluated with."""
    overrides = [*row.overrides, *overrides]
    overrides += [] if num_tokens is None else ["ATS.NUM_TOKENS", num_tokens]
    if row.data in folders:
        overrides += ["DATA.PATH_TO_DATA_DIR", str(folders[row.data])]
    return load_config(SHIPPED / row.config, overrides)


def run_table(
    rows: Sequence[PaperRow], folders: Folders, overrides: Sequence = (), *, results_folder: Path
) -> list[Outcome]:
    """Measure the rows that can be measured; the results are kept. If weights or data do not fit or cannot be read, the
    row gets an `error`.

    Args:
        overrides: config keys for every row, [KEY, VALUE, ...].

    Raises:
        UserError: an override is wrong, or a data set has no samples.
    """
    jobs = [(row, missing(row, folders)) for row in rows]
    total_cost = sum(_cost(row_config(row, folders, overrides)) for row, wants in jobs if not wants)
    results, outcomes = ResultStore(results_folder, total_cost=total_cost), []
    for row, wants in jobs:
        try:
            outcome = Outcome(row, missing=wants) if wants else _run_row(row, folders, overrides, results)
        except (UserError, OSError) as error:
            logger.error("%s: %s", row.name, error)
            outcome = Outcome(row, error=str(error))
        outcomes.append(outcome)
    return outcomes


def _cost(cfg: CfgNode) -> float:
    """Roughly how long an evaluation takes: GFLOPs of the dense network times samples."""
    with torch.device("meta"):
        model = build_model(cfg)
    return dense_gflops(model, (1, *input_shape(cfg))) * len(build_loader(cfg, "test").dataset)


def _run_row(row: PaperRow, folders: Folders, overrides: Sequence, results: ResultStore) -> Outcome:
    weights, name = folders["weights"] / row.weights, re.sub(r"[^\w.-]", "_", row.name)
    cfg, num_tokens = row_config(row, folders, overrides), None
    if row.at_gflops is not None:
        inputs = _inputs(cfg, weights) | {"at_gflops": row.at_gflops, "images": NUM_IMAGES}
        search = partial(_search, cfg, weights, row.at_gflops)
        num_tokens = results.get(f"num_tokens_{name}", inputs, search, cost=0.0)["num_tokens"]
        cfg = row_config(row, folders, overrides, num_tokens=num_tokens)
    logger.info("%s%s", row.name, "" if num_tokens is None else f", K = {num_tokens}")
    measured = results.get(name, _inputs(cfg, weights), partial(_evaluate, cfg, weights), cost=_cost(cfg))
    if warning := accuracy_warning(row, weights, measured["top1"]):
        logger.warning("%s", warning)
    return Outcome(row, measured=measured, num_tokens=num_tokens, warning=warning)


def _search(cfg: CfgNode, weights: Path, gflops: float) -> dict:
    """K, searched on images evenly spaced over the set. Uses no labels."""
    dataset = build_loader(cfg, "test").dataset
    count = min(NUM_IMAGES, len(dataset))
    x = torch.stack([dataset[i * len(dataset) // count].x for i in range(count)])
    return search_num_tokens(load_model(cfg, weights), x, gflops)


def _evaluate(cfg: CfgNode, weights: Path) -> dict:
    loader = build_loader(cfg, "test")
    return measure(load_model(cfg, weights), loader, ensemble=build_ensemble(cfg, loader.dataset))


def _inputs(cfg: CfgNode, weights: Path) -> dict:
    """What a result depends on."""
    data = str(Path(cfg.DATA.PATH_TO_DATA_DIR).resolve())
    return {"config": config_sha256(cfg), "weights": file_sha256(weights), "data": data, "torch": torch.__version__}


def accuracy_warning(row: PaperRow, weights: Path, top1: float) -> str:
    """A warning if the accuracy suggests that the weights belong to another network; else ""."""
    if row.dense_top1 is None:
        return ""
    low = FAR if row.is_dense else FAR_WITH_ATS
    if row.dense_top1 - low <= top1 <= row.dense_top1 + FAR:
        return ""
    return (
        f"{row.name}: {top1:.2f} % top-1, but the published accuracy of the dense network is {row.dense_top1} %: "
        f"{weights} may be another model, or the data another set."
    )
