import numpy as np
import pytest

from moezoo.core import random
from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.parameters.moe import moe_rows
from moezoo.core.parameters.row import Rows
from moezoo.core.reference import inside
from moezoo.core.reference.choice import RoutingContext
from moezoo.core.reference.dispatch import dispatch
from moezoo.core.reference.feed_forward import feed_forward
from moezoo.core.reference.moe import moe
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.routing import jittered_input
from moezoo.core.spec import (
    CapacitySpec,
    ClampedSwiGLUSpec,
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    JitterSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    ParallelFeedForwardSpec,
    PlainFeedForwardSpec,
    RMSNormSpec,
    RouterSpec,
    SharedExpertsSpec,
    ZeroComputationSpec,
)
from tests.support.tolerances import (
    BFLOAT16,
    BFLOAT16_GRADIENT,
    EXACT,
    FLOAT32,
    FLOAT64,
    assert_all_close,
    assert_close,
)
from tests.support.twins import B, D, E, F, K, P, T, Twin, V, assert_layer_matches, assert_reference_gradient, normal

KEY = random.key(6)
X_BTD, RAW_BTD = normal(0, B, T, D), normal(20, B, T, D)
EXPERTS = GatedFeedForwardSpec(hidden_dim=F)
ZERO = ZeroComputationSpec(num_zero=1, num_copy=2, num_constant=3, ffn_share=0.75)
ON_INPUT = RouterSpec(top_k=K, score="sigmoid", renormalize="none", apply_to="input")


def moe_of(**options) -> MoESpec:
    return MoESpec(**{"num_experts": E, "router": RouterSpec(top_k=K), "experts": EXPERTS} | options)


SPECS = {
    "top 2": moe_of(),
    "unnormalized": moe_of(router=RouterSpec(top_k=K, renormalize="none")),
    "top 1": moe_of(router=RouterSpec(top_k=1, renormalize="none")),
    "capacity": moe_of(dispatch=CapacitySpec(factor=0.6)),
    "capacity by score": moe_of(dispatch=CapacitySpec(factor=0.6, priority="score")),
    "capacity of sequences": moe_of(dispatch=CapacitySpec(factor=0.6, group="sequence")),
    "shared": moe_of(shared=SharedExpertsSpec(num_experts=2, hidden_dim=9)),
    "shared behind a gate": moe_of(shared=SharedExpertsSpec(kind="sigmoid_gated", num_experts=2, hidden_dim=9)),
    "shared average": moe_of(shared=SharedExpertsSpec(kind="average", num_experts=2, hidden_dim=9)),
    "shared, not clamped": moe_of(
        experts=ClampedSwiGLUSpec(hidden_dim=F, limit=0.5), shared=SharedExpertsSpec(hidden_dim=9, activation="swiglu")
    ),
    "shared, bounded otherwise": moe_of(
        experts=GatedFeedForwardSpec(hidden_dim=F, limit=0.3),
        shared=SharedExpertsSpec(hidden_dim=9, activation="swiglu", limit=0.2),
    ),
    "shared, with biases alone": moe_of(shared=SharedExpertsSpec(hidden_dim=9, bias=True, activation="exact_geglu")),
    "parallel": moe_of(shared=ParallelFeedForwardSpec(feed_forward=PlainFeedForwardSpec(kind="relu", hidden_dim=9))),
    "weight on input": moe_of(router=ON_INPUT, dispatch=CapacitySpec(factor=0.6)),
    "output norm": moe_of(shared=SharedExpertsSpec(hidden_dim=9), output_norm=RMSNormSpec()),
    "latent": moe_of(latent_dim=11, latent_bias=True, shared=SharedExpertsSpec(hidden_dim=9)),
    "latent, weight on input": moe_of(latent_dim=11, router=ON_INPUT),
    "without computation": moe_of(zero_computation=ZERO),
    "without computation, capacity": moe_of(zero_computation=ZERO, dispatch=CapacitySpec(factor=0.7), latent_dim=11),
    "copies": moe_of(num_experts=2, zero_computation=ZeroComputationSpec(num_copy=3)),
}


def noisy_mixture(kind: str) -> MoESpec:
    jitter = JitterSpec(of="mixture", amount=0.3)
    return SPECS[kind].model_copy(update={"router": RouterSpec(top_k=K, jitter=jitter)})


def values_of(spec: MoESpec) -> dict[str, np.ndarray]:
    """Every parameter that the table has for the mixture; scales of norms are near one."""
    attention = GroupedQueryAttentionSpec(num_heads=1, num_kv_heads=1, head_dim=2)
    rows = Rows(ModelSpec(vocab_size=V, embed_dim=D, layers=(LayerSpec(attention=attention, moe=spec),)))
    return {
        row.name.removeprefix("moe."): (0.3 if len(row.shape) > 1 else 1.0 + 0.1) * normal(seed + 1, *row.shape)
        for seed, row in enumerate(moe_rows(rows, "moe", spec, None))
    }


