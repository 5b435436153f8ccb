"""Residual streams: the value of both backends against the reference. Whole models: tests/layers/test_layer.py."""

import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.residual import enter, leave, read, write
from moezoo.core.spec import DepthScaledResidualSpec, ModelSpec, RMSNormSpec, ScaledResidualSpec, SumResidualSpec
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


def test_the_former_flag_is_refused():
    with pytest.raises(SpecError, match="depth_scaled_residual"):
        validate(ModelSpec, {"embed_dim": 8, "layers": [], "depth_scaled_residual": True}, "config")
