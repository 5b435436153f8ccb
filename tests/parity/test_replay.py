"""A trace of one implementation replayed by another, with a model whose routers have near ties everywhere.

Free routing differs there, and with it everything; with the same choice, logits and gradients agree as always.
"""

import numpy as np
import pytest

from moezoo.core.config.optimizers import AdamWConfig
from moezoo.core.config.validate import validate
from moezoo.core.data.prepare import whole_file
from moezoo.core.data.tokenizers import ByteTokenizer
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.parity.check import parity
from moezoo.core.parity.sides import Reference
from moezoo.core.reference.losses import loss_and_gradients
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import ModelSpec
from moezoo.core.traces.continuations import RecordOptions
from moezoo.core.traces.record import recorded_trace
from moezoo.core.traces.replay import Replay, forced_for
from moezoo.core.traces.summary import describe_recording, summarize
from moezoo.core.traces.trace_data import TracedData
from tests.support.small_run import MODEL
from tests.support.tolerances import FLOAT32, FLOAT32_GRADIENT, assert_all_close, assert_close
from tests.support.twins import Twin

B, T = 2, 12
TEXT = "the owl saw thirty small mice, and none of the mice saw it."


def near_tie_model() -> tuple[ModelSpec, dict[str, np.ndarray]]:
    """Six experts of which three have the router columns of the others but for some 1e-7, and three per token."""
    layer = MODEL["layers"][0]
    moe = {**layer["moe"], "num_experts": 6, "router": {"top_k": 3}}
    spec = validate(ModelSpec, {**MODEL, "layers": [{**layer, "moe": moe}], "vocab_size": 256}, "near_ties")
    weights = initial_weights(spec, 0)
    for name, value in weights.items():
        if name.endswith("w_router"):
            value[:, 3:] = value[:, :3] * np.float32(1 + 1e-7)
    return spec, weights


SPEC, WEIGHTS = near_tie_model()
IDS = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
WINDOWS = IDS[: B * (T + 1)].reshape(1, B, T + 1)


def stepped(twin: Twin, forced=None) -> tuple[dict, dict]:
    """Loss terms and gradients of a step, from Adam's first moments."""
    model = twin.backend().build(SPEC, WEIGHTS)
    config = AdamWConfig(learning_rate=1e-3, clip_norm=None)
    model.start_training(config)
    forced = None if forced is None else [own[None] for own in forced]
    losses = model.train_step(WINDOWS, 1e-3, forced=forced).fetch().losses
    moments = model.export_optimizer()
    own = {name: value / 0.1 for name, value in moments.items() if name.startswith("first_moment.")}
    return losses, {name.removeprefix("first_moment."): value for name, value in own.items()}


def test_routing_of_the_reference_is_replayed_in_logits_and_in_a_training_step():
    twin, (tokens, targets) = Twin("mlx"), (WINDOWS[0, :, :-1], WINDOWS[0, :, 1:])
    in_float64 = {name: value.astype(np.float64) for name, value in WEIGHTS.items()}
    logits, routings, _ = forward(SPEC, in_float64, tokens)
    expert = np.stack([routing.expert_PK.reshape(B, T, -1) for routing in routings], axis=2)
    model, forced = twin.backend().build(SPEC, WEIGHTS), forced_for(expert, SPEC, tokens)
    free = model.forward(tokens)
    assert np.mean(free.routing[0].expert != np.sort(expert[:, :, 0])) > 0.1
    assert np.abs(free.logits - logits).max() > 1e-3 * np.abs(logits).max()
    assert_close(model.forward(tokens, forced=forced).logits, logits, FLOAT32)
    losses, gradients = loss_and_gradients(SPEC, in_float64, tokens, targets)
    found, replayed = stepped(twin, forced)
    assert_all_close({name: found[name] for name in losses}, losses, FLOAT32)
    assert_all_close(replayed, gradients, FLOAT32_GRADIENT)
    assert np.abs(replayed["layers.0.moe.router.w_router"]).max() > 0
    apart = stepped(twin)[1]["layers.0.moe.experts.w_down"] - gradients["layers.0.moe.experts.w_down"]
    assert np.abs(apart).max() > 1e-3 * np.abs(gradients["layers.0.moe.experts.w_down"]).max()


def test_parity_forces_the_routing_that_it_is_given_on_all_sides():
    tokens, targets = WINDOWS[0, :, :-1], WINDOWS[0, :, 1:]
    moved = [
        np.random.default_rng(layer).permuted(np.tile(np.arange(6), (B, T, 1)), axis=2)[..., :3] for layer in (0, 1)
    ]
    moved = [own.astype(np.int32) for own in moved]
    config = AdamWConfig(learning_rate=1e-3)
    given = (SPEC, WEIGHTS, tokens, targets, {"mlx": Twin("mlx").backend()}, config)
    report, free = parity(*given, replayed=moved), Reference(SPEC, WEIGHTS, tokens, targets, config)
    assert report.passed, report.to_json()
    forced = Reference(SPEC, WEIGHTS, tokens, targets, config, replayed=moved)
    assert np.abs(forced.logits - free.logits).max() > 1e-2
    np.testing.assert_array_equal(forced.forced[1], moved[1])
    np.testing.assert_array_equal(forced.experts[1], free.experts[1])


@pytest.mark.release
@pytest.mark.parametrize(("writer", "reader"), [("jax", "mlx"), ("mlx", "jax")])
def test_a_trace_of_one_backend_is_replayed_by_the_other(tmp_path, writer, reader):
    (tmp_path / "a.txt").write_text(TEXT)
    data = [TracedData(("text",), whole_file(str(tmp_path / "a.txt"), ByteTokenizer(), 256))]
    one, other = (Twin(name).backend().build(SPEC, WEIGHTS) for name in (writer, reader))
    options = {"sequence_length": T, "inference": False, "model": "m", "weights": "0", "backend": writer}
    info = describe_recording(SPEC, ["text"], **options)
    path = tmp_path / "t.safetensors"
    trace = recorded_trace(one, data, ByteTokenizer(), path, info, RecordOptions(T, 4))
    assert summarize(trace).near_ties > 0.9
    windows = data[0].split.windows(T)
    tokens = windows[:4][:, :-1]
    forced = Replay(trace, SPEC).forced(windows.positions(0, 4), tokens)
    expected = one.forward(tokens).logits
    assert_close(other.forward(tokens, forced=forced).logits, expected, FLOAT32)
    assert np.abs(other.forward(tokens).logits - expected).max() > 1e-3 * np.abs(expected).max()
    tokens = WINDOWS[0, :, :-1]
    forced = [own.expert for own in one.forward(tokens).routing]
    (losses, gradients), (found, replayed) = stepped(Twin(writer)), stepped(Twin(reader), forced)
    assert_all_close(found, losses, FLOAT32)
    assert_all_close(replayed, gradients, FLOAT32_GRADIENT)
