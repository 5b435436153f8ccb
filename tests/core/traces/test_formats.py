"""Traces of other programs: engines' files are read, moezoo's come back, and anything else is one line."""

import base64
import io
import json
import random

import numpy as np
import pytest
from click.testing import CliRunner

from moezoo.cli.main import main
from moezoo.core.data.tokenizers import CharacterTokenizer
from moezoo.core.errors import DataError
from moezoo.core.runs.open import describe_model
from moezoo.core.traces.formats.convert import FORMATS, export_trace, import_trace
from moezoo.core.traces.formats.foreign import Known
from moezoo.core.traces.trace import TraceInfo, TraceRows, trace_of
from moezoo.core.traces.trace_file import open_trace
from tests.support.fixtures import write_checkpoint
from tests.support.hostile import json_mutant, mutant
from tests.support.traces import synthetic_trace

LAYERS, EXPERTS, DEPTH = (1, 2, 4), 8, 6
MODEL = Known(layers=LAYERS, num_experts=(EXPERTS,) * 3, top_k=2, depth=DEPTH, model="some/model")
PROMPT, ANSWER = [5, 6, 7], [8, 9]
ROUTED = np.array([[[(t + l) % EXPERTS, (t + l + 3) % EXPERTS] for l in range(3)] for t in range(5)])


def _import(name, path, known=MODEL, tokenizer=None):
    notes = import_trace(name, path, path.with_name("t.safetensors"), known, tokenizer)
    return open_trace(path.with_name("t.safetensors")), notes


def _json(path, value):
    path.write_text(json.dumps(value))
    return path


