"""Every family against what transformers computes, on both backends: logits, routing, losses, greedy text."""

import os
from pathlib import Path

import numpy as np
import pytest

import moezoo
from moezoo.core.huggingface.checkpoint import describe_checkpoint
from moezoo.core.loaded_model import LoadedModel
from tests.huggingface.fixtures import cases, read_fixture, write_checkpoint

# The given oracles lie beside the project; their place is told where it is another. The fixtures are checked in.
ORACLES = Path(os.environ.get("MOEZOO_ORACLES", Path(__file__).parents[3] / "shared" / "oracles"))
GIVEN = sorted(path.parent.name for path in ORACLES.glob("*/oracle.npz"))

LOGITS, WEIGHTS, LOSS = 5e-4, 1e-4, 1e-5
BACKENDS = ("jax", "mlx")


def check(model: LoadedModel, expected: dict[str, np.ndarray]) -> None:
    ids = expected["input_ids"].astype(np.int32)
    output = model.forward(ids)
    assert np.abs(output.logits - expected["logits"]).max() < LOGITS
    if "topk_idx" in expected:
        check_routing(output, expected)
    check_losses(model, output, expected)
    greedy = expected["greedy"]
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=greedy.shape[1]), greedy)


def check_routing(output, expected: dict[str, np.ndarray]) -> None:
    assert [row.layer for row in output.routing] == expected["moe_layers"].tolist()
    for row, experts, weights in zip(output.routing, expected["topk_idx"], expected["topk_weight"], strict=True):
        found = row.expert.reshape(experts.shape)
        order = np.argsort(found, axis=-1)
        np.testing.assert_array_equal(np.take_along_axis(found, order, axis=-1), experts)
        values = np.take_along_axis(row.weight.reshape(weights.shape), order, axis=-1)
        assert np.abs(values - weights).max() < WEIGHTS


def check_losses(model, output, expected: dict[str, np.ndarray]) -> None:
    logits = output.logits[:, :-1].astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    targets = expected["input_ids"][:, 1:, None].astype(np.int64)
    assert -np.take_along_axis(logs, targets, axis=-1).mean() == pytest.approx(float(expected["ce_loss"]), rel=LOSS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases())
def test_fixture(case: str, backend: str, tmp_path: Path) -> None:
    folder = write_checkpoint(case, tmp_path / case, shards=1 if backend == "jax" else 3)
    check(moezoo.load(folder, backend=backend), read_fixture(case).expected)


@pytest.mark.parametrize("case", cases())
def test_both_spellings_of_a_config_are_the_same_model(case: str, tmp_path: Path) -> None:
    saved, hub = (
        describe_checkpoint(write_checkpoint(case, tmp_path / spelling, spelling=spelling)).spec
        for spelling in ("saved", "hub")
    )
    assert saved == hub


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GIVEN)
def test_given_oracle(case: str, backend: str) -> None:
    with np.load(ORACLES / case / "oracle.npz") as expected:
        check(moezoo.load(ORACLES / case, backend=backend), dict(expected))


@pytest.mark.parametrize("case", [case for case in GIVEN if (ORACLES / case / "config_v4.json").exists()])
def test_both_spellings_of_a_given_config_are_the_same_model(case: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((ORACLES / case / "config_v4.json").read_bytes())
    assert describe_checkpoint(tmp_path).spec == describe_checkpoint(ORACLES / case).spec
