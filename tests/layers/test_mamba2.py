import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.mamba2 import mamba2
from moezoo.core.reference.positions import packed_documents
from moezoo.core.spec import Mamba2Spec
from tests.layers.pieces import assert_pieces_match
from tests.support.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, assert_close
from tests.support.twins import B, D, H, M, N, T, Twin, assert_layer_matches, assert_reference_gradient, normal

Z, WIDTH = 10, 4
SIZES = {"num_heads": N, "head_dim": Z, "state_dim": H, "num_groups": M, "conv_width": WIDTH}
# Half of the steps are clipped. The epsilon bounds the gradient of a group of heads that is close to zero.
SPEC = Mamba2Spec(**SIZES, bias=True, min_step=0.4, max_step=1.5, norm_epsilon=1e-2)
BARE = Mamba2Spec(**SIZES, conv_bias=False, norm_epsilon=1e-2)
SHAPES = {
    **{f"w_{name}": (D, N, Z) for name in ("gate", "value")},
    **{f"w_{name}": (D, M, H) for name in ("key", "query")},
    "w_step": (D, N),
    "conv_value": (WIDTH, N, Z),
    **{f"conv_{name}": (WIDTH, M, H) for name in ("key", "query")},
    "w_output": (N, Z, D),
    **dict.fromkeys(("step_bias", "log_decay_rate", "skip"), (N,)),
    "norm_scale": (N, Z),
}
BIASES = {
    **dict.fromkeys(("b_gate", "b_value", "b_conv_value"), (N, Z)),
    **dict.fromkeys(("b_key", "b_query", "b_conv_key", "b_conv_query"), (M, H)),
    "b_step": (N,),
    "b_output": (D,),
}
SCALES = {"w": 0.3, "log": 0.5}
VALUES = {
    name: SCALES.get(name.split("_")[0], 1.0) * normal(seed, *shape)
    for seed, (name, shape) in enumerate((SHAPES | BIASES).items(), start=1)
}
X_BTD = normal(0, B, T, D)


def layer_of(twin: Twin, spec: Mamba2Spec = SPEC):
    values = VALUES if spec is SPEC else {name: VALUES[name] for name in SHAPES}
    return twin.module("mamba2").Mamba2(spec, twin.weights(values), 0)


def reference(values, x_BTD, spec: Mamba2Spec = SPEC):
    return mamba2(spec, values, x_BTD).out_BTD


def caches(twin: Twin, batch: int):
    return twin.module("kv_cache").empty_recurrent_cache(SPEC, batch, twin.array(np.zeros(1)).dtype)


def test_value_and_gradients_match_the_reference(twin):
    assert_layer_matches(twin, layer_of(twin), lambda layer, x: layer(x).out_BTD, reference, VALUES, X_BTD)


def test_without_biases_and_clipping_it_matches_the_reference(twin):
    found = twin.compiled(layer_of(twin, BARE))(twin.array(X_BTD)).out_BTD
    assert_close(twin.numpy(found), reference(VALUES, X_BTD, BARE), FLOAT32)


@pytest.mark.release
def test_bfloat16_is_near_float32(twin):
    assert_layer_matches(
        twin,
        layer_of(twin),
        lambda layer, x: layer(x).out_BTD,
        reference,
        VALUES,
        X_BTD,
        dtype="bfloat16",
        tolerance=BFLOAT16,
        gradient_tolerance=BFLOAT16_GRADIENT,
    )


def test_half_of_the_steps_are_clipped():
    step = np.logaddexp(0, X_BTD @ VALUES["w_step"] + VALUES["b_step"] + VALUES["step_bias"])
    assert 0.2 < np.mean((step < 0.4) | (step > 1.5)) < 0.8


def test_padding_and_pieces_do_not_change_the_cache(twin):
    """Pieces shorter than the convolution, one token, and several chunks; the cache is that of a row alone."""
    length = 74
    x_BTD, first = normal(0, B, length, D), (2, 0, 4)
    layer = layer_of(twin)
    pieces = (3, 1, length - 4)
    cache = assert_pieces_match(twin, layer, caches(twin, B), lambda x: reference(VALUES, x), pieces, first, x_BTD)
    alone = twin.compiled(layer)(twin.array(x_BTD[:1, first[0] :]), caches(twin, 1)).cache
    for name in ("state_BMGHZ", "query_BSMH", "key_BSMH", "value_BSNZ"):
        actual, plain = (twin.numpy(getattr(each, name)) for each in (cache, alone))
        assert_close(actual[:1], plain, FLOAT32, name)


def test_a_document_begins_with_an_empty_state(twin):
    document_BT = np.array([[0, 0, 1, 1, 1]] * B)
    documents = twin.module("positions").packed_documents(twin.array(document_BT))
    found = twin.numpy(twin.compiled(layer_of(twin))(twin.array(X_BTD), documents=documents).out_BTD)
    expected = mamba2(SPEC, VALUES, X_BTD, documents=packed_documents(document_BT)).out_BTD
    alone = np.concatenate([reference(VALUES, X_BTD[:, part]) for part in (slice(0, 2), slice(2, T))], axis=1)
    assert_close(expected, alone, FLOAT32)
    assert_close(found, expected, FLOAT32)


def test_reference_gradient_agrees_with_finite_differences():
    names = ("conv_key", "step_bias", "log_decay_rate", "w_step", "skip", "norm_scale")
    assert_reference_gradient(
        lambda x, *some: reference(VALUES | dict(zip(names, some, strict=True)), x),
        X_BTD[:1, :3],
        *(VALUES[name] for name in names),
    )


def test_groups_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(SpecError, match=r"num_heads is 8, which is not divisible by num_groups = 3.*Use a multiple"):
        validate(Mamba2Spec, SIZES | {"num_groups": 3}, "config")
