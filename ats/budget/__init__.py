"""K for a budget: `calibrate` for users, `nearest` for comparisons at equal cost; one search for both."""

from ats.budget.calibration import Calibration, calibrate, nearest, to_stages

__all__ = ["Calibration", "calibrate", "nearest", "to_stages"]
