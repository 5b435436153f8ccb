import platform
import subprocess
import sys

import pytest

PAGE_FAULTS_OF_SECOND_ARRAY = """
import resource, sys
import numpy as np
from moezoo.core.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory() == "kept in the process (mallopt)"
np.ones(2**24, np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**24, np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_is_reused_without_page_faults():
    """An array of 64 MiB has 16,384 pages, or 32 huge pages."""

    def faults(mode: str) -> int:
        command = [sys.executable, "-c", PAGE_FAULTS_OF_SECOND_ARRAY, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < 16 <= faults("default")
