"""Download of Hugging Face Hub repositories by id: weights and JSON only, through huggingface_hub and its cache.

Pickle files and code are never downloaded. Of the weights only the files listed in the index are downloaded, since many
repositories have a second copy in another layout.
"""

import contextlib
import fnmatch
import glob
import io
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moezoo.core.errors import CheckpointError
from moezoo.core.huggingface.folder import INDEX, SINGLE, read_json_object

OnProgress = Callable[[str], None]

_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_SMALL_FILES = ["*.json", "*.jinja"]  # config, index, tokenizer, generation config; chat templates
_SUBFOLDERS = ["*/*"]  # subfolders: other layouts and formats of the same weights
_LOCAL = "Or pass the path of a local folder with config.json and *.safetensors."


def resolve(path_or_id: str | Path, on_progress: OnProgress | None = None, *, weights: bool = True) -> Path:
    """Return the folder of a checkpoint: a local path unchanged, or `organization/name[@revision]` in the hub's cache.

    A string of the form of an id is a path if it exists, or if its first part is an existing folder. Cached files are
    not downloaded again and work offline. `on_progress` receives progress lines: megabytes done, total, time left.
    With `weights=False` only JSON and templates are downloaded, which is enough to describe a model.

    Raises CheckpointError if there is no network, no such repository or revision, no access, or no weights.
    """
    match = _ID.fullmatch(str(path_or_id))
    first = Path(path_or_id).parts[:1]
    if match is None or Path(path_or_id).exists() or Path(*first).exists() or first in ((".",), ("..",)):
        return Path(path_or_id)
    with _readable_errors(match["repository"], match["revision"]):
        return _download(match["repository"], match["revision"], on_progress, weights)


def on_stderr() -> OnProgress:
    """Return a function that prints progress to stderr: one updated line in a terminal, else a line every 10 s."""
    last = time.monotonic()

    def tell(line: str) -> None:
        nonlocal last
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{line}\x1b[K")
            sys.stderr.flush()
        elif line and time.monotonic() - last >= 10:
            last = time.monotonic()
            sys.stderr.write(f"{line}\n")

    return tell


def _download(repository: str, revision: str | None, on_progress: OnProgress | None, with_weights: bool) -> Path:
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
    """Replacement for huggingface_hub's progress bars that reports progress as lines of text."""

    def __init__(self, repository: str, total: float | None, on_progress: OnProgress | None):
        self._repository, self._total, self._on_progress = repository, total, on_progress
        self._done: dict[int, float] = {}  # one bar counts bytes received, another bytes written
        self._start = self._last = time.monotonic()
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
                    bars.report(id(self), self.n, self.total)
                return bool(shown)

        Bar.set_lock(threading.RLock())
        return Bar

    def report(self, bar: int, done: float, total: float | None) -> None:
        """Record a bar's bytes and call `on_progress`, at most five times a second."""
        with self._lock:
            self._done[bar] = done
            now = time.monotonic()
            if self._on_progress is None or now - self._last < 0.2:
                return
            self._last = now
            self._on_progress(
                progress_line(self._repository, max(self._done.values()), self._total or total, now - self._start)
            )


class _NullStream(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


def progress_line(repository: str, done: float, total: float | None, elapsed_s: float) -> str:
    """Return a progress line: `fetching org/name: 1,250 of 5,000 MB, 50 MB/s, 1:15 left`."""
    speed = done / elapsed_s if elapsed_s > 0 else 0.0
    line = f"fetching {repository}: {done / 1e6:,.0f}" + (f" of {total / 1e6:,.0f}" if total else "")
    line += f" MB, {speed / 1e6:,.0f} MB/s"
    if total and speed > 0:
        left_s = round(max(0.0, total - done) / speed)
        line += f", {left_s // 60}:{left_s % 60:02} left"
    return line


def _bytes_to_fetch(repository: str, folder: Path, patterns: list[str]) -> float | None:
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
