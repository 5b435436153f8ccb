"""An exported folder has the tokenizer, the chat templates and the end tokens that the run used."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Inner

from moezoo.core.config.run_config import load_config
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.load_tokenizer import load_tokenizer
from moezoo.core.data.tokenizers import ByteTokenizer, CharacterTokenizer, TokenIds, Tokenizer
from moezoo.core.errors import TokenizerError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.runs.open import open_model
from moezoo.core.runs.save import export, save_run
from moezoo.core.spec import ModelSpec
from tests.huggingface.test_export_as import MIXTRAL
from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.fixtures import write_checkpoint

TEXT = "A bcd, e\u0301é 犬\r\n\t🙂\u0000."


def run_of(base: Path, tokenizer: Tokenizer, folder: Path) -> Path:
    """Save a run that started from a checkpoint, with a tokenizer of its own."""
    opened = open_model(base)
    weights = {name: np.array(value) for name, value in opened.weights.items()}
    save_run(folder, opened.config, tokenizer, weights, 3, opened.layout)
    return folder


def exported(run: Path, out: Path) -> list[str]:
    opened = open_model(run)
    return export(opened.weights, opened.config, opened.tokenizer, opened.layout, out)


def fields(folder: Path, name: str) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((folder / name).read_text())
    return loaded


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model's folder with two end tokens and a second chat template."""
    folder = write_tokenizer(write_checkpoint("mixtral", tmp_path_factory.mktemp("export") / "base"))
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": [2, 9], "bos_token_id": 1, "temperature": 0.7, "do_sample": true}'
    )
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return folder


def test_a_run_with_its_own_tokenizer_exports_that_one(base: Path, tmp_path: Path) -> None:
    own = write_tokenizer(tmp_path / "own", vocab_size=40, template="own {{ messages[0].content }}")
    config = fields(own, "tokenizer_config.json") | {"eos_token": "<assistant>", "pad_token": "<user>"}
    (own / "tokenizer_config.json").write_text(json.dumps(config))
    run = run_of(base, HuggingFaceTokenizer(str(own)), tmp_path / "run")
    used = open_model(run)  # the base's end tokens are other words here; LoadedModel adds that of the tokenizer
    assert (used.generation.temperature, used.generation.end_tokens, used.tokenizer.end_of_text) == (0.7, (), 4)
    notes = exported(run, tmp_path / "out")
    assert "the run's own tokenizer and its end tokens were written in place of the original checkpoint's" in notes
    out = HuggingFaceTokenizer(str(tmp_path / "out"))
    assert out.content_hash == HuggingFaceTokenizer(str(own)).content_hash
    assert out.chat_template == "own {{ messages[0].content }}"
    assert not (tmp_path / "out" / "additional_chat_templates").exists()
    for name in ("config.json", "generation_config.json"):
        written = fields(tmp_path / "out", name)
        assert (written["eos_token_id"], written["bos_token_id"], written["pad_token_id"]) == (4, 1, 3)
    assert fields(tmp_path / "out", "generation_config.json")["temperature"] == 0.7
    assert open_model(tmp_path / "out").generation.end_tokens == (4,)


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_with_the_tokenizer_of_the_checkpoint_exports_every_file_unchanged(
    base: Path, tmp_path: Path, kept: bool
) -> None:
    tokenizer: Tokenizer = HuggingFaceTokenizer(str(base)) if kept else TokenIds(64)
    run = run_of(base, tokenizer, tmp_path / "run")
    assert open_model(run).generation.end_tokens == (2, 9)
    notes = exported(run, tmp_path / "out")
    assert notes == (
        [] if kept else ["the original checkpoint's tokenizer was written, since the run used token ids only"]
    )
    names = {str(file.relative_to(base)) for file in base.rglob("*") if file.is_file()}
    assert "additional_chat_templates/tools.jinja" in names
    assert names == {
        str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()
    }
    assert all((tmp_path / "out" / name).read_bytes() == (base / name).read_bytes() for name in names)


