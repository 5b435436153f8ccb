"""The protocol between core and a backend: training, generation, evaluation and parity use a backend through it alone.

Read it in this order: `Backend` builds a `Model`; a `Model` does inference (`forward`, `score`, `start_generation`),
training (`start_training`, `train_step`) and export. The dataclasses are their results.

Conventions. Arrays cross the protocol as NumPy arrays, and parameters as dicts keyed by canonical name
(`core/parameters`). Tokens are int32; B is sequences, T tokens per sequence, V the vocabulary, E experts, K experts
per token. `Pending...` objects are asynchronous results: the device keeps working until one of them is fetched.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moezoo.core.config.optimizers import OptimizerConfig
from moezoo.core.config.training import Layers, Rematerialize
from moezoo.core.distributed.mesh import Devices
from moezoo.core.distributed.processes import PendingNumbers, Processes
from moezoo.core.errors import DataError
from moezoo.core.layer_routing import LayerRouting
from moezoo.core.random import Bits
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.reuse import NO_REUSE, Reuse
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import Counts, ExpertMasks, Floats, Integers


def check_length(spec: ModelSpec, length: int, got: str) -> None:
    """Check that the model has positions for sequences of `length` tokens; `got` describes the input in the error.

    The number of positions is limited by a table of learned positions, or by RoPE scaling for a fixed length. Call
    this before passing tokens to a model. Trap: for a row beyond the end of a table, JAX returns the last row and MLX
    reads unrelated memory.

    Raises DataError: the sequence is too long.
    """
    if spec.max_length is not None and length > spec.max_length:
        scaled = spec.max_length_field.endswith("scaling.length")
        advice = "Use fewer tokens, or load the model with a larger max_length" if scaled else "Use fewer tokens"
        raise DataError(
            f"sequence too long; got {got}; expected at most {spec.max_length} tokens ({spec.max_length_field}). "
            f"{advice}."
        )


def checked_tokens(spec: ModelSpec, tokens: Integers, name: str, lowest: int = 0) -> Integers:
    """Return tokens [B, T] as int32. `name`: names them in errors. `lowest`: the least id that is allowed.

    Raises DataError: a token outside the vocabulary, not two dimensions, or more tokens than positions.
    """
    try:
        array = np.asarray(tokens)
    except ValueError:  # NumPy's, for rows of unequal length
        array = np.asarray(tokens, object)
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{name} is {array.dtype} {list(array.shape)}; expected integers [B, T], B and T >= 1.")
    if array.min() < lowest or array.max() >= spec.vocab:
        worst = array.min() if array.min() < lowest else array.max()
        raise DataError(f"{name} has token {worst}; expected {lowest} <= token < {spec.vocab} (vocab_size).")
    check_length(spec, array.shape[1], f"{name} of length {array.shape[1]}")
    return array.astype(np.int32)


@dataclass(frozen=True)
class Output:
    """Result of `Model.forward`.

    Fields:
        logits: float32 [B, T, V].
        routing: one LayerRouting per MoE layer.
        losses: every loss term by name; empty without targets.
        intermediates: named intermediates in the order of the forward pass; empty unless recorded.
    """

    logits: Floats
    routing: list[LayerRouting]
    losses: dict[str, float] = field(default_factory=dict)
    intermediates: dict[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class StepMetrics:
    """Measurements of one training step, taken before its update unless noted.

    Fields:
        losses: every loss term by name, mean over the micro-batches.
        gradient_norm: global norm before clipping.
        load: per MoE layer, int64 [E]: assignments to each expert in the global step, before capacity drops any.
        dropped: per MoE layer, number of assignments beyond an expert's capacity.
        state: by canonical name, the router state that the step updated without a gradient; values after the step.
    """

    losses: dict[str, float]
    gradient_norm: float
    load: list[Counts]
    dropped: list[int]
    state: dict[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Result of `Model.score`.

    Fields:
        token_losses: [B, T], cross-entropy of each target in nats; 0 where the target is IGNORED.
        load, dropped: as in StepMetrics.
        routing: one LayerRouting per MoE layer; empty unless asked for.
    """

    token_losses: Floats
    load: list[Counts]
    dropped: list[int]
    routing: list[LayerRouting] = field(default_factory=list)


class PendingStep(Protocol):
    """Asynchronous result of a training step."""

    def fetch(self) -> StepMetrics:
        """Wait for the metrics and return them."""


class PendingTokens(Protocol):
    """Asynchronous result of a decoding step: one token of each sequence."""

    def fetch(self) -> Integers:
        """Wait for the tokens and return them: int32 [B]. Raises DataError for logits that cannot be sampled from."""

    def logits(self) -> Floats:
        """Wait for the model's logits at the place of these tokens, without any penalty: float32 [B, V]."""