def _npy64(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def _int32(array):
    return base64.b64encode(np.asarray(array, np.int32).tobytes()).decode()


def _generated(trace, first):
    """Return a trace in which each document's tokens from the `first` on were generated."""
    rows = trace.rows()
    place = np.concatenate([np.arange(count) for count in np.bincount(rows.document)])
    columns = rows.columns | {"generated": (place >= first).astype(np.uint8)}
    return trace_of(trace.info, TraceRows(**columns), trace.texts)


def test_vllm_responses_of_both_kinds_are_read_as_documented(tmp_path):
    whole = ROUTED[:4].astype(np.uint8)  # the last token was never fed
    choice = {"index": 0, "routed_experts": _npy64(whole), "token_ids": ANSWER, "prompt_token_ids": PROMPT}
    trace, notes = _import("vllm", _json(tmp_path / "r.json", {"choices": [choice]}))
    rows = trace.rows()
    np.testing.assert_array_equal(rows.expert[:4], ROUTED[:4])
    assert (rows.expert[4] == -1).all()
    assert (rows.token.tolist(), rows.generated.tolist()) == (PROMPT + ANSWER, [0, 0, 0, 1, 1])
    assert trace.info == TraceInfo(
        layers=LAYERS, num_experts=(8, 8, 8), domains=("r",), model="some/model", written_by="vllm"
    )
    assert any("1 token has no routing" in note for note in notes)
    assert any("margin" in note and "weight" in note for note in notes)

    cached = ROUTED.copy()
    cached[:2] = -1  # 0.21: nested lists, the prompt once for all choices, -1 where a prefix was cached
    choices = [{"index": i, "routed_experts": cached[3:].tolist(), "token_ids": ANSWER} for i in range(2)]
    response = {"prompt_routed_experts": cached[:3].tolist(), "prompt_token_ids": PROMPT, "choices": choices}
    trace, _ = _import("vllm", _json(tmp_path / "r.json", response))
    np.testing.assert_array_equal(trace.rows().expert, np.concatenate([cached, cached]))
    assert trace.rows().document.tolist() == [0] * 5 + [1] * 5


def test_vllm_arrays_of_all_layers_are_read_by_the_models_moe_layers(tmp_path):
    everywhere = np.zeros((5, DEPTH, 2), np.int16)
    everywhere[:, LAYERS] = ROUTED
    np.savez(tmp_path / "a.npz", prompt_routed_experts=everywhere[:3], routed_experts=everywhere[3:])
    np.save(tmp_path / "a.npy", everywhere)
    for name in ("a.npz", "a.npy"):
        trace, _ = _import("vllm", tmp_path / name)
        np.testing.assert_array_equal(trace.rows().expert, ROUTED)


def test_sglang_responses_are_read_as_documented(tmp_path):
    everywhere = np.zeros((4, DEPTH, 2), np.int32)  # all layers, 0 in those without experts; not the last token
    everywhere[:, LAYERS] = ROUTED[:4]
    meta = {"prompt_tokens": 3, "completion_tokens": 2, "routed_experts": _int32(everywhere)}
    meta["input_token_logprobs"] = [[None, 5, None], [-1.5, 6, "b"], [-0.5, 7, "c"]]
    meta["output_token_logprobs"] = [[-0.25, 8, "d"], [-2.0, 9, "e"]]
    trace, _ = _import("sglang", _json(tmp_path / "r.json", {"text": "de", "meta_info": meta}))
    rows = trace.rows()
    np.testing.assert_array_equal(rows.expert[:4], ROUTED[:4])
    assert (rows.expert[4] == -1).all()
    assert rows.token.tolist() == PROMPT + ANSWER
    np.testing.assert_array_equal(rows.loss, np.float32([np.nan, 1.5, 0.5, 0.25, 2.0]))

    part = {**meta, "routed_experts": _int32(everywhere[2:]), "routed_experts_start_len": 2}
    trace, _ = _import("sglang", _json(tmp_path / "r.json", {"choices": [{"meta_info": part}]}))
    np.testing.assert_array_equal(trace.rows().expert[2:4], ROUTED[2:4])
    assert (trace.rows().expert[:2] == -1).all()

    ids = {"input_ids": PROMPT, "output_ids": [ANSWER], "routed_experts": meta["routed_experts"]}
    trace, _ = _import("sglang", _json(tmp_path / "r.json", {"choices": [{"index": 0}], "sglext": ids}))
    assert trace.rows().token.tolist() == PROMPT + ANSWER
    several = {"choices": [{"index": 0}, {"index": 1}], "sglext": {**ids, "output_ids": [ANSWER, ANSWER]}}
    with pytest.raises(DataError, match=r"choice 1 of .* has no routed_experts"):
        _import("sglang", _json(tmp_path / "r.json", several))

    known = Known(layers=LAYERS, num_experts=(EXPERTS,), top_k=2)  # the depth follows from the number of tokens
    trace, _ = _import("sglang", _json(tmp_path / "r.json", [{"meta_info": meta}]), known)
    np.testing.assert_array_equal(trace.rows().expert[:4], ROUTED[:4])


def test_rows_that_were_not_captured_are_not_expert_0(tmp_path):
    meta = {"prompt_tokens": 3, "completion_tokens": 2, "routed_experts": _int32(np.zeros((4, DEPTH, 2)))}
    trace, notes = _import("sglang", _json(tmp_path / "r.json", {"meta_info": meta}))
    assert (trace.rows().expert == -1).all()
    assert any("12 rows named an expert twice" in note for note in notes)


def test_maxtext_batches_lose_their_padding_only(tmp_path):
    batch = np.full((2, 5, 3, 2), -1, np.int32)
    batch[0], batch[1, :3] = ROUTED, ROUTED[:3]
    batch[0, 1] = -1  # not replayed, not padding
    mask = np.array([[1] * 5, [1] * 3 + [0] * 2], np.int32)
    np.savez(tmp_path / "b.npz", forced_routed_experts=batch, token_mask=mask, token_ids=np.arange(10).reshape(2, 5))
    np.save(tmp_path / "b.npy", batch)
    for name in ("b.npz", "b.npy"):
        trace, _ = _import("maxtext", tmp_path / name)
        np.testing.assert_array_equal(trace.rows().expert, np.concatenate([batch[0], batch[1, :3]]))
        assert trace.rows().document.tolist() == [0] * 5 + [1] * 3
    assert not trace.has("token")
    trace, _ = _import("maxtext", tmp_path / "b.npz")
    assert trace.rows().token.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_olmoe_windows_are_read_without_a_model_of_the_layers(tmp_path):
    exp_ids = ROUTED.transpose(0, 2, 1).tolist()
    line = json.dumps({"input_ids": PROMPT + ANSWER, "predicted_token_ids": [0] * 5, "exp_ids": exp_ids})
    (tmp_path / "c4_results.jsonl").write_text(f"{line}\n\n{line}\n")
    trace, _ = _import(
        "olmoe", tmp_path / "c4_results.jsonl", Known(num_experts=(EXPERTS,)), CharacterTokenizer("abcdefgh")
    )
    np.testing.assert_array_equal(trace.rows().expert, np.concatenate([ROUTED, ROUTED]))
    assert (trace.info.layers, trace.text(7), trace.text(9)) == ((0, 1, 2), "h", "<9>")  # 9 is not in its vocabulary


def test_csv_of_a_prompt_and_decoded_tokens_and_with_numbered_tokens(tmp_path):
    prompt = [f"{layer},{e}" for at, layer in enumerate(LAYERS) for t in range(3) for e in ROUTED[t, at]]
    decoded = [f"{layer},{e}" for t in (3, 4) for at, layer in enumerate(LAYERS) for e in ROUTED[t, at]]
    numbered = [f"{t},{l},{e},x" for t in range(5) for at, l in enumerate(LAYERS) for e in ROUTED[t, at]]
    cases = {
        "a": (["# llama.cpp", "layer,expert", *prompt, *decoded], Known(num_experts=(EXPERTS,), top_k=2)),
        "b": ([*prompt, *decoded], MODEL),
        "c": (["token,layer,expert,text", *numbered], Known(num_experts=(EXPERTS,))),
    }
    for name, (lines, known) in cases.items():
        (tmp_path / name).write_text("\n".join(lines))
        trace, _ = _import("csv", tmp_path / name, known)
        np.testing.assert_array_equal(trace.rows().expert, ROUTED)
        assert trace.info.layers == LAYERS


KEPT = {
    ("vllm", "t.jsonl"): ("token", "document", "generated"),
    ("vllm", "t.npy"): (),
    ("sglang", "t.jsonl"): ("token", "document", "generated", "loss"),
    ("maxtext", "t.npz"): ("token", "document"),
    ("maxtext", "t.npy"): ("document",),
    ("olmoe", "t.jsonl"): ("token", "document"),
    ("csv", "t.csv"): (),
}


@pytest.mark.parametrize(("name", "file"), KEPT)
def test_a_trace_comes_back_from_every_format(tmp_path, name, file):
    """Experts, and the columns that the format has; of an engine's last token, which it never fed, there is no row."""
    trace = _generated(synthetic_trace(num_tokens=50), first=9)
    lost = export_trace(trace, name, tmp_path / file, DEPTH)
    back, _ = _import(name, tmp_path / file)
    expected = trace.rows()
    expert = expected.expert.copy()
    if name in ("vllm", "sglang") and file == "t.jsonl":
        expert[np.flatnonzero(np.diff(expected.document, append=-1))] = -1
        assert any("last" in note for note in lost)
    np.testing.assert_array_equal(back.rows().expert, expert)
    assert "an engine that sees whole documents routes them otherwise" not in str(lost)
    for column in KEPT[name, file]:
        np.testing.assert_array_equal(back.column(column), trace.column(column))
    missing = {"weight", "margin", "runner_up", "dropped", "domain", "loss"} - set(KEPT[name, file])
    assert missing <= set(lost[0].split(": ")[1].split(", "))
    assert set(FORMATS) == {name for name, _ in KEPT}


def test_documents_longer_than_the_windows_are_said(tmp_path):
    trace = synthetic_trace(num_tokens=80)
    assert "20 tokens, but the model saw windows of 16" in export_trace(trace, "csv", tmp_path / "t.csv")[-1]


def test_unused_slots_and_unknown_tokens_survive(tmp_path):
    expert = ROUTED.astype(np.int16)
    expert[1], expert[2, 1, 1] = -1, -1
    trace = trace_of(TraceInfo(layers=LAYERS, num_experts=(EXPERTS,) * 3), TraceRows(expert, token=np.arange(5)))
    for (name, file), _ in KEPT.items():
        export_trace(trace, name, tmp_path / file, DEPTH)
        whole = -1 if name == "sglang" else None
        np.testing.assert_array_equal(_import(name, tmp_path / file)[0].rows().expert[:whole], expert[:whole])


def test_facts_that_the_file_does_not_say_are_asked_for(tmp_path):
    np.save(tmp_path / "a.npy", ROUTED)
    ask = r"Name the model with --model, or use --layers, --experts and --top-k\.$"
    with pytest.raises(DataError, match=rf"3 layers, but not which layers of a model\. {ask}"):
        _import("vllm", tmp_path / "a.npy", Known())
    with pytest.raises(DataError, match=rf"does not say how many experts a layer has\. {ask}"):
        _import("vllm", tmp_path / "a.npy", Known(layers=LAYERS))
    with pytest.raises(DataError, match=r"the routing of 3 layers; expected 2 MoE layers or all 6 layers"):
        _import("vllm", tmp_path / "a.npy", Known(layers=(0, 1), num_experts=(8,), depth=6))
    (tmp_path / "a.csv").write_text("0,1\n0,2\n")
    with pytest.raises(DataError, match="how many experts a token has"):
        _import("csv", tmp_path / "a.csv", Known(num_experts=(8,)))
    with pytest.raises(DataError, match="has no token, which OLMoE's format needs"):
        export_trace(_import("vllm", tmp_path / "a.npy")[0], "olmoe", tmp_path / "o.jsonl")


def _meta(**changed):
    meta = {"prompt_tokens": 3, "completion_tokens": 2, "routed_experts": _int32(np.zeros((4, DEPTH, 2)))}
    return {"meta_info": {**meta, **changed}}


def _choice(experts, **more):
    return {"choices": [{"routed_experts": experts, **more}]}


HOSTILE = [
    ("vllm", _choice("!!!"), "cannot be read; got: .*base64"),
    ("vllm", _choice(_npy64(ROUTED)[:-40]), "its header has the shape"),
    ("vllm", _choice(_npy64(ROUTED.astype(np.float32))), "not integers"),
    ("vllm", _choice([[[0, 1]], [[0]]]), "inhomogeneous|cannot be read"),
    ("vllm", _choice([[[0, float("nan")]] * 3]), r"got: float64 \[1, 3, 2\]; expected integers"),
    ("vllm", _choice([[[0, 10**30]] * 3]), r"got: object \[1, 3, 2\]"),
    ("vllm", _choice([[[0, 2**40]] * 3]), r"sends token 0 to expert 1099511627776 in layer 1; expected -1 or one of 8"),
    ("vllm", _choice([[[0, 8]] * 3]), r"to expert 8 in layer 1"),
    ("vllm", _choice([[[0, -2]] * 3]), r"to expert -2 in layer 1"),
    ("vllm", _choice(None), r"has no routed_experts.*--enable-return-routed-experts"),
    ("vllm", _choice(ROUTED.tolist(), token_ids=[1], prompt_token_ids=[2]), "routing of 5 tokens, but 2 tokens"),
    ("vllm", _choice(ROUTED.tolist(), token_ids=[1, 2], prompt_token_ids=[3, "x", 5]), "the token id 'x'"),
    ("vllm", _choice(ROUTED.tolist(), token_ids=[1, 2], prompt_token_ids=[3, 2**31, 5]), "the token id 2147483648"),
    ("vllm", _choice(ROUTED.tolist(), token_ids=[1, 2], prompt_token_ids=[3, None, 5]), "the token id None"),
    ("vllm", {"choices": []}, "got: no choices"),
    ("vllm", [1], "got: a int"),
    ("vllm", [], "has no routing"),
    ("sglang", _meta(routed_experts="AAA"), "base64|padding"),
    ("sglang", _meta(routed_experts="AAA="), "2 bytes, which are not whole int32"),
    ("sglang", _meta(routed_experts=_int32(np.zeros(47))), "47 integers, which are not whole rows of 6 layers of 2"),
    ("sglang", _meta(routed_experts=[1, 2]), "got: a list; expected base64 of int32"),
    ("sglang", _meta(prompt_tokens=10**12), "prompt_tokens is 1000000000000; expected a count"),
    ("sglang", _meta(prompt_tokens=10**6), "4 rows for 1000002 tokens from token 0"),
    ("sglang", _meta(prompt_tokens=2**30, routed_experts_start_len=2**30 - 2), "begins at token 1073741822"),
    ("sglang", _meta(input_token_logprobs=[[1]], output_token_logprobs=[]), "of another form"),
    ("sglang", {"meta_info": None}, "has no routed_experts"),
    ("olmoe", {"input_ids": [1], "exp_ids": [[[0] * 3, [1] * 3]] * 2}, "1 token ids for 2 tokens"),
    ("olmoe", {"input_ids": [1]}, "no list of exp_ids"),
    ("olmoe", {"input_ids": None, "exp_ids": [[[0] * 3, [1] * 3]]}, "no list of input_ids"),
]


@pytest.mark.parametrize(("name", "value", "message"), HOSTILE)
def test_a_hostile_response_is_one_line(tmp_path, name, value, message):
    with pytest.raises(DataError, match=message) as error:
        _import(name, _json(tmp_path / "r.json", value))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "t.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("vllm", "r.json", b"[" * 300, "nested deeper than 100|cannot be read"),
        ("vllm", "r.jsonl", b'{"choices": ' + b"[" * 3000, "line 1 of .*cannot be read"),
        ("vllm", "r.jsonl", b"\xff", "cannot be read"),
        ("vllm", "r.npy", b"\x93NUMPY", "does not begin like|ends inside"),
        ("maxtext", "r.npz", b"PK\x03\x04", "cannot be read"),
        ("csv", "r.csv", b"0,1\n0,x\n", r"data line 2: '0,x'"),
        ("csv", "r.csv", b"layer,expert\n0,99999999999999999999999\n", "data line 2"),
        ("csv", "r.csv", b"1,2,3,4\n", "the columns"),
        ("csv", "r.csv", b"1,2\n1,3\n2,1\n4,1\n", "1 lines of a layer in a pass; expected 2"),
        ("csv", "r.csv", b"1,2\n1,3\n2,1\n2,3\n", r"the layers \[1, 2\]; expected \[1, 2, 4\]"),
        ("csv", "r.csv", b"x" * 20_000, "a line of more than"),
        ("csv", "r.csv", b"", "no line"),
    ],
)
def test_a_hostile_file_is_one_line(tmp_path, name, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        _import(name, tmp_path / file)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file]


