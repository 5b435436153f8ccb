import numpy as np

from moezoo.core.reference.mamba import mamba
from moezoo.core.reference.positions import packed_documents
from moezoo.core.spec import MambaSpec, RMSNormSpec
from tests.layers.pieces import assert_pieces_match
from tests.support.tolerances import FLOAT32, assert_close
from tests.support.twins import B, D, F, T, Twin, assert_layer_matches, assert_reference_gradient, normal

Z, RANK, WIDTH = 6, 5, 4
SPEC = MambaSpec(inner_dim=F, state_dim=Z, step_rank=RANK, conv_width=WIDTH, bias=True, norm=RMSNormSpec(epsilon=1e-2))
SHAPES = {
    **{f"w_{name}": (D, F) for name in ("value", "gate")},
    "w_step_down": (F, RANK),
    "w_key": (F, Z),
    "w_query": (F, Z),
    "w_step": (RANK, F),
    "w_output": (F, D),
    "conv": (WIDTH, F),
    **dict.fromkeys(("b_value", "b_gate", "b_conv", "step_bias", "skip"), (F,)),
    "b_output": (D,),
    "log_decay_rate": (F, Z),
    "step_down_norm.scale": (RANK,),
    "key_norm.scale": (Z,),
    "query_norm.scale": (Z,),
}
SCALES = {"w": 0.3, "log": 0.5}
VALUES = {
    name: SCALES.get(name.split("_")[0], 1.0) * normal(seed, *shape)
    for seed, (name, shape) in enumerate(SHAPES.items(), start=1)
}
X_BTD = normal(0, B, T, D)
SEVERAL_CHUNKS = 70  # 32 is one chunk


def layer_of(twin: Twin):
    return twin.module("mamba").Mamba(SPEC, twin.weights(VALUES), 0)


def reference(values, x_BTD):
    return mamba(SPEC, values, x_BTD).out_BTD


def caches(twin: Twin, batch: int):
    return twin.module("kv_cache").empty_scan_cache(SPEC, batch, twin.array(np.zeros(1)).dtype)


def test_value_and_gradients_over_several_chunks_match_the_reference(twin):
    x_BTD = normal(0, 2, SEVERAL_CHUNKS, D)
    assert_layer_matches(twin, layer_of(twin), lambda layer, x: layer(x).out_BTD, reference, VALUES, x_BTD)


def test_padding_and_pieces_do_not_change_the_cache(twin):
    """Pieces shorter than the convolution, one token, and more than a chunk; the cache is that of a row alone."""
    x_BTD, first = normal(0, B, 42, D), (2, 0, 4)
    layer = layer_of(twin)
    cache = assert_pieces_match(twin, layer, caches(twin, B), lambda x: reference(VALUES, x), (3, 1, 38), first, x_BTD)
    alone = twin.compiled(layer)(twin.array(x_BTD[:1, first[0] :]), caches(twin, 1)).cache
    for name in ("state_BFZ", "input_BSF"):
        actual, plain = (twin.numpy(getattr(each, name)) for each in (cache, alone))
        assert_close(actual[:1], plain, FLOAT32, name)


def test_a_document_begins_with_an_empty_state(twin):
    document_BT = np.array([[0, 0, 1, 1, 1]] * B)
    documents = twin.module("positions").packed_documents(twin.array(document_BT))
    found = twin.numpy(twin.compiled(layer_of(twin))(twin.array(X_BTD), documents=documents).out_BTD)
    expected = mamba(SPEC, VALUES, X_BTD, documents=packed_documents(document_BT)).out_BTD
    alone = np.concatenate([reference(VALUES, X_BTD[:, part]) for part in (slice(0, 2), slice(2, T))], axis=1)
    assert_close(expected, alone, FLOAT32)
    assert_close(found, expected, FLOAT32)


def test_reference_gradient_agrees_with_finite_differences():
    names = ("w_key", "step_bias", "log_decay_rate", "skip")
    assert_reference_gradient(
        lambda x, *some: reference(VALUES | dict(zip(names, some, strict=True)), x),
        X_BTD[:1, :3],
        *(VALUES[name] for name in names),
    )
