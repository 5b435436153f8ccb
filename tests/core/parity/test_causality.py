"""The causality check: what it finds and names, and that every tiny config is causal where it generates."""

from pathlib import Path

import numpy as np
import pytest

from moezoo.core.config.run_config import load_config
from moezoo.core.config.validate import validate
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.parity.causality import Causality, check_causality
from moezoo.core.parity.report import ParityReport, ParityTolerances
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import ModelSpec
from tests.support.twins import normal

TINY = sorted((Path(__file__).parents[3] / "configs" / "tiny").glob("*.yaml"))
VOCAB_SIZE, B, T = 31, 2, 8
TOKENS_BT = np.random.default_rng(0).integers(0, VOCAB_SIZE, (B, T)).astype(np.int32)
ROUNDING = 1e-9
LAYER = {"attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}}
MOE = {"num_experts": 4, "router": {"top_k": 2}, "experts": {"hidden_dim": 6}}
DROPLESS = {"vocab_size": VOCAB_SIZE, "embed_dim": 8, "layers": [LAYER | {"moe": MOE}]}
CAPACITY = DROPLESS | {"layers": [LAYER | {"moe": MOE | {"dispatch": {"kind": "capacity", "factor": 0.5}}}]}


def checked(run, raw=DROPLESS, tokens_BT=TOKENS_BT, tolerance=ROUNDING):
    return check_causality("fake", run, validate(ModelSpec, raw, "config"), tokens_BT, tolerance)


def features(tokens_BT):
    """[B, T, 3], a function of each token alone."""
    return np.stack([tokens_BT, tokens_BT**2, np.cos(tokens_BT)], axis=-1)


def of_the_past(x_BTD):
    return np.cumsum(x_BTD, axis=1)


def of_the_future(x_BTD):
    return np.cumsum(x_BTD[:, ::-1], axis=1)[:, ::-1]


def of_the_batch(x_BTD):
    return x_BTD + x_BTD[0, -1]


# --- what the check finds --------------------------------------------------------------------------------------------


def test_what_depends_on_the_past_alone_is_causal():
    def run(tokens_BT, inference):
        x = features(tokens_BT)
        return {"embedding": x, "layers.0.moe.router.logits": of_the_past(x).reshape(B * T, -1), "logits": x[..., 0]}

    (check,) = checked(run)
    assert (check.side, check.mode, check.first_leak, check.passed) == ("fake", "inference", None, True)
    assert check.moved == 0


@pytest.mark.parametrize("leak", [of_the_future, of_the_batch])
def test_a_leak_is_named_by_its_first_intermediate_and_by_its_side(leak):
    def run(tokens_BT, inference):
        x = features(tokens_BT)
        return {"embedding": x, "layers.0.attention": of_the_past(x), "layers.0": leak(x), "layers.1": leak(leak(x))}

    (check,) = checked(run)
    assert (check.side, check.first_leak, check.passed) == ("fake", "layers.0", False)
    assert check.moved > ROUNDING


def test_a_leak_into_numbers_that_were_all_zero_is_seen():
    def run(tokens_BT, inference):
        return {"layers.0": np.zeros((B, T, 1)) + (tokens_BT[0, -1] != TOKENS_BT[0, -1])}

    assert checked(run)[0].first_leak == "layers.0"


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_leak_between_sequences_is_seen_at_every_length(length):
    tokens_BT = TOKENS_BT[:, :length]
    (check,) = checked(lambda tokens_BT, _: {"x": of_the_batch(features(tokens_BT))}, tokens_BT=tokens_BT)
    assert check.first_leak == "x"


def test_masked_values_confuse_nothing():
    def masked(later):
        def run(tokens_BT, inference):
            x = np.where(features(tokens_BT) > 15, -np.inf, features(tokens_BT))
            if later and tokens_BT[0, -1] != TOKENS_BT[0, -1]:
                x[0, 0] = -np.inf
            return {"selection": x}

        return run

    (causal,), (leaking,) = checked(masked(False)), checked(masked(True))
    assert (causal.first_leak, causal.moved) == (None, 0)
    assert (leaking.first_leak, leaking.moved) == ("selection", np.inf)


def test_a_value_that_is_not_a_number_is_no_pass():
    (check,) = checked(lambda tokens_BT, _: {"x": np.where(features(tokens_BT) == 1, 0, np.nan)})
    assert check.first_leak == "x"


def test_rounding_is_no_leak():
    def run(tokens_BT, inference):
        x = features(tokens_BT)
        return {"x": x + 1e-7 * of_the_future(x)}

    assert checked(run, tolerance=1e-3)[0].passed
    assert 0 < checked(run, tolerance=1e-3)[0].moved < 1e-3
    assert not checked(run)[0].passed


def test_training_is_checked_where_inference_routes_otherwise():
    seen = []

    def run(tokens_BT, inference):
        seen.append(inference)
        x = features(tokens_BT)
        return {"x": x if inference else of_the_future(x)}

    assert [check.mode for check in checked(run)] == ["inference"]
    assert set(seen) == {True}
    training, inference = checked(run, CAPACITY)
    assert (training.mode, training.first_leak) == ("training", "x")
    assert (inference.mode, inference.first_leak) == ("inference", None)


def test_a_leak_fails_a_report_in_inference_and_is_told_in_training():
    leaks = {mode: Causality("jax", mode, "layers.1.moe.routed", 0.25, 1e-5) for mode in ("training", "inference")}

    def report(*checks):
        return ParityReport("x.yaml", B, T, (), {}, (), (), {}, ParityTolerances(), causality=checks)

    clean = Causality("reference", "inference", None, 0.0, 1e-9)
    told = report(leaks["training"], clean)
    assert told.passed
    assert told.failures == ()
    leak = "layers.1.moe.routed sees later tokens or other sequences (jax, moved by 2.5e-01)"
    assert told.causal("training") == leak
    assert told.causal("inference") == "causal"
    failed = report(clean, leaks["inference"])
    assert not failed.passed
    assert failed.failures == (f"jax: inference is not causal; {leak}",)
    assert failed.causal("training") is None


# --- the zoo, in the reference ---------------------------------------------------------------------------------------


def checks_of(path):
    """Of a config with weights larger than initial ones, so that nothing starts as zero and hides a leak."""
    spec = load_config(path).model.model_copy(update={"vocab_size": VOCAB_SIZE})
    weights = {name: value.astype(np.float64) for name, value in initial_weights(spec, seed=0).items()}
    for number, row in enumerate(parameter_table(spec)):
        if row.trained:
            weights[row.name] = weights[row.name] + 0.2 * normal(number, *row.shape)

    def run(tokens_BT, inference):
        record = {}
        forward(spec, weights, tokens_BT, record=record, inference=inference)
        return record

    return {check.mode: check for check in check_causality("reference", run, spec, TOKENS_BT, ROUNDING)}


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_every_tiny_config_generates_causally(path):
    check = checks_of(path)["inference"]
    assert check.passed, f"{check.first_leak} moved by {check.moved}"


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("expert_choice", "layers.0.moe.router.weight"),
        ("capacity", "layers.0.moe.routed"),
        ("capacity_groups", None),  # by position, and of each sequence alone
    ],
)
def test_training_by_the_whole_batch_leaks_and_says_where(name, first):
    (path,) = (path for path in TINY if path.stem == name)
    assert checks_of(path)["training"].first_leak == first
