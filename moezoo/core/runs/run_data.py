"""Record of the data that a run is trained on, to notice that a file has changed when the run is resumed.

`<run>/data.json` has the number of tokens and a digest of each source. If a text has grown, the boundary between
training and validation text has moved, and the former validation text may be in the training text.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moezoo.core.checkpoint.manifest import Section
from moezoo.core.data.prepare import SourceSummary
from moezoo.core.errors import DataError, RunError, TokenizerError
from moezoo.core.files import read_bounded
from moezoo.core.json_text import parse_json
from moezoo.core.runs.run_manifest import verify_run

DATA_FILE = "data.json"
_MAX_BYTES = 10_000_000


class _Source(Section):
    source: str
    tokens: int
    digest: str


class _Record(Section):
    sources: list[_Source]


def dump_data(summary: Sequence[SourceSummary]) -> str:
    """Return the text of data.json."""
    return json.dumps({"sources": data_record(summary)}, indent=2) + "\n"


def data_record(summary: Sequence[SourceSummary]) -> list[dict[str, Any]]:
    """Return `source`, `tokens` and `digest` of each source."""
    return [_Source(source=row.source, tokens=_tokens(row), digest=row.digest).model_dump() for row in summary]


def changed_data(run: Path, summary: Sequence[SourceSummary]) -> list[str]:
    """Return a line about each source that differs from the run's record, or about a record that is missing.

    Raises RunError: the record is damaged.
    """
    verify_run(run, DATA_FILE)
    try:
        record = _Record.model_validate(parse_json(read_bounded(run / DATA_FILE, _MAX_BYTES)))
    except FileNotFoundError:
        return [f"the run has no record of its data, so changes since it was started are not noticed ({run})"]
    except (OSError, ValueError, ValidationError) as error:
        raise RunError(f"{run / DATA_FILE} cannot be read ({type(error).__name__}). Restore it from a copy.") from None
    changed = []
    for before, now in zip(record.sources, summary, strict=False):
        if before.digest != now.digest:
            tokens = f"has {_tokens(now):,} tokens; it had {before.tokens:,}"
            if before.tokens == _tokens(now):
                tokens = f"has {before.tokens:,} tokens as before, but other ones"
            changed.append(f"{now.key} ({now.source}) has changed since the run was started: it {tokens}")
    return changed


def check_data(run: Path, summary: Sequence[SourceSummary], *, allow_changed: bool) -> list[str]:
    """Check that a run is resumed with the data it was started with, and return lines for the user.

    Raises DataError: a source has changed, and `allow_changed` is False.
    """
    changed = changed_data(run, summary)
    if changed and (run / DATA_FILE).exists() and not allow_changed:
        raise DataError(
            f"{changed[0]}; expected the same text, since former validation text may be in the training text now. "
            "Restore it, start a new run with --out, or go on with --allow-changed-data."
        )
    return changed


def vocabulary_error(error: TokenizerError) -> DataError:
    """Return the error of a run to resume whose data the run's tokenizer cannot encode: the data has changed."""
    problem, _, _ = str(error).partition("; expected ")
    return DataError(
        f"the data has changed since the run was started: {problem}; expected the same text. Restore it, or start "
        "a new run with --out."
    )


def _tokens(row: SourceSummary) -> int:
    return row.train_tokens + row.validation_tokens
