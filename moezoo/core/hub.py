"""Files of Hugging Face Hub repositories by id, through huggingface_hub and its cache.

Pickle files and code are never downloaded: the caller names what it wants. If the hub does not answer, the cache does.
"""

import contextlib
import fnmatch
import io
import re
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moezoo.core.errors import MoezooError
from moezoo.core.extras import check_installed
from moezoo.core.progress import Pace, Progress

_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_OF_FILES = (".json", ".jsonl", ".yaml", ".yml", ".txt", ".model", ".safetensors", ".bin", ".npy", ".npz")
_SUBFOLDERS = ["*/*"]  # subfolders: other layouts and formats of the same weights
_TIMEOUT_S = 10.0  # for an answer; huggingface_hub itself waits without limit


@dataclass(frozen=True)
class HubId:
    """A repository of the hub, `organization/name`, and its revision; None is the default branch."""

    name: str
    revision: str | None = None


def hub_id(path: str | Path) -> HubId | None:
    """Return the hub id `organization/name[@revision]` that a string is, or None if it is a path.

    It is a path if it exists, if its first part is an existing folder, or if it ends like a file (`.json`).
    """
    text = str(path)
    match = _ID.fullmatch(text)
    first = Path(text).parts[:1]
    if match is None or text.endswith(_OF_FILES) or first in ((".",), ("..",)):
        return None
    if Path(text).exists() or Path(*first).exists():
        return None
    return HubId(match["name"], match["revision"])


class Snapshot:
    """The files of one commit of a repository: those in the cache and, if the hub answers, those that it has.

    Fields:
        offline: whether only the cache is used, because the hub does not answer for this repository or is not asked.
    """

    def __init__(self, repository: HubId, *, ask: bool = True):
        self._name, self._revision = repository.name, repository.revision
        self._no_answer = _no_answer(repository) if ask else None
        self.offline = not ask or self._no_answer is not None

    def fetch(
        self, patterns: Sequence[str], needed: Collection[str] | None = None, on_progress: Progress | None = None
    ) -> Path:
        """Return the folder, after a download of the files that match a pattern and are not in the cache.

        A pattern without a slash leaves out subfolders; all patterns have one, or none has. `needed`: the files without
        which the cache alone is not enough, of those that the repository has; by default all that match. `on_progress`
        is called with bytes, at most five times a second.

        Raises huggingface_hub's errors and others: see `readable_errors`.
        """
        import huggingface_hub
        from huggingface_hub import errors

        total = sum(self._not_cached(patterns).values()) or None
        try:
            folder = huggingface_hub.snapshot_download(
                self._name,
                revision=self._revision,
                allow_patterns=list(patterns),
                ignore_patterns=None if "/" in patterns[0] else _SUBFOLDERS,
                local_files_only=self.offline,
                tqdm_class=_Bars(self._name, total, on_progress).tqdm_class(),
            )
        except errors.IncompleteSnapshotError as partial:
            folder = partial.snapshot_path
            missing = [name for name in self._not_cached(patterns) if needed is None or name in needed]
            if missing:
                raise PartlyCached(missing) from self._no_answer
        except errors.LocalEntryNotFoundError:
            if isinstance(self._no_answer, errors.HfHubHTTPError):
                raise self._no_answer from None  # it did answer: not there, no access, or out of order
            raise
        self._revision = Path(folder).name  # the same commit from now on, even if the repository changes meanwhile
        return Path(folder)

    def _not_cached(self, patterns: Sequence[str]) -> dict[str, int]:
        """Return files that a download would fetch, with their bytes; empty if the repository's files are not known."""
        import huggingface_hub
        from huggingface_hub import errors

        try:
            tree = huggingface_hub.get_cached_repo_tree(self._name, revision=self._revision)
        except errors.CachedRepoTreeNotFoundError:
            return {}
        cached = huggingface_hub.try_to_load_from_cache
        return {
            file.path: file.size
            for file in tree
            if ("/" in file.path) == ("/" in patterns[0])
            and any(fnmatch.fnmatchcase(file.path, pattern) for pattern in patterns)
            and not isinstance(cached(self._name, file.path, revision=self._revision), str)
        }


