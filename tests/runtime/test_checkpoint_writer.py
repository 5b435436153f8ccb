"""Sharded checkpoints on a disk that is full, or with a limit on file sizes."""

import gc
import re
import resource
import time

import numpy as np
import pytest

from moezoo.core.errors import RunError
from tests.support.backends_available import require_backend


def test_disk_without_room_is_one_error_and_prints_nothing(tmp_path, capfd):
    require_backend("jax")
    import jax

    from moezoo.jax_backend.distributed.checkpoint_writer import PendingFiles

    rows = np.random.default_rng(0).standard_normal((12, 64, 64)).astype(np.float32)
    arrays = {f"weights.{index}": jax.device_put(row) for index, row in enumerate(rows)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # Python ignores SIGXFSZ, so writes fail with EFBIG
    try:
        with pytest.raises(RunError, match=rf"cannot write {re.escape(str(tmp_path))}/arrays: file too large\. Free"):
            PendingFiles(tmp_path / "arrays", arrays).finish()
        time.sleep(0.2)  # tensorstore's threads report the other arrays later
        gc.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capfd.readouterr() == ("", "")
