"""Recorded traces: every token once, with the routing of the window that it is new in, and an evaluation's losses."""

import json

import numpy as np
import pytest

from moezoo.backends import load_backend
from moezoo.core.config.run_config import load_config
from moezoo.core.config.validate import validate
from moezoo.core.data.tokenizers import ByteTokenizer
from moezoo.core.errors import DataError, SpecError
from moezoo.core.layer_routing import LayerRouting
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.spec import ModelSpec
from moezoo.core.traces.continuations import RecordOptions
from moezoo.core.traces.margins import margins
from moezoo.core.traces.record import recorded_trace
from moezoo.core.traces.summary import describe_recording, summarize
from moezoo.core.traces.trace_data import named_file, traced_files
from moezoo.core.training.evaluation import evaluate
from tests.layers.test_choice import CUTOFF_E, LOGITS_PE, SPECS, reference, values
from tests.support.backends_available import require_backend
from tests.support.small_run import MODEL
from tests.support.tolerances import FLOAT32, FLOAT64, assert_close

T = 8
TOKENIZER = ByteTokenizer()
OPTIONS = RecordOptions(sequence_length=T, batch_size=4)


def built(**moe):
    layer = MODEL["layers"][0]
    layers = [{**layer, "moe": {**layer["moe"], **moe}}]
    spec = validate(ModelSpec, {**MODEL, "layers": layers, "vocab_size": 256}, "test")
    require_backend("mlx")
    return load_backend("mlx").build(spec, initial_weights(spec, 0))


@pytest.fixture(scope="module")
def model():
    return built()


def info_of(model, data, **more):
    names = [name for each in data for name in each.domains]
    options = {"sequence_length": T, "inference": False, "model": "m", "weights": "0", "backend": "mlx"} | more
    return describe_recording(model.spec, names, **options)


def recorded(model, data, options=OPTIONS, **more):
    return recorded_trace(model, data, TOKENIZER, None, info_of(model, data, **more), options)


@pytest.fixture
def files(tmp_path):
    """A text of 30 bytes, which the last window repeats a part of, and documents."""
    (tmp_path / "a.txt").write_text("the owl saw thirty small mice.")
    texts = ["one", "a document that is longer than a window", "t", "four five six"]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


def test_every_token_is_recorded_once_where_it_is_new(model, files):
    text = (files / "a.txt").read_bytes()
    data = traced_files({"owls": files / "a.txt", "again": files / "a.txt"}, TOKENIZER, 256, "windows")
    trace = recorded(model, data)
    rows = trace.rows()
    assert rows.token.tolist() == [*text, *text]
    assert trace.texts[ord("w")] == "w"
    assert rows.domain.tolist() == rows.document.tolist() == [0] * 30 + [1] * 30
    assert trace.info.domains == ("owls", "again")
    ids = np.frombuffer(text, np.uint8).astype(np.int32)
    # Windows begin at 0, 8, 16 and 21; of the last one the tokens from 24 on are new, and 29 is only predicted.
    for first, new, last in ((0, 0, 8), (8, 8, 16), (16, 16, 24), (21, 24, 29)):
        output = model.forward(ids[None, first : first + T])
        losses = model.score(ids[None, first : first + T], ids[None, first + 1 : first + T + 1]).token_losses[0]
        for layer, routing in enumerate(output.routing):
            own = slice(new - first, None)
            np.testing.assert_array_equal(rows.expert[new:last, layer], routing.expert[0, own])
            assert_close(rows.weight[new:last, layer], routing.weight[0, own], FLOAT32)
        assert_close(rows.loss[new + 1 : last + 1], losses[new - first :], FLOAT32)
    assert np.isnan(rows.loss[[0, 30]]).all()
    assert (rows.expert[[29, 59]] == -1).all()
    assert not rows.dropped.any()
    assert not rows.generated.any()


@pytest.mark.parametrize("kind", ["windows", "separate"])
@pytest.mark.parametrize("moe", ["dropless", "capacity", "expert choice"])
def test_losses_are_those_of_an_evaluation(files, kind, moe):
    model = built(
        **{
            "dropless": {},
            "capacity": {"dispatch": {"kind": "capacity", "factor": 0.6}},
            "expert choice": {
                "router": {"top_k": 2, "renormalize": "none", "choice": {"kind": "expert_choice"}},
                "losses": [],
            },
        }[moe]
    )
    data = traced_files(files / "b.jsonl", TOKENIZER, 256, kind)
    split = data[0].split
    evaluation = evaluate(model, split, TOKENIZER, sequence_length=T, batch_size=4)
    summary = summarize(recorded(model, data))
    assert_close(summary.loss, evaluation.validation_loss, FLOAT64)
    assert summary.tokens == split.num_tokens
    if model.spec.inference_differs:
        inferred = summarize(recorded(model, data, inference=True))
        assert_close(inferred.loss, evaluation.inference_loss, FLOAT64)


