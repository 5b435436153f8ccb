"""Models that together have every feature of the zoo: those that the gate compiles on JAX.

Compiling is most of the time of the tests, and a model of two unlike layers compiles as fast as one of two that are
alike. So nearly all are combinations, which are written for this, of what the tiny configs show one by one. A
contract test holds the set against the zoo's own list of features.
"""

from pathlib import Path

TINY = sorted((Path(__file__).parents[2] / "configs" / "tiny").glob("*.yaml"))
COMBINATIONS = sorted((Path(__file__).parents[1] / "data" / "combinations").glob("*.yaml"))
ALONE = ("bfloat16_router", "pooled_indexer", "separate_streams")
COVERING = [*COMBINATIONS, *(path for path in TINY if path.stem in ALONE)]
