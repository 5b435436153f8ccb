"""Every config under configs/: JAX against MLX against the reference.

Tiny ones are run: forward, losses, gradients and one optimizer step against the reference, then 20 steps of both
backends side by side. Of larger ones the built names and shapes are compared with the parameter table, and of the
largest, which no test can build, the table is checked alone.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moezoo.core.backend import combine_weights
from moezoo.core.config.run_config import Config, load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.parameters import ROLES, parameter_table
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.random import micro_batch_keys
from moezoo.core.reference.dispatch import dispatch
from moezoo.core.reference.losses import loss_and_gradients, loss_terms
from moezoo.core.reference.optimizer import adamw, zero_moments
from moezoo.core.reference.router_state import updated_state
from moezoo.core.reference.transformer import forward
from moezoo.core.runs.init_from import load_resolved_config
from tests.support.backends_available import require_backend
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
TINY = sorted((ROOT / "tiny").glob("*.yaml"))
MESHES = sorted((ROOT / "meshes").glob("*.yaml"))  # no configs: devices alone
OTHERS = sorted(set(ROOT.rglob("*.yaml")) - {*TINY, *MESHES})
INFERRING_OTHERWISE = [path for path in TINY if load_config(path).model.inference_differs]
VOCAB_SIZE = 31  # where the config leaves it to a tokenizer
LARGEST_BUILT = 20_000_000  # parameters; more would take seconds to draw
B, T, STEPS = 4, 9, 20  # a batch divides into the accumulation steps of every tiny config
LEARNING_RATE = 1e-3


def sized(path: Path) -> Config:
    config = load_resolved_config(path)
    return config if config.model.vocab_size is not None else with_vocab_size(config, VOCAB_SIZE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


@dataclass(frozen=True)
class Run:
    """What one realization made of a config: a forward pass, gradients, and 20 steps.

    Routing is free in float32, where no token of the first batch is a near tie (a test sees to it), and the gradients
    are those of the first step. In bfloat16, where a rounding may choose another expert, forward pass and gradients
    take the reference's experts. Each function that JAX need not compile saves five seconds a config.
    """

    name: str
    logits: np.ndarray
    routing: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    losses: dict[str, float]
    gradients: dict[str, np.ndarray]
    stepped: dict[str, np.ndarray]
    moments: dict[str, np.ndarray]
    step_losses: list[float]
    load: list[list[np.ndarray]]
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
    weights = initial_weights(spec, config.training.seed)
    parts = config.training.gradient_accumulation
    windows = np.random.default_rng(0).integers(0, spec.vocab, (STEPS, parts, B // parts, T + 1)).astype(np.int32)
    first = windows[0].reshape(B, T + 1)
    parameters = {name: value.astype(np.float64) for name, value in weights.items()}
    logits, routings, index_losses = forward(spec, parameters, first[:, :-1])
    terms = loss_terms(spec, logits, first[:, 1:], routings, index_losses=index_losses)
    losses = {name: float(value) for name, value in terms.items()}
    moes = [layer.moe for layer in spec.all_layers if layer.moe is not None]
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
        step_losses=[step.loss],
        load=[],
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
    trained = {row.name: parameters[row.name] for row in rows if row.trained}
    stepped, moments = adamw(
        config.optimizer,
        trained,
        gradients,
        zero_moments(trained),
        learning_rate=LEARNING_RATE,
        update=1,
        decayed={row.name for row in rows if row.decay},
    )
    state = updated_state(spec, {row.name: parameters[row.name] for row in rows if not row.trained}, loads, cutoffs)
    first = {f"first_moment.{name}": value for name, value in moments.first.items()}
    second = {f"second_moment.{name}": value for name, value in moments.second.items()}
    margins = [np.min(routing.margin_P) for layer in layers for routing in layer]
    return Step(gradients, stepped | state, first | second, float(np.mean(losses)), min(margins, default=np.inf))


def _counts(routing) -> np.ndarray:
    """Tokens that chose each expert, among all that the router scores."""
    return np.bincount(routing.expert_PK[routing.valid_PK], minlength=routing.score_PE.shape[1])


@cache
def run_of(path: Path, backend: str) -> Run:
    case = case_of(path)
    spec = case.config.model
    model = Twin(backend).backend().build(spec, case.weights)
    forced = [expert.reshape(B, T, -1).astype(np.int32) for expert, _, _ in case.reference.routing]
    count = case.config.training.gradient_accumulation
    output = model.forward(case.tokens, case.targets, forced=None if case.exact else forced)
    gradients = {} if case.exact else model.loss_and_gradients(case.tokens, case.targets, forced=forced)[1]
    model.start_training(case.config.optimizer)
    step_losses, load, stepped, moments = [], [], {}, {}
    for number, window in enumerate(case.windows):
        keys = micro_batch_keys(case.config.training.seed, number, count)
        metrics = model.train_step(window, LEARNING_RATE, keys).fetch()
        step_losses.append(metrics.losses["loss"])
        load.append(metrics.load)
        if number == 0:
            stepped, moments = model.export_parameters(), model.export_optimizer()
            if case.exact:
                gradients = _gradients_in(case.config.optimizer, moments, metrics.gradient_norm)
    return Run(
        name=backend,
        logits=output.logits,
        routing=[tuple(value.reshape(B * T, -1) for value in (r.expert, r.weight, r.score)) for r in output.routing],
        losses=output.losses,
        gradients=gradients,
        stepped=stepped,
        moments=moments,
        step_losses=step_losses,
        load=load,
        margin=np.inf,
    )


def _gradients_in(optimizer, moments, norm):
    """The gradients of the first step: its first moments are `(1 - beta1) * clipped gradient`."""
    scale = 1.0 if optimizer.clip_norm is None else min(1.0, optimizer.clip_norm / (norm + 1e-6))
    prefix = "first_moment."
    return {
        name.removeprefix(prefix): value.astype(np.float64) / (1 - optimizer.beta1) / scale
        for name, value in moments.items()
        if name.startswith(prefix)
    }


@pytest.fixture(scope="module", params=TINY, ids=name_of)
def path(request) -> Path:
    return request.param


@pytest.fixture
def both(path) -> list[Run]:
    for backend in ("jax", "mlx"):
        require_backend(backend)
    return [run_of(path, backend) for backend in ("jax", "mlx")]


def test_forward_pass_matches_the_reference(path, both):
    case = case_of(path)
    expected = case.reference
    for run in both:
        assert_close(run.logits, expected.logits, FLOAT32 if case.exact else BFLOAT16, f"logits of {run.name}")
        assert_all_close(run.losses, expected.losses, FLOAT32 if case.exact else BFLOAT16_LOSS)


def test_routing_matches_the_reference_and_no_token_is_a_near_tie(path, both):
    case = case_of(path)
    assert case.reference.margin > ROUTING_MARGIN
    for layer, expected in enumerate(case.reference.routing):
        for run in both:
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


@pytest.mark.parametrize("path", INFERRING_OTHERWISE, ids=name_of)
def test_inference_matches_the_reference_where_it_routes_otherwise(twin, path):
    """With the weights of after one step, whose cutoffs are no longer zero."""
    case = case_of(path)
    spec, weights = case.config.model, {name: np.float32(value) for name, value in case.reference.stepped.items()}
    parameters = {name: value.astype(np.float64) for name, value in weights.items()}
    logits, routings, _ = forward(spec, parameters, case.tokens, inference=True)
    output = twin.backend().build(spec, weights).forward(case.tokens, inference=True)
    tolerance = FLOAT32 if case.exact else BFLOAT16
    moes = [layer.moe for layer in spec.all_layers if layer.moe is not None]
    for moe, routing, own in zip(moes, routings, output.routing, strict=True):
        assert np.min(routing.margin_P) > ROUTING_MARGIN
        expected = (*_combine_weights(moe, routing, inference=True), routing.score_PE)
        actual = [value.reshape(B * T, -1) for value in (own.expert, own.weight, own.score)]
        assert_same_routing(actual, expected, tolerance, (twin.name, own.layer))
    assert_close(output.logits, logits, tolerance)
    assert np.max(np.abs(logits - forward(spec, parameters, case.tokens).logits_BTV)) > 1e-6


def test_gradients_match_the_reference_and_each_other(path, both):
    case = case_of(path)
    tolerance = FLOAT32_GRADIENT if case.exact else BFLOAT16_GRADIENT
    for run in both:
        assert_all_close(run.gradients, case.reference.gradients, tolerance)
    assert_all_close(both[0].gradients, both[1].gradients, tolerance)


def test_one_optimizer_step_matches_the_reference(path, both):
    case = case_of(path)
    for run in both:
        assert_close(run.step_losses[0], case.reference.step_losses[0], FLOAT32 if case.exact else BFLOAT16_LOSS)
        if not case.exact:
            continue  # the step routes freely, and bfloat16 otherwise than the reference
        assert_all_close(run.moments, case.reference.moments, FLOAT32_GRADIENT)
        for name, expected in case.reference.stepped.items():
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


def test_twenty_steps_give_the_same_losses_on_both_backends(path, both):
    case = case_of(path)
    jax, mlx = both
    assert len(jax.step_losses) == STEPS
    tolerance = FLOAT32_TRAINING if case.exact else BFLOAT16_TRAINING
    for step in range(STEPS):
        assert_close(jax.step_losses[step], mlx.step_losses[step], tolerance, f"loss of step {step}")
        for one, other in zip(jax.load[step], mlx.load[step], strict=True):
            assert one.sum() == other.sum()


def test_decoding_by_cache_gives_the_logits_of_the_reference_by_inference_routing(path, twin):
    case = case_of(path)
    model = twin.backend().build(case.config.model, case.weights)
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


@pytest.mark.parametrize("path", OTHERS, ids=name_of)
def test_larger_configs_have_a_consistent_table(path):
    rows = parameter_table(sized(path).model)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    for row in rows:
        assert len(row.shape) == len(row.axes), row.name
        assert min(row.shape) > 0, row.name
        assert row.role in ROLES, row.name


@pytest.mark.parametrize("path", OTHERS, ids=name_of)
def test_larger_configs_that_a_test_can_build_have_the_tables_names_and_shapes(twin, path):
    config = sized(path)
    table = {row.name: row.shape for row in parameter_table(config.model)}
    if sum(np.prod(shape) for shape in table.values()) > LARGEST_BUILT:
        pytest.skip(f"more than {LARGEST_BUILT:,} parameters: its table is tested alone")
    model = twin.backend().build(config.model, initial_weights(config.model, 0))
    assert {name: value.shape for name, value in model.export_parameters().items()} == table


def test_there_is_a_case_for_every_config():
    """A config that no test sees fails here: every YAML file is tiny or among the others, and none is left out."""
    assert len(TINY) >= 12
    assert sorted([*TINY, *OTHERS, *MESHES]) == sorted(ROOT.rglob("*.y*ml"))
