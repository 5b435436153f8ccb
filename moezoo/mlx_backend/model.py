"""A model in MLX: inference, training, and here exports."""

from collections.abc import Mapping

import numpy as np

from moezoo.core.checkpoint.coded_tensors import CodedTensors
from moezoo.mlx_backend.arrays import canonical_name, exported, to_numpy
from moezoo.mlx_backend.quantization import quantized_weight
from moezoo.mlx_backend.runtime.typed import flatten
from moezoo.mlx_backend.training import MlxTraining


class MlxModel(MlxTraining):
    """See moezoo.core.backend.Model."""

    def checkpoint_writer(self) -> None:
        return None

    def export_parameters(self) -> Mapping[str, np.ndarray]:
        arrays, codes = exported(self._named()), self._codes()
        return CodedTensors(arrays, codes, quantized_weight) if codes else arrays

    def export_optimizer(self) -> dict[str, np.ndarray]:
        moments = {}
        for part in self._optimizer.optimizers:
            for path, value in flatten(part.state):
                own, _, kind = path.rpartition(".")
                if kind in ("m", "v"):
                    moments[f"{'first' if kind == 'm' else 'second'}_moment.{canonical_name(own)}"] = value
        return to_numpy(moments)