def _no_answer(repository: HubId) -> Exception | None:
    """Return the reason for which the hub does not serve a repository, or None if it does."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.HfApi().repo_info(repository.name, revision=repository.revision, timeout=_TIMEOUT_S)
    except errors.HFValidationError:
        raise
    except Exception as error:  # network errors have no documented class in huggingface_hub
        return error
    return None


class PartlyCached(Exception):
    """Files that are needed are not in the cache, and the hub does not answer. `missing`: their names."""

    def __init__(self, missing: list[str]):
        super().__init__(", ".join(missing))
        self.missing = missing


@contextlib.contextmanager
def readable_errors(repository: HubId, kind: type[MoezooError], advice: str) -> Iterator[None]:
    """Convert any error of the hub or network into one of a kind: a line with the repository, ending with `advice`."""
    name = repository.name
    check_installed("huggingface_hub", purpose=f"{name} is not a folder here, and as a hub id it")
    from huggingface_hub import constants, errors

    unreachable = "the hub cannot be reached. Connect to a network."
    if constants.is_offline_mode():
        unreachable = "HF_HUB_OFFLINE is set. Unset it."
    page = f"https://huggingface.co/{name}"
    try:
        yield
    except MoezooError:
        raise
    except PartlyCached as error:
        files = ", ".join(error.missing[:3]) + (", ..." if error.missing[3:] else "")
        problem = f"{name} is only partly cached, without {files}, and {unreachable}"
    except errors.GatedRepoError:
        problem = f"{name} is gated. Accept its terms at {page}, then run `hf auth login`."
    except errors.RevisionNotFoundError:
        problem = f"{name} has no revision {repository.revision!r}. Its branches and tags are at {page}/refs."
    except errors.RepositoryNotFoundError:
        folder = Path(name).absolute()
        problem = f"there is no folder {folder} and no repository {name} (if it is private, run `hf auth login`)."
    except errors.HFValidationError:
        problem = f"{name} is neither a folder nor a repository id; expected organization/name[@revision]."
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        where = f"neither a folder ({Path(name).absolute()}) nor in the cache {constants.HF_HUB_CACHE}"
        problem = f"{name} is {where}, and {unreachable}"
    except Exception as error:  # network errors have no documented class in huggingface_hub
        problem = f"cannot fetch {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}."
    else:
        return
    raise kind(f"{problem} {advice}")


class _Bars:
    """Replacement for huggingface_hub's progress bars that calls `on_progress`."""

    def __init__(self, repository: str, total: int | None, on_progress: Progress | None):
        self._repository, self._total, self._on_progress = repository, total, on_progress
        self._done: dict[int, int] = {}  # one bar counts bytes received, another bytes written
        self._pace = Pace(line_every_s=0.2)
        self._lock = threading.Lock()

    def tqdm_class(self) -> type:
        """Return a tqdm class that prints nothing and reports its bytes to this object."""
        from tqdm.std import tqdm

        bars = self

        class Bar(tqdm):  # type: ignore[misc]
            monitor_interval = 0  # no monitor thread

            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **kwargs | {"file": _NullStream(), "disable": False})

            def update(self, n: float | None = 1) -> bool | None:
                shown = super().update(n)
                if self.unit == "B":
                    bars.report(id(self), int(self.n), None if self.total is None else int(self.total))
                return bool(shown)

        Bar.set_lock(threading.RLock())
        return Bar

    def report(self, bar: int, done: int, total: int | None) -> None:
        """Record a bar's bytes and call `on_progress`, at most five times a second."""
        with self._lock:
            self._done[bar] = done
            most = max(self._done.values())
            if self._on_progress is not None and self._pace.is_due(most):
                self._on_progress(f"fetching {self._repository}", most, self._total or total)


class _NullStream(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)
