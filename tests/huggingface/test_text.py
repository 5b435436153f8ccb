"""Text generation from a Hugging Face folder: tokenizer, chat template, generation config."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import moezoo
from moezoo.api import LoadedModel
from moezoo.cli.main import main
from moezoo.core.errors import TokenizerError
from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.backends_available import require_backend
from tests.support.fixtures import read_fixture, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with vocabulary size 64 and a tokenizer of at most 48 tokens."""
    require_backend("mlx")
    return write_tokenizer(write_checkpoint("mixtral", tmp_path_factory.mktemp("text") / "model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return moezoo.load(folder, backend="mlx")


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words), "--backend", "mlx"])


def says(folder: Path, tmp_path: Path, **fields: object) -> Path:
    """Return a copy of the folder with another generation_config.json."""
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    (copy / "generation_config.json").write_text(json.dumps(fields))
    return copy


def test_prompts_get_a_bos_token_and_chat_only_the_template(model: LoadedModel) -> None:
    assert model.tokenizer.decode(model.encode_prompt("the cat")) == "<s> the cat"
    assert model.tokenizer.decode(model.encode_prompt("the cat", chat=True)).replace(" ", "") == (
        "<s><user>thecat<end><assistant>"
    )
    assert model.encode_prompt("the cat", chat=True).tolist().count(1) == 1
    assert model.tokenizer.vocab_size <= 48 < model.model.spec.vocab == 64


def test_generate_is_greedy_and_shows_the_text_of_its_ids(folder: Path, model: LoadedModel) -> None:
    ids = model.encode_prompt("the cat")
    new = model.generate(ids[None], max_new_tokens=12)[0]
    result = call("generate", folder, "--prompt", "the cat", "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    whole, prompt = (model.tokenizer.decode(part) for part in (np.concatenate([ids, new]), ids))
    assert result.stdout == "the cat" + whole.removeprefix(prompt).split("<end>")[0] + "\n"
    assert result.stdout == call("generate", folder, "--prompt", "the cat", "--max-new-tokens", 12, "--seed", 1).stdout


def test_chat_prints_only_the_answer(folder: Path, model: LoadedModel) -> None:
    result = call("generate", folder, "--chat", "--prompt", "the cat", "--max-new-tokens", 5)
    assert result.exit_code == 0, result.output
    ids = model.encode_prompt("the cat", chat=True)
    new = model.generate(ids[None], max_new_tokens=5, chat=True)[0]
    text = model.tokenizer.decode(np.concatenate([ids, new])).removeprefix(model.tokenizer.decode(ids))
    assert result.stdout == text.split("<end>")[0] + "\n"


def test_a_model_answers_messages_by_its_template(model: LoadedModel) -> None:
    ids = model.encode_prompt("the cat", chat=True)
    answer = model.chat([{"role": "user", "content": "the cat"}], max_new_tokens=5)
    assert answer == "".join(model.chat("the cat", max_new_tokens=5, stream=True))
    end, new = model.end_tokens(chat=True), model.generate(ids[None], max_new_tokens=5, chat=True)[0].tolist()
    said = new[: next((place for place, token in enumerate(new) if token in end), 5)]
    assert answer == model.tokenizer.decode([*ids, *said]).removeprefix(model.tokenizer.decode(ids))


def test_conversations_of_a_file_with_a_system_prompt(folder: Path, model: LoadedModel, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "ran"}]
    lines.write_text(json.dumps({"messages": [*messages, {"role": "user", "content": "the owl"}]}))
    words = ("generate", folder, "--prompts", lines, "--json", "--max-new-tokens", 5)
    (sample,) = map(json.loads, call(*words, "--system", "the mat").stdout.splitlines())
    assert sample["prompt"][:2] == messages
    ids = model.encode_chat([{"role": "system", "content": "the mat"}, *sample["prompt"]])
    assert "the mat<end><user>the cat<end><assistant>ran<end>" in model.tokenizer.decode(ids).replace("> ", ">")
    assert sample["tokens"] == model.generate(ids[None], max_new_tokens=5, chat=True)[0].tolist()


