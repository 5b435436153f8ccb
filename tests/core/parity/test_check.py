"""The parity check passes for both backends, and fails with the right name for a damaged one."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from moezoo.backends import load_backend
from moezoo.core.checkpoint.store import save_checkpoint
from moezoo.core.config.optimizers import AdamWConfig
from moezoo.core.config.run_config import dump_config, parse_config
from moezoo.core.data.tokenizers import TokenIds
from moezoo.core.errors import RunError, SpecError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.parity.check import parity, parity_of, random_windows
from moezoo.core.parity.reference_size import check_reference_size
from moezoo.core.parity.report import ParityTolerances
from moezoo.core.parity.sides import Reference
from tests.support.backends_available import require_backend

pytestmark = pytest.mark.slow

# D=20, N=8, M=2, H=6, F=28; E=7, K=2 and E=5, K=1 with a capacity; V=31; B=3, T=5
CONFIG = """
model:
  vocab_size: 31
  embed_dim: 20
  layers:
    - attention: {num_heads: 8, num_kv_heads: 2, head_dim: 6, qkv_bias: true, position: {kind: none}}
      feed_forward: {hidden_dim: 28}
    - attention: {num_heads: 4, num_kv_heads: 4, head_dim: 6, qk_norm: {}}
      moe:
        num_experts: 7
        router: {top_k: 2}
        experts: {hidden_dim: 12}
        shared: {num_experts: 2, hidden_dim: 9}
        losses: [{kind: switch_balance, coefficient: 0.01}, {kind: router_z, coefficient: 0.001}]
    - attention: {num_heads: 4, num_kv_heads: 2, head_dim: 6}
      moe:
        num_experts: 5
        router: {top_k: 1}
        experts: {hidden_dim: 12}
        dispatch: {kind: capacity, factor: 1.0}
data: {sources: [{kind: dataset, name: fables}]}
training: {steps: 10, batch_size: 6, sequence_length: 24}
optimizer: {learning_rate: 1.0e-3}
"""
DROPLESS = CONFIG.replace("{kind: capacity, factor: 1.0}", "{kind: dropless}")
B, T = 3, 5


def check(backends, text=CONFIG, tolerances=None):
    config = parse_config(text)
    windows = random_windows(config.model.vocab, B, T, seed=1)
    weights = initial_weights(config.model, seed=2)
    tokens, targets = windows[:, :-1], windows[:, 1:]
    return parity(config.model, weights, tokens, targets, backends, config.optimizer, tolerances)


@pytest.fixture(scope="module")
def mlx():
    require_backend("mlx")
    return load_backend("mlx")


@pytest.fixture(scope="module")
def healthy(mlx):
    """A report of two backends. `make parity` has JAX's, which compiles for long: here MLX takes its place."""
    return check({"jax": mlx, "mlx": mlx})


class Damaged:
    """A backend with changed weights, or changed results of its model's methods."""

    name = "damaged"

    def __init__(self, inner, weights=lambda weights: weights, **methods):
        self.inner, self.weights, self.methods = inner, weights, methods

    def build(self, spec, weights):
        return DamagedModel(self.inner.build(spec, self.weights(dict(weights))), self.methods)

    def facts(self):
        return self.inner.facts()


class DamagedModel:
    def __init__(self, inner, methods):
        self.inner, self.methods = inner, methods

    def __getattr__(self, name):
        method = getattr(self.inner, name)
        if name not in self.methods:
            return method
        return lambda *arguments, **keywords: self.methods[name](method, *arguments, **keywords)


def negated(name):
    return lambda weights: {**weights, name: -weights[name]}


def kinds_that_fail(report):
    return {row.kind for row in report.comparisons if not row.passed}


def rendered(report, width=100, **options):
    console = Console(width=width, file=io.StringIO())
    console.print(report.table(**options))
    return console.file.getvalue()


# --- agreement -------------------------------------------------------------------------------------------------------


@pytest.mark.release  # `make parity` runs more
def test_both_backends_agree_with_the_reference_and_with_each_other(mlx):
    require_backend("jax")
    report = check({"jax": load_backend("jax"), "mlx": mlx})
    assert report.passed, report.failures
    assert report.failures == ()


