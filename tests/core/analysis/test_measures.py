"""Measures of routing traces: small values by hand, and what a trace without weights lacks."""

import numpy as np
import pytest

from moezoo.core.analysis.analyze import analyze_trace
from moezoo.core.analysis.chosen import BLOCK, first_tokens, spans
from moezoo.core.analysis.coactivation import measure_coactivation
from moezoo.core.analysis.domains import measure_domains
from moezoo.core.analysis.load import max_violation, measure_load, relative_entropy
from moezoo.core.analysis.predictability import measure_predictability
from moezoo.core.analysis.saturation import measure_saturation
from moezoo.core.analysis.vocabulary import favorite_tokens, measure_vocabulary
from moezoo.core.analysis.windows import measure_windows
from moezoo.core.errors import DataError
from moezoo.core.traces.trace import TraceInfo, TraceRows, trace_of
from tests.support.traces import synthetic_trace


def trace_with(expert, num_experts=4, texts=None, domains=("text",), **columns):
    """A trace of experts [N][L][K] and other columns."""
    expert = np.array(expert)
    info = TraceInfo(
        layers=tuple(range(expert.shape[1])), num_experts=(num_experts,) * expert.shape[1], domains=domains
    )
    return trace_of(info, TraceRows(expert, **{name: np.array(values) for name, values in columns.items()}), texts)


def test_load_balance_mass_and_narrow_margins():
    layer = measure_load(
        trace_with(
            [[[0, 1]], [[0, 2]], [[0, 1]], [[-1, -1]]],
            weight=[[[0.75, 0.25]], [[0.5, 0.0]], [[1.0, 0.5]], [[0.0, 0.0]]],
            dropped=[[[0, 0]], [[0, 1]], [[0, 0]], [[0, 0]]],
            margin=[[0.005], [0.5], [np.inf], [0.0]],
        )
    )[0]
    np.testing.assert_allclose(layer.load, [1 / 2, 1 / 3, 1 / 6, 0])
    assert layer.max_violation == pytest.approx(3 / 1.5 - 1)
    assert layer.entropy == pytest.approx((np.log(2) / 2 + np.log(3) / 3 + np.log(6) / 6) / np.log(4))
    assert (layer.dead, layer.experts_per_token) == ((3,), 2.0)
    np.testing.assert_allclose(layer.gate_mass, [0.75, 0.25, 0, 0])
    assert layer.first_weight == pytest.approx((0.75 + 1 + 2 / 3) / 3)
    assert layer.weight_sum == pytest.approx((1 + 0.5 + 1.5) / 3)
    assert layer.dropped == pytest.approx(1 / 6)
    assert (layer.margin, layer.narrow) == (pytest.approx((0.005 + 0.5) / 2), pytest.approx(1 / 3))


def test_balanced_and_collapsed_load():
    assert (max_violation(np.full(5, 3)), relative_entropy(np.full(5, 3))) == (0, pytest.approx(1))
    assert (max_violation(np.array([7, 0, 0, 0])), relative_entropy(np.array([7, 0, 0, 0]))) == (3, 0)


def test_domain_specialization_is_a_share_of_the_domains_tokens():
    trace = trace_with(
        [[[0, 1]], [[0, 2]], [[0, 3]], [[3, 2]]], domain=[0, 0, 1, 1], domains=("verse", "prose"), document=[0, 0, 1, 1]
    )
    layer = measure_domains(trace)[0]
    np.testing.assert_allclose(layer.share, [[1, 0.5, 0.5, 0], [0.5, 0, 0.5, 1]])
    assert layer.strongest(1) == (3, 1, 0)
    # loads are 1/2, 1/4, 1/4, 0 and 1/4, 0, 1/4, 1/2
    np.testing.assert_allclose(layer.shift, [1 / 4, 1 / 4])


