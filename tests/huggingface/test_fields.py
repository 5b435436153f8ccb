"""Reader of config.json: values, refusals and error messages."""

import json
from pathlib import Path

import pytest

from moezoo.core.errors import CheckpointError, SpecError
from moezoo.core.huggingface.checkpoint import describe_checkpoint
from moezoo.core.huggingface.family import family_of
from moezoo.core.huggingface.fields import Fields
from tests.support.fixtures import read_fixture, write_checkpoint


def fields(**values: object) -> Fields:
    return Fields(values, "config.json")


def test_defaults_apply_to_absent_and_null() -> None:
    some = fields(a=None, b=3)
    assert (some.count("a", 7), some.count("b", 7), some.get("c")) == (7, 3, None)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda some: some.count("zero"), "zero is 0; expected an integer of at least 1"),
        (lambda some: some.integer("half"), "half is 0.5; expected an integer"),
        (lambda some: some.integer("yes"), "yes is true; expected an integer"),
        (lambda some: some.number("endless"), "endless is Infinity; expected a number"),
        (lambda some: some.flag("half"), "half is 0.5; expected true or false"),
        (lambda some: some.text("half"), "half is 0.5; expected a string"),
        (lambda some: some.items("list", 2), r"list is \[1\]; expected a list of 2"),
        (lambda some: some.choice("word", {"silu": 1}), 'word is "gelu"; expected one of silu'),
        (lambda some: some.expect("yes", False), "yes is true; expected false"),
        (lambda some: some.count("absent"), "absent is missing"),
        (lambda some: some.inside("half"), "half is 0.5; expected a JSON object"),
    ],
)
def test_invalid_value_is_refused_by_name(read, message: str) -> None:
    some = fields(zero=0, half=0.5, yes=True, endless=float("inf"), list=[1], word="gelu")
    with pytest.raises(SpecError, match=rf"{message}.*\(config\.json\)"):
        read(some)


def test_aliases_must_agree() -> None:
    assert fields(b=4).either("a", "b") == "b"
    assert fields().either("a", "b") == "a"
    with pytest.raises(SpecError, match="b is 5; expected 4"):
        fields(a=4, b=5).either("a", "b")


def test_an_unread_field_is_refused() -> None:
    some = fields(known=1, surprise=2, use_cache=True, bos_token_id=0)
    some.get("known")
    with pytest.raises(SpecError, match="unknown for this family: surprise 2"):
        some.finish()
    some.finish(("sur*",))


def test_text_config_in_a_multimodal_wrapper() -> None:
    some = fields(text_config={"model_type": "inner", "a": 1}, vision_config={"b": 2}, tie_word_embeddings=True)
    assert (some.model_type, some.count("a"), some.flag("tie_word_embeddings")) == ("inner", 1, True)
    with pytest.raises(SpecError, match="unknown for this family: logit_trick 3"):
        fields(text_config={}, logit_trick=3)


def with_config(tmp_path: Path, **changes: object) -> Path:
    folder = write_checkpoint("mixtral", tmp_path / "mixtral")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "foo"}}, 'rope_type is "foo"; expected one of default'),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "spin": 1}}, "unknown for this family: spin 1"),
        ({"num_local_experts": 0}, "num_local_experts is 0; expected an integer of at least 1"),
        ({"num_experts_per_tok": 99}, "top_k is 99"),
        ({"num_attention_heads": 3}, "num_heads is 3, which num_key_value_heads|num_heads is 3"),
        ({"hidden_act": "tanh"}, 'hidden_act is "tanh"; expected one of silu'),
        ({"logit_trick": 1.0}, "unknown for this family: logit_trick 1.0"),
        ({"model_type": "mixtrall"}, "model_type is 'mixtrall'; did you mean mixtral?"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=message.replace("?", r"\?")):
        describe_checkpoint(with_config(tmp_path, **changes))


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1, "a": 2}', "\xff", "[" * 100_000])
def test_a_config_that_is_not_a_json_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(SpecError, match=r"config\.json"):
        describe_checkpoint(tmp_path)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        describe_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("mixtrall", "mixtral"),
        ("qwen3-moe", "qwen3_moe"),
        ("deepseekv3", "deepseek_v3"),
        ("mistral", None),
        ("gemma3_text", None),
        ("deepseek_v5", None),
        ("qwen2", None),
        ("gpt2", None),
        ("", None),
    ],
)
def test_only_a_misspelled_model_type_gets_a_suggestion(name: str, meant: str | None) -> None:
    with pytest.raises(SpecError, match=r"supported ones, which `moezoo describe --help` lists") as caught:
        family_of(fields(model_type=name))
    suggestion = f"; did you mean {meant}?" if meant else ""
    got = f"is {name!r}{suggestion}" if name else "is missing"
    assert str(caught.value).startswith(f"model_type {got}; expected one of the ")
    assert len(str(caught.value)) < 200


def test_a_missing_model_type_is_that_of_the_family_with_the_same_fields() -> None:
    config = read_fixture("nemotron_h").description["config"] | {"model_type": None}
    with pytest.raises(SpecError, match=r"nearest to nemotron_h, which reads .*If it is one, set model_type to that\."):
        family_of(Fields(config, "config.json"))


@pytest.mark.parametrize(
    ("case", "nearest"),
    [("mixtral", "mixtral"), ("qwen3_moe", "qwen3_moe"), ("deepseek_v3", "deepseek_v3"), ("nemotron_h", "nemotron_h")],
)
def test_an_unknown_model_type_names_the_family_with_the_same_fields(case: str, nearest: str) -> None:
    config = read_fixture(case).description["config"] | {"model_type": "unheard_of", "new_idea": 3}
    with pytest.raises(SpecError) as caught:
        family_of(Fields(config, "config.json"))
    text = str(caught.value)
    assert f"By its fields it is nearest to {nearest}, which reads " in text
    assert "and not new_idea: writings/adding_a_part.md" in text
    assert "\n" not in text
