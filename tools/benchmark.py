"""GFLOPs and speed of ATS against dense: `ats/cli/benchmark.py`, from a clone that need not be installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ats.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
