"""describe, eval and parity work on a Hugging Face folder like on a run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import moezoo
from moezoo.api import LoadedModel
from moezoo.backends import load_backend
from moezoo.cli.main import main
from moezoo.core.errors import CheckpointError
from moezoo.core.parity.check import parity_of
from moezoo.core.reports.checkpoint_page import checkpoint_description
from tests.huggingface.tiny_tokenizer import SENTENCES, write_tokenizer
from tests.support.backends_available import require_backend
from tests.support.fixtures import drawn_tensors, read_fixture, write_checkpoint, write_safetensors
from tests.support.tolerances import FLOAT32, assert_close

CASE = "mixtral"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_checkpoint(CASE, tmp_path_factory.mktemp("commands") / "model", shards=2))


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    require_backend("mlx")
    return moezoo.load(folder, backend="mlx")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES * 4))
    return tmp_path / "text.txt"


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def values_of(*words: object) -> dict:
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(result: Result, kind: str, *pieces: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith(f"{kind}: ")
    assert len(result.stderr.splitlines()) == 1
    for piece in pieces:
        assert piece in result.stderr


# --- describe --------------------------------------------------------------------------------------------------------


def test_description_lists_parsed_fields_and_the_tensor_mapping(folder: Path) -> None:
    known = values_of("describe", folder)
    spec = moezoo.load(folder, backend="mlx").model.spec
    assert known["family"] == "mixtral"
    assert known["num_layers"] == len(spec.all_layers)
    assert known["parameters"]["total"] == sum(row.size for row in moezoo.parameter_table(spec))
    assert {"hidden_size", "rope_parameters", "num_local_experts"} <= set(known["config"]["understood"])
    assert "initializer_range" in known["config"]["no_effect"]
    written = json.loads((folder / "config.json").read_text())
    there = {name for name, value in written.items() if value is not None}
    assert set(known["config"]["understood"]) | set(known["config"]["no_effect"]) == there
    assert known["files"]["files"] == 2
    assert known["files"]["dtypes"]["F32"]["bytes"] == 4 * known["parameters"]["total"] == known["files"]["bytes"]
    assert known["ledger"] == {"counts": {"mapped": known["files"]["tensors"]}, "kept": []}
    assert known["tokenizer"] is True
    assert known["generation"]["temperature"] == 0


def test_page_shows_the_description_as_text(folder: Path) -> None:
    result = call("describe", folder)
    assert result.exit_code == 0, result.output
    page = " ".join(result.stdout.split())
    for piece in ("(mixtral)", "2 of 7 experts", "mapped to parameters", "parsed from config.json:", "greedy"):
        assert piece in page


def test_config_json_alone_is_enough_to_describe(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "num_beams": 2, "eos_token_id": [5, 6]})
    )
    known = values_of("describe", tmp_path)
    assert known["files"] is known["ledger"] is None
    assert known["parameters"] == values_of("describe", folder)["parameters"]
    page = " ".join(call("describe", tmp_path).stdout.split())
    assert "described from config.json alone" in page
    assert "temperature 0.6, ends at token 5, 6, num_beams 2 is not supported" in page


def test_kept_tensors_are_listed_and_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    folder = write_checkpoint(CASE, tmp_path / "model")
    tensors = drawn_tensors(read_fixture(CASE).description)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = ("F32", np.ones(4, np.float32))
    write_safetensors(folder / "model.safetensors", tensors)
    assert checkpoint_description(folder).to_json()["ledger"]["kept"] == [
        {"name": "model.layers.*.self_attn.rotary_emb.inv_freq", "count": 2, "dtype": "F32", "shape": [4]}
    ]
    assert "kept verbatim: 2 x model.layers.*.self_attn.rotary_emb.inv_freq" in call("describe", folder).stdout
    parts = write_checkpoint(CASE, tmp_path / "parts", shards=2)
    (parts / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors is missing"):
        checkpoint_description(parts)


def test_a_run_is_described_by_its_config_and_a_checkpoint_takes_no_overrides(folder: Path, tmp_path: Path) -> None:
    config = Path("configs/tiny/top_k.yaml")
    shutil.copy(config, tmp_path / "config.yaml")
    assert values_of("describe", tmp_path) == values_of("describe", config)
    for mesh in ((), ("--mesh", "data=2")):
        result = call("describe", folder, "--set", "training.steps=1", *mesh)
        refused(result, "SpecError", "--set overrides values of a YAML")
    refused(call("describe", tmp_path / "nothing"), "RunError", "nothing does not exist; expected a run folder")


# --- eval ------------------------------------------------------------------------------------------------------------


def test_eval_predicts_every_token_once_after_the_first_token(model: LoadedModel, folder: Path, text: Path):
    values = values_of("eval", folder, "--data", text, "--sequence-length", 8, "--backend", "mlx")
    ids = model.tokenizer.encode(text.read_text())
    starts = [min(start, len(ids) - 8) for start in range(0, len(ids), 8)]  # the last window ends with the text
    rows = np.stack([ids[start : start + 8] for start in starts])
    inputs = np.insert(rows[:, :-1], 0, 1, axis=1)
    logits = model.forward(inputs).logits.astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    nats = -np.take_along_axis(logs, rows[:, :, None].astype(np.int64), axis=-1)[:, :, 0]
    nats = np.append(nats[:-1], nats[-1, 8 * len(rows) - len(ids) :])  # without those that the window before has
    assert values["windows"] == values["all_windows"] == len(rows)
    assert_close(values["validation_loss"], nats.mean(), FLOAT32)
    assert_close(values["bits_per_byte"], nats.sum() / np.log(2) / model.tokenizer.byte_count(ids), FLOAT32)
    assert [row["layer"] for row in values["routing"]] == [0, 1]


def test_token_files_are_evaluated_without_a_tokenizer(tmp_path: Path) -> None:
    require_backend("mlx")
    folder = write_checkpoint(CASE, tmp_path / "model")
    expected = read_fixture(CASE).expected
    ids = expected["input_ids"][0].astype(np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    values = values_of("eval", folder, "--data", tmp_path / "ids.npy", "--backend", "mlx")
    assert (values["windows"], values["sequence_length"]) == (1, len(ids) - 1)  # the file is shorter than a window
    logits = expected["logits"][0, :-1].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected_loss = -np.take_along_axis(logs, ids[1:, None].astype(np.int64), axis=-1).mean()
    assert_close(values["validation_loss"], expected_loss, FLOAT32)
    assert values["bits_per_byte"] is None
    np.save(tmp_path / "beyond.npy", np.array([1, 64, 2]))
    refused(
        call("eval", folder, "--data", tmp_path / "beyond.npy", "--backend", "mlx"),
        "DataError",
        "token id outside the vocabulary; got 64",
    )
    refused(call("eval", folder), "DataError", "--data FILE")
    (tmp_path / "text.txt").write_text("the cat")
    refused(call("eval", folder, "--data", tmp_path / "text.txt", "--backend", "mlx"), "TokenizerError", "has ids only")


def test_eval_prints_loss_and_load(folder: Path, text: Path) -> None:
    require_backend("mlx")
    result = call("eval", folder, "--data", text, "--backend", "mlx")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{text}: validation loss ")
    assert "bits per byte" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["layer 0", "layer 1"]


# --- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backends", [["mlx"], pytest.param(["jax", "mlx"], marks=pytest.mark.release)])
def test_parity_holds_on_the_weights_of_a_checkpoint(folder: Path, backends: list[str]) -> None:
    for name in backends:
        require_backend(name)
    report = parity_of(folder, {name: load_backend(name) for name in backends})
    assert report.passed, report.failures
    assert any("weights of mixtral" in note for note in report.notes)


def test_parity_refuses_a_large_checkpoint_before_reading_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moezoo.core.huggingface.checkpoint import LazyWeights

    monkeypatch.setattr("moezoo.core.parity.reference_size.LIMIT_BYTES", 1000)
    monkeypatch.setattr(LazyWeights, "__getitem__", lambda *_: pytest.fail("read a weight"))
    refused(call("parity", folder), "SpecError", "the float64 reference of this model would need about")
