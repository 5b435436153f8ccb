"""The backend protocol in JAX: a built model, its compiled steps, and its optimizer."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moezoo.core.backend import LayerRouting, Output, Scores, StepMetrics, combine_weights
from moezoo.core.checkpoint.manifest import OPTIMIZER_PREFIX, WEIGHTS_PREFIX
from moezoo.core.checkpoint.safetensors_file import shapes_of
from moezoo.core.checkpoint.store import check_names_and_shapes
from moezoo.core.config.training import Layers, OptimizerConfig, Rematerialize
from moezoo.core.distributed.mesh import MeshConfig, in_words, sizes
from moezoo.core.distributed.process_group import ProcessGroup
from moezoo.core.distributed.processes import PendingNumbers, Processes
from moezoo.core.generation.prefill import widths
from moezoo.core.malloc import keep_freed_memory
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.precision import check_float32
from moezoo.core.random import Bits
from moezoo.core.reference.router_state import updated_names
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.spec import GlobalBalanceLossSpec, ModelSpec
from moezoo.core.tokens import check_targets
from moezoo.jax_backend.arrays import Weights, exported, to_numpy
from moezoo.jax_backend.dispatch import expert_counts, num_dropped
from moezoo.jax_backend.distributed.checkpoint_writer import PendingFiles
from moezoo.jax_backend.distributed.expert_parallel import ExpertParallel
from moezoo.jax_backend.distributed.sharding import Placement, gather_outside_layers, shard
from moezoo.jax_backend.generation import SMALLEST, Generation, choose, drawn, prefilled
from moezoo.jax_backend.kernels.grouped_product import grouped_path
from moezoo.jax_backend.kv_cache import Caches
from moezoo.jax_backend.losses import loss_terms, token_losses
from moezoo.jax_backend.mixture import Mixture
from moezoo.jax_backend.router_state import updated_state
from moezoo.jax_backend.runtime import processes
from moezoo.jax_backend.runtime.compile_cache import use_compile_cache
from moezoo.jax_backend.runtime.processes import lost_peer, on_host
from moezoo.jax_backend.transformer import Forward, Transformer
from moezoo.jax_backend.transforms.rematerialization import Transforms, compiler_options, transforms
from moezoo.jax_backend.transforms.scanned_layers import GradientMeans, ScannedTransformer, Stacks, equal_layers

Parameters = dict[str, jax.Array]


class JaxBackend:
    """Flax NNX on JAX."""

    name = "jax"

    def __init__(self, mesh: MeshConfig | None = None, group: ProcessGroup | None = None) -> None:
        """On the first device, or on a mesh of all of them, which may be those of several processes."""
        if group is not None:
            processes.join(group)
        self._mesh = mesh or MeshConfig()
        # Trap: GPUs multiply float32 as TF32 unless told otherwise. bfloat16 products are not affected.
        jax.config.update("jax_default_matmul_precision", "highest")
        self._freed_memory = keep_freed_memory() if jax.default_backend() == "cpu" else None
        self._compile_cache = use_compile_cache()

    @property
    def processes(self) -> Processes:
        return processes.processes()

    def gather(self, number: int) -> PendingNumbers:
        return processes.gather(number)

    def leave(self) -> None:
        processes.leave()

    def build(self, spec: ModelSpec, weights: Mapping[str, np.ndarray]) -> "JaxModel":
        alone = self._mesh.is_one_device and self.processes.count == 1
        return JaxModel(spec, weights, None if alone else Placement(spec, self._mesh))

    def mixture(self, spec: ModelSpec, layer: int, weights: Mapping[str, np.ndarray]) -> Mixture:
        return Mixture(spec, layer, weights)

    def facts(self) -> dict[str, str]:
        device = jax.devices()[0]
        kind = device.device_kind if device.platform != "cpu" else "cpu"
        facts = {
            "device": f"{kind} ({jax.device_count()} visible), JAX {jax.__version__}",
            "experts": grouped_path() + ("; few rows: the chosen ones alone" if grouped_path() == "blocks" else ""),
            "compile cache": self._compile_cache,
        }
        if not self._mesh.is_one_device:
            resolved = self._mesh.model_copy(update=sizes(self._mesh, jax.device_count()))
            facts["mesh"] = f"{in_words(resolved)}; tokens to experts: {self._mesh.exchange}"
            facts["checkpoints"] = "Orbax, each process its parts, in the background"
        facts |= processes.facts()
        return facts if self._freed_memory is None else facts | {"freed memory": self._freed_memory}


class PendingJaxStep:
    """Numbers of a step that XLA may still be computing."""

    def __init__(self, values: Any):
        self._values = values

    def fetch(self) -> StepMetrics:
        losses, norm, load, dropped, state = on_host(self._values)
        return StepMetrics(
            {name: float(value) for name, value in losses.items()},
            float(norm),
            [np.asarray(sizes, np.int64) for sizes in load],
            [int(count) for count in dropped],
            state,
        )


class JaxModel:
    """Parameters as a dict of canonical names; the module is put together inside each compiled function."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, np.ndarray], placement: Placement | None = None):
        """On the devices of a placement, else on the first one."""
        table = parameter_table(spec)
        check_names_and_shapes(shapes_of(weights), {row.name: row.shape for row in table}, "the model")
        self.spec = spec
        self._placement = placement
        self._exchange = None if placement is None else ExpertParallel(placement)
        self._stacks = Stacks(spec, placement=placement)
        placed = weights if placement is None else placement.shard(weights)
        self._parameters, self._state = self._taken_apart(Transformer(spec, Weights(placed)))
        self._decayed = {row.name: row.decay for row in table if row.trained}
        moes = [layer.moe for layer in spec.all_layers if layer.moe is not None]
        self._balances_globally = any(isinstance(loss, GlobalBalanceLossSpec) for moe in moes for loss in moe.losses)
        self._rematerialize: Rematerialize = "none"
        self._scanned = False
        self._forward = jax.jit(self._forward_values, static_argnames=("record", "inference"))
        self._score = jax.jit(self._score_values, static_argnames=("count", "inference"))
        self._gradients = jax.jit(jax.value_and_grad(self._loss, has_aux=True))
        self._extend = jax.jit(self._extend_values, donate_argnums=3)
        self._decode = jax.jit(self._decode_values, donate_argnums=(3, 5))
        self._finite = jax.jit(self._finite_values, out_shardings=None if placement is None else placement.replicated)

    def _taken_apart(self, module: Transformer) -> tuple[Parameters, Parameters]:
        """Parameters and state of a module by name; from now on, `_merge` puts together such a one."""
        graph, parameters, state = nnx.split(module, nnx.Param, ...)
        self._merged = _merger(graph, parameters, state)
        return dict(_named(parameters)), dict(_named(state))

    def _merge(self, parameters: Parameters, state: Parameters) -> Transformer:
        return self._merged(parameters, self._stacks.held(state, state.__getitem__))

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
        inputs = (self._parameters, self._state, tokens, targets, _flat(forced), key)
        with self._traced(len(tokens)):
            result, terms, intermediates = on_host(self._forward(*inputs, record=record, inference=inference))
        return Output(
            result.logits_BTV,
            _layer_routings(self.spec, result, tokens.shape),
            {name: float(value) for name, value in terms.items()},
            {name: np.asarray(value, np.float32) for name, value in intermediates.items()},
        )

    def _forward_values(self, parameters, state, tokens, targets, forced, key, *, record, inference):
        intermediates: dict[str, jax.Array] = {}
        module, exchange = self._merge(parameters, state), None if self._sharded(tokens) is None else self._exchange
        result = module(tokens, forced=forced, record=intermediates, key=key, inference=inference, exchange=exchange)
        terms = {} if targets is None else self._terms(result, targets)
        return result._replace(index_losses=[]), terms, intermediates if record else {}

    def _terms(self, result: Forward, targets, global_load=None):
        losses = result.index_losses
        return loss_terms(
            self.spec, result.logits_BTV, targets, result.routings, index_losses=losses, global_load=global_load
        )

    def score(self, tokens: np.ndarray, targets: np.ndarray, *, inference: bool = False) -> Scores:
        count = len(tokens)
        if self._placement is not None:
            filled = self._placement.padded_batch(count)
            tokens, targets = (np.resize(rows, (filled, rows.shape[1])) for rows in (tokens, targets))  # the same again
        with self._traced(len(tokens)):
            values = self._score(self._parameters, self._state, tokens, targets, count=count, inference=inference)
        losses, load, dropped = on_host(values)
        loads = [np.asarray(sizes, np.int64) for sizes in load]
        return Scores(losses[:count], loads, [int(number) for number in dropped])

    def _score_values(self, parameters, state, tokens, targets, *, count, inference):
        """Of the first `count` sequences; those after them fill up a mesh, and their losses are not looked at."""
        module, how = self._transformed(parameters, state, tokens)
        result = module(tokens, inference=inference, **how._asdict())
        if count < len(tokens):
            counted_P = jnp.arange(tokens.size) < count * tokens.shape[1]
            routings = [own._replace(valid_PK=own.valid_PK & counted_P[:, None]) for own in result.routings]
            result = result._replace(routings=routings)
        return token_losses(result.logits_BTV, targets), *_load(result)

    def start_generation(self, prompts: Sequence[np.ndarray], new_tokens: int, options: SamplingOptions) -> Generation:
        weights = (self._parameters, self._state)
        return Generation(
            self.spec, partial(self._extend, *weights), partial(self._decode, *weights), prompts, new_tokens, options
        )

    def prefill(self, tokens: np.ndarray, size: int) -> tuple[np.ndarray, Caches]:
        # Places before the prompt are padding, and sizes are rounded up: prompts of like length share their programs.
        size = sum(widths(tokens.shape[1], SMALLEST)) - tokens.shape[1] + -(-size // 64) * 64
        extend = partial(self._extend, self._parameters, self._state)
        logits, caches = prefilled(self.spec, extend, list(tokens), size)
        return np.asarray(logits), caches

    def decode(self, tokens: np.ndarray, cache: Caches) -> tuple[np.ndarray, Caches]:
        logits, cache = self._extend(self._parameters, self._state, tokens[:, None], cache)
        return np.asarray(logits), cache

    def _extend_values(self, parameters, state, tokens, caches):
        """Logits after the last of the tokens, and caches that hold them too."""
        result = self._merge(parameters, state)(tokens, caches=caches)
        return result.logits_BTV[:, -1], result.caches

    def _decode_values(self, parameters, state, tokens, caches, rule, seen):
        """Tokens after these, the logits that they are from, which tokens each row has, and caches."""
        logits, caches = self._extend_values(parameters, state, tokens[:, None], caches)
        position = caches.places - caches.first_B
        return *choose(logits, rule, seen, drawn(rule, position)), caches

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
        with self._traced(len(tokens)):
            (_, (terms, *_)), gradients = self._gradients(
                self._parameters, self._state, tokens, targets, key, _flat(forced)
            )
        return {name: float(value) for name, value in terms.items()}, self._stacks.cut(to_numpy(gradients))

    def _loss(self, parameters, state, tokens, targets, key=None, forced=None, global_load=None):
        module, how = self._transformed(parameters, state, tokens, self._rematerialize)
        result = module(tokens, forced=forced, key=key, **how._asdict())
        terms = self._terms(result, targets, global_load)
        cutoffs = [routing.cutoff_E for routing in result.routings]
        return terms["loss"], (terms, cutoffs, _load(result))

    def start_training(
        self,
        config: OptimizerConfig,
        state: Mapping[str, np.ndarray] | None = None,
        update: int = 0,
        *,
        rematerialize: Rematerialize = "none",
        layers: Layers = "unrolled",
    ) -> None:
        check_float32({name: value.dtype.name for name, value in (self._parameters | self._state).items()})
        self._rematerialize = rematerialize
        self._hold(layers)
        self._optimizer = _adamw(config, {self._stacks.name(name): decay for name, decay in self._decayed.items()})
        init, outputs = self._optimizer(0.0).init, None
        adam, *rest = jax.eval_shape(init, self._parameters)
        if self._placement is not None:
            shardings = {name: self._stacks.shardings[name] for name in self._parameters}
            replicated = self._placement.replicated
            moments = (adam._replace(count=replicated, mu=shardings, nu=shardings), *rest)
            outputs = (shardings, replicated, moments, replicated)
        if state is None:
            self._moments = self._new_moments(init, None if outputs is None else outputs[2])
        else:
            first, second = (
                self._stacks.held(
                    self._decayed, lambda name, moment=moment: self._placed(name, state, f"{moment}.{name}")
                )
                for moment in ("first_moment", "second_moment")
            )
            self._moments = (optax.ScaleByAdamState(self._everywhere(update), first, second), *rest)
        self._step = jax.jit(
            partial(self._step_values, config),
            donate_argnums=(0, 2),
            out_shardings=outputs,
            compiler_options=compiler_options(rematerialize=self._rematerialize != "none" and not self._scanned),
        )

    def _new_moments(self, init: Callable[[Parameters], Any], shardings: Any) -> Any:
        return jax.jit(init, out_shardings=shardings)(self._parameters)

    def _hold(self, layers: Layers) -> None:
        """Hold arrays of equal layers as one if they are to be scanned, so that no step copies them."""
        if self._scanned == (layers == "scanned"):
            return
        stacks = Stacks(self.spec, () if self._scanned else equal_layers(self.spec), self._placement)
        own = self._stacks.cut(self._parameters)
        self._parameters.clear()  # so that each array goes when it has been taken out of `own`
        self._stacks, self._scanned = stacks, not self._scanned
        values = stacks.held(list(own), own.pop) | stacks.held(self._state, self._state.__getitem__)
        made = ScannedTransformer if self._scanned else Transformer
        self._parameters, _ = self._taken_apart(made(self.spec, Weights(values)))

    def own_sequences(self, batch: int) -> np.ndarray:
        return np.arange(batch) if self._placement is None else self._placement.own_sequences(batch)

    def train_step(self, windows: np.ndarray, learning_rate: float, keys: Bits | None = None) -> PendingJaxStep:
        for window in windows:
            check_targets(window[:, :-1], window[:, 1:])
        given = windows if self._placement is None else self._placement.of_all_processes(windows)
        with self._traced(given.shape[1]), lost_peer():
            self._parameters, self._state, self._moments, values = self._step(
                self._parameters, self._state, self._moments, given, np.float32(learning_rate), keys
            )
        return PendingJaxStep(values)

    def _step_values(self, config, parameters, state, moments, windows, learning_rate, keys):
        running = None
        if self._scanned and windows.shape[0] > 1:
            running = GradientMeans(parameters, windows.shape[0], self._stacks.shardings)
        gradient_of = jax.value_and_grad(self._loss, has_aux=True) if running is None else running.adding(self._loss)
        global_load = None
        if self._balances_globally and windows.shape[0] > 1:
            # The whole step's load has no gradient, but every micro-batch's loss needs it: one more forward pass.
            global_load = _sum_over(partial(self._counts, parameters, state), windows, keys)

        def micro_batch(window, key):
            (_, (terms, cutoffs, load)), gradients = gradient_of(
                parameters, state, window[:, :-1], window[:, 1:], key, global_load=global_load
            )
            return (gradients, terms, cutoffs), load

        means, load = _sum_over(micro_batch, windows, keys)
        if windows.shape[0] > 1:
            means = jax.tree.map(lambda total: total / windows.shape[0], means)
        if running is not None:
            means = (running.taken(), *means[1:])
        gradients, terms, cutoffs = means
        if self._placement is not None:
            gradients = jax.lax.with_sharding_constraint(
                gradients, {name: self._stacks.shardings[name] for name in gradients}
            )
        norm = optax.tree.norm(gradients)
        if config.clip_norm is not None:
            scale = jnp.minimum(1.0, config.clip_norm / (norm + 1e-6))
            gradients = jax.tree.map(lambda gradient: gradient * scale, gradients)
        updates, moments = self._optimizer(learning_rate).update(gradients, moments, parameters)
        state = updated_state(self.spec, state, load[0], cutoffs)
        reported = {name: state[name] for name in updated_names(self.spec)}
        return optax.apply_updates(parameters, updates), state, moments, (terms, norm, *load, reported)

    def _counts(self, parameters, state, window, key):
        """Per MoE layer, how many tokens chose each expert."""
        tokens = window[:, :-1]
        module, how = self._transformed(parameters, state, tokens)
        return _load(module(tokens, key=key, **how._asdict()))[0]

    def _sharded(self, tokens: jax.Array) -> Placement | None:
        """The placement over which a batch is sharded; None for a batch that cannot be sharded equally."""
        return self._placement if self._placement is not None and self._placement.divides(len(tokens)) else None

    def _transformed(
        self, parameters: Parameters, state: Parameters, tokens: jax.Array, rematerialize: Rematerialize = "none"
    ) -> tuple[Transformer, Transforms]:
        """The module and its transforms for a batch: all-gather, expert parallelism, recomputation."""
        placement = self._sharded(tokens)
        if placement is None:
            return self._merge(parameters, state), transforms(rematerialize, None, None)
        module = self._merge(gather_outside_layers(parameters, placement), state)
        return module, transforms(rematerialize, placement, self._exchange)

    def _traced(self, num_sequences: int) -> AbstractContextManager[None]:
        """What is computed of so many sequences is divided as the placement says, if there is one."""
        return nullcontext() if self._placement is None else self._placement.active(num_sequences)

    def _placed(self, name: str, state: Mapping[str, np.ndarray], own: str) -> jax.Array:
        """The array `own` of a state, of a number for each of a parameter's, where they are."""
        if self._placement is None:
            return jnp.asarray(state[own])
        return shard(state, own, self._placement.parameters[name])

    def _everywhere(self, count: int) -> jax.Array:
        value = np.asarray(count, np.int32)
        return jnp.asarray(value) if self._placement is None else shard({"": value}, "", self._placement.replicated)

    def wait(self) -> None:
        jax.block_until_ready((self._parameters, self._state))

    # --- out ---------------------------------------------------------------------------------------------------------

    def not_finite(self) -> list[str]:
        finite = on_host(self._finite(self._parameters, self._state))
        return [row.name for row in parameter_table(self.spec) if not finite[row.name]]

    def _finite_values(self, parameters, state):
        named = self._stacks.cut(parameters) | state
        return {name: jnp.all(jnp.isfinite(value)) for name, value in named.items()}

    def files_writer(self) -> Callable[[Path], PendingFiles] | None:
        return None if self._placement is None else self._write

    def _write(self, folder: Path) -> PendingFiles:
        weights = self._stacks.cut(self._parameters) | self._state
        moments = self._moments_by_name(lambda held: held)
        arrays = {f"{WEIGHTS_PREFIX}{name}": value for name, value in weights.items()}
        return PendingFiles(folder, arrays | {f"{OPTIMIZER_PREFIX}{name}": value for name, value in moments.items()})

    def export_parameters(self) -> dict[str, np.ndarray]:
        return self._stacks.cut(exported(self._parameters)) | exported(self._state)

    def export_optimizer(self) -> dict[str, np.ndarray]:
        return self._moments_by_name(to_numpy)

    def _moments_by_name(self, taken: Callable[[Parameters], dict[str, Any]]) -> dict[str, Any]:
        adam = self._moments[0]
        return {
            f"{moment}.{name}": value
            for moment, held in (("first_moment", adam.mu), ("second_moment", adam.nu))
            for name, value in self._stacks.cut(taken(held)).items()
        }


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


def _merger(graph: nnx.GraphDef, *states: nnx.State) -> Callable[..., Transformer]:
    """A function from values by name, one dict for each of the states, to the module."""
    parts = [(jax.tree.structure(state), [name for name, _ in _named(state)]) for state in states]

    def merge(*values: Parameters) -> Transformer:
        pairs = zip(parts, values, strict=True)
        return nnx.merge(
            graph, *(jax.tree.unflatten(shape, [own[name] for name in names]) for (shape, names), own in pairs)
        )

    return merge


def _sum_over(micro_batch: Callable[..., Any], windows: jax.Array, keys: jax.Array | None) -> Any:
    """The sum of what `micro_batch(window, key)` gives for each of the windows, which are compiled once."""
    first_key = None if keys is None else keys[0]
    if windows.shape[0] == 1:
        return micro_batch(windows[0], first_key)
    shapes = jax.eval_shape(micro_batch, windows[0], first_key)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, micro_batch(*part)), None

    return jax.lax.scan(add, zeros, (windows, keys))[0]


def _flat(forced: Sequence[np.ndarray] | None) -> list[np.ndarray] | None:
    """Experts [B, T, K] -> [P, K]."""
    return None if forced is None else [np.asarray(expert, np.int32).reshape(-1, expert.shape[-1]) for expert in forced]


def _load(result: Forward) -> tuple[list[jax.Array], list[jax.Array]]:
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
