import numpy as np
import pytest

from moezoo.core.config import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.feed_forward import feed_forward
from moezoo.core.reference.moe import moe
from moezoo.core.spec import CapacitySpec, GatedFeedForwardSpec, MoESpec, RouterSpec, SharedExpertsSpec
from tests.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, FLOAT64, assert_all_close, assert_close
from tests.twins import B, D, E, F, K, P, T, Twin, assert_layer_matches, assert_reference_gradient, normal

X_BTD = normal(0, B, T, D)
EXPERTS = GatedFeedForwardSpec(hidden_dim=F)
SPECS = {
    "top 2": MoESpec(num_experts=E, router=RouterSpec(top_k=K), experts=EXPERTS),
    "unnormalized": MoESpec(num_experts=E, router=RouterSpec(top_k=K, renormalize="none"), experts=EXPERTS),
    "top 1": MoESpec(num_experts=E, router=RouterSpec(top_k=1, renormalize="none"), experts=EXPERTS),
    "capacity": MoESpec(num_experts=E, router=RouterSpec(top_k=K), experts=EXPERTS, dispatch=CapacitySpec(factor=0.6)),
    "shared": MoESpec(
        num_experts=E,
        router=RouterSpec(top_k=K),
        experts=EXPERTS,
        shared=SharedExpertsSpec(num_experts=2, hidden_dim=9),
    ),
}


def values_of(spec: MoESpec) -> dict[str, np.ndarray]:
    values = {
        "router.w_router": 0.5 * normal(1, D, E),
        "experts.w_gate": 0.3 * normal(2, E, D, F),
        "experts.w_up": 0.3 * normal(3, E, D, F),
        "experts.w_down": 0.3 * normal(4, E, F, D),
    }
    if spec.shared is not None:
        hidden = spec.shared.num_experts * spec.shared.hidden_dim
        values |= {
            "shared.w_gate": 0.3 * normal(5, D, hidden),
            "shared.w_up": 0.3 * normal(6, D, hidden),
            "shared.w_down": 0.3 * normal(7, hidden, D),
        }
    return values


def layer_of(twin: Twin, spec: MoESpec, values=None):
    return twin.module("moe").MoE(spec, twin.weights(values_of(spec) if values is None else values))


def output(twin: Twin, spec: MoESpec, x_BTD=X_BTD, values=None, **options) -> np.ndarray:
    return twin.numpy(layer_of(twin, spec, values)(twin.array(x_BTD), **options)[0])


def all_to_expert(chosen: int) -> dict[str, np.ndarray]:
    """Values that send every token to one expert; its tokens' first feature must be 1."""
    values = values_of(SPECS["top 1"])
    w_router = np.zeros((D, E))
    w_router[0, chosen] = 5.0
    return values | {"router.w_router": w_router}


@pytest.mark.parametrize("kind", SPECS)
def test_value_and_gradients_match_the_reference(twin, kind):
    spec = SPECS[kind]
    assert_layer_matches(
        twin,
        layer_of(twin, spec),
        lambda layer, x: layer(x)[0],
        lambda values, x: moe(spec, values, x)[0],
        values_of(spec),
        X_BTD,
    )


def test_bfloat16_is_near_float32(twin):
    """With forced experts: a rounding may not decide who computes."""
    spec = SPECS["shared"]
    forced_PK = moe(spec, values_of(spec), X_BTD)[1].expert_PK
    on_device = twin.array(forced_PK)
    assert_layer_matches(
        twin,
        layer_of(twin, spec),
        lambda layer, x: layer(x, forced_PK=on_device)[0],
        lambda values, x: moe(spec, values, x, forced_PK=forced_PK)[0],
        values_of(spec),
        X_BTD,
        dtype="bfloat16",
        tolerance=BFLOAT16,
        gradient_tolerance=BFLOAT16_GRADIENT,
    )


@pytest.mark.parametrize("kind", ["top 2", "unnormalized", "top 1"])
def test_each_token_gets_the_weighted_sum_of_its_experts(twin, kind):
    spec, values = SPECS[kind], values_of(SPECS[kind])
    _, routing = moe(spec, values, X_BTD)
    x_PD, expected = X_BTD.reshape(P, D), np.zeros((P, D))
    for p in range(P):
        for expert, weight in zip(routing.expert_PK[p], routing.weight_PK[p], strict=True):
            own = {name: values[f"experts.{name}"][expert] for name in ("w_gate", "w_up", "w_down")}
            expected[p] += weight * feed_forward(EXPERTS, own, x_PD[p])
    assert_close(output(twin, spec).reshape(P, D), expected, FLOAT32)
    assert_close(moe(spec, values, X_BTD)[0].reshape(P, D), expected, FLOAT64)


