"""Download of Hugging Face Hub repositories by id: weights and JSON only, through huggingface_hub and its cache.

Pickle files and code are never downloaded. Of the weights only the files listed in the index are downloaded, since many
repositories have a second copy in another layout.
"""

import contextlib
import fnmatch
import glob
import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moezoo.core.errors import CheckpointError
from moezoo.core.huggingface.folder import INDEX, SINGLE, read_json_object
from moezoo.core.progress import Pace, Progress

_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_SMALL_FILES = ["*.json", "*.jinja"]  # config, index, tokenizer, generation config; chat templates
_SUBFOLDERS = ["*/*"]  # subfolders: other layouts and formats of the same weights
_LOCAL = "Or pass the path of a local folder with config.json and *.safetensors."


def resolve(path_or_id: str | Path, on_progress: Progress | None = None, *, weights: bool = True) -> Path:
    """Return the folder of a checkpoint: a local path unchanged, or `organization/name[@revision]` in the hub's cache.

    A string of the form of an id is a path if it exists, or if its first part is an existing folder. Cached files are
    not downloaded again and work offline. `on_progress` is called with bytes, at most five times a second.
    With `weights=False` only JSON and templates are downloaded, which is enough to describe a model.

    Raises CheckpointError if there is no network, no such repository or revision, no access, or no weights.
    """
    match = _ID.fullmatch(str(path_or_id))
    first = Path(path_or_id).parts[:1]
    if match is None or Path(path_or_id).exists() or Path(*first).exists() or first in ((".",), ("..",)):
        return Path(path_or_id)
    with _readable_errors(match["repository"], match["revision"]):
        return _download(match["repository"], match["revision"], on_progress, weights)


def _download(repository: str, revision: str | None, on_progress: Progress | None, with_weights: bool) -> Path:
    folder = _fetch(repository, revision, _SMALL_FILES, _Bars(repository, None, None))
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{repository} has no config.json, so it cannot be opened as a checkpoint. {_LOCAL}")
    if not with_weights:
        return folder
    commit = folder.name  # same revision for the weights, even if the repository changes meanwhile
    for weights in _weights(folder):
        total = _bytes_to_fetch(repository, folder, weights)
        _fetch(repository, commit, weights, _Bars(repository, total, on_progress))
        if any(folder.glob("*.safetensors")):
            return folder
    raise CheckpointError(
        f"{repository} has no safetensors files, and pickle is never downloaded. Convert it, or use another. {_LOCAL}"
    )


def _weights(folder: Path) -> list[list[str]]:
    """Return lists of file name patterns to try in order."""
    if (folder / INDEX).exists():
        weight_map = read_json_object(folder / INDEX).get("weight_map")
        if isinstance(weight_map, dict):  # TensorFolder reports all other problems with it
            names = {name for name in weight_map.values() if isinstance(name, str) and name.endswith(".safetensors")}
            return [[glob.escape(name) for name in sorted(names)]]
    return [[SINGLE], ["*.safetensors"]]


def _fetch(repository: str, revision: str | None, patterns: list[str], bars: "_Bars") -> Path:
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=_SUBFOLDERS,
            tqdm_class=bars.tqdm_class(),
        )
    )


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


def _bytes_to_fetch(repository: str, folder: Path, patterns: list[str]) -> int | None:
    """Return the size of the files not yet cached, in bytes; None if the hub's file list is not available."""
    import huggingface_hub

    try:
        tree = huggingface_hub.get_cached_repo_tree(repository, revision=folder.name)
    except Exception:  # only a progress line depends on it
        return None
    return sum(
        file.size
        for file in tree
        if "/" not in file.path
        and any(fnmatch.fnmatchcase(file.path, pattern) for pattern in patterns)
        and not (folder / file.path).exists()
    )


@contextlib.contextmanager
def _readable_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Convert any error of the hub or network into a one-line CheckpointError with the repository."""
    import huggingface_hub
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repository}"
    try:
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError:
        problem = f"{repository} is gated. Accept its terms at {page}, then run `hf auth login`."
    except errors.RevisionNotFoundError:
        problem = f"{repository} has no revision {revision!r}. Its branches and tags are at {page}/refs."
    except errors.RepositoryNotFoundError:
        problem = f"there is no folder or repository {repository} (if it is private, run `hf auth login`)."
    except errors.HFValidationError:
        problem = f"{repository} is neither a folder nor a repository id; expected organization/name[@revision]."
    except errors.IncompleteSnapshotError:
        problem = f"{repository} is only partly cached, and the hub cannot be reached. Connect to a network."
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        cache = huggingface_hub.constants.HF_HUB_CACHE
        where = f"neither a folder nor in the cache {cache}"
        problem = f"{repository} is {where}, and the hub cannot be reached. Connect to a network."
    except Exception as error:  # network errors have no documented class in huggingface_hub
        problem = f"cannot fetch {repository}: {type(error).__name__}: {' '.join(str(error).split())[:200]}."
    else:
        return
    raise CheckpointError(f"{problem} {_LOCAL}")