def test_a_chat_ends_at_the_tokenizers_end_of_turn_too(folder: Path, tmp_path: Path) -> None:
    """A model whose generation_config.json has another end token than its tokenizer_config.json."""
    ids = read_fixture("mixtral").expected["input_ids"][:1].astype(np.int32)
    greedy = read_fixture("mixtral").expected["greedy"][0].tolist()
    model = moezoo.load(says(folder, tmp_path, max_new_tokens=7, eos_token_id=[greedy[4], 0]), backend="mlx")
    model.tokenizer.end_of_text = greedy[2]
    assert model.end_tokens() == (greedy[4], 0)
    assert model.end_tokens(chat=True) == (greedy[4], 0, greedy[2])
    assert model.generate(ids)[0].tolist() == greedy[:5]
    assert model.generate(ids, chat=True)[0].tolist() == greedy[:3]
    model.tokenizer.end_of_text = 0
    assert model.end_tokens(chat=True) == (greedy[4], 0)


def test_generation_config_sets_defaults_and_options_override_them(folder: Path, tmp_path: Path) -> None:
    ids = read_fixture("mixtral").expected["input_ids"][:1].astype(np.int32)
    greedy = read_fixture("mixtral").expected["greedy"][0].tolist()
    told = says(folder, tmp_path, do_sample=True, temperature=5.0, max_new_tokens=7, eos_token_id=[greedy[2], 0])
    model = moezoo.load(told, backend="mlx")
    assert model.generation.end_tokens == (greedy[2], 0)
    sampled = [model.generate(ids, seed=seed)[0].tolist() for seed in range(3)]
    assert sampled[0] != sampled[1] or sampled[1] != sampled[2]
    assert all(len(row) <= 7 for row in sampled)
    assert model.generate(ids, temperature=0.0)[0].tolist() == greedy[:3]  # up to the first of the end tokens
    words = ["generate", told, "--tokens", ",".join(map(str, ids[0].tolist()))]
    shown = call(*words, "--temperature", 0).stdout.strip()
    assert [int(piece) for piece in shown.split(",")] == [*ids[0].tolist(), *greedy[:2]]


def test_unsupported_generation_options_stop_only_generation(folder: Path, tmp_path: Path) -> None:
    told = says(folder, tmp_path, num_beams=4, chat_format="chatml")
    assert moezoo.load(told, backend="mlx").forward(np.array([[1, 2]])).logits.shape == (1, 2, 64)
    result = call("generate", told, "--prompt", "the cat")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert "generation_config.json: chat_format is an unknown field and has no effect" in lines[0]
    assert lines[1].startswith("SpecError: ")
    assert "unsupported generation settings; got num_beams 4 in " in lines[1]
    assert len(lines) == 2


def test_a_converted_run_generates_like_the_folder(folder: Path, tmp_path: Path) -> None:
    told = says(folder, tmp_path, do_sample=True, temperature=0.7, eos_token_id=[3, 9])
    result = CliRunner().invoke(main, ["convert", str(told), str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    model, run = (moezoo.load(path, backend="mlx") for path in (told, tmp_path / "run"))
    assert (run.generation.temperature, run.generation.end_tokens) == (0.7, (3, 9))
    assert run.encode_prompt("the cat", chat=True).tolist() == model.encode_prompt("the cat", chat=True).tolist()
    ids = run.encode_prompt("the cat")
    assert ids.tolist() == model.encode_prompt("the cat").tolist()
    assert run.generate(ids[None], seed=4).tolist() == model.generate(ids[None], seed=4).tolist()


def test_a_folder_without_a_tokenizer_is_prompted_by_ids(tmp_path: Path) -> None:
    require_backend("mlx")
    folder = write_checkpoint("mixtral", tmp_path / "model")
    expected = read_fixture("mixtral").expected
    prompt, greedy = expected["input_ids"][0].tolist(), expected["greedy"][0].tolist()
    result = call("generate", folder, "--tokens", ",".join(map(str, prompt)), "--max-new-tokens", len(greedy))
    assert [int(piece) for piece in result.stdout.split(",")] == [*prompt, *greedy]
    refused = call("generate", folder, "--prompt", "the cat")
    assert refused.exit_code == 1
    assert "prompt is text, but this tokenizer has ids only" in refused.stderr
    assert "--tokens" in refused.stderr
    with pytest.raises(TokenizerError, match="no chat template"):
        moezoo.load(folder, backend="mlx").encode_prompt("the cat", chat=True)


def test_a_tokenizer_without_a_chat_template_is_an_error(tmp_path: Path) -> None:
    require_backend("mlx")
    folder = write_tokenizer(write_checkpoint("mixtral", tmp_path / "model"), template=None)
    result = call("generate", folder, "--prompt", "the cat", "--chat")
    assert result.exit_code == 1
    assert result.stderr.startswith("TokenizerError: the tokenizer has no chat template; got ")
