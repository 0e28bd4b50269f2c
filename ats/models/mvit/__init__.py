"""MViT v1 and v2 with adaptive token sampling."""

from ats.models.mvit.model import MViT, mvit_from_cfg

__all__ = ["MViT", "mvit_from_cfg"]
