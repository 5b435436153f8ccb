"""Training a router whose weights are constant is refused, and pretrained ones of that kind are named."""

from pathlib import Path

import pytest

from moezoo.core.config.run_config import Config, InitFrom, load_config
from moezoo.core.errors import SpecError
from moezoo.core.training.check_routers import check_routers
from tests.support.small_run import write_config

TOP_1 = "model.layers[0].moe.router.top_k=1"


def config(folder: Path, *overrides: str) -> Config:
    return load_config(write_config(folder), overrides)


def test_one_renormalized_expert_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as error:
        check_routers(config(tmp_path, TOP_1), resumed=False)
    assert str(error.value) == (
        "the routers of 2 layers, first 0, cannot learn: router.top_k is 1 and router.renormalize is sum, so each "
        "token's one expert always has weight 1 and the cross-entropy has no gradient for the router; expected a "
        "weight that depends on its logit. Use renormalize: none, or a larger top_k."
    )


@pytest.mark.parametrize(
    ("router", "advice"),
    [
        ("{top_k: 1, score: none, weight: softmax_of_chosen}", "renormalize: none with weight: sigmoid_of_chosen, or"),
        ("{top_k: 1, weight: softmax_of_chosen, renormalize: none}", "renormalize: none with weight: score, or"),
        ("{top_k: 2, choice: {kind: top_p, p: 0.1}}", "renormalize: none, or a larger p"),
    ],
)
def test_the_advice_makes_the_router_learn(tmp_path: Path, router: str, advice: str) -> None:
    with pytest.raises(SpecError, match=advice):
        check_routers(config(tmp_path, f"model.layers[0].moe.router={router}"), resumed=False)


def test_pretrained_and_resumed_routers_of_that_kind_are_named_once(tmp_path: Path) -> None:
    dead = config(tmp_path, TOP_1)
    (warning,) = check_routers(dead, resumed=True)
    assert warning.endswith("only auxiliary losses and weight decay change it. To train it: renormalize: none.")
    assert check_routers(dead.model_copy(update={"init_from": InitFrom(path="base")}), resumed=False) == [warning]


def test_a_learning_router_passes(tmp_path: Path) -> None:
    assert check_routers(config(tmp_path, TOP_1, "model.layers[0].moe.router.renormalize=none"), resumed=False) == []
