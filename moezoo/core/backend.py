"""The one protocol between core and a backend. The train, generate and parity loops know only what stands here.

Arrays cross it as NumPy, parameters by canonical name. Tokens are int32; B sequences of T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moezoo.core.config.training import Layers, OptimizerConfig, Rematerialize
from moezoo.core.distributed.processes import PendingNumbers, Processes
from moezoo.core.errors import DataError
from moezoo.core.random import Bits
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import Floats, Integers


def check_length(spec: ModelSpec, length: int, got: str) -> None:
    """Raises DataError where the model has positions for fewer than `length` tokens; `got` says whose they are.

    Positions end where a learned table does, and where a rotation was stretched for texts of some length. Whoever hands
    tokens to a model asks this first. Trap: of a row that a table has not, JAX gives the last one and MLX stray memory.
    """
    if spec.max_length is not None and length > spec.max_length:
        stretched = spec.max_length_field.endswith("scaling.length")
        advice = "Use fewer, or load it for a larger max_length" if stretched else "Use fewer"
        raise DataError(f"positions end at {spec.max_length} tokens ({spec.max_length_field}); got {got}. {advice}.")


@dataclass(frozen=True)
class LayerRouting:
    """Routing of one MoE layer. Experts by descending weight, ties to the lower id, unused slots last.

    Fields:
        layer: index of the layer in the model.
        expert: int32 [B, T, K]; -1 in a slot that the router left unused.
        weight: float32 [B, T, K]; what multiplies each expert's output, 0 where a capacity dropped the token.
        score: float32 [B, T, E]; scores of all experts, those that compute nothing last.
    """

    layer: int
    expert: Integers
    weight: Floats
    score: Floats


def combine_weights(
    expert_PK: Integers, valid_PK: NDArray[np.bool_], kept_PK: NDArray[np.bool_], weight_PK: Floats
) -> tuple[Integers, Floats]:
    """Experts and weights [P, K] as a LayerRouting has them, from the slots of a routing and who of them is served."""
    weight_PK = np.where(kept_PK, weight_PK, np.zeros((), weight_PK.dtype))
    order_PK = np.lexsort((expert_PK, -weight_PK, ~valid_PK), axis=-1)
    expert_PK = np.where(valid_PK, expert_PK, -1).astype(np.int32)
    return np.take_along_axis(expert_PK, order_PK, axis=-1), np.take_along_axis(weight_PK, order_PK, axis=-1)


@dataclass(frozen=True)
class Output:
    """What `forward` gives: logits [B, T, V]; a LayerRouting per MoE layer; with targets, every loss term by name."""

    logits: Floats
    routing: list[LayerRouting]
    losses: dict[str, float] = field(default_factory=dict)
    intermediates: dict[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class StepMetrics:
    """What one training step measured, before its update.

    Fields:
        losses: every loss term by name, mean over the micro-batches.
        gradient_norm: global norm before clipping.
        load: per MoE layer, int64 [E]: tokens routed to each expert in the global step, before any is dropped.
        dropped: per MoE layer: routed copies that a capacity dropped.
        state: what the step changed without a gradient, by canonical name, after it.
    """

    losses: dict[str, float]
    gradient_norm: float
    load: list[NDArray[np.int64]]
    dropped: list[int]
    state: dict[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """What `score` gives: nats per target token [B, T], 0 if IGNORED, and load and drops as in StepMetrics."""

    token_losses: Floats
    load: list[NDArray[np.int64]]
    dropped: list[int]


class PendingStep(Protocol):
    """A step whose numbers may still be on their way; the device works on while the loop goes on."""

    def fetch(self) -> StepMetrics:
        """Wait for the numbers."""
        ...


class PendingTokens(Protocol):
    """One token of each sequence, which the device may still be computing."""

    def fetch(self) -> Integers:
        """Wait for them: int32 [B]. Raises DataError for logits from which nothing can be drawn."""
        ...


class PendingFiles(Protocol):
    """Arrays that are on their way into files."""

    def finish(self) -> None:
        """Return when all processes have written theirs. Raises RunError where one could not."""
        ...


class Generation(Protocol):
    """Sequences on the device, which grow by a token each."""

    def next(self) -> PendingTokens:
        """Begin to compute one more token of each sequence, from those before, which need not be fetched yet."""
        ...


class Model(Protocol):
    """A built model. Its parameters live on the device; `train_step` changes them."""

    spec: ModelSpec

    def forward(
        self,
        tokens: Integers,
        targets: Integers | None = None,
        *,
        forced: Sequence[Integers] | None = None,
        record: bool = False,
        key: Bits | None = None,
        inference: bool = False,
    ) -> Output:
        """Logits and routing; with targets, which may be IGNORED, every loss term.

        `forced`: experts [B, T, K] per MoE layer to use, -1 for an unused slot; `record`: named intermediates too;
        `key`: uint32 [2], the key of a training step, for noise and dropout; `inference`: route as generation does.
        """
        ...

    def score(self, tokens: Integers, targets: Integers, *, inference: bool = False) -> Scores:
        """Loss of every target token, 0 where it is IGNORED; without noise and without keeping logits.

        `inference` as in `forward`. Several processes all give the same whole batch, and all get all of it.
        """
        ...

    def loss_and_gradients(
        self,
        tokens: Integers,
        targets: Integers,
        *,
        forced: Sequence[Integers] | None = None,
        key: Bits | None = None,
    ) -> tuple[dict[str, float], dict[str, Floats]]:
        """Every loss term, and the gradient of `loss` by canonical name of every trained parameter.

        Raises DataError, as `forward` does, where all targets are IGNORED.
        """
        ...

    def start_training(
        self,
        config: OptimizerConfig,
        state: Mapping[str, Floats] | None = None,
        update: int = 0,
        *,
        rematerialize: Rematerialize = "none",
        layers: Layers = "unrolled",
    ) -> None:
        """Make the optimizer; with `state` and the number of updates done, as `export_optimizer` gave them.

        `rematerialize`: what is computed again on the way back, routed `experts` or every `block`; `layers`: `scanned`
        compiles equal layers once (TrainingConfig).

        Raises TrainingError where a parameter is not float32, or the backend does not realize an option; SpecError
        where layers are to be scanned and no two are equal.
        """
        ...

    def own_sequences(self, batch: int) -> NDArray[np.int64]:
        """Which of the B sequences of a micro-batch this process gives to `train_step`: int64 [b], rising.

        One process: all. Raises SpecError where they cannot be divided.
        """
        ...

    def train_step(self, windows: Integers, learning_rate: float, keys: Bits | None = None) -> PendingStep:
        """One update from windows int32 [A, B, T + 1]: A micro-batches of B sequences, with their next tokens.

        Of several processes each gives its own sequences, [A, b, T + 1]. What is computed, and all that StepMetrics
        tell, is of the whole batch, and is the same in every process.

        `keys`: uint32 [A, 2], the key of each micro-batch; None: no noise. State is updated once, from all of them.
        The loss is the mean over micro-batches of each one's own, however many of its targets count. The last column
        may be IGNORED. Raises DataError where all of a micro-batch's targets are.
        """
        ...

    def start_generation(self, prompts: Sequence[Integers], new_tokens: int, options: SamplingOptions) -> "Generation":
        """The next tokens of B prompts, int32 of any lengths from 1, of which at most `new_tokens` will be asked for.

        Row b gets the tokens that `core.sampling.sample` draws for sequence b of its logits, whoever else is there.
        """
        ...

    def prefill(self, tokens: Integers, size: int) -> tuple[Floats, Any]:
        """Logits [B, V] after the last token of [B, T], and a cache with room for `size` tokens in all.

        For whoever chooses tokens by another rule, or compares logits; `start_generation` keeps them on the device.
        """
        ...

    def decode(self, tokens: Integers, cache: Any) -> tuple[Floats, Any]:
        """Logits [B, V] after one more token [B] per sequence, and the longer cache."""
        ...

    def wait(self) -> None:
        """Return when the device has finished all steps that were started, their updates included."""
        ...

    def not_finite(self) -> list[str]:
        """The parameters and state that hold a number that is not finite, in the order of the parameter table."""
        ...

    def files_writer(self) -> Callable[[Path], PendingFiles] | None:
        """What begins to write all arrays into a new folder, as `core.sharded_tensors` reads them.

        None where this process has all of them: `export_parameters` and `export_optimizer` give them then. Of several
        processes each writes what is on its devices, and all must call. Training may go on at once.
        """
        ...

    def export_parameters(self) -> dict[str, Floats]:
        """Every parameter, trained or state, by canonical name and in the dtype that it was built with."""
        ...

    def export_optimizer(self) -> dict[str, Floats]:
        """`first_moment.<name>` and `second_moment.<name>` of every trained parameter."""
        ...


class Mixture(Protocol):
    """One mixture by itself, B sequences of T positions. What it computes is on the device, and finished."""

    def array(self, values: Floats | Integers) -> Any:
        """Values on the device."""
        ...

    def forward(self, x: Any, token: Any) -> Any:
        """What the mixture adds to activations float32 [B, T, D] of tokens int32 [B, T], which only a hash reads."""
        ...

    def gradients(self, x: Any, token: Any, gradient: Any) -> tuple[Any, dict[str, Any]]:
        """From the gradient [B, T, D] of what it adds: that of `x`, and of each trained parameter by canonical name."""
        ...


class Backend(Protocol):
    """A framework that realizes specs."""

    name: str

    @property
    def processes(self) -> Processes:
        """The processes that share a batch, and which of them this is."""
        ...

    def gather(self, number: int) -> PendingNumbers:
        """The numbers of all processes, each of which must ask, and in the same order. Does not wait for steps."""
        ...

    def leave(self) -> None:
        """Part from the other processes when all have come here; nothing is computed afterwards."""
        ...

    def build(self, spec: ModelSpec, weights: Mapping[str, Floats]) -> Model:
        """A model with these weights, each in its own dtype (`core/precision.py`), which are read one by one.

        Raises CheckpointError where names or shapes (`shapes_of`) differ from the parameter table.
        """
        ...

    def mixture(self, spec: ModelSpec, layer: int, weights: Mapping[str, Floats]) -> Mixture:
        """The mixture of layer `layer`, with its weights by canonical name."""
        ...

    def facts(self) -> dict[str, str]:
        """What a run's header says: device, compute path of the experts, and the like."""
        ...
