"""The backend protocol in MLX: a built model, its steps, and its optimizer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from moezoo.core.backend import LayerRouting, Output, Scores, StepMetrics, combine_weights
from moezoo.core.checkpoint.safetensors_file import shapes_of
from moezoo.core.checkpoint.store import check_names_and_shapes
from moezoo.core.config.training import Layers, OptimizerConfig, Rematerialize
from moezoo.core.distributed.mesh import MESH_AXES, MeshConfig
from moezoo.core.distributed.processes import PendingNumbers, Processes
from moezoo.core.errors import TrainingError
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.precision import check_float32
from moezoo.core.random import Bits
from moezoo.core.reference.router_state import updated_names
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.spec import GlobalBalanceLossSpec, ModelSpec
from moezoo.core.tokens import check_targets
from moezoo.mlx_backend import BLAS, FREED_MEMORY
from moezoo.mlx_backend.arrays import Weights, exported, to_numpy
from moezoo.mlx_backend.dispatch import expert_counts, num_dropped
from moezoo.mlx_backend.distributed import data_parallel
from moezoo.mlx_backend.generation import Generation, choose, prefilled
from moezoo.mlx_backend.kernels.grouped_product import grouped_path
from moezoo.mlx_backend.kernels.x86 import FusedAdamW, can_fuse, is_x86_cpu
from moezoo.mlx_backend.kv_cache import Caches
from moezoo.mlx_backend.losses import loss_terms, token_losses
from moezoo.mlx_backend.mixture import Mixture
from moezoo.mlx_backend.router_state import updated_state
from moezoo.mlx_backend.transformer import Forward, Transformer


class MlxBackend:
    """MLX on Apple silicon, or on the CPU."""

    name = "mlx"

    def __init__(self, mesh: MeshConfig | None = None) -> None:
        """In one process, or with a part of the batch in each. A mesh that asks for nothing leaves that to them."""
        if mesh is not None and not mesh.is_one_device:
            data_parallel.check_mesh({axis: getattr(mesh, axis) for axis in MESH_AXES})

    @property
    def processes(self) -> Processes:
        return data_parallel.processes()

    def gather(self, number: int) -> PendingNumbers:
        return data_parallel.gather(number)

    def leave(self) -> None:
        self.gather(0).fetch()

    def build(self, spec: ModelSpec, weights: Mapping[str, np.ndarray]) -> "MlxModel":
        return MlxModel(spec, weights)

    def mixture(self, spec: ModelSpec, layer: int, weights: Mapping[str, np.ndarray]) -> Mixture:
        return Mixture(spec, layer, weights)

    def facts(self) -> dict[str, str]:
        device = "gpu (Metal)" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
        exponentials = "powers of 2" if is_x86_cpu() else "MLX's own"
        fused = "optimizer (mx.compile with g++)" if can_fuse() else "nothing"
        if is_x86_cpu() and not can_fuse():
            fused = "nothing (slower updates): no g++ on the PATH"
        return {
            "device": f"{device}, MLX {mx.__version__}",
            "experts": grouped_path() + ("; few rows: gather_mm" if grouped_path() == "slices" else ""),
            "blas": BLAS,
            "freed memory": FREED_MEMORY,
            "exponentials": exponentials,
            "fused": fused,
        } | data_parallel.facts()


class PendingMlxStep:
    """Numbers of a step that MLX may still be computing."""

    def __init__(self, values: Any):
        self._values = values

    def fetch(self) -> StepMetrics:
        terms, norm, load, dropped, state = self._values
        with data_parallel.lost_peer():
            return StepMetrics(
                {name: value.item() for name, value in terms.items()},
                norm.item(),
                [np.array(sizes, np.int64) for sizes in load],
                [count.item() for count in dropped],
                to_numpy(state),
            )


class MlxModel:
    """A module that holds its parameters; the canonical name of a parameter is its path in the module."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, np.ndarray]):
        table = parameter_table(spec)
        check_names_and_shapes(shapes_of(weights), {row.name: row.shape for row in table}, "the model")
        self.spec = spec
        self._module = Transformer(spec, Weights(weights))
        self._decayed = {row.name: row.decay for row in table if row.trained}
        self._state_names = [row.name for row in table if not row.trained]
        for name in self._state_names:
            path, _, leaf = name.rpartition(".")
            self._inside(path).freeze(keys=[leaf], recurse=False)
        moes = [layer.moe for layer in spec.all_layers if layer.moe is not None]
        self._balances_globally = any(isinstance(loss, GlobalBalanceLossSpec) for moe in moes for loss in moe.losses)
        self._loss_and_gradients = nn.value_and_grad(self._module, self._loss)
        mx.eval(self._module.parameters())

    # --- inference ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        tokens: np.ndarray,
        targets: np.ndarray | None = None,
        *,
        forced: Sequence[np.ndarray] | None = None,
        record: bool = False,
        key: Bits | None = None,
        inference: bool = False,
    ) -> Output:
        if targets is not None:
            check_targets(tokens, targets)
        intermediates: dict[str, mx.array] = {}
        result = self._module(
            mx.array(tokens), forced=_flat(forced), record=intermediates, key=_key(key), inference=inference
        )
        terms = {} if targets is None else self._terms(result, mx.array(targets))
        _, terms = data_parallel.averaged({}, terms)
        mx.eval(result.logits_BTV, result.routings, terms, intermediates if record else {})
        return Output(
            np.array(result.logits_BTV),
            _layer_routings(self.spec, result, tokens.shape),
            {name: value.item() for name, value in terms.items()},
            to_numpy(intermediates) if record else {},
        )

    def _terms(self, result: Forward, targets, global_load=None):
        losses = result.index_losses
        return loss_terms(
            self.spec, result.logits_BTV, targets, result.routings, index_losses=losses, global_load=global_load
        )

    def score(self, tokens: np.ndarray, targets: np.ndarray, *, inference: bool = False) -> Scores:
        own_tokens, own_targets = data_parallel.own_part(tokens), data_parallel.own_part(targets)
        result = self._module(mx.array(own_tokens), inference=inference)
        losses = token_losses(result.logits_BTV, mx.array(own_targets))
        load, dropped = _load(result)
        if len(own_tokens) < len(tokens):
            losses = data_parallel.whole_batch(losses)
            load, dropped = data_parallel.summed(load, dropped)
        with data_parallel.lost_peer():
            mx.eval(losses, load, dropped)
        return Scores(
            np.array(losses),
            [np.array(sizes, np.int64) for sizes in load],
            [count.item() for count in dropped],
        )

    def start_generation(self, prompts: Sequence[np.ndarray], new_tokens: int, options: SamplingOptions) -> Generation:
        return Generation(self.spec, self._extended, self._decoded, prompts, new_tokens, options)

    def prefill(self, tokens: np.ndarray, size: int) -> tuple[np.ndarray, Caches]:
        logits, caches = prefilled(self.spec, self._extended, list(tokens), size)
        return np.array(logits), caches

    def decode(self, tokens: np.ndarray, cache: Caches) -> tuple[np.ndarray, Caches]:
        logits, cache = self._extended(mx.array(tokens[:, None]), cache)
        mx.eval(logits, cache)
        return np.array(logits), cache

    def _extended(self, tokens: mx.array, caches: Caches) -> tuple[mx.array, Caches]:
        """Logits after the last of the tokens, and caches that hold them too."""
        result = self._module(tokens, caches=caches)
        return result.logits_BTV[:, -1], result.caches

    def _decoded(self, tokens, caches, rule, seen, draw):
        """Tokens after these, the logits that they are from, which tokens each row has, and caches."""
        logits, caches = self._extended(tokens[:, None], caches)
        return *choose(logits, rule, seen, draw), caches

    # --- training ----------------------------------------------------------------------------------------------------

    def loss_and_gradients(
        self,
        tokens: np.ndarray,
        targets: np.ndarray,
        *,
        forced: Sequence[np.ndarray] | None = None,
        key: Bits | None = None,
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        check_targets(tokens, targets)
        (_, terms, *_), gradients = self._loss_and_gradients(
            mx.array(tokens), mx.array(targets), _key(key), _flat(forced)
        )
        gradients, terms = data_parallel.averaged(gradients, terms)
        mx.eval(terms, gradients)
        return {name: value.item() for name, value in terms.items()}, to_numpy(dict(tree_flatten(gradients)))

    def _loss(self, tokens, targets, key=None, forced=None, global_load=None):
        result = self._module(tokens, forced=forced, key=key)
        terms = self._terms(result, targets, global_load)
        cutoffs = [routing.cutoff_E for routing in result.routings]
        return terms["loss"], terms, cutoffs, _load(result)

    def start_training(
        self,
        config: OptimizerConfig,
        state: Mapping[str, np.ndarray] | None = None,
        update: int = 0,
        *,
        rematerialize: Rematerialize = "none",
        layers: Layers = "unrolled",
    ) -> None:
        check_float32({name: str(value.dtype).rpartition(".")[2] for name, value in self._named().items()})
        data_parallel.check_shared(self.spec)
        self._config = config
        if rematerialize != "none":
            raise TrainingError(
                f"training.rematerialize is {rematerialize!r}, which is not realized on MLX; expected 'none'. "
                "Train on JAX, or with a smaller micro-batch (training.gradient_accumulation)."
            )
        if layers != "unrolled":
            raise TrainingError(
                f"training.layers is {layers!r}, which is not realized on MLX, where no layer is compiled; expected "
                "'unrolled'. Leave it out, or train on JAX."
            )
        self._optimizer = _adamw(config, self._decayed)
        self._optimizer.init(self._module.trainable_parameters())
        if state is not None:
            names = {"m": "first_moment", "v": "second_moment"}
            for part in self._optimizer.optimizers:
                restored = [
                    (path, mx.array(state[f"{names[path.rpartition('.')[2]]}.{path.rpartition('.')[0]}"]))
                    for path, _ in tree_flatten(part.state)
                    if path.endswith((".m", ".v"))
                ]
                moments = tree_unflatten(restored) if restored else {}
                part.state = {**part.state, **moments, "step": mx.array(update, mx.uint64)}
                part._initialized = True

    def own_sequences(self, batch: int) -> np.ndarray:
        return data_parallel.processes().share(batch)

    def train_step(self, windows: np.ndarray, learning_rate: float, keys: Bits | None = None) -> PendingMlxStep:
        for window in windows:
            check_targets(window[:, :-1], window[:, 1:])
        self._optimizer.learning_rate = learning_rate
        parts = [(mx.array(window), None if keys is None else mx.array(keys[a])) for a, window in enumerate(windows)]
        global_load = None
        if self._balances_globally and len(parts) > 1:
            # The whole step's load has no gradient, but every micro-batch's loss needs it: one more forward pass.
            global_load = _sum_over(lambda window, key: _load(self._module(window[:, :-1], key=key))[0], parts)
            (global_load,) = data_parallel.summed(global_load)

        def micro_batch(window, key):
            (_, terms, cutoffs, load), gradients = self._loss_and_gradients(
                window[:, :-1], window[:, 1:], key, global_load=global_load
            )
            return (gradients, terms, cutoffs), load

        means, (load, dropped) = _sum_over(micro_batch, parts)
        if len(parts) > 1:
            means = tree_map(lambda total: None if total is None else total / len(parts), means)
        gradients, terms, cutoffs = means
        gradients, terms = data_parallel.averaged(gradients, terms)
        load, dropped = data_parallel.summed(load, dropped)
        norm = _global_norm(gradients)
        if self._config.clip_norm is not None:
            scale = mx.minimum(1.0, self._config.clip_norm / (norm + 1e-6))
            gradients = tree_map(lambda gradient: gradient * scale, gradients)
        self._optimizer.update(self._module, gradients)
        del means, gradients  # so that their memory can be taken for what is made of them
        state = {name: self._value(name) for name in self._state_names}
        for name, value in updated_state(self.spec, state, load, cutoffs).items():
            path, _, leaf = name.rpartition(".")
            setattr(self._inside(path), leaf, value)
        values = (terms, norm, load, dropped, {name: self._value(name) for name in updated_names(self.spec)})
        with data_parallel.lost_peer():
            mx.async_eval(values, self._module.state, self._optimizer.state)
        return PendingMlxStep(values)

    def _inside(self, path: str) -> nn.Module:
        """The module at a canonical path."""
        module: Any = self._module
        for step in path.split("."):
            module = module[int(step)] if step.isdigit() else module[step]
        return module

    def _named(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self._module.parameters()))

    def _value(self, name: str) -> mx.array:
        path, _, leaf = name.rpartition(".")
        return self._inside(path)[leaf]

    def wait(self) -> None:
        mx.eval(self._module.state)
        mx.synchronize()

    # --- out ---------------------------------------------------------------------------------------------------------

    def not_finite(self) -> list[str]:
        named = self._named()
        names = [row.name for row in parameter_table(self.spec)]
        finite: list[bool] = mx.stack([mx.isfinite(named[name]).all() for name in names]).tolist()
        return [name for name, good in zip(names, finite, strict=True) if not good]

    def files_writer(self) -> None:
        return None

    def export_parameters(self) -> dict[str, np.ndarray]:
        return exported(self._named())

    def export_optimizer(self) -> dict[str, np.ndarray]:
        moments = {}
        for part in self._optimizer.optimizers:
            for path, value in tree_flatten(part.state):
                name, _, kind = path.rpartition(".")
                if kind in ("m", "v"):
                    moments[f"{'first' if kind == 'm' else 'second'}_moment.{name}"] = value
        return to_numpy(moments)


