"""Write docs/LEGACY_KEYS.md: what the keys of older releases become here.

    python tools/legacy_keys.py

Every row is what `ats/config/legacy.py` does with the key; a test checks that the file is up to date.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone that is not installed

from ats.config import legacy
from ats.config.keys import keys

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "LEGACY_KEYS.md"
HEAD = """# Keys of older releases

What becomes of the keys in the YAML file of an older release? Files of the official ATS code, SlowFast's MViT, X-ViT,
TimeSformer, CvT and PS-ViT load as they are. The log says which keys were renamed and which have no effect. A
key that is not on this page keeps its name and meaning, or is an error that suggests the nearest key.

`python tools/legacy_keys.py` writes this page from `ats/config/legacy.py`; a test compares the two.
"""
# The keys of the official release's one config, DeiT_S.yaml, in its order.
OFFICIAL = (
    "TRAIN.ENABLE", "TEST.ENABLE", "TEST.DATASET", "TEST.BATCH_SIZE", "TEST.CHECKPOINT_FILE_PATH",
    "TEST.NUM_ENSEMBLE_VIEWS", "TEST.NUM_SPATIAL_CROPS", "DATA.PATH_TO_DATA_DIR", "DATA.TEST_CROP_SIZE",
    "DATA.TRAIN_CROP_SIZE", "VIT.IMG_SIZE", "VIT.PATCH_SIZE", "VIT.IN_CHANNELS", "VIT.NUM_CLASSES", "VIT.EMBED_DIM",
    "VIT.DEPTH", "VIT.NUM_HEADS", "VIT.QK_SCALE", "VIT.REPRESENTATION_SIZE", "VIT.HYBRID_BACKBONE", "VIT.NORM_LAYER",
    "VIT.ATS_BLOCKS", "VIT.NUM_TOKENS", "VIT.DROP_TOKENS", "NUM_GPUS",
)  # fmt: skip
# A value for each key that does not accept just any value.
EXAMPLES = {
    "VIT.ATS_BLOCKS": [3],
    "MODEL.LOSS_FUNC": "smooth_cross_entropy",
    "MODEL.MODEL_NAME": "XVIT",
    "TEST.INTERPOLATION": 3,
    "model": "ps_vit_b_18",
}
# Keys that kept their names but not all of their meaning.
NOTES = {
    "TEST.CHECKPOINT_FILE_PATH": "the same, but a training run evaluates its own weights; SlowFast evaluates this file"
}


def becomes(key: str) -> str:
    """The keys that replace a renamed one."""
    pairs = legacy.translate_key(key, EXAMPLES.get(key, 1))
    return ", ".join(f"`{new}`" for new, _ in pairs)


def cell(key: str) -> str:
    """What becomes of a key of the official release."""
    if key in legacy.RENAMED:
        return becomes(key)
    if key in legacy.FIXED:
        return f"only `{legacy.FIXED[key]}`"
    if key in legacy.IGNORED:
        return f"no effect: {legacy.IGNORED[key]}"
    if key not in keys():
        raise ValueError(f"{key} is neither a key nor translated")
    return NOTES.get(key, "the same")


def table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    """Markdown of two columns; the first holds code."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| `{key}` | {text} |" for key, text in rows)]
    return "\n".join(lines) + "\n"


def render() -> str:
    """The whole file."""
    logging.disable(logging.WARNING)  # messages to the user
    try:
        official = [(key, cell(key)) for key in OFFICIAL]
        renamed = {key: becomes(key) for key in legacy.RENAMED}
    finally:
        logging.disable(logging.NOTSET)
    many = {key: text for key, text in renamed.items() if text.count(", ") > 3}
    renamed |= {key: f"{text.count(', ') + 1} keys, see below" for key, text in many.items()}
    parts = [
        HEAD,
        '## The official ATS release, key by key\n\n"Only" means that any other value is an error.\n',
        table(("its `DeiT_S.yaml`", "here"), official),
        "## Renamed, in any release\n",
        table(("there", "here"), list(renamed.items())),
        "\n".join(f"`{key}` sets {text}.\n" for key, text in many.items()),
        "## Names of networks\n",
        table(("`MODEL.NAME` or `MODEL.MODEL_NAME` there", "`MODEL.NAME` here"), list(legacy.NETWORKS.items())),
        f"PS-ViT's `model` takes {', '.join(f'`{name}`' for name in legacy.PSVIT_NETWORKS)}.\n",
        "## One value only\n\nThese keys take one value; any other is an error.\n",
        table(("key", "value"), [(key, f"`{value}`") for key, value in legacy.FIXED.items()]),
        "## Without effect\n\nReading one logs a warning. `*` matches anything; VALUE stands for the value.\n",
        table(("key", "why"), list(legacy.IGNORED.items())),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(render())
    print(f"wrote {TARGET.relative_to(ROOT)}")