def layer_of(twin: Twin, spec: MoESpec, values=None):
    return twin.module("moe").MoE(spec, twin.weights(values_of(spec) if values is None else values))


def context_of(twin: Twin, **fields):
    """A backend's routing context, arrays from NumPy."""
    on_device = {name: value if isinstance(value, bool) else twin.array(value) for name, value in fields.items()}
    return twin.module("choice").RoutingContext(**on_device)


def output(twin: Twin, spec: MoESpec, x_BTD=X_BTD, values=None, raw_BTD=None, **context) -> np.ndarray:
    raw_BTD = None if raw_BTD is None else twin.array(raw_BTD)
    layer = twin.compiled(layer_of(twin, spec, values))
    return twin.numpy(layer(twin.array(x_BTD), context_of(twin, **context), raw_BTD=raw_BTD)[0])


def assert_bfloat16_is_near_float32(twin: Twin, spec: MoESpec, x_BTD: np.ndarray) -> None:
    """With forced experts: a rounding may not decide who computes."""
    forced_PK = moe(spec, values_of(spec), x_BTD)[1].expert_PK
    on_device = context_of(twin, forced_PK=forced_PK)
    assert_layer_matches(
        twin,
        layer_of(twin, spec),
        lambda layer, x: layer(x, on_device)[0],
        lambda values, x: moe(spec, values, x, RoutingContext(forced_PK=forced_PK))[0],
        values_of(spec),
        x_BTD,
        dtype="bfloat16",
        tolerance=BFLOAT16,
        gradient_tolerance=BFLOAT16_GRADIENT,
    )


def all_to_expert(chosen: int) -> dict[str, np.ndarray]:
    """Values that send every token to one expert; its tokens' first feature must be 1."""
    values = values_of(SPECS["top 1"])
    w_router = np.zeros((D, E))
    w_router[0, chosen] = 5.0
    return values | {"router.w_router": w_router}


@pytest.mark.parametrize("kind", SPECS)
def test_value_and_gradients_match_the_reference(twin, kind):
    spec = SPECS[kind]
    inputs = {"x_BTD": X_BTD} | ({"raw_BTD": RAW_BTD} if kind == "parallel" else {})
    assert_layer_matches(
        twin,
        layer_of(twin, spec),
        lambda layer, *arrays: layer(**dict(zip(inputs, arrays, strict=True)))[0],
        lambda values, *arrays: moe(spec, values, **dict(zip(inputs, arrays, strict=True)))[0],
        values_of(spec),
        *inputs.values(),
    )


@pytest.mark.parametrize("kind", ["shared behind a gate", "parallel", "weight on input", "without computation"])
def test_bfloat16_is_near_float32(twin, kind):
    assert_bfloat16_is_near_float32(twin, SPECS[kind], X_BTD)


@pytest.mark.parametrize("kind", ["shared", "parallel"])
def test_jitter_of_the_mixture_reaches_all_who_look_at_a_token(twin, kind):
    """Router, routed and shared experts see the same noisy token: as if it had come so."""
    spec, noise = noisy_mixture(kind), RoutingContext(key=KEY)
    inputs = {"x_BTD": X_BTD} | ({"raw_BTD": RAW_BTD} if kind == "parallel" else {})
    assert_layer_matches(
        twin,
        layer_of(twin, spec),
        lambda layer, *arrays: layer(**dict(zip(inputs, arrays, strict=True)), context=context_of(twin, key=KEY))[0],
        lambda values, *arrays: moe(spec, values, **dict(zip(inputs, arrays, strict=True)), context=noise)[0],
        values_of(spec),
        *inputs.values(),
    )
    noise_BTD = jittered_input(spec.router, np.ones((P, D)), KEY).reshape(X_BTD.shape)
    assert 0.69 < noise_BTD.min() < 0.72
    assert 1.28 < noise_BTD.max() < 1.31
    expected = moe(SPECS[kind], values_of(spec), **{name: value * noise_BTD for name, value in inputs.items()})[0]
    assert_close(moe(spec, values_of(spec), **inputs, context=noise)[0], expected, FLOAT64)


def test_jitter_of_the_mixture_needs_a_key_and_keeps_bfloat16(twin):
    spec = noisy_mixture("shared")
    assert_close(output(twin, spec), output(twin, SPECS["shared"]), EXACT)
    layer = twin.compiled(layer_of(twin, spec))
    assert "bfloat16" in str(layer(twin.array(X_BTD, "bfloat16"), context_of(twin, key=KEY))[0].dtype)


