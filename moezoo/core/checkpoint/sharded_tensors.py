"""Reading of sharded tensors written by Orbax, whole or in slices, without JAX.

jax_backend/distributed/checkpoint_writer.py writes them as Zarr arrays whose chunks are stored in an OCDBT database;
each process writes the shards of its devices. The files are verified with the checkpoint's manifest before they are
read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.checkpoint.safetensors_file import LazyTensors
from moezoo.core.errors import CheckpointError
from moezoo.core.extras import check_installed

Array = npt.NDArray[Any]
Index = tuple[slice, ...]


class ShardedTensors(LazyTensors):
    """Lazily read sharded tensors whose stored names begin with `prefix`; names here are without it.

    Raises CheckpointError if the files are not Orbax's format or cannot be read.

    Fields:
        dtypes: dtype by name, known without reading.
    """

    def __init__(self, folder: Path, prefix: str):
        check_installed("tensorstore", purpose=f"the sharded checkpoint {folder}")
        import tensorstore

        self._folder = folder
        database = {"driver": "ocdbt", "base": f"file://{folder.resolve()}/"}
        try:
            store = tensorstore.KvStore.open(database).result()
            keys = [key.decode("utf-8") for key in store.list().result()]
            names = [key.removesuffix("/zarr.json") for key in keys if key.endswith("/zarr.json")]
            opened = {
                name.removeprefix(prefix): tensorstore.open(
                    {"driver": "zarr3", "kvstore": {**database, "path": f"{name}/"}}, open=True, read=True
                )
                for name in names
                if name.startswith(prefix)
            }
            self._arrays = {name: array.result() for name, array in opened.items()}
        except (ValueError, OSError) as error:
            raise self._unreadable(error) from None
        super().__init__({name: tuple(array.shape) for name, array in self._arrays.items()})
        self.dtypes = {name: np.dtype(array.dtype.numpy_dtype) for name, array in self._arrays.items()}

    def __getitem__(self, name: str) -> Array:
        return self.reader(name)(tuple(slice(None) for _ in self.shapes[name]))

    def reader(self, name: str) -> Callable[[Index], Array]:
        """Return a function that reads a slice of an array, and no other part of it."""
        stored = self._arrays[name]

        def read(part: Index) -> Array:
            try:
                found: Array = stored[part].read().result()
            except (ValueError, OSError) as error:
                raise self._unreadable(error) from None
            return found

        return read

    def _unreadable(self, error: Exception) -> CheckpointError:
        reason = " ".join(str(error).split())[:300]
        return CheckpointError(f"cannot read {self._folder}: {reason}. Use another checkpoint.")
