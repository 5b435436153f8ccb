"""OLMoE's routing analysis: JSON lines `{"input_ids", "predicted_token_ids", "exp_ids"}`, a window of tokens each.

`exp_ids` is [tokens, top_k, layers], by falling router logit; every layer of OLMoE is an MoE layer. The predicted
tokens are not read. Source: allenai/OLMoE, scripts/run_moe_analysis.py; Muennighoff et al. 2024, arXiv 2409.02060.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moezoo.core.files import atomic_writer
from moezoo.core.traces.formats.foreign import Foreign, Known, Request, RequestReader, documents, lost
from moezoo.core.traces.formats.payloads import array_of, damaged, json_line, json_records
from moezoo.core.traces.trace import RoutingTrace

_EXPECTED = 'JSON lines {"input_ids", "exp_ids": [tokens][top_k][layers]}'


def read_olmoe(path: Path, known: Known) -> Foreign:
    """Open a file of OLMoE's analysis as a trace; without a model its layers are 0, 1, ... Raises DataError."""
    several = _requests(path)
    first = next(several, None)
    if first is None:
        raise damaged(str(path), "no line", _EXPECTED)
    if known.layers is None:
        known = replace(known, layers=tuple(range(first[1].expert.shape[1])))

    def requests() -> Iterator[tuple[str, Request]]:
        yield first
        yield from several

    return RequestReader(known, "olmoe", str(path), path.stem).read(requests())


def _requests(path: Path) -> Iterator[tuple[str, Request]]:
    for place, window in json_records(path, _EXPECTED):
        where = f"{place or 'the content'} of {path}"
        missing = [name for name in ("input_ids", "exp_ids") if not isinstance(window.get(name), list)]
        if missing:
            raise damaged(where, f"no list of {' and of '.join(missing)}", _EXPECTED)
        expert = array_of(window["exp_ids"], where, 3).transpose(0, 2, 1)
        yield place, Request(expert, window["input_ids"], None, len(expert))


def write_olmoe(trace: RoutingTrace, path: Path, depth: int | None) -> list[str]:
    """Write a trace as OLMoE's JSON lines, a document each; return what is lost. Raises DataError: it has no tokens."""
    del depth
    trace.require("token", purpose="OLMoE's format")
    with atomic_writer(path) as file:
        for rows in documents(trace):
            assert rows.token is not None
            exp_ids = rows.expert.transpose(0, 2, 1).tolist()
            file.write(json_line({"input_ids": rows.token.tolist(), "exp_ids": exp_ids}))
    layers = list(trace.info.layers)
    notes = lost(trace, ("token", "document"), "olmoe")
    notes.append("predicted_token_ids are not written: a trace does not have them")
    if layers != list(range(len(layers))):
        notes.append(f"olmoe's format does not say that the layers are {layers!s:.100}")
    return notes
