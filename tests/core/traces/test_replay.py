"""Replayed traces: the choice is the trace's, the weights are the model's own."""

import numpy as np
import pytest

from moezoo.core.config.training import TrainingConfig
from moezoo.core.data.prepare import whole_file
from moezoo.core.errors import DataError
from moezoo.core.tokens import NOT_REPLAYED
from moezoo.core.traces.continuations import RecordOptions
from moezoo.core.traces.replay import Replay, forced_for, forced_routing, replayed_windows
from moezoo.core.traces.summary import summarize
from moezoo.core.traces.trace import TraceRows, trace_of
from moezoo.core.traces.trace_data import TracedData
from moezoo.core.training.batches import Batches
from moezoo.core.training.evaluation import describe_evaluation, evaluate
from tests.core.traces.test_record import TOKENIZER, T, built, recorded
from tests.support.tolerances import FLOAT32, FLOAT64, assert_close

TEXT = "the owl saw thirty small mice."


@pytest.fixture(scope="module")
def model():
    return built()


def data_of(tmp_path, text=TEXT, name="a.txt"):
    (tmp_path / name).write_text(text)
    return TracedData(("a",), whole_file(str(tmp_path / name), TOKENIZER, 256))


def changed(trace, **columns):
    rows = {name: trace.column(name) for name in trace.source.shapes}
    return trace_of(trace.info, TraceRows(**rows | columns), trace.texts)


def evaluated(model, data, replay=None):
    options = {"sequence_length": T, "batch_size": 4}
    return evaluate(model, data.split, TOKENIZER, **options, replay=replay)


def test_an_evaluation_takes_the_traces_choice_for_every_new_token(model, tmp_path):
    data = data_of(tmp_path)
    trace = recorded(model, [data])
    free = evaluated(model, data)
    same = evaluated(model, data, Replay(trace, model.spec))
    assert_close(same.validation_loss, free.validation_loss, FLOAT32)
    assert (same.replayed, free.replayed) == (1, None)
    part = evaluated(model, data, Replay(trace_of(trace.info, trace.rows(0, 9)), model.spec))
    assert part.replayed == 9 / 29
    assert "replayed: 31.0 % of the tokens; the others are routed freely" in describe_evaluation(part)
    moved = np.where(trace.column("expert") < 0, -1, (trace.column("expert") + 1) % 5)
    other = evaluated(model, data, Replay(changed(trace, expert=moved), model.spec))
    assert abs(other.validation_loss - free.validation_loss) > 1e-3
    # 29 tokens are inputs once, and 3 of them twice: those are context of the last window, and routed freely.
    for layer, routing in enumerate(other.routing):
        counts = np.bincount(moved[:29, layer].ravel(), minlength=5)
        assert np.abs(np.array(routing.load) * 64 - counts).sum() == pytest.approx(6)


def test_windows_that_begin_with_the_first_token_are_recorded_and_replayed_so(model, tmp_path):
    data, first = data_of(tmp_path), ord("<")
    trace = recorded(model, [data], RecordOptions(T, 4, first_token=first))
    ids = np.frombuffer(TEXT.encode(), np.uint8).copy()
    ids[[0, 8, 16]] = first  # of the last window, which begins at 21, tokens from 24 on are new
    assert trace.column("token").tolist() == ids.tolist()
    options = {"sequence_length": T, "batch_size": 4, "first_token": first}
    free = evaluate(model, data.split, TOKENIZER, **options)
    assert_close(summarize(trace).loss, free.validation_loss, FLOAT64)
    same = evaluate(model, data.split, TOKENIZER, **options, replay=Replay(trace, model.spec))
    assert_close(same.validation_loss, free.validation_loss, FLOAT32)


def test_generated_rows_and_other_domains_are_left_out(model, tmp_path):
    first, second = data_of(tmp_path, TEXT[:20]), data_of(tmp_path, TEXT, "b.txt")
    data = [first, TracedData(("b",), second.split)]
    trace = recorded(model, data, RecordOptions(T, 4, generate=2))
    assert trace.num_tokens == 20 + 2 + 30 + 2
    alone = recorded(model, [second])
    for replay in (Replay(trace, model.spec, ["b"]), Replay(alone, model.spec, ["any"])):
        positions = second.split.windows(T).positions(0, 4)
        tokens = second.split.windows(T)[:4][:, :-1]
        found = replay.forced(positions, tokens)
        np.testing.assert_array_equal(found[1][0], alone.column("expert", 0, T)[:, 1])
        assert (found[0][3, :3] == NOT_REPLAYED).all()
    with pytest.raises(DataError, match="has no domain 'c'; it has a, b"):
        Replay(trace, model.spec, ["c"])
    with pytest.raises(DataError, match=r"has 2 domains \(a, b\), but the data has 1 sources"):
        evaluated(model, second, Replay(trace, model.spec))


