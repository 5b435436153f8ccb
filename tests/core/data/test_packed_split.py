import json

import numpy as np
import pytest

from moezoo.core.config.data import DataConfig
from moezoo.core.config.validate import validate
from moezoo.core.data.packed_split import DocumentSource, PackedSplit
from moezoo.core.data.prepare import prepare_data, whole_file
from moezoo.core.data.tokenizers import ByteTokenizer
from moezoo.core.errors import DataError, SpecError
from moezoo.core.tokens import IGNORED, PADDING

T = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts():
    lengths = np.random.default_rng(0).integers(2, 40, 60)
    return ["".join(chr(97 + (number + place) % 26) for place in range(n)) for number, n in enumerate(lengths)]


def prepared(path, **more):
    data = {
        "sources": [{"kind": "jsonl", "path": str(path)}],
        "tokenizer": {"kind": "byte"},
        "documents": "separate",
        **more,
    }
    return prepare_data(DataConfig.model_validate(data), T)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def pieces_of(batch):
    """Inputs and targets of each document of each sequence."""
    for windows, targets, documents in zip(*batch, strict=True):
        for document in range(documents.max() + 1):
            own = documents == document
            yield bytes(windows[:-1][own].astype(np.uint8)).decode(), bytes(targets[own].astype(np.uint8)).decode()
        assert np.all(targets[documents == PADDING] == IGNORED)


def test_an_epoch_has_every_document_once_and_long_ones_in_pieces(tmp_path, texts):
    data = prepared(write(tmp_path / "a.jsonl", texts))
    assert isinstance(data.train, PackedSplit)
    held = len(data.validation.sources[0].start)
    assert data.summary[0].train_tokens == sum(map(len, texts[:-held]))
    assert f"in {len(texts) - held} and {held} documents, packed with" in data.summary[0].describe(1000)
    expected = [
        (text[first : first + T][: len(text) - first - 1], text[first + 1 : first + T + 1])
        for text in texts[:-held]
        for first in range(0, len(text) - 1, T)
    ]
    found, step = [], 0
    while len(found) < len(expected):
        found += pieces_of(data.train.batch(step, 1, T, 3))
        step += 1
    assert sorted(found) == sorted(expected)


def test_documents_are_cut_once_for_all_batches(tmp_path, texts, monkeypatch):
    split, cut, calls = prepared(write(tmp_path / "a.jsonl", texts)).train, DocumentSource.pieces, []
    monkeypatch.setattr(DocumentSource, "pieces", lambda *given: calls.append(given) or cut(*given))
    for step in range(5):
        split.batch(step, 4, T, 3)
    assert len(calls) == len(split.sources)


def test_arguments_out_of_range_are_refused(tmp_path, texts):
    with pytest.raises(DataError, match="step is out of range; got -1"):
        prepared(write(tmp_path / "a.jsonl", texts)).train.batch(-1, 4, T, 3)


def test_a_batch_is_a_function_of_step_and_seed_and_a_process_reads_its_own_rows(tmp_path, texts):
    path = write(tmp_path / "a.jsonl", texts)
    whole, again = prepared(path).train.batch(9, 4, T, 3), prepared(path).train.batch(9, 4, T, 3)
    own = prepared(path).train.batch(9, 4, T, 3, np.array([1, 3]))
    for part, same, rows in zip(whole, again, own, strict=True):
        np.testing.assert_array_equal(part, same)
        np.testing.assert_array_equal(part[[1, 3]], rows)


def test_positions_are_those_of_the_documents_one_after_the_other(tmp_path, texts):
    split, whole = prepared(write(tmp_path / "a.jsonl", texts)).train, np.frombuffer("".join(texts).encode(), np.uint8)
    for batch, (source, place) in (
        (split.batch(9, 4, T, 3), split.positions(9, 4, T, 3)),
        (split.windows(T).batch(0, 5), split.windows(T).positions(0, 5)),
    ):
        real = batch.documents != PADDING
        assert not source.any()
        np.testing.assert_array_equal(place >= 0, real)
        np.testing.assert_array_equal(whole[place[real]], batch.windows[:, :-1][real])


def test_validation_and_whole_files_are_packed_in_order(tmp_path, texts):
    path = write(tmp_path / "a.jsonl", texts)
    split = whole_file(str(path), ByteTokenizer(), 256, documents="separate")
    sequences = split.windows(T)
    batch = sequences.batch(0, len(sequences))
    assert np.sum(batch.targets != IGNORED) == sum(len(text) - 1 for text in texts)
    assert len(split.windows(T, 5)) == 5
    assert split.num_windows(T) == len(sequences)
    own = prepared(path, validation=[{"kind": "jsonl", "path": str(path)}])
    assert own.train.num_tokens == own.validation.num_tokens == sum(map(len, texts))


def test_what_has_no_borders_or_no_second_document_is_one_line(tmp_path, texts):
    for kind in ("tokens", "batches"):
        raw = {"sources": [{"kind": kind, "path": "a.npy"}], "documents": "separate"}
        with pytest.raises(SpecError, match=rf"documents is separate, but sources\[0\] is of kind {kind}") as error:
            validate(DataConfig, raw, "config")
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="has one document"):
        prepared(write(tmp_path / "one.jsonl", texts[:1]))
    with pytest.raises(DataError, match="no document of two tokens"):
        prepared(write(tmp_path / "short.jsonl", ["a", "b"]))
