"""Train and/or evaluate the network of a config: `ats/cli/run_net.py`, from a clone that need not be installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ats.cli.run_net import main

if __name__ == "__main__":
    sys.exit(main())
