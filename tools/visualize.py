"""Look at what a network keeps: images, clips, or a whole validation run as one page. See `--help`.

python tools/visualize.py --cfg configs/Digits/DeiT_ATS.yaml data/digits/val/7 -o output/look
python tools/visualize.py --cfg configs/Digits/DeiT_ATS.yaml --report output/digits.html
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone that is not installed

from ats.cli.visualize import main

if __name__ == "__main__":
    sys.exit(main())
