"""The backend protocol in JAX."""

from collections.abc import Mapping

import jax
import numpy as np

from moezoo.core.distributed.mesh import Devices, MeshConfig, in_words, sizes
from moezoo.core.distributed.process_group import ProcessGroup
from moezoo.core.distributed.processes import PendingNumbers, Processes
from moezoo.core.spec import ModelSpec
from moezoo.jax_backend.distributed.sharding import Placement
from moezoo.jax_backend.kernels.attention import attention_path
from moezoo.jax_backend.kernels.grouped_product import path_in_words
from moezoo.jax_backend.kernels.projection import in_codes
from moezoo.jax_backend.model import JaxModel
from moezoo.jax_backend.moe_layer import MoELayer
from moezoo.jax_backend.runtime import processes
from moezoo.jax_backend.runtime.compile_cache import use_compile_cache
from moezoo.jax_backend.runtime.memory import reuse_memory
from moezoo.jax_backend.runtime.platform import start_devices


class JaxBackend:
    """Flax NNX on JAX."""

    name = "jax"

    def __init__(
        self, mesh: MeshConfig | None = None, group: ProcessGroup | None = None, *, for_training: bool = True
    ) -> None:
        """On the first device, or on a mesh of all of them, which may be those of several processes."""
        self._freed_memory = reuse_memory(for_training=for_training)
        if group is not None:
            processes.join(group)
        start_devices()
        self._mesh = mesh or MeshConfig()
        self._in_codes = ""
        # Trap: GPUs multiply float32 as TF32 unless told otherwise. bfloat16 products are not affected.
        jax.config.update("jax_default_matmul_precision", "highest")
        self._compile_cache = use_compile_cache()

    @property
    def processes(self) -> Processes:
        return processes.processes()

    def devices(self) -> Devices:
        count, local = (1, 1) if self._is_alone else (jax.device_count(), jax.local_device_count())
        statistics = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
        free = None if not statistics else statistics["bytes_limit"] - statistics["bytes_in_use"]
        return Devices(sizes(self._mesh, count), local, free)

    def gather(self, number: int) -> PendingNumbers:
        return processes.gather(number)

    def leave(self) -> None:
        processes.leave()

    def build(self, spec: ModelSpec, weights: Mapping[str, np.ndarray]) -> JaxModel:
        model = JaxModel(spec, weights, None if self._is_alone else Placement(spec, self._mesh))
        self._in_codes = in_codes(model._parameters)
        return model

    @property
    def _is_alone(self) -> bool:
        """True for one device, the first one, in a single process."""
        return self._mesh.is_one_device and self.processes.count == 1

    def moe_layer(self, spec: ModelSpec, layer: int, weights: Mapping[str, np.ndarray]) -> MoELayer:
        return MoELayer(spec, layer, weights)

    def facts(self) -> dict[str, str]:
        device = jax.devices()[0]
        kind = device.device_kind if device.platform != "cpu" else "cpu"
        facts = {
            "device": f"{kind} ({jax.device_count()} visible), JAX {jax.__version__}",
            "experts": path_in_words(),
            "attention": attention_path(),
            "compile cache": self._compile_cache,
            **({"codes": self._in_codes} if self._in_codes else {}),
        }
        if not self._mesh.is_one_device:
            resolved = self._mesh.model_copy(
                update={str(axis): size for axis, size in sizes(self._mesh, jax.device_count()).items()}
            )
            facts["mesh"] = f"{in_words(resolved)}; tokens to experts: {self._mesh.exchange}"
            facts["checkpoints"] = "Orbax, each process its parts, in the background"
        if jax.default_backend() == "cpu":
            one_each = self._mesh.is_one_device or jax.local_device_count() == 1
            facts["freed memory"] = self._freed_memory if one_each else "returned to the system: a thread per device"
        return facts | processes.facts()
