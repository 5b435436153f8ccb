"""Low-rank adapters: products of every form, the whole model, and what a config may say."""

import numpy as np
import pytest

from moezoo.backends import load_backend
from moezoo.core.config.run_config import json_schema, load_config, parse_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.errors import SpecError
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.reference import adapter as reference
from moezoo.core.reference.losses import loss_and_gradients
from moezoo.core.spec import AdapterSpec
from tests.support.backends_available import require_backend
from tests.support.covering import TINY
from tests.support.quantized import quantized_weights
from tests.support.tolerances import FLOAT32, FLOAT32_GRADIENT, FLOAT32_TRAINING, assert_all_close, assert_close
from tests.support.twins import B, D, H, M, N, T, V, normal

(PATH,) = (path for path in TINY if path.stem == "adapter")
R = 3

FORMS = {
    "one input axis": ("BTD,DNH->BTNH", (B, T, D), (D,), (N, H)),
    "two input axes": ("BTNH,NHD->BTD", (B, T, N, H), (N, H), (D,)),
    "any leading axes": ("...D,DF->...F", (B, T, D), (D,), (M,)),
    "from outputs": ("BTD,VD->BTV", (B, T, D), (V,), (D,)),
    "absorbed key": ("BTNH,ZNH->BTNZ", (B, T, N, H), (M,), (N, H)),
    "absorbed value": ("BTNZ,ZNH->BTNH", (B, T, N, M), (M,), (N, H)),
}


