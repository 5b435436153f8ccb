"""Held-out loss with training and with inference routing, on the float64 reference; and that a run reports both."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from moezoo.cli.main import main
from moezoo.core.backend import Scores
from moezoo.core.config.validate import validate
from moezoo.core.data.prepare import whole_file
from moezoo.core.data.tokenizers import CharacterTokenizer
from moezoo.core.errors import DataError
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.dispatch import dispatch, num_dropped
from moezoo.core.reference.losses import expert_counts, token_losses
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import masked
from moezoo.core.training.evaluation import Evaluation, describe_evaluation, describe_routing, evaluate
from moezoo.core.training.metrics import RoutingStatistics, read_metrics
from tests.support.backends_available import require_backend
from tests.support.small_run import write_config
from tests.support.tolerances import FLOAT64, assert_close
from tests.support.twins import normal

VOCAB_SIZE, WINDOWS, T = 11, 6, 7
TOKENIZER = CharacterTokenizer("abcdefghijk")
WINDOWS_BT = np.random.default_rng(0).integers(0, VOCAB_SIZE, (WINDOWS, T + 1)).astype(np.int32)
ROUTINGS = {
    "dropless": {},
    "capacity": {"dispatch": {"kind": "capacity", "factor": 0.6}},
    "capacity of sequences": {"dispatch": {"kind": "capacity", "factor": 0.6, "group": "sequence"}},
    "wide capacity": {"dispatch": {"kind": "capacity", "factor": 5.0}},
    "expert choice": {"router": {"top_k": 2, "renormalize": "none", "choice": {"kind": "expert_choice"}}},
}


class Windows:
    """A split that returns WINDOWS_BT."""

    name, source_names = "validation", "chat.jsonl"

    def windows(self, length, most):
        assert length == T
        return WINDOWS_BT

    def num_windows(self, length):
        return WINDOWS


class ReferenceModel:
    """The part of a backend's model that evaluation needs. Router cutoffs, if any, are within the range of scores."""

    def __init__(self, spec):
        self.spec, self.calls = spec, []
        self.weights = {name: value.astype(np.float64) for name, value in initial_weights(spec, seed=0).items()}
        for number, row in enumerate(parameter_table(spec)):
            if row.trained:
                self.weights[row.name] = self.weights[row.name] + 0.3 * normal(number, *row.shape)
            elif "cutoff" in row.name:
                self.weights[row.name] = np.full(row.shape, 1.0 if "weight" in row.name else 0.25)

    def score(self, tokens, targets, *, inference=False, documents=None, masks=None):
        self.calls.append(inference)
        options = {"inference": inference, "document_BT": documents, "masks": masks}
        logits, routings, _ = forward(self.spec, self.weights, tokens, **options)
        moe = self.spec.layers[0].moe
        options = {"num_sequences": len(tokens), "inference": inference}
        dropped = [int(num_dropped(each, dispatch(moe, each, **options))) for each in routings]
        return Scores(token_losses(logits, targets), [expert_counts(each) for each in routings], dropped)


