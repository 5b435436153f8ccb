"""A served model: its texts are those of `generate`, whatever clients send, and however they leave."""

import asyncio
import base64
import io
import json
import socket
import threading
from contextlib import closing, contextmanager

import numpy as np
import pytest

import moezoo
from moezoo.core.errors import DataError
from moezoo.core.generation.likelihood import likelihood_of
from moezoo.core.generation.session import Session
from moezoo.core.traces.formats.foreign import Known
from moezoo.core.traces.formats.sglang import read_sglang
from moezoo.core.traces.formats.vllm import read_vllm
from moezoo.server import engine as engine_module
from moezoo.server.answers import Answer, Piece, answers
from moezoo.server.engine import Engine
from moezoo.server.requests import RequestError, parse_chat, parse_completion
from moezoo.server.responses import Responses
from moezoo.server.run import serve
from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.backends_available import require_backend
from tests.support.fixtures import write_checkpoint

GREEDY = {"temperature": 0, "max_tokens": 6}
USER = {"messages": [{"role": "user", "content": "the cat"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    require_backend("mlx")
    return write_tokenizer(write_checkpoint("mixtral", tmp_path_factory.mktemp("serve") / "mixtral"))


@pytest.fixture(scope="module")
def model(folder):
    return moezoo.load(folder, backend="mlx")


@pytest.fixture(scope="module")
def engine(folder):
    started = Engine(lambda: moezoo.load(folder, backend="mlx"), max_tokens=400)
    started.start()
    yield started
    started.close()
    assert not started.is_alive


def items(model, parse, **fields):
    request = parse(json.dumps(fields).encode(), "tiny", 400)
    return request, list(answers(model, Session(model.model), request, 400))


def response(model, parse, **fields):
    request, found = items(model, parse, **fields)
    made = [item for item in found if isinstance(item, Answer)]
    return Responses(request, "tiny", model.model.spec, model.tokenizer).whole(made)


def test_texts_are_those_of_generate(model):
    own = {"temperature": 0.0, "max_new_tokens": 6}
    several = response(model, parse_completion, prompt=["the cat", "the owl saw"], **GREEDY)
    assert [choice["text"] for choice in several["choices"]] == model.generate(["the cat", "the owl saw"], **own)
    ids = model.encode_prompt("the cat")
    assert response(model, parse_completion, prompt=ids.tolist(), **GREEDY)["choices"] == several["choices"][:1]
    chat = response(model, parse_chat, **USER, **GREEDY)
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": model.chat("the cat", **own)}
    sampled = response(model, parse_completion, prompt="the cat", temperature=0.7, seed=3, top_p=0.9, max_tokens=9)
    told = {"temperature": 0.7, "seed": 3, "top_p": 0.9, "max_new_tokens": 9}
    assert sampled["choices"][0]["text"] == model.generate("the cat", **told)
    usage = several["usage"]
    assert usage["prompt_tokens"] == len(ids) + len(model.encode_prompt("the owl saw"))
    assert usage["completion_tokens"] == 12
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 1  # <s>


def test_a_stop_string_ends_a_text(model):
    whole = response(model, parse_completion, prompt="the cat", **GREEDY)["choices"][0]
    stop = whole["text"][len(whole["text"]) // 2 :][:3]
    cut = response(model, parse_completion, prompt="the cat", stop=stop, **GREEDY)["choices"][0]
    assert cut["text"] == whole["text"].partition(stop)[0]
    assert (whole["finish_reason"], cut["finish_reason"]) == ("length", "stop")


def test_log_probabilities_are_those_of_a_forward_pass(model):
    ids = model.encode_prompt("the owl saw")
    made = response(model, parse_completion, prompt="the owl saw", echo=True, logprobs=2, temperature=0, max_tokens=1)
    choice = made["choices"][0]
    new = model.generate(ids[None], temperature=0.0, max_new_tokens=1)[0]
    logits = model.model.forward(np.concatenate([ids, new])[None].astype(np.int32), inference=True).logits[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [logprobs[place, token] for place, token in enumerate([*ids[1:], *new])]
    assert choice["logprobs"]["token_logprobs"][0] is None
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"][1:], expected, atol=1e-5)
    tops = choice["logprobs"]["top_logprobs"]
    assert tops[0] is None
    assert max(tops[-1].values()) == choice["logprobs"]["token_logprobs"][-1]
    assert choice["text"].startswith("the owl saw")
    only = response(model, parse_completion, prompt=ids.tolist(), echo=True, logprobs=1, max_tokens=0)
    assert only["usage"]["completion_tokens"] == 0
    assert len(only["choices"][0]["logprobs"]["tokens"]) == len(ids)
    chat = response(model, parse_chat, **USER, **GREEDY, logprobs=True, top_logprobs=1)["choices"][0]
    entries = chat["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [entry["top_logprobs"][0]["logprob"] for entry in entries]


def test_log_probabilities_have_no_repetition_penalty(model):
    told = {"prompt": "the owl saw", "logprobs": 0, "max_tokens": 12, "temperature": 0, "repetition_penalty": 3.0}
    made = response(model, parse_completion, **told, return_token_ids=True)["choices"][0]
    tokens = np.asarray([*made["prompt_token_ids"], *made["token_ids"]], np.int32)
    logits = model.model.forward(tokens[None], inference=True).logits[0]
    expected = [likelihood_of(logits[place : place + 1], tokens[place + 1 :][:1]).nats for place in range(len(tokens))]
    found = made["logprobs"]["token_logprobs"]
    np.testing.assert_allclose(found, expected[-len(found) - 1 : -1], atol=1e-5)
    with pytest.raises(DataError, match="Use a penalty nearer to 1"):
        response(model, parse_completion, **{**told, "repetition_penalty": 1e-44})


@pytest.mark.parametrize("parse", [parse_completion, parse_chat])
def test_a_stream_has_the_log_probabilities_of_the_whole_answer(model, parse):
    """Each token once, also those whose text is held back: of a stop string, or an incomplete character."""
    chat = parse is parse_chat
    told = {**(USER if chat else {"prompt": "the cat"}), "temperature": 2.0, "seed": 5, "max_tokens": 40}
    told |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    text = response(model, parse, **told)["choices"][0]
    text = text["message"]["content"] if chat else text["text"]
    told["stop"] = text[-5:-2]
    whole = response(model, parse, **told)["choices"][0]
    request, found = items(model, parse, **told, stream=True)
    responses = Responses(request, "tiny", model.model.spec, model.tokenizer)
    sent = [chunk["choices"][0] for item in found if (chunk := responses.chunk(item))]
    parts = [choice["logprobs"] for choice in sent if choice["logprobs"]]
    assert len(parts) > 3
    assert whole["finish_reason"] == "stop"
    for name, expected in whole["logprobs"].items():
        assert expected is None or [entry for part in parts for entry in part[name]] == expected
    assert all(choice["logprobs"] for choice in sent if (choice.get("text") or choice.get("delta", {}).get("content")))


def test_the_tokens_of_log_probabilities_join_to_the_text(model):
    """Also the spaces, which this tokenizer's tokens alone begin without."""
    told = {"temperature": 2.0, "seed": 3, "max_tokens": 24}
    told |= {"return_token_ids": True}
    made = response(model, parse_completion, prompt="the cat", echo=True, logprobs=3, **told)["choices"][0]
    tokens, offsets = made["logprobs"]["tokens"], made["logprobs"]["text_offset"]
    text = model.tokenizer.decode(made["prompt_token_ids"] + made["token_ids"])
    assert "".join(tokens) == text
    assert all(text[offset:].startswith(token) for offset, token in zip(offsets, tokens, strict=True))
    assert any(token.startswith(" ") for token in tokens)


def test_choices_of_one_prompt_have_seeds_one_after_the_other(model):
    told = {"prompt": ["the cat", "the owl"], "temperature": 2.0, "max_tokens": 8}
    three = response(model, parse_completion, **told, seed=7, n=3, echo=True)
    texts = [choice["text"] for choice in three["choices"]]
    alone = [response(model, parse_completion, **told, seed=seed, echo=True)["choices"] for seed in (7, 8, 9)]
    assert texts == [made[prompt]["text"] for prompt in (0, 1) for made in alone]
    assert [choice["index"] for choice in three["choices"]] == list(range(6))
    assert three["usage"]["prompt_tokens"] == sum(len(model.encode_prompt(prompt)) for prompt in told["prompt"])
    chat = response(model, parse_chat, **USER, temperature=2.0, seed=7, n=2, max_tokens=8)["choices"]
    assert chat[0]["message"] != chat[1]["message"]


def test_routing_is_in_the_fields_of_vllm_and_of_sglang(model, tmp_path):
    spec = model.model.spec
    made = response(
        model, parse_completion, prompt="the cat", return_routed_experts=True, return_token_ids=True, **GREEDY
    )
    choice = made["choices"][0]
    tokens = np.asarray([*choice["prompt_token_ids"], *choice["token_ids"]], np.int32)
    routing = model.model.forward(tokens[None], inference=True).routing
    expert = np.stack([layer.expert[0, :-1] for layer in routing], axis=1)
    npy = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
    np.testing.assert_array_equal(npy, expert)
    file = tmp_path / "response.json"
    file.write_text(json.dumps(made))
    num_experts = tuple(moe.num_experts for _, moe in spec.moes)
    known = Known(spec.moe_layers, num_experts, expert.shape[2], len(spec.all_layers))
    for read in (read_vllm, read_sglang):
        (rows,) = read(file, known).rows
        np.testing.assert_array_equal(rows.expert[:-1], expert)
        assert (rows.expert[-1] == -1).all()  # never fed


@pytest.mark.parametrize(
    ("parse", "fields", "message", "status"),
    [
        (parse_completion, {}, "prompt is missing", 400),
        (parse_completion, {"prompt": 3}, "prompt is 3; expected a text, token ids", 400),
        (parse_completion, {"prompt": [[1], "a"]}, "expected a text, token ids", 400),
        (parse_completion, {"prompt": "a", "max_tokens": 401}, "max_tokens is 401; expected an integer from 1 to", 400),
        (parse_completion, {"prompt": "a", "max_tokens": True}, "max_tokens is True", 400),
        (parse_completion, {"prompt": "a", "temperature": -1}, "temperature", 400),
        (parse_completion, {"prompt": "a", "temperature": "hot"}, "temperature", 400),
        (parse_completion, {"prompt": "a", "seed": "1"}, "seed is '1'", 400),
        (parse_completion, {"prompt": "a", "stop": [""]}, "none of them empty", 400),
        (parse_completion, {"prompt": "a", "n": 17}, "n is 17; expected an integer from 1 to 16", 400),
        (parse_completion, {"prompt": "a", "best_of": 2}, "best_of is 2; expected none", 400),
        (parse_completion, {"prompt": "a", "max_token": 2}, "unknown field 'max_token'; did you mean max_tokens?", 400),
        (parse_completion, {"prompt": "a", "stream": True, "echo": True}, "a stream has text and logprobs", 400),
        (parse_completion, {"prompt": "a", "model": "gpt"}, "model 'gpt' is not served here; expected 'tiny'", 404),
        (parse_chat, {"messages": []}, "the number of messages is 0; expected 1 to 1000", 400),
        (parse_chat, {"messages": ["a"]}, "message 0 is 'a'; expected role and content", 400),
        (parse_chat, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type text", 400),
        (parse_chat, {**USER, "top_logprobs": 1}, "top_logprobs needs logprobs", 400),
        (parse_chat, {**USER, "tools": [{}]}, "tools is [{}]; expected none", 400),
    ],
)
def test_a_wrong_request_is_one_line(parse, fields, message, status):
    with pytest.raises(RequestError) as caught:
        parse(json.dumps(fields).encode(), "tiny", 400)
    assert message in str(caught.value)
    assert caught.value.status == status
    assert "\n" not in caught.value.body()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b"[" * 5000, b'{"prompt": "\\ud800"}', b'{"a": 1, "a": 2}']
)
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(RequestError, match="the body is"):
        parse_completion(body, "tiny", 400)


async def gathered(job):
    return await remaining(job.items())


async def remaining(pieces):
    return [piece async for piece in pieces]


def submitted(engine, **fields):
    return engine.submit(parse_completion(json.dumps(fields).encode(), "tiny", 400))


def test_requests_of_eight_clients_are_answered_in_order(engine, model):
    prompts = [f"the {word} {number % 3 * 'ran '}" for number, word in enumerate(["cat", "owl", "dog", "mat"] * 2)]

    async def ask():
        jobs = [submitted(engine, prompt=prompt, **GREEDY) for prompt in prompts]
        return await asyncio.gather(*map(gathered, jobs))

    texts = [answer.text for (answer,) in asyncio.run(ask())]
    assert texts == [model.generate(prompt, temperature=0.0, max_new_tokens=6) for prompt in prompts]


def test_a_job_that_is_cancelled_ends_and_the_next_is_answered(engine, model):
    async def ask():
        long = submitted(engine, prompt="the cat", stream=True, temperature=0, max_tokens=400)
        waiting, after = submitted(engine, prompt="the dog", **GREEDY), submitted(engine, prompt="the owl", **GREEDY)
        waiting.cancel()
        pieces = long.items()
        assert isinstance(await anext(pieces), Piece)
        long.cancel()
        (answer,) = await gathered(after)
        with pytest.raises(RequestError, match="cancelled"):
            await remaining(pieces)
        return answer.text

    assert asyncio.run(ask()) == model.generate("the owl", temperature=0.0, max_new_tokens=6)


def test_what_the_model_cannot_take_is_an_error_of_that_request_alone(engine):
    async def ask():
        for prompt, message in (([10**9], "outside the vocabulary"), ([-1], "outside the vocabulary")):
            with pytest.raises(RequestError, match=message):
                await gathered(submitted(engine, prompt=prompt))
        return await gathered(submitted(engine, prompt="the cat", **GREEDY))

    assert len(asyncio.run(ask())) == 1


def test_a_bug_ends_one_request(engine, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError
        yield

    async def ask():
        with monkeypatch.context() as patched:
            patched.setattr(engine_module, "answers", broken)
            job = submitted(engine, prompt="the cat")
            with pytest.raises(ZeroDivisionError):
                await gathered(job)
        return await gathered(submitted(engine, prompt="the cat", **GREEDY))

    assert len(asyncio.run(ask())) == 1


def test_a_full_queue_and_a_closed_engine_refuse(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(engine_module, "MAX_WAITING", 1)
    started = Engine(lambda: release.wait(10) and 1 / 0, max_tokens=400)
    started._thread.start()

    async def ask():
        first = submitted(started, prompt="a")
        with pytest.raises(RequestError, match="busy") as caught:
            submitted(started, prompt="a")
        assert caught.value.status == 503
        release.set()
        started.close()
        with pytest.raises(RequestError, match="shutting down"):
            await gathered(first)
        with pytest.raises(RequestError, match="shutting down"):
            submitted(started, prompt="a")

    asyncio.run(ask())
    with pytest.raises(ZeroDivisionError):
        started._loaded.result()


class Client:
    """Calls the app as a server does, without a network. Each call is a fresh connection."""

    def __init__(self, app):
        self.app, self.failures = app, []

    def call(self, method, path, content=b"", kind="application/json", leave_after=None):
        return asyncio.run(self.calling(method, path, content, kind, leave_after))

    async def calling(self, method, path, content=b"", kind="application/json", leave_after=None):
        """Return status and body; `leave_after`: parts of the body after which the client goes away."""
        sent, gone, parts = [], asyncio.Event(), [content]
        if leave_after == 0:
            gone.set()

        async def receive():
            if parts:
                return {"type": "http.request", "body": parts.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if leave_after is not None and len(sent) > leave_after:
                gone.set()

        headers = [(b"content-type", kind.encode()), (b"host", b"127.0.0.1")]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "method": method, "path": path, "headers": headers}
        await self.app(
            {**scope, "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1"}, receive, send
        )
        body = b"".join(message.get("body", b"") for message in sent)
        return (sent[0]["status"] if sent else None), body


@pytest.fixture(scope="module")
def client(engine, model):
    from moezoo.server.app import create_app

    failures = []
    client = Client(create_app(engine, model, "tiny", failures.append))
    client.failures = failures
    return client


def events(body):
    lines = body.decode().split("\n\n")
    assert lines[-1] == ""
    assert lines[-2] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_pieces_of_a_stream_join_to_the_text(client, model):
    told = {**GREEDY, "stream": True, "stream_options": {"include_usage": True}}
    status, body = client.call("POST", "/v1/completions", json.dumps({"prompt": "the cat", **told}).encode())
    *chunks, end, usage = events(body)
    text = model.generate("the cat", temperature=0.0, max_new_tokens=6)
    assert status == 200
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert end["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == 6
    _, body = client.call("POST", "/v1/chat/completions", json.dumps({**USER, **told}).encode())
    first, *chunks, usage = events(body)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert said == model.chat("the cat", temperature=0.0, max_new_tokens=6)


def test_paths_and_their_errors(client, monkeypatch):
    assert json.loads(client.call("GET", "/health")[1]) == {"status": "ok"}
    assert json.loads(client.call("GET", "/v1/models")[1])["data"][0]["id"] == "tiny"
    assert client.call("GET", "/v1/models/tiny")[0] == 200
    monkeypatch.setattr("moezoo.server.app.MAX_BYTES", 100)
    for method, path, content, kind, status in (
        ("GET", "/v1/models/other", b"", "application/json", 404),
        ("GET", "/v2", b"", "application/json", 404),
        ("GET", "/v1/completions", b"", "application/json", 405),
        ("POST", "/v1/completions", b"{}", "text/plain", 415),
        ("POST", "/v1/completions", b" " * 101, "application/json", 413),
        ("POST", "/v1/completions", b'{"prompt": [99999]}', "application/json", 400),
        ("POST", "/v1/completions", b'{"prompt": [99999], "stream": true}', "application/json", 400),
    ):
        got, body = client.call(method, path, content, kind)
        assert (got, list(json.loads(body)["error"])) == (status, ["message", "type", "param", "code"])


@pytest.mark.parametrize(("stream", "leave_after"), [(False, 0), (True, 0), (True, 2)])
def test_a_client_that_leaves_stops_its_generation(client, engine, stream, leave_after):
    told = json.dumps({"prompt": "the cat", "temperature": 0, "max_tokens": 400, "stream": stream}).encode()
    count, told_ids = [], engine_module.answers

    def counted(*given):
        with closing(told_ids(*given)) as pieces:
            for piece in pieces:
                count.append(piece)
                yield piece

    async def ask():
        await client.calling("POST", "/v1/completions", told, leave_after=leave_after)
        return await gathered(submitted(engine, prompt="the owl", **GREEDY))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine_module, "answers", counted)
        (answer,) = asyncio.run(ask())
    assert len(answer.tokens) == 6
    assert len(count) < 350


def test_a_bug_is_status_500_and_is_told(client, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError
        yield

    monkeypatch.setattr(engine_module, "answers", broken)
    status, body = client.call("POST", "/v1/completions", b'{"prompt": "the cat"}')
    assert (status, json.loads(body)["error"]["type"]) == (500, "server_error")
    assert [type(error) for error in client.failures] == [ZeroDivisionError]
    monkeypatch.setattr("moezoo.server.responses.usage_of", lambda *_: 1 / 0)
    monkeypatch.setattr(engine_module, "answers", answers)
    told = json.dumps({"prompt": "the cat", **GREEDY, "stream": True, "stream_options": {"include_usage": True}})
    status, body = client.call("POST", "/v1/completions", told.encode())
    assert status == 200
    assert b"internal error: ZeroDivisionError" in body.split(b"\n\n")[-2]
    assert len(client.failures) == 2


@contextmanager
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def test_an_address_in_use_is_noticed_before_the_model_is_loaded():
    with taken_port() as port, pytest.raises(DataError, match=f"cannot listen on 127.0.0.1:{port}"):
        serve(lambda: 1 / 0, "tiny", port=port, on_ready=print, on_failure=print)
