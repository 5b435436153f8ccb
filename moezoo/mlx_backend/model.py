"""A model in MLX: inference, training, and here exports."""

from collections.abc import Mapping

import numpy as np

from moezoo.core.checkpoint.coded_tensors import CodedTensors
from moezoo.mlx_backend.arrays import exported, to_numpy
from moezoo.mlx_backend.quantization import quantized_weight
from moezoo.mlx_backend.training import MlxTraining


class MlxModel(MlxTraining):
    """See moezoo.core.backend.Model."""

    def checkpoint_writer(self) -> None:
        return None

    def export_parameters(self) -> Mapping[str, np.ndarray]:
        arrays, codes = exported(self._named()), self._codes()
        return CodedTensors(arrays, codes, quantized_weight) if codes else arrays

    def export_optimizer(self) -> dict[str, np.ndarray]:
        return to_numpy(self._optimizer.named_state())
