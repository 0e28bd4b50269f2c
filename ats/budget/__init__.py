"""K for a budget: `calibrate` for users, `nearest` for comparisons at equal cost; one search for both."""

from ats.budget.calibration import Calibration, as_stages, calibrate, nearest

__all__ = ["Calibration", "as_stages", "calibrate", "nearest"]
