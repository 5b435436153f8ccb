"""Frozen parts: training moves the named roles alone, as the reference does, and holds moments of them alone."""

import numpy as np
import pytest
from rich.console import Console

from moezoo.backends import load_backend
from moezoo.core.config.run_config import Config, load_config
from moezoo.core.config.training import TrainingConfig
from moezoo.core.config.validate import validate
from moezoo.core.cost.memory import training_memory
from moezoo.core.cost.step_plan import memory_per_device
from moezoo.core.distributed.mesh import ONE_DEVICE
from moezoo.core.errors import SpecError
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.parameters.trained import Trainable, sizes_by_role, trained_names, trained_rows
from moezoo.core.parity.check import parity, random_windows
from moezoo.core.reports.model_page import training_header
from tests.support.backends_available import require_backend
from tests.support.tolerances import FLOAT32_GRADIENT, assert_all_close

CONFIG = load_config("configs/tiny/sigmoid_router.yaml", ["model.vocab_size=31"])  # its router has a selection bias
SPEC = CONFIG.model
WINDOWS = random_windows(SPEC.vocab, 2, 12, 0)
BIASES = {row.name for row in parameter_table(SPEC) if row.name.endswith("selection_bias")}


def with_only(*roles: Trainable) -> Config:
    return CONFIG.model_copy(update={"training": CONFIG.training.model_copy(update={"only": roles})})


def stepped(backend: str, names: frozenset[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return moments and parameters after a step."""
    model = load_backend(backend).build(SPEC, initial_weights(SPEC, 0))
    model.start_training(CONFIG.optimizer, trained=names)
    model.train_step(WINDOWS[None], 1e-2).fetch()
    return model.export_optimizer(), model.export_parameters()


def test_jax_moves_what_mlx_moves() -> None:
    for name in ("jax", "mlx"):
        require_backend(name)
    (moments, after), (expected, other) = (stepped(name, trained_names(SPEC, ("experts",))) for name in ("jax", "mlx"))
    assert_all_close(moments, expected, FLOAT32_GRADIENT)
    start = initial_weights(SPEC, 0)
    for name, value in start.items():
        assert np.array_equal(after[name], value) == np.array_equal(other[name], value), name


@pytest.mark.parametrize(
    ("backend", "only"),
    [
        ("mlx", ("experts", "head")),
        ("mlx", ("router", "norms")),
        pytest.param("jax", ("experts", "head"), marks=pytest.mark.release),
        pytest.param("jax", ("router", "norms"), marks=pytest.mark.release),
    ],
)
def test_a_step_moves_trained_parameters_alone_as_the_reference_does(backend: str, only: tuple[Trainable, ...]) -> None:
    require_backend(backend)
    names = trained_names(SPEC, only)
    weights, loaded = initial_weights(SPEC, 0), load_backend(backend)
    tokens, targets = WINDOWS[:, :-1], WINDOWS[:, 1:]
    report = parity(SPEC, weights, tokens, targets, {backend: loaded}, CONFIG.optimizer, trained=names)
    assert report.passed
    assert {row.name for row in report.comparisons if row.kind == "gradient"} == names
    assert {row.name for row in report.comparisons if row.kind == "update"} == set(weights)
    moments, after = stepped(backend, names)
    assert set(moments) == {f"{kind}.{name}" for kind in ("first_moment", "second_moment") for name in names}
    moved = {name for name in weights if not np.array_equal(weights[name], after[name])}
    assert moved == names | (BIASES if "router" in only else set())


@pytest.mark.release
def test_scanned_layers_hold_moments_of_trained_parameters_alone() -> None:
    require_backend("jax")
    names = trained_names(SPEC, ("experts",))
    models = [load_backend("jax").build(SPEC, initial_weights(SPEC, 0)) for _ in range(2)]
    models[0].start_training(CONFIG.optimizer, trained=names)
    models[1].start_training(CONFIG.optimizer, trained=names, layers="scanned")
    for model in models:
        model.train_step(np.stack([WINDOWS, WINDOWS[::-1]]), 1e-2).fetch()
    one, other = (model.export_optimizer() for model in models)
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-3, atol=1e-7)


def test_memory_counts_gradients_and_moments_of_trained_parameters_alone() -> None:
    size = sum(row.size for row in trained_rows(SPEC, ("router",)))
    for one, other in (
        (training_memory(with_only("router")), training_memory(CONFIG)),
        (memory_per_device(with_only("router"), ONE_DEVICE.lengths), memory_per_device(CONFIG, ONE_DEVICE.lengths)),
    ):
        assert (one.gradients, one.moments) == (4 * size, 8 * size)
        assert one.parameters == other.parameters


def test_header_has_trained_parameters_by_role() -> None:
    console = Console(width=200)
    with console.capture() as seen:
        console.print(training_header(with_only("router", "norms"), {}))
    sizes = sizes_by_role(trained_rows(SPEC, ("router", "norms")))
    line = next(line for line in seen.get().splitlines() if line.startswith("trained"))
    assert line.split(maxsplit=1)[1].startswith(f"{sum(sizes.values()):,}")
    assert f"router {sizes['router']:,}" in line
    with console.capture() as seen:
        console.print(training_header(CONFIG, {}))
    assert "trained" not in seen.get()


def test_a_role_without_parameters_is_refused() -> None:
    tied = load_config("configs/tiny/tied.yaml", ["model.vocab_size=31"]).model
    with pytest.raises(SpecError, match=r"training.only names head, but .* a tied head is the embedding; it has att"):
        trained_names(tied, ("head",))
    raw = {"steps": 1, "batch_size": 1, "sequence_length": 1}
    assert validate(TrainingConfig, {**raw, "only": "router"}, "x").only == ("router",)
    with pytest.raises(SpecError, match=r"^training.only\[0\] is 'expert'; input should be [^\n]*\(here\)\.$"):
        validate(Config, {**CONFIG.model_dump(mode="json"), "training": {**raw, "only": ["expert"]}}, "here")
    with pytest.raises(SpecError, match="is empty, so nothing is trained"):
        validate(TrainingConfig, {**raw, "only": []}, "training")
