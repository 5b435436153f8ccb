import numpy as np
import pytest

from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.compressed_attention import compressed_attention
from moezoo.core.reference.positions import Documents, packed_documents
from moezoo.core.spec import (
    CompressedAttentionSpec,
    CompressionSpec,
    GatedFeedForwardSpec,
    IndexerSpec,
    LayerSpec,
    ModelSpec,
    RMSNormSpec,
    RoPESpec,
)
from tests.layers.pieces import assert_pieces_match
from tests.support.tolerances import FLOAT32, FLOAT64, assert_close
from tests.support.twins import B, D, F, H, M, N, Twin, V, assert_layer_matches, assert_reference_gradient, normal

LENGTH, RATIO = 14, 3
INDEXER = IndexerSpec(
    num_heads=3, head_dim=5, top_k=2, layout="interleaved", rotated="last", key_norm=RMSNormSpec(epsilon=1e-3)
)


def spec_of(compression: CompressionSpec | None = None, **fields) -> CompressedAttentionSpec:
    return CompressedAttentionSpec(
        num_heads=N,
        head_dim=H,
        rope_head_dim=4,
        query_latent_dim=9,
        output_groups=M,
        output_latent_dim=5,
        window=4,
        compression=compression,
        **fields,
    )


SPECS = {
    "window": spec_of(position=RoPESpec(base=50), norm=RMSNormSpec(epsilon=1e-3)),
    "entries": spec_of(CompressionSpec(ratio=RATIO)),
    "overlap": spec_of(CompressionSpec(ratio=RATIO, overlap=True)),
    "indexer": spec_of(CompressionSpec(ratio=RATIO, overlap=True, indexer=INDEXER)),
    "first rotated": spec_of(
        CompressionSpec(ratio=RATIO, indexer=INDEXER.model_copy(update={"rotated": "first", "layout": "half_split"}))
    ),
}
each_on_its_backends = pytest.mark.parametrize(
    ("spec", "twin"),
    [
        pytest.param(spec, backend, id=f"{name}-{backend}", marks=marks)
        for name, spec in SPECS.items()
        for backend in ("jax", "mlx")
        # The indexer's layer has every path of JAX, and compiling takes seconds.
        for marks in [pytest.mark.release if backend == "jax" and name != "indexer" else ()]
    ],
    indirect=["twin"],
)
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
X_BTD = normal(0, B, LENGTH, D)


def values_of(spec: CompressedAttentionSpec) -> dict[str, np.ndarray]:
    layer = LayerSpec(attention=spec, feed_forward=GatedFeedForwardSpec(hidden_dim=F))
    model, start = ModelSpec(vocab_size=V, embed_dim=D, layers=(layer,)), "layers.0.attention."
    shapes = {name: value.shape for name, value in initial_weights(model, seed=0).items() if name.startswith(start)}
    return {
        name.removeprefix(start): (0.3 if len(shape) > 1 else 1.0) * normal(seed, *shape)
        for seed, (name, shape) in enumerate(shapes.items(), start=1)
    }


def layer_of(twin: Twin, spec: CompressedAttentionSpec):
    return twin.module("compressed_attention").CompressedAttention(spec, twin.weights(values_of(spec)), 0)


def empty(twin: Twin, spec: CompressedAttentionSpec, batch: int, size: int = LENGTH):
    return twin.module("entry_cache").empty_compressed_cache(spec, batch, size, twin.array(np.zeros(1)).dtype)


def reference(spec: CompressedAttentionSpec, x_BTD: np.ndarray) -> np.ndarray:
    return compressed_attention(spec, values_of(spec), x_BTD).out_BTD


def test_value_and_gradients_match_the_reference(twin):
    """Parity has the others: of a combination on JAX, of the tiny config on MLX."""
    spec = SPECS["entries"]
    assert_layer_matches(
        twin,
        layer_of(twin, spec),
        lambda layer, x: layer(x).out_BTD,
        lambda values, x: compressed_attention(spec, values, x).out_BTD,
        values_of(spec),
        X_BTD,
    )


