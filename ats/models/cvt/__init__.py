"""CvT with adaptive token sampling."""

from ats.models.cvt.model import CvT, cvt_from_cfg

__all__ = ["CvT", "cvt_from_cfg"]
