"""Arrays into files while training goes on, by each process the parts on its devices. Only here: MLX has no parts.

Orbax copies them from the devices, and writes in the background. What reads them is core/sharded_tensors.py.
"""

from collections.abc import Mapping
from pathlib import Path

import jax

from moezoo.core.errors import RunError


class PendingFiles:
    """Arrays by name that are on their way into a new folder. All processes of the group make one, and wait."""

    def __init__(self, folder: Path, arrays: Mapping[str, jax.Array]):
        """Returns when the arrays may change again."""
        import orbax.checkpoint as ocp

        self._folder = folder
        # Trap: Zarr's second version, which is Orbax's own choice, has no bfloat16 that others read.
        self._writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))
        try:
            self._writer.save(folder.resolve(), args=ocp.args.PyTreeSave(dict(arrays)))
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def finish(self) -> None:
        """Return when all processes have written theirs. Raises RunError where one could not."""
        try:
            self._writer.wait_until_finished()
        except Exception as error:  # Orbax raises what its own thread met
            raise self._failed(error) from error
        finally:
            self._writer.close()

    def _failed(self, error: Exception) -> RunError:
        return RunError(f"cannot write {self._folder}: {' '.join(str(error).split())[:300]}. Free the place.")
