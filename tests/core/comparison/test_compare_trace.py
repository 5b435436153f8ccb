"""A model compared with a trace of another program: which experts differ, and what that changes in the model."""

import io

import numpy as np
import pytest
from rich.console import Console

from moezoo.backends import load_backend
from moezoo.core.comparison.compare_trace import TraceReport, compare_trace, windows_of_trace
from moezoo.core.comparison.page import trace_page
from moezoo.core.comparison.side import Side
from moezoo.core.config.run_config import parse_config
from moezoo.core.data.tokenizers import TokenIds
from moezoo.core.errors import DataError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.traces.replay import Replay
from moezoo.core.traces.trace import RoutingTrace, TraceInfo, TraceRows, trace_of
from tests.support.backends_available import require_backend

CONFIG = """
model:
  vocab_size: 31
  embed_dim: 20
  layers:
    - repeat: 3
      attention: {num_heads: 2, num_kv_heads: 1, head_dim: 6}
      moe: {num_experts: 7, router: {top_k: 2}, experts: {hidden_dim: 12}}
  initializer: {kind: normal, std: 0.3}
data: {sources: [{kind: dataset, name: fables}]}
training: {steps: 10, batch_size: 6, sequence_length: 24}
optimizer: {learning_rate: 1.0e-3}
"""
LENGTHS = (9, 70, 31)  # of three documents


@pytest.fixture(scope="module")
def side() -> Side:
    require_backend("mlx")
    config = parse_config(CONFIG)
    model = load_backend("mlx", for_training=False).build(config.model, initial_weights(config.model, 0))
    return Side("model", model, "mlx", config, TokenIds(31))


@pytest.fixture(scope="module")
def rows(side: Side) -> TraceRows:
    """What an engine would record of three documents, each from its beginning."""
    random = np.random.default_rng(0)
    documents = [random.integers(0, 31, length).astype(np.int32) for length in LENGTHS]
    outputs = [side.model.forward(tokens[None], inference=True) for tokens in documents]
    expert = np.concatenate([np.stack([layer.expert[0] for layer in output.routing], 1) for output in outputs])
    number = np.repeat(np.arange(3), LENGTHS).astype(np.int32)
    return TraceRows(expert=expert.astype(np.int16), token=np.concatenate(documents), document=number)


def traced(rows: TraceRows, **changed: np.ndarray) -> RoutingTrace:
    info = TraceInfo(layers=(0, 1, 2), num_experts=(7,) * 3, written_by="vllm")
    return trace_of(info, TraceRows(**{**rows.columns, **changed}), where="t.json")


def compared(side: Side, trace: RoutingTrace, length: int | None = None) -> TraceReport:
    windows = windows_of_trace(side, trace, Replay(trace, side.model.spec), length, None)
    return compare_trace(side, trace, *windows, lambda what, done, total: None)


def test_the_models_own_routing_has_no_effect(side, rows):
    report = compared(side, traced(rows))
    assert report.headline == "equal: the same experts for all 110 tokens"
    assert (report.tokens, report.replayed) == (110 - 3, 110)
    assert (report.routing_effect.kl.max, report.routing_effect.loss) == (0, 0)
    assert [layer.tokens for layer in report.routing] == [110] * 3


def test_other_experts_are_counted_in_their_layer_with_their_effect(side, rows):
    expert = rows.expert.copy()
    for row in range(0, 110, 5):  # a fifth of the tokens
        expert[row, 1, 0] = next(each for each in range(7) if each not in expert[row, 1])
    report = compared(side, traced(rows, expert=expert))
    assert report.first_routing is report.routing[1]
    assert [layer.own for layer in report.routing][:2] == pytest.approx([0, 0.2])
    assert report.routing[1].margin.count == 22
    assert report.routing_effect.kl.mean > 0
    text = io.StringIO()
    Console(file=text, width=80).print(trace_page(report))
    assert "routing, starting in layer 1: not near ties" in text.getvalue()
    assert max(map(len, text.getvalue().splitlines())) <= 80


def test_tokens_without_routing_are_routed_freely_and_not_counted(side, rows):
    expert = rows.expert.copy()
    expert[::2] = -1
    report = compared(side, traced(rows, expert=expert))
    assert (report.tokens, report.replayed) == (107, 55)
    assert report.routing_effect.kl.max == 0


def test_long_documents_are_cut_and_begin_again(side, rows):
    trace = traced(rows)
    count, windows = windows_of_trace(side, trace, Replay(trace, side.model.spec), 32, None)
    inputs = [batch.inputs[0, : (batch.documents[0] == 0).sum()] for batch, _ in windows if batch.documents is not None]
    assert count == len(inputs) == 5
    assert [len(tokens) for tokens in inputs] == [9, 32, 32, 6, 31]
    assert np.array_equal(np.concatenate(inputs), rows.token)
    assert compared(side, trace, 32).tokens == 107  # a target is also counted where its window has ended


def test_tokens_of_another_vocabulary_are_refused(side, rows):
    with pytest.raises(DataError, match=r"t\.json"):
        compared(side, traced(rows, token=rows.token + 9))