@each_on_its_backends
def test_pieces_and_single_tokens_equal_the_uncached_layer(twin, spec):
    """Pieces within a group, across several, and of one token each; rows begin at different slots."""
    layer, first, pieces = layer_of(twin, spec), (2, 0, 5), (2, 1, 1, 7, 1, 1, 1)
    assert_pieces_match(twin, layer, empty(twin, spec, B), lambda x: reference(spec, x), pieces, first, X_BTD)


@each_on_its_backends
def test_documents_are_computed_as_if_each_were_alone(twin, spec):
    """Their groups begin anew; one is shorter than a group, and one row ends in padding."""
    document_BT = np.array([[0] * 5 + [1] * 9, [0] * 2 + [1] * 8 + [-1] * 4, [0] * 14])
    expected = compressed_attention(spec, values_of(spec), X_BTD, documents=packed_documents(document_BT))
    for row, start, end in ((0, 0, 5), (0, 5, 14), (1, 0, 2), (1, 2, 10), (2, 0, 14)):
        alone = reference(spec, X_BTD[row : row + 1, start:end])
        assert_close(expected.out_BTD[row : row + 1, start:end], alone, FLOAT64)
    documents = twin.module("positions").packed_documents(twin.array(document_BT))
    found = twin.compiled_function(lambda x: layer_of(twin, spec)(x, documents=documents))(twin.array(X_BTD))
    assert_close(twin.numpy(found.out_BTD), expected.out_BTD, FLOAT32)
    if expected.index_loss is not None:
        assert_close(float(found.index_loss), expected.index_loss, FLOAT32)


@each_spec
def test_the_reference_is_causal_and_an_entry_is_seen_once_its_group_is_complete(spec):
    whole = reference(spec, X_BTD)
    for length in range(1, LENGTH):
        assert_close(reference(spec, X_BTD[:, :length]), whole[:, :length], FLOAT64)
    if spec is SPECS["entries"]:
        changed = X_BTD.copy()
        changed[:, 1] += 1  # of the group 0 .. 2, and seen by keys until 4
        moved = np.any(np.abs(reference(spec, changed) - whole) > 1e-9, axis=(0, 2))
        np.testing.assert_array_equal(np.flatnonzero(moved), np.arange(1, LENGTH))
        changed[:, 1] -= 1
        changed[:, 0] += 1
        without = SPECS["window"].model_copy(update={"position": spec.position, "norm": spec.norm})
        own = {name: value for name, value in values_of(spec).items() if not name.startswith("compressor")}
        window = [compressed_attention(without, own, x).out_BTD for x in (X_BTD, changed)]
        assert_close(window[0][:, 4:], window[1][:, 4:], FLOAT64)


def test_values_are_rotated_back_so_that_only_distances_count():
    """Keys are also values, and are rotated: at other positions the result is the same."""
    spec, moved = SPECS["window"], Documents(np.zeros((B, LENGTH), int), np.tile(np.arange(LENGTH) + 7, (B, 1)))
    found = compressed_attention(spec, values_of(spec), X_BTD, documents=moved).out_BTD
    assert_close(found, reference(spec, X_BTD), FLOAT64)


def test_without_a_complete_group_there_are_no_entries_and_no_loss(twin):
    spec, x_BTD = SPECS["indexer"], X_BTD[:, : RATIO - 1]
    expected = compressed_attention(spec, values_of(spec), x_BTD)
    found = twin.compiled(layer_of(twin, spec))(twin.array(x_BTD))
    assert_close(twin.numpy(found.out_BTD), expected.out_BTD, FLOAT32)
    assert float(found.index_loss) == expected.index_loss == 0


def test_reference_gradient_agrees_with_finite_differences():
    spec = SPECS["overlap"]
    values, names = values_of(spec), ("sink", "compressor.position_bias")
    assert_reference_gradient(
        lambda x, *some: compressed_attention(spec, values | dict(zip(names, some, strict=True)), x).out_BTD,
        X_BTD[:1, :6],
        *(values[name] for name in names),
    )
