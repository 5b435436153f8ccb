"""Where the given oracles are, if they are there."""

import os
from pathlib import Path

ORACLES = Path(os.environ.get("MOEZOO_ORACLES", Path(__file__).parents[3] / "shared" / "oracles"))
collect_ignore = [] if ORACLES.is_dir() else ["test_given_oracles.py"]
