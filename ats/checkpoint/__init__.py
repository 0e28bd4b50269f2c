"""Weights of this and other projects: `file.py` reads and writes files, `weights.py` loads weights into a network."""

from ats.checkpoint.file import load_checkpoint, read_metadata, save_checkpoint, save_safetensors
from ats.checkpoint.weights import load_weights, to_fine_tune, unwrap

__all__ = [
    "load_checkpoint",
    "load_weights",
    "read_metadata",
    "save_checkpoint",
    "save_safetensors",
    "to_fine_tune",
    "unwrap",
]
