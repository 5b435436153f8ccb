"""Setting of Python's garbage collector."""

import gc

from moezoo.core.garbage import collect_seldom


def test_cycles_are_still_collected_but_seldom():
    before = gc.get_threshold()
    try:
        gc.set_threshold(700, *before[1:])  # conftest.py has set it too
        collect_seldom()
        assert gc.isenabled()
        assert gc.get_threshold() == (50_000, *before[1:])
    finally:
        gc.set_threshold(*before)
