"""Properties of `ModelSpec` that the backends build a model from."""

from moezoo.core.spec import (
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    RouterSpec,
)

ATTENTION = GroupedQueryAttentionSpec(num_heads=4, num_kv_heads=2, head_dim=6)
DENSE = GatedFeedForwardSpec(hidden_dim=28)


def moe(num_experts: int) -> MoESpec:
    return MoESpec(num_experts=num_experts, router=RouterSpec(top_k=2), experts=DENSE)


def test_moes_pairs_each_moe_layer_with_its_index_and_counts_repeats():
    dense = LayerSpec(attention=ATTENTION, feed_forward=DENSE)
    layers = (
        dense,
        LayerSpec(repeat=2, attention=ATTENTION, moe=moe(5)),
        dense,
        LayerSpec(attention=ATTENTION, moe=moe(7)),
    )
    spec = ModelSpec(vocab_size=11, embed_dim=20, layers=layers)

    assert [(index, part.num_experts) for index, part in spec.moes] == [(1, 5), (2, 5), (4, 7)]
    assert spec.moe_layers == (1, 2, 4)
    assert all(spec.all_layers[index].moe is part for index, part in spec.moes)


def test_moes_is_empty_for_a_dense_model():
    spec = ModelSpec(vocab_size=11, embed_dim=20, layers=(LayerSpec(attention=ATTENTION, feed_forward=DENSE),))

    assert spec.moes == ()
    assert spec.moe_layers == ()
