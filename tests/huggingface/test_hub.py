import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import errors

from moezoo.core.errors import CheckpointError
from moezoo.core.huggingface.folder import TensorFolder
from moezoo.core.huggingface.hub import resolve
from moezoo.core.huggingface.layout import small_files
from tests.support.fake_network import COMMIT, FakeNetwork

SHARDS = {
    "model-00001-of-00002.safetensors": safetensors.numpy.save({"a": np.zeros(3, np.float32)}),
    "model-00002-of-00002.safetensors": safetensors.numpy.save({"b": np.zeros(5, np.float32)}),
}
TEXTS = {
    "config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": dict(zip("ab", sorted(SHARDS), strict=True))},
    ).encode(),
}
TEMPLATE = {"additional_chat_templates/tool_use.jinja": b"{{ tools }}"}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"code",
    "consolidated.safetensors": b"the same weights again",
    "original/model.safetensors": b"and again",
    "original/config.json": b"{}",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a function that creates a hub with one repository, which only lacks the network."""

    def make(files, xet=()):
        fake = FakeNetwork(files, set(xet))
        fake.install(monkeypatch, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        return fake

    return make


def response(status):
    import httpx2

    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/org/name"))


def refusal(name):
    with pytest.raises(CheckpointError) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)
    assert "local folder with config.json and *.safetensors" in str(caught.value)
    return str(caught.value)


def test_only_json_templates_and_indexed_weights_are_downloaded(hub):
    fake = hub(TEXTS | SHARDS | TEMPLATE | UNWANTED)
    path = resolve("org/name")
    assert sorted(fake.fetched) == sorted(TEXTS | SHARDS | TEMPLATE)
    assert fake.revisions == [None, "main"]  # whether it answers, and its commit: weights and config are of the same
    assert TensorFolder(path).tensors.keys() == {"a", "b"}


def test_a_revision_is_passed_on(hub):
    fake = hub(TEXTS | SHARDS)
    resolve("org/name@refs/pr/1")
    assert fake.revisions == ["refs/pr/1", "refs/pr/1"]


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_weights_of_one_file_need_no_index(hub, name):
    content = SHARDS["model-00001-of-00002.safetensors"]
    fake = hub({"config.json": b"{}", name: content} | {"original/x.safetensors": b""})
    assert TensorFolder(resolve("org/name")).tensors.keys() == {"a"}
    assert fake.fetched == ["config.json", name]


def test_cached_files_are_not_downloaded_again(hub):
    fake = hub(TEXTS | SHARDS)
    first = resolve("org/name")
    fake.fetched.clear()
    assert resolve("org/name") == first
    assert fake.fetched == []


@pytest.mark.parametrize("xet", [(), SHARDS, TEXTS | SHARDS], ids=["git", "weights in Xet", "all in Xet"])
def test_every_layout_of_the_cache_opens_where_it_is_and_moved(hub, tmp_path, xet):
    hub(TEXTS | SHARDS | TEMPLATE, xet)
    path = resolve("org/name")
    contents = {file.name: os.path.realpath(file) for file in path.iterdir() if file.is_file()}
    shared = {name for name, content in contents.items() if Path(content).parents[1] == tmp_path / "cache" / "blobs"}
    assert shared == set(xet)  # as huggingface_hub 2.4 stores them; if this fails, its layout has changed
    os.symlink(tmp_path / "cache", tmp_path / "linked")
    os.symlink(path, tmp_path / "my_model")
    places = [path, tmp_path / "linked" / path.relative_to(tmp_path / "cache"), tmp_path / "my_model"]
    for place in places:
        assert TensorFolder(place).tensors.keys() == {"a", "b"}
        assert sorted(small_files(place)) == sorted(TEXTS | TEMPLATE)
    moved = (tmp_path / "cache").rename(tmp_path / "moved") / path.relative_to(tmp_path / "cache")
    assert TensorFolder(moved).tensors.keys() == {"a", "b"}
    assert sorted(small_files(moved)) == sorted(TEXTS | TEMPLATE)


def test_a_file_that_another_repository_has_stored_is_linked_and_opens(hub, tmp_path):
    fake = hub(TEXTS | SHARDS, SHARDS)
    resolve("org/name")
    shutil.rmtree(tmp_path / "cache" / "models--org--name")  # the shared content stays
    fake.fetched.clear()
    assert TensorFolder(resolve("org/name")).tensors.keys() == {"a", "b"}
    assert sorted(fake.fetched) == sorted(TEXTS)


@pytest.mark.parametrize(
    "target",
    [
        "outside.safetensors",
        "cache/models--org--other/blobs/etag",
        "cache/models--org--name/etag",
        f"cache/blobs/{'ab' * 32}",
        f"cache/blobs/cd/{'ab' * 32}",
        "cache/blobs/ab/abcdef",
        f"blobs/ab/{'ab' * 32}",
    ],
)
def test_a_link_that_leaves_the_cache_is_refused(hub, tmp_path, target):
    hub({"config.json": b"{}", "model.safetensors": SHARDS["model-00001-of-00002.safetensors"]})
    path = resolve("org/name")
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").unlink()
    (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / target).write_bytes(content)
    (path / "model.safetensors").symlink_to(tmp_path / target)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to .*, outside its folder"):
        TensorFolder(path)


def test_a_link_without_its_content_is_named(hub, tmp_path):
    hub(TEXTS | SHARDS, SHARDS)
    path = resolve("org/name")
    shutil.rmtree(tmp_path / "cache" / "blobs")
    with pytest.raises(CheckpointError, match=r"00001-of-00002.* is a link to .*/cache/blobs/\S+, which is missing"):
        TensorFolder(path)


def test_progress_callback_receives_bytes_of_the_weights(hub, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("moezoo.core.progress.time.monotonic", lambda: next(clock))
    hub(TEXTS | SHARDS | UNWANTED)
    seen = []
    resolve("org/name", lambda *row: seen.append(row))
    total = sum(map(len, SHARDS.values()))
    first = len(SHARDS[min(SHARDS)])
    assert seen == [("fetching org/name", done, total) for done in (first, total)]  # one call per shard


def test_huggingface_hub_prints_nothing_itself(hub, capfd):
    hub(TEXTS | SHARDS)
    resolve("org/name")
    assert capfd.readouterr() == ("", "")


def test_local_paths_are_returned_unchanged(hub, tmp_path):
    fake = hub({})
    (tmp_path / "org" / "name").mkdir(parents=True)
    for path in ("org/name", "org/missing", tmp_path / "x", "./a/b", "../a", "a/b/c", "name", "/a/b", "a/b.yaml"):
        assert resolve(path) == Path(path)
    assert fake.revisions == []


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (UNWANTED, "org/name has no config.json"),
        (TEXTS | UNWANTED, "org/name has no safetensors files, and pickle is never downloaded"),
        (
            {"config.json": b"{}", "pytorch_model.bin": b""},
            "org/name has no safetensors files, and pickle is never downloaded",
        ),
    ],
)
def test_a_repository_without_config_or_safetensors_is_refused(hub, files, problem):
    fake = hub(files)
    assert problem in refusal("org/name")
    assert not set(fake.fetched) & {"pytorch_model.bin", "modeling_own.py"}


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (errors.LocalEntryNotFoundError("no network"), "nor in the cache"),
        (errors.OfflineModeIsEnabled("offline"), "nor in the cache"),
        (errors.GatedRepoError("no", response=response(403)), "org/name is gated. Accept its terms at"),
        (errors.RepositoryNotFoundError("no", response=response(404)), "and no repository org/name"),
        (errors.RevisionNotFoundError("no", response=response(404)), "org/name has no revision 'v1'"),
        (errors.HFValidationError("bad"), "org/name is neither a folder nor a repository id"),
        (errors.HfHubHTTPError("a\nb", response=response(500)), "cannot fetch org/name: HfHubHTTPError: a b"),
        (OSError(28, "No space left on device"), "cannot fetch org/name: OSError: [Errno 28] No space left"),
    ],
)
def test_every_failure_is_one_line_with_the_repository(hub, monkeypatch, error, problem):
    def fail(*_, **__):
        raise error

    hub({})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert problem in refusal("org/name@v1")


# What another program may have left in the cache: it fetched all files, those that it needed, or each by its name.
UNREAD = {"preprocessor_config.json": b"{}"}
SETTINGS = {"generation_config.json": b"{}", "tokenizer.json": b"{}"}


@pytest.mark.parametrize("name", ["org/name", f"org/name@{COMMIT}"])
@pytest.mark.parametrize("xet", [(), TEXTS | SHARDS | UNREAD], ids=["git", "Xet"])
def test_offline_the_cache_is_enough_if_it_has_what_is_read(hub, name, xet):
    fake = hub(TEXTS | SHARDS | UNREAD | SETTINGS, xet)
    huggingface_hub.snapshot_download("org/name", ignore_patterns=list(UNREAD))
    fake.down, fake.tries = True, 0
    path = resolve(name)
    assert TensorFolder(path).tensors.keys() == {"a", "b"}
    assert not (path / "preprocessor_config.json").exists()
    assert fake.tries == 1  # one question without an answer, no retries


@pytest.mark.parametrize("name", ["org/name", f"org/name@{COMMIT}"])
def test_offline_files_that_were_fetched_one_by_one_are_enough(hub, name):
    fake = hub(TEXTS | SHARDS | UNREAD)
    for file in TEXTS | SHARDS:
        huggingface_hub.hf_hub_download("org/name", file)  # as transformers does
    fake.down = True
    assert TensorFolder(resolve(name)).tensors.keys() == {"a", "b"}


@pytest.mark.parametrize("missing", [*TEXTS, *SHARDS, *SETTINGS])
def test_offline_a_file_that_is_read_and_missing_is_named(hub, missing):
    fake = hub(TEXTS | SHARDS | UNREAD | SETTINGS)
    huggingface_hub.snapshot_download("org/name", ignore_patterns=[missing, *UNREAD])
    fake.down = True
    for name in ("org/name", f"org/name@{COMMIT}"):
        assert f"org/name is only partly cached, without {missing}, and the hub cannot be reached" in refusal(name)
    if missing in SHARDS:
        assert resolve("org/name", weights=False).is_dir()


def test_offline_nothing_cached_is_said_in_one_line(hub, tmp_path):
    fake = hub(TEXTS | SHARDS)
    fake.down = True
    places = f"neither a folder ({tmp_path / 'org/name'}) nor in the cache {tmp_path / 'cache'}"
    assert f"org/name is {places}, and the hub cannot be reached" in refusal("org/name")
    assert fake.tries == 1


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (errors.GatedRepoError("no", response=response(403)), "org/name is gated. Accept its terms at"),
        (errors.RepositoryNotFoundError("no", response=response(404)), "and no repository org/name"),
        (errors.RevisionNotFoundError("no", response=response(404)), "org/name has no revision 'v1'"),
        (
            errors.HfHubHTTPError("bad\ntoken", response=response(401)),
            "cannot fetch org/name: HfHubHTTPError: bad token",
        ),
    ],
)
def test_what_the_hub_refuses_is_opened_from_the_cache_or_said(hub, answer, problem):
    fake = hub(TEXTS | SHARDS | UNREAD)
    fake.answer = answer
    assert problem in refusal("org/name@v1")
    fake.answer = None
    huggingface_hub.snapshot_download("org/name", revision="v1", ignore_patterns=list(UNREAD))
    fake.answer = answer
    assert TensorFolder(resolve("org/name@v1")).tensors.keys() == {"a", "b"}


def test_offline_mode_is_said_by_a_process_that_has_used_nothing_of_the_hub_yet(tmp_path):
    """In its own process: huggingface_hub imports its modules when they are first used."""
    lines = "from moezoo.core.huggingface.hub import resolve", "resolve('org/name')"
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "CheckpointError: org/name is neither a folder (" in result.stderr
    assert "and HF_HUB_OFFLINE is set. Unset it." in result.stderr


def test_paths_in_an_index_cannot_add_files_to_download(hub):
    index = {"weight_map": {"a": "*.bin", "b": "../x.safetensors", "c": "*.safetensors", "d": 3}}
    fake = hub({"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()} | UNWANTED)
    refusal("org/name")
    assert fake.fetched == ["config.json", "model.safetensors.index.json"]