def _adamw(config: OptimizerConfig, decayed: Mapping[str, bool]) -> optimizers.MultiOptimizer:
    """AdamW with decay where the table says so. Spec: moezoo.core.reference.optimizer.adamw."""

    def part(weight_decay: float) -> optimizers.AdamW:
        # Trap: MLX leaves bias correction out unless asked.
        betas = [config.beta1, config.beta2]
        kind = FusedAdamW if can_fuse() else optimizers.AdamW
        return kind(0.0, betas, config.epsilon, weight_decay, bias_correction=True)

    return optimizers.MultiOptimizer([part(config.weight_decay), part(0.0)], [lambda name, _: decayed[name]])


def _global_norm(gradients: Any) -> mx.array:
    """Spec: moezoo.core.reference.optimizer.global_norm."""
    # Trap: one float32 sum over a large array loses digits on the CPU (4e-5 of the norm at 2.6 M parameters), so the
    # last axis is summed first.
    squares = [mx.sum(mx.sum(mx.square(gradient), axis=-1)) for _, gradient in tree_flatten(gradients)]
    return mx.sqrt(mx.sum(mx.stack(squares)))


def _flat(forced: Sequence[np.ndarray] | None) -> list[mx.array] | None:
    """Experts [B, T, K] -> [P, K]."""
    return None if forced is None else [mx.array(expert.reshape(-1, expert.shape[-1])) for expert in forced]


