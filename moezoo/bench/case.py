"""Benchmark cases as data: a workload that every contender runs and for which the hardware limit is computed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from moezoo.core.config.optimizers import AdamWConfig
from moezoo.core.config.run_config import Config, dump_config, parse_config
from moezoo.core.errors import SpecError
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import Floats, Integers

Kind = Literal["train", "forward", "gradients", "decode"]

Work = Callable[[int], float]
"""Function that runs a number of units, waits until they are done, and returns the seconds."""


@dataclass(frozen=True)
class Case:
    """One workload to benchmark.

    Fields:
        label: unique name among the cases of a mode.
        kind: `train`, a whole training step; `forward` and `gradients` of the model's first MoE layer alone, the latter
            with the forward pass and the gradients of its input and all its weights; `decode`, one more token for each
            sequence of a batch, with greedy decoding.
        config: the model, and batch size and sequence length of all kinds except `decode`.
        batch: for `decode`: number of sequences.
        context: for `decode`: number of prompt tokens of each sequence.
        new_tokens: for `decode`: number of generated tokens; the first, from the prefill, is not timed.
        bits: for `decode`: width of affine codes in groups of 64, routers 8; 0: weights in float32.
    """

    label: str
    kind: Kind
    config: Config
    batch: int = 0
    context: int = 0
    new_tokens: int = 0
    bits: int = 0

    @property
    def spec(self) -> ModelSpec:
        """Spec of the model."""
        return self.config.model

    @property
    def adamw(self) -> AdamWConfig:
        """The optimizer of every peer. Raises SpecError: the config has another one."""
        optimizer = self.config.optimizer
        if not isinstance(optimizer, AdamWConfig):
            raise SpecError(
                f"optimizer.kind is {optimizer.kind}; expected adamw, which every peer has. Time moezoo alone, or use "
                "adamw."
            )
        return optimizer

    @property
    def tokens(self) -> int:
        """Number of tokens per unit: of a step, of a pass, or one for each sequence."""
        if self.kind == "decode":
            return self.batch
        return self.config.training.batch_size * self.config.training.sequence_length

    def to_json(self) -> dict[str, Any]:
        """Return JSON data from which `from_json` creates an equal case."""
        return {**vars(self), "config": dump_config(self.config)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Case":
        """Create the case from the data of `to_json`."""
        return Case(**{**values, "config": parse_config(values["config"])})


class Contender(Protocol):
    """Interface of a contender in its process. Its constructor imports the framework."""

    def facts(self) -> dict[str, str]:
        """Return versions, device and compute paths."""
        ...

    def prepare(self, case: Case) -> Work:
        """Build the model and return a function that runs the case. Its first call may compile."""
        ...


def random_windows(case: Case, count: int = 8) -> Integers:
    """Return uniform random tokens for `count` training steps, int32 [count, A, B, T + 1], equal for all contenders.

    With uniform tokens, the experts of an untrained router have about equal load, like those of a balanced model.
    """
    training = case.config.training
    parts = training.gradient_accumulation
    shape = (count, parts, training.batch_size // parts, training.sequence_length + 1)
    return np.random.default_rng(0).integers(0, case.spec.vocab, shape, dtype=np.int32)


def random_prompts(case: Case) -> Integers:
    """Return uniform random prompts, int32 [batch, context]."""
    return np.random.default_rng(1).integers(0, case.spec.vocab, (case.batch, case.context), dtype=np.int32)


def random_activations(case: Case, seed: int) -> Floats:
    """Return standard normal activations, like the output of a norm, float32 [B, T, D]."""
    training = case.config.training
    shape = (training.batch_size, training.sequence_length, case.spec.embed_dim)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
