"""tools/perf/cpu_kernels.py: every kernel of a block is timed, and what auto chooses is shown."""

from __future__ import annotations

import cpu_kernels
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_row_for_every_layer_and_the_choice(capsys):
    """For one image and for eight: four linear layers, the first of the MLP with GELU, attention."""
    small = ["VIT.EMBED_DIM", "48", "VIT.NUM_HEADS", "3", "VIT.IMG_SIZE", "64", "DATA.TEST_CROP_SIZE", "64"]
    assert cpu_kernels.main(["--rounds", "1", *small]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()[2:]]
    names = [line[0] for line in lines if line[0].startswith(("attn", "mlp", "attention"))]
    assert names == 2 * ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc1 + GELU", "mlp.fc2", "attention"]
    assert sum(line[0].startswith("auto: linear") for line in lines) >= 1