def test_backends_are_compared_with_the_reference_and_with_each_other(healthy):
    assert healthy.pairs == ("reference/jax", "reference/mlx", "jax/mlx")
    assert healthy.passed, healthy.failures
    assert healthy.failures == ()
    assert set(healthy.first_difference.values()) == {None}


def test_every_tensor_of_the_reference_is_compared(healthy):
    config = parse_config(CONFIG)
    names = {kind: [row.name for row in healthy.comparisons if row.kind == kind] for kind in ("gradient", "update")}
    expected = set(initial_weights(config.model, 0))
    assert set(names["gradient"]) == set(names["update"]) == expected
    assert len(names["gradient"]) == 3 * len(expected)
    losses = {row.name for row in healthy.comparisons if row.kind == "loss"}
    assert losses == {"loss", "cross_entropy"} | {
        f"{name}{end}" for name in ("switch_balance", "router_z") for end in ("", "_weighted")
    } | {"layers.1.switch_balance", "layers.1.router_z"}
    assert [(row.layer, row.share) for row in healthy.routing if row.pair == "jax/mlx"] == [(1, 1.0), (2, 1.0)]


def test_intermediates_are_listed_in_the_order_of_the_forward_pass(healthy):
    names = [row.name for row in healthy.comparisons if row.pair == "reference/jax" and row.kind == "intermediate"]
    assert names[:4] == ["embedding", "layers.0.attention", "layers.0.feed_forward", "layers.0"]
    assert names[-2:] == ["final_norm", "logits"]
    moe = [name.removeprefix("layers.1.moe") for name in names if name.startswith("layers.1.moe")]
    assert moe == [".router.logits", ".router.weight", ".routed", ""]


def test_the_report_is_json_and_a_table_that_crops_no_name_at_80_columns(healthy):
    content = json.loads(healthy.to_json())
    assert content["passed"] is True
    assert content["failures"] == []
    assert len(content["comparisons"]) == len(healthy.comparisons)
    for width in (80, 100, 120):
        short, long = rendered(healthy, width), rendered(healthy, width, show_all=True)
        assert "agree" in short
        assert "layers.1.moe.experts.w_gate" in long
        assert max(map(len, long.splitlines())) <= width
        assert "…" not in long


def test_bfloat16_has_its_own_tolerances(mlx):
    text = CONFIG.replace("embed_dim: 20", "embed_dim: 20\n  precision: {compute: bfloat16}")
    report = check({"mlx": mlx}, text)
    assert report.passed, report.failures
    assert "bfloat16" in report.tolerances.reason
    assert not check({"mlx": mlx}, text, ParityTolerances()).passed


def test_dense_model_has_no_routing_to_compare(mlx):
    text = CONFIG[: CONFIG.index("    - attention: {num_heads: 4")] + CONFIG[CONFIG.index("data:") :]
    report = check({"mlx": mlx}, text)
    assert report.passed, report.failures
    assert report.routing == ()


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "first"),
    [
        ("embedding.weight", "embedding"),
        ("layers.0.attention.w_output", "layers.0.attention"),
        ("layers.0.feed_forward_norm.scale", "layers.0.feed_forward"),
        ("layers.1.moe.router.w_router", "layers.1.moe.router.logits"),
        ("layers.1.moe.experts.w_down", "layers.1.moe.routed"),
        ("layers.1.moe.shared.w_up", "layers.1.moe"),
        ("layers.2.attention.w_value", "layers.2.attention"),
        ("final_norm.scale", "final_norm"),
        ("head.w_head", "logits"),
    ],
)
def test_damaged_parameter_is_found_at_its_first_effect(mlx, parameter, first):
    report = check({"damaged": Damaged(mlx, negated(parameter))}, DROPLESS)
    assert not report.passed
    assert report.first_difference == {"reference/damaged": first}
    assert any("first intermediate" in line and f"is {first}:" in line for line in report.failures)
    weights = [row.name for row in report.comparisons if row.kind == "weights" and not row.passed]
    assert weights == [parameter]
    assert "FAILED" in rendered(report)


