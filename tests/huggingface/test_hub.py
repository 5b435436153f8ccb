import json
import os
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import errors

from moezoo.core.errors import CheckpointError
from moezoo.core.huggingface.folder import TensorFolder
from moezoo.core.huggingface.hub import resolve

COMMIT = "c" * 40
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


class FakeHub:
    """A fake hub repository, with a cache in the layout of huggingface_hub."""

    def __init__(self, cache, files):
        self.root, self.files, self.fetched, self.revisions = cache / "models--org--name", files, [], []
        self.error = None

    def snapshot_download(self, repository, *, revision, allow_patterns, ignore_patterns, tqdm_class):
        assert repository == "org/name"
        self.revisions.append(revision)
        if self.error is not None:
            raise self.error
        folder = self.root / "snapshots" / COMMIT
        wanted = huggingface_hub.utils.filter_repo_objects(
            self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        received, files = tqdm_class(total=0, initial=0, unit="B", unit_scale=True), tqdm_class(desc="files")
        for name in wanted:
            blob, link = self.root / "blobs" / f"hash-of-{name}", folder / name
            if not blob.exists():
                self.fetched.append(name)
                blob.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir(parents=True, exist_ok=True)
                blob.write_bytes(self.files[name])
                link.symlink_to(os.path.relpath(blob, folder))
                received.total += len(self.files[name])
                received.update(len(self.files[name]))
            files.update(1)
        return str(folder)

    def get_cached_repo_tree(self, repository, *, revision):
        assert (repository, revision) == ("org/name", COMMIT)
        return [SimpleNamespace(path=name, size=len(content)) for name, content in self.files.items()]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a function that creates a fake hub with one repository."""

    def make(files):
        fake = FakeHub(tmp_path / "cache", files)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "get_cached_repo_tree", fake.get_cached_repo_tree)
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
    assert fake.revisions == [None, COMMIT]  # weights have the same revision as the config
    assert TensorFolder(path).tensors.keys() == {"a", "b"}


def test_a_revision_is_passed_on(hub):
    fake = hub(TEXTS | SHARDS)
    resolve("org/name@refs/pr/1")
    assert fake.revisions == ["refs/pr/1", COMMIT]


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
def test_every_failure_is_one_line_with_the_repository(hub, error, problem):
    hub(TEXTS).error = error
    assert problem in refusal("org/name@v1")


def test_paths_in_an_index_cannot_add_files_to_download(hub):
    index = {"weight_map": {"a": "*.bin", "b": "../x.safetensors", "c": "*.safetensors", "d": 3}}
    fake = hub({"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()} | UNWANTED)
    refusal("org/name")
    assert fake.fetched == ["config.json", "model.safetensors.index.json"]
