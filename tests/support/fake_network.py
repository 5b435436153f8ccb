"""The hub's network, replaced: everything on this side of it is huggingface_hub's own code, its cache included."""

import hashlib
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub import HfApi, _snapshot_download, constants, file_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import XetFileData, tqdm

COMMIT = "c" * 40


class FakeNetwork:
    """One repository, `org/name`, served without a network.

    Fields:
        files: content by name.
        xet: names of the files in Xet storage; the others are in git.
        fetched: names of the files downloaded so far.
        revisions: revisions looked up so far.
        down: whether the hub cannot be reached.
        answer: error with which the hub answers.
        tries: requests so far.
        private: whether the repository is private; None: it does not exist.
        pushed: content by name of the files that were uploaded.
    """

    def __init__(self, files: dict[str, bytes], xet: set[str]):
        self.files, self.xet = files, xet
        self.fetched: list[str] = []
        self.revisions: list[str | None] = []
        self.down = False
        self.answer: Exception | None = None
        self.tries = 0
        self.private: bool | None = None
        self.pushed: dict[str, bytes] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch, cache: object) -> None:
        """Replace huggingface_hub's network, and set its cache folder; files are downloaded one after the other."""
        in_threads = _snapshot_download.hf_thread_map

        def in_order(*args, **options):
            return in_threads(*args, **options | {"max_workers": 1})

        monkeypatch.setattr(_snapshot_download, "hf_thread_map", in_order)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(HfApi, "repo_info", self._repo_info)
        monkeypatch.setattr(HfApi, "list_repo_tree", self._tree)
        monkeypatch.setattr(HfApi, "whoami", self._reach)
        monkeypatch.setattr(HfApi, "create_repo", self._create)
        monkeypatch.setattr(HfApi, "upload_folder", self._upload)
        monkeypatch.setattr(file_download, "get_hf_file_metadata", self._metadata)
        monkeypatch.setattr(file_download, "http_get", self._get)
        monkeypatch.setattr(file_download, "xet_get", self._get_xet)

    def _create(self, repo_id, *, private, exist_ok):
        self._reach()
        assert repo_id == "org/name"
        assert exist_ok
        self.private = private if self.private is None else self.private
        return f"https://huggingface.co/{repo_id}"

    def _upload(self, *, repo_id, folder_path, commit_message):
        self._reach()
        assert repo_id == "org/name"
        self.pushed = {file.name: file.read_bytes() for file in folder_path.iterdir()}

    def _repo_info(self, repo_id, *, revision=None, **_):
        self._reach()
        assert repo_id == "org/name"
        self.revisions.append(revision)
        return SimpleNamespace(sha=COMMIT, private=self.private)

    def _tree(self, **_):
        self._reach()
        for name, content in self.files.items():
            digest = hashlib.sha256(content).hexdigest()
            lfs = {"size": len(content), "oid": digest, "pointerSize": 100}
            extra = {"lfs": lfs, "xetHash": _xet_hash(content)} if name in self.xet else {}
            yield RepoFile(path=name, size=len(content), oid=_git_hash(content), **extra)

    def _metadata(self, *, url, **_):
        self._reach()
        name = _name_in(url)
        content = self.files[name]
        xet = XetFileData(file_hash=_xet_hash(content), refresh_route="") if name in self.xet else None
        etag = hashlib.sha256(content).hexdigest() if xet else _git_hash(content)
        return SimpleNamespace(commit_hash=COMMIT, etag=etag, size=len(content), location=url, xet_file_data=xet)

    def _get(self, url, temp_file, *, tqdm_class, **_):
        self._reach()
        self._send(_name_in(url), temp_file, tqdm_class)

    def _get_xet(self, *, incomplete_path, displayed_filename, tqdm_class, **_):
        self._reach()
        with open(incomplete_path, "wb") as file:
            self._send(displayed_filename, file, tqdm_class)

    def _send(self, name, file, tqdm_class):
        self.fetched.append(name)
        file.write(self.files[name])
        file.flush()
        with (tqdm_class or tqdm)(total=len(self.files[name])) as bar:
            bar.update(len(self.files[name]))

    def _reach(self):
        self.tries += 1
        if self.answer is not None:
            raise self.answer
        if self.down:
            raise httpx2.ConnectError("name resolution failed")


def _name_in(url: str) -> str:
    return url.partition("/resolve/")[2].partition("/")[2]


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _xet_hash(content: bytes) -> str:
    return hashlib.blake2s(content).hexdigest()