def adapted(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> reference.AdaptedArray:
    factors = normal(1, *inputs, R), normal(2, R, *outputs)
    return reference.AdaptedArray(normal(0, *inputs, *outputs), *factors, 1.5, 0.0, None)


def on_device(twin, w: reference.AdaptedArray):
    arrays = (twin.array(value) for value in (w.base, w.lora_a, w.lora_b))
    return twin.module("adapter").AdaptedArray(*arrays, w.scale, w.dropout, None)


@pytest.mark.parametrize("form", FORMS)
def test_adapted_product_is_that_of_the_merged_matrix(twin, form):
    subscripts, of_x, inputs, outputs = FORMS[form]
    x, w = normal(3, *of_x), adapted(inputs, outputs)
    expected = np.einsum(subscripts, x, reference.merged(w))
    np.testing.assert_allclose(reference.einsum(subscripts, x, w), expected, rtol=1e-12, atol=1e-12)
    einsum = twin.module("kernels.projection").einsum
    assert_close(twin.numpy(einsum(subscripts, twin.array(x), on_device(twin, w))), expected, FLOAT32)


def test_rows_of_an_adapted_embedding_are_those_of_the_merged_matrix(twin):
    w, index = adapted((V,), (D,)), np.array([[0, 5, 5], [30, 1, 2]])
    expected = reference.merged(w)[index]
    np.testing.assert_allclose(reference.take(w, index), expected, rtol=1e-12, atol=1e-12)
    assert_close(twin.numpy(twin.module("adapter").take(on_device(twin, w), twin.array(index))), expected, FLOAT32)


def test_one_matrix_of_a_stack_is_merged_as_all_are():
    stack = reference.AdaptedArray(normal(0, 7, D, M), normal(1, 7, D, R), normal(2, 7, R, M), 0.5, 0.0, None)
    np.testing.assert_allclose(reference.merged(stack)[4], reference.merged(stack[4]), rtol=1e-12)


def test_new_adapter_changes_no_logit(twin):
    """B is zero: the base's products are the same bits, and what is added is zero."""
    spec = with_vocab_size(load_config(PATH), V).model
    plain = spec.model_copy(update={"adapter": None})
    weights = initial_weights(spec, 0)
    tokens = np.random.default_rng(0).integers(0, V, (2, 40)).astype(np.int32)
    backend = twin.backend()
    logits = backend.build(spec, weights).forward(tokens).logits
    base = {row.name: weights[row.name] for row in parameter_table(plain)}
    np.testing.assert_array_equal(logits, backend.build(plain, base).forward(tokens).logits)


# --- configs ---------------------------------------------------------------------------------------------------------


def test_factors_follow_their_matrix_in_the_table():
    rows = {row.name: row for row in parameter_table(with_vocab_size(load_config(PATH), V).model)}
    a, b = (rows[f"layers.1.moe.experts.w_down.lora_{factor}"] for factor in "ab")
    assert (a.shape, b.shape) == ((7, 24, R), (7, R, 32))
    assert (a.axes, b.axes) == (("expert", "hidden", "rank"), ("expert", "rank", "embed"))
    assert a.base == b.base == "layers.1.moe.experts.w_down"
    assert a.role == "routed experts"
    assert a.initializer.value == pytest.approx(24**-0.5)
    a, b = (rows[f"layers.0.attention.w_output.lora_{factor}"] for factor in "ab")
    assert (a.shape, b.shape) == ((4, 8, R), (R, 32))
    assert {row.base for row in rows.values() if row.base} == {
        name for name, row in rows.items() if row.matrix is not None and row.base is None
    }


def test_section_at_the_top_is_a_part_of_the_model_and_overrides_it():
    config = load_config(PATH, ["adapter.rank=2"])
    assert config.model.adapter is not None
    assert (config.model.adapter.rank, config.model.adapter.scale) == (2, 1.5)
    assert load_config(PATH, ["adapter=null"]).model.adapter is None
    saved = PATH.read_text().replace("adapter:", "\n\nadapter:")
    assert parse_config(saved, overrides=["model.adapter.rank=4"]).model.adapter.scale == 1.5
    assert "adapter" in json_schema()["properties"]


def test_adapter_without_roles_is_on_those_of_the_default_that_the_model_has():
    spec = load_config(PATH, ["adapter.on=null"]).model
    assert spec.adapted_roles == ("attention", "experts", "shared", "dense")
    first = spec.model_copy(update={"adapter": AdapterSpec(layers=(0,))})
    assert first.adapted_roles == ("attention", "dense")
    assert spec.model_copy(update={"adapter": None}).adapted_roles == ()


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("adapter.layers=[0]", "model.adapter.on has experts, of which layers 0 has no matrix"),
        ("adapter.layers=[2]", "model.adapter.layers has 2, but the last layer is 1"),
        ("adapter.layers=[]", "model.adapter.layers is empty"),
        ("adapter.on=[router,router]", "model.adapter.on names the same one twice"),
        ("adapter.on=[expert]", "model.adapter.on[0] is 'expert'"),
        ("adapter.dropout=0.1", "model.adapter.dropout is 0.1, but adapters of experts have none"),
        ("model.head={kind: tied}", "model.adapter.on has head, but the head is tied to the embedding"),
    ],
)
def test_adapter_of_what_the_model_does_not_have_is_refused(override, problem):
    with pytest.raises(SpecError) as error:
        load_config(PATH, [override])
    assert str(error.value).startswith(problem)
    assert "\n" not in str(error.value)


def test_rank_above_a_matrix_is_refused_with_its_name():
    spec = with_vocab_size(load_config(PATH, ["adapter.rank=8"]), V).model
    with pytest.raises(
        SpecError, match=r"^model.adapter.rank is 8, but layers.1.moe.router.w_router \[32, 7\] has rank 7"
    ):
        parameter_table(spec)


# --- over codes ------------------------------------------------------------------------------------------------------

SIZES = ["model.layers[0].feed_forward.hidden_dim=64", "model.layers[1].moe.experts.hidden_dim=32"]
AFFINE, MXFP4 = QuantizationFormat("affine", 4, 32), QuantizationFormat("mxfp4", 4, 32)


