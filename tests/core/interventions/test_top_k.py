import pytest

from moezoo.core.config.run_config import load_config
from moezoo.core.errors import SpecError
from moezoo.core.interventions.top_k import with_top_k
from tests.support.source_tree import PACKAGE

TINY = PACKAGE / "configs" / "tiny"


def config_of(name: str):
    return load_config(TINY / f"{name}.yaml")


@pytest.mark.parametrize("name", ["top_k", "grouped_max", "top_p", "sparsemixer", "noisy_top_k", "mixed_layers"])
def test_every_moe_layer_takes_another_number_of_experts(name):
    config = config_of(name)
    changed = with_top_k(config, 2)
    assert [moe.router.top_k for _, moe in changed.model.moes] == [2] * len(config.model.moes)
    own = [moe.router.top_k for _, moe in config.model.moes]
    assert len(set(own)) > 1 or with_top_k(changed, own[0]) == config


@pytest.mark.parametrize(
    ("name", "top_k", "message"),
    [
        ("hash", 1, r"layers\[0\] cannot take another top_k; got 1; its choice, hash, has a table of the experts"),
        ("expert_choice", 1, "its choice, expert_choice, lets experts take tokens, by cutoffs learned for its own"),
        ("sparsemixer", 3, "sparsemixer, which computes its own weights for one or two experts"),
        ("top_k", 99, r"router.top_k is 99, but num_experts is \d+ \(--top-k 99, layers\[0\].moe\)"),
        ("dense", 2, "the model has no MoE layers; got top_k 2"),
    ],
)
def test_a_top_k_without_meaning_is_refused(name, top_k, message):
    with pytest.raises(SpecError, match=message):
        with_top_k(config_of(name), top_k)