def designed(tokenizer: Tokenizer, out: Path) -> list[str]:
    spec = ModelSpec.model_validate(MIXTRAL | {"vocab_size": 260})
    config = load_config("configs/tiny/top_k.yaml").model_copy(update={"model": spec})
    return export(initial_weights(spec, 0), config, tokenizer, None, out)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharacterTokenizer("".join(sorted(set(TEXT))))])
def test_byte_and_character_tokenizers_are_written_with_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    designed(tokenizer, tmp_path / "out")
    written = Inner.from_file(str(tmp_path / "out" / "tokenizer.json"))
    again = load_tokenizer(tmp_path / "out")
    ids = tokenizer.encode(TEXT).tolist()
    assert written.encode(TEXT).ids == again.encode(TEXT).tolist() == ids
    assert written.decode(ids, skip_special_tokens=False) == again.decode(ids) == TEXT
    assert again.byte_count(ids) == tokenizer.byte_count(ids)
    if tokenizer.kind == "character":  # like the run's tokenizer, it refuses what it does not know
        with pytest.raises(TokenizerError, match=r"prompt has characters outside the tokenizer's vocabulary; got '"):
            again.encode("☃")
    config = fields(tmp_path / "out", "config.json")
    assert [config[name] for name in ("eos_token_id", "bos_token_id", "pad_token_id")] == [None, None, None]
    assert open_model(tmp_path / "out").generation.end_tokens == ()


def test_every_byte_decodes_as_in_the_run(tmp_path: Path) -> None:
    designed(ByteTokenizer(), tmp_path / "out")
    written = Inner.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for pair in np.random.default_rng(0).integers(0, 256, (300, 7)).tolist() + [[byte] for byte in range(256)]:
        assert written.decode(pair, skip_special_tokens=False) == ByteTokenizer().decode(pair)


def test_a_character_that_no_file_can_have_is_refused_by_name() -> None:
    with pytest.raises(TokenizerError, match=r"cannot be written as a tokenizer.json; got the character '\\ud83d'"):
        CharacterTokenizer("ab\ud83d").files()


def test_a_designed_model_is_exported_with_the_end_token_of_its_tokenizer_only(tmp_path: Path) -> None:
    own = write_tokenizer(tmp_path / "own")
    (own / "model.safetensors").write_bytes(b"other weights")
    (own / "config.json").write_text('{"model_type": "dbrx"}')
    assert len(designed(HuggingFaceTokenizer(str(own)), tmp_path / "out")) == 1
    assert load_tokenizer(tmp_path / "out").content_hash == load_tokenizer(own).content_hash
    assert fields(tmp_path / "out", "config.json")["eos_token_id"] == 2
    assert fields(tmp_path / "out", "generation_config.json") == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    opened = open_model(tmp_path / "out")
    assert (opened.generation.end_tokens, opened.config.model.vocab) == ((2,), 260)


def test_a_token_on_which_the_computation_depends_stays(tmp_path: Path) -> None:
    """Qwen4's n-grams end at the first end token."""
    base = write_checkpoint("qwen4_exp_text", tmp_path / "base")
    own = HuggingFaceTokenizer(str(write_tokenizer(tmp_path / "own", vocab_size=40)))
    exported(run_of(base, own, tmp_path / "run"), tmp_path / "out")
    assert fields(tmp_path / "out", "config.json")["eos_token_id"] == [5, 7]
    assert fields(tmp_path / "out", "generation_config.json")["eos_token_id"] == own.end_of_text != 5
    assert open_model(tmp_path / "out").config.model == open_model(base).config.model


def test_a_model_trained_on_ids_says_that_it_has_no_tokenizer(tmp_path: Path) -> None:
    assert "no tokenizer was written, since the run used token ids only" in designed(TokenIds(260), tmp_path / "out")