def test_documents_are_in_order_however_they_are_packed(model, files):
    trace = recorded(model, traced_files(files / "b.jsonl", TOKENIZER, 256, "separate"))
    text = "".join(trace.text(token) for token in trace.column("token").tolist())
    assert text == "onea document that is longer than a windowfour five six"
    assert trace.column("document").tolist() == [0] * 3 + [1] * 39 + [2] * 13
    assert np.flatnonzero(np.isnan(trace.column("loss"))).tolist() == [0, 3, 42]
    assert np.flatnonzero(trace.column("expert")[:, 0, 0] < 0).tolist() == [2, 41, 54]


def test_documents_are_continued_greedily_and_routed_as_in_generation(model, files):
    options = RecordOptions(T, 4, generate=3)
    data = traced_files(files / "b.jsonl", TOKENIZER, 256, "separate")
    trace = recorded(model, data, options)
    rows = trace.rows()
    assert np.flatnonzero(rows.generated).tolist() == [3, 4, 5, 45, 46, 47, 61, 62, 63]
    assert rows.document.tolist() == [0] * 6 + [1] * 42 + [2] * 16
    plain = recorded(model, data).rows()
    for name in ("token", "domain"):
        np.testing.assert_array_equal(getattr(rows, name)[rows.generated == 0], getattr(plain, name))
    prompt = np.frombuffer(b"four five six"[-T:], np.uint8).astype(np.int32)
    tokens = np.concatenate([prompt, rows.token[61:]])[None]
    output = model.forward(tokens[:, :-1], inference=True)
    assert output.logits[0, T - 1 :].argmax(-1).tolist() == rows.token[61:].tolist()
    np.testing.assert_array_equal(rows.expert[60:63, 1], output.routing[1].expert[0, T - 1 :])
    assert (rows.expert[[5, 47, 63]] == -1).all()
    assert_close(rows.loss[61:], model.score(tokens[:, :-1], tokens[:, 1:]).token_losses[0, T - 1 :], FLOAT32)
    ended = recorded(model, data, RecordOptions(T, 4, generate=3, end_tokens=(int(rows.token[62]),)))
    assert ended.column("generated").sum() < 9


def test_a_trace_can_be_cut(files, model):
    for name, kind, count in (("a.txt", "windows", 11), ("b.jsonl", "separate", 20)):
        (data,) = traced_files(files / name, TOKENIZER, 256, kind)
        assert recorded(model, [data.limited(count)]).num_tokens == count
        assert recorded(model, [data.limited(1000)]).num_tokens == data.split.num_tokens


def test_files_are_named_by_their_domain(files):
    assert named_file("verse=x/a.txt") == ("verse", "x/a.txt")
    assert named_file("x/a=b.txt") == ("a=b", "x/a=b.txt")
    assert named_file(str(files / "b.jsonl"))[0] == "b"


def test_a_dense_model_has_no_trace():
    spec = load_config("configs/tiny/dense.yaml", ["model.vocab_size=256"]).model
    with pytest.raises(SpecError, match="m has no MoE layer"):
        describe_recording(spec, ["a"], sequence_length=T, inference=False, model="m", weights="", backend="mlx")


@pytest.mark.parametrize("kind", SPECS)
def test_margins_are_the_references_and_runners_up_the_best_not_chosen(kind):
    spec = SPECS[kind]
    for inference in (False, True):
        logits_PE, score_PE, selection_PE = values(spec, LOGITS_PE.astype(np.float32).astype(np.float64))
        more = {"table_PK": np.zeros((len(LOGITS_PE), spec.top_k), int)} if kind == "hash" else {"cutoff_E": CUTOFF_E}
        chosen = reference(spec, logits_PE, inference=inference, **more)
        expert = np.where(chosen.valid_PK, chosen.expert_PK, -1)[None]
        fields = (value[None].astype(np.float32) for value in (np.zeros(expert.shape[1:]), score_PE, selection_PE))
        routing = LayerRouting(0, expert, *fields, expert < 0)
        margin, runner_up = margins(spec, routing, inference=inference, cutoff_E=CUTOFF_E)
        np.testing.assert_allclose(margin[0], chosen.margin_P, rtol=FLOAT32.relative)
        for place, best in enumerate(runner_up[0].tolist()):
            others = np.setdiff1d(np.arange(selection_PE.shape[1]), expert[0, place])
            if kind == "hash" or not len(others):
                assert best == -1
            elif not kind.startswith("grouped"):
                assert best == others[selection_PE[place, others].argmax()]


def test_routers_that_are_not_finite_are_refused(files):
    broken = built()
    name = next(name for name in broken.export_parameters() if name.endswith("w_router"))
    weights = initial_weights(broken.spec, 0)
    weights[name] = np.full_like(weights[name], np.nan)
    broken = load_backend("mlx").build(broken.spec, weights)
    data = traced_files(str(files / "a.txt"), TOKENIZER, 256, "windows")
    with pytest.raises(DataError, match=r"the router of layer 0 gives NaN .* `moezoo doctor --forward`"):
        recorded(broken, data)
