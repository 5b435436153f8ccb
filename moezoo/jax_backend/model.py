"""A model in JAX: inference, training, and here exports and sharded files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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

    def checkpoint_writer(self) -> Callable[[Path], PendingFiles] | None:
        return None if self._placement is None else self._write

    def _write(self, folder: Path) -> PendingFiles:
        weights = self._stacks.unstack(self._parameters) | self._state
        moments = self._moments_by_name(lambda held: held)
        arrays = {f"{WEIGHTS_PREFIX}{name}": value for name, value in weights.items()}
        return PendingFiles(folder, arrays | {f"{OPTIMIZER_PREFIX}{name}": value for name, value in moments.items()})

    def export_parameters(self) -> Mapping[str, np.ndarray]:
        named = self._stacks.unstack(self._parameters) | self._state
        codes = {name: value for name, value in named.items() if isinstance(value, QuantizedArray)}
        arrays = self._stacks.unstack(exported(self._parameters)) | exported(self._state)
        return CodedTensors(arrays, codes, quantized_weight) if codes else arrays

    def export_optimizer(self) -> dict[str, np.ndarray]:
        return self._moments_by_name(to_numpy)

    def _moments_by_name(self, taken: Callable[[Parameters], dict[str, Any]]) -> dict[str, Any]:
        return {
            f"{kind}.{name}": value
            for kind, held in self._moments.kept.items()
            for name, value in self._stacks.unstack(taken(held)).items()
        }
