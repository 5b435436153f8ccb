import dataclasses

import numpy as np
import pytest

from moezoo.core.errors import DataError, SpecError
from moezoo.core.interventions.changes import Change, Changes, describe_change, loss_changes
from moezoo.core.interventions.experts import EVERY_EXPERT, parse_experts
from moezoo.core.interventions.importance import describe_importance, each_expert, importance_values, ranked
from moezoo.core.interventions.masks import expert_masks
from moezoo.core.training.evaluation import evaluate
from tests.core.training.test_evaluation import TOKENIZER, WINDOWS, WINDOWS_BT, T, Windows, model_of
from tests.support.tolerances import FLOAT64, assert_close

MODEL = model_of("capacity")


def changes_of(model, without, batch_size=4, mode="silence", **options) -> Changes:
    sizes = {"sequence_length": T, "batch_size": batch_size}
    return loss_changes(model, Windows(), TOKENIZER, without, **sizes, mode=mode, **options)


@pytest.mark.parametrize("mode", ["silence", "reroute"])
def test_every_change_is_that_of_an_evaluation_without_the_experts(mode):
    """Although rows of a batch do without other experts, and sequences compete for capacity in training."""
    names = ["layers[1].experts[4]", "layers[*].experts[0,2]", "layers[0].experts[3]"]
    without = [parse_experts(MODEL.spec, name) for name in names]
    found = changes_of(MODEL, without, mode=mode)
    sizes = {"sequence_length": T, "batch_size": WINDOWS}
    whole = evaluate(MODEL, Windows(), TOKENIZER, **sizes).inference_loss
    assert_close(found.loss, whole, FLOAT64)
    for experts, change in zip(without, found.changes, strict=True):
        masks = expert_masks(MODEL.spec, experts, mode)
        alone = evaluate(MODEL, Windows(), TOKENIZER, **sizes, without=masks).inference_loss
        assert change.experts == experts
        assert_close(change.change, alone - whole, FLOAT64)


def test_importance_does_not_depend_on_the_batches_and_reports_every_window():
    model, experts = model_of(), parse_experts(MODEL.spec, EVERY_EXPERT)
    sets, reports = each_expert(experts), []
    assert len(sets) == 10
    found = ranked(changes_of(model, sets, 100, on_progress=lambda *report: reports.append(report)))
    assert reports == [("without experts", done, 11 * WINDOWS) for done in (0, 11 * WINDOWS)]
    for batch_size in (4, 5):
        other = ranked(changes_of(model, sets, batch_size))
        assert [row.experts for row in other.changes] == [row.experts for row in found.changes]
        for name in ("change", "standard_error"):
            assert_close(*([getattr(row, name) for row in each.changes] for each in (other, found)), FLOAT64)
    values = importance_values(found)["experts"]
    assert [row["change"] for row in values] == sorted((row["change"] for row in values), reverse=True)


def test_a_loss_that_is_nan_has_no_changes():
    model = model_of()
    model.weights["final_norm.scale"] = model.weights["final_norm.scale"] * np.nan
    with pytest.raises(DataError, match=r"the loss of the whole model is nan, .* `moezoo doctor"):
        changes_of(model, [{0: (1,)}])


def test_the_standard_error_is_that_of_the_mean_over_windows():
    model, experts = model_of(), {0: (1,), 1: (1,)}
    (change,) = changes_of(model, [experts]).changes
    masks = [own.of_batch(WINDOWS) for own in expert_masks(model.spec, experts)]
    inputs, targets = WINDOWS_BT[:, :-1], WINDOWS_BT[:, 1:]
    losses = [model.score(inputs, targets, masks=own).token_losses.mean(axis=1) for own in (masks, None)]
    difference_W = losses[0] - losses[1]
    assert_close(change.change, difference_W.mean(), FLOAT64)
    assert_close(change.standard_error, difference_W.std(ddof=1) / np.sqrt(WINDOWS), FLOAT64)


def test_one_window_has_no_standard_error(monkeypatch):
    monkeypatch.setattr(Windows, "windows", lambda *_: WINDOWS_BT[:1])
    found = changes_of(model_of(), [{0: (1,)}])
    assert found.changes[0].standard_error is None
    assert "nats per token (one window has no standard error), from" in describe_change(found)
    assert describe_importance(found)[-1] == "a single window has no standard error"


def test_a_table_of_many_experts_shows_both_ends():
    rows = tuple(Change({0: (expert,)}, expert / 1000, 0.004) for expert in range(64))
    found = ranked(Changes("silence", 2.0, 8, 32, rows))
    lines = describe_importance(found)
    assert lines[1:3] == ["layer  expert  change ± standard error", "    0      63  +0.06300 ± 0.00400"]
    assert lines[22] == "  ... 24 between"
    assert lines[-2:] == ["    0       0  +0.00000 ± 0.00400", "9 of 64 changes are within two standard errors of zero"]
    few = dataclasses.replace(found, changes=found.changes[:40])
    assert len(describe_importance(few)) == 43


def test_a_dense_model_has_no_importance():
    with pytest.raises(SpecError, match="no experts to measure; got a model without MoE layers"):
        each_expert({})