@pytest.mark.parametrize("kind", ["top 2", "capacity"])
def test_permuting_experts_changes_nothing_visible(twin, kind):
    spec, order = SPECS[kind], np.array([3, 0, 6, 2, 5, 1, 4])
    values = values_of(spec)
    permuted = {name: value[:, order] if "router" in name else value[order] for name, value in values.items()}
    assert_close(output(twin, spec, values=permuted), output(twin, spec, values=values), FLOAT32)


def test_equal_experts_are_one_dense_feed_forward(twin):
    values = values_of(SPECS["top 2"])
    equal = {name: np.repeat(value[:1], E, axis=0) if "experts" in name else value for name, value in values.items()}
    dense = {name: values[f"experts.{name}"][0] for name in ("w_gate", "w_up", "w_down")}
    assert_close(output(twin, SPECS["top 2"], values=equal), feed_forward(EXPERTS, dense, X_BTD), FLOAT32)


def test_dropped_token_gets_exactly_nothing_and_no_other_tokens_output(twin):
    """All 15 tokens ask for expert 5, which serves ceil(1.0 * 15 / 7) = 3. A clamped index would answer the others."""
    x_BTD = X_BTD.copy()
    x_BTD[..., 0] = 1.0
    spec = MoESpec(
        num_experts=E,
        router=RouterSpec(top_k=1, renormalize="none"),
        experts=EXPERTS,
        dispatch=CapacitySpec(factor=1.0),
    )
    out = output(twin, spec, x_BTD, all_to_expert(5)).reshape(P, D)
    assert np.all(np.max(np.abs(out[:3]), axis=-1) > 1e-3)
    np.testing.assert_array_equal(out[3:], 0)
    dropless = output(twin, spec, x_BTD, all_to_expert(5), inference=True).reshape(P, D)
    assert np.all(np.max(np.abs(dropless), axis=-1) > 1e-3)


def test_dropped_token_moves_no_parameter(twin):
    """The gradient of the dropped tokens' outputs is zero everywhere."""
    x_BTD = X_BTD.copy()
    x_BTD[..., 0] = 1.0
    spec = MoESpec(num_experts=E, router=RouterSpec(top_k=1), experts=EXPERTS, dispatch=CapacitySpec(factor=1.0))
    probe = normal(9, P, D)
    probe[:3] = 0
    _, named, (x_gradient,) = twin.value_and_gradients(
        lambda layer, x: layer(x)[0].reshape(P, D), probe, layer_of(twin, spec, all_to_expert(5)), twin.array(x_BTD)
    )
    for name, gradient in named.items():
        np.testing.assert_array_equal(gradient, 0, err_msg=name)
    np.testing.assert_array_equal(x_gradient, 0)


def test_shared_experts_are_added_to_the_routed_ones(twin):
    """And the sum of two experts of width 9 is one feed-forward of width 18."""
    spec, values = SPECS["shared"], values_of(SPECS["shared"])
    routed = output(twin, SPECS["top 2"], values={name: v for name, v in values.items() if "shared" not in name})
    halves = [
        {
            "w_gate": values["shared.w_gate"][:, part],
            "w_up": values["shared.w_up"][:, part],
            "w_down": values["shared.w_down"][part],
        }
        for part in (slice(0, 9), slice(9, 18))
    ]
    expected = routed + sum(feed_forward(EXPERTS, half, X_BTD) for half in halves)
    assert_close(output(twin, spec), expected, FLOAT32)


def test_forced_experts_are_used(twin):
    spec = SPECS["top 2"]
    forced_PK = np.random.default_rng(3).permuted(np.tile(np.arange(E), (P, 1)), axis=1)[:, :K]
    expected = moe(spec, values_of(spec), X_BTD, forced_PK=forced_PK)[0]
    assert_close(output(twin, spec, forced_PK=twin.array(forced_PK)), expected, FLOAT32)


def test_record_holds_the_same_names_and_values_as_the_references(twin):
    expected, actual = {}, {}
    moe(SPECS["shared"], values_of(SPECS["shared"]), X_BTD, record=expected, name="here")
    layer_of(twin, SPECS["shared"])(twin.array(X_BTD), record=actual, name="here")
    assert list(actual) == list(expected) == ["here.router.logits", "here.router.weight", "here.routed"]
    assert_all_close({name: twin.numpy(value) for name, value in actual.items()}, expected, FLOAT32)


@pytest.mark.parametrize("kind", ["shared", "capacity"])
def test_reference_gradient_agrees_with_finite_differences(kind):
    spec, values = SPECS[kind], values_of(SPECS[kind])
    moved = ("router.w_router",)
    assert_reference_gradient(
        lambda x, *some: moe(spec, values | dict(zip(moved, some, strict=True)), x)[0],
        X_BTD,
        *(values[name] for name in moved),
    )


def test_a_misspelled_key_is_refused_with_the_nearest_known_one():
    raw = {"num_expert": E, "router": {"top_k": K}, "experts": {"hidden_dim": F}}
    with pytest.raises(SpecError, match=r"num_expert is not a known key; did you mean num_experts\?"):
        validate(MoESpec, raw, "config")