def test_expert_damaged_by_one_part_in_a_thousand_is_found(mlx):
    def nudged(weights):
        changed = weights["layers.1.moe.experts.w_up"].copy()
        changed[3] *= 1 + 1e-3
        return {**weights, "layers.1.moe.experts.w_up": changed}

    report = check({"damaged": Damaged(mlx, nudged)}, DROPLESS)
    assert report.first_difference["reference/damaged"] == "layers.1.moe.routed"


def test_rounding_sensitivity_widens_only_some_tolerances(mlx):
    moved = {"intermediate": 1e-7, "logits": 4e-6, "gradient": 9e-6}
    tolerances = ParityTolerances().widened(moved)
    assert (tolerances.intermediate, tolerances.loss) == (1e-5, 1e-5)
    np.testing.assert_allclose([tolerances.logits, tolerances.gradient, tolerances.margin], [4e-5, 9e-5, 8e-4])
    config = parse_config(CONFIG)
    weights, windows = initial_weights(config.model, 0), random_windows(31, B, T, seed=1)
    reference = Reference(config.model, weights, windows[:, :-1], windows[:, 1:], config.optimizer)
    found = reference.rounding_sensitivity(1e-3)
    assert all(2**-27 < value < 2**-18 for value in found.values()), found  # of the order of one rounding, 2^-24
    assert found == reference.rounding_sensitivity(1e-3)


def test_gradients_of_hyper_connections_have_the_tolerance_of_their_roundings(mlx):
    report = parity_of("configs/tiny/hyper_connections.yaml", {"mlx": mlx})
    assert report.passed
    assert any("one float32 rounding of all weights moves" in note for note in report.notes)
    assert all(each.tolerance <= 3e-4 for each in report.comparisons)


def test_undamaged_backend_is_not_blamed(mlx):
    report = check({"mlx": mlx, "damaged": Damaged(mlx, negated("head.w_head"))}, DROPLESS)
    assert {line.split(":")[0] for line in report.failures} == {"reference/damaged", "mlx/damaged"}


@pytest.mark.parametrize("change", [{"weight_decay": 0.2}, {"beta1": 0.8}, {"beta2": 0.9}, {"clip_norm": 1e-3}])
def test_other_optimizer_options_differ_in_the_update_alone(mlx, change):
    def start(method, config, *state, **names):
        method(AdamWConfig(**{**config.model_dump(), **change}), *state, **names)

    report = check({"damaged": Damaged(mlx, start_training=start)})
    assert not report.passed
    assert report.first_difference == {"reference/damaged": None}
    assert "update" in kinds_that_fail(report) <= {"update", "moment"}


def of_kind(kind, more=""):
    assert CONFIG.count("optimizer: {") == 1
    return CONFIG.replace("optimizer: {", f"optimizer: {{kind: {kind}, {more}")


@pytest.mark.parametrize("kind", ["muon", "lion", "adafactor", "sgd"])
@pytest.mark.parametrize("backend", [pytest.param("jax", marks=pytest.mark.release), "mlx"])
def test_the_step_of_every_optimizer_agrees(backend, kind):
    require_backend(backend)
    report = check({backend: load_backend(backend)}, of_kind(kind))
    assert report.passed, report.failures
    assert {row.kind for row in report.comparisons} >= {"update", "moment"}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("muon", "momentum: 0.9, "),
        ("muon", "nesterov: false, "),
        ("muon", "update_scale: original, "),
        ("muon", "newton_schulz_steps: 4, "),
        ("lion", "beta2: 0.9, "),
        ("adafactor", "decay_exponent: 0.5, "),
        ("adafactor", "scale_by_parameter: false, "),
        ("sgd", "nesterov: true, "),
    ],
)
def test_other_options_of_an_optimizer_differ_in_the_update_alone(mlx, kind, change):
    other = parse_config(of_kind(kind, change)).optimizer

    def start(method, _, *state, **names):
        method(other, *state, **names)

    report = check({"damaged": Damaged(mlx, start_training=start)}, of_kind(kind))
    assert not report.passed
    assert kinds_that_fail(report) <= {"update", "moment"}


def test_missing_bias_correction_differs_in_the_update(mlx):
    def start(method, config, state, update, **names):
        method(config, state, 10**6, **names)  # practically no correction

    report = check({"damaged": Damaged(mlx, start_training=start)})
    assert kinds_that_fail(report) == {"update"}


