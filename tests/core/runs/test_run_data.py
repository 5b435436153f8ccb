"""Data that changed since a run was started: refused on resuming, or allowed and recorded."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from moezoo.core.config.data import DataConfig
from moezoo.core.config.run_config import Config, load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.data.prepare import PreparedData, prepare_data
from moezoo.core.errors import DataError, RunError, TokenizerError
from moezoo.core.runs.run_data import changed_data, check_data, vocabulary_error
from moezoo.core.runs.run_folder import prepare_run
from moezoo.core.runs.run_writer import RunWriter
from tests.support.small_run import write_config

T = 5


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))


def data_of(*sources: dict[str, object]) -> PreparedData:
    tokenizer = {"kind": "ids", "vocab_size": 99} if sources[0]["kind"] != "text" else {"kind": "byte"}
    return prepare_data(DataConfig.model_validate({"sources": sources, "tokenizer": tokenizer}), T)


def begin(path: Path, config: Config, data: PreparedData, *, resume: bool) -> None:
    writer = RunWriter(prepare_run(path, config, resume=resume))
    writer.begin(config, data, None)
    writer.close()


def test_changed_text_is_refused_or_allowed_and_recorded(tmp_path: Path) -> None:
    config = with_vocab_size(load_config(write_config(tmp_path)), 256)
    run, text = tmp_path / "run", tmp_path / "grows.txt"
    text.write_text("a b c " * 100)
    source = {"kind": "text", "path": str(text)}
    data = data_of(source)
    begin(run, config, data, resume=False)
    assert check_data(run, data.summary, allow_changed=False) == []
    text.write_text("a b c " * 200)
    data = data_of(source)
    change = (
        rf"data\.sources\[0\] \({re.escape(str(text))}\) has changed since the run was started: it has 1,200 tokens; "
    )
    with pytest.raises(DataError, match=change + "it had 600; expected .* --allow-changed-data"):
        check_data(run, data.summary, allow_changed=False)
    [line] = check_data(run, data.summary, allow_changed=True)
    assert re.match(change, line)
    begin(run, config, data, resume=True)
    assert check_data(run, data.summary, allow_changed=False) == []
    text.write_text("a b d " * 200)
    with pytest.raises(DataError, match="it has 1,200 tokens as before, but other ones"):
        check_data(run, data_of(source).summary, allow_changed=False)


def test_text_that_was_moved_or_written_again_has_not_changed(tmp_path: Path) -> None:
    summaries = []
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a b c " * 100)
        summaries.append(data_of({"kind": "text", "path": str(tmp_path / name)}).summary[0].digest)
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize(("kind", "suffix"), [("tokens", ".npy"), ("batches", ".npy"), ("batches", ".npz")])
def test_changed_token_ids_are_noticed(tmp_path: Path, kind: str, suffix: str) -> None:
    ids = np.arange(6000).reshape(-1, 2, T) % 99
    path = tmp_path / f"a{suffix}"

    def digest(array: np.ndarray) -> str:
        array = array if kind == "batches" else array.ravel()
        np.savez(path, array) if suffix == ".npz" else np.save(path, array)
        return data_of({"kind": kind, "path": str(path)}).summary[0].digest

    other = ids.copy()
    other[-1, -1, -1] += 1
    assert digest(ids) == digest(ids) != digest(other)
    assert digest(ids[:-1]) != digest(ids)


def test_run_without_a_record_says_so_and_a_damaged_record_raises(tmp_path: Path) -> None:
    config = with_vocab_size(load_config(write_config(tmp_path)), 256)
    run = tmp_path / "run"
    data = data_of({"kind": "text", "path": str(tmp_path / "text.txt")})
    begin(run, config, data, resume=False)
    record = run / "data.json"
    record.write_text(json.dumps({"sources": []}))
    with pytest.raises(RunError, match=r"data\.json has \d+ bytes; expected \d+ according to the manifest"):
        changed_data(run, data.summary)
    record.unlink()
    (run / "manifest.json").unlink()  # as in runs of earlier versions
    [line] = check_data(run, data.summary, allow_changed=False)
    assert line.startswith("the run has no record of its data")


def test_new_character_of_changed_text_is_called_a_change(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    tokenizer = prepare_data(config.data, T).tokenizer
    (tmp_path / "text.txt").write_text("X owls")
    with pytest.raises(TokenizerError) as problem:
        prepare_data(config.data, T, tokenizer=tokenizer)
    assert str(vocabulary_error(problem.value)).startswith(
        "the data has changed since the run was started: data.sources[0]"
    )
    assert "byte" not in str(vocabulary_error(problem.value))
