"""Two models compared: damaged routers are blamed on routing, damaged experts on arithmetic, and codes are split."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from moezoo.backends import load_backend
from moezoo.core.comparison.compare import compare_models
from moezoo.core.comparison.report import ComparisonReport
from moezoo.core.comparison.result import with_verdict
from moezoo.core.comparison.side import Side
from moezoo.core.comparison.verdict import verdict
from moezoo.core.config.run_config import Config, parse_config, with_compute
from moezoo.core.config.vocabulary import spec_with_vocab_size
from moezoo.core.data.batch import row_positions
from moezoo.core.data.evaluation_windows import EvaluationBatch
from moezoo.core.data.tokenizers import TokenIds
from moezoo.core.errors import SpecError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.quantization.formats import QuantizationFormat
from tests.support.backends_available import require_backend
from tests.support.quantized import quantized_weights

CONFIG = """
model:
  vocab_size: 31
  embed_dim: 32
  layers:
    - attention: {num_heads: 2, num_kv_heads: 1, head_dim: 16}
      feed_forward: {hidden_dim: 32}
    - repeat: 2
      attention: {num_heads: 2, num_kv_heads: 1, head_dim: 16}
      moe:
        num_experts: 7
        router: {top_k: 2, score: sigmoid, selection_bias: {rate: 0.001}}
        experts: {hidden_dim: 32}
        shared: {num_experts: 1, hidden_dim: 32}
  initializer: {kind: normal, std: 0.3}
