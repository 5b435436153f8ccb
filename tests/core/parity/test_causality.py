"""The causality check: the leaks it finds and names, and that every tiny config is causal in inference."""

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


def past_sum(x_BTD):
    return np.cumsum(x_BTD, axis=1)


def future_sum(x_BTD):
    return np.cumsum(x_BTD[:, ::-1], axis=1)[:, ::-1]


def batch_sum(x_BTD):
    return x_BTD + x_BTD[0, -1]


# --- detection -------------------------------------------------------------------------------------------------------


def test_dependence_on_the_past_alone_is_causal():
    def run(tokens_BT, inference):
        x = features(tokens_BT)
        return {"embedding": x, "layers.0.moe.router.logits": past_sum(x).reshape(B * T, -1), "logits": x[..., 0]}

    (check,) = checked(run)
    assert (check.side, check.mode, check.first_leak, check.passed) == ("fake", "inference", None, True)
    assert check.moved == 0


@pytest.mark.parametrize("leak", [future_sum, batch_sum])
def test_leak_is_named_by_its_first_intermediate_and_side(leak):
    def run(tokens_BT, inference):
        x = features(tokens_BT)
        return {"embedding": x, "layers.0.attention": past_sum(x), "layers.0": leak(x), "layers.1": leak(leak(x))}

    (check,) = checked(run)
    assert (check.side, check.first_leak, check.passed) == ("fake", "layers.0", False)
    assert check.moved > ROUNDING


def test_leak_into_a_tensor_of_zeros_is_detected():
    def run(tokens_BT, inference):
        return {"layers.0": np.zeros((B, T, 1)) + (tokens_BT[0, -1] != TOKENS_BT[0, -1])}

    assert checked(run)[0].first_leak == "layers.0"


@pytest.mark.parametrize("length", [1, 2, 5])
def test_leak_between_sequences_is_detected_at_every_length(length):
    tokens_BT = TOKENS_BT[:, :length]
    (check,) = checked(lambda tokens_BT, _: {"x": batch_sum(features(tokens_BT))}, tokens_BT=tokens_BT)
    assert check.first_leak == "x"


def test_infinite_masked_values_are_compared():
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


def test_nan_fails():
    (check,) = checked(lambda tokens_BT, _: {"x": np.where(features(tokens_BT) == 1, 0, np.nan)})
    assert check.first_leak == "x"


def test_rounding_is_not_a_leak():
    def run(tokens_BT, inference):
        x = features(tokens_BT)
        return {"x": x + 1e-7 * future_sum(x)}

    assert checked(run, tolerance=1e-3)[0].passed
    assert 0 < checked(run, tolerance=1e-3)[0].moved < 1e-3
    assert not checked(run)[0].passed


def test_training_is_checked_if_its_routing_differs():
    seen = []

    def run(tokens_BT, inference):
        seen.append(inference)
        x = features(tokens_BT)
        return {"x": x if inference else future_sum(x)}

    assert [check.mode for check in checked(run)] == ["inference"]
    assert set(seen) == {True}
    training, inference = checked(run, CAPACITY)
    assert (training.mode, training.first_leak) == ("training", "x")
    assert (inference.mode, inference.first_leak) == ("inference", None)


def test_leak_fails_a_report_in_inference_and_is_reported_in_training():
    leaks = {mode: Causality("jax", mode, "layers.1.moe.routed", 0.25, 1e-5) for mode in ("training", "inference")}

    def report(*checks):
        return ParityReport("x.yaml", B, T, (), {}, (), (), {}, ParityTolerances(), causality=checks)

    clean = Causality("reference", "inference", None, 0.0, 1e-9)
    training = report(leaks["training"], clean)
    assert training.passed
    assert training.failures == ()
    leak = "layers.1.moe.routed depends on later tokens or other sequences (jax, changes by 2.5e-01)"
    assert training.causal("training") == leak
    assert training.causal("inference") == "causal"
    failed = report(clean, leaks["inference"])
    assert not failed.passed
    assert failed.failures == (f"jax: inference is not causal; {leak}",)
    assert failed.causal("training") is None


# --- configs of the zoo, on the reference ----------------------------------------------------------------------------


def checks_of(path):
    """Check a config, with weights larger than initial ones so that no tensor is zero and hides a leak."""
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
        ("capacity_groups", None),  # by position, per sequence
    ],
)
def test_training_routing_over_the_batch_leaks_at_the_expected_place(name, first):
    (path,) = (path for path in TINY if path.stem == name)
    assert checks_of(path)["training"].first_leak == first
