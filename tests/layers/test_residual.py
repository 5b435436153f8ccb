"""Residual streams: the value of both backends against the reference. Whole models: tests/layers/test_layer.py."""

import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.residual import enter, leave, read, write
from moezoo.core.spec import (
    BlockAttentionResidualSpec,
    DepthScaledResidualSpec,
    ModelSpec,
    RMSNormSpec,
    ScaledResidualSpec,
    SumResidualSpec,
)
from tests.support.tolerances import FLOAT32, assert_close
from tests.support.twins import B, D, T, assert_layer_matches, normal

TERMS = [normal(number, B, T, D) for number in range(4)]


@pytest.mark.parametrize("spec", [SumResidualSpec(), DepthScaledResidualSpec()])
def test_a_stream_of_one_is_the_sum_of_its_terms_or_that_over_the_root_of_their_number(twin, spec):
    module = twin.module("residual")
    ours, streams = module.enter(spec, twin.array(TERMS[0])), enter(spec, {}, TERMS[0])
    block = module.residual(spec, RMSNormSpec(), twin.weights({}))
    for number, term in enumerate(TERMS[1:]):
        x_BTD, connection = read(spec, RMSNormSpec(), {}, streams, number)
        streams = write(spec, {}, streams, connection, term, number)
        our_x_BTD, connection = block.read(ours, number)
        assert_close(twin.numpy(our_x_BTD), x_BTD, FLOAT32)
        ours = block.write(ours, connection, twin.array(term), number)
    share = 1 if isinstance(spec, SumResidualSpec) else np.sqrt(len(TERMS))
    assert_close(leave(spec, RMSNormSpec(), {}, streams), sum(TERMS) / share, FLOAT32)
    assert_close(twin.numpy(ours), sum(TERMS) / share, FLOAT32)
    assert module.final_residual(spec, RMSNormSpec(), twin.weights({})) is None


def test_scales_and_biases_of_both_terms_match_the_reference(twin):
    spec = ScaledResidualSpec()
    names = [f"{term}_{part}" for term in ("stream", "block") for part in ("scale", "bias")]
    values = {name: normal(10 + place, D) for place, name in enumerate(names)}
    assert_layer_matches(
        twin,
        twin.module("residual").residual(spec, RMSNormSpec(), twin.weights(values)),
        lambda block, x, out: block.write(x, None, out, 3),
        lambda values, x, out: write(spec, values, x, None, out, 3),
        values,
        *TERMS[:2],
    )
    first = {name: value for name, value in values.items() if name.startswith("stream")}
    assert_layer_matches(
        twin,
        twin.module("residual").first_residual(spec, twin.weights(first)),
        lambda first, x: first(x),
        lambda values, x: enter(spec, values, x),
        first,
        TERMS[0],
    )
    expected = (TERMS[0] + values["stream_bias"]) * values["stream_scale"]
    expected = expected + (TERMS[1] + values["block_bias"]) * values["block_scale"]
    assert_close(write(spec, values, TERMS[0], None, TERMS[1], 0), expected, FLOAT32)


def test_a_scale_of_the_stream_alone_matches_the_reference(twin):
    spec, values = ScaledResidualSpec(terms="stream"), {"stream_scale": normal(14, D)}
    assert_layer_matches(
        twin,
        twin.module("residual").residual(spec, RMSNormSpec(), twin.weights(values)),
        lambda block, x, out: block.write(x, None, out, 3),
        lambda values, x, out: write(spec, values, x, None, out, 3),
        values,
        *TERMS[:2],
    )
    assert_close(
        write(spec, values, TERMS[0], None, TERMS[1], 0), TERMS[0] * values["stream_scale"] + TERMS[1], FLOAT32
    )
    assert twin.module("residual").first_residual(spec, twin.weights({})) is None


def test_the_former_flag_is_refused():
    with pytest.raises(SpecError, match="depth_scaled_residual"):
        validate(ModelSpec, {"embed_dim": 8, "layers": [], "depth_scaled_residual": True}, "config")


def test_attention_over_depth_reads_the_kept_sums_and_the_running_one(twin):
    """Blocks of two layers: 0 and 4 begin a sum; a query of zero reads the mean of the normalized sums."""
    spec, norm = BlockAttentionResidualSpec(layers_per_block=2), RMSNormSpec()
    terms = [*TERMS, *(normal(number, B, T, D) for number in range(4, 7))]
    module, query = twin.module("residual"), {"query": normal(20, D)}
    streams, ours = enter(spec, {}, terms[0]), module.enter(spec, twin.array(terms[0]))
    first = module.residual(spec, norm, twin.weights({}))
    reader = module.residual(spec, norm, twin.weights(query))
    for block, term in enumerate(terms[1:]):
        x_BTD, _ = read(spec, norm, query, streams, block)
        block_module = first if block == 0 else reader
        assert_close(twin.numpy(block_module.read(ours, block)[0]), terms[0] if block == 0 else x_BTD, FLOAT32)
        streams = write(spec, query, streams, None, term, block)
        ours = block_module.write(ours, None, twin.array(term), block)
    sums = np.stack([terms[0], sum(terms[1:5]), sum(terms[5:])], axis=2)
    assert_close(streams, sums, FLOAT32)
    normed = sums / np.sqrt(np.mean(sums**2, axis=-1, keepdims=True) + 1e-6)
    assert_close(leave(spec, norm, {"query": np.zeros(D)}, streams), np.mean(normed, axis=2), FLOAT32)
    final = module.final_residual(spec, norm, twin.weights(query))
    assert_layer_matches(
        twin, final, lambda final, x: final(x), lambda values, x: leave(spec, norm, values, x), query, streams
    )
