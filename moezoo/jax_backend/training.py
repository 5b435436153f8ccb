"""Training in JAX: loss and gradients, the compiled step, and its optimizer's state."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from moezoo.core.backend import StepMetrics
from moezoo.core.config.optimizers import OptimizerConfig
from moezoo.core.config.training import Layers, Rematerialize
from moezoo.core.config.update_rules import UpdateRule, state_axes, update_rules
from moezoo.core.layer_routing import check_forced
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.precision import check_float32
from moezoo.core.parameters.trained import router_trains
from moezoo.core.quantization.weight import check_no_codes
from moezoo.core.random import Bits
from moezoo.core.reference.router_state import updated_names
from moezoo.core.spec import GlobalBalanceLossSpec, ModelSpec
from moezoo.core.tokens import IGNORED, check_documents, check_targets
from moezoo.jax_backend.arrays import Weights, to_numpy
from moezoo.jax_backend.distributed.sharding import Placement, shard, with_axes
from moezoo.jax_backend.inference import JaxInference, Parameters, flatten_forced, routing_load
from moezoo.jax_backend.optimizer import clip, global_norm, make_optimizer
from moezoo.jax_backend.positions import packed_documents
from moezoo.jax_backend.router_state import updated_state
from moezoo.jax_backend.runtime.in_flight import launched
from moezoo.jax_backend.runtime.processes import lost_peer, on_host, processes
from moezoo.jax_backend.runtime.step_batch import StepBatch, step_batch
from moezoo.jax_backend.transformer import Transformer
from moezoo.jax_backend.transforms.rematerialization import compiler_options
from moezoo.jax_backend.transforms.scanned_layers import GradientMeans, ScannedTransformer, Stacks, equal_layers


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


class JaxTraining(JaxInference):
    """A model that is trained; the optimizer's state is on the device, as its parameters are."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, np.ndarray], placement: Placement | None = None):
        super().__init__(spec, weights, placement)
        self._rows = {row.name: row for row in parameter_table(spec) if row.trained}
        self._trained: Collection[str] = self._rows.keys()
        self._balances_globally = any(
            isinstance(loss, GlobalBalanceLossSpec) for _, moe in spec.moes for loss in moe.losses
        )
        self._rematerialize: Rematerialize = "none"
        self._scanned = False
        self._gradients = jax.jit(jax.value_and_grad(self._loss, has_aux=True))

    def loss_and_gradients(
        self,
        tokens: np.ndarray,
        targets: np.ndarray,
        *,
        forced: Sequence[np.ndarray] | None = None,
        key: Bits | None = None,
        trained: Collection[str] | None = None,
        documents: np.ndarray | None = None,
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        check_targets(tokens, targets)
        check_documents(tokens, targets, documents)
        check_forced(self.spec, tokens, forced)
        parts = self._split_trained(trained)
        with self._traced(len(tokens)):
            (_, (terms, *_)), gradients = self._gradients(
                *parts, self._state, tokens, targets, documents, None if forced is None else list(forced), key
            )
        return {name: float(value) for name, value in terms.items()}, self._stacks.unstack(to_numpy(gradients))

    def _loss(
        self,
        trained: Parameters,
        frozen: Parameters,
        state: Parameters,
        tokens: jax.Array,
        targets: jax.Array,
        documents: jax.Array | None = None,
        forced: Sequence[jax.Array] | None = None,
        key: jax.Array | None = None,
        **of_step: Any,
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], list[jax.Array | None], tuple[list[jax.Array], list[jax.Array]]]]:
        """Return the loss; and every loss term, cutoffs, and loads and drops. `of_step`: see `_terms`."""
        module, how = self._transformed({**frozen, **trained}, state, tokens, self._rematerialize)
        forced = flatten_forced(forced)
        result = module(tokens, forced=forced, key=key, document_BT=documents, **how._asdict())
        terms = self._terms(result, targets, documents=packed_documents(documents), **of_step)
        cutoffs = [routing.cutoff_E for routing in result.routings]
        return terms["loss"], (terms, cutoffs, routing_load(result))

    def start_training(
        self,
        config: OptimizerConfig,
        state: Mapping[str, np.ndarray] | None = None,
        update: int = 0,
        *,
        rematerialize: Rematerialize = "none",
        layers: Layers = "unrolled",
        trained: Collection[str] | None = None,
    ) -> None:
        rules = update_rules(config, (row for name, row in self._rows.items() if trained is None or name in trained))
        self._trained, self._router_trains = rules.keys(), router_trains(self.spec, rules)
        self._rematerialize = rematerialize
        own, _ = self._split_trained(self._trained)
        check_float32({name: value.dtype.name for name, value in (own | self._state).items()})
        self._stack_layers(layers)
        own, _ = self._split_trained(self._trained)
        held = self._stacks.rules(rules)
        self._optimizer, outputs = make_optimizer(held), None
        moments = jax.eval_shape(self._optimizer.init, own)
        kept_shardings: dict[str, dict[str, NamedSharding]] = {}
        if self._placement is not None:
            shardings = {name: self._stacks.shardings[name] for name in own}
            kept_shardings, replicated = _of_state(held, shardings), self._placement.replicated
            outputs = (shardings, replicated, moments._replace(updates=replicated, kept=kept_shardings), replicated)
        given = None
        if state is not None:
            kept = self._restored(state, rules, kept_shardings)
            given = moments._replace(updates=self._replicated(update), kept=kept)
        owned, self._moments = self._owned(self._optimizer.init, own, given, None if outputs is None else outputs[::2])
        self._parameters = {**self._parameters, **owned}
        self._step = jax.jit(
            partial(self._step_values, config),
            donate_argnums=(0, 3),
            out_shardings=outputs,
            compiler_options=compiler_options(rematerialize=self._rematerialize != "none" and not self._scanned),
        )

    def own_sequences(self, batch: int) -> np.ndarray:
        return np.arange(batch) if self._placement is None else self._placement.own_sequences(batch)

    def train_step(
        self,
        windows: np.ndarray,
        learning_rate: float,
        keys: Bits | None = None,
        targets: np.ndarray | None = None,
        documents: np.ndarray | None = None,
        forced: Sequence[np.ndarray] | None = None,
    ) -> PendingJaxStep:
        batch = step_batch(windows, targets, documents, forced)
        check_targets(batch.tokens, batch.targets, whole=processes().count == 1)
        check_documents(batch.tokens, batch.targets, documents)
        check_forced(self.spec, batch.tokens, forced)
        if self._placement is not None:
            batch = jax.tree.map(self._placement.of_all_processes, batch)
        with self._traced(batch.tokens.shape[1]), lost_peer():
            updated, self._state, self._moments, values = self._step(*self._step_inputs(batch, learning_rate, keys))
        self._parameters = {**self._parameters, **updated}
        launched(values)
        return PendingJaxStep(values)

    def _step_inputs(self, batch: Any, learning_rate: float, keys: Any) -> tuple[Any, ...]:
        """Return what `_step_values` takes after the config."""
        rate = np.float32(learning_rate)
        return *self._split_trained(self._trained), self._state, self._moments, batch, rate, keys

    def _step_values(
        self,
        config: OptimizerConfig,
        trained: Parameters,
        frozen: Parameters,
        state: Parameters,
        moments: Any,
        batch: StepBatch,
        learning_rate: jax.Array,
        keys: jax.Array | None,
    ) -> tuple[Parameters, Parameters, Any, Any]:
        """One update. Returns trained parameters, state and moments after it, and the values of a PendingJaxStep."""
        running, num_parts = None, len(batch.tokens)
        if self._scanned and num_parts > 1:
            running = GradientMeans(trained, num_parts, self._stacks.shardings)
        gradient_of = (
            jax.value_and_grad(self._loss, has_aux=True) if running is None else running.accumulate(self._loss)
        )
        of_step: dict[str, Any] = {}
        if num_parts > 1:
            of_step["num_targets"] = jnp.sum(batch.targets != IGNORED) / num_parts
        if self._balances_globally and num_parts > 1:
            # The whole step's load has no gradient, but every micro-batch's loss needs it: one more forward pass.
            of_step["global_load"] = _sum_over(partial(self._loads, {**frozen, **trained}, state), batch, keys)

        def micro_batch(part: StepBatch, key: jax.Array | None) -> Any:
            (_, (terms, cutoffs, load)), gradients = gradient_of(trained, frozen, state, *part, key, **of_step)
            return (gradients, terms, cutoffs), load

        means, load = _sum_over(micro_batch, batch, keys)
        if num_parts > 1:
            means = jax.tree.map(lambda total: total / num_parts, means)
        if running is not None:
            means = (running.means(), *means[1:])
        gradients, terms, cutoffs = means
        if self._placement is not None:
            gradients = jax.lax.with_sharding_constraint(
                gradients, {name: self._stacks.shardings[name] for name in gradients}
            )
        norm = global_norm(gradients)
        gradients = clip(config, gradients, norm)
        updated, moments = self._optimizer.update(trained, gradients, moments, learning_rate)
        if self._router_trains:
            state = updated_state(self.spec, state, load[0], cutoffs)
        reported = {name: state[name] for name in updated_names(self.spec)}
        return updated, state, moments, (terms, norm, *load, reported)

    def _loads(
        self, parameters: Parameters, state: Parameters, part: StepBatch, key: jax.Array | None
    ) -> list[jax.Array]:
        """Return, per MoE layer, how many tokens chose each expert."""
        module, how = self._transformed(parameters, state, part.tokens)
        given = {"forced": flatten_forced(part.forced), "document_BT": part.documents}
        return routing_load(module(part.tokens, key=key, **given, **how._asdict()))[0]

    def _split_trained(self, names: Collection[str] | None) -> tuple[Parameters, Parameters]:
        """Return the held arrays of the parameters of these names, and those of the others. None: all are trained.

        Raises TrainingError: a parameter that is trained is in codes.
        """
        names = self._rows.keys() if names is None else names
        check_no_codes([name for name in self._codes if name in names])
        held = {self._stacks.name(name) for name in names}
        own = {name: value for name, value in self._parameters.items() if name in held}
        others = {name: value for name, value in self._parameters.items() if name not in held}
        return own, others

    # --- the optimizer's state ---------------------------------------------------------------------------------------

    def _owned(
        self, init: Callable[[Parameters], Any], own: Parameters, given: Any, shardings: Any
    ) -> tuple[Parameters, Any]:
        """Return trained parameters, and the given moments or new ones, in memory that a step can update in place.

        Trap: JAX shares the memory of NumPy arrays that are aligned by chance, one in four. The first step would copy
        those beside its temporary arrays, which may then not be able to use the same memory in the next one.
        """

        def held(parameters: Parameters, moments: Any) -> tuple[Parameters, Any]:
            return parameters, init(parameters) if moments is None else moments

        owned: tuple[Parameters, Any] = jax.jit(held, donate_argnums=(0, 1), out_shardings=shardings)(own, given)
        return owned

    def _restored(
        self,
        state: Mapping[str, np.ndarray],
        rules: Mapping[str, UpdateRule],
        shardings: Mapping[str, Mapping[str, NamedSharding]],
    ) -> dict[str, Parameters]:
        """Put what the optimizer keeps of each parameter on the parameter's devices, stacked as it is held."""

        def read(kind: str, axes: Mapping[str, tuple[int, ...]], name: str) -> jax.Array:
            if self._placement is None:
                return jnp.asarray(state[f"{kind}.{name}"])
            return shard(state, f"{kind}.{name}", with_axes(self._placement.parameters[name], axes[name]))

        num_axes = {name: len(row.shape) for name, row in self._rows.items()}
        return {
            kind: self._stacks.stack(axes, partial(read, kind, axes), shardings.get(kind))
            for kind, axes in state_axes(rules, num_axes).items()
        }

    def _replicated(self, count: int) -> jax.Array:
        value = np.asarray(count, np.int32)
        return jnp.asarray(value) if self._placement is None else shard({"": value}, "", self._placement.replicated)

    def _stack_layers(self, layers: Layers) -> None:
        """Stack the arrays of equal layers if they are to be scanned, so that no step copies them."""
        if self._scanned == (layers == "scanned"):
            return
        runs = () if self._scanned else equal_layers(self.spec, self._parameters | self._state)
        stacks = Stacks(self.spec, runs, self._placement)
        own = self._stacks.unstack(self._parameters)
        self._parameters.clear()  # so that each array goes when it has been taken out of `own`
        self._stacks, self._scanned = stacks, not self._scanned
        values = stacks.stack(list(own), own.pop) | stacks.stack(self._state, self._state.__getitem__)
        made = partial(ScannedTransformer, runs=runs) if self._scanned else Transformer
        self._parameters, _ = self._split(made(self.spec, Weights(values)))


def _sum_over(micro_batch: Callable[..., Any], batch: StepBatch, keys: jax.Array | None) -> Any:
    """Sum `micro_batch(part, key)` over the parts of a batch. It is compiled once."""
    first: tuple[StepBatch, jax.Array | None] = jax.tree.map(lambda values: values[0], (batch, keys))
    if len(batch.tokens) == 1:
        return micro_batch(*first)
    shapes = jax.eval_shape(micro_batch, *first)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, micro_batch(*part)), None

    return jax.lax.scan(add, zeros, (batch, keys))[0]


def _of_state(
    rules: Mapping[str, UpdateRule], shardings: Mapping[str, NamedSharding]
) -> dict[str, dict[str, NamedSharding]]:
    """Return the shardings of the optimizer's state, as its parameter's each."""
    axes = state_axes(rules, {name: len(sharding.spec) for name, sharding in shardings.items()})
    return {
        kind: {name: with_axes(shardings[name], those) for name, those in own.items()} for kind, own in axes.items()
    }
