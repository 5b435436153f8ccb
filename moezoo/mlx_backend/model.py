"""A model in MLX: inference, training, and here exports."""

from collections.abc import Collection, Mapping

import mlx.core as mx
import numpy as np

from moezoo.core.checkpoint.coded_tensors import CodedTensors
from moezoo.mlx_backend.arrays import exported, to_numpy
from moezoo.mlx_backend.quantization import quantized_weight
from moezoo.mlx_backend.training import MlxTraining


class MlxModel(MlxTraining):
    """See moezoo.core.backend.Model."""

    def checkpoint_writer(self, names: Collection[str] | None = None) -> None:
        return None

    def export_parameters(self, names: Collection[str] | None = None) -> Mapping[str, np.ndarray]:
        own, codes = self._named(), self._codes()
        names = {*own, *codes} if names is None else names
        arrays = exported({name: value for name, value in own.items() if name in names})
        codes = {name: value for name, value in codes.items() if name in names}
        return CodedTensors(arrays, codes, quantized_weight) if codes else arrays

    def set_parameters(self, values: Mapping[str, np.ndarray]) -> None:
        for name, value in values.items():
            module, leaf = self._place(name)
            setattr(module, leaf, mx.array(value).astype(self._value(name).dtype))
        mx.eval(self._module.parameters())

    def export_optimizer(self) -> dict[str, np.ndarray]:
        return to_numpy(self._optimizer.named_state())
