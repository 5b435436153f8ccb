"""Attacks on files at rest: one flipped bit, or a mutation of a text or a header, in a run, a cache or a checkpoint.

Each attempt reads the damaged copy in a forked child with limits of time and memory, through the same core functions
that every command uses. No backend is loaded, so that a child costs milliseconds.
"""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moezoo.core.config.run_config import load_config
from moezoo.core.data.prepare import prepare_data
from moezoo.core.errors import CheckpointError, MoezooError, RunError
from moezoo.core.runs.open import OpenedModel, open_model
from moezoo.core.runs.run_folder import Run
from moezoo.core.training.metrics import MetricsFile, read_metrics
from tests.torture.outcome import FAULT, Outcome

LIMIT_S, LIMIT_BYTES = 30, 6 << 30
MESSAGE_CHARACTERS = 4000

Read = Callable[[], str]
"""Reads everything that it is about and returns a digest of what it understood."""

# --- what is read ----------------------------------------------------------------------------------------------------


def read_model(folder: Path, *, resumes: bool = False) -> str:
    """Open a run or a Hugging Face checkpoint as `moezoo generate` and `describe` do, and digest all of it.

    `resumes`: read the metrics too, as a resumed run does.
    """
    opened = open_model(folder)
    digest = hashlib.sha256(repr((opened.config, opened.step, opened.generation, _encoded(opened))).encode())
    for name in sorted(opened.weights):
        digest.update(np.ascontiguousarray(opened.weights[name]).tobytes())
    for problem in opened.problems:
        if "skipped" in problem:  # an older checkpoint was opened in its place, and the user is told so
            raise CheckpointError(problem)
    if resumes:
        metrics = MetricsFile(Run(folder).metrics_path, keep_to_step=opened.step)
        if metrics.problems:  # which the run prints
            raise RunError(metrics.problems[0])
        digest.update(json.dumps(read_metrics(Run(folder).metrics_path)).encode())
    return digest.hexdigest()


def _encoded(opened: OpenedModel) -> object:
    try:
        return opened.tokenizer.encode("the cat sat on 12 mats. ").tolist()
    except MoezooError as error:
        return str(error)


def read_batches(config_path: Path) -> str:
    """Prepare the data of a config as `moezoo train` does, and digest the batches of some epochs."""
    config = load_config(config_path)
    data = prepare_data(config.data, config.training.sequence_length)
    digest = hashlib.sha256()
    for step in range(80):
        digest.update(data.train.batch(step, 16, config.training.sequence_length, 0).tobytes())
        digest.update(data.validation.batch(step, 16, config.training.sequence_length, 0).tobytes())
    return digest.hexdigest()


# --- one attempt -----------------------------------------------------------------------------------------------------


def attempt(read: Read) -> tuple[str, str]:
    """Read in a child process: ("read", digest), ("refused", message) or ("FAULT", what was seen)."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        with suppress(BaseException), os.fdopen(sender, "w", encoding="utf-8", errors="replace") as pipe:
            pipe.write("\n".join(_read_limited(read)))
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, encoding="utf-8") as pipe:
        word, _, rest = pipe.read().partition("\n")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if word:
        return word, rest
    return FAULT, f"ended with {signal.Signals(-status).name if status < 0 else status}"


def _read_limited(read: Read) -> tuple[str, str]:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LIMIT_S)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        return "read", read()
    except MoezooError as error:
        message = str(error)
        if len(message) > MESSAGE_CHARACTERS:
            return FAULT, f"a message of {len(message)} characters: {message[:300]}"
        return "refused", message
    except BaseException:
        return FAULT, traceback.format_exc()[-1500:]


# --- damage ----------------------------------------------------------------------------------------------------------


def files_below(folder: Path) -> list[Path]:
    """Return the files of a tree that have content, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def flip(path: Path, draw: random.Random) -> str:
    """Flip one bit of a file; return where."""
    content = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bit {bit}"


VALUES = ["-1", "0", "1e308", "99999999999999999999", "NaN", "null", "true", '""', '"x"', "[]", "{}", "[[[]]]", "16.0"]


