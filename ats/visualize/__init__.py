"""Pictures of what a network keeps: figures, animations, and a page to click through.

grids.py       where tokens lie in the picture; what each ATS block scored and kept
compare.py     a network with ATS beside the dense one
inputs.py      image and video files as network inputs
pictures.py    pictures as tensors; figures.py writes them to files
page.py        a validation run as one HTML page
"""

from ats.visualize.figures import animate, draw_kept_tokens, draw_strip
from ats.visualize.grids import BlockView, look
from ats.visualize.pictures import as_pictures, blend, draw, draw_fixed_images, fade, heat

__all__ = [
    "BlockView",
    "animate",
    "as_pictures",
    "blend",
    "draw",
    "draw_fixed_images",
    "draw_kept_tokens",
    "draw_strip",
]
__all__ += ["fade", "heat", "look"]
