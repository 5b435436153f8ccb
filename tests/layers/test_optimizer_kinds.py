"""Muon, Lion, Adafactor and SGD: each twin against the reference, one matrix at a time."""

from pathlib import Path

import numpy as np
import pytest

from moezoo.core.config.optimizers import (
    AdafactorConfig,
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
)
from moezoo.core.config.run_config import load_config
from moezoo.core.config.update_rules import UpdateRule, state_shapes, update_rules
from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.parameters import MatrixAxes, Parameter, parameter_table
from moezoo.core.parameters.row import ZEROS
from moezoo.core.reference.optimizer import newton_schulz, optimizer_step, zero_state
from moezoo.core.spec import ModelSpec, Part
from tests.support.tolerances import FLOAT32, FLOAT64, assert_all_close, assert_close
from tests.support.twins import D, E, F, H, N, Twin, V, normal

KINDS: dict[str, OptimizerConfig] = {
    "muon": MuonConfig(kind="muon", learning_rate=1.0, weight_decay=0.3, adamw={"epsilon": 1e-2}),
    "muon, original": MuonConfig(
        kind="muon", learning_rate=1.0, update_scale="original", nesterov=False, adamw={"learning_rate_scale": 0.1}
    ),
    "lion": LionConfig(kind="lion", learning_rate=1.0, weight_decay=0.3, beta1=0.7),
    "adafactor": AdafactorConfig(kind="adafactor", learning_rate=1.0, weight_decay=0.3, update_clip=0.7),
    "adafactor, absolute": AdafactorConfig(kind="adafactor", learning_rate=1.0, scale_by_parameter=False),
    "sgd": SGDConfig(kind="sgd", learning_rate=1.0, weight_decay=0.3),
    "sgd, nesterov": SGDConfig(kind="sgd", learning_rate=1.0, nesterov=True),
    "sgd, no momentum": SGDConfig(kind="sgd", learning_rate=1.0, momentum=0.0),
}


def row(name: str, shape: tuple[int, ...], matrix: MatrixAxes | None, role="attention") -> Parameter:
    return Parameter(name, shape, ("x",) * len(shape), ZEROS, matrix is not None, role, matrix=matrix)


TABLE = [
    row("query", (D, N, H), MatrixAxes(0, 1)),
    row("output", (N, H, D), MatrixAxes(0, 2)),
    row("experts", (E, D, F), MatrixAxes(1, 1), "routed experts"),
    row("gate", (D, 1), MatrixAxes(0, 1)),
    row("embedding", (V, D), MatrixAxes(0, 1), "embeddings"),
    row("router", (D, E), MatrixAxes(0, 1), "router"),
    row("bias", (N, H), None),
]
VALUES = {each.name: 0.1 * normal(place, *each.shape) for place, each in enumerate(TABLE)}
GRADIENTS = [
    {each.name: normal(100 * step + place, *each.shape) for place, each in enumerate(TABLE)} for step in (1, 2)
]
RATES = (0.03, 0.02)
TINY = Path(__file__).parents[2] / "configs" / "tiny"


def stepped(twin: Twin, rules: dict[str, UpdateRule], values, gradients, rates=RATES):
    """Parameters and state of a twin after steps with these gradients; the state by kind and name."""
    given = [{name: twin.array(value) for name, value in each.items()} for each in (values, *gradients)]
    made, parameters = twin.module("optimizer").make_optimizer(rules), given[0]
    if twin.name == "mlx":
        made.init(parameters)
        for rate, each in zip(rates, given[1:], strict=True):
            made.set_learning_rate(rate)
            parameters = made.apply_gradients(each, parameters)
        state = made.named_state()
    else:
        import jax

        state, update = made.init(parameters), jax.jit(made.update)
        for rate, each in zip(rates, given[1:], strict=True):
            parameters, state = update(parameters, each, state, np.float32(rate))
        state = {f"{kind}.{name}": value for kind, held in state.kept.items() for name, value in held.items()}
    return ({name: twin.numpy(value) for name, value in each.items()} for each in (parameters, state))


@pytest.mark.parametrize("kind", KINDS)
def test_two_updates_match_the_reference(twin, kind):
    config = KINDS[kind].model_copy(update={"clip_norm": None})
    rules = update_rules(config, TABLE)
    values, state = VALUES, zero_state(rules, VALUES)
    for update, (rate, gradients) in enumerate(zip(RATES, GRADIENTS, strict=True), start=1):
        values, state = optimizer_step(config, rules, values, gradients, state, learning_rate=rate, update=update)
    own, kept = stepped(twin, rules, VALUES, GRADIENTS)
    assert_all_close(own, values, FLOAT32)
    assert_all_close(kept, state, FLOAT32)
    assert {name: value.shape for name, value in kept.items()} == state_shapes(config, TABLE)


