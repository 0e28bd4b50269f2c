"""Adaptive Token Sampling (Fayyaz et al., ECCV 2022) for vision transformers.

    ats.patch(timm_model, blocks=range(3, 12), num_tokens=197)      # see ats/plugin/patch.py
    ats.calibrate(timm_model, images, gflops=2.9)                   # see ats/budget/calibration.py
    ats.patch(other_model, **ats.settings(timm_model))              # the same again

Importing `ats` imports nothing heavy; what is named here is loaded when it is first used.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "patch": "ats.plugin.patch",
    "unpatch": "ats.plugin.patch",
    "settings": "ats.plugin.patch",
    "save_settings": "ats.plugin.patch",
    "load": "ats.plugin.patch",
    "calibrate": "ats.budget.calibration",
    "UserError": "ats.errors",
}
__all__ = ["UserError", "__version__", "calibrate", "load", "patch", "save_settings", "settings", "unpatch"]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'ats' has no attribute {name!r}")
