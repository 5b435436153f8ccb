"""Prebatched data: order of the batches, validation split and errors."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from moezoo.core.config.data import DataConfig
from moezoo.core.config.run_config import load_config
from moezoo.core.config.validate import validate
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.data.prepare import PreparedData, prepare_data
from moezoo.core.errors import DataError, SpecError
from moezoo.core.runs.run_folder import load_run, prepare_run
from moezoo.core.tokens import IGNORED
from moezoo.core.training.loop import train
from moezoo.core.training.metrics import read_metrics
from tests.support.small_run import MODEL
from tests.support.tolerances import FLOAT32, assert_close
from tests.support.twins import Twin

S, B, T, V = 5, 3, 6, 31
IDS = np.random.default_rng(0).integers(0, V, (S, B, T))


def saved(path: Path, array: np.ndarray = IDS, **more: np.ndarray) -> Path:
    if path.suffix == ".npz":
        np.savez(path, batches=array, **more)
    else:
        np.save(path, array)
    return path


def data_config(path: Path, **more: object) -> DataConfig:
    source = {"kind": "batches", "path": str(path), **more}
    return validate(DataConfig, {"sources": [source], "tokenizer": {"kind": "ids", "vocab_size": V}}, "x.yaml")


def prepared(path: Path, **more: object) -> PreparedData:
    return prepare_data(data_config(path, **more), T, where="x.yaml")


def test_batches_are_in_file_order_and_the_last_token_has_no_target(tmp_path):
    for name, dtype in (("a.npy", np.int64), ("b.npz", np.uint16)):
        train = prepared(saved(tmp_path / name, IDS.astype(dtype))).train
        for step in range(S):
            batch = train.batch(step, B, T, seed=7)
            assert batch.dtype == np.int32
            np.testing.assert_array_equal(batch[:, :-1], IDS[step])
            np.testing.assert_array_equal(batch[:, -1], IGNORED)
        assert train.num_tokens == S * B * T


def test_key_selects_the_array_of_an_npz_file(tmp_path):
    path = saved(tmp_path / "a.npz", other=np.zeros(3))
    np.testing.assert_array_equal(prepared(path, key="batches").train.batch(2, B, T, 0)[:, :-1], IDS[2])
    with pytest.raises(DataError, match=r"has the arrays batches, other; got key None\. Set key to one of them"):
        prepared(path)


def test_validation_split_is_held_out_or_the_first_batch(tmp_path):
    path = saved(tmp_path / "a.npy")
    data = prepared(path)
    np.testing.assert_array_equal(data.validation.windows(T)[:, :-1], IDS[0])
    data = prepared(path, validation_batches=2)
    np.testing.assert_array_equal(np.asarray(data.validation.windows(T))[:, :-1], IDS[3:].reshape(-1, T))
    np.testing.assert_array_equal(data.validation.windows(T, 2)[:, :-1], IDS[3:].reshape(-1, T)[[0, 3]])
    np.testing.assert_array_equal(data.train.batch(1, B, T, 0, np.array([2]))[:, :-1], IDS[1, [2]])
    with pytest.raises(DataError, match=r"there is no such batch; got step 3"):
        data.train.batch(3, B, T, 0)
    assert (data.summary[0].train_tokens, data.summary[0].validation_tokens) == (3 * B * T, 2 * B * T)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (IDS[0], r"has no batches; got int64 \[3, 6\]; expected integers \[steps, batch, length\]"),
        (IDS.astype(np.float32), "its elements are '<f4', not integers"),
        (IDS[:, :, :1], "has rows of one token"),
        (IDS + V, "token id outside the vocabulary; got 61; expected 0 to 30"),
        (IDS - 1, "token id outside the vocabulary; got -1"),
    ],
)
def test_invalid_array_raises(tmp_path, array, message):
    with pytest.raises(DataError, match=message):
        prepared(saved(tmp_path / "a.npy", array))


def test_damaged_or_missing_file_raises(tmp_path):
    for name in ("a.npy", "a.npz"):
        path = saved(tmp_path / name)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(DataError, match=r"is damaged or not a \.npy or \.npz file"):
            prepared(path)
    with pytest.raises(DataError, match="no such file"):
        prepared(tmp_path / "nowhere.npy")
    with pytest.raises(DataError, match="has only one array; got key 'x'"):
        prepared(saved(tmp_path / "b.npy"), key="x")
    with pytest.raises(DataError, match="got validation_batches 5, which leaves none"):
        prepared(tmp_path / "b.npy", validation_batches=5)


def test_file_that_is_truncated_while_it_is_in_use_raises(tmp_path):
    path = saved(tmp_path / "a.npy", np.zeros((500, B, T), np.int64))
    data = prepared(path, validation_batches=2)
    path.write_bytes(path.read_bytes()[:4000])
    for read in (lambda: data.train.batch(400, B, T, 0), lambda: data.validation.windows(T)):
        with pytest.raises(DataError, match=r"token ids were changed while they were in use; got 4000 bytes.*a\.npy"):
            read()


def test_prebatched_source_cannot_be_mixed():
    source = {"kind": "batches", "path": "a.npy"}
    with pytest.raises(SpecError, match="sources mixes a source of kind batches with 1 more"):
        validate(DataConfig, {"sources": [source, {"kind": "dataset", "name": "fables"}]}, "x.yaml")


def write_config(tmp_path: Path, **training: object) -> Path:
    settings = {
        "model": MODEL,
        "data": data_config(saved(tmp_path / "batches.npy")).model_dump(mode="json"),
        "training": {"steps": S, "batch_size": B, "sequence_length": T, "log_every": 1, **training},
        "optimizer": {"learning_rate": 1e-3, "schedule": {"kind": "constant"}},
    }
    path = tmp_path / "batches.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"batch_size": 4}, r"training.batch_size is 4, but the batches of .* are \[3, 6\]. Use 3."),
        ({"sequence_length": 5}, r"training.sequence_length is 5, but the batches of .* are \[3, 6\]. Use 6."),
        ({"steps": 6}, "training.steps is 6, but .* has 5 training batches"),
    ],
)
def test_run_with_mismatched_batches_raises_before_it_starts(tmp_path, training, message):
    config = load_config(write_config(tmp_path, **training))
    data = prepare_data(config.data, config.training.sequence_length)
    config = with_vocab_size(config, V)
    with pytest.raises(DataError, match=message):
        train(config, data, Twin("mlx").backend(), prepare_run(tmp_path / "run", config, resume=False))


def test_run_trains_on_the_batches_in_order(twin, tmp_path):
    config = load_config(write_config(tmp_path))
    data = prepare_data(config.data, config.training.sequence_length)
    config = with_vocab_size(config, V)
    run = prepare_run(tmp_path / "run", config, resume=False)
    result = train(config, data, twin.backend(), run)
    assert result.evaluation is not None
    assert result.evaluation.windows == B
    weights = load_run(run.path)[2].weights
    model = twin.backend().build(config.model, weights)
    targets = data.train.batch(0, B, T, 0)[:, 1:]
    expected = model.forward(IDS[0].astype(np.int32), targets).losses["cross_entropy"]
    assert_close(result.evaluation.validation_loss, expected, FLOAT32)
    assert [line["tokens"] for line in read_metrics(run.metrics_path) if "loss" in line] == [
        B * T * step for step in range(1, S + 1)
    ]
