import numpy as np
import pytest

from moezoo.core.errors import SpecError
from moezoo.core.interventions.masks import check_masks, expert_masks, named_masks
from moezoo.core.spec import (
    ChoiceSpec,
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    GroupedTopKChoiceSpec,
    HashChoiceSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    RouterSpec,
    TopKChoiceSpec,
)
from moezoo.core.tokens import ExpertMasks

ATTENTION = GroupedQueryAttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4)
TOKENS_BT = np.zeros((2, 3), np.int32)
E = 8


def spec_of(choice: ChoiceSpec = TopKChoiceSpec(), *, bias: bool = False, **router) -> ModelSpec:  # noqa: B008
    moe = MoESpec(
        num_experts=E,
        router=RouterSpec(choice=choice, **{"top_k": 3} | router),
        experts=GatedFeedForwardSpec(hidden_dim=8, bias=bias),
    )
    return ModelSpec(vocab_size=31, embed_dim=8, layers=(LayerSpec(repeat=2, attention=ATTENTION, moe=moe),))


def check(spec: ModelSpec, ids, mode="reroute") -> None:
    names = f"layers[1].experts[{','.join(map(str, ids))}]"
    check_masks(spec, TOKENS_BT, named_masks(spec, names, mode, len(TOKENS_BT)))


def test_masks_name_the_experts_of_every_layer():
    first, second = (own.of_batch(2) for own in expert_masks(spec_of(), {1: (0, 7)}))
    assert first.excluded is second.excluded is None
    assert not first.silenced.any()
    np.testing.assert_array_equal(second.silenced, [[True, *[False] * 6, True]] * 2)


def test_as_many_experts_remain_as_a_token_needs():
    check(spec_of(), range(5))
    check(spec_of(), range(E), "silence")
    with pytest.raises(SpecError, match=r"too few of 8 experts in layer 1 remain .* got 2; expected at least top_k, 3"):
        check(spec_of(), range(6))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_smallest_groups_that_a_token_may_get_have_enough_experts(keep):
    spec = spec_of(GroupedTopKChoiceSpec(num_groups=4, keep=keep), top_k=min(2 * keep, 3))
    check(spec, {1: (0, 1), 2: (2,), 3: (0, 1, 2)}[keep])
    with pytest.raises(SpecError, match=f"in the {keep} groups that a token may get"):
        check(spec, {1: (2,), 2: (2, 4), 3: range(6)}[keep])


def test_what_has_no_meaning_is_refused():
    with pytest.raises(SpecError, match="tokens of layer 1 cannot be rerouted: with choice hash a table decides"):
        check(spec_of(HashChoiceSpec()), [1])
    check(spec_of(HashChoiceSpec()), [1], "silence")
    with pytest.raises(SpecError, match=r"layer 1 cannot be silenced: its weight multiplies its input"):
        check(spec_of(bias=True, apply_to="input"), [1], "silence")
    check(spec_of(bias=True, apply_to="input"), [1])


def test_masks_of_another_shape_are_refused():
    spec = spec_of()
    good = ExpertMasks(np.zeros((2, E), bool))
    check_masks(spec, TOKENS_BT, [good, good])
    with pytest.raises(SpecError, match="got masks of 1 layers; expected one for each of 2 MoE layers"):
        check_masks(spec, TOKENS_BT, [good])
    for wrong in (np.zeros((1, E), bool), np.zeros((2, E - 1), bool), np.zeros((2, E), np.int32)):
        with pytest.raises(SpecError, match=r"a mask of layer 1 is .*; expected bool \[2, 8\]"):
            check_masks(spec, TOKENS_BT, [good, ExpertMasks(None, wrong)])
