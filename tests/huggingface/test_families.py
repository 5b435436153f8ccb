"""Every family against transformers, on both backends: logits, routing, losses, greedy generation."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import moezoo
from moezoo.api import LoadedModel
from moezoo.backends import load_backend
from moezoo.core.huggingface.checkpoint import describe_checkpoint, open_checkpoint
from moezoo.core.huggingface.family import families, family_of
from moezoo.core.huggingface.fields import Fields
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import IGNORED, Integers
from tests.support.fixtures import cases, read_fixture, write_checkpoint

Arrays = dict[str, np.ndarray]
RecordProperty = Callable[[str, object], None]
LOGITS, WEIGHTS, LOSS, GRADIENT = 5e-4, 1e-4, 1e-5, 1e-4
BACKENDS = ("jax", "mlx")


@cache
def main_cases() -> list[str]:
    """Return one fixture per family; the others test its options."""
    first: dict[str, str] = {}
    for case in cases():
        family = families()[read_fixture(case).model_type].name
        first[family] = family if family in cases() else first.get(family, case)
    return sorted(first.values())


# Compiling is what takes JAX long. Every case runs on MLX, and test_tiny_configs.py holds JAX to the reference in every
# feature that a family can have. So the gate computes on JAX one fixture of each kind of attention and decodes one, and
# JAX's gradients of transformers' models are in test_training_oracles.py; the release tests compute every fixture, and
# decode and differentiate one of each family.
ON_JAX = {
    "deepseek_v32",
    "deepseek_v4",
    "gemma4_text",
    "gpt_oss",
    "jamba",
    "lfm2_moe",
    "llama4_text",
    "minimax",
    "nemotron_h",
    "qwen3_next",
}
DECODED_ON_JAX = {"qwen3_next"}


def on_each_backend(on_jax: set[str], in_the_gate: set[str]) -> list:
    """Parameters: every fixture on MLX, and those of `on_jax` on JAX."""
    return [
        *(pytest.param(case, "mlx", id=f"{case}-mlx") for case in cases()),
        *(
            pytest.param(case, "jax", id=f"{case}-jax", marks=() if case in in_the_gate else pytest.mark.release)
            for case in cases()
            if case in on_jax
        ),
    ]


DECODED = on_each_backend(set(main_cases()), DECODED_ON_JAX)
DIFFERENTIATED = on_each_backend(set(main_cases()), set())


def check(model: LoadedModel, expected: Arrays) -> float:
    """Check everything that one forward pass returns; return the largest difference of a logit.

    Losses are the model's own terms: every token is routed, and each but the last of a sequence has a target.
    """
    output = model.forward(*ids_and_targets(expected))
    difference = float(np.abs(output.logits - expected["logits"]).max())
    assert difference < LOGITS
    if "topk_idx" in expected:
        check_routing(output, expected)
    assert output.losses["cross_entropy"] == pytest.approx(float(expected["ce_loss"]), rel=LOSS)
    if "aux_loss" in expected:
        assert output.losses["pooled_balance"] == pytest.approx(float(expected["aux_loss"]), rel=LOSS)
    return difference


def check_greedy(model: LoadedModel, expected: Arrays) -> None:
    """Check prefill and cached decoding."""
    ids, greedy = expected["input_ids"].astype(np.int32), expected["greedy"]
    continued = model.generate(ids, max_new_tokens=greedy.shape[1], temperature=0.0)
    np.testing.assert_array_equal(continued, greedy)


def check_routing(output, expected: Arrays) -> None:
    theirs = expected["moe_layers"].tolist()
    assert [row.layer for row in output.routing] in (theirs, [2 * layer for layer in theirs])  # 2: LongCat-Flash
    for row, experts, weights in zip(output.routing, expected["topk_idx"], expected["topk_weight"], strict=True):
        found = row.expert.reshape(experts.shape)
        order = np.argsort(found, axis=-1)
        np.testing.assert_array_equal(np.take_along_axis(found, order, axis=-1), experts)
        values = np.take_along_axis(row.weight.reshape(weights.shape), order, axis=-1)
        assert np.abs(values - weights).max() < WEIGHTS


def ids_and_targets(expected: Arrays) -> tuple[Integers, Integers]:
    ids = expected["input_ids"].astype(np.int32)
    return ids, np.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)


def without_auxiliary_losses(spec: ModelSpec) -> ModelSpec:
    """Return the spec without auxiliary losses: transformers' gradients are of the cross-entropy alone."""
    raw = spec.model_dump()
    for layer in raw["layers"]:
        if layer["moe"]:
            layer["moe"]["losses"] = ()
        for holder in (layer["attention"], layer["attention"].get("compression") or {}):
            if "loss_coefficient" in (holder.get("indexer") or {}):
                holder["indexer"]["loss_coefficient"] = 0.0
    return ModelSpec.model_validate(raw)


