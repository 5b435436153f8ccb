"""Routing of other programs as traces, and traces as other programs read them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moezoo.core.data.tokenizers import Tokenizer
from moezoo.core.traces.formats.csv_rows import read_csv, write_csv
from moezoo.core.traces.formats.foreign import Foreign, Known, checked_trace, document_lengths
from moezoo.core.traces.formats.maxtext import read_maxtext, write_maxtext
from moezoo.core.traces.formats.olmoe import read_olmoe, write_olmoe
from moezoo.core.traces.formats.sglang import read_sglang, write_sglang
from moezoo.core.traces.formats.vllm import read_vllm, write_vllm
from moezoo.core.traces.record import token_texts
from moezoo.core.traces.trace import RoutingTrace
from moezoo.core.traces.trace_file import write_trace


@dataclass(frozen=True)
class Format:
    """A format of another program.

    Fields:
        read: opens a file as a trace.
        write: writes a trace to a file, for a model of a number of layers if it is known; returns what is lost.
    """

    read: Callable[[Path, Known], Foreign]
    write: Callable[[RoutingTrace, Path, int | None], list[str]]


FORMATS: Mapping[str, Format] = {
    "vllm": Format(read_vllm, write_vllm),
    "sglang": Format(read_sglang, write_sglang),
    "maxtext": Format(read_maxtext, write_maxtext),
    "olmoe": Format(read_olmoe, write_olmoe),
    "csv": Format(read_csv, write_csv),
}


def import_trace(name: str, path: Path, out: Path, known: Known, tokenizer: Tokenizer | None = None) -> list[str]:
    """Write the routing in a file of another program as a trace, a part at a time; return notes for the user.

    Args:
        name: of the format, a key of FORMATS.
        path: the file.
        out: file of the trace.
        known: facts about the model that the file does not say.
        tokenizer: of the model, for the texts of the tokens; None if it is unknown.

    Raises DataError: the file is damaged, or a fact is missing.
    """
    foreign = FORMATS[name].read(path, known)
    seen: set[int] = set()
    with write_trace(out, foreign.info) as writer:
        for rows in foreign.rows:
            writer.add(checked_trace(foreign.info, rows, str(path)))
            if tokenizer is not None and rows.token is not None:
                seen.update(np.unique(rows.token).tolist())
        if tokenizer is not None:
            writer.texts.update(
                token_texts(tokenizer, [token for token in sorted(seen) if token < tokenizer.vocab_size])
            )
    return foreign.notes


def export_trace(trace: RoutingTrace, name: str, path: Path, depth: int | None = None) -> list[str]:
    """Write a trace as another program reads it, for a model of `depth` layers; return what the format loses."""
    notes = FORMATS[name].write(trace, path, depth)
    longest, window = max(document_lengths(trace)), trace.info.sequence_length
    if window is not None and longest - 1 > window:  # the last token is no input
        notes.append(
            f"a document has {longest:,} tokens, but the model saw windows of {window:,}: an engine that sees whole "
            "documents routes them otherwise"
        )
    return notes
