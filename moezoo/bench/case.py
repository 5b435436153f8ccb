"""What is timed, as data: one thing that every contender does and the limit is computed for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from moezoo.core.config.run_config import Config, dump_config, parse_config
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import Floats, Integers

Kind = Literal["train", "forward", "gradients", "decode"]

Work = Callable[[int], float]
"""Do so many units and wait until they are done; returns their seconds."""


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Fields:
        label: names it among those that are timed together.
        kind: `train`, a whole training step; `forward` and `gradients` of the model's first mixture alone, the latter
            with the forward pass and the gradients of its input and all its weights; `decode`, one more token for each
            sequence of a batch, greedily.
        config: the model, and the batch and sequence length of all kinds but `decode`.
        batch: of `decode`: sequences.
        context: of `decode`: tokens that each sequence has before.
        new_tokens: of `decode`: tokens that follow, and are timed but for the first, which comes from the prompt.
    """

    label: str
    kind: Kind
    config: Config
    batch: int = 0
    context: int = 0
    new_tokens: int = 0

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.config.model

    @property
    def tokens(self) -> int:
        """Tokens of one unit: of a step, of a pass, or one for each sequence."""
        if self.kind == "decode":
            return self.batch
        return self.config.training.batch_size * self.config.training.sequence_length

    def to_json(self) -> dict[str, Any]:
        """Plain data, of which `from_json` makes an equal case."""
        return {**vars(self), "config": dump_config(self.config)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Case":
        """The case that `to_json` was called on."""
        return Case(**{**values, "config": parse_config(values["config"])})


class Contender(Protocol):
    """What a contender does in its process. Making it imports its framework; each call builds what it needs."""

    def facts(self) -> dict[str, str]:
        """Versions, device and compute paths."""
        ...

    def prepare(self, case: Case) -> Work:
        """Build the model, and what repeats the case. Its first call may compile."""
        ...


def random_windows(case: Case, count: int = 8) -> Integers:
    """Uniform random tokens for `count` training steps, int32 [count, A, B, T + 1], the same for every contender.

    Uniform tokens load the experts of an untrained router about evenly, as a balanced model's are.
    """
    training = case.config.training
    parts = training.gradient_accumulation
    shape = (count, parts, training.batch_size // parts, training.sequence_length + 1)
    return np.random.default_rng(0).integers(0, case.spec.vocab, shape, dtype=np.int32)


def random_prompts(case: Case) -> Integers:
    """Uniform random prompts, int32 [batch, context]."""
    return np.random.default_rng(1).integers(0, case.spec.vocab, (case.batch, case.context), dtype=np.int32)


def random_activations(case: Case, seed: int) -> Floats:
    """Standard normal values as a layer sees them behind a norm, float32 [B, T, D]."""
    training = case.config.training
    shape = (training.batch_size, training.sequence_length, case.spec.embed_dim)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
