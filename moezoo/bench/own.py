"""moezoo's backends as contenders, through the protocol of core/backend.py and the generation loop."""

import platform
from collections.abc import Callable
from itertools import cycle
from time import perf_counter
from typing import Any

from moezoo.backends import load_backend
from moezoo.bench.case import Case, Work, random_activations, random_prompts, random_windows
from moezoo.bench.limit import first_moe_layer
from moezoo.bench.quantized import quantized_folder
from moezoo.core.backend import Backend, Model, PendingStep
from moezoo.core.cost.fits import check_training, check_weights
from moezoo.core.cost.parameters import parameter_counts
from moezoo.core.generation.loop import generate
from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.initialize import initial_value, initial_weights
from moezoo.core.random import micro_batch_keys
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.tokens import Integers


class Own:
    """A backend of moezoo as a contender."""

    def __init__(self, name: str, operations_per_token: Callable[[Any, int], int] | None = None):
        self._name = name
        self._loaded: Backend | None = None
        self._operations_per_token = operations_per_token
        self._counted: dict[str, str] = {}
        self._models: list[tuple[Case, Model]] = []

    @property
    def _backend(self) -> Backend:
        return self._loaded or self._load(for_training=True)

    def _load(self, *, for_training: bool) -> Backend:
        self._loaded = load_backend(self._name, for_training=for_training)
        return self._loaded

    def facts(self) -> dict[str, str]:
        return {**self._backend.facts(), **self._counted, "python": platform.python_version()}

    def prepare(self, case: Case) -> Work:
        if self._loaded is None:
            self._load(for_training=case.kind != "decode")
        match case.kind:
            case "train":
                return self._train(case)
            case "forward" | "gradients":
                return self._moe_layer(case)
            case "decode":
                return self._decode(case)

    def _train(self, case: Case) -> Work:
        training, optimizer = case.config.training, case.config.optimizer
        check_training(case.config, self._backend.devices())
        model = self._backend.build(case.spec, initial_weights(case.spec, training.seed))
        model.start_training(optimizer)
        steps = enumerate(cycle(random_windows(case)))

        def train_step() -> PendingStep:
            step, windows = next(steps)
            keys = micro_batch_keys(training.seed, step, training.gradient_accumulation)
            return model.train_step(windows, optimizer.learning_rate, keys)

        def run(repeats: int) -> float:
            begin = perf_counter()
            pending = [train_step() for _ in range(repeats)]  # fetched late, as in the training loop
            for each in pending:
                each.fetch()
            model.wait()
            return perf_counter() - begin

        return run

    def _moe_layer(self, case: Case) -> Work:
        spec = first_moe_layer(case.spec)
        rows = [row for row in parameter_table(spec) if row.name.startswith("layers.0.moe.")]
        weights = {row.name: initial_value(row, case.config.training.seed) for row in rows}
        layer = self._backend.moe_layer(spec, 0, weights)
        x, gradient = layer.array(random_activations(case, 3)), layer.array(random_activations(case, 4))
        token = layer.array(random_windows(case, 1)[0].reshape(-1, x.shape[1] + 1)[:, :-1])

        def run(repeats: int) -> float:
            begin = perf_counter()
            for _ in range(repeats):
                if case.kind == "forward":
                    layer.forward(x, token)
                else:
                    layer.gradients(x, token, gradient)
            return perf_counter() - begin

        return run

    def _decode(self, case: Case) -> Work:
        model = self._model(case)
        prompts, options = random_prompts(case), SamplingOptions(temperature=0.0)
        if self._operations_per_token is not None and not case.bits:  # codes are decoded outside the graph on x86
            count = self._operations_per_token(model, case.batch)
            self._counted[f"operations, {case.label}"] = f"{count} per token in MLX's graph"

        def run(repeats: int) -> float:
            seconds = 0.0
            for _ in range(repeats):
                clock: list[float] = []

                def stamp(column: Integers, clock: list[float] = clock) -> None:
                    clock.append(perf_counter())

                generate(model, prompts, max_new_tokens=case.new_tokens, options=options, on_tokens=stamp)
                seconds += (clock[-1] - clock[0]) / (len(clock) - 1)
            return seconds

        return run

    def _model(self, case: Case) -> Model:
        """Return the model of a decoding case; all cases with the same spec and width share it."""
        for other, model in self._models:
            if (other.spec, other.bits) == (case.spec, case.bits):
                return model
        weight_bytes = 4 * parameter_counts(case.spec).total  # float32
        check_weights(weight_bytes, self._backend.devices(), f"the model of {case.label}")
        if case.bits:
            with quantized_folder(case) as folder:
                checkpoint = open_checkpoint(folder)
                model = self._backend.build(checkpoint.spec, checkpoint.weights)
        else:
            model = self._backend.build(case.spec, initial_weights(case.spec, case.config.training.seed))
        self._models.append((case, model))
        return model


def make_jax() -> Own:
    """Create the contender."""
    return Own("jax")


def make_mlx() -> Own:
    """Create the contender, which counts the operations of MLX's graph."""
    from moezoo.mlx_backend.planning.operations import operations_per_token

    return Own("mlx", operations_per_token)
