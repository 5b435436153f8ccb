"""Grouped-query attention to the blocks of tokens that an indexer chooses: values, caches, and what is chosen."""

import numpy as np
import pytest

from moezoo.core.reference.attention import grouped_query_attention, visible
from moezoo.core.reference.positions import packed_documents, within_documents
from moezoo.core.reference.sparse_attention import block_indexer, choose_blocks
from moezoo.core.spec import BlockIndexerSpec, GroupedQueryAttentionSpec, RMSNormSpec, RoPESpec
from tests.support.tolerances import EXACT, FLOAT32, assert_close
from tests.support.twins import B, D, H, M, N, Twin, assert_layer_matches, normal

T, SIZE, TOP_K, I, W = 14, 3, 2, 5, 7
INDEXER = BlockIndexerSpec(
    num_heads=I, head_dim=W, top_k=TOP_K, block_size=SIZE, norm=RMSNormSpec(scale="zero_centred")
)
SPEC = GroupedQueryAttentionSpec(
    num_heads=N, num_kv_heads=M, head_dim=H, position=RoPESpec(fraction=2 / 3), indexer=INDEXER, scale=0.7
)
INDEX = {
    "w_query": normal(5, D, I, W),
    "w_key": normal(6, D, W),
    "query_norm.scale": normal(7, W),
    "key_norm.scale": normal(8, W),
}
VALUES = {
    "w_query": 0.3 * normal(1, D, N, H),
    "w_key": 0.3 * normal(2, D, M, H),
    "w_value": 0.3 * normal(3, D, M, H),
    "w_output": 0.3 * normal(4, N, H, D),
    **{f"indexer.{name}": value for name, value in INDEX.items()},
}
X_BTD = normal(0, B, T, D)


SCORED = SPEC.model_copy(
    update={"indexer": INDEXER.model_copy(update={"num_heads": M, "pooled": "scores", "local_blocks": 1})}
)
SCORED_VALUES = VALUES | {"indexer.w_query": normal(5, D, M, W)}
KINDS = {"keys": (SPEC, VALUES), "scores": (SCORED, SCORED_VALUES)}
pooled = pytest.mark.parametrize("pooled", KINDS)


def layer_of(twin: Twin, pooled):
    spec, values = KINDS[pooled]
    return twin.module("attention").GroupedQueryAttention(spec, twin.weights(values), 0)


def out(pooled="keys", documents=None):
    spec = KINDS[pooled][0]
    return lambda values, x_BTD: grouped_query_attention(spec, values, x_BTD, documents=documents).out_BTD


def chosen(x_BTD, documents=None, spec=SPEC, values=VALUES):
    position = np.arange(x_BTD.shape[1]) if documents is None else documents.position_BT
    own = {name.removeprefix("indexer."): value for name, value in values.items() if name.startswith("indexer.")}
    query, key = block_indexer(spec.indexer, spec.position, H, own, x_BTD, position, documents)
    mask = within_documents(visible(spec, position, position), documents)
    return choose_blocks(spec.indexer, query, key, position, position, mask)


@pooled
def test_value_and_gradients_match_the_reference(twin, pooled):
    values = KINDS[pooled][1]
    assert_layer_matches(twin, layer_of(twin, pooled), lambda layer, x: layer(x).out_BTD, out(pooled), values, X_BTD)


