"""Runs that start from a Hugging Face checkpoint or from another run (`init_from`)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from ml_dtypes import bfloat16

import moezoo
from moezoo.api import evaluate_file
from moezoo.cli.main import main
from moezoo.core.checkpoint.safetensors_file import StoredTensors, write_tensors
from moezoo.core.config.run_config import Config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.errors import CheckpointError, SpecError
from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.huggingface.folder import TensorFolder
from moezoo.core.runs.init_from import initial_tokenizer, load_resolved_config, open_initial_weights
from moezoo.core.runs.run_folder import load_run
from moezoo.core.training.evaluation import evaluate
from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.backends_available import require_backend
from tests.support.fixtures import write_checkpoint
from tests.support.small_run import MODEL, write_config


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))


def config_file(folder: Path, init_from: object, **sections: object) -> Path:
    """Write a config without a model that trains on random ids."""
    ids = np.random.default_rng(0).integers(0, 30, (6, 2, 8))
    np.save(folder / "batches.npy", ids)
    raw = {
        "init_from": init_from if isinstance(init_from, dict) else str(init_from),
        "data": {"sources": [{"kind": "batches", "path": str(folder / "batches.npy")}]},
        "training": {"steps": 4, "batch_size": 2, "sequence_length": 8, "log_every": 1, "checkpoint_every": 2},
        "optimizer": {"learning_rate": 1e-3, "schedule": {"kind": "constant"}},
        **sections,
    }
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def train(config: Path, out: Path, *more: str) -> Result:
    require_backend("mlx")
    return CliRunner().invoke(main, ["train", str(config), "--backend", "mlx", "--out", str(out), *more])


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def rates(config: Config) -> list[float]:
    routers = [layer.moe.router for layer in config.model.all_layers if layer.moe is not None]
    return [router.selection_bias.rate for router in routers if router.selection_bias is not None]


def test_missing_model_is_the_checkpoints_with_overrides_applied(tmp_path):
    source = write_checkpoint("mixtral", tmp_path / "source")
    path = config_file(tmp_path, source)
    config = load_resolved_config(path)
    assert config.model == open_checkpoint(source).spec
    assert [loss.kind for loss in config.model.all_layers[0].moe.losses] == ["pooled_balance"]
    assert config.data.tokenizer.kind == "ids"
    assert config.data.tokenizer.vocab_size == config.model.vocab_size
    changed = load_resolved_config(path, ["model.layers[0].moe.losses=[{kind: router_z, coefficient: 0.5}]"])
    assert [loss.kind for loss in changed.model.all_layers[0].moe.losses] == ["router_z"]
    assert changed.init_from == config.init_from


def test_override_can_set_the_checkpoint(tmp_path):
    source = write_checkpoint("deepseek_v3", tmp_path / "source")
    path = config_file(tmp_path, tmp_path / "nowhere")
    config = load_resolved_config(path, [f"init_from={source}", "init_from.selection_bias_rate=0.25"])
    assert config.init_from.path == str(source)
    assert set(rates(config)) == {0.25}
    nested = load_resolved_config(path, [f"init_from={{path: {source}, selection_bias_rate: 0}}"])
    assert set(rates(nested)) == {0.0}
    assert set(rates(load_resolved_config(path, [f"init_from={source}"]))) == {0.001}


def test_override_to_null_takes_the_checkpoints_own(tmp_path):
    source = write_checkpoint("mixtral", tmp_path / "source")
    path = config_file(
        tmp_path, source, data={"sources": [{"kind": "text", "path": "x"}], "tokenizer": {"kind": "byte"}}
    )
    assert load_resolved_config(path).data.tokenizer.kind == "byte"
    assert load_resolved_config(path, ["data.tokenizer=null"]).data.tokenizer.kind == "ids"
    assert load_resolved_config(path, ["data.tokenizer = "]).data.tokenizer.kind == "ids"


def test_rate_without_a_selection_bias_is_refused(tmp_path):
    source = write_checkpoint("mixtral", tmp_path / "source")
    path = config_file(tmp_path, {"path": str(source), "selection_bias_rate": 0.1})
    with pytest.raises(SpecError, match=r"selection_bias_rate is 0\.1, but no router of .* has a selection bias"):
        load_resolved_config(path)


def test_unknown_key_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"pth is not a known key; did you mean path\? \(init_from of "):
        load_resolved_config(config_file(tmp_path, {"pth": "x"}))


def test_model_that_differs_from_the_checkpoint_is_refused(tmp_path):
    source = write_checkpoint("mixtral", tmp_path / "source")
    config = with_vocab_size(load_resolved_config(config_file(tmp_path, source, model=MODEL)), 256)
    with pytest.raises(CheckpointError, match=r"differs from the model of init_from .* Remove the section") as error:
        open_initial_weights(config)
    assert "  ~ embedding.weight [" in str(error.value)
    result = train(config_file(tmp_path, source, model=MODEL | {"vocab_size": 64}), tmp_path / "run")
    assert result.exit_code == 1
    assert "Remove the section `model`" in result.output
    assert not (tmp_path / "run").exists()


def test_equal_model_may_be_in_the_config(tmp_path):
    source = write_checkpoint("mixtral", tmp_path / "source")
    model = open_checkpoint(source).spec.model_dump(mode="json")
    config = load_resolved_config(config_file(tmp_path, source, model=model), ["model.dropout=0.5"])
    assert config.model.dropout == 0.5
    assert sorted(open_initial_weights(config).weights) == sorted(open_checkpoint(source).weights)


def test_weights_of_a_bfloat16_file_become_float32(tmp_path):
    source = write_checkpoint("mixtral", tmp_path / "source")
    tensors = {name: value.astype(bfloat16) for name, value in StoredTensors(source / "model.safetensors").items()}
    write_tensors(source / "model.safetensors", tensors, {})
    stored = open_checkpoint(source).weights
    start = open_initial_weights(load_resolved_config(config_file(tmp_path, source)))
    for name, value in start.weights.items():
        assert stored[name].dtype == bfloat16
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, stored[name].astype(np.float32))


def test_vocabulary_may_be_larger_than_the_tokenizer(tmp_path):
    config = load_resolved_config(config_file(tmp_path, write_checkpoint("mixtral", tmp_path / "source")))
    size = config.model.vocab_size
    assert with_vocab_size(config, size - 3).model.vocab_size == size
    with pytest.raises(SpecError, match=r"model\.vocab_size is"):
        with_vocab_size(config, size + 1)


def test_run_starts_from_another_run_with_its_tokenizer(tmp_path):
    first = train(write_config(tmp_path, steps=2), tmp_path / "first")
    assert first.exit_code == 0, first.output
    old, tokenizer, checkpoint, _ = load_run(tmp_path / "first")
    text = tmp_path / "other.txt"
    text.write_text("owls saw mice. " * 60, encoding="utf-8")  # fewer characters than in the run's tokenizer
    path = config_file(tmp_path, tmp_path / "first", data={"sources": [{"kind": "text", "path": str(text)}]})
    config = load_resolved_config(path)
    assert config.model == old.model
    assert initial_tokenizer(config).vocab_size == tokenizer.vocab_size
    start = open_initial_weights(config)
    assert start.layout is None
    for name, value in checkpoint.weights.items():
        np.testing.assert_array_equal(start.weights[name], value)
    second = train(path, tmp_path / "second")
    assert second.exit_code == 0, second.output
    assert load_run(tmp_path / "second")[1].encode("owls").tolist() == tokenizer.encode("owls").tolist()


def test_run_resumes_without_the_checkpoint_it_started_from(tmp_path):
    source = write_checkpoint("deepseek_v3", tmp_path / "source")
    path = config_file(tmp_path, {"path": str(source), "selection_bias_rate": 0.0})
    whole = train(path, tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    shutil.rmtree(part / "checkpoints" / "step_00000004")
    shutil.rmtree(source)
    again = train(path, part, "--resume")
    assert again.exit_code == 0, again.output
    assert losses(part) == losses(tmp_path / "whole")
    model = moezoo.load(part, backend="mlx")
    model.save(tmp_path / "export", format="huggingface")
    assert sorted(open_checkpoint(tmp_path / "export").weights) == sorted(model.model.export_parameters())


def test_run_of_a_run_of_a_checkpoint_can_be_exported(tmp_path):
    source = write_checkpoint("mixtral", tmp_path / "source")
    first = train(config_file(tmp_path, source), tmp_path / "first")
    assert first.exit_code == 0, first.output
    second = train(config_file(tmp_path, tmp_path / "first"), tmp_path / "second")
    assert second.exit_code == 0, second.output
    moezoo.load(tmp_path / "second", backend="mlx").save(tmp_path / "export", format="huggingface")
    assert TensorFolder(tmp_path / "export").tensors == TensorFolder(source).tensors


def test_fine_tuned_run_learns_what_follows_the_first_token(tmp_path):
    source = write_tokenizer(write_checkpoint("mixtral", tmp_path / "source"))
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"the {name} sat on the mat"}) for name in ("cat", "owl") * 40))
    data = {"sources": [{"kind": "jsonl", "path": str(text)}]}
    training = {"steps": 50, "batch_size": 4, "sequence_length": 12}
    optimizer = {"learning_rate": 5e-3, "schedule": {"kind": "constant"}}
    result = train(config_file(tmp_path, source, data=data, training=training, optimizer=optimizer), tmp_path / "run")
    assert result.exit_code == 0, result.output
    model = moezoo.load(tmp_path / "run", backend="mlx")
    prompt = model.encode_prompt("the cat")
    after_first = model.forward(prompt[None]).logits[0, 0].astype(np.float64)
    nats = np.log(np.exp(after_first - after_first.max()).sum()) + after_first.max() - after_first[prompt[1]]
    assert nats < 0.1  # 5.4 before training, and 1.0 after it without `<s>` in the data
    # Its windows begin anywhere, as in training. With `<s>` before each of them it would be 1.1.
    assert evaluate_file(model, str(text), evaluate).validation_loss < 0.3


def test_training_a_quantized_checkpoint_is_refused_and_its_floats_train(tmp_path):
    folder = Path(__file__).parents[2] / "data" / "mlx_folders" / "qwen3_moe_4bit_router8"
    result = train(config_file(tmp_path, folder), tmp_path / "run")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "is quantized (4-bit affine, groups of 64), and training all parameters" in result.stderr
    assert f"moezoo convert {folder} OUT --dequantize" in result.stderr
    assert not (tmp_path / "run").exists()
    converted = CliRunner().invoke(main, ["convert", str(folder), str(tmp_path / "floats"), "--dequantize"])
    assert converted.exit_code == 0, converted.output
    assert train(config_file(tmp_path, tmp_path / "floats"), tmp_path / "run").exit_code == 0
