"""Where a tokenizer is: in a folder, in a file, or on the hub, which is asked once and only for an id."""

import shutil
from pathlib import Path

import pytest

from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.errors import TokenizerError
from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.fake_network import COMMIT, FakeNetwork

TEXT = "the cat sat"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("{{ messages[0].content }}")
    return folder


@pytest.fixture
def hub(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNetwork:
    files = {str(file.relative_to(written)): file.read_bytes() for file in written.rglob("*") if file.is_file()}
    fake = FakeNetwork(files | {"model.safetensors": b"weights", "README.md": b"text"}, {"tokenizer.json"})
    fake.install(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return fake


def refusal(path: object) -> str:
    with pytest.raises(TokenizerError) as caught:
        HuggingFaceTokenizer(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tokenizer_of_the_hub_is_fetched_with_its_templates_and_opens_offline(
    hub: FakeNetwork, written: Path, tmp_path: Path
) -> None:
    expected = HuggingFaceTokenizer(str(written))
    tokenizer = HuggingFaceTokenizer("org/name")
    assert not {"model.safetensors", "README.md"} & set(hub.fetched)
    assert tokenizer.encode(TEXT).tolist() == expected.encode(TEXT).tolist()
    tokenizer.save(tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer" / "additional_chat_templates" / "short.jinja").is_file()
    hub.down, hub.tries = True, 0
    for path in ("org/name", f"org/name@{COMMIT}"):
        assert HuggingFaceTokenizer(path).encode(TEXT).tolist() == expected.encode(TEXT).tolist()
    assert hub.tries == 2


def test_the_hub_is_asked_once_for_an_id_and_never_for_a_path(hub: FakeNetwork, tmp_path: Path) -> None:
    hub.down = True
    text = refusal("org/name")
    assert text.startswith(f"org/name is neither a folder ({tmp_path / 'org/name'}) nor in the cache")
    assert hub.tries == 1
    (tmp_path / "data").mkdir()
    for path in ("gpt2", "data/gpt2", "other/tokenizer.json", "./org/name", "a/b/c", tmp_path / "x", "~/nowhere"):
        absolute = Path(path).expanduser().absolute()
        assert refusal(path).startswith(f"no such tokenizer; got {path}"), path
        assert str(absolute) in refusal(path), path
    assert hub.tries == 1


def test_a_tokenizer_json_means_its_folder_and_no_other_file_is_a_tokenizer(
    hub: FakeNetwork, written: Path, tmp_path: Path
) -> None:
    shutil.copytree(written, tmp_path / "local" / "t")
    expected = HuggingFaceTokenizer(str(written)).encode_chat([{"role": "user", "content": TEXT}])
    tokenizer = HuggingFaceTokenizer("local/t/tokenizer.json")
    assert tokenizer.encode_chat([{"role": "user", "content": TEXT}]).tolist() == expected.tolist()
    (tmp_path / "local" / "t" / "tokenizer.json").rename(tmp_path / "local" / "mine.json")
    assert "the tokenizer is a file; got local/mine.json; expected a folder" in refusal("local/mine.json")
    assert hub.tries == 0
