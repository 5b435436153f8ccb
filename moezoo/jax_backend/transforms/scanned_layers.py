"""Runs of equal layers, compiled once and scanned. Only on JAX: MLX compiles no layer, and refuses `layers: scanned`.

Spec: moezoo.core.config.training.TrainingConfig.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding

from moezoo.core.config.update_rules import UpdateRule
from moezoo.core.errors import SpecError
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import BlockAttentionResidualSpec, GroupedQueryAttentionSpec, LayerSpec, ModelSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.distributed.sharding import Placement, stacked
from moezoo.jax_backend.layer import Layer, LayerOutput, ResidualState, StepInputs
from moezoo.jax_backend.residual import Streams
from moezoo.jax_backend.transformer import Transformer


def equal_layers(spec: ModelSpec, parameters: Mapping[str, Any]) -> list[range]:
    """Return all layers in order, in runs of layers with equal specs, and parameters in equal shapes, dtypes and codes.

    A run of its own is each layer that passes something to a certain other one (keys to attend to, values to mix in, an
    MoE's output for the next layer), the layer that such an output is added in, and each layer that begins a sum of
    attention over depth: after it there is one sum more to read. Raises SpecError where every run would be one layer.
    """
    layers = spec.all_layers
    alone = set(spec.shared_layers)
    if isinstance(spec.residual, BlockAttentionResidualSpec):
        alone |= {index for index in range(len(layers)) if spec.residual.begins(2 * index)}
    for index, layer in enumerate(layers):
        if layer.shortcut:
            alone |= {index, index + 1}
        if isinstance(layer.attention, GroupedQueryAttentionSpec) and layer.attention.value_residual:
            alone.add(0)
    forms: list[list[Any]] = [[] for _ in layers]
    for row in parameter_table(spec):
        of_layer, own = _parts(row.name)
        if of_layer is not None:
            leaves, form = jax.tree.flatten(parameters.get(row.name))
            forms[of_layer].append((own, row.shape, form, [(leaf.shape, leaf.dtype) for leaf in leaves]))
    runs: list[range] = []
    for index, layer in enumerate(layers):
        before = index - 1
        equal = index > 0 and _once(layer) == _once(layers[before]) and forms[index] == forms[before]
        if equal and not alone & {before, index}:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    if len(runs) == len(layers):
        raise SpecError(
            f"training.layers is 'scanned', but no two of {len(layers)} layers can share their code; expected equal "
            "layers one after the other, none of which passes keys, values or an MoE's output to a certain later one "
            "or begins a sum of residual: block_attention. Use training.layers: unrolled."
        )
    return runs


class Stacks:
    """Arrays of a run's layers are held as one, with an axis L in front: `layers.2-29.moe.experts.w_gate` [L, E, D, F].

    So are those of codes, in a QuantizedArray that is otherwise that of one layer.

    Without runs, every array is held as it is. On a mesh, `shardings` are those of the held arrays; else it is empty.
    """

    def __init__(self, spec: ModelSpec, runs: Sequence[range] = (), placement: Placement | None = None):
        run_of = {index: run for run in runs if len(run) > 1 for index in run}
        self._places: dict[str, _Place] = {}
        for name in (row.name for row in parameter_table(spec)):
            index, own = _parts(name)
            if index is None or index not in run_of:
                self._places[name] = _Place(name)
            else:
                self._places[name] = _Place(_held(run_of[index], own), index - run_of[index].start)
        self.shardings = {
            place.name: own if place.row is None else stacked(own)
            for name, own in ({} if placement is None else placement.parameters).items()
            for place in (self._places[name],)
        }

    def name(self, name: str) -> str:
        """Return the name of the held array that has a parameter."""
        return self._places[name].name

    def rules(self, rules: Mapping[str, UpdateRule]) -> dict[str, UpdateRule]:
        """Return the rule of each held array, from those of the parameters: the layers of a run are equal."""
        return {
            place.name: rules[name] if place.row is None else rules[name].stacked()
            for name, place in self._places.items()
            if name in rules
        }

    def stack(
        self,
        names: Iterable[str],
        read: Callable[[str], Any],
        shardings: Mapping[str, NamedSharding] | None = None,
    ) -> dict[str, Any]:
        """Stack the layers' own arrays as they are held; `read` returns each by its name, one after the other.

        `shardings`: of the held arrays; None: those of the parameters.
        """
        shardings = self.shardings if shardings is None else shardings
        members: dict[str, list[str]] = {}
        for name in names:
            members.setdefault(self._places[name].name, []).append(name)
        return {
            held: read(held)
            if self._places[own[0]].row is None
            else _stacked([read(name) for name in own], shardings.get(held))
            for held, own in members.items()
        }

    def unstack(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return each layer's own arrays, from those that are held: of NumPy's, views."""
        return {
            name: values[place.name] if place.row is None else _row(values[place.name], place.row)
            for name, place in self._places.items()
            if place.name in values
        }


class ScannedTransformer(Transformer):
    """A Transformer in which a run of layers is one layer, with the arrays of all.

    With caches or recorded intermediates, the layers run unrolled: each slices its own arrays.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, runs: Sequence[range]):
        self.runs = tuple(runs)
        super().__init__(spec, weights)

    def _made_layers(self, weights: Weights) -> nnx.Dict[Any]:
        layers = self.spec.all_layers
        return nnx.Dict(
            {
                _name(run): Layer(layers[run.start], self.spec, weights.inside(_held(run)), run.start)
                for run in self.runs
            }
        )

    def _layer_at(self, index: int) -> Layer:
        run = next(run for run in self.runs if index in run)
        layer: Layer = self.layers[_name(run)]
        if len(run) == 1:
            return layer
        graph, state = nnx.split(layer)
        own: Layer = nnx.merge(graph, _row(state, index - run.start))
        return own

    def _run_layers(
        self, state: ResidualState, inputs: StepInputs, inputs_BTLZ: jax.Array | None
    ) -> tuple[ResidualState, list[LayerOutput]]:
        if inputs.caches is not None or inputs.record is not None:
            return super()._run_layers(state, inputs, inputs_BTLZ)
        sources: dict[int, Any] = {}
        outputs: list[LayerOutput] = []
        for run in self.runs:
            first = run.start
            inputs_LBTZ = None if inputs_BTLZ is None else jnp.moveaxis(inputs_BTLZ[:, :, first : run.stop], 2, 0)
            if len(run) > 1:
                state, found = self._scan_run(run, state, inputs, inputs_LBTZ, sources)
                outputs += found
                continue
            input_BTZ = None if inputs_LBTZ is None else inputs_LBTZ[0]
            state, output = self._layer_at(first)(state, inputs, first, input_BTZ, sources)
            sources[first] = output.source
            outputs.append(output)
        return state, outputs

    def _scan_run(
        self,
        run: range,
        state: ResidualState,
        inputs: StepInputs,
        inputs_LBTZ: jax.Array | None,
        sources: Mapping[int, Any],
    ) -> tuple[ResidualState, list[LayerOutput]]:
        """Scan the layers of a run. State that is passed to other layers than the next stays as it came."""
        graph, stacked_state = nnx.split(self.layers[_name(run)])
        chained = _reads_previous(self.spec.all_layers[run.start])

        def one_layer(carried: tuple[Streams, jax.Array | None, jax.Array | None], own: Any) -> Any:
            streams, previous_PE, previous_PZ = carried
            own_state, index, input_BTZ, context = own
            layer = nnx.merge(graph, own_state)
            entering = state._replace(streams=streams, previous_PE=previous_PE, previous_PZ=previous_PZ)
            own_inputs = inputs._replace(given={} if context is None else {run.start: context})
            leaving, output = layer(entering, own_inputs, index, input_BTZ, sources)
            output = output._replace(source=None)  # ignored: a layer that others attend to stays alone
            return (leaving.streams, *((leaving.previous_PE, leaving.previous_PZ) if chained else (None, None))), output

        indices = jnp.arange(run.start, run.stop)
        contexts = [inputs.given[index] for index in run if index in inputs.given]
        context = jax.tree.map(lambda *own: jnp.stack(own), *contexts) if contexts else None
        each = (stacked_state, indices, inputs_LBTZ, context)
        entering = (state.previous_PE, state.previous_PZ) if chained else (None, None)
        (streams, *_), stacked_outputs = lax.scan(one_layer, (state.streams, *entering), each)
        outputs = _each(stacked_outputs, len(run))
        routing = outputs[-1].routing
        if routing is not None:
            state = state._replace(previous_PE=routing.logits_PE, previous_PZ=routing.state_PZ)
        return state._replace(streams=streams), outputs


class GradientMeans:
    """Mean gradients over a step's micro-batches, to which each layer adds its own in the backward pass.

    So only one layer's gradients exist beside the means; as outputs of the scan, those of all layers would.
    """

    def __init__(self, parameters: Mapping[str, jax.Array], num_parts: int, shardings: Mapping[str, NamedSharding]):
        """`shardings`: those of the parameters on a mesh; else empty."""
        self._num_parts = num_parts
        zeros = {name: jnp.zeros_like(value, device=shardings.get(name)) for name, value in parameters.items()}
        self._means = {name: jax.new_ref(value) for name, value in zeros.items()}

    def accumulate(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """Return `jax.value_and_grad(loss, has_aux=True)`, but with gradients added to the means and none returned."""

        def value_and_none(parameters: Mapping[str, jax.Array], *inputs: Any, **named: Any) -> Any:
            pull: Any
            value, pull, beside = jax.vjp(
                lambda parameters: loss(parameters, *inputs, **named), parameters, has_aux=True
            )
            # Divided here: after the loop, XLA would write out the divisor in the shape of the largest arrays.
            pull.with_refs(self._means)(jnp.full_like(value, 1 / self._num_parts))
            return (value, beside), {}

        return value_and_none

    def means(self) -> dict[str, jax.Array]:
        """Return the means; nothing can be added any more."""
        return {name: jax.freeze(mean) for name, mean in self._means.items()}


def _stacked(own: list[Any], sharding: NamedSharding | None) -> Any:
    """Stack arrays, or each of the arrays of codes."""
    return jax.jit(lambda own: jax.tree.map(lambda *values: jnp.stack(values), *own), out_shardings=sharding)(own)


def _row(stacked: Any, row: int) -> Any:
    """Return a layer's own arrays."""
    return jax.tree.map(lambda values: values[row], stacked)


class _Place(NamedTuple):
    """Name of the held array that has a layer's own array, and the row in it."""

    name: str
    row: int | None = None


def _parts(name: str) -> tuple[int | None, str]:
    """Split `layers.3.attention.w_query` into 3, `attention.w_query`; another name into None and itself."""
    if not name.startswith("layers."):
        return None, name
    _, index, own = name.split(".", 2)
    return int(index), own


def _name(run: range) -> str:
    return str(run.start) if len(run) == 1 else f"{run.start}-{run.stop - 1}"


def _held(run: range, *own: str) -> str:
    return ".".join(["layers", _name(run), *own])


def _once(layer: LayerSpec) -> LayerSpec:
    return layer.model_copy(update={"repeat": 1})


def _reads_previous(layer: LayerSpec) -> bool:
    routed = layer.routed
    return routed is not None and routed.router.reads_previous


def _each(stacked: Any, length: int) -> list[Any]:
    """Return each layer's output. Split, not indexed: the backward pass joins the parts once."""
    leaves, shape = jax.tree.flatten(stacked)
    parts = [[jnp.squeeze(part, 0) for part in lax.split(leaf, [1] * length)] for leaf in leaves]
    return [jax.tree.unflatten(shape, own) for own in zip(*parts, strict=True)] if leaves else [stacked] * length
