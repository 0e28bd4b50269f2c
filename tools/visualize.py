"""Look at images, clips or a validation run: `ats/cli/visualize.py`, from a clone that need not be installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ats.cli.visualize import main

if __name__ == "__main__":
    sys.exit(main())