class PendingFiles(Protocol):
    """Asynchronous write of arrays to files."""

    def finish(self) -> None:
        """Wait until every process has written its files. Raises RunError where one of them failed."""


class Generation(Protocol):
    """A batch of sequences with their caches on the device, extended one token at a time."""

    def reusable(self, length: int) -> int:
        """Return after how many tokens, at most `length`, another generation may start with these caches."""

    def next(self) -> PendingTokens:
        """Start computing the next token of each sequence. The previous tokens need not have been fetched."""


class Model(Protocol):
    """A built model with its parameters on the device. `train_step` updates them in place."""

    spec: ModelSpec

    def forward(
        self,
        tokens: Integers,
        targets: Integers | None = None,
        *,
        forced: Sequence[Integers] | None = None,
        masks: Sequence[ExpertMasks] | None = None,
        record: bool = False,
        key: Bits | None = None,
        inference: bool = False,
        documents: Integers | None = None,
    ) -> Output:
        """Run the forward pass on tokens [B, T]; with targets [B, T], compute every loss term.

        Args:
            tokens, targets: int32; a target may be IGNORED.
            forced: forced routing: experts int32 [B, T, K] per MoE layer: UNUSED (-1) in an unused slot, and
                NOT_REPLAYED (-2) in all slots of a token that is routed freely.
            masks: experts that each sequence does without, for each MoE layer (`interventions.masks`). Forced routing
                does not heed excluded ones.
            record: return named intermediates too.
            key: uint32 [2], the key of a training step, for router noise and dropout; None: neither.
            inference: use inference routing (no capacity, causal), as generation does.
            documents: int32 [B, T], ids of the documents that sequences are packed with, ascending along each, then
                PADDING: no token sees one of another document. None: a sequence is one document.

        Raises DataError: targets that are all IGNORED, or an IGNORED token beside targets; document ids in disorder.
        """
        ...

    def score(
        self,
        tokens: Integers,
        targets: Integers,
        *,
        inference: bool = False,
        documents: Integers | None = None,
        forced: Sequence[Integers] | None = None,
        masks: Sequence[ExpertMasks] | None = None,
        routing: bool = False,
    ) -> Scores:
        """Compute the loss of every target token, without noise and without returning logits.

        `inference`, `documents`, `forced`, `masks`: as in `forward`. `routing`: return the routing of every MoE layer
        too. With several processes, each passes the whole batch and gets the whole result.
        """
        ...

    def loss_and_gradients(
        self,
        tokens: Integers,
        targets: Integers,
        *,
        forced: Sequence[Integers] | None = None,
        key: Bits | None = None,
        trained: Collection[str] | None = None,
        documents: Integers | None = None,
    ) -> tuple[dict[str, float], dict[str, Floats]]:
        """Return every loss term, and the gradient of `loss` by canonical name of each trained parameter.

        `trained` as in `start_training`; other arguments and errors as in `forward`.
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
        trained: Collection[str] | None = None,
    ) -> None:
        """Create the optimizer and prepare the training step.

        Args:
            config: AdamW, gradient clipping and weight decay.
            state: optimizer moments to resume from, as `export_optimizer` returned them; None: zero moments.
            update: number of updates that these moments have seen.
            rematerialize: activations to recompute in the backward pass: `none`, those of the `experts`, or of every
                `block` (activation checkpointing).
            layers: `scanned` compiles equal layers once (TrainingConfig).
            trained: names of the parameters that are trained (`core.parameters.trained`); None: all. The others are
                frozen: they have no gradient and no moments, and frozen routers keep their state.

        Raises TrainingError: a parameter is not float32, or the backend does not support an option. Raises SpecError:
        `scanned` for a model without two equal layers.
        """
        ...

    def own_sequences(self, batch: int) -> Counts:
        """Return the indices of this process's sequences in a micro-batch of B: int64 [b], ascending.

        With one process: all. Raises SpecError where B is not divisible.
        """
        ...

    def train_step(
        self,
        windows: Integers,
        learning_rate: float,
        keys: Bits | None = None,
        targets: Integers | None = None,
        documents: Integers | None = None,
        forced: Sequence[Integers] | None = None,
    ) -> PendingStep:
        """Do one update on windows int32 [A, B, T + 1]: A micro-batches of B sequences, inputs and next tokens.

        The cross-entropy is the mean over all targets of the step that are not IGNORED, however they are divided into
        micro-batches; auxiliary losses are the mean over micro-batches. Router state is updated once, from all.

        With several processes, each passes its own sequences, [A, b, T + 1] (`own_sequences`). Gradients and
        StepMetrics are those of the global batch, and equal in every process.

        Args:
            windows: inputs are `[..., :-1]`. Only the last column may be IGNORED.
            learning_rate: of this update.
            keys: uint32 [A, 2], the key of each micro-batch; None: no noise.
            targets: int32 [A, B, T], any of which may be IGNORED; None: `windows[..., 1:]`.
            documents: int32 [A, B, T], as in `forward`.
            forced: experts int32 [A, B, T, K] per MoE layer, as in `forward`. Routers keep their gradient.

        Raises DataError: all targets of the step are IGNORED. With several processes the loss is NaN then
        (`core.training.batches` refuses such a step), and one whose own targets are all IGNORED contributes nothing.
        """
        ...

    def start_generation(
        self, prompts: Sequence[Integers], new_tokens: int, options: SamplingOptions, reuse: Reuse = NO_REUSE
    ) -> "Generation":
        """Start generation from B prompts, int32 of any lengths >= 1, for at most `new_tokens` calls of `next`.

        Row b gets the tokens that `core.reference.sampling.sample` draws for sequence b from its logits: they do not
        depend on the other rows of the batch. `reuse`: caches of a generation before, for a single prompt.
        """
        ...

    def prefill(self, tokens: Integers, size: int) -> tuple[Floats, Any]:
        """Return logits [B, V] after the last token of [B, T], and a KV cache with capacity for `size` tokens in total.

        For custom decoding and for comparing logits; `start_generation` keeps the logits on the device.
        """
        ...

    def decode(self, tokens: Integers, cache: Any) -> tuple[Floats, Any]:
        """Return logits [B, V] after one more token [B] per sequence, and the extended cache."""
        ...

    def wait(self) -> None:
        """Block until the device has finished every step started so far, including its update."""
        ...

    def nonfinite_parameters(self) -> list[str]:
        """Return the names of parameters and state with a NaN or infinite value, in parameter-table order."""
        ...

    def checkpoint_writer(self, names: Collection[str] | None = None) -> Callable[[Path], PendingFiles] | None:
        """Return a function that starts writing arrays into a new folder, for `checkpoint.sharded_tensors` to read.

        `names`: as in `export_parameters`; all moments are written.

        None if this process holds all arrays: then use `export_parameters` and `export_optimizer`. With several
        processes, each writes its own shards and all must call it. Training may continue while files are written.
        """
        ...

    def export_parameters(self, names: Collection[str] | None = None) -> Mapping[str, Floats]:
        """Return parameters and state by canonical name in the dtype they were built with; None: all of them.

        If some are in codes, a lazy mapping that decodes them one at a time, with its own `stored`.
        """
        ...

    def set_parameters(self, values: Mapping[str, Floats]) -> None:
        """Replace parameters, those of an adapter for instance, by values of the same shapes."""
        ...

    def export_optimizer(self) -> dict[str, Floats]:
        """Return `first_moment.<name>` and `second_moment.<name>` of every trained parameter."""
        ...


class MoELayer(Protocol):
    """A single MoE layer on B sequences of T tokens, for benchmarks. Results are on the device and already computed."""

    def array(self, values: Floats | Integers) -> Any:
        """Copy values to the device."""
        ...

    def forward(self, x: Any, token: Any) -> Any:
        """Return the layer's output [B, T, D] for activations float32 [B, T, D].

        `token`: int32 [B, T], read by a hash router only.
        """
        ...

    def gradients(self, x: Any, token: Any, gradient: Any) -> tuple[Any, dict[str, Any]]:
        """Run the backward pass: from the output gradient [B, T, D], return that of `x` and of each trained parameter.

        Parameters are keyed by canonical name.
        """
        ...


class Backend(Protocol):
    """A framework that implements specs."""

    name: str

    @property
    def processes(self) -> Processes:
        """Number of processes that share a batch, and the index of this one."""
        ...

    def devices(self) -> Devices:
        """Return the devices that share a training step. Raises SpecError: the mesh does not have as many."""
        ...

    def gather(self, number: int) -> PendingNumbers:
        """All-gather one number per process. All must call, in the same order. Does not wait for training steps."""
        ...

    def leave(self) -> None:
        """Leave the process group once all processes have called this. Do not compute afterwards."""
        ...

    def build(self, spec: ModelSpec, weights: Mapping[str, Floats]) -> Model:
        """Build a model from weights by canonical name, each kept in its dtype (`core/parameters/precision.py`).

        Weights are read one at a time, so `weights` may be a lazy mapping of a checkpoint.

        Raises CheckpointError: names or shapes (`shapes_of`) differ from the parameter table.
        """
        ...

    def moe_layer(self, spec: ModelSpec, layer: int, weights: Mapping[str, Floats]) -> MoELayer:
        """Build the MoE layer of layer `layer` alone, from its weights by canonical name."""
        ...

    def facts(self) -> dict[str, str]:
        """Return facts for a run's header by name: device, implementation of the experts, mesh, caches."""
        ...
