"""The backend protocol in JAX: a built model, its compiled steps, and its optimizer."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moezoo.core.backend import LayerRouting, Output, Scores, StepMetrics, combine_weights
from moezoo.core.checkpoint import check_names_and_shapes
from moezoo.core.config import OptimizerConfig
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import ModelSpec
from moezoo.jax_backend.arrays import Weights, to_numpy
from moezoo.jax_backend.dispatch import num_dropped
from moezoo.jax_backend.experts import grouped_path
from moezoo.jax_backend.kv_cache import KVCache, empty_cache
from moezoo.jax_backend.losses import loss_terms, token_losses
from moezoo.jax_backend.transformer import Forward, Transformer

Parameters = dict[str, jax.Array]


class JaxBackend:
    """Flax NNX on JAX."""

    name = "jax"

    def __init__(self) -> None:
        # Trap: GPUs multiply float32 as TF32 unless told otherwise. bfloat16 products are not affected.
        jax.config.update("jax_default_matmul_precision", "highest")

    def build(self, spec: ModelSpec, weights: Mapping[str, np.ndarray]) -> "JaxModel":
        return JaxModel(spec, weights)

    def facts(self) -> dict[str, str]:
        device = jax.devices()[0]
        kind = device.device_kind if device.platform != "cpu" else "cpu"
        return {
            "device": f"{kind} ({jax.device_count()} visible), JAX {jax.__version__}",
            "experts": grouped_path(),
        }


class PendingJaxStep:
    """Numbers of a step that XLA may still be computing."""

    def __init__(self, values: Any):
        self._values = values

    def fetch(self) -> StepMetrics:
        losses, norm, load, dropped = jax.device_get(self._values)
        return StepMetrics(
            {name: float(value) for name, value in losses.items()},
            float(norm),
            [np.asarray(sizes, np.int64) for sizes in load],
            [int(count) for count in dropped],
        )


class JaxModel:
    """Parameters as a dict of canonical names; the module is put together inside each compiled function."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, np.ndarray]):
        table = parameter_table(spec)
        check_names_and_shapes(
            {name: value.shape for name, value in weights.items()},
            {row.name: row.shape for row in table},
            "the model",
        )
        self.spec = spec
        module = Transformer(spec, Weights(weights))
        graph, state = nnx.split(module, nnx.Param)
        self._merge = _merger(graph, state)
        self._parameters: Parameters = dict(_named(state))
        self._decayed = {row.name: row.decay for row in table}
        self._forward = jax.jit(self._forward_values, static_argnames="record")
        self._score = jax.jit(self._score_values)
        self._gradients = jax.jit(jax.value_and_grad(self._loss, has_aux=True))
        self._cached = jax.jit(self._cached_values, donate_argnums=2)

    # --- inference ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        tokens: np.ndarray,
        targets: np.ndarray | None = None,
        *,
        forced: Sequence[np.ndarray] | None = None,
        record: bool = False,
    ) -> Output:
        result, terms, intermediates = jax.device_get(
            self._forward(self._parameters, tokens, targets, _flat(forced), record=record)
        )
        return Output(
            result.logits_BTV,
            _layer_routings(self.spec, result, tokens.shape),
            {name: float(value) for name, value in terms.items()},
            {name: np.asarray(value, np.float32) for name, value in intermediates.items()},
        )

    def _forward_values(self, parameters, tokens, targets, forced, record):
        intermediates: dict[str, jax.Array] = {}
        result = self._merge(parameters)(tokens, forced=forced, record=intermediates)
        terms = {} if targets is None else loss_terms(self.spec, result.logits_BTV, targets, result.routings)
        return result, terms, intermediates if record else {}

    def score(self, tokens: np.ndarray, targets: np.ndarray) -> Scores:
        losses, load, dropped = jax.device_get(self._score(self._parameters, tokens, targets))
        return Scores(losses, [np.asarray(sizes, np.int64) for sizes in load], [int(count) for count in dropped])

    def _score_values(self, parameters, tokens, targets):
        result = self._merge(parameters)(tokens)
        return token_losses(result.logits_BTV, targets), *_load(self.spec, result)

    def prefill(self, tokens: np.ndarray, size: int) -> tuple[np.ndarray, list[KVCache]]:
        batch, length = tokens.shape
        bucket = 16
        while bucket < length:
            bucket *= 2
        # Sizes are rounded up too, so that prompts of like length share their compiled programs.
        caches = empty_cache(self.spec, batch, max(-(-size // 64) * 64, bucket))
        # Padding comes after the prompt: later tokens overwrite it before any query may look there.
        padded = np.pad(tokens, ((0, 0), (0, bucket - length)))
        logits, caches = self._cached(self._parameters, padded, caches, length)
        return np.asarray(logits), caches

    def decode(self, tokens: np.ndarray, cache: list[KVCache]) -> tuple[np.ndarray, list[KVCache]]:
        logits, cache = self._cached(self._parameters, tokens[:, None], cache, 1)
        return np.asarray(logits), cache

    def _cached_values(self, parameters, tokens, caches, count):
        """Logits after the `count`-th of the tokens, and caches that hold just so many more."""
        result = self._merge(parameters)(tokens, caches=caches)
        grown = [new._replace(length=old.length + count) for old, new in zip(caches, result.caches, strict=True)]
        return result.logits_BTV[:, count - 1], grown

    # --- training ----------------------------------------------------------------------------------------------------

    def loss_and_gradients(
        self, tokens: np.ndarray, targets: np.ndarray, *, forced: Sequence[np.ndarray] | None = None
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        (_, (terms, _)), gradients = self._gradients(self._parameters, tokens, targets, _flat(forced))
        return {name: float(value) for name, value in terms.items()}, to_numpy(gradients)

    def _loss(self, parameters, tokens, targets, forced=None):
        result = self._merge(parameters)(tokens, forced=forced)
        terms = loss_terms(self.spec, result.logits_BTV, targets, result.routings)
        return terms["loss"], (terms, _load(self.spec, result))

    def start_training(
        self, config: OptimizerConfig, state: Mapping[str, np.ndarray] | None = None, update: int = 0
    ) -> None:
        self._optimizer = _adamw(config, self._decayed)
        self._moments = self._optimizer(0.0).init(self._parameters)
        if state is not None:
            first = {name: jnp.asarray(state[f"first_moment.{name}"]) for name in self._parameters}
            second = {name: jnp.asarray(state[f"second_moment.{name}"]) for name in self._parameters}
            adam = optax.ScaleByAdamState(jnp.asarray(update, jnp.int32), first, second)
            self._moments = (adam, *self._moments[1:])
        self._step = jax.jit(partial(self._step_values, config), donate_argnums=(0, 1))

    def train_step(self, windows: np.ndarray, learning_rate: float) -> PendingJaxStep:
        self._parameters, self._moments, values = self._step(
            self._parameters, self._moments, windows, np.float32(learning_rate)
        )
        return PendingJaxStep(values)

    def _step_values(self, config, parameters, moments, windows, learning_rate):
        gradient_of = jax.value_and_grad(self._loss, has_aux=True)

        def micro_batch(window):
            (_, (terms, load)), gradients = gradient_of(parameters, window[:, :-1], window[:, 1:])
            return gradients, terms, load

        if windows.shape[0] == 1:
            gradients, terms, load = micro_batch(windows[0])
        else:
            shapes = jax.eval_shape(micro_batch, windows[0])
            zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

            def add(total, window):
                return (jax.tree.map(jnp.add, total, micro_batch(window)), None)

            (gradients, terms, load), _ = jax.lax.scan(add, zeros, windows)
            gradients, terms = jax.tree.map(lambda total: total / windows.shape[0], (gradients, terms))
        norm = optax.tree.norm(gradients)
        if config.clip_norm is not None:
            scale = jnp.minimum(1.0, config.clip_norm / (norm + 1e-6))
            gradients = jax.tree.map(lambda gradient: gradient * scale, gradients)
        updates, moments = self._optimizer(learning_rate).update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments, (terms, norm, *load)

    # --- out ---------------------------------------------------------------------------------------------------------

    def export_parameters(self) -> dict[str, np.ndarray]:
        return to_numpy(self._parameters)

    def export_optimizer(self) -> dict[str, np.ndarray]:
        adam = self._moments[0]
        first = {f"first_moment.{name}": value for name, value in adam.mu.items()}
        second = {f"second_moment.{name}": value for name, value in adam.nu.items()}
        return to_numpy(first | second)


def _adamw(config: OptimizerConfig, decayed: Mapping[str, bool]) -> Callable[[Any], optax.GradientTransformation]:
    """AdamW for one learning rate. Spec: moezoo.core.reference.optimizer.adamw."""
    return lambda learning_rate: optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=dict(decayed)),
        optax.scale_by_learning_rate(learning_rate),
    )


def _named(state: nnx.State) -> list[tuple[str, jax.Array]]:
    """Leaves of an NNX state with their attribute path, in the order of its tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    return [(".".join(str(key.key) for key in path), value) for path, value in leaves]


def _merger(graph: nnx.GraphDef, state: nnx.State) -> Callable[[Parameters], Transformer]:
    """A function from parameters by name to the module."""
    structure = jax.tree.structure(state)
    names = [name for name, _ in _named(state)]
    return lambda parameters: nnx.merge(graph, jax.tree.unflatten(structure, [parameters[name] for name in names]))


def _flat(forced: Sequence[np.ndarray] | None) -> list[np.ndarray] | None:
    """Experts [B, T, K] -> [P, K]."""
    return None if forced is None else [np.asarray(expert, np.int32).reshape(-1, expert.shape[-1]) for expert in forced]


def _load(spec: ModelSpec, result: Forward) -> tuple[list[jax.Array], list[jax.Array]]:
    """Per MoE layer: tokens of each expert, and dropped routed copies."""
    load = [dispatched.size_E for dispatched in result.dispatches]
    dropped = [num_dropped(*pair) for pair in zip(result.routings, result.dispatches, strict=True)]
    return load, dropped


def _layer_routings(spec: ModelSpec, result: Forward, shape: tuple[int, ...]) -> list[LayerRouting]:
    rows = []
    for layer, routing, dispatched in zip(spec.moe_layers, result.routings, result.dispatches, strict=True):
        expert_PK, score_PE = np.array(routing.expert_PK), np.array(routing.score_PE)
        weight_PK = combine_weights(expert_PK, *(np.array(values) for values in dispatched[:3]))
        rows.append(LayerRouting(layer, *(values.reshape(*shape, -1) for values in (expert_PK, weight_PK, score_PE))))
    return rows