@pytest.mark.parametrize("length", [6, pytest.param(40, marks=pytest.mark.release)])
@pytest.mark.parametrize("format", [AFFINE, pytest.param(MXFP4, marks=pytest.mark.release)], ids=str)
def test_gradients_over_codes_are_those_over_the_numbers_that_they_stand_for(twin, format, length):
    """Of A and B on every kind of matrix; codes have none, and a step leaves them as they are."""
    config = with_vocab_size(load_config(PATH, SIZES), V)
    spec, names = config.model, factors_of(config.model)
    weights = quantized_weights(initial_weights(spec, 0, active_adapters=True), format)
    numbers = {name: value if isinstance(value, np.ndarray) else value.values() for name, value in weights.items()}
    assert {"layers.1.moe.experts.w_down", "layers.0.attention.w_output"} <= {
        name for name, value in weights.items() if value is not numbers[name]
    }
    window = np.random.default_rng(0).integers(0, V, (2, length + 1)).astype(np.int32)
    tokens, targets = window[:, :-1], window[:, 1:]
    doubles = {name: value.astype(np.float64) for name, value in numbers.items()}
    _, expected = loss_and_gradients(spec, doubles, tokens, targets)
    model = twin.backend().build(spec, weights)
    _, gradients = model.loss_and_gradients(tokens, targets, trained=names)
    assert_all_close(gradients, {name: expected[name] for name in names}, FLOAT32_GRADIENT)
    if length == 40 or twin.name == "mlx":  # another program for JAX to compile
        model.start_training(config.optimizer, trained=names)
        model.train_step(window[None], 1e-2).fetch()
        after = model.export_parameters()
        assert {name for name in numbers if not np.array_equal(after[name], numbers[name])} == names


def in_mixed_codes(config):
    """Weights of three layers with experts, of which the first has other codes."""
    initial = initial_weights(config.model, 0, active_adapters=True)
    affine, mxfp4 = quantized_weights(initial, AFFINE), quantized_weights(initial, MXFP4)
    return affine | {name: value for name, value in mxfp4.items() if name.startswith("layers.1.")}


THREE = [*SIZES, "model.layers[1].repeat=3"]


def test_layers_with_equal_codes_are_stacked_and_saved_as_they_were():
    require_backend("jax")
    config = with_vocab_size(load_config(PATH, THREE), V)
    weights = in_mixed_codes(config)
    model = load_backend("jax").build(config.model, weights)
    model.start_training(config.optimizer, trained=factors_of(config.model), layers="scanned")
    assert {name.split(".")[1] for name in model._parameters if name.startswith("layers.")} == {"0", "1", "2-3"}
    exported = model.export_parameters()
    for name, value in weights.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(exported[name], value, err_msg=name)
        else:
            np.testing.assert_array_equal(exported.stored(name).codes, value.codes, err_msg=name)
            assert exported.stored(name).format == value.format


@pytest.mark.release
@pytest.mark.parametrize("rematerialize", ["none", "block"])
def test_layers_in_codes_are_scanned_like_unrolled_ones(rematerialize):
    require_backend("jax")
    config = with_vocab_size(load_config(PATH, THREE), V)
    weights, names = in_mixed_codes(config), factors_of(config.model)
    window = np.random.default_rng(0).integers(0, V, (2, 2, 7)).astype(np.int32)
    models, losses = [], []
    for layers, how in (("unrolled", "none"), ("scanned", rematerialize)):
        model = load_backend("jax").build(config.model, weights)
        model.start_training(config.optimizer, trained=names, layers=layers, rematerialize=how)
        losses.append([model.train_step(window, 1e-2).fetch().losses["loss"] for _ in range(2)])
        models.append(model)
    unrolled, scanned = models
    assert_close(losses[1], losses[0], FLOAT32_TRAINING)
    assert_all_close(scanned.export_optimizer(), unrolled.export_optimizer(), FLOAT32_TRAINING)
    assert_all_close(dict(scanned.export_parameters()), dict(unrolled.export_parameters()), FLOAT32_TRAINING)
    assert scanned.nonfinite_parameters() == []


def factors_of(spec):
    return frozenset(row.name for row in parameter_table(spec) if row.base is not None)