@pytest.mark.release
@pytest.mark.parametrize(("name", "file"), [*KEPT, *((name, "t.json") for name in ("vllm", "sglang", "olmoe"))])
def test_mutants_of_every_format_are_read_or_refused_in_one_line(tmp_path, name, file):
    export_trace(synthetic_trace(num_tokens=24), name, tmp_path / file, DEPTH)
    content, draw = (tmp_path / file).read_bytes(), random.Random(0)
    if file == "t.json":
        content = b"[" + content.replace(b"\n", b",")[:-1] + b"]"
    said = []
    for _ in range(400):
        change = json_mutant if file == "t.json" and draw.random() < 0.5 else mutant
        (tmp_path / file).write_bytes(change(content, draw))
        try:
            _import(name, tmp_path / file)
        except DataError as error:
            said.append(str(error))
    assert [text for text in said if "\n" in text] == []


def test_the_command_takes_the_facts_from_a_model_or_from_options(tmp_path):
    folder = write_checkpoint("deepseek_v2_lite", tmp_path / "model")
    spec = describe_model(folder)[0]
    top_k = max(moe.router.top_k for _, moe in spec.moes)
    experts = np.broadcast_to(np.arange(top_k, dtype=np.int16), (5, len(spec.moes), top_k))
    np.save(tmp_path / "a.npy", experts)
    layers = ",".join(map(str, spec.moe_layers))
    count = str(spec.moes[0][1].num_choices)
    for facts in (["--model", str(folder)], ["--layers", layers, "--experts", count]):
        _run("trace", "--from", "vllm", str(tmp_path / "a.npy"), "--out", str(tmp_path / "t.safetensors"), *facts)
        assert open_trace(tmp_path / "t.safetensors").info.layers == spec.moe_layers
    done = _run("trace", "--to", "csv", str(tmp_path / "t.safetensors"), "--out", str(tmp_path / "t.csv"))
    assert "csv's format has no place for: document, domain" in done.stderr
    assert (tmp_path / "t.csv").read_text().startswith(f"layer,expert\n{spec.moe_layers[0]},0\n")
    for wrong, message in (
        (("--to", "csv", "--experts", "8"), "--experts describe the model of --from"),
        (("--to", "csv", "--from", "csv"), "--from and --to are two conversions"),
        (("--from", "csv", "--layers", "3-1"), "--layers is '3-1'; expected numbers and ranges"),
    ):
        failed = CliRunner().invoke(main, ["trace", str(tmp_path / "t.csv"), "--out", str(tmp_path / "x"), *wrong])
        assert (failed.exit_code, message in failed.stderr) == (1, True)


def _run(*arguments):
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done