data: {sources: [{kind: dataset, name: fables}]}
training: {steps: 10, batch_size: 6, sequence_length: 24}
optimizer: {learning_rate: 1.0e-3}
"""
ON_BOTH = ("top_k", "grouped_top2", "top_p", "hash", "sparsemixer", "expert_choice", "capacity", "bfloat16")
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def config() -> Config:
    return parse_config(CONFIG)


@pytest.fixture(scope="module")
def weights(config: Config) -> Weights:
    require_backend("mlx")
    return initial_weights(config.model, 0)


def side(config: Config, weights: Weights, backend: str = "mlx") -> Side:
    require_backend(backend)
    model = load_backend(backend, for_training=False).build(config.model, weights)
    return Side("model", model, backend, config, TokenIds(config.model.vocab))


def batches(vocab: int) -> list[EvaluationBatch]:
    """Three batches of two windows of 24 targets, the first of which is ignored."""
    windows = np.random.default_rng(0).integers(0, vocab, (3, 2, 25)).astype(np.int32)
    targets = np.where(np.arange(24) < 1, -1, windows[..., 1:])
    rows = np.arange(2)
    return [
        EvaluationBatch(window, window[:, :-1], target, None, row_positions(rows, 24))
        for window, target in zip(windows, targets, strict=True)
    ]


def compared(a: Side, b: Side) -> ComparisonReport:
    return compare_models(a, b, 6, batches(a.model.spec.vocab), lambda what, done, total: None)


def damaged(weights: Weights, name: str, share: float = 0.4) -> Weights:
    value = weights[name]
    noise = np.random.default_rng(1).normal(size=value.shape).astype(np.float32)
    return weights | {name: value + share * (float(value.std()) or 1.0) * noise}


def page(report: ComparisonReport, width: int = 80) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(with_verdict(report).page())
    return text.getvalue()


def test_equal_models_have_no_difference_at_all(config, weights):
    report = compared(side(config, weights), side(config, dict(weights)))
    assert report.equal
    assert (report.tokens, report.windows) == (6 * 23, 6)
    assert (report.total.kl.max, report.total.loss, report.total.top1, report.routing_kl) == (0, 0, 1, 0)
    assert [layer.changed for layer in report.routing] == [0, 0]
    assert "equal: the same logits and experts for all 138 tokens" in page(report)


def test_a_damaged_router_is_blamed_on_routing_with_its_layer(config, weights):
    report = compared(side(config, weights), side(config, damaged(weights, "layers.2.moe.router.w_router")))
    found = verdict(report)
    assert (found.kind, found.layer, found.part) == ("routing", 2, "router")
    assert "1 of 40 parameters differs: layers.2.moe.router.w_router." in found.reasons
    assert [layer.changed > 0 for layer in report.routing] == [False, True]
    assert report.total.kl.mean > 2 * report.arithmetic.kl.mean > 0  # the rest are the weights of the same experts


def test_with_a_routing_replayed_another_choice_alone_leaves_nothing(config, weights):
    """A selection bias decides which experts are chosen, and not how much each counts."""
    name = "layers.1.moe.router.selection_bias"
    report = compared(side(config, weights), side(config, damaged(weights, name, 0.1)))
    found = verdict(report)
    assert (found.kind, found.layer, found.part) == ("routing", 1, "router")
    assert report.arithmetic.kl.max == 0 < report.total.kl.mean
    assert all(part.relative == 0 for part in report.parts)
    first, second = report.routing
    assert first.own == first.changed > 0
    assert second.own == 0 <= second.changed  # changed only as a consequence
    assert first.margin.count == round(first.own * report.tokens)
    assert first.margin.median < first.all_margin.median


def test_damaged_experts_are_blamed_on_arithmetic_with_their_layer(config, weights):
    report = compared(side(config, weights), side(config, damaged(weights, "layers.1.moe.experts.w_down")))
    found = verdict(report)
    assert (found.kind, found.layer, found.part) == ("arithmetic", 1, "experts")
    assert "With A's experts in both, layers.1.moe.routed is the first to differ" in " ".join(found.reasons)
    assert [layer.own > 0 for layer in report.routing] == [False, True]


@pytest.mark.parametrize(
    ("name", "layer", "part"),
    [
        ("embedding.weight", None, "embedding"),
        ("layers.0.feed_forward.w_up", 0, "dense feed-forward"),
        ("layers.1.moe.shared.w_up", 1, "shared experts"),
        ("layers.2.attention.w_key", 2, "attention"),
        ("head.w_head", None, "logits"),
    ],
)
def test_the_part_where_a_difference_starts_is_named(config, weights, name, layer, part):
    found = verdict(compared(side(config, weights), side(config, damaged(weights, name))))
    assert (found.kind, found.layer, found.part) == ("arithmetic", layer, part)


def test_codes_are_split_with_numbers_that_add_up(config, weights):
    codes = quantized_weights(weights, QuantizationFormat("affine", 4, 32))
    report = compared(side(config, weights), side(config, codes))
    assert report.weights.codes_b > 20 > report.weights.codes_a == 0
    assert report.total.kl.mean == pytest.approx(report.arithmetic.kl.mean + report.routing_kl)
    assert report.total.loss == pytest.approx(report.arithmetic.loss + report.routing_loss)
    assert report.arithmetic.kl.mean > 0 < abs(report.routing_kl)
    share = f"{100 * report.arithmetic.kl.mean / report.total.kl.mean:.0f} %"
    assert verdict(report).headline == f"mostly arithmetic: {share} of the KL divergence, starting in the embedding"
    assert f"B has {report.weights.codes_b} parameters in codes." in verdict(report).reasons
    content = json.loads(json.dumps(with_verdict(report).to_json(), allow_nan=False))
    assert content["routing"][0]["layer"] == 1
    assert content["verdict"]["kind"] == verdict(report).kind


def test_precision_alone_is_rounding(config, weights):
    other = side(with_compute(config, "bfloat16"), weights)
    report = compared(side(config, weights), other)
    assert (verdict(report).kind, report.weights.names) == ("rounding", ())
    assert report.total.kl.mean > 0


# Their logits choose no experts: a table does, or cutoffs that are zero before training and let every token in.
NOT_CHOSEN_BY_LOGITS = {"hash", "expert_choice"}


def drawn(path):
    """Return a config with its vocabulary, and weights for it."""
    config = parse_config(path.read_text(), where=str(path))
    spec, _ = spec_with_vocab_size(config, assumed_subwords=64)
    return config.model_copy(update={"model": spec}), initial_weights(spec, 1, active_adapters=True)


def test_other_experts_whose_outputs_are_zero_are_routing():
    require_backend("mlx")
    config, weights = drawn(Path("configs/tiny/zero_output.yaml"))
    report = compared(side(config, weights), side(config, damaged(weights, "layers.1.moe.router.w_router")))
    assert report.changed
    assert report.total.kl.mean == 0
    assert verdict(report).headline == "routing, starting in the router of layer 1"


@pytest.mark.release
@pytest.mark.parametrize("path", sorted(Path("configs/tiny").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_kind_of_router_is_compared(path):
    require_backend("mlx")
    config, weights = drawn(path)
    spec = config.model
    assert compared(side(config, weights), side(config, weights)).equal
    if path.stem in ON_BOTH:
        assert verdict(compared(side(config, weights), side(config, weights, "jax"))).kind == "rounding"
    for layer in spec.moe_layers[-1:]:
        report = compared(side(config, weights), side(config, damaged(weights, f"layers.{layer}.moe.router.w_router")))
        expected = "arithmetic" if path.stem in NOT_CHOSEN_BY_LOGITS else "routing"
        assert (verdict(report).kind, verdict(report).layer) == (expected, layer)
        report = compared(side(config, weights), side(config, damaged(weights, f"layers.{layer}.moe.experts.w_down")))
        assert (verdict(report).kind, verdict(report).layer) == ("arithmetic", layer)
        assert max(map(len, page(report).splitlines())) <= 80


def test_logits_that_are_not_finite_are_left_out_and_named(config, weights):
    broken = weights | {"layers.2.moe.experts.w_up": np.full_like(weights["layers.2.moe.experts.w_up"], np.nan)}
    report = compared(side(config, weights), side(config, broken))
    assert (report.not_finite, report.tokens) == (138, 0)
    assert (verdict(report).layer, verdict(report).part) == (2, "experts")
    assert "138 tokens are left out" in page(report)
    json.dumps(with_verdict(report).to_json(), allow_nan=False)


def test_models_whose_routing_cannot_be_exchanged_are_refused_in_a_line(config, weights):
    a = side(config, weights)
    for change, words in (
        ("vocab_size: 31->vocab_size: 32", "different vocabularies; got vocab_size 31 and 32"),
        ("num_experts: 7->num_experts: 8", "numbers of experts; got 7 and 8 in layer 1"),
        ("top_k: 2->top_k: 3", "numbers of experts per token; got 2 and 3 in layer 1"),
        ("repeat: 2->repeat: 3", "different MoE layers; got 2 (1, 2) and 3 (1, 2, 3)"),
    ):
        other = parse_config(CONFIG.replace(*change.split("->")))
        b = side(other, initial_weights(other.model, 0))
        with pytest.raises(SpecError) as caught:
            compared(a, b)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_specs_that_differ_are_named(config, weights):
    other = parse_config(CONFIG.replace("score: sigmoid", "score: sigmoid, scale: 2.0"))
    report = compared(side(config, weights), side(other, weights))
    assert report.specs == ("layers[1,2].moe.router.scale: 1.0 and 2.0",)
    assert verdict(report).part == "combine weights"
    assert "The specs differ in layers[1,2].moe.router.scale: 1.0 and 2.0." in page(report)


def test_a_scaled_router_that_moves_no_token_is_blamed_on_its_weights():
    """Softmax over the chosen logits: twice the logits choose the same experts with other weights."""
    own = parse_config(CONFIG.replace("score: sigmoid, selection_bias: {rate: 0.001}", "score: softmax"))
    weights = initial_weights(own.model, 0)
    name = "layers.2.moe.router.w_router"
    report = compared(side(own, weights), side(own, weights | {name: 2 * weights[name]}))
    found = verdict(report)
    assert (found.kind, found.layer, found.part, report.routing_share) == ("arithmetic", 2, "router", 0)
    wanted = "arithmetic: the router's combine weights, no other experts, starting in the router of layer 2"
    assert found.headline == wanted


def test_nan_in_b_is_named_with_its_part_and_leaves_the_loss_of_a(config, weights):
    a = side(config, weights)
    name = "layers.1.moe.experts.w_down"
    report = compared(a, side(config, weights | {name: np.full_like(weights[name], np.nan)}))
    found = verdict(report)
    assert (found.kind, found.layer, found.part) == ("not finite", 1, "experts")
    assert found.headline == "not finite: NaN or infinity in B, starting in the experts of layer 1"
    assert (report.tokens, report.not_finite) == (0, 6 * 23)
    assert report.loss == compared(a, a).loss
    text = page(report)
    assert "nan %" not in text
    assert "inf %" not in text
    assert "138 tokens, 6 windows" in text


def test_dense_models_have_no_experts_on_their_page():
    layers = CONFIG[CONFIG.index("    - repeat") : CONFIG.index("  initializer")]
    own = parse_config(CONFIG.replace(layers, ""))
    weights = initial_weights(own.model, 0)
    text = page(compared(side(own, weights), side(own, damaged(weights, "embedding.weight"))))
    assert "arithmetic, starting in the embedding" in text
    assert "experts" not in text
