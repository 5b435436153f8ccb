import pytest

from moezoo.core.checkpoint.optimizer_state import check_optimizer_state
from moezoo.core.config.optimizers import AdafactorConfig, AdamWConfig, LionConfig, SGDConfig
from moezoo.core.config.update_rules import state_shapes
from moezoo.core.errors import CheckpointError
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import GatedFeedForwardSpec, GroupedQueryAttentionSpec, LayerSpec, ModelSpec

ATTENTION = GroupedQueryAttentionSpec(num_heads=2, num_kv_heads=2, head_dim=4)
LAYER = LayerSpec(attention=ATTENTION, feed_forward=GatedFeedForwardSpec(hidden_dim=7))
TABLE = parameter_table(ModelSpec(vocab_size=5, embed_dim=8, layers=(LAYER,)))
KINDS = {
    "adamw": AdamWConfig(learning_rate=1.0),
    "lion": LionConfig(kind="lion", learning_rate=1.0),
    "adafactor": AdafactorConfig(kind="adafactor", learning_rate=1.0),
    "sgd": SGDConfig(kind="sgd", learning_rate=1.0),
}


@pytest.mark.parametrize("saved", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_own_state_is_accepted_and_another_kinds_is_refused_in_one_line(kind, saved):
    found = state_shapes(KINDS[saved], TABLE)
    if saved == kind:
        check_optimizer_state(found, KINDS[kind], TABLE, "the state")
        return
    with pytest.raises(CheckpointError, match=rf"^the state is another optimizer.*kind is {kind}\)") as refused:
        check_optimizer_state(found, KINDS[kind], TABLE, "the state")
    assert len(str(refused.value).splitlines()) == 1


def test_missing_and_misshaped_state_is_listed():
    found = state_shapes(KINDS["adamw"], TABLE)
    found["first_moment.embedding.weight"] = (5, 9)
    del found["second_moment.head.w_head"]
    with pytest.raises(CheckpointError, match=r"(?s)1 missing, 0 unexpected, 1 with another shape.*~ first_moment.emb"):
        check_optimizer_state(found, KINDS["adamw"], TABLE, "the state")