def test_missing_gradient_and_wrong_shape_fail_by_name(mlx):
    def gradients(method, *arguments, **keywords):
        losses, named = method(*arguments, **keywords)
        named.pop("layers.0.attention.b_key")
        named["final_norm.scale"] = named["final_norm.scale"][:-1]
        return losses, named

    report = check({"damaged": Damaged(mlx, loss_and_gradients=gradients)})
    failed = [row for row in report.comparisons if not row.passed]
    assert {row.name for row in failed} == {"layers.0.attention.b_key", "final_norm.scale"}
    assert all(np.isinf(row.relative) for row in failed)
    relative = [row["relative"] for row in json.loads(report.to_json())["comparisons"] if not row["passed"]]
    assert relative == ["inf", "inf"]


def test_nan_fails(mlx):
    def forward(method, *arguments, **keywords):
        output = method(*arguments, **keywords)
        return replace(output, logits=np.where(np.arange(31) == 4, np.nan, output.logits))

    report = check({"damaged": Damaged(mlx, forward=forward)})
    assert kinds_that_fail(report) == {"logits"}
    assert "nan" in rendered(report)


# --- free routing ----------------------------------------------------------------------------------------------------


def choosing(change):
    """Return a `forward` with free routing whose experts are replaced by `change(index, routing)`."""

    def forward(method, *arguments, **keywords):
        output = method(*arguments, **keywords)
        if "forced" in keywords:
            return output
        routing = [replace(row, expert=change(index, row)) for index, row in enumerate(output.routing)]
        return replace(output, routing=routing)

    return forward


def runner_up_for(routing, chosen_BT):
    """Replace the last chosen expert of some tokens by the first rejected one."""
    order = np.argsort(-routing.score, axis=-1, kind="stable")
    top_k = routing.expert.shape[-1]
    expert = routing.expert.copy()
    expert[chosen_BT, -1] = order[chosen_BT, top_k]
    return expert


def margins(routing):
    falling = -np.sort(-routing.score, axis=-1)
    top_k = routing.expert.shape[-1]
    return 1 - falling[..., top_k] / falling[..., top_k - 1]


def test_wrong_choice_at_a_large_margin_fails(mlx):
    def change(index, routing):
        margin = margins(routing)
        return runner_up_for(routing, margin == margin.max()) if index == 0 else routing.expert

    report = check({"damaged": Damaged(mlx, forward=choosing(change))}, DROPLESS)
    row = report.routing[0]
    assert (row.layer, row.identical, row.passed) == (1, B * T - 1, False)
    assert any("layers.1.moe chose other experts for 1 of 15 tokens" in line for line in report.failures)


def test_other_choice_at_a_near_tie_is_counted_and_passes(mlx):
    seen = {}

    def change(index, routing):
        margin = margins(routing)
        seen[index] = float(margin.min())
        return runner_up_for(routing, margin == margin.min())

    backend = Damaged(mlx, forward=choosing(change))
    wide = check({"damaged": backend}, DROPLESS, ParityTolerances(margin=1.0)).routing
    assert [row.identical for row in wide] == [B * T - 1] * 2
    assert all(row.passed for row in wide)
    assert wide[0].margin == pytest.approx(seen[0], abs=1e-6)
    narrow = check({"damaged": backend}, DROPLESS, ParityTolerances(margin=seen[0] / 2)).routing
    assert not narrow[0].passed


@pytest.mark.parametrize(("text", "downstream"), [(DROPLESS, 3), (CONFIG, 3)])
def test_downstream_of_an_earlier_difference_is_not_judged(mlx, text, downstream):
    """Token 2 of sequence 1 differs in layer 1, so in layer 2 tokens 2 to 4 of that sequence are not judged."""

    def change(index, routing):
        chosen = np.zeros((B, T), bool)
        chosen[1, 2 if index == 0 else slice(2, T)] = True
        return runner_up_for(routing, chosen)

    rows = check({"damaged": Damaged(mlx, forward=choosing(change))}, text, ParityTolerances(margin=1.0)).routing
    assert [row.downstream for row in rows] == [0, downstream]
    assert rows[1].margin is None


