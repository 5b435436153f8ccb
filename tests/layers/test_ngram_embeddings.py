import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.ngram_embeddings import ngram_embeddings, ngram_rows
from moezoo.core.reference.positions import packed_documents
from moezoo.core.spec import NGramEmbeddingsSpec, RMSNormSpec
from tests.support.tolerances import BFLOAT16, BFLOAT16_GRADIENT, EXACT, FLOAT32, assert_close
from tests.support.twins import B, D, Twin, V, assert_layer_matches, assert_reference_gradient, normal

J, T, Z, RESET = 2, 9, 12, 3
SPEC = NGramEmbeddingsSpec(
    largest=4, heads=2, dim=Z, table_size=11, conv_width=3, reset_token=RESET, index=1, seed=5, multiple=8, parts=2
)
NORM = RMSNormSpec(epsilon=1e-3, scale="zero_centred")
X_BTJD = normal(20, B, T, J, D)  # no gate near zero, where the derivative of its root has no bound
TOKENS_BT = np.random.default_rng(0).integers(0, 6, (B, T)).astype(np.int32)
VALUES = {
    "weight": normal(1, 2, SPEC.rows // 2, SPEC.head_dim),
    "w_key": normal(2, Z, J, D),
    "w_value": normal(3, Z, D),
    "conv": normal(4, 3, J, D),
    **{f"{which}_norm.scale": normal(5 + place, J, D) for place, which in enumerate(("key", "query", "conv"))},
}


def layer_of(twin: Twin):
    return twin.module("ngram_embeddings").NGramEmbeddings(SPEC, NORM, V, twin.weights(VALUES))


def empty_state(twin: Twin, batch: int = B):
    return twin.module("kv_cache").empty_ngram_state(SPEC, batch, J, D, twin.array(X_BTJD).dtype)


def out(tokens_BT=TOKENS_BT, documents=None):
    return lambda values, x_BTJD: ngram_embeddings(SPEC, NORM, V, values, tokens_BT, x_BTJD, documents)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_value_and_gradients_match_the_reference(twin, dtype):
    tokens = twin.array(TOKENS_BT)
    tolerances = {} if dtype is None else {"tolerance": BFLOAT16, "gradient_tolerance": BFLOAT16_GRADIENT}
    assert_layer_matches(
        twin,
        layer_of(twin),
        lambda layer, x: layer(tokens, x)[0],
        out(),
        VALUES,
        X_BTJD,
        dtype=dtype,
        **tolerances,
    )


@pytest.mark.parametrize("table_size", [11, 20_000_000, 2**26])
def test_rows_are_exact_for_any_size_of_the_tables(twin, table_size):
    """Products of 63 bits; a remainder takes 8, 4 or 2 bits at a time where there are none of 64."""
    vocab, spec = 248_320, NGramEmbeddingsSpec(largest=3, heads=2, dim=4, table_size=table_size, reset_token=RESET)
    tokens_BT = np.random.default_rng(1).integers(0, vocab, (2, 50)).astype(np.int32)
    before_BS = np.full((2, 2), RESET)
    function = twin.compiled_function(
        lambda tokens, before: twin.module("ngram_embeddings").ngram_rows(spec, vocab, tokens, before)
    )
    found = twin.numpy(function(twin.array(tokens_BT), twin.array(before_BS)))
    assert_close(found, ngram_rows(spec, vocab, tokens_BT), EXACT)
    last, multipliers, sizes = [int(token) for token in tokens_BT[1, -3:]], spec.multipliers(vocab), spec.sizes
    mixed = last[2] * multipliers[0] ^ last[1] * multipliers[1] ^ last[0] * multipliers[2]
    assert found[1, -1, 3] == mixed % sizes[3] + sum(sizes[:3])


def test_a_context_ends_behind_a_reset_token_at_the_start_and_between_documents():
    def rows(tokens, document=None):
        documents = None if document is None else packed_documents(np.array([document]))
        return ngram_rows(SPEC, V, np.array([tokens]), documents)[0]

    whole = rows([4, 5, RESET, 1, 2])
    assert_close(whole[3:], rows([9, 9, RESET, 1, 2])[3:], EXACT)
    assert_close(whole[3:], rows([1, 2]), EXACT)
    assert np.any(whole[2] != rows([9, 9, RESET])[2])  # the reset token itself still sees what it ends
    assert_close(rows([4, 5, 1, 2], [0, 0, 1, 1])[2:], rows([1, 2]), EXACT)
    assert np.any(rows([4, 5, 1, 2])[2:] != rows([1, 2]))


def test_documents_do_not_affect_each_other(twin):
    document_BT = np.array([[0] * 4 + [1] * 5, [0] * 9, [0] * 2 + [1] * 7])
    expected = out(documents=packed_documents(document_BT))(VALUES, X_BTJD)
    assert_close(out(TOKENS_BT[:1, 4:])(VALUES, X_BTJD[:1, 4:]), expected[:1, 4:], EXACT)
    documents = twin.module("positions").packed_documents(twin.array(document_BT))
    layer = twin.compiled(layer_of(twin))
    found = layer(twin.array(TOKENS_BT), twin.array(X_BTJD), documents=documents)[0]
    assert_close(twin.numpy(found), expected, FLOAT32)


def test_parts_with_a_state_equal_the_whole_also_behind_padding(twin):
    """A part shorter than the contexts, tokens one at a time, and a part longer than both contexts and filter."""
    parts, first = (2, 1, 1, 9), np.array([0, 3, 1])
    length = sum(parts)
    tokens_BT = np.random.default_rng(2).integers(0, 6, (B, length)).astype(np.int32)
    x_BTJD, state, start, found = normal(9, B, length, J, D), empty_state(twin), 0, []
    layer = twin.compiled(layer_of(twin))
    for part in parts:
        of_part = twin.array(tokens_BT[:, start : start + part]), twin.array(x_BTJD[:, start : start + part])
        added, state = layer(*of_part, state, cached=start, first_B=twin.array(first))
        found.append(twin.numpy(added))
        start += part
    for row, begin in enumerate(first):
        own = slice(row, row + 1), slice(begin, None)
        expected = out(tokens_BT[own])(VALUES, x_BTJD[own])
        assert_close(np.concatenate(found, axis=1)[own], expected, FLOAT32)


def test_reference_gradient_agrees_with_finite_differences():
    names = ("weight", "conv", "query_norm.scale")
    assert_reference_gradient(
        lambda x, *some: out(TOKENS_BT[:1, :4])(VALUES | dict(zip(names, some, strict=True)), x),
        X_BTJD[:1, :4],
        *(VALUES[name] for name in names),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 10}, "dim is 10, which is not divisible by the 16 heads of n = 2 to 3"),
        ({"parts": 7}, "parts is 7, which does not divide the .* rows"),
        ({"heads": 4000}, "heads is 4000, 8000 of n = 2 to 3, at index 0 .*Use at most 4096 in all"),
        ({"table_size": 2**30, "heads": 1}, "table_size is 1073741824, which makes"),
    ],
)
def test_impossible_sizes_are_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        validate(NGramEmbeddingsSpec, {"dim": 32, "table_size": 100, **fields}, "config")
