"""Residual streams: the value of both backends against the reference. Whole models: tests/layers/test_layer.py."""

import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.residual import enter, leave, read, write
from moezoo.core.spec import DepthScaledResidualSpec, ModelSpec, SumResidualSpec
from tests.support.tolerances import FLOAT32, assert_close
from tests.support.twins import B, D, T, normal

TERMS = [normal(number, B, T, D) for number in range(4)]


@pytest.mark.parametrize("spec", [SumResidualSpec(), DepthScaledResidualSpec()])
def test_a_stream_of_one_is_the_sum_of_its_terms_or_that_over_the_root_of_their_number(twin, spec):
    module = twin.module("residual")
    ours, streams = module.enter(spec, twin.array(TERMS[0])), enter(spec, TERMS[0])
    block = module.residual(spec, twin.weights({}))
    for number, term in enumerate(TERMS[1:]):
        x_BTD, connection = read(spec, {}, streams, number)
        streams = write(spec, {}, streams, connection, term, number)
        our_x_BTD, connection = block.read(ours, number)
        assert_close(twin.numpy(our_x_BTD), x_BTD, FLOAT32)
        ours = block.write(ours, connection, twin.array(term), number)
    share = 1 if isinstance(spec, SumResidualSpec) else np.sqrt(len(TERMS))
    assert_close(leave(spec, {}, streams), sum(TERMS) / share, FLOAT32)
    assert_close(twin.numpy(ours), sum(TERMS) / share, FLOAT32)
    assert module.final_residual(spec, twin.weights({})) is None


def test_the_former_flag_is_refused():
    with pytest.raises(SpecError, match="depth_scaled_residual"):
        validate(ModelSpec, {"embed_dim": 8, "layers": [], "depth_scaled_residual": True}, "config")