@pytest.mark.parametrize("local", [0, 1, 2])
def test_each_head_chooses_the_blocks_of_the_highest_scores(local):
    indexer = SCORED.indexer.model_copy(update={"local_blocks": local})
    spec = SCORED.model_copy(update={"indexer": indexer})
    own = {name.removeprefix("indexer."): value for name, value in SCORED_VALUES.items()}
    query, key = block_indexer(indexer, spec.position, H, own, X_BTD, np.arange(T))
    found = chosen(X_BTD, spec=spec, values=SCORED_VALUES)
    for t in range(T):
        for head in range(M):
            scores = key[0, : t + 1] @ query[0, t, head]
            best = {c: scores[c * SIZE : (c + 1) * SIZE].max() for c in range(t // SIZE + 1)}
            best |= dict.fromkeys(range(max(t // SIZE - local + 1, 0), t // SIZE + 1), np.inf)
            blocks = sorted(best, key=best.__getitem__)[-TOP_K:]
            assert set(np.flatnonzero(found[0, head, t])) == {s for s in range(t + 1) if s // SIZE in blocks}


def test_whole_blocks_are_chosen_and_the_tokens_behind_them():
    for t in range(T):
        complete = (t + 1) // SIZE
        blocks = chosen(X_BTD)[0, t, : complete * SIZE].reshape(complete, SIZE)
        assert np.all(blocks.all(axis=1) == blocks.any(axis=1))
        assert blocks.any(axis=1).sum() == min(TOP_K, complete)
        assert np.all(chosen(X_BTD)[0, t, complete * SIZE : t + 1])
        assert not np.any(chosen(X_BTD)[0, t, t + 1 :])


def test_the_key_of_a_block_is_the_mean_of_its_tokens_rotated_as_the_first():
    position = SPEC.position.model_copy(update={"fraction": 1.0})
    from moezoo.core.reference.positions import rotate

    _, key_BTH = block_indexer(INDEXER, SPEC.position, H, INDEX, X_BTD, np.arange(T))
    mean = np.mean(X_BTD[:, 3:6] @ INDEX["w_key"], axis=1)
    mean = mean / np.sqrt(np.mean(mean**2, axis=-1, keepdims=True) + 1e-6) * (1 + INDEX["key_norm.scale"])
    rotated = rotate(position, mean[:, None, None, :4], np.array([3]))[:, 0, 0]
    assert_close(key_BTH[:, 5], np.concatenate([rotated, mean[:, 4:]], axis=-1), FLOAT32)


@pooled
def test_documents_have_blocks_of_their_own(twin, pooled):
    document_BT = np.array([[0] * 5 + [1] * 9, [0] * 14, [0] * 2 + [1] * 12])
    documents = packed_documents(document_BT)
    spec, values = KINDS[pooled]
    both = chosen(X_BTD, documents, spec, values)[0, ..., 5:, 5:]
    assert_close(both, chosen(X_BTD[:1, 5:], None, spec, values)[0], EXACT)
    ours = twin.module("positions").packed_documents(twin.array(document_BT))
    found = twin.compiled(layer_of(twin, pooled))(twin.array(X_BTD), documents=ours).out_BTD
    assert_close(twin.numpy(found), out(pooled, documents)(values, X_BTD), FLOAT32)


@pooled
def test_cached_parts_equal_the_uncached_pass_also_behind_padding(twin, pooled):
    zeros = [twin.array(np.zeros((B, T, *shape))) for shape in ((M, H), (M, H), (W,))]
    empty = twin.array(np.array(0, np.int32)) if twin.name == "jax" else 0
    cache, first, start, found = twin.module("kv_cache").IndexedCache(*zeros, empty), np.array([0, 4, 1]), 0, []
    layer = twin.compiled(layer_of(twin, pooled))
    for part in (5, 1, 1, 7):
        attended = layer(twin.array(X_BTD[:, start : start + part]), cache, first_B=twin.array(first))
        cache, start = attended.cache, start + part
        found.append(twin.numpy(attended.out_BTD))
    for row, begin in enumerate(first):
        own = slice(row, row + 1), slice(begin, None)
        assert_close(np.concatenate(found, axis=1)[own], out(pooled)(KINDS[pooled][1], X_BTD[own]), FLOAT32)


@pytest.mark.parametrize("changed", [{"w_query": 3.0}, {"w_key": 0.2}])
def test_sizes_of_index_queries_and_keys_do_not_matter(changed):
    scaled = VALUES | {f"indexer.{name}": factor * INDEX[name] for name, factor in changed.items()}
    assert_close(out()(scaled, X_BTD), out()(VALUES, X_BTD), FLOAT32)


@pooled
@pytest.mark.parametrize("document_BT", [None, np.array([[0] * 5 + [1] * 9, [0] * 14, [0] * 2 + [1] * 12])])
def test_chunks_of_queries_choose_what_the_whole_chooses(twin, pooled, document_BT, monkeypatch):
    monkeypatch.setattr(twin.module("attention"), "chunk_length", lambda length: 5)
    ours = None if document_BT is None else twin.module("positions").packed_documents(twin.array(document_BT))
    found = twin.compiled(layer_of(twin, pooled))(twin.array(X_BTD), documents=ours).out_BTD
    expected = out(pooled, packed_documents(document_BT))(KINDS[pooled][1], X_BTD)
    assert_close(twin.numpy(found), expected, FLOAT32)