def test_tokens_must_be_the_traces(model, tmp_path):
    trace = recorded(model, [data_of(tmp_path)])
    other = data_of(tmp_path, TEXT.replace("thirty", "twenty"))
    with pytest.raises(DataError, match=r"has token 104 in row 13, where the data has 119; .* sequences of 8 tokens"):
        evaluated(model, other, Replay(trace, model.spec))
    longer = data_of(tmp_path, TEXT + " and more")
    evaluated(model, longer, Replay(trace, model.spec))  # beyond the trace, tokens are routed freely


def test_a_forward_pass_replays_arrays_and_the_first_rows_of_a_trace(model, tmp_path):
    trace = recorded(model, [data_of(tmp_path)])
    tokens = trace.column("token", 0, T)[None]
    expert = trace.column("expert", 0, T)[None].copy()
    for forced in (forced_for(trace, model.spec, tokens), forced_for(expert, model.spec, tokens)):
        assert_close(model.forward(tokens, forced=forced).logits, model.forward(tokens).logits, FLOAT32)
    expert[0, 3, 0] = -1
    assert (forced_for(expert, model.spec, tokens)[0][0, 3] == NOT_REPLAYED).all()
    with_runner_up = forced_routing(model.spec, expert, runner_up=np.zeros(expert.shape[:-1], int))
    assert (with_runner_up[0][0, 3] == -1).all()
    for wrong, message in (
        (expert[:, :, :1], r"expected \[\.\.\., 2 MoE layers"),
        (expert + 1, "has expert 5 in layer 0; expected 2 of 5 experts"),
        (np.tile(expert, 2), "has 4 experts for a token in layer 0"),
        (expert[:, :3], r"replay is int16 \[1, 3, 2, 2\] for tokens \[1, 8\]; expected integers"),
        (expert.astype(np.float32), r"replay is float32 \[1, 8, 2, 2\] for"),
        (np.ones_like(expert), r"sends a token to the experts \[1, 1\]; expected different ones"),
        (np.full_like(expert, -2), r"sends a token to the experts \[-2, -2\]"),
    ):
        with pytest.raises(DataError, match=message):
            forced_for(wrong, model.spec, tokens)


def test_training_takes_the_routing_of_each_token_at_its_place(model, tmp_path):
    data = data_of(tmp_path)
    trace = recorded(model, [data])
    training = TrainingConfig(steps=9, batch_size=4, sequence_length=T, gradient_accumulation=2, seed=3)
    own = np.array([1])  # of two processes
    batches = Batches(data.split, training, own, ahead=False, replay=Replay(trace, model.spec))
    batch = batches.take(5)
    place = data.split.positions(4, 4, T, 3, np.array([1, 3])).place
    for layer, forced in enumerate(batches.forced(5, batch)):
        assert forced.shape == (2, 1, T, 2)
        np.testing.assert_array_equal(forced[:, 0], trace.column("expert")[place][:, :, layer])
    assert Batches(data.split, training, own, ahead=False).forced(5, batch) is None
    token = trace.column("token").copy()
    token[-6:] += 1
    other = Batches(data.split, training, own, ahead=False, replay=Replay(changed(trace, token=token), model.spec))
    with pytest.raises(DataError, match="expected the same tokens"):
        [other.forced(step, other.take(step)) for step in range(1, 10)]
    token[0] += 1  # a trace of other data is noticed before any batch has its tokens
    with pytest.raises(DataError, match=r"has token 117 in row 0, where the data has 116"):
        Batches(data.split, training, own, ahead=False, replay=Replay(changed(trace, token=token), model.spec))


def test_windows_of_a_traces_first_rows_have_its_experts(model, tmp_path):
    trace = recorded(model, [data_of(tmp_path)])
    windows, forced = replayed_windows(trace, model.spec, 2, T)
    assert windows.tolist() == [list(TEXT[:9].encode()), list(TEXT[8:17].encode())]
    np.testing.assert_array_equal(forced[1][1], trace.column("expert", T, 2 * T)[:, 1])
    assert replayed_windows(trace, model.spec, 2, 64)[0].shape == (2, 15)
    with pytest.raises(DataError, match="has 30 tokens; expected at least 41, for 40 sequences"):
        replayed_windows(trace, model.spec, 40, T)


def test_another_models_trace_is_refused(model, tmp_path):
    trace = recorded(model, [data_of(tmp_path)])
    other = built(num_experts=7).spec
    with pytest.raises(DataError, match="has 5 experts by layer, but the model has 7"):
        Replay(trace, other)
    drawn = built(router={"top_k": 2, "renormalize": "none", "choice": {"kind": "sparsemixer"}}).spec
    with pytest.raises(DataError, match="choice sparsemixer"):
        forced_for(trace, drawn, trace.column("token", 0, T)[None])