def check_gradient(folder: Path, backend: str, expected: Arrays) -> None:
    """Check the global norm of the gradient, with weights in float32 as in training."""
    checkpoint = open_checkpoint(folder)
    weights = {name: np.asarray(value, np.float32) for name, value in checkpoint.weights.items()}
    model = load_backend(backend).build(without_auxiliary_losses(checkpoint.spec), weights)
    _, gradients = model.loss_and_gradients(*ids_and_targets(expected))
    norm = np.sqrt(sum(float(np.square(gradient.astype(np.float64)).sum()) for gradient in gradients.values()))
    assert norm == pytest.approx(float(expected["grad_norm"]), rel=GRADIENT)


def test_every_family_has_a_fixture() -> None:
    shown = {families()[read_fixture(case).model_type].name for case in cases()}
    assert shown == {family.name for family in families().values()}


def test_every_kind_of_attention_runs_on_jax_in_the_gate() -> None:
    def kinds(case: str) -> set[str]:
        fields = Fields(read_fixture(case).description["config"], "config.json")
        return {layer.attention.kind for layer in family_of(fields).spec_of(fields).layers}

    lacking = {case: more for case in main_cases() if (more := kinds(case) - set().union(*map(kinds, ON_JAX)))}
    assert not lacking, f"no case of ON_JAX has these kinds of attention: {lacking}; add one of the cases"


@pytest.mark.parametrize(("case", "backend"), on_each_backend(set(cases()), ON_JAX))
def test_fixture(case: str, backend: str, tmp_path: Path, record_property: RecordProperty) -> None:
    folder = write_checkpoint(case, tmp_path / case, shards=1 if backend == "jax" else 3)
    model = moezoo.load(folder, backend=backend)
    record_property("difference", check(model, read_fixture(case).expected))


@pytest.mark.parametrize(
    ("case", "backend"), [pair for pair in DECODED if "greedy" in read_fixture(pair.values[0]).expected]
)
@pytest.mark.slow
def test_generation_of_a_fixture(case: str, backend: str, tmp_path: Path) -> None:
    folder = write_checkpoint(case, tmp_path / case)
    model = moezoo.load(folder, backend=backend)
    check_greedy(model, read_fixture(case).expected)


@pytest.mark.parametrize(("case", "backend"), DIFFERENTIATED)
@pytest.mark.slow
def test_gradient_of_a_fixture(case: str, backend: str, tmp_path: Path) -> None:
    folder = write_checkpoint(case, tmp_path / case)
    check_gradient(folder, backend, read_fixture(case).expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("case", "max_length"), [("qwen3_moe_rope_dynamic_beyond", 24), ("qwen3_moe_rope_longrope_long", 36)]
)
def test_sequences_beyond_the_original_length(case: str, max_length: int, backend: str, tmp_path: Path) -> None:
    """24 tokens with RoPE scaling for 16; without `max_length` they are refused (test_refusals.py)."""
    expected = read_fixture(case).expected
    model = moezoo.load(write_checkpoint(case, tmp_path / case), backend=backend, max_length=max_length)
    check(model, expected)
    if "greedy" in expected:  # dynamic: cached and uncached decoding differ in transformers
        check_greedy(model, expected)


@pytest.mark.parametrize("case", cases())
def test_both_config_formats_are_the_same_model(case: str, tmp_path: Path) -> None:
    saved, hub = (
        describe_checkpoint(write_checkpoint(case, tmp_path / spelling, spelling=spelling)).spec
        for spelling in ("saved", "hub")
    )
    assert saved == hub
