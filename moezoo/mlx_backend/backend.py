"""The backend protocol in MLX."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from moezoo.core.distributed.mesh import MESH_AXES, Devices, MeshAxis, MeshConfig
from moezoo.core.distributed.processes import PendingNumbers, Processes
from moezoo.core.spec import ModelSpec
from moezoo.mlx_backend import BLAS, FREED_MEMORY
from moezoo.mlx_backend.distributed import data_parallel
from moezoo.mlx_backend.kernels.chosen_experts import FEW_TOKENS
from moezoo.mlx_backend.kernels.codes import in_codes
from moezoo.mlx_backend.kernels.grouped_product import grouped_path
from moezoo.mlx_backend.kernels.x86 import kernels
from moezoo.mlx_backend.kernels.x86.token import token_path
from moezoo.mlx_backend.model import MlxModel
from moezoo.mlx_backend.moe_layer import MoELayer


class MlxBackend:
    """MLX on Apple silicon, or on the CPU."""

    name = "mlx"

    def __init__(self, mesh: MeshConfig | None = None, *, for_training: bool = True) -> None:
        """In one process, or with a part of the batch in each. A mesh that asks for nothing leaves that to them.

        `for_training` changes nothing here: MLX computes in the same way in both cases.
        """
        self._in_codes = ""
        if mesh is not None and not mesh.is_one_device:
            data_parallel.check_mesh({axis: getattr(mesh, axis) for axis in MESH_AXES})

    @property
    def processes(self) -> Processes:
        return data_parallel.processes()

    def devices(self) -> Devices:
        # Metal shares the memory of the host; only a CUDA device has its own, and tells how much of it is free.
        free = mx.device_info().get("free_memory")
        lengths: dict[MeshAxis, int] = {axis: self.processes.count if axis == "data" else 1 for axis in MESH_AXES}
        return Devices(lengths, 1, None if free is None else int(free))

    def gather(self, number: int) -> PendingNumbers:
        return data_parallel.gather(number)

    def leave(self) -> None:
        self.gather(0).fetch()

    def build(self, spec: ModelSpec, weights: Mapping[str, np.ndarray]) -> MlxModel:
        model = MlxModel(spec, weights)
        self._in_codes = in_codes(model._module)
        return model

    def moe_layer(self, spec: ModelSpec, layer: int, weights: Mapping[str, np.ndarray]) -> MoELayer:
        return MoELayer(spec, layer, weights)

    def facts(self) -> dict[str, str]:
        device = "gpu (Metal)" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
        return {
            "device": f"{device}, MLX {mx.__version__}",  # type: ignore[attr-defined]  # not in its stub
            "experts": grouped_path(),
            "few tokens": FEW_TOKENS,
            "decoding": token_path(),
            "blas": BLAS,
            "freed memory": FREED_MEMORY,
            "kernels": kernels(),
            **({"codes": self._in_codes} if self._in_codes else {}),
        } | data_parallel.facts()
