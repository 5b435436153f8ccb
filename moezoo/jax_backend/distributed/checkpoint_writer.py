"""Asynchronous sharded checkpoints: each process writes the shards of its own devices. JAX only: MLX has no shards.

Orbax copies arrays from the devices, then writes in the background. moezoo.core.checkpoint.sharded_tensors reads them.
"""

from collections.abc import Mapping
from pathlib import Path

import jax

from moezoo.core.errors import RunError


class PendingFiles:
    """Pending write of named arrays to a new folder. Every process of the group creates one and calls `finish`."""

    def __init__(self, folder: Path, arrays: Mapping[str, jax.Array]):
        """Start writing; return once the arrays are copied and may be modified or donated."""
        import orbax.checkpoint as ocp

        self._folder = folder
        # Trap: Zarr version 2, Orbax's default, has no bfloat16 that other libraries can read.
        self._writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))
        try:
            self._writer.save(folder.resolve(), args=ocp.args.PyTreeSave(dict(arrays)))
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def finish(self) -> None:
        """Wait until all processes have written their shards. Raises RunError: a process could not write."""
        try:
            self._writer.wait_until_finished()
        except Exception as error:  # Orbax re-raises any error of its background thread
            raise self._failed(error) from error
        finally:
            self._writer.close()

    def _failed(self, error: Exception) -> RunError:
        return RunError(f"cannot write {self._folder}: {' '.join(str(error).split())[:300]}. Free disk space.")