def model_of(kind="dropless", **fields):
    moe = {"num_experts": 5, "router": {"top_k": 2}, "experts": {"hidden_dim": 6}} | ROUTINGS[kind]
    layer = {"repeat": 2, "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}, "moe": moe}
    return ReferenceModel(
        validate(ModelSpec, {"vocab_size": VOCAB_SIZE, "embed_dim": 8, "layers": [layer]} | fields, "config")
    )


def evaluated(model, batch_size=WINDOWS, length=T):
    return evaluate(model, Windows(), TOKENIZER, sequence_length=length, batch_size=batch_size)


# --- masked tokens ---------------------------------------------------------------------------------------------------


def test_masked_tokens_are_read_and_have_no_loss_and_no_bytes(monkeypatch):
    model, trained = model_of(), np.arange(T + 1) % 3 == 2
    monkeypatch.setattr(Windows, "windows", lambda *_: masked(WINDOWS_BT, trained))
    result = evaluated(model)
    losses = model.score(WINDOWS_BT[:, :-1], WINDOWS_BT[:, 1:]).token_losses[:, trained[1:]]
    assert_close(result.validation_loss, losses.mean(), FLOAT64)
    assert_close(result.bits_per_byte, losses.mean() / np.log(2), FLOAT64)  # characters of a byte
    monkeypatch.setattr(Windows, "windows", lambda *_: masked(WINDOWS_BT, np.zeros(T + 1, np.bool_)))
    with pytest.raises(DataError, match=r"the validation data has no targets: all tokens of 6 windows .* chat.jsonl"):
        evaluated(model)


# --- the first token -------------------------------------------------------------------------------------------------


class Sentences(CharacterTokenizer):
    """Letters, where `a` comes before every text and `b` ends it."""

    def __init__(self, end_of_text=1):
        super().__init__("abcdefghijk")
        self.first_tokens, self.end_of_text = (0,), end_of_text

    def byte_count(self, ids, begins=None):
        self.begins = begins
        return super().byte_count(ids)


def test_each_window_begins_with_the_first_token_once_and_none_predicts_it(monkeypatch):
    model, seen = model_of(), []
    monkeypatch.setattr(
        model, "score", lambda *batch, score=model.score, **_: seen.append(np.stack(batch)) or score(*batch)
    )
    stream = np.array([[0, 2, 3, 4, 1, 0, 5, 6], [6, 7, 1, 0, 8, 9, 2, 3], [3, 0, 4, 5, 6, 7, 8, 9]], np.int32)
    monkeypatch.setattr(Windows, "windows", lambda *_: stream)
    options = {"sequence_length": T, "batch_size": 3}
    tokenizer = Sentences()
    result = evaluate(model, Windows(), tokenizer, first_token=0, **options)
    [(inputs, targets)] = seen
    # In place of the token before: of its own, of a middle, and none where a document begins with the second token.
    assert inputs.tolist() == [[0, 2, 3, 4, 1, 0, 5], [0, 7, 1, 0, 8, 9, 2], [3, 0, 4, 5, 6, 7, 8]]
    assert targets.tolist() == [[2, 3, 4, 1, -1, 5, 6], [7, 1, -1, 8, 9, 2, 3], [-1, 4, 5, 6, 7, 8, 9]]
    # Targets that begin a text, for their bytes: after the first token or the end of another text.
    assert np.flatnonzero(tokenizer.begins).tolist() == [0, 4, 8, 12]
    nats = model.score(inputs, targets).token_losses
    assert result.validation_loss == pytest.approx(nats.sum() / 18)
    assert result.bits_per_byte == pytest.approx(nats.sum() / np.log(2) / 18)
    evaluate(model, Windows(), Sentences(end_of_text=0), first_token=0, **options)
    assert (seen[-1][1] == stream[:, 1:]).all()  # a first token that ends texts is predicted
    evaluate(model, Windows(), Sentences(), **options)
    assert (seen[-1] == [stream[:, :-1], stream[:, 1:]]).all()


# --- all of a file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [T + 1, 5 * T + 1, 5 * T + 4])
def test_every_token_of_a_file_but_the_first_is_scored_once(tmp_path, num_tokens):
    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, num_tokens).astype(np.uint16)
    np.save(tmp_path / "a.npy", ids)
    model, split = model_of(), whole_file(str(tmp_path / "a.npy"), TOKENIZER, VOCAB_SIZE)
    starts = [min(start, num_tokens - 1 - T) for start in range(0, num_tokens - 1, T)]
    logits = forward(model.spec, model.weights, np.stack([ids[start : start + T] for start in starts])).logits_BTV
    nats = token_losses(logits, np.stack([ids[start + 1 : start + 1 + T] for start in starts]))
    expected = np.append(nats[:-1], nats[-1, -((num_tokens - 1 - 1) % T + 1) :])
    assert len(expected) == num_tokens - 1
    for batch_size in (2, 100):
        result = evaluate(model, split, TOKENIZER, sequence_length=T, batch_size=batch_size)
        assert_close(result.validation_loss, expected.mean(), FLOAT64)
        assert_close(result.bits_per_byte, expected.mean() / np.log(2), FLOAT64)
        assert result.windows == result.all_windows == len(starts)


def test_a_part_of_the_windows_is_called_a_part(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(8000 * T, np.uint16))
    model, split = model_of(), whole_file(str(tmp_path / "a.npy"), TOKENIZER, VOCAB_SIZE)
    result = evaluate(model, split, TOKENIZER, sequence_length=T, batch_size=4, max_windows=3)
    assert (result.windows, result.all_windows) == (3, 8000)
    assert "(3 of 8,000 windows of 7 tokens)" in describe_evaluation(result)
    assert "(8,000 windows of 7 tokens)" in describe_evaluation(dataclasses.replace(result, windows=8000))


# --- the two losses --------------------------------------------------------------------------------------------------