@pytest.mark.parametrize(("group", "downstream"), [("batch", 2), ("sequence", 1)])
def test_downstream_of_a_capacity_is_its_group(mlx, group, downstream):
    """Token 3 of sequence 1 differs in layer 1, and in layer 2 the first token of that sequence and of another."""

    def change(index, routing):
        chosen = np.zeros((B, T), bool)
        chosen[([1], [3]) if index == 0 else ([0, 1], [0, 0])] = True
        return runner_up_for(routing, chosen)

    capacity = (
        f"shared: {{num_experts: 2, hidden_dim: 9}}\n        dispatch: {{kind: capacity, factor: 1.0, group: {group}}}"
    )
    text = DROPLESS.replace("shared: {num_experts: 2, hidden_dim: 9}", capacity)
    rows = check({"damaged": Damaged(mlx, forward=choosing(change))}, text, ParityTolerances(margin=1.0)).routing
    assert [row.downstream for row in rows] == [0, downstream]
    assert (rows[1].margin is None) == (group == "batch")


def test_earlier_token_is_not_downstream_of_a_later_one(mlx):
    def change(index, routing):
        chosen = np.zeros((B, T), bool)
        chosen[1, 3 if index == 0 else 0] = True
        return runner_up_for(routing, chosen)

    rows = check({"damaged": Damaged(mlx, forward=choosing(change))}, DROPLESS, ParityTolerances(margin=1.0)).routing
    assert rows[1].downstream == 0
    assert rows[1].margin is not None


# --- paths and errors ------------------------------------------------------------------------------------------------


def test_config_is_checked_with_its_initial_weights(mlx, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(CONFIG.replace("vocab_size: 31", "vocab_size: null"))
    report = parity_of(path, {"mlx": mlx}, batch_size=1, sequence_length=7)
    assert report.passed, report.failures
    assert (report.batch_size, report.sequence_length) == (1, 7)
    assert any("assumed: a vocabulary of 64 tokens" in note for note in report.notes)


def test_run_is_checked_with_its_newest_weights(mlx, tmp_path):
    config = parse_config(CONFIG)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    TokenIds(config.model.vocab).save(tmp_path)
    for step in (3, 12):
        save_checkpoint(
            tmp_path / "checkpoints", step, initial_weights(config.model, step), {}, dump_config(config), keep=None
        )
    seen = {}

    def recording(weights):
        seen.update(weights)
        return weights

    report = parity_of(tmp_path, {"mlx": Damaged(mlx, recording)}, sequence_length=6)
    assert report.passed, report.failures
    assert any("step 12" in note for note in report.notes)
    np.testing.assert_array_equal(seen["head.w_head"], initial_weights(config.model, 12)["head.w_head"])


def test_the_sequence_is_at_most_64_long_by_default(mlx, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(CONFIG)
    assert parity_of(path, {"mlx": mlx}).sequence_length == 24


def test_random_tokens_cover_the_vocabulary_and_depend_on_the_seed_alone():
    windows = random_windows(7, 20, 30, seed=5)
    assert windows.dtype == np.int32
    assert windows.shape == (20, 31)
    assert set(np.unique(windows)) == set(range(7))
    np.testing.assert_array_equal(windows, random_windows(7, 20, 30, seed=5))
    assert np.any(windows != random_windows(7, 20, 30, seed=6))


def test_folder_without_a_model_is_refused(mlx, tmp_path):
    with pytest.raises(RunError, match="is neither a run folder nor a Hugging Face checkpoint"):
        parity_of(tmp_path, {"mlx": mlx})


def test_reference_that_is_too_large_is_refused_before_it_is_built():
    config = parse_config(CONFIG, overrides=["model.embed_dim=8192", "model.vocab_size=128000"])
    with pytest.raises(SpecError, match=r"float64 reference of this model would need about \d+\.\d GiB"):
        check_reference_size(config.model, 2, 64, 2)


def test_targets_that_are_not_the_next_tokens_are_refused(mlx):
    config = parse_config(CONFIG)
    tokens = random_windows(31, B, T, seed=1)
    weights = initial_weights(config.model, 0)
    with pytest.raises(SpecError, match="targets are not the next tokens"):
        parity(config.model, weights, tokens, tokens, {"mlx": mlx}, config.optimizer)


def test_no_backend_is_refused():
    with pytest.raises(SpecError, match="got none"):
        check({})
