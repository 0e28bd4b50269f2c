"""Pictures of what a network keeps: over images and clips, as figures, animations and a page to click through.

grids.py       where tokens lie in the picture, what each ATS block scored and kept
compare.py     a network with ATS beside the dense one
pictures.py    pictures as tensors; figures.py and animation.py: as files
report.py      a validation run as one HTML page
"""

from ats.visualize.animation import animate, animate_kept_tokens
from ats.visualize.figures import draw_kept_over_time, draw_kept_tokens, draw_strip
from ats.visualize.grids import BlockView, look
from ats.visualize.pictures import FADED, draw_fixed_images, fade, heat, kept_patches_clips, kept_patches_image

__all__ = [
    "FADED",
    "BlockView",
    "animate",
    "animate_kept_tokens",
    "draw_fixed_images",
    "draw_kept_over_time",
    "draw_kept_tokens",
    "draw_strip",
    "fade",
    "heat",
    "kept_patches_clips",
    "kept_patches_image",
    "look",
]
