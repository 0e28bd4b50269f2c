"""A table of the paper, measured: `tools/reproduce.py`.

Every row whose data and weights are there is evaluated once and kept; the others are listed with the file they want.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ats.checkpoint import load_weights
from ats.config import CfgNode, load_config
from ats.datasets import build_loader, input_shape
from ats.engine.device import select_device
from ats.engine.ensemble import build_ensemble
from ats.engine.output_dir import config_sha256
from ats.errors import UserError, suggest
from ats.flops import dense_gflops
from ats.models import build_model
from ats.study.budget import fit_num_tokens
from ats.study.paper import TABLES, PaperRow
from ats.study.tasks import Runner, Task, file_sha256, measure

logger = logging.getLogger(__name__)

FAR = 1.5  # points by which a dense accuracy may differ from the published one
FAR_WITH_ATS = 10.0  # points below it at which ATS alone is no explanation: the paper loses up to 7.1 at 2.0 GFLOPs


@dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
        configs: the repository's folder of configs. weights: folder of the checkpoints, by the names in `paper.py`.
        data: data set -> its folder, for those that are there.
        overrides: config keys for every row, [KEY, VALUE, ...].
    """

    configs: Path
    weights: Path | None
    data: dict[str, Path]
    overrides: tuple = ()


@dataclass(frozen=True)
class Outcome:
    """A row beside what became of it.

    Attributes:
        measured: what `tasks.measure` returned. missing: what it wants, where it could not be measured. error: why
            what is there cannot be used.
        num_tokens: K that was set, where the row has a budget. warning: about its accuracy.
    """

    row: PaperRow
    measured: dict | None = None
    missing: str = ""
    num_tokens: int | None = None
    warning: str = ""
    error: str = ""

    @property
    def gflops(self) -> float | None:
        """Measured, in the paper's accounting, over all views."""
        if self.measured is None:
            return None
        video = self.measured["video"]
        return video["gflops_per_video"]["paper_mean"] if video else self.measured["gflops"]["paper_mean"]


def select_rows(table: str, only: Sequence[str] = ()) -> tuple[PaperRow, ...]:
    """The rows of a table, or those of them named.

    Raises:
        UserError: no such table or row; the message has those there are.
    """
    if table not in TABLES:
        raise UserError(f"There is no table {table}: choose from {', '.join(TABLES)}.{suggest(table, TABLES)}")
    rows = {row.name: row for row in TABLES[table]}
    for name in only:
        if name not in rows:
            names = "\n  ".join(rows)
            raise UserError(f"Table {table} has no row {name!r}.{suggest(name, rows)} Its rows:\n  {names}")
    return tuple(rows[name] for name in only) if only else TABLES[table]


def check_places(rows: Sequence[PaperRow], places: Places) -> None:
    """Refuse folders that were named and are not there.

    Raises:
        UserError: with the files that the rows want.
    """
    wanted = sorted({row.weights for row in rows if row.config})
    if places.weights is not None and not places.weights.is_dir():
        raise UserError(f"--weights {places.weights} is not a folder. It should hold: {', '.join(wanted)}.")
    for name, folder in places.data.items():
        if not folder.is_dir():
            raise UserError(f"--{name} {folder} is not a folder. It should hold {_data_wanted(name)}.")


def _data_wanted(name: str) -> str:
    return "val/<class>/*.JPEG" if name == "imagenet" else "test.csv and the videos it names"


def missing(row: PaperRow, places: Places) -> str:
    """What a row still wants; "" if it can be measured."""
    if not row.config:
        return "not built here: the paper's number is only quoted"
    wants = []
    if places.weights is None:
        wants.append(f"--weights DIR with {row.weights} ({row.origin})")
    elif not (places.weights / row.weights).is_file():
        wants.append(f"{places.weights / row.weights} ({row.origin})")
    folder = places.data.get(row.data)
    if folder is None:
        wants.append(f"--{row.data} DIR with {_data_wanted(row.data)}")
    else:
        file = folder / ("val" if row.data == "imagenet" else "test.csv")
        if not file.exists():
            wants.append(f"{file} ({_data_wanted(row.data)})")
    return "; ".join(wants)


def row_config(row: PaperRow, places: Places, *, num_tokens: int | None = None) -> CfgNode:
    """The configuration a row is evaluated with."""
    overrides: list = [*row.overrides, *places.overrides]
    if num_tokens is not None:
        overrides += ["ATS.NUM_TOKENS", num_tokens]
    overrides += ["DATA.PATH_TO_DATA_DIR", str(places.data[row.data])] if row.data in places.data else []
    return load_config(places.configs / row.config, overrides)


