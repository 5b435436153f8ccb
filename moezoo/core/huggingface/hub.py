"""Repositories of the Hugging Face hub by id: weights and JSON only, through huggingface_hub and its cache.

Never fetched are pickle files and code. Of the weights only those are fetched that the index names, since many
repositories hold a second copy of them in another layout.
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
_TEXTS = ["*.json", "*.jinja"]  # config, index, tokenizer, generation config; chat templates
_BELOW = ["*/*"]  # other layouts and formats of the same weights
_LOCAL = "Or pass the path of a local folder with config.json and *.safetensors."


def resolve(path_or_id: str | Path, on_progress: OnProgress | None = None, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: a path as it is, `organization/name[@revision]` as it lies in the hub's cache.

    What has the form of an id and exists as a path, or begins with a folder that is here, is a path. What is in the
    cache is not fetched again, and is used without a network. `on_progress` gets lines for a person: how much of how
    much, and how long it will take. Without `weights` only texts are fetched, which is enough to describe a model.

    Raises CheckpointError: no network, no such repository or revision, no access to it, or no weights in it.
    """
    match = _ID.fullmatch(str(path_or_id))
    first = Path(path_or_id).parts[:1]
    if match is None or Path(path_or_id).exists() or Path(*first).exists() or first in ((".",), ("..",)):
        return Path(path_or_id)
    with _explained(match["repository"], match["revision"]):
        return _download(match["repository"], match["revision"], on_progress, weights)


def on_stderr() -> OnProgress:
    """Lines of progress for a person: one that is rewritten in a terminal, elsewhere a new one every ten seconds."""
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
    folder = _fetch(repository, revision, _TEXTS, _Bars(repository, None, None))
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{repository} has no config.json, so it is no checkpoint that can be opened. {_LOCAL}")
    if not with_weights:
        return folder
    commit = folder.name  # the same revision for the weights, even if someone uploads meanwhile
    for weights in _weights(folder):
        total = _bytes_to_fetch(repository, folder, weights)
        _fetch(repository, commit, weights, _Bars(repository, total, on_progress))
        if any(folder.glob("*.safetensors")):
            return folder
    raise CheckpointError(
        f"{repository} has no safetensors files; pickle is never fetched. Convert it, or name another. {_LOCAL}"
    )


def _weights(folder: Path) -> list[list[str]]:
    """Patterns of file names to try, one after the other."""
    if (folder / INDEX).exists():
        weight_map = read_json_object(folder / INDEX).get("weight_map")
        if isinstance(weight_map, dict):  # whatever else is wrong with it, TensorFolder says
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
            ignore_patterns=_BELOW,
            tqdm_class=bars.tqdm_class(),
        )
    )


class _Bars:
    """Takes the place of huggingface_hub's progress bars, and tells what they would show in lines of text."""

    def __init__(self, repository: str, total: float | None, on_progress: OnProgress | None):
        self._repository, self._total, self._on_progress = repository, total, on_progress
        self._done: dict[int, float] = {}  # a bar counts what was received, another what was written
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()

    def tqdm_class(self) -> type:
        """tqdm, but it shows nothing; what counts bytes tells them here."""
        from tqdm.std import tqdm

        bars = self

        class Bar(tqdm):  # type: ignore[misc]
            monitor_interval = 0  # no thread of its own

            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **kwargs | {"file": _Nowhere(), "disable": False})

            def update(self, n: float | None = 1) -> bool | None:
                shown = super().update(n)
                if self.unit == "B":
                    bars._tell(id(self), self.n, self.total)
                return bool(shown)

        Bar.set_lock(threading.RLock())
        return Bar

    def _tell(self, bar: int, done: float, total: float | None) -> None:
        with self._lock:
            self._done[bar] = done
            now = time.monotonic()
            if self._on_progress is None or now - self._last < 0.2:
                return
            self._last = now
            self._on_progress(
                progress_line(self._repository, max(self._done.values()), self._total or total, now - self._start)
            )


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


def progress_line(repository: str, done: float, total: float | None, elapsed_s: float) -> str:
    """`fetching org/name: 1,250 of 5,000 MB, 50 MB/s, 1:15 left`."""
    speed = done / elapsed_s if elapsed_s > 0 else 0.0
    line = f"fetching {repository}: {done / 1e6:,.0f}" + (f" of {total / 1e6:,.0f}" if total else "")
    line += f" MB, {speed / 1e6:,.0f} MB/s"
    if total and speed > 0:
        left_s = round(max(0.0, total - done) / speed)
        line += f", {left_s // 60}:{left_s % 60:02} left"
    return line


def _bytes_to_fetch(repository: str, folder: Path, patterns: list[str]) -> float | None:
    """The size of the files that are not in the cache yet; None where the hub's list of files is not at hand."""
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
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """Whatever goes wrong on the way to the hub as one line that names the repository."""
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
        problem = f"there is no folder and no repository {repository} (or it is private: `hf auth login`)."
    except errors.HFValidationError:
        problem = f"{repository} is neither a folder nor a repository's id; expected organization/name[@revision]."
    except errors.IncompleteSnapshotError:
        problem = f"{repository} is only partly in the cache, and the hub cannot be reached. Fetch it with a network."
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        cache = huggingface_hub.constants.HF_HUB_CACHE
        where = f"neither a folder nor in the cache {cache}"
        problem = f"{repository} is {where}, and the hub cannot be reached. Connect to a network."
    except Exception as error:  # the network's own errors are no class that huggingface_hub promises
        problem = f"cannot fetch {repository}: {type(error).__name__}: {' '.join(str(error).split())[:200]}."
    else:
        return
    raise CheckpointError(f"{problem} {_LOCAL}")
