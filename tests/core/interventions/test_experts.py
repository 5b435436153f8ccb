import pytest

from moezoo.core.errors import SpecError
from moezoo.core.interventions.experts import EVERY_EXPERT, name_experts, parse_experts
from moezoo.core.spec import (
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    RouterSpec,
    ZeroComputationSpec,
)

ATTENTION, FFN = GroupedQueryAttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4), GatedFeedForwardSpec(hidden_dim=8)
MOE = MoESpec(num_experts=6, router=RouterSpec(top_k=2), experts=FFN, zero_computation=ZeroComputationSpec(num_copy=2))
SPEC = ModelSpec(
    vocab_size=31,
    embed_dim=8,
    layers=(
        LayerSpec(attention=ATTENTION, feed_forward=FFN),
        LayerSpec(repeat=2, attention=ATTENTION, moe=MOE),
        LayerSpec(attention=ATTENTION, moe=MOE.model_copy(update={"num_experts": 3, "zero_computation": None})),
    ),
)


@pytest.mark.parametrize(
    ("names", "expected", "name"),
    [
        ("layers[1].experts[5,7]", {1: (5, 7)}, "layers[1].experts[5,7]"),
        ("layers[2,3].experts[0-2]", {2: (0, 1, 2), 3: (0, 1, 2)}, "layers[2-3].experts[0-2]"),
        (" layers[ 1-2 ].experts[4, 0-1,1] ", {1: (0, 1, 4), 2: (0, 1, 4)}, "layers[1-2].experts[0-1,4]"),
        ("layers[*].experts[2]", {1: (2,), 2: (2,), 3: (2,)}, "layers[1-3].experts[2]"),
        ("layers[3].experts[*];layers[1].experts[7]", {1: (7,), 3: (0, 1, 2)}, None),
        (["layers[1].experts[0]", "layers[1].experts[3]"], {1: (0, 3)}, "layers[1].experts[0,3]"),
        (EVERY_EXPERT, {1: tuple(range(8)), 2: tuple(range(8)), 3: (0, 1, 2)}, None),
    ],
)
def test_names_of_experts_are_read_and_written(names, expected, name):
    experts = parse_experts(SPEC, names)
    assert experts == expected
    assert list(experts) == sorted(experts)
    assert parse_experts(SPEC, name_experts(experts)) == experts
    assert name is None or name_experts(experts) == name


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("layers[1].experts[8]", r"layer 1 has no expert 8; got 'layers\[1\]\.experts\[8\]'; expected one of 0-7\."),
        ("layers[*].experts[3]", r"layer 3 has no expert 3; .* expected one of 0-2\."),
        ("layers[0].experts[3]", r"layer 0 has no experts; .* expected one of 1-3\."),
        ("layers[0-9999999].experts[3]", "layer 9999999 has no experts"),
        ("layers[1].experts[3-1]", "'3-1' is no number; .* expected numbers or ranges such as 0-3,7"),
        ("layers[1].experts[]", "'' is no number"),
        ("layers[1].experts[-1]", "'-1' is no number"),
        ("layers[1].expert[1]", "names no experts; expected a name such as"),
        ("layers[1].experts[1];", "'' names no experts"),
    ],
)
def test_a_wrong_name_is_refused_in_a_line(names, message):
    with pytest.raises(SpecError, match=message) as error:
        parse_experts(SPEC, names)
    assert "\n" not in str(error.value)


def test_a_dense_model_has_no_experts_to_name():
    dense = SPEC.model_copy(update={"layers": SPEC.layers[:1]})
    with pytest.raises(SpecError, match=r"layer 0 has no experts; .* the model has none"):
        parse_experts(dense, "layers[0].experts[0]")
    assert parse_experts(dense, EVERY_EXPERT) == {}
