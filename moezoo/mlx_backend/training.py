"""Training in MLX: loss and gradients, the step, and its optimizer's state."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map

from moezoo.core.backend import StepMetrics
from moezoo.core.config.optimizers import OptimizerConfig
from moezoo.core.config.training import Layers, Rematerialize
from moezoo.core.config.update_rules import update_rules
from moezoo.core.errors import TrainingError
from moezoo.core.layer_routing import check_forced
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.precision import check_float32
from moezoo.core.parameters.trained import router_trains
from moezoo.core.quantization.weight import check_no_codes
from moezoo.core.random import Bits
from moezoo.core.reference.router_state import updated_names
from moezoo.core.spec import GlobalBalanceLossSpec, ModelSpec
from moezoo.core.tokens import IGNORED, check_documents, check_targets
from moezoo.mlx_backend.arrays import named, to_numpy
from moezoo.mlx_backend.distributed import data_parallel
from moezoo.mlx_backend.inference import MlxInference, flatten_forced, routing_load
from moezoo.mlx_backend.optimizer import clip, global_norm, make_optimizer
from moezoo.mlx_backend.positions import packed_documents
from moezoo.mlx_backend.router_state import updated_state
from moezoo.mlx_backend.runtime.typed import to_float, to_int
from moezoo.mlx_backend.transforms.rematerialization import transforms


class PendingMlxStep:
    """Numbers of a step that MLX may still be computing."""

    def __init__(self, values: Any):
        self._values = values

    def fetch(self) -> StepMetrics:
        terms, norm, load, dropped, state = self._values
        with data_parallel.lost_peer():
            return StepMetrics(
                {name: to_float(value) for name, value in terms.items()},
                to_float(norm),
                [np.array(sizes, np.int64) for sizes in load],
                [to_int(count) for count in dropped],
                to_numpy(state),
            )


class MlxTraining(MlxInference):
    """A model that is trained; the optimizer holds its state."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, np.ndarray]):
        super().__init__(spec, weights)
        self._rows = {row.name: row for row in parameter_table(spec) if row.trained}
        self._trained: Collection[str] = self._rows.keys()
        self._balances_globally = any(
            isinstance(loss, GlobalBalanceLossSpec) for _, moe in spec.moes for loss in moe.losses
        )
        self._transforms = transforms("none")
        self._loss_and_gradients = nn.value_and_grad(self._module, self._loss)

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
        trained = self._rows.keys() if trained is None else trained
        check_no_codes([name for name in self._codes() if name in trained])
        self._freeze_others(trained)
        (_, terms, *_), gradients = self._loss_and_gradients(
            mx.array(tokens),
            mx.array(targets),
            None if documents is None else mx.array(documents),
            flatten_forced(forced),
            None if key is None else mx.array(key),
        )
        gradients, terms = data_parallel.averaged(gradients, terms)
        mx.eval(terms, gradients)
        self._freeze_others(self._trained)
        return {name: to_float(value) for name, value in terms.items()}, to_numpy(named(gradients))

    def _loss(
        self,
        tokens: mx.array,
        targets: mx.array,
        documents: mx.array | None = None,
        forced: Sequence[mx.array] | None = None,
        key: mx.array | None = None,
        **of_step: Any,
    ) -> tuple[mx.array, dict[str, mx.array], list[mx.array | None], tuple[list[mx.array], list[mx.array]]]:
        """Return the loss, every loss term, cutoffs of the routers, and loads and drops. `of_step`: see `_terms`."""
        result = self._module(tokens, forced=forced, key=key, document_BT=documents, **self._transforms._asdict())
        terms = self._terms(result, targets, documents=packed_documents(documents), **of_step)
        cutoffs = [routing.cutoff_E for routing in result.routings]
        return terms["loss"], terms, cutoffs, routing_load(result)

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
        check_no_codes([name for name in self._codes() if name in rules])
        own = {*rules, *self._state_names}
        check_float32({name: _dtype_name(value) for name, value in self._named().items() if name in own})
        self._freeze_others(rules.keys())
        self._trained, self._router_trains = rules.keys(), router_trains(self.spec, rules)
        data_parallel.check_shared(self.spec)
        self._config = config
        if layers != "unrolled":
            raise TrainingError(
                f"training.layers is {layers!r}, which is not supported on MLX, which compiles no layers; expected "
                "'unrolled'. Remove it, or train on JAX."
            )
        self._transforms = transforms(rematerialize)
        self._optimizer = make_optimizer(rules)
        self._optimizer.init(self._module.trainable_parameters())
        if state is not None:
            self._optimizer.restore(state, update)

    def own_sequences(self, batch: int) -> np.ndarray:
        return data_parallel.processes().share(batch)

    def train_step(
        self,
        windows: np.ndarray,
        learning_rate: float,
        keys: Bits | None = None,
        targets: np.ndarray | None = None,
        documents: np.ndarray | None = None,
        forced: Sequence[np.ndarray] | None = None,
    ) -> PendingMlxStep:
        tokens, targets = windows[..., :-1], windows[..., 1:] if targets is None else targets
        check_targets(tokens, targets, whole=data_parallel.processes().count == 1)
        check_documents(tokens, targets, documents)
        check_forced(self.spec, tokens, forced)
        self._optimizer.set_learning_rate(learning_rate)
        each_key = [None] * len(windows) if keys is None else [mx.array(key) for key in keys]
        each_documents = [None] * len(windows) if documents is None else [mx.array(part) for part in documents]
        each_forced = [
            None if forced is None else flatten_forced([own[a] for own in forced]) for a in range(len(windows))
        ]
        arrays = (map(mx.array, tokens), map(mx.array, targets), each_documents, each_forced, each_key)
        parts = list(zip(*arrays, strict=True))
        of_step: dict[str, Any] = {}
        if len(parts) > 1:
            of_step["num_targets"] = data_parallel.average(mx.array(np.sum(targets != IGNORED) / len(parts)))
        if self._balances_globally and len(parts) > 1:
            # The whole step's load has no gradient, but every micro-batch's loss needs it: one more forward pass.
            loads = _sum_over(self._loads, parts)
            (of_step["global_load"],) = data_parallel.summed(loads)

        def micro_batch(*part: Any) -> Any:
            (_, terms, cutoffs, load), gradients = self._loss_and_gradients(*part, **of_step)
            return (gradients, terms, cutoffs), load

        means, (load, dropped) = _sum_over(micro_batch, parts)
        if len(parts) > 1:
            means = tree_map(lambda total: None if total is None else total / len(parts), means)
        gradients, terms, cutoffs = means
        gradients, terms = data_parallel.averaged(gradients, terms)
        load, dropped = data_parallel.summed(load, dropped)
        norm = global_norm(gradients)
        gradients = clip(self._config, gradients, norm)
        self._optimizer.update(self._module, gradients)
        del means, gradients  # so that their memory can be taken for what is made of them
        if self._router_trains:
            state = {name: self._value(name) for name in self._state_names}
            for name, value in updated_state(self.spec, state, load, cutoffs).items():
                path, _, leaf = name.rpartition(".")
                setattr(self._inside(path), leaf, value)
        values = (terms, norm, load, dropped, {name: self._value(name) for name in updated_names(self.spec)})
        with data_parallel.lost_peer():
            mx.async_eval(values, self._module.state, self._optimizer.state)
        return PendingMlxStep(values)

    def _loads(
        self,
        tokens: mx.array,
        _: mx.array,
        documents: mx.array | None,
        forced: Sequence[mx.array] | None,
        key: mx.array | None,
    ) -> list[mx.array]:
        """Return, per MoE layer, how many tokens chose each expert."""
        return routing_load(self._module(tokens, forced=forced, key=key, document_BT=documents))[0]

    def _freeze_others(self, trained: Collection[str]) -> None:
        """Let MLX compute gradients of these parameters only."""
        codes = self._codes()
        for name in self._rows:
            if name not in codes:
                module, leaf = self._place(name)
                change = module.unfreeze if name in trained else module.freeze
                change(keys=[leaf], recurse=False)


def _dtype_name(value: mx.array) -> str:
    return str(value.dtype).rpartition(".")[2]


def _sum_over(micro_batch: Callable[..., Any], parts: Sequence[tuple[Any, ...]]) -> Any:
    """Sum `micro_batch(tokens, targets, documents, forced, key)` over the parts."""
    total = micro_batch(*parts[0])
    for part in parts[1:]:
        # Trap: MLX's tree_map calls the function on None too, which is the cutoffs of a router without any.
        total = tree_map(lambda a, b: None if a is None else a + b, total, micro_batch(*part))
    return total