def run_table(rows: Sequence[PaperRow], places: Places, *, folder: Path) -> list[Outcome]:
    """Measure the rows that can be measured; results are kept in `folder`. Weights or data that do not fit or cannot be
    read are the `error` of their row.

    Raises:
        UserError: an override that is wrong, or a data set without a sample.
    """
    able = [row for row in rows if not missing(row, places)]
    runner = Runner(folder, total_cost=sum(_cost(row, places) for row in able))
    outcomes = []
    for row in rows:
        wants = missing(row, places)
        if wants:
            outcomes.append(Outcome(row, missing=wants))
            continue
        try:
            outcomes.append(_run_row(row, places, runner))
        except (UserError, OSError) as error:
            logger.error("%s: %s", row.name, error)
            outcomes.append(Outcome(row, error=str(error)))
    return outcomes


def _cost(row: PaperRow, places: Places) -> float:
    """About how long a row takes, in GFLOPs of its dense network times samples."""
    cfg = row_config(row, places)
    with torch.device("meta"):
        model = build_model(cfg)
    return dense_gflops(model, (1, *input_shape(cfg))) * len(build_loader(cfg, "test").dataset)


def _run_row(row: PaperRow, places: Places, runner: Runner) -> Outcome:
    weights = places.weights / row.weights
    sha256 = file_sha256(weights)
    num_tokens = None if row.at_gflops is None else _num_tokens(row, places, runner, sha256)
    cfg = row_config(row, places, num_tokens=num_tokens)
    logger.info("%s%s", row.name, "" if num_tokens is None else f", K = {num_tokens}")

    def run() -> dict:
        loader, device = build_loader(cfg, "test"), select_device(cfg.DEVICE)
        ensemble = build_ensemble(cfg, loader.dataset)
        return measure(_load(cfg, weights).to(device), loader, device=device, ensemble=ensemble)

    task = Task(_file_name(row.name), _inputs(cfg, row, places, sha256), run, _cost(row, places))
    outcome = Outcome(row, measured=runner.run_one(task), num_tokens=num_tokens)
    warning = accuracy_warning(row, weights, outcome.measured["top1"])
    if warning:
        logger.warning("%s", warning)
    return replace(outcome, warning=warning)


def _inputs(cfg: CfgNode, row: PaperRow, places: Places, sha256: str) -> dict:
    data = str(places.data[row.data].resolve())
    return {"config": config_sha256(cfg), "weights": sha256, "data": data, "torch": torch.__version__}


def _load(cfg: CfgNode, weights: Path) -> nn.Module:
    model = build_model(cfg)
    load_weights(model, weights)
    return model.eval()


def _num_tokens(row: PaperRow, places: Places, runner: Runner, sha256: str, *, num_images: int = 256) -> int:
    """K at which the row costs what it should, on images spread evenly over the set, without a look at labels."""
    cfg = row_config(row, places)

    def run() -> dict:
        dataset, device = build_loader(cfg, "test").dataset, select_device(cfg.DEVICE)
        count = min(num_images, len(dataset))
        x = torch.stack([dataset[i * len(dataset) // count].x for i in range(count)]).to(device)
        return {"num_tokens": fit_num_tokens(_load(cfg, weights).to(device), x, row.at_gflops)}

    weights = places.weights / row.weights
    inputs = _inputs(cfg, row, places, sha256) | {"at_gflops": row.at_gflops, "images": num_images}
    return runner.run_one(Task(f"num_tokens_{_file_name(row.name)}", inputs, run, 0.0))["num_tokens"]


def accuracy_warning(row: PaperRow, weights: Path, top1: float) -> str:
    """A warning where an accuracy says that the weights may be another network's; "" where it does not."""
    if row.dense_top1 is None:
        return ""
    low = FAR if row.is_dense else FAR_WITH_ATS
    if row.dense_top1 - low <= top1 <= row.dense_top1 + FAR:
        return ""
    return (
        f"{row.name}: {top1:.2f} % top-1, but the dense network is published with {row.dense_top1} %: "
        f"{weights} may be another model, or the data another set."
    )


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name)


def kept_counts(outcome: Outcome) -> dict[int, list[int]]:
    """Block -> how many sequences kept 0, 1, 2, ... tokens."""
    return {int(block): counts for block, counts in outcome.measured["token_counts"].items()}


def sample_costs(outcome: Outcome) -> Tensor:
    """GFLOPs of each image, or clip."""
    return torch.tensor(outcome.measured["costs"])
