"""Every config under configs/: JAX against MLX against the reference.

Tiny ones are run: forward, losses, gradients, one optimizer step and cached decoding against the reference, then 8
steps of both backends side by side, and 20 before a release. Compiling takes JAX 50 times as long as MLX takes to run,
so the gate runs those of `tests/support/covering.py` on JAX, which together have every feature of the zoo, and every
config on MLX; the release tests run every config on both. Of larger configs the built names and shapes are compared
with the parameter table, and of the largest, which no test can build, the table is checked alone.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moezoo.core.config.run_config import Config, load_config
from moezoo.core.config.update_rules import update_rules
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.layer_routing import combine_weights
from moezoo.core.parameters import ROLES, parameter_table
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.random import micro_batch_keys
from moezoo.core.reference.dispatch import dispatch
from moezoo.core.reference.losses import loss_and_gradients, loss_terms
from moezoo.core.reference.optimizer import optimizer_step, zero_state
from moezoo.core.reference.router_state import updated_state
from moezoo.core.reference.transformer import forward
from moezoo.core.runs.init_from import load_resolved_config
from moezoo.core.spec import HyperConnectionsSpec
from tests.huggingface.release_configs import RELEASES
from tests.support.backends_available import require_backend
from tests.support.covering import COMBINATIONS, COVERING, TINY
from tests.support.tolerances import (
    BFLOAT16,
    BFLOAT16_GRADIENT,
    BFLOAT16_LOSS,
    BFLOAT16_TRAINING,
    FLOAT32,
    FLOAT32_GRADIENT,
    FLOAT32_TRAINING,
    ROUTING_MARGIN,
    assert_all_close,
    assert_close,
)
from tests.support.twins import Twin

ROOT = Path(__file__).parents[2] / "configs"
SMALL = [*COMBINATIONS, *TINY]
MESHES = sorted((ROOT / "meshes").glob("*.yaml"))  # no configs: devices alone
RELEASED = [ROOT / "families" / f"{name}.yaml" for name in RELEASES]  # in tests/huggingface/test_releases.py
OTHERS = sorted(set(ROOT.rglob("*.yaml")) - {*TINY, *MESHES, *RELEASED})
VOCAB_SIZE = 31  # where the config leaves it to a tokenizer
LARGEST_BUILT = 20_000_000  # parameters; more would take seconds to draw
B, T, STEPS = 4, 9, 20  # a batch divides into the accumulation steps of every tiny config
STEPS_IN_THE_GATE = 8  # test_training_oracles.py repeats twenty of transformers' on both backends there
LEARNING_RATE = 1e-3


def sized(path: Path) -> Config:
    config = load_resolved_config(path)
    return config if config.model.vocab_size is not None else with_vocab_size(config, VOCAB_SIZE)


def table_of(path: Path) -> dict[str, tuple[int, ...]]:
    return {row.name: row.shape for row in parameter_table(sized(path).model)}


BUILT = [path for path in OTHERS if sum(np.prod(shape) for shape in table_of(path).values()) <= LARGEST_BUILT]


def name_of(path: Path) -> str:
    return "/".join(path.with_suffix("").parts[-2:])


def compiled_in_the_gate(path: Path) -> tuple[pytest.MarkDecorator, ...]:
    """Marks of what JAX has to compile for a config."""
    return () if path in COVERING else (pytest.mark.release,)


def on_each_backend(paths: list[Path]) -> list:
    """Parameters: a config and a backend."""
    return [
        pytest.param(
            (path, backend), id=f"{name_of(path)}-{backend}", marks=compiled_in_the_gate(path) * (backend == "jax")
        )
        for path in paths
        for backend in ("jax", "mlx")
    ]


ON_EACH_BACKEND = on_each_backend(SMALL)
ROUTING_DIFFERS = on_each_backend([path for path in SMALL if load_config(path).model.inference_differs])


@dataclass(frozen=True)
class Run:
    """What one implementation computed for a config: a forward pass, gradients, and one step.

    Routing is free in float32, where no token of the first batch is a near tie (a test sees to it), and the gradients
    are those of the first step. In bfloat16, where a rounding may choose another expert, forward pass and gradients
    take the reference's experts. Each function that JAX need not compile saves a second a config.
    """

    name: str
    logits: np.ndarray
    routing: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    losses: dict[str, float]
    gradients: dict[str, np.ndarray]
    stepped: dict[str, np.ndarray]
    moments: dict[str, np.ndarray]
    step_loss: float
    margin: float


@dataclass(frozen=True)
class Case:
    """A config with its weights and data, and the reference's view of both."""

    config: Config
    weights: dict[str, np.ndarray]
    windows: np.ndarray  # int32 [steps, A, B / A, T + 1]
    reference: Run

    @property
    def exact(self) -> bool:
        return self.config.model.precision.compute == "float32"

    @property
    def tokens(self) -> np.ndarray:
        return self.windows[0, :, :, :-1].reshape(B, T)

    @property
    def targets(self) -> np.ndarray:
        return self.windows[0, :, :, 1:].reshape(B, T)