def test_dropless_top_k_model_has_one_loss_and_is_scored_once():
    model = model_of()
    result = evaluated(model)
    assert result.inference_loss is None
    assert set(model.calls) == {False}
    assert result.to_dict()["inference_loss"] is None
    assert "inference" not in describe_evaluation(result)


@pytest.mark.parametrize("kind", ["capacity", "expert choice"])
def test_different_inference_routing_has_its_own_loss(kind):
    model = model_of(kind)
    result = evaluated(model)
    for loss, inference in ((result.validation_loss, False), (result.inference_loss, True)):
        logits = forward(model.spec, model.weights, WINDOWS_BT[:, :-1], inference=inference).logits_BTV
        assert_close(loss, token_losses(logits, WINDOWS_BT[:, 1:]).mean(), FLOAT64)
    assert abs(result.inference_loss - result.validation_loss) > 1e-4
    assert result.to_dict()["inference_loss"] == result.inference_loss


@pytest.mark.parametrize("kind", ["capacity", "expert choice"])
def test_only_the_inference_loss_is_independent_of_batch_size(kind):
    whole, parts = (evaluated(model_of(kind), batch_size) for batch_size in (WINDOWS, 2))
    assert_close(parts.inference_loss, whole.inference_loss, FLOAT64)
    assert abs(parts.validation_loss - whole.validation_loss) > 1e-4


def test_with_capacity_per_sequence_no_loss_depends_on_batch_size():
    whole, parts = (evaluated(model_of("capacity of sequences"), batch_size) for batch_size in (WINDOWS, 2))
    assert all(row.dropped > 0 for row in whole.routing)
    assert parts.routing == whole.routing
    assert_close(parts.validation_loss, whole.validation_loss, FLOAT64)
    assert abs(whole.inference_loss - whole.validation_loss) > 1e-4


def test_capacity_that_drops_nothing_has_equal_losses():
    result = evaluated(model_of("wide capacity"))
    assert all(row.dropped == 0 for row in result.routing)
    assert_close(result.inference_loss, result.validation_loss, FLOAT64)


def test_load_and_drops_are_those_of_training_routing():
    for row in evaluated(model_of("capacity")).routing:
        assert row.dropped > 0


def test_the_gap_is_printed_with_its_sign():
    worse, better = (
        describe_evaluation(Evaluation(2.0, None, 4, 4, T, (), inference_loss=loss)).splitlines()[1]
        for loss in (2.125, 1.875)
    )
    assert worse == "with inference routing: 2.1250 nats per token (+0.1250)"
    assert better == "with inference routing: 1.8750 nats per token (-0.1250)"


def test_windows_longer_than_learned_positions_are_refused():
    model = model_of(position={"kind": "learned", "max_length": T})
    assert evaluated(model).windows == WINDOWS
    message = rf"got windows of {T + 1} tokens; expected at most {T} tokens \(model.position.max_length\). Use fewer"
    with pytest.raises(DataError, match=message):
        evaluated(model, length=T + 1)


# --- in a run --------------------------------------------------------------------------------------------------------


def test_run_reports_both_losses_in_metrics_and_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    require_backend("mlx")
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))

    def call(*words):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.stdout

    config, run = write_config(tmp_path, steps=2, validate_every=1, validation_sequences=4), tmp_path / "run"
    tight = "model.layers[0].moe.dispatch={kind: capacity, factor: 0.5}"
    printed = call("train", config, "--backend", "mlx", "--out", run, "--set", tight)
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "validation_loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(abs(line["inference_loss"] - line["validation_loss"]) > 1e-6 for line in lines)
    values = json.loads(call("eval", run, "--backend", "mlx", "--json"))
    assert values["inference_loss"] == lines[-1]["inference_loss"]
    for text in (printed, call("eval", run, "--backend", "mlx")):
        assert f"with inference routing: {values['inference_loss']:.4f} nats per token (" in text


def test_load_rows_have_the_numbers_of_the_experts():
    many = (0.01, *[0.05] * 18, 0.09)
    rows = (RoutingStatistics(1, (0.5, 0.2, 0.3), 1.5, 0.0), RoutingStatistics(3, many, 1.8, 0.25))
    assert describe_routing(Evaluation(1.0, None, 1, 1, 8, rows)) == [
        "layer 1: load of expert 0: 1.50, 1: 0.60, 2: 0.90 (1 is balanced), dropped 0.00 %",
        "layer 3: load 0.20 (expert 0) to 1.80 (expert 19) of 20 experts (1 is balanced), dropped 25.00 %",
    ]
