"""Everything that precedes the first step of a run, for `moezoo train` and `moezoo.train` alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moezoo.backends import PACKAGES, load_backend, versions
from moezoo.core.backend import Backend
from moezoo.core.config.mesh_option import load_mesh
from moezoo.core.config.run_config import Config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.cost.fits import check_training
from moezoo.core.data.load_tokenizer import tokenizer_notes
from moezoo.core.data.prepare import PreparedData, prepare_data
from moezoo.core.data.tokenizers import CharacterTokenizer, Tokenizer
from moezoo.core.distributed.process_group import ProcessGroup
from moezoo.core.distributed.processes import first_process_first
from moezoo.core.distributed.startup import STARTUP_S
from moezoo.core.errors import RunError, TokenizerError
from moezoo.core.progress import Message
from moezoo.core.runs.init_from import check_initial_weights, frozen_bytes, initial_tokenizer, load_resolved_config
from moezoo.core.runs.run_data import check_data, vocabulary_error
from moezoo.core.runs.run_folder import Run, is_run, load_run_config, load_run_tokenizer, prepare_run
from moezoo.core.runs.sessions import describe_session
from moezoo.core.traces.trace import RoutingTrace
from moezoo.core.traces.trace_file import open_trace
from moezoo.core.trackers.reporter import check_installed, tracker_reporters
from moezoo.core.training.loop import TrainingResult, train
from moezoo.core.training.reporter import Reporter, Reporters
from moezoo.core.training.session_log import SessionLog

AnyConfig = str | Path | Mapping[str, Any] | Config
"""A config: the path of a YAML file, the name of one that ships, its content, or as `load_config` returns it."""

Prepare = Callable[[Config, str, Tokenizer | None], PreparedData]
"""Function that prepares a config's data; the text names the config in errors."""


@dataclass(frozen=True)
class ReadyRun:
    """A run that can start or resume. Nothing of it is written before its first step.

    Fields:
        config: with the vocabulary size filled in.
        data, backend, run: what it is trained on, with, and into.
        replay: the trace whose routing is forced.
        facts: on device and compute paths, by name.
        warnings: one-line warnings for the user; none but in the first process.
        notes: the same, on the tokenizer.
    """

    config: Config
    data: PreparedData
    backend: Backend
    run: Run
    replay: RoutingTrace | None
    facts: Mapping[str, str]
    warnings: Sequence[str]
    notes: Sequence[str]

    @property
    def is_first(self) -> bool:
        """True in the process that writes files and prints."""
        return self.backend.processes.is_first

    @property
    def sources(self) -> list[str]:
        """A line for the user on each source of the data."""
        training = self.config.training
        tokens = math.prod((training.steps, training.batch_size, training.sequence_length))
        return [source.describe(tokens) for source in self.data.summary]

    def train(self, reporter: Reporter, command: str, *, exits: bool = False) -> TrainingResult:
        """Train, and report to `reporter`, the config's trackers and the run's sessions, which record `command`.

        See `core.training.loop.train`.
        """
        every = None
        if self.is_first:
            trackers = tracker_reporters(self.config, self.run, reporter.message)
            every = Reporters(reporter, SessionLog(self.run, self._session(command), reporter.message), *trackers)
        given = (self.config, self.data, self.backend, self.run)
        result = train(*given, reporter=every, replay=self.replay, exits=exits)
        self.backend.leave()
        return result

    def _session(self, command: str) -> dict[str, Any]:
        known, count = versions(), self.backend.processes.count
        used = {name: known[name] for name in ("moezoo", "Python", "numpy", *PACKAGES[self.backend.name])}
        return describe_session(command, used, self.facts, count, self.data.summary)


def ready_run(
    config: AnyConfig,
    *,
    prepare: Prepare,
    backend: str | Backend | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    mesh: str | None = None,
    resume: bool = False,
    replay: str | Path | None = None,
    allow_overcommit: bool = False,
    allow_changed_data: bool = False,
    group: ProcessGroup | None = None,
    startup_s: float = STARTUP_S,
) -> ReadyRun:
    """Check and prepare a run. Arguments: as in `moezoo.train`, and those of a process group.

    `prepare` prepares the data in the first process.
    """
    trace = open_trace(Path(replay)) if replay else None
    path = Path(out) if out else default_folder(config)
    where = str(config) if isinstance(config, str | Path) else "config"
    resumed = resume and is_run(path)
    spec = load_resolved_config(config, overrides, resumed=load_run_config(path) if resumed else None)
    check_installed(spec.trackers)
    if mesh is not None:
        spec = spec.model_copy(update={"mesh": load_mesh(mesh)})
    loaded = (
        load_backend(backend, spec.mesh, group, startup_s) if backend is None or isinstance(backend, str) else backend
    )
    is_first = loaded.processes.is_first
    tokenizer = load_run_tokenizer(path) if resumed else initial_tokenizer(spec)
    prepared = partial(_prepared, prepare if is_first else _silent, spec, where, tokenizer, resumed=resumed)
    data = first_process_first(loaded, prepared)
    spec = with_vocab_size(spec, data.tokenizer.vocab_size, where)
    if not resumed:
        check_initial_weights(spec)
    if spec.mesh.is_one_device:  # then each process has all weights and an equal part of every micro-batch
        loaded.processes.share(spec.training.batch_size // spec.training.gradient_accumulation)
    frozen = frozen_bytes(spec, path if resumed else None)
    warnings = check_training(spec, loaded.devices(), frozen_bytes=frozen, allow_overcommit=allow_overcommit)
    run = first_process_first(loaded, lambda: prepare_run(path, spec, resume=resume))
    changes = check_data(path, data.summary, allow_changed=allow_changed_data) if resumed else []
    facts = {"backend": loaded.name, **loaded.facts(), **({"replay": str(replay)} if replay else {}), "run": str(path)}
    notes = tokenizer_notes(data.tokenizer) if is_first and not resumed else []
    return ReadyRun(spec, data, loaded, run, trace, facts, [*warnings, *changes] if is_first else [], notes)


def default_folder(config: AnyConfig) -> Path:
    """Return `runs/<config name>`. Raises RunError: the config has no file, and so no name."""
    if not isinstance(config, str | Path):
        raise RunError("the run has no folder; got a config without a file; expected a folder for it. Set `out`.")
    return Path("runs") / Path(config).stem


def quiet_data(on_message: Message) -> Prepare:
    """Return a function that prepares data without showing progress; `on_message` takes lines for the user."""

    def prepare(config: Config, where: str, tokenizer: Tokenizer | None) -> PreparedData:
        length = config.training.sequence_length
        return prepare_data(config.data, length, where=where, tokenizer=tokenizer, on_message=on_message)

    return prepare


_silent = quiet_data(lambda _: None)


def _prepared(
    prepare: Prepare, config: Config, where: str, tokenizer: Tokenizer | None, *, resumed: bool
) -> PreparedData:
    """Prepare the data; characters that the tokenizer of a run to resume lacks mean that the data has changed."""
    try:
        return prepare(config, where, tokenizer)
    except TokenizerError as error:
        raise vocabulary_error(error) if resumed and isinstance(tokenizer, CharacterTokenizer) else error from None