@cache
def case_of(path: Path) -> Case:
    config = sized(path)
    spec = config.model
    weights = initial_weights(spec, config.training.seed, active_adapters=True)
    parts = config.training.gradient_accumulation
    windows = np.random.default_rng(0).integers(0, spec.vocab, (STEPS, parts, B // parts, T + 1)).astype(np.int32)
    first = windows[0].reshape(B, T + 1)
    parameters = {name: value.astype(np.float64) for name, value in weights.items()}
    logits, routings, index_losses = forward(spec, parameters, first[:, :-1])
    terms = loss_terms(spec, logits, first[:, 1:], routings, index_losses=index_losses)
    losses = {name: float(value) for name, value in terms.items()}
    moes = [moe for _, moe in spec.moes]
    step = _reference_step(config, parameters, windows[0])
    reference = Run(
        name="reference",
        logits=logits,
        routing=[
            (*_combine_weights(moe, routing), routing.score_PE) for moe, routing in zip(moes, routings, strict=True)
        ],
        losses=losses,
        gradients=step.gradients,
        stepped=step.parameters,
        moments=step.moments,
        step_loss=step.loss,
        margin=min([step.margin, *(np.min(routing.margin_P) for routing in routings)]),
    )
    return Case(config, weights, windows, reference)


def _combine_weights(moe, routing, *, inference=False) -> tuple[np.ndarray, np.ndarray]:
    """Experts and weights as a LayerRouting has them."""
    kept_PK = dispatch(moe, routing, num_sequences=B, inference=inference).kept_PK
    return combine_weights(routing.expert_PK, routing.valid_PK, kept_PK, routing.weight_PK)


@dataclass(frozen=True)
class Step:
    """The mean of the micro-batches' gradients and losses, and everything after one update from them."""

    gradients: dict[str, np.ndarray]
    parameters: dict[str, np.ndarray]
    moments: dict[str, np.ndarray]
    loss: float
    margin: float


def _reference_step(config, parameters, window) -> Step:
    spec, count = config.model, len(window)
    keys = micro_batch_keys(config.training.seed, 0, count)
    passes = [forward(spec, parameters, part[:, :-1], key=key).routings for part, key in zip(window, keys, strict=True)]
    layers = list(zip(*passes, strict=True))
    loads = [sum(_counts(routing) for routing in layer) for layer in layers]
    cutoffs = [
        None if layer[0].cutoff_E is None else sum(routing.cutoff_E for routing in layer) / count for layer in layers
    ]
    sums, losses = None, []
    for part, key in zip(window, keys, strict=True):
        terms, gradients = loss_and_gradients(
            spec, parameters, part[:, :-1], part[:, 1:], key=key, global_load=loads if count > 1 else None
        )
        losses.append(terms["loss"])
        sums = gradients if sums is None else {name: sums[name] + gradients[name] for name in sums}
    gradients = {name: value / count for name, value in sums.items()}
    rows = parameter_table(spec)
    rules = update_rules(config.optimizer, rows)
    stepped, moments = optimizer_step(
        config.optimizer,
        rules,
        parameters,
        gradients,
        zero_state(rules, parameters),
        learning_rate=LEARNING_RATE,
        update=1,
    )
    state = updated_state(spec, {row.name: parameters[row.name] for row in rows if not row.trained}, loads, cutoffs)
    margins = [np.min(routing.margin_P) for layer in layers for routing in layer]
    return Step(gradients, stepped | state, moments, float(np.mean(losses)), min(margins, default=np.inf))


def _counts(routing) -> np.ndarray:
    """Tokens that chose each expert, among all that the router scores."""
    return np.bincount(routing.expert_PK[routing.valid_PK], minlength=routing.score_PE.shape[1])


@dataclass(frozen=True)
class Steps:
    """Losses of steps, and per step and MoE layer the load of each expert."""

    losses: list[float]
    load: list[list[np.ndarray]]


@cache
def trained(path: Path, backend: str):
    """A model after its first step, and what the step measured, to which `steps_of` adds."""
    case = case_of(path)
    model = Twin(backend).backend().build(case.config.model, case.weights)
    model.start_training(case.config.optimizer)
    return model, [_step(model, case, 0)]


def _step(model, case: Case, number: int):
    keys = micro_batch_keys(case.config.training.seed, number, case.config.training.gradient_accumulation)
    return model.train_step(case.windows[number], LEARNING_RATE, keys).fetch()


@cache
def run_of(path: Path, backend: str) -> Run:
    case = case_of(path)
    model = Twin(backend).backend().build(case.config.model, case.weights)
    forced = [expert.reshape(B, T, -1).astype(np.int32) for expert, _, _ in case.reference.routing]
    output = model.forward(case.tokens, case.targets, forced=None if case.exact else forced)
    gradients = {} if case.exact else model.loss_and_gradients(case.tokens, case.targets, forced=forced)[1]
    model, (metrics, *_) = trained(path, backend)
    moments = model.export_optimizer()
    if case.exact:
        gradients = _gradients_in(case.config.optimizer, moments, metrics.gradient_norm)
    return Run(
        name=backend,
        logits=output.logits,
        routing=[tuple(value.reshape(B * T, -1) for value in (r.expert, r.weight, r.score)) for r in output.routing],
        losses=output.losses,
        gradients=gradients,
        stepped=model.export_parameters(),
        moments=moments,
        step_loss=metrics.losses["loss"],
        margin=np.inf,
    )


def steps_of(path: Path, backend: str, count: int) -> Steps:
    """So many steps; after `run_of`, which reads what the first one leaves behind."""
    run_of(path, backend)
    case, (model, metrics) = case_of(path), trained(path, backend)
    metrics.extend(_step(model, case, number) for number in range(len(metrics), count))
    return Steps([step.losses["loss"] for step in metrics[:count]], [step.load for step in metrics[:count]])


def _gradients_in(optimizer, moments, norm):
    """The gradients of the first step: its first moments are `(1 - beta1) * clipped gradient`."""
    scale = 1.0 if optimizer.clip_norm is None else min(1.0, optimizer.clip_norm / (norm + 1e-6))
    prefix = "first_moment."
    return {
        name.removeprefix(prefix): value.astype(np.float64) / (1 - optimizer.beta1) / scale
        for name, value in moments.items()
        if name.startswith(prefix)
    }


@pytest.fixture(scope="module", params=ON_EACH_BACKEND)
def pair(request) -> tuple[Path, str]:
    """A tiny config and a backend."""
    require_backend(request.param[1])
    return request.param


def test_forward_pass_matches_the_reference(pair):
    case, run = case_of(pair[0]), run_of(*pair)
    assert_close(run.logits, case.reference.logits, FLOAT32 if case.exact else BFLOAT16, f"logits of {run.name}")
    assert_all_close(run.losses, case.reference.losses, FLOAT32 if case.exact else BFLOAT16_LOSS)


def test_routing_matches_the_reference_and_no_token_is_a_near_tie(pair):
    case, run = case_of(pair[0]), run_of(*pair)
    assert case.reference.margin > ROUTING_MARGIN
    for layer, expected in enumerate(case.reference.routing):
        assert_same_routing(run.routing[layer], expected, FLOAT32 if case.exact else BFLOAT16, (run.name, layer))


def assert_same_routing(actual, expected, tolerance, what):
    """Experts, weights and scores, [P, ...] each.

    Experts as sets, each with its weight: two of nearly equal weight may stand in either order.
    """
    (own_expert, own_weight, own_score), (expert_PK, weight_PK, score_PE) = actual, expected
    own_order, order = np.argsort(own_expert, axis=-1), np.argsort(expert_PK, axis=-1)
    own_sorted = np.take_along_axis(own_expert, own_order, -1)
    np.testing.assert_array_equal(own_sorted, np.take_along_axis(expert_PK, order, -1), str(what))
    own_weight, weight_PK = np.take_along_axis(own_weight, own_order, -1), np.take_along_axis(weight_PK, order, -1)
    assert_close(own_weight, weight_PK, tolerance, str(what))
    assert_close(own_score, score_PE, tolerance, str(what))


@pytest.mark.parametrize("pair", ROUTING_DIFFERS, indirect=True)
def test_inference_matches_the_reference_where_it_routes_otherwise(pair):
    """With the weights of after one step, whose cutoffs are no longer zero."""
    case, twin = case_of(pair[0]), Twin(pair[1])
    spec, weights = case.config.model, {name: np.float32(value) for name, value in case.reference.stepped.items()}
    parameters = {name: value.astype(np.float64) for name, value in weights.items()}
    logits, routings, _ = forward(spec, parameters, case.tokens, inference=True)
    output = twin.backend().build(spec, weights).forward(case.tokens, inference=True)
    tolerance = FLOAT32 if case.exact else BFLOAT16
    moes = [moe for _, moe in spec.moes]
    for moe, routing, own in zip(moes, routings, output.routing, strict=True):
        assert np.min(routing.margin_P) > ROUTING_MARGIN
        expected = (*_combine_weights(moe, routing, inference=True), routing.score_PE)
        actual = [value.reshape(B * T, -1) for value in (own.expert, own.weight, own.score)]
        assert_same_routing(actual, expected, tolerance, (twin.name, own.layer))
    assert_close(output.logits, logits, tolerance)
    assert np.max(np.abs(logits - forward(spec, parameters, case.tokens).logits_BTV)) > 1e-6


def mixes_copies(case: Case, name: str) -> bool:
    """True for what mixes streams before the first block: they are copies there, so that its gradient is zero."""
    return isinstance(case.config.model.residual, HyperConnectionsSpec) and bool(
        re.search(r"layers\.0\.attention_residual\.(w_mix|b_mix|mix_scale)$", name)
    )


def without_copies(case: Case, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    largest = {name: np.max(np.abs(value), initial=0.0) for name, value in values.items()}
    zero = [size for name, size in largest.items() if mixes_copies(case, name)]
    assert max(zero, default=0.0) <= 1e-6 * max(largest.values(), default=0.0)
    return {name: value for name, value in values.items() if not mixes_copies(case, name)}


def test_gradients_match_the_reference(pair):
    case, run = case_of(pair[0]), run_of(*pair)
    ours, expected = (without_copies(case, each.gradients) for each in (run, case.reference))
    assert_all_close(ours, expected, FLOAT32_GRADIENT if case.exact else BFLOAT16_GRADIENT)


def test_one_optimizer_step_matches_the_reference(pair):
    case, run = case_of(pair[0]), run_of(*pair)
    assert_close(run.step_loss, case.reference.step_loss, FLOAT32 if case.exact else BFLOAT16_LOSS)
    if not case.exact:
        return  # the step routes freely, and bfloat16 otherwise than the reference
    moments = [without_copies(case, each.moments) for each in (run, case.reference)]
    assert_all_close(*moments, FLOAT32_GRADIENT)
    for name, expected in case.reference.stepped.items():
        if mixes_copies(case, name):
            continue
        if f"first_moment.{name}" not in case.reference.moments:
            assert_close(run.stepped[name], expected, FLOAT32, name)  # state
            continue
        # Adam's first step is the sign of the gradient: where that is rounding, the moments alone can be compared.
        gradient = np.abs(case.reference.moments[f"first_moment.{name}"])
        if not gradient.any():
            np.testing.assert_array_equal(run.moments[f"first_moment.{name}"], 0, name)  # behind zeros
            continue
        clear = gradient > 100 * FLOAT32_GRADIENT.relative * np.max(gradient)
        assert np.mean(clear) > 0.1, name
        moved = (run.stepped[name] - case.weights[name])[clear]
        assert_close(run.stepped[name][clear], expected[clear], FLOAT32, name)
        assert np.max(np.abs(moved)) > LEARNING_RATE / 2, name


def test_decoding_by_cache_gives_the_logits_of_the_reference_by_inference_routing(pair):
    case = case_of(pair[0])
    model = Twin(pair[1]).backend().build(case.config.model, case.weights)
    parameters = {name: value.astype(np.float64) for name, value in case.weights.items()}
    result = forward(case.config.model, parameters, case.tokens, inference=True)
    # Routing of inference decides anew, by seeds that were chosen for training's; a tenth of the margin is still ten
    # times what float32 moves a score, and a choice that falls otherwise fails the comparison of logits below.
    assert min([np.min(routing.margin_P) for routing in result.routings], default=1) > ROUTING_MARGIN / 10
    prompt = T - 3
    logits, cache = model.prefill(case.tokens[:, :prompt], T)
    for place in range(prompt - 1, T):
        expected = result.logits_BTV[:, place]
        if case.exact:
            assert_close(logits, expected, FLOAT32, f"logits after token {place}")
        else:  # a rounding may choose another expert
            assert np.median(np.abs(logits - expected)) < BFLOAT16.relative * np.max(np.abs(expected))
        if place + 1 < T:
            logits, cache = model.decode(case.tokens[:, place + 1], cache)


@pytest.fixture(
    scope="module", params=[pytest.param(path, marks=compiled_in_the_gate(path)) for path in SMALL], ids=name_of
)
def path(request) -> Path:
    """A tiny config, on both backends."""
    for backend in ("jax", "mlx"):
        require_backend(backend)
    return request.param


def test_gradients_match_each_other(path):
    jax, mlx = run_of(path, "jax"), run_of(path, "mlx")
    tolerance = FLOAT32_GRADIENT if case_of(path).exact else BFLOAT16_GRADIENT
    assert_all_close(*(without_copies(case_of(path), each.gradients) for each in (jax, mlx)), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [STEPS_IN_THE_GATE, pytest.param(STEPS, marks=pytest.mark.release)])
def test_steps_give_the_same_losses_on_both_backends(path, steps):
    jax, mlx = steps_of(path, "jax", steps), steps_of(path, "mlx", steps)
    assert len(jax.losses) == steps
    tolerance = FLOAT32_TRAINING if case_of(path).exact else BFLOAT16_TRAINING
    for step in range(steps):
        assert_close(jax.losses[step], mlx.losses[step], tolerance, f"loss of step {step}")
        for one, other in zip(jax.load[step], mlx.load[step], strict=True):
            assert one.sum() == other.sum()


@pytest.mark.parametrize("path", OTHERS, ids=name_of)
def test_larger_configs_have_a_consistent_table(path):
    rows = parameter_table(sized(path).model)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    for row in rows:
        assert len(row.shape) == len(row.axes), row.name
        assert min(row.shape) > 0, row.name
        assert row.role in ROLES, row.name


@pytest.mark.parametrize("path", BUILT, ids=name_of)
def test_larger_configs_that_a_test_can_build_have_the_tables_names_and_shapes(twin, path):
    config = sized(path)
    model = twin.backend().build(config.model, initial_weights(config.model, 0))
    assert {name: value.shape for name, value in model.export_parameters().items()} == table_of(path)


def test_there_is_a_case_for_every_config():
    """A config that no test sees fails here: every YAML file is tiny, released or among the others."""
    assert len(TINY) >= 12
    assert sorted([*TINY, *OTHERS, *MESHES, *RELEASED]) == sorted(ROOT.rglob("*.y*ml"))
