"""SGLang's `return_routed_experts`: base64 of int32 in responses.

`meta_info.routed_experts` of `/generate` (or of a choice of the OpenAI server, or of `sglext`) is base64 of int32
[tokens - 1, layers, top_k], flattened: of prompt and answer without the last token, which was never fed. The layers are
all layers of the model (`num_hidden_layers`); those without experts hold 0, or -1 in sgl-jax. The rows begin at
`routed_experts_start_len`. `meta_info` has `prompt_tokens` and `completion_tokens`; ids and log-probabilities are in
`input_token_logprobs` and `output_token_logprobs`, [log-probability, id, text] each, if the request asked for them. In
`sglext`, which is beside the choices, the array is that of the first one, and ids are `input_ids` and `output_ids`.

Source: sglang 0.5.23, srt/state_capturer, srt/managers/io_struct.py, srt/entrypoints/openai/protocol.py;
sgl-project/sglang-jax, docs/features/return_routed_experts.md.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import DataError, shown
from moezoo.core.files import atomic_writer
from moezoo.core.traces.formats.foreign import (
    Foreign,
    Known,
    Request,
    RequestReader,
    all_layers,
    documents,
    lost,
)
from moezoo.core.traces.formats.payloads import base64_int32, damaged, flat_int32, json_line, json_records, member
from moezoo.core.traces.trace import RoutingTrace, TraceRows

_EXPECTED = "a response of SGLang with meta_info.routed_experts"


def read_sglang(path: Path, known: Known) -> Foreign:
    """Open responses of SGLang (`.json` or `.jsonl`) as a trace. Raises DataError."""
    return RequestReader(known, "sglang", str(path), path.stem).read(_requests(path, known))


def _requests(path: Path, known: Known) -> Iterator[tuple[str, Request]]:
    for place, response in json_records(path, _EXPECTED):
        choices = response.get("choices")
        answers = choices if isinstance(choices, list) and choices else [response]
        for number, answer in enumerate(answers):
            where = ", ".join(filter(None, (place, f"choice {number}" if len(answers) > 1 else "")))
            if not isinstance(answer, dict):
                raise damaged(f"{where} of {path}", f"a {type(answer).__name__}", _EXPECTED)
            yield where, _request(response, number, answer, known, f"{where or 'the content'} of {path}")


def _request(response: dict[str, Any], number: int, answer: dict[str, Any], known: Known, where: str) -> Request:
    # The array beside all choices is that of the first one.
    places = [member(answer, "meta_info"), member(answer, "sglext"), answer, *([member(response, "sglext")][number:])]
    meta = next((place for place in places if place.get("routed_experts") is not None), None)
    if meta is None:
        raise DataError(
            f"{where} has no routed_experts; expected {_EXPECTED}. Start the server with "
            "--enable-return-routed-experts, and ask for return_routed_experts."
        )
    flat = flat_int32(meta["routed_experts"], where)
    first = _count(meta, "routed_experts_start_len", where) or 0
    usage = {**member(response, "usage"), **member(answer, "meta_info"), **meta}
    num_prompt, num_answer = (_count(usage, name, where) for name in ("prompt_tokens", "completion_tokens"))
    tokens, loss = _scored_tokens([usage.get("input_token_logprobs"), usage.get("output_token_logprobs")], where)
    prompt, ids = _ids(response, number, answer)
    if tokens is None and prompt is not None and ids is not None:
        tokens, num_prompt, num_answer = [*prompt, *ids], len(prompt), len(ids)
    count = None if num_prompt is None or num_answer is None else num_prompt + num_answer
    if tokens is not None and count is not None and len(tokens) != count:
        tokens = loss = None  # the log-probabilities begin later than the prompt
    expert = _shaped(flat, known, None if count is None else count - first, where)
    if count is not None and not len(expert) <= count - first <= len(expert) + 1:
        raise damaged(where, f"{len(expert)} rows for {count} tokens from token {first}", "a row for all but the last")
    return Request(expert, tokens, num_prompt, count, first, loss)


def _ids(response: dict[str, Any], number: int, answer: dict[str, Any]) -> tuple[list[int] | None, list[int] | None]:
    """Return the token ids of prompt and answer; None where they are not sent."""
    beside = member(response, "sglext")
    prompt, answers = beside.get("input_ids"), beside.get("output_ids")
    ids = answers[number] if isinstance(answers, list) and number < len(answers) else answer.get("output_ids")
    prompt = answer.get("input_ids") if prompt is None else prompt
    return (prompt if isinstance(prompt, list) else None), (ids if isinstance(ids, list) else None)


def _shaped(flat: NDArray[np.int32], known: Known, count: int | None, where: str) -> NDArray[np.int32]:
    """Return flattened experts as [rows, layers, K]; `count` is the number of tokens, if it is known."""
    if known.top_k is None:
        raise DataError(f"{where} does not say how many experts a token has. Name the model, or use --top-k.")
    depth = known.depth
    if depth is None and count is not None:  # the last token has no row; in some versions it has one
        rows = next((rows for rows in (count - 1, count) if rows > 0 and not len(flat) % (rows * known.top_k)), None)
        depth = None if rows is None else len(flat) // (rows * known.top_k)
    if not depth or len(flat) % (depth * known.top_k):
        shape = f"{depth or '?'} layers of {known.top_k} experts"
        raise damaged(where, f"{len(flat)} integers, which are not whole rows of {shape}", "the model that routed")
    return flat.reshape(-1, depth, known.top_k)


def _count(meta: dict[str, Any], name: str, where: str) -> int | None:
    value = meta.get(name)
    if value is not None and (type(value) is not int or not 0 <= value < 2**31):
        raise damaged(where, f"{name} is {shown(value, 60)}", "a count")
    return value


def _scored_tokens(pairs: list[Any], where: str) -> tuple[list[int] | None, list[float] | None]:
    """Return token ids and losses from [log-probability, id, text] of prompt and answer; None without them."""
    if not all(isinstance(part, list) for part in pairs):
        return None, None
    entries = [*pairs[0], *pairs[1]]
    if not all(isinstance(entry, list) and len(entry) >= 2 for entry in entries):
        raise damaged(where, "token_logprobs of another form", "[log-probability, id, text] of each token")
    values = [math.nan if entry[0] is None else entry[0] for entry in entries]
    if not all((isinstance(value, int | float) and abs(value) < 1e30) or value != value for value in values):
        raise damaged(where, "token_logprobs that are no numbers", "log-probabilities")
    return [entry[1] for entry in entries], [-float(value) for value in values]


def write_sglang(trace: RoutingTrace, path: Path, depth: int | None) -> list[str]:
    """Write a trace as responses of `/generate`, one a line; return what is lost."""
    layers = trace.info.layers
    whole = max(layers[-1] + 1, depth or 0)
    notes = lost(trace, ("token", "loss", "generated", "document"), "sglang")
    if depth is None:
        notes.append(f"written for a model of {whole} layers; name the model with --model if it has more")
    dropped = 0
    with atomic_writer(path) as file:
        for rows in documents(trace):
            dropped += bool((rows.expert[-1] >= 0).any())
            generated = rows.generated if rows.generated is not None else np.zeros(len(rows), np.uint8)
            num_prompt = int((generated == 0).sum())
            routed = all_layers(rows.expert[:-1], layers, whole, dense=0)
            meta: dict[str, Any] = {"prompt_tokens": num_prompt, "completion_tokens": len(rows) - num_prompt}
            if rows.token is not None:
                entries = _entries(rows)
                meta["input_token_logprobs"] = entries[:num_prompt]
                meta["output_token_logprobs"] = entries[num_prompt:]
            file.write(json_line({"text": "", "meta_info": {**meta, "routed_experts": base64_int32(routed)}}))
    if dropped:
        notes.append(f"sglang's format has no routing of the last token: not written for {dropped} documents")
    return notes


def _entries(rows: TraceRows) -> list[list[Any]]:
    """Return [log-probability, id, text] of each token; the log-probability is null where it is unknown."""
    assert rows.token is not None
    loss = [math.nan] * len(rows) if rows.loss is None else rows.loss.tolist()
    return [
        [-nats if math.isfinite(nats) else None, token, None]
        for nats, token in zip(loss, rows.token.tolist(), strict=True)
    ]
