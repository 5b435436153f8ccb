"""A single MoE layer, as a benchmark times it, computes what the MoE layer inside a model does."""

import numpy as np
import pytest

from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference import inside
from moezoo.core.reference.choice import RoutingContext
from moezoo.core.reference.moe import moe
from moezoo.core.spec import (
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    HashChoiceSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    RouterSpec,
    SelectionBiasSpec,
)
from tests.support.tolerances import FLOAT32, FLOAT32_GRADIENT, assert_all_close, assert_close
from tests.support.twins import B, D, E, F, K, T, V, normal, reference_gradients

ROUTERS = {
    "top k": RouterSpec(top_k=K),
    "state": RouterSpec(top_k=K, selection_bias=SelectionBiasSpec(rate=0.01)),
    "hash": RouterSpec(top_k=K, choice=HashChoiceSpec()),
}
TOKENS = np.random.default_rng(5).integers(0, V, (B, T), dtype=np.int32)


def model_of(router: RouterSpec) -> ModelSpec:
    attention = GroupedQueryAttentionSpec(num_heads=1, num_kv_heads=1, head_dim=2)
    dense = LayerSpec(attention=attention, feed_forward=GatedFeedForwardSpec(hidden_dim=F))
    layer = MoESpec(num_experts=E, router=router, experts=GatedFeedForwardSpec(hidden_dim=F))
    return ModelSpec(vocab_size=V, embed_dim=D, layers=(dense, LayerSpec(attention=attention, moe=layer)))


@pytest.mark.parametrize("name", ROUTERS)
def test_value_and_gradients_match_the_reference(twin, name):
    spec = model_of(ROUTERS[name])
    weights = {name: 10 * value for name, value in initial_weights(spec, 0).items() if name.startswith("layers.1.moe.")}
    if name == "hash":
        weights["layers.1.moe.router.hash_table"] /= 10
    x_BTD, gradient_BTD = normal(0, B, T, D), normal(1, B, T, D)
    layer = twin.backend().moe_layer(spec, 1, weights)
    on_device = [layer.array(values) for values in (x_BTD.astype(np.float32), TOKENS, gradient_BTD.astype(np.float32))]

    values = {name: value.astype(np.float64) for name, value in inside(weights, "layers.1.moe").items()}

    def reference(values, x_BTD):
        return moe(spec.layers[1].moe, values, x_BTD, RoutingContext(token_P=TOKENS.reshape(-1)))[0]

    assert_close(twin.numpy(layer.forward(*on_device[:2])), reference(values, x_BTD), FLOAT32)
    trained = {row.name.removeprefix("layers.1.moe.") for row in parameter_table(spec) if row.trained} & values.keys()
    state = {name: value for name, value in values.items() if name not in trained}
    named, (of_x,) = reference_gradients(
        lambda values, x_BTD: (reference({**values, **state}, x_BTD) * gradient_BTD).sum(),
        {name: values[name] for name in sorted(trained)},
        x_BTD,
    )
    actual_of_x, actual = layer.gradients(*on_device)
    assert_close(twin.numpy(actual_of_x), of_x, FLOAT32_GRADIENT)
    assert_all_close(
        {name: twin.numpy(value) for name, value in actual.items()},
        {f"layers.1.moe.{name}": value for name, value in named.items()},
        FLOAT32_GRADIENT,
    )


def test_gradients_leave_the_layer_unchanged(twin):
    spec = model_of(ROUTERS["top k"])
    layer = twin.backend().moe_layer(spec, 1, initial_weights(spec, 0))
    x, token = layer.array(normal(0, B, T, D).astype(np.float32)), layer.array(TOKENS)
    before = twin.numpy(layer.forward(x, token))
    layer.gradients(x, token, layer.array(normal(1, B, T, D).astype(np.float32)))
    assert np.array_equal(twin.numpy(layer.forward(x, token)), before)
