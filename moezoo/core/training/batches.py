"""Batches of a training run, read one step ahead if several processes must stop together when one cannot read on."""

import numpy as np
from numpy.typing import NDArray

from moezoo.core.config.training import TrainingConfig
from moezoo.core.data.batch import Batch, Positions
from moezoo.core.data.prepare import AnySplit
from moezoo.core.data.splits import Split
from moezoo.core.errors import DataError
from moezoo.core.tokens import IGNORED, Integers, targets_of, tokens_of
from moezoo.core.traces.replay import Replay


class Batches:
    """This process's part of each batch.

    Fields:
        failure: the error of a batch that was read ahead, which another process must learn of before its turn.
    """

    def __init__(
        self,
        split: AnySplit,
        training: TrainingConfig,
        own: NDArray[np.int64],
        *,
        ahead: bool,
        replay: Replay | None = None,
    ):
        """`own`: indices of this process's sequences in a micro-batch. `ahead`: there are several processes.

        `replay`: routing to force, by the place of a token in its source. Raises DataError: it is of other data.
        """
        if replay is not None:
            replay.check_sources(split.num_sources)
            _check_beginnings(replay, split, training.sequence_length)
        self._replay = replay
        self.failure: DataError | None = None
        self._split, self._training, self._own, self._ahead = split, training, own, ahead
        self._ready: dict[int, Batch] = {}

    def prepare(self, step: int) -> None:
        """Read a step's batch and the next one, if batches are read ahead; the error of the next one is kept.

        Raises DataError: the step's own batch cannot be read.
        """
        for number in range(step, min(step + 2, self._training.steps + 1)) if self._ahead else ():
            if number in self._ready or self.failure is not None:
                continue
            try:
                self._ready[number] = self._read(number)
            except DataError as error:
                if number == step:
                    raise
                self.failure = error

    def take(self, step: int) -> Batch:
        """Return the batch of a step, counted from 1. Raises DataError."""
        return self._ready.pop(step) if step in self._ready else self._read(step)

    def forced(self, step: int, batch: Batch) -> list[Integers] | None:
        """Return the experts to force in a step with this batch, [A, b, T, K] per MoE layer; None without a replay.

        Raises DataError: the trace has other tokens.
        """
        if self._replay is None:
            return None
        training, tokens = self._training, batch.windows[..., :-1]
        sizes = (training.batch_size, training.sequence_length, training.seed)
        positions = self._split.positions(step - 1, *sizes, self._own_rows())
        flat = self._replay.forced(positions, tokens.reshape(-1, tokens.shape[-1]))
        return [own.reshape(*tokens.shape, -1) for own in flat]

    def _own_rows(self) -> NDArray[np.int64]:
        """Return the rows of a step's batch that are this process's, by micro-batch."""
        micro_batches = self._training.gradient_accumulation
        offsets = np.arange(micro_batches) * (self._training.batch_size // micro_batches)
        return np.add.outer(offsets, self._own).ravel()

    def _read(self, step: int) -> Batch:
        training = self._training
        batch = self._rows(step, self._own_rows())
        # A process without targets reads the whole batch: others may have some, or else all find the same.
        if not (batch.targets != IGNORED).any() and not (self._rows(step).targets != IGNORED).any():
            raise DataError(
                f"step {step} has no targets: all {training.batch_size * training.sequence_length} tokens of its batch "
                f"are masked; expected at least one to train on; {self._split.source_names}. Use a larger "
                "training.batch_size or sequence_length, or shorter prompts."
            )
        return batch.by_micro_batch(training.gradient_accumulation)

    def _rows(self, step: int, rows: NDArray[np.int64] | None = None) -> Batch:
        """Read these rows of a step's batch; None: all."""
        training = self._training
        found = self._split.batch(step - 1, training.batch_size, training.sequence_length, training.seed, rows)
        return found if isinstance(found, Batch) else Batch(tokens_of(found), targets_of(found[..., 1:]))


def _check_beginnings(replay: Replay, split: AnySplit, length: int) -> None:
    """Raise DataError if a text does not begin as in the trace: few batches may have a token of a short trace."""
    for number, source in enumerate(split.sources if isinstance(split, Split) else ()):
        count = min(length, source.num_tokens)
        tokens = tokens_of(source.tokens.read(np.array([source.first]), count))
        replay.forced(Positions(np.array([number]), np.arange(count)[None]), tokens)