def test_shift_of_domains_that_route_alike_is_that_of_chance():
    layer = measure_domains(synthetic_trace(num_tokens=40 * BLOCK, layers=(0,)))[0]
    assert abs(layer.shift - layer.chance).max() < 4 * layer.chance_spread.max()
    parted = np.arange(40 * BLOCK) // (20 * BLOCK)
    layer = measure_domains(trace_with(parted[:, None, None], domain=parted, domains=("a", "b")))[0]
    np.testing.assert_allclose(layer.shift, 0.5)
    assert layer.chance.max() < 0.3


def test_a_text_without_tokens_is_no_domain():
    whole = synthetic_trace(domains=("verse", "prose", "code"))
    assert measure_domains(first_tokens(whole, 25))[0].names == ("verse", "prose")
    assert measure_domains(first_tokens(whole, 10)) == ()
    assert any("one text" in line for line in analyze_trace(first_tokens(whole, 10)).missing)


def test_vocabulary_specialization_by_the_token_and_by_the_next():
    token = np.tile([7, 8, 9], 12)
    expert = np.where(token == 7, 2, np.where(token == 8, 1, np.arange(36) // 3 % 2))
    trace = trace_with(expert[:, None, None], token=token, texts={7: "a", 8: " b", 9: "c"})
    own = measure_vocabulary(trace)
    assert own.token.tolist() == [7, 8, 9]
    assert own.occurrences.tolist() == [12, 12, 12]
    np.testing.assert_allclose(own.layers[0].share, [1, 1, 0.5])
    assert own.layers[0].mean == pytest.approx(5 / 6)
    assert 1 / 3 < own.layers[0].chance < own.layers[0].mean
    assert favorite_tokens(trace, own, 0) == {0: ["c 50"], 1: ["␣b 100"], 2: ["a 100"], 3: []}
    following = measure_vocabulary(trace, "next")
    assert following.token.tolist() == [7, 8, 9]
    assert following.occurrences.tolist() == [11, 12, 12]
    np.testing.assert_allclose(following.layers[0].share, [6 / 11, 1, 1])


def test_the_next_token_of_another_document_does_not_count():
    trace = trace_with([[[0]]] * 24, token=[5] * 24, document=[0] * 12 + [1] * 12)
    assert measure_vocabulary(trace).occurrences.tolist() == [24]
    assert measure_vocabulary(trace, "next").occurrences.tolist() == [22]


def test_coactivation_counts_all_pairs_within_and_across_layers():
    expert = [[[0, 1, 2], [3, 0, 1]], [[2, 1, 3], [3, 2, 0]], [[0, 2, 3], [1, 2, 3]]]
    found = measure_coactivation(trace_with(expert))
    rate = np.zeros((2, 2, 4, 4))
    for one in range(2):
        for other in range(2):
            for i in range(4):
                rows = [row for row in expert if i in row[one]]
                for j in range(4):
                    rate[one, other, i, j] = sum(j in row[other] for row in rows) / max(1, len(rows))
    np.testing.assert_allclose(found.within, [rate[0, 0], rate[1, 1]])
    np.testing.assert_allclose(found.adjacent, [rate[0, 1]])
    np.testing.assert_allclose(found.usage[0], [2 / 3, 2 / 3, 1, 2 / 3])
    np.testing.assert_allclose(found.across[0, 1], np.average(rate[0, 1].max(axis=1), weights=[2, 2, 3, 2]))
    assert found.strongest(0) is None  # too few tokens


def test_coactivation_of_many_experts_is_limited_to_neighboring_layers(monkeypatch):
    trace = synthetic_trace(num_tokens=60)
    whole = measure_coactivation(trace)
    monkeypatch.setattr("moezoo.core.analysis.coactivation.MOST_ROWS", 1)
    part = measure_coactivation(trace)
    assert part.across is None
    np.testing.assert_array_equal(part.within, whole.within)
    np.testing.assert_array_equal(part.adjacent, whole.adjacent)
    pair = whole.strongest(1)
    assert pair.share == whole.within[1, pair.one, pair.other]
    assert pair.lift == pytest.approx(pair.share / whole.usage[1, pair.other])


def test_predictability_of_a_layer_that_follows_from_the_one_before():
    first = np.random.default_rng(0).integers(0, 4, 2000)
    expert = np.stack([first, 3 - first], axis=1)[..., None]
    start, following = measure_predictability(trace_with(expert))
    assert (start.from_previous, following.from_previous) == (None, 1.0)
    assert following.most_loaded == pytest.approx(0.25, abs=0.05)
    assert following.from_token_before == pytest.approx(np.mean(first[1:] == first[:-1]), abs=0.05)


def test_the_token_before_is_of_the_same_document():
    expert = [[[0]], [[0]], [[1]], [[1]]]
    inside = measure_predictability(trace_with(expert, document=[0, 0, 1, 1]))[0]
    assert inside.from_token_before == 1.0  # tested on the last two tokens, of which one has a token before it
    assert measure_predictability(trace_with(expert))[0].from_token_before == 0.5


def test_distinct_experts_of_windows():
    found = measure_windows(trace_with([[[0, 1]], [[1, 2]], [[0, 1]], [[0, 1]], [[3, 2]]], document=[0, 0, 0, 1, 1]))
    assert [each.tokens for each in found] == [1, 2]
    assert [each.consecutive[0] for each in found] == [2.0, 3.0]  # 0, 1, 2; the second window has two documents
    usage = np.array([3, 4, 2, 1]) / 5
    assert found[1].unrelated[0] == pytest.approx((1 - (1 - usage) ** 2).sum())
    assert found[1].balanced[0] == pytest.approx(4 * (1 - 0.5**2))


def test_saturation_against_the_last_trace():
    early = trace_with([[[0, 1]], [[2, 3]]]).renamed("early")
    late = trace_with([[[1, 0]], [[2, 0]]])
    (found,) = measure_saturation([early, late])
    assert found.where == "early"
    assert found.all_experts[0] == pytest.approx((1 + 0.5) / 2)
    assert found.first_expert[0] == pytest.approx(0.5)
    # loads per token: 1/2 each, and 1, 1/2, 1/2, 0
    assert found.chance[0] == pytest.approx((0.5 + 0.25 + 0.25) / 2)


def test_saturation_needs_the_same_text():
    trace = synthetic_trace()
    with pytest.raises(DataError, match="have other tokens from token 0 on"):
        measure_saturation([synthetic_trace(seed=1), trace])
    with pytest.raises(DataError, match="has 10 tokens, 3 MoE layers and 8 experts; expected 40, 3 and 8"):
        measure_saturation([first_tokens(trace, 10), trace])


def test_a_trace_of_experts_alone_says_what_is_missing():
    whole, bare = synthetic_trace(), trace_with(synthetic_trace().column("expert"), num_experts=8)
    assert analyze_trace(whole).missing == ()
    found = analyze_trace(bare)
    assert [line.split(" (")[0].split(",")[0] for line in found.missing] == [
        "gate mass",
        "margin",
        "dropped assignments",
        "vocabulary specialization",
        "domain specialization",
        "borders of documents",
    ]
    assert (found.domains, found.vocabulary, found.load[0].gate_mass, found.load[0].narrow) == (None,) * 4
    np.testing.assert_array_equal(found.load[0].load, analyze_trace(whole).load[0].load)


def test_measures_do_not_depend_on_the_parts_a_trace_is_read_in(monkeypatch):
    trace = synthetic_trace(num_tokens=3 * BLOCK + 5, vocab=20)
    whole = analyze_trace(trace).to_json()
    monkeypatch.setattr("moezoo.core.analysis.chosen._PART_VALUES", 1)
    assert len(list(spans(trace))) == 4
    parts = analyze_trace(trace).to_json()
    for layer in (*whole["domains"], *parts["domains"]):
        layer.pop("chance"), layer.pop("chance_spread")  # drawn part by part
    assert parts == whole