@pytest.mark.parametrize("kind", ["muon", "adafactor"])
def test_permuted_experts_have_permuted_updates_and_each_is_updated_as_if_it_were_alone(twin, kind):
    order = np.random.default_rng(0).permutation(E)
    rule = update_rules(KINDS[kind], TABLE)["experts"]
    values, gradients = VALUES["experts"], [each["experts"] for each in GRADIENTS]
    (together, _), (permuted, _) = (
        stepped(twin, {"w": rule}, {"w": values[places]}, [{"w": each[places]} for each in gradients])
        for places in (np.arange(E), order)
    )
    assert_close(permuted["w"], together["w"][order], FLOAT32)
    alone, _ = stepped(twin, {"w": rule}, {"w": values[3:4]}, [{"w": each[3:4]} for each in gradients])
    assert_close(alone["w"], together["w"][3:4], FLOAT32)
    assert np.min(np.max(np.abs(together["w"] - values), axis=(1, 2))) > 1e-3


def test_newton_schulz_keeps_singular_vectors_and_moves_values_to_one(twin):
    """Singular values from 1 to 1e-2 of the largest, of tall and wide matrices in a stack."""
    for shape in ((E, D, F), (E, F, D)):
        left, _, right = np.linalg.svd(normal(0, *shape), full_matrices=False)
        given = left * np.geomspace(1, 1e-2, D) @ right
        expected = newton_schulz(given, 5)
        assert_close(twin.numpy(twin.module("optimizer").newton_schulz(twin.array(given), 5)), expected, FLOAT32)
        inside = np.swapaxes(left, -1, -2) @ expected @ np.swapaxes(right, -1, -2)
        found = np.diagonal(inside, axis1=-2, axis2=-1)
        assert_close(inside, np.eye(D) * found[:, None, :], FLOAT64)
        assert np.all((found > 0.68) & (found < 1.21))


def test_an_expert_stack_as_one_matrix_would_mix_experts():
    """MLX's Muon makes one matrix E x (D F): then an expert's update depends on the others' gradients."""
    config = KINDS["muon"].model_copy(update={"clip_norm": None})
    own = update_rules(config, TABLE)["experts"]
    changed = GRADIENTS[0]["experts"] * np.where(np.arange(E) == 0, 5.0, 1.0)[:, None, None]
    moved = {}
    for matrix in (MatrixAxes(1, 1), MatrixAxes(0, 1)):
        rules = {"experts": UpdateRule(own.method, 1.0, 0.0, matrix)}
        after = [
            optimizer_step(
                config, rules, VALUES, {"experts": gradient}, zero_state(rules, VALUES), learning_rate=1.0, update=1
            )[0]["experts"]
            for gradient in (GRADIENTS[0]["experts"], changed)
        ]
        moved[matrix] = np.max(np.abs(after[1] - after[0]), axis=(1, 2))
    assert np.all(moved[MatrixAxes(1, 1)] < 1e-6)
    assert np.all(moved[MatrixAxes(0, 1)][1:] > 1e-3)


def test_muon_updates_matrices_inside_of_the_model_and_adamw_the_rest():
    config = KINDS["muon"]
    rules = update_rules(config, TABLE)
    muon = [name for name, rule in rules.items() if rule.method is config]
    assert muon == ["query", "output", "experts"]
    assert {rule.method for name, rule in rules.items() if name not in muon} == {config.adamw}
    assert rules["embedding"].weight_decay == 0.3
    assert rules["bias"].weight_decay == 0.0