def _key(key: Bits | None) -> mx.array | None:
    return None if key is None else mx.array(key)


def _sum_over(micro_batch: Callable[..., Any], parts: Sequence[tuple[mx.array, mx.array | None]]) -> Any:
    """The sum of what `micro_batch(window, key)` gives for each of the parts."""
    total = micro_batch(*parts[0])
    for part in parts[1:]:
        # Trap: MLX's tree_map calls the function on None too, which stands where a router has no cutoffs.
        total = tree_map(lambda a, b: None if a is None else a + b, total, micro_batch(*part))
    return total


def _load(result: Forward) -> tuple[list[mx.array], list[mx.array]]:
    """Per MoE layer: tokens of each expert, and dropped routed copies."""
    load = [expert_counts(routing) for routing in result.routings]
    dropped = [num_dropped(*pair) for pair in zip(result.routings, result.dispatches, strict=True)]
    return load, dropped


def _layer_routings(spec: ModelSpec, result: Forward, shape: tuple[int, ...]) -> list[LayerRouting]:
    rows = []
    for layer, routing, dispatched in zip(spec.moe_layers, result.routings, result.dispatches, strict=True):
        slots = (routing.expert_PK, routing.valid_PK, dispatched.kept_PK, routing.weight_PK)
        values = (*combine_weights(*(np.array(value) for value in slots)), np.array(routing.score_PE))
        rows.append(LayerRouting(layer, *(value.reshape(*shape, -1) for value in values)))
    return rows
