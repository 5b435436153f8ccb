"""vLLM's `routed_experts`: what `--enable-return-routed-experts` adds to outputs and responses.

- `RequestOutput.prompt_routed_experts` and `CompletionOutput.routed_experts`, arrays saved by numpy: a `.npy` file of
  one sequence, or a `.npz` file with these names and perhaps `prompt_token_ids` and `token_ids`.
- Responses of the server as `.json` or `.jsonl`, one or several: `choices[].routed_experts`, base64 of a `.npy` file
  [tokens - 1, layers, top_k] of prompt and answer (the last token was never fed, so it has no routing); or, in 0.21,
  nested lists [tokens of the answer, ...], with those of the prompt once in `prompt_routed_experts`. Token ids are
  there if the request asked for them (`return_token_ids`).

-1 marks tokens that the prefix cache answered. The layers are the MoE layers. The order of a token's experts is the
router's. Source: vllm-project/vllm, docs/training/routed_experts_replay.md (0.21) and the protocol files of
vllm/entrypoints/openai (base64).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import DataError
from moezoo.core.files import atomic_writer
from moezoo.core.traces.formats.foreign import Foreign, IntegerArray, Known, Request, RequestReader, documents, lost
from moezoo.core.traces.formats.payloads import (
    array_keys,
    array_of,
    base64_npy,
    blocks,
    damaged,
    json_line,
    json_records,
    member,
    open_array,
)
from moezoo.core.traces.trace import RoutingTrace

_EXPECTED = "a response of vLLM with choices[].routed_experts, or an array [tokens, layers, top_k]"
_PROMPT, _ANSWER = "prompt_routed_experts", "routed_experts"


def read_vllm(path: Path, known: Known) -> Foreign:
    """Open a file with vLLM's routing as a trace. Raises DataError."""
    reader = RequestReader(known, "vllm", str(path), path.stem)
    if path.suffix == ".npy":
        return reader.read(("", request) for request in _array(path))
    return reader.read([("", _npz(path))] if path.suffix == ".npz" else _responses(path))


def _array(path: Path) -> Iterator[Request]:
    array = open_array(path)
    if len(array.shape) != 3 or 0 in array.shape:
        raise damaged(str(path), f"{array.dtype} {list(array.shape)}", _EXPECTED)
    for number, block in enumerate(blocks(array)):
        yield Request(block, continues=number > 0)


def _npz(path: Path) -> Request:
    keys = array_keys(path)
    if _ANSWER not in keys:
        raise damaged(str(path), f"the arrays {', '.join(keys)}"[:200], f"{_PROMPT} and {_ANSWER}")
    parts: list[IntegerArray] = [np.asarray(open_array(path, key)) for key in (_PROMPT, _ANSWER) if key in keys]
    if any(part.ndim != 3 or 0 in part.shape[1:] or part.shape[1:] != parts[0].shape[1:] for part in parts):
        raise damaged(str(path), f"the shapes {[list(part.shape) for part in parts]}"[:200], _EXPECTED)
    ids = [np.asarray(open_array(path, key)).tolist() for key in ("prompt_token_ids", "token_ids") if key in keys]
    tokens = [*ids[0], *ids[1]] if len(ids) == 2 else None
    prompt = len(ids[0]) if tokens is not None else len(parts[0]) if len(parts) == 2 else None
    return Request(np.concatenate(parts), tokens, prompt, None if tokens is None else len(tokens))


def _responses(path: Path) -> Iterator[tuple[str, Request]]:
    for place, response in json_records(path, _EXPECTED):
        choices = response.get("choices")
        if not isinstance(choices, list) or not choices:
            raise damaged(f"{place or 'the content'} of {path}", "no choices", _EXPECTED)
        for number, choice in enumerate(choices):
            where = ", ".join(filter(None, (place, f"choice {number}")))
            if not isinstance(choice, dict) or choice.get(_ANSWER) is None:
                raise DataError(
                    f"{where} of {path} has no routed_experts; expected {_EXPECTED}. Start the server with "
                    "--enable-return-routed-experts."
                )
            yield where, _request(response, choice, f"{where} of {path}")


def _request(response: dict[str, Any], choice: dict[str, Any], where: str) -> Request:
    expert = array_of(choice[_ANSWER], where, 3)
    if response.get(_PROMPT) is not None:
        prompt = array_of(response[_PROMPT], where, 3)
        if prompt.shape[1:] != expert.shape[1:]:
            raise damaged(where, f"shapes {list(prompt.shape)} and {list(expert.shape)}", "equal layers and top_k")
        expert = np.concatenate([prompt, expert])
    before = choice.get("prompt_token_ids") or response.get("prompt_token_ids")
    after = choice.get("token_ids")
    if isinstance(before, list) and isinstance(after, list):
        return Request(expert, [*before, *after], len(before), len(before) + len(after))
    usage = member(response, "usage")
    num_prompt, num_answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(num_prompt) is not int or not 0 <= num_prompt <= len(expert):
        return Request(expert)
    # A wrong count of the server must not allocate: without ids, only the last token may lack its row.
    whole = num_prompt + num_answer if type(num_answer) is int and len(response["choices"]) == 1 else -1
    return Request(expert, None, num_prompt, whole if len(expert) <= whole <= len(expert) + 1 else None)


def write_vllm(trace: RoutingTrace, path: Path, depth: int | None) -> list[str]:
    """Write a trace as `.npy`, int16 [tokens, layers, top_k], or else as one response a line; return what is lost."""
    del depth
    if path.suffix == ".npy":
        return _write_array(trace, path)
    notes = lost(trace, ("token", "generated", "document"), "vllm")
    dropped = 0
    with atomic_writer(path) as file:
        for number, rows in enumerate(documents(trace)):
            generated = rows.generated if rows.generated is not None else np.zeros(len(rows), np.uint8)
            num_prompt = int((generated == 0).sum())
            expert = rows.expert
            if num_prompt < len(rows):  # the last generated token is never fed
                dropped += bool((expert[-1] >= 0).any())
                expert = expert[:-1]
            choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": None}
            record: dict[str, Any] = {"id": f"trace-{number}", "object": "text_completion", "choices": [choice]}
            if rows.token is not None:
                choice["prompt_token_ids"] = rows.token[:num_prompt].tolist()
                choice["token_ids"] = rows.token[num_prompt:].tolist()
            choice["routed_experts"] = base64_npy(smallest(expert))
            record["usage"] = {"prompt_tokens": num_prompt, "completion_tokens": len(rows) - num_prompt}
            file.write(json_line(record))
    if dropped:
        notes.append(f"vllm's format has no routing of the last generated token: not written for {dropped} documents")
    return notes


def _write_array(trace: RoutingTrace, path: Path) -> list[str]:
    with atomic_writer(path) as file:
        shape = (trace.num_tokens, trace.num_layers, trace.top_k)
        header = {"descr": "<i2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for rows in trace.chunks():
            file.write(np.ascontiguousarray(rows.expert, "<i2").tobytes())
    return lost(trace, (), "vllm")


def smallest(expert: NDArray[np.int16]) -> NDArray[Any]:
    """Return experts as uint8 or uint16, as vLLM does; int16 if some are unknown."""
    if (expert < 0).any():
        return expert
    return expert.astype(np.uint8 if expert.size == 0 or expert.max() < 256 else np.uint16)
