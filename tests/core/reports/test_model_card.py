"""The model card of an export, and its upload."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from moezoo.cli.main import main
from moezoo.core.config.run_config import InitFrom
from moezoo.core.parameters import parameter_table
from moezoo.core.runs.open import make_base, open_model
from moezoo.core.runs.save import save_run
from moezoo.core.runs.sessions import append_line
from moezoo.core.spec import AdapterSpec
from tests.support.fake_network import FakeNetwork
from tests.support.fixtures import write_checkpoint
from tests.support.made_run import made_run

BASE_CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\nlicense_link: x\n---\n# Base\n\nIts text.\n"
SESSION = {
    "started": "2026-11-30T04:00:00+00:00",
    "command": "moezoo train /home/me/my texts/owls.yaml --out=/home/me/runs/owls --set a=https://me:secret@host/b.txt?c",
    "versions": {"moezoo": "0.1.0", "mlx": "0.32.4"},
    "commit": "c0ffee",
    "data": [{"source": "text.txt", "tokens": 3000}, {"source": "/home/me/b.jsonl", "tokens": 1000}],
}


def convert(*words: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["convert", *map(str, words)])
    assert result.exit_code == status, result.output
    return result


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the front matter and the text of a card."""
    begin, fields, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert begin == ""
    return yaml.safe_load(fields), text


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run trained here on two sources, with a validation at its exported step and one after it."""

    def change(raw: dict[str, Any]) -> None:
        raw["data"]["sources"].append({"kind": "jsonl", "path": "/home/me/b.jsonl"})

    made = made_run(change)
    made.lines += [{"step": step, "tokens": 102400, "validation_loss": 1.6, "bits_per_byte": 2.25} for step in (400,)]
    made.lines.append({"step": 800, "tokens": 204800, "validation_loss": 0.5, "bits_per_byte": 0.7})
    path = made.write(tmp_path / "run")
    append_line(path, SESSION | {"command": SESSION["command"].replace("/home/me/my texts", "'/home/me/my texts'")})
    return path


def test_the_card_of_a_run_says_what_was_trained_and_on_what(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "owls")
    fields, text = card_of(tmp_path / "owls")
    assert fields == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moezoo", "moe"],
    }
    for line in (
        "| parameters | 5,624 (5.62 k) |",
        "| steps | 400 of 400 |",
        "| tokens | 102,400 |",
        "| optimizer | adamw, weight decay 0.1 |",
        "| `text.txt` | 75.0% | 3,000 |",
        "| `b.jsonl` | 25.0% | 1,000 |",
        "| validation loss | 1.6000 nats per token |",
        "| bits per byte | 2.2500 |",
        "moezoo train owls.yaml --out=owls --set a=b.txt",
        "moezoo 0.1.0, mlx 0.32.4; moezoo's commit c0ffee",
        'model = moezoo.load("owls")',
        'writer = pipeline("text-generation", "owls")',
    ):
        assert line in text.splitlines()
    assert "## Results\n" in text
    assert not any(word in text for word in ("home", "my texts", "secret", "host", str(tmp_path)))


def test_the_card_of_codes_for_mlx_lm(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "codes", "--quantize", "4bit", "--group-size", 32)
    fields, text = card_of(tmp_path / "codes")
    assert fields["library_name"] == "mlx"
    assert fields["tags"] == ["moezoo", "moe", "mlx"]
    assert "## Results, before quantization\n" in text
    assert 'model, tokenizer = load("codes")' in text


def test_an_untrained_checkpoint_keeps_its_card_and_a_trained_one_has_it_below(tmp_path: Path) -> None:
    base = write_checkpoint("qwen3_moe", tmp_path / "base")
    (base / "README.md").write_text(BASE_CARD)
    convert(base, tmp_path / "untrained")
    assert not (tmp_path / "untrained" / "README.md").exists()
    convert(tmp_path / "untrained", tmp_path / "back")
    assert (tmp_path / "back" / "README.md").read_text() == BASE_CARD
    convert(base, tmp_path / "mlx", "--layout", "mlx")
    assert (tmp_path / "mlx" / "README.md").read_text() == BASE_CARD
    opened = open_model(base)
    config = opened.config.model_copy(update={"init_from": InitFrom(path="org/name")})
    save_run(tmp_path / "trained", config, opened.tokenizer, opened.weights, 3, opened.layout)
    convert(tmp_path / "trained", tmp_path / "out")
    fields, text = card_of(tmp_path / "out")
    assert fields["license"] == "apache-2.0"
    assert (fields["base_model"], fields["base_model_relation"]) == ("org/name", "finetune")
    assert "trained from `org/name`" in text
    assert text.endswith("## The base model's card\n\n# Base\n\nIts text.\n")


@pytest.mark.parametrize(
    ("layout", "library", "tags", "line"),
    [
        ("mlx", "mlx", ["mlx", "lora"], 'model, tokenizer = load("base", adapter_path="{}")'),
        ("peft", "peft", ["lora", "peft"], 'model = PeftModel.from_pretrained(base, "{}")'),
    ],
)
def test_the_card_of_an_adapter(layout: str, library: str, tags: list[str], line: str, tmp_path: Path) -> None:
    base = write_checkpoint("qwen3_moe", tmp_path / "base")
    opened = open_model(base)
    model = opened.config.model.model_copy(update={"adapter": AdapterSpec(rank=2)})
    config = opened.config.model_copy(update={"model": model, "init_from": InitFrom(path=str(base))})
    rows = [row for row in parameter_table(model) if row.base is not None]
    factors = {row.name: np.ones(row.shape, np.float32) for row in rows}
    save_run(tmp_path / "run", config, opened.tokenizer, factors, 3, opened.layout, base=make_base(base))
    convert(tmp_path / "run", tmp_path / layout, "--adapter", layout)
    fields, text = card_of(tmp_path / layout)
    assert fields["library_name"] == library
    assert fields["tags"] == ["moezoo", "moe", *tags]
    assert "base_model" not in fields  # a folder is no repository
    assert line.format(layout) in text
    assert "| trained parameters | adapter of rank 2, scale 2 |" in text
    if layout == "peft":
        convert(tmp_path / "run", tmp_path / "whole", "--merge")
        fields, text = card_of(tmp_path / "whole")
        assert fields["library_name"] == "transformers"
        assert "model.generate([[0, 1, 2]])" in text  # the run has no tokenizer
        assert "pipeline(" not in text


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNetwork:
    fake = FakeNetwork({}, set())
    fake.install(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    return fake


def test_push_uploads_the_export_to_a_private_repository(run: Path, tmp_path: Path, hub: FakeNetwork) -> None:
    result = convert(run, tmp_path / "out", "--push", "org/name", "--json")
    assert json.loads(result.stdout)["pushed"] == "https://huggingface.co/org/name"
    assert hub.private is True
    assert hub.pushed == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert 'moezoo.load("org/name")' in hub.pushed["README.md"].decode()
    hub.private, hub.pushed = False, {}
    error = convert(run, tmp_path / "again", "--push", "org/name", status=1).stderr
    assert "org/name is a public repository, and nothing was uploaded" in error
    assert not hub.pushed
    assert "uploaded: https" in convert(run, tmp_path / "public", "--push", "org/name", "--public").output
    assert "model.safetensors" in hub.pushed


def test_push_says_before_the_export_what_is_missing(
    run: Path, tmp_path: Path, hub: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx2
    from huggingface_hub import constants, errors

    def refused(*words: object) -> str:
        error = convert(*words, status=1).stderr
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return error

    push = (run, tmp_path / "out", "--push", "org/name")
    hub.down = True
    assert "the hub cannot be reached (ConnectError). Connect to a network." in refused(*push)
    request = httpx2.Request("GET", "https://huggingface.co/api/whoami-v2")
    hub.answer = errors.HfHubHTTPError("no", response=httpx2.Response(401, request=request))
    assert "refuses the token (status 401). Run `hf auth login`" in refused(*push)
    assert "expected ORG/NAME" in refused(*push[:-1], "name")
    assert "OUT is a run folder" in refused(*push, "--whole")
    assert "--public is for --push" in refused(*push[:2], "--public")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "needs a token of the hub" in refused(*push)
