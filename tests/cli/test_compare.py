"""`moezoo compare`: pairs of backends and precisions, the tokens of both models, JSON, and one-line errors."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import moezoo
from moezoo.cli.main import main
from moezoo.core.config.run_config import load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.data.prepare import prepare_data
from moezoo.core.data.tokenizers import ByteTokenizer, CharacterTokenizer
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.runs.save import save_run
from tests.support.backends_available import require_backend
from tests.support.small_run import write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `one` and `two`, and two with other tokenizers."""
    require_backend("mlx")
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEZOO_CACHE", str(folder / "cache"))
        config = load_config(write_config(folder))
        tokenizer = prepare_data(config.data, config.training.sequence_length).tokenizer
    assert isinstance(tokenizer, CharacterTokenizer)
    shifted = CharacterTokenizer("!" + tokenizer.characters.replace("7", ""))
    runs = (("one", tokenizer, 0), ("two", tokenizer, 1), ("bytes", ByteTokenizer(), 0), ("shifted", shifted, 0))
    for name, own, seed in runs:
        sized = with_vocab_size(config, own.vocab_size)
        save_run(folder / name, sized, own, initial_weights(sized.model, seed), 0, None)
    (folder / "own.txt").write_text("8 owls saw 64 mice. " * 9)
    return folder


@pytest.fixture(autouse=True)
def _cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEZOO_CACHE", str(folder / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


def call(*words: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, words)])


def test_two_runs_on_the_data_of_the_first(folder: Path) -> None:
    result = call(folder / "one", folder / "two", "--backend", "mlx", "--windows", 4)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "96 tokens, 4 windows" in result.stdout
    assert "arithmetic: both models with A's experts" in result.stdout
    assert max(map(len, lines)) <= 80


def test_json_of_two_precisions_of_one_model(folder: Path) -> None:
    words = ("--data", folder / "own.txt", "--backend", "mlx", "--compute", "float32,bfloat16", "--json")
    values = json.loads(call(folder / "one", *words).stdout)
    assert values["a"].endswith("(mlx, float32)")
    assert values["b"].endswith("(mlx, bfloat16)")
    assert values["verdict"]["kind"] == "rounding"
    assert values["tokens"] == 179
    assert values["weights"]["differing"] == []


def test_the_function_returns_what_the_command_prints(folder: Path) -> None:
    one, two = (moezoo.load(folder / name, "mlx") for name in ("one", "two"))
    found = moezoo.compare(one, two, folder / "own.txt", max_windows=2)
    words = ("--data", folder / "own.txt", "--windows", 2, "--backend", "mlx", "--json")
    assert found.to_json() == json.loads(call(folder / "one", folder / "two", *words).stdout)
    assert found.verdict.kind in ("routing", "arithmetic", "both")


def test_one_model_has_nothing_to_be_compared_with(folder: Path) -> None:
    result = call(folder / "one", "--backend", "mlx")
    assert result.exit_code == 1
    assert result.stderr.startswith("SpecError: there is nothing to compare A with")
    result = call(folder / "one", "--backend", "mlx,jax,mlx")
    assert "--backend is 'mlx,jax,mlx'; expected one value, or two with a comma" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_models_that_see_other_tokens_are_refused_in_a_line(folder: Path) -> None:
    words = ("--data", folder / "own.txt", "--backend", "mlx")
    for other, error in (
        ("bytes", "SpecError: the models have different vocabularies"),
        ("shifted", f"TokenizerError: the tokenizers of the models encode {folder / 'own.txt'} differently; got"),
    ):
        result = call(folder / "one", folder / other, *words)
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith(error), result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_trace_without_data_is_compared_on_its_own_tokens(folder: Path) -> None:
    one, file = moezoo.load(folder / "one", "mlx"), folder / "own.safetensors"
    for generate in (0, 3):
        one.trace({"first": folder / "own.txt", "second": folder / "own.txt"}, out=file, generate=generate)
        result = call(folder / "one", file, "--backend", "mlx")
        assert result.exit_code == 0, result.output
        assert f"equal: the same experts for all {2 * 179} tokens" in result.stdout
    assert "same top-1" in result.stdout


def test_a_trace_cannot_be_the_model(folder: Path) -> None:
    file = folder / "any.safetensors"
    file.touch()
    result = call(file, file)
    assert result.stderr.startswith(f"SpecError: A is {file}, a file; expected a model")
    assert "moezoo analyze" in result.stderr