def test_groups_have_their_own_learning_rate_and_decay(twin):
    """Each parameter moves as with a config of these numbers for all."""
    groups = [
        {"roles": ["router", "norms"], "learning_rate_scale": 0.1, "weight_decay": 0.0},
        {"roles": ["experts"], "learning_rate_scale": 2.0},
    ]
    table = [*TABLE, row("norm", (D,), None, "norms")]
    values = VALUES | {"norm": normal(9, D)}
    gradients = [{**each, "norm": normal(10, D)} for each in GRADIENTS]
    for kind in ("muon", "lion"):
        plain = KINDS[kind]
        grouped = type(plain).model_validate({**plain.model_dump(), "groups": groups})
        undecayed = plain.model_copy(update={"weight_decay": 0.0})
        found, _ = stepped(twin, update_rules(grouped, table), values, gradients)
        for config, factor, names in (
            (plain, 1.0, {"query", "output", "gate", "embedding", "bias"}),
            (undecayed, 0.1, {"router", "norm"}),
            (plain, 2.0, {"experts"}),
        ):
            rates = tuple(factor * rate for rate in RATES)
            expected, _ = stepped(twin, update_rules(config, table), values, gradients, rates)
            assert_all_close(*({name: each[name] for name in names} for each in (found, expected)), FLOAT32)


def test_groups_name_roles_that_are_trained_each_once():
    lion = {"kind": "lion", "learning_rate": 1.0}
    groups = [{"roles": ["router"]}, {"roles": ["shared", "router"]}]
    with pytest.raises(SpecError, match=r"^groups name router twice"):
        validate(LionConfig, {**lion, "groups": groups}, "config")
    with pytest.raises(SpecError, match=r"^groups\[0\].roles\[0\] is 'routers'; input should be 'attention'"):
        validate(LionConfig, {**lion, "groups": [{"roles": ["routers"]}]}, "config")
    config = validate(LionConfig, {**lion, "groups": groups[1:]}, "config")
    with pytest.raises(SpecError, match=r"^optimizer.groups\[0\].roles names shared, but no parameter of this role is"):
        update_rules(config, TABLE)


def test_no_matrix_of_the_table_is_two_projections():
    """Gate and up, and queries, keys and values, are parameters of their own: each is orthogonalized by itself."""
    for name in ("top_k", "latent_attention", "gated_delta", "clamped_swiglu", "layer_inputs_swiglu"):
        spec = load_config(TINY / f"{name}.yaml").model
        names = {each.name.rpartition(".") for each in parameter_table(spec.model_copy(update={"vocab_size": V}))}
        assert not any("gate_up" in leaf or "qkv" in leaf for _, _, leaf in names)
        gated = [module for module, _, leaf in names if leaf == "w_gate" and module.endswith(("experts", "shared"))]
        assert all((module, ".", "w_up") in names for module in gated), name


def test_state_is_counted_and_named_by_kind():
    spec = ModelSpec.model_validate(
        {
            "vocab_size": V,
            "embed_dim": D,
            "layers": [
                {
                    "attention": {"num_heads": N, "num_kv_heads": N, "head_dim": H},
                    "moe": {"num_experts": E, "router": {"top_k": 2}, "experts": {"hidden_dim": F}},
                }
            ],
        }
    )
    table = parameter_table(spec)
    shapes = {kind: state_shapes(config, table) for kind, config in KINDS.items()}
    trained = sum(each.size for each in table)
    experts = "layers.0.moe.experts.w_down"

    def numbers(kind: str) -> int:
        return sum(int(np.prod(shape)) for shape in shapes[kind].values())

    assert numbers("lion") == numbers("sgd") == trained
    assert numbers("sgd, no momentum") == 0
    assert trained < numbers("muon") < 2 * trained
    assert numbers("adafactor") < trained / 5
    assert shapes["adafactor"][f"second_moment_of_inputs.{experts}"] == (E, F)
    assert shapes["adafactor"][f"second_moment_of_outputs.{experts}"] == (E, D)
    assert shapes["adafactor"]["second_moment.final_norm.scale"] == (D,)
    assert f"second_moment.{experts}" not in shapes["muon"]


def test_an_optimizer_without_a_kind_is_adamw_and_an_unknown_kind_is_refused():
    class Section(Part):
        optimizer: OptimizerConfig

    assert isinstance(validate(Section, {"optimizer": {"learning_rate": 1e-3}}, "config").optimizer, AdamWConfig)
    with pytest.raises(SpecError, match=r"optimizer.kind is 'moun'.*muon"):
        validate(Section, {"optimizer": {"kind": "moun", "learning_rate": 1e-3}}, "config")
    with pytest.raises(SpecError, match=r"optimizer.momentum is not a known key"):
        validate(Section, {"optimizer": {"momentum": 0.9, "learning_rate": 1e-3}}, "config")
    sgd = {"kind": "sgd", "learning_rate": 1e-3, "momentum": 0, "nesterov": True}
    with pytest.raises(SpecError, match=r"optimizer.nesterov is true, but momentum is 0"):
        validate(Section, {"optimizer": sgd}, "config")
