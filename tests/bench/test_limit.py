"""Hardware limit: its products match the cost model's FLOPs, and its bytes the active weights and cache."""

from pathlib import Path

import pytest

from moezoo.bench.case import Case
from moezoo.bench.configs import bench_config, smoke_config, sweep_config
from moezoo.bench.limit import Limit, bytes_per_step, matrix_products, products, score_products, useful_flops
from moezoo.core.config.run_config import Config, load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.cost.flops import flops_per_token, most_visible
from moezoo.core.cost.memory import kv_cache_bytes_per_token
from moezoo.core.cost.parameters import parameter_counts
from moezoo.core.spec import GroupedQueryAttentionSpec

ROOT = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(path for path in ROOT.rglob("*.yaml") if path.parent.name != "meshes")
S, M = bench_config("S"), bench_config("M")


def sized(path: Path) -> Config:
    config = load_config(path)
    return config if config.model.vocab_size is not None else with_vocab_size(config, 31)


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "fine_tune"], ids=lambda path: path.stem)
def test_products_match_the_flops_of_the_cost_model(path):
    """Tolerances: numbers of rows and of visible positions are rounded, e.g. for 1.9 experts per token."""
    config = sized(path)
    case = Case("train", "train", config)
    length = config.training.sequence_length
    flops = flops_per_token(config.model, length, training=False)
    matrices = sum(product.flops for product in matrix_products(config.model, case.tokens))
    assert matrices == pytest.approx((flops.total - flops.attention_scores) * case.tokens, rel=1e-3)
    assert useful_flops(case) == flops_per_token(config.model, length, training=True).total * case.tokens
    attentions = [layer.attention for layer in config.model.layers]
    if all(isinstance(each, GroupedQueryAttentionSpec) and most_visible(each) is None for each in attentions):
        scores = sum(product.flops for product in score_products(config.model, case.tokens, length))
        assert scores == pytest.approx(flops.attention_scores * case.tokens, rel=1 / length)


def test_moe_layer_alone_is_router_and_experts_of_one_layer():
    flops = flops_per_token(M.model, 512, training=True)
    per_layer = (flops.router + flops.routed_experts) // 8
    assert useful_flops(Case("both", "gradients", M)) == per_layer * 4 * 512
    assert 3 * sum(product.flops for product in products(Case("both", "gradients", M))) == per_layer * 4 * 512
    assert useful_flops(Case("forward", "forward", M)) == per_layer * 4 * 512 // 3


def test_sweep_has_equal_active_flops_except_for_the_router():
    """Only the router's FLOPs, 2 D E per token, grow."""
    cases = [Case("train", "train", sweep_config(None, number)) for number in (4, 128)]
    fewest, most = (useful_flops(case) for case in cases)
    assert most - fewest == 3 * 2 * (2 * 256 * (128 - 4)) * cases[0].tokens


def test_one_token_reads_the_active_weights_without_the_embedding():
    counts = parameter_counts(S.model)
    embedding = 256 * 256  # a table lookup; the head is untied
    case = Case("batch 1", "decode", S, batch=1, context=0, new_tokens=2)
    assert bytes_per_step(case) == 4 * (counts.active - embedding - counts.active_by_role["norms"]) + cache(1, 1)


def test_large_batch_reads_all_experts_and_small_batch_the_expected_share():
    """With top-2 of 8 experts, 2 tokens use 8 (1 - (3/4)^2) = 3.5 experts on average."""
    experts = parameter_counts(S.model).by_role["routed experts"]
    read_bytes = {batch: bytes_per_step(Case("", "decode", S, batch, 0, 2)) - cache(batch, 1) for batch in (1, 2, 1000)}
    assert read_bytes[2] - read_bytes[1] == 4 * experts * (3.5 - 2) / 8
    assert read_bytes[1000] - read_bytes[1] == pytest.approx(4 * experts * (8 - 2) / 8)


def test_codes_have_their_bits_and_a_scale_and_a_bias_per_group():
    counts = parameter_counts(S.model)
    router = counts.by_role["router"]
    others = counts.active - 256 * 256 - counts.active_by_role["norms"] - router
    case = Case("batch 1", "decode", S, 1, 0, 2, bits=4)
    assert bytes_per_step(case) - cache(1, 1) == (others * (4 * 64 + 64) + router * (8 * 64 + 64)) / 64 / 8


def test_context_adds_the_bytes_of_its_cache():
    short, long = (bytes_per_step(Case("", "decode", S, 8, context, 32)) for context in (256, 2048))
    assert long - short == cache(8, 2048 - 256)


def cache(batch: int, tokens: int) -> int:
    return kv_cache_bytes_per_token(S.model) * batch * tokens


@pytest.mark.parametrize("kind", ["train", "forward", "gradients", "decode"])
def test_limit_is_measured_and_repeats_take_longer(kind):
    work = Limit().prepare(Case(kind, kind, smoke_config(), 2, 4, 4))
    work(1)
    assert 0 < work(1) < work(400)