def output_of(spec: MoESpec, values, choice: int, weight: float, x_D: np.ndarray) -> np.ndarray:
    """What one chosen expert adds to one token, by the definition."""
    if choice < E:
        own = {name: value[choice] for name, value in inside(values, "experts").items()}
        before, behind = (1.0, weight) if spec.router.apply_to == "output" else (weight, 1.0)
        if spec.latent_dim is None:
            return behind * feed_forward(spec.experts, own, before * x_D)
        return behind * feed_forward(spec.experts, own, before * x_D @ values["w_latent"]) @ values["w_output"]
    if choice < E + ZERO.num_zero:
        return np.zeros(D)
    if choice < E + ZERO.num_zero + ZERO.num_copy:
        return weight * x_D
    constant = choice - E - ZERO.num_zero - ZERO.num_copy
    shares = np.exp(x_D @ values["constant_experts.w_mix"][constant])
    shares = shares / shares.sum()
    return weight * (shares[0] * x_D + shares[1] * values["constant_experts.constant"][constant])


@pytest.mark.parametrize(
    "kind", [kind for kind, spec in SPECS.items() if spec.shared is None and spec.num_experts == E]
)
def test_each_token_gets_the_weighted_sum_of_its_experts(twin, kind):
    spec, values = SPECS[kind], values_of(SPECS[kind])
    _, routing = moe(spec, values, X_BTD)
    kept_PK = dispatch(spec, routing, num_sequences=B).kept_PK
    assert kept_PK.all() == ("capacity" not in kind and kind != "weight on input")
    x_PD, expected = X_BTD.reshape(P, D), np.zeros((P, D))
    for p, choice in np.argwhere(kept_PK):
        expected[p] += output_of(spec, values, routing.expert_PK[p, choice], routing.weight_PK[p, choice], x_PD[p])
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


@pytest.mark.parametrize("kind", ["shared", "shared behind a gate", "shared average"])
def test_shared_experts_are_put_together_with_the_routed_ones(twin, kind):
    """And the sum of two experts of width 9 is one feed-forward of width 18."""
    spec, values = SPECS[kind], values_of(SPECS[kind])
    routed = output(twin, SPECS["top 2"], values={name: v for name, v in values.items() if "shared" not in name})
    shared = 0.0
    for part in (slice(0, 9), slice(9, 18)):
        half = {name: values[f"shared.{name}"][:, part] for name in ("w_gate", "w_up")}
        shared = shared + feed_forward(EXPERTS, half | {"w_down": values["shared.w_down"][part]}, X_BTD)
    match kind:
        case "shared":
            expected = routed + shared
        case "shared behind a gate":
            expected = routed + shared / (1 + np.exp(-X_BTD @ values["w_shared_gate"]))
        case _:
            expected = 0.5 * routed + 0.5 * shared
    assert_close(output(twin, spec), expected, FLOAT32)


def test_parallel_feed_forward_is_normed_and_the_routed_experts_start_before_the_layers_norm(twin):
    spec, values = SPECS["parallel"], values_of(SPECS["parallel"])
    part, named = spec.shared, lambda which: inside(values, f"{which}_norm")
    dense = normalize(
        part.norm, named("shared_output"), feed_forward(part.feed_forward, inside(values, "shared"), X_BTD)
    )
    without = moe_of()
    routing = moe(without, values, RAW_BTD)[1]  # the router sees no norm at all
    forced = RoutingContext(forced_PK=routing.expert_PK)
    routed = moe(without, values, normalize(part.norm, named("routed_input"), RAW_BTD), forced)[1]
    np.testing.assert_array_equal(routed.expert_PK, routing.expert_PK)
    expected = np.zeros((P, D))
    normed_PD = normalize(part.norm, named("routed_input"), RAW_BTD).reshape(P, D)
    for p, choice in np.argwhere(routing.valid_PK):
        expected[p] += output_of(
            without, values, routing.expert_PK[p, choice], routing.weight_PK[p, choice], normed_PD[p]
        )
    expected = dense + normalize(part.norm, named("routed_output"), expected).reshape(X_BTD.shape)
    assert_close(moe(spec, values, X_BTD, raw_BTD=RAW_BTD)[0], expected, FLOAT64)
    assert_close(output(twin, spec, raw_BTD=RAW_BTD), expected, FLOAT32)
    assert_close(output(twin, spec, raw_BTD=X_BTD), output(twin, spec), FLOAT32)


