"""A model in JAX: inference, training, and here exports and sharded files."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moezoo.core.checkpoint.coded_tensors import CodedTensors
from moezoo.core.checkpoint.manifest import OPTIMIZER_PREFIX, WEIGHTS_PREFIX
from moezoo.jax_backend.arrays import exported, to_numpy
from moezoo.jax_backend.distributed.checkpoint_writer import PendingFiles
from moezoo.jax_backend.inference import Parameters
from moezoo.jax_backend.quantization import QuantizedArray, quantized_weight
from moezoo.jax_backend.training import JaxTraining


class JaxModel(JaxTraining):
    """See moezoo.core.backend.Model."""

    def checkpoint_writer(self, names: Collection[str] | None = None) -> Callable[[Path], PendingFiles] | None:
        return None if self._placement is None else partial(self._write, names)

    def _write(self, names: Collection[str] | None, folder: Path) -> PendingFiles:
        parameters, state = self._held(names)
        weights = self._stacks.unstack(parameters) | state
        moments = self._moments_by_name(lambda held: held)
        arrays = {f"{WEIGHTS_PREFIX}{name}": value for name, value in weights.items() if names is None or name in names}
        return PendingFiles(folder, arrays | {f"{OPTIMIZER_PREFIX}{name}": value for name, value in moments.items()})

    def export_parameters(self, names: Collection[str] | None = None) -> Mapping[str, np.ndarray]:
        parameters, state = self._held(names)
        in_codes = {name: value for name, value in parameters.items() if isinstance(value, QuantizedArray)}
        arrays, codes = self._stacks.unstack(exported(parameters)) | exported(state), self._stacks.unstack(in_codes)
        if names is not None:
            arrays = {name: value for name, value in arrays.items() if name in names}
        return CodedTensors(arrays, codes, quantized_weight) if codes else arrays

    def _held(self, names: Collection[str] | None) -> tuple[Parameters, Parameters]:
        """Return the held arrays of parameters, and of state, that have these names in them; None: all."""
        if names is None:
            return self._parameters, self._state
        held = {self._stacks.name(name) for name in names}
        own = {name: value for name, value in self._parameters.items() if name in held}
        return own, {name: value for name, value in self._state.items() if name in names}

    def set_parameters(self, values: Mapping[str, np.ndarray]) -> None:
        before = self._parameters
        placed = {
            name: jax.device_put(np.asarray(value, before[name].dtype), before[name].sharding)
            for name, value in values.items()
        }
        self._parameters = {**before, **placed}

    def export_optimizer(self) -> dict[str, np.ndarray]:
        return self._moments_by_name(to_numpy)

    def _moments_by_name(self, taken: Callable[[Parameters], dict[str, Any]]) -> dict[str, Any]:
        return {
            f"{kind}.{name}": value
            for kind, held in self._moments.kept.items()
            for name, value in self._stacks.unstack(taken(held)).items()
        }
