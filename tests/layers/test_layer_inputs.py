import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.layer_inputs import layer_input, layer_inputs
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import (
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerInputsSpec,
    LayerSpec,
    ModelSpec,
    RMSNormSpec,
)
from tests.support.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, assert_close
from tests.support.twins import B, D, F, H, M, N, T, V, assert_layer_matches, assert_reference_gradient, normal

L, Z = 3, 9
SPEC, NORM = LayerInputsSpec(dim=Z), RMSNormSpec(epsilon=1e-3)
X_BTD, INPUT_BTZ = normal(0, B, T, D), normal(1, B, T, Z)
TOKENS_BT = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
WHOLE = {"weight": normal(2, V, L, Z), "w_context": normal(3, D, L, Z), "norm.scale": normal(4, Z)}
OWN = {"w_gate": 0.3 * normal(5, D, Z), "w_output": 0.3 * normal(6, Z, D), "norm.scale": normal(7, D)}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_inputs_of_all_layers_match_the_reference(twin, dtype):
    tokens = twin.array(TOKENS_BT)
    tolerances = {} if dtype is None else {"tolerance": BFLOAT16, "gradient_tolerance": BFLOAT16_GRADIENT}
    assert_layer_matches(
        twin,
        twin.module("layer_inputs").LayerInputs(SPEC, NORM, twin.weights(WHOLE)),
        lambda layer, x: layer(tokens, x),
        lambda values, x: layer_inputs(SPEC, NORM, values, TOKENS_BT, x),
        WHOLE,
        X_BTD,
        dtype=dtype,
        **tolerances,
    )


@pytest.mark.parametrize("activation", ["geglu", "swiglu"])
def test_the_residual_update_of_a_layer_matches_the_reference(twin, activation):
    spec = LayerInputsSpec(dim=Z, activation=activation)
    assert_layer_matches(
        twin,
        twin.module("layer_inputs").LayerInput(spec, NORM, twin.weights(OWN)),
        lambda layer, x, own: layer(x, own),
        lambda values, x, own: layer_input(spec, NORM, values, x, own),
        OWN,
        X_BTD,
        INPUT_BTZ,
    )


def test_reference_gradients_agree_with_finite_differences():
    assert_reference_gradient(
        lambda x, w: layer_inputs(SPEC, NORM, WHOLE | {"w_context": w}, TOKENS_BT[:1, :2], x),
        X_BTD[:1, :2],
        WHOLE["w_context"],
    )
    assert_reference_gradient(lambda x, own: layer_input(SPEC, NORM, OWN, x, own), X_BTD[:1, :2], INPUT_BTZ[:1, :2])


def test_each_layer_gets_its_own_input(twin):
    """Also with a cache; and a layer with zero vectors adds nothing."""
    attention = GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H)
    layer = LayerSpec(repeat=L, attention=attention, feed_forward=GatedFeedForwardSpec(hidden_dim=F))
    spec = ModelSpec(vocab_size=V, embed_dim=D, layers=(layer,), layer_inputs=SPEC)
    weights = {name: 5 * value for name, value in initial_weights(spec, seed=0).items()}
    for name in ("weight", "w_context"):
        weights[f"layer_inputs.{name}"][:, 1] = 0
    model = twin.backend().build(spec, weights)
    output = model.forward(TOKENS_BT, record=True)
    expected = forward(spec, {name: value.astype(np.float64) for name, value in weights.items()}, TOKENS_BT)[0]
    assert_close(output.logits, expected, FLOAT32)
    added = [np.abs(output.intermediates[f"layers.{index}.layer_input"]).max() for index in range(L)]
    assert (added[0] > 0, added[1], added[2] > 0) == (True, 0, True)
    _, cache = model.prefill(TOKENS_BT[:, :-1], T)
    assert_close(model.decode(TOKENS_BT[:, -1], cache)[0], expected[:, -1], FLOAT32)


def test_an_unknown_activation_is_refused():
    with pytest.raises(SpecError, match=r"activation is 'relu'.*'swiglu' or 'geglu'"):
        validate(LayerInputsSpec, {"dim": 4, "activation": "relu"}, "config")
