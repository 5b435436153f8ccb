import platform
import subprocess
import sys

import pytest

FAULTS_OF_A_SECOND_ARRAY = """
import resource, sys
import numpy as np
from moezoo.core.freed_memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory() == "kept in the process (mallopt)"
np.ones(2**24, np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**24, np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems' allocators are left as they are")
def test_memory_that_was_freed_is_not_taken_from_the_kernel_again():
    """64 MiB are 16,384 pages, or 32 large ones."""

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS_OF_A_SECOND_ARRAY, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < 16 <= faults("as it is")