def test_experts_without_computation_get_no_row(twin):
    """Every token is sent to a zero and a copy expert: nothing is computed, and each gets its share of itself."""
    spec, values = SPECS["without computation"], values_of(SPECS["without computation"])
    forced_PK = np.tile([E, E + 2], (P, 1))
    layer = twin.compiled(layer_of(twin, spec, values))
    out, routing, dispatched = layer(twin.array(X_BTD), context_of(twin, forced_PK=forced_PK))
    assert twin.numpy(dispatched.size_E).sum() == 0
    weight_PK = twin.numpy(routing.weight_PK)
    assert_close(twin.numpy(out).reshape(P, D), weight_PK[:, 1:] * X_BTD.reshape(P, D), FLOAT32)
    zero = layer(twin.array(X_BTD), context_of(twin, forced_PK=np.tile([E, E], (P, 1))))[0]
    np.testing.assert_array_equal(twin.numpy(zero), 0)


def test_gradient_reaches_the_router_through_experts_without_computation(twin):
    """Nothing else is chosen, and the weights are scores: their sizes alone decide what comes out."""
    spec = moe_of(zero_computation=ZERO, router=RouterSpec(top_k=K, renormalize="none"))
    forced = context_of(twin, forced_PK=np.tile([E + 1, E + 4], (P, 1)))
    _, named, _ = twin.value_and_gradients(
        lambda layer, x: layer(x, forced)[0], normal(9, B, T, D), layer_of(twin, spec), twin.array(X_BTD)
    )
    assert np.max(np.abs(named["router.w_router"])) > 1e-3
    assert np.max(np.abs(named["constant_experts.w_mix"][1])) > 1e-3
    for name in ("experts.w_up", "experts.w_down"):
        np.testing.assert_array_equal(named[name], 0)
    np.testing.assert_array_equal(named["constant_experts.constant"][[0, 2]], 0)


def test_forced_experts_are_used(twin):
    spec = SPECS["top 2"]
    forced_PK = np.random.default_rng(3).permuted(np.tile(np.arange(E), (P, 1)), axis=1)[:, :K]
    expected = moe(spec, values_of(spec), X_BTD, RoutingContext(forced_PK=forced_PK))[0]
    assert_close(output(twin, spec, forced_PK=forced_PK), expected, FLOAT32)


def test_record_holds_the_same_names_and_values_as_the_references(twin):
    expected, names = {}, []
    moe(SPECS["shared"], values_of(SPECS["shared"]), X_BTD, record=expected, name="here")
    layer = layer_of(twin, SPECS["shared"])

    def recorded(x_BTD):
        record = {}
        layer(x_BTD, record=record, name="here")
        names.extend(record)
        return list(record.values())

    actual = dict(zip(names, twin.compiled_function(recorded)(twin.array(X_BTD)), strict=True))
    assert list(actual) == list(expected) == ["here.router.logits", "here.router.weight", "here.routed"]
    assert_all_close({name: twin.numpy(value) for name, value in actual.items()}, expected, FLOAT32)


@pytest.mark.parametrize(
    ("kind", "moved"),
    [
        ("capacity", ("router.w_router",)),
        ("capacity of sequences", ("router.w_router",)),
        ("shared behind a gate", ("w_shared_gate",)),
        ("parallel", ("routed_input_norm.scale", "routed_output_norm.scale", "shared_output_norm.scale")),
        ("latent", ("w_latent", "b_latent", "w_output")),
        ("without computation, capacity", ("router.w_router", "constant_experts.constant", "constant_experts.w_mix")),
    ],
)
def test_reference_gradient_agrees_with_finite_differences(kind, moved):
    """With forced experts: no step of a difference may decide who computes."""
    spec, values = SPECS[kind], values_of(SPECS[kind])
    forced = RoutingContext(forced_PK=moe(spec, values, X_BTD)[1].expert_PK)
    assert_reference_gradient(
        lambda x, *some: moe(spec, values | dict(zip(moved, some, strict=True)), x, forced)[0],
        X_BTD,
        *(values[name] for name in moved),
    )


def test_a_misspelled_key_is_refused_with_the_nearest_known_one():
    raw = {"num_expert": E, "router": {"top_k": K}, "experts": {"hidden_dim": F}}
    with pytest.raises(SpecError, match=r"num_expert is not a known key; did you mean num_experts\?"):
        validate(MoESpec, raw, "config")


def test_zero_computation_with_weighted_inputs_is_refused():
    raw = {
        "num_experts": E,
        "router": {"top_k": K, "apply_to": "input"},
        "experts": {"hidden_dim": F},
        "zero_computation": {"num_copy": 1},
    }
    with pytest.raises(SpecError, match=r"router.apply_to is input, but zero-computation experts have no input"):
        validate(MoESpec, raw, "config")
