import json
import os
import shutil
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
from tests.huggingface.fake_network import FakeNetwork

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
    fake = hub(TEXTS | SHARDS | UNWANTED)
    path = resolve("org/name")
    assert sorted(fake.fetched) == sorted(TEXTS | SHARDS)
    assert fake.revisions == ["main"]  # looked up once: weights have the same revision as the config
    assert TensorFolder(path).tensors.keys() == {"a", "b"}


def test_a_revision_is_passed_on(hub):
    fake = hub(TEXTS | SHARDS)
    resolve("org/name@refs/pr/1")
    assert fake.revisions == ["refs/pr/1"]


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
    hub(TEXTS | SHARDS, xet)
    path = resolve("org/name")
    contents = {file.name: os.path.realpath(file) for file in path.iterdir()}
    shared = {name for name, content in contents.items() if Path(content).parents[1] == tmp_path / "cache" / "blobs"}
    assert shared == set(xet)  # as huggingface_hub 2.4 stores them; if this fails, its layout has changed
    os.symlink(tmp_path / "cache", tmp_path / "linked")
    os.symlink(path, tmp_path / "my_model")
    places = [path, tmp_path / "linked" / path.relative_to(tmp_path / "cache"), tmp_path / "my_model"]
    for place in places:
        assert TensorFolder(place).tensors.keys() == {"a", "b"}
        assert [file.name for file in small_files(place)] == sorted(TEXTS)
    moved = (tmp_path / "cache").rename(tmp_path / "moved") / path.relative_to(tmp_path / "cache")
    assert TensorFolder(moved).tensors.keys() == {"a", "b"}
    assert [file.name for file in small_files(moved)] == sorted(TEXTS)


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
    for path in ("org/name", "org/missing", tmp_path / "x", "./a/b", "../a", "a/b/c", "name", "/a/b"):
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
        (errors.LocalEntryNotFoundError("no network"), "org/name is neither a folder nor in the cache"),
        (errors.OfflineModeIsEnabled("offline"), "org/name is neither a folder nor in the cache"),
        (errors.IncompleteSnapshotError("2 missing", snapshot_path="x"), "org/name is only partly cached"),
        (errors.GatedRepoError("no", response=response(403)), "org/name is gated. Accept its terms at"),
        (errors.RepositoryNotFoundError("no", response=response(404)), "no folder or repository org/name"),
        (errors.RevisionNotFoundError("no", response=response(404)), "org/name has no revision 'v1'"),
        (errors.HFValidationError("bad"), "org/name is neither a folder nor a repository id"),
        (errors.HfHubHTTPError("a\nb", response=response(500)), "cannot fetch org/name: HfHubHTTPError: a b"),
        (OSError(28, "No space left on device"), "cannot fetch org/name: OSError: [Errno 28] No space left"),
    ],
)
def test_every_failure_is_one_line_with_the_repository(monkeypatch, error, problem):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert problem in refusal("org/name@v1")


def test_paths_in_an_index_cannot_add_files_to_download(hub):
    index = {"weight_map": {"a": "*.bin", "b": "../x.safetensors", "c": "*.safetensors", "d": 3}}
    fake = hub({"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()} | UNWANTED)
    refusal("org/name")
    assert fake.fetched == ["config.json", "model.safetensors.index.json"]