def mutate(path: Path, draw: random.Random) -> str:
    """Damage a file as software and transfers do: cut, overwrite, repeat, or exchange a value; return what was done."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        (size,) = struct.unpack("<Q", content[:8])
        header, what = _mutated(content[8 : 8 + size], draw)
        if draw.random() < 0.7:
            path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
            return f"header: {what}"
    content, what = _mutated(content, draw)
    path.write_bytes(content)
    return what


def _mutated(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    at = draw.randrange(len(content) + 1)
    match draw.randrange(9):
        case 0:
            return content[:at], f"cut at {at}"
        case 1:
            noise = draw.randbytes(draw.randrange(1, 40))
            return content[:at] + noise + content[at + len(noise) :], f"{len(noise)} random bytes at {at}"
        case 2:
            mark = draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\0" * 64, b"[" * 5000, b"{" * 5000, b"\x1f\x8b\x08"])
            return mark + content, f"{mark[:3]!r} in front"
        case 3:
            lines = content.splitlines(keepends=True) or [b""]
            line = draw.randrange(len(lines))
            copies = draw.choice([0, 2, 100])
            return b"".join(lines[:line] + lines[line : line + 1] * copies + lines[line + 1 :]), (
                f"line {line + 1} {copies} times"
            )
        case 4:
            return content[:at] + content[at : at + 200] * 30 + content[at:], f"200 bytes at {at} 30 times"
        case _:
            return _with_other_value(content, draw)


def _with_other_value(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Exchange a number, a word or a quoted string for another value."""
    places = list(re.finditer(rb'"[^"\n]{0,60}"|-?\d+(\.\d+)?|\btrue\b|\bfalse\b|\bnull\b', content[: 1 << 20]))
    if not places:
        return content + b"\n", "a line feed at the end"
    place = draw.choice(places)
    value = draw.choice(VALUES).encode()
    return content[: place.start()] + value + content[place.end() :], (
        f"{place[0][:40].decode(errors='replace')} at {place.start()} is {value.decode()}"
    )


def replace(path: Path, draw: random.Random) -> str:
    """Put something else in the place of a file: no regular file, an empty one, or a huge one of zeros."""
    what = draw.choice(["pipe", "device", "folder", "loop", "nothing", "empty", "zeros"])
    size = path.stat().st_size
    path.unlink()
    match what:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "nothing":
            pass
        case "empty":
            path.touch()
        case "zeros":
            with path.open("wb") as file:
                # A text of any size is legitimate, so that of the config keeps its size.
                file.truncate(size if path.suffix == ".txt" else 200 << 30)
    return f"replaced by {what}"


# --- attacks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A tree to damage.

    Fields:
        root: the tree, which is replaced by a fresh copy of `pristine` before each attempt.
        damaged: folder below root whose files are damaged; "" for all of it.
        read: reads what is at root.
        checked: its files carry digests, so that only an error or an equal result is right.
    """

    root: Path
    damaged: str
    read: Read
    checked: bool

    @property
    def pristine(self) -> Path:
        """The copy that is never damaged."""
        return self.root.with_name(f"{self.root.name}.pristine")

    def restore(self) -> None:
        """Make root equal to `pristine`, which is made from it the first time."""
        if not self.pristine.exists():
            shutil.copytree(self.root, self.pristine, symlinks=True)
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.pristine, self.root, symlinks=True)


class Damage:
    """Attacks that damage one file of a subject."""

    def __init__(self, name: str, subject: Subject, how: Callable[[Path, random.Random], str]):
        self.name, self._subject, self._how = name, subject, how
        self._expected: str | None = None

    def run(self, number: int, seed: int) -> Outcome:
        """Damage one file, read all, and compare with what the undamaged files gave."""
        subject, draw = self._subject, random.Random(f"{seed} {self.name} {number}")
        subject.restore()
        if self._expected is None:
            word, self._expected = attempt(subject.read)
            assert word == "read", f"{self.name}: the undamaged files are not read: {self._expected}"
            subject.restore()
        path = draw.choice(files_below(subject.root / subject.damaged))
        detail = f"{path.relative_to(subject.root)}: {self._how(path, draw)}"
        word, result = attempt(subject.read)
        if word == "refused":
            return Outcome(self.name, number, "named", f"{detail}: {result[:300]}")
        if word == FAULT:
            return Outcome(self.name, number, FAULT, f"{detail}: {result}")
        if result == self._expected:
            return Outcome(self.name, number, "same result", detail)
        if subject.checked:
            return Outcome(self.name, number, FAULT, f"{detail}: read silently with another result")
        return Outcome(self.name, number, "other values (no checksum in the format)", detail)
