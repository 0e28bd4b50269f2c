"""How a block drops or merges tokens: the paper's sampling, its rivals, and whatever else is registered.

Readers of the paper: start with `inverse_transform.py`. To write a reduction: see `base.py` and docs/EXTENDING.md.
"""

from ats.reduction import inverse_transform, simple, tome, evit, ppt, pitome, merge_sample  # isort: skip  # noqa: F401  in the order of --help
from ats.reduction.base import REDUCTIONS, SCORES, Candidates, Reduction, Step, register
from ats.reduction.sampler import Sampler
from ats.reduction.simple import register_sampler

__all__ = ["REDUCTIONS", "SCORES", "Candidates", "Reduction", "Sampler", "Step", "register", "register_sampler"]
