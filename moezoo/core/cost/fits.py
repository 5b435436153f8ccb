"""Checks that a model and a batch fit into memory, before anything is allocated.

Each check compares two numbers with the memory that is free. The least is what no backend can do without: it is refused
if it is more. The estimate is what the formulas expect: a warning, if it is more. Writing: writings/cost.md.
"""

import math
from dataclasses import dataclass

from moezoo.core.config.run_config import Config
from moezoo.core.cost.available import Available, available_memory
from moezoo.core.cost.memory import cache_bytes
from moezoo.core.cost.step_plan import memory_per_device
from moezoo.core.distributed.mesh import Devices
from moezoo.core.errors import OutOfMemoryError, check_count
from moezoo.core.parameters.precision import COMPUTE_BYTES, compute_dtype
from moezoo.core.parameters.trained import trained_rows
from moezoo.core.spec import ModelSpec

_FLOAT32_BYTES, _TOKEN_BYTES = 4, 4
_LOGITS_BYTES = 2**27  # of one batch, by default


def check_training(
    config: Config, devices: Devices, *, frozen_bytes: int | None = None, allow_overcommit: bool = False
) -> list[str]:
    """Check that a training step fits, by the formulas of `memory_per_device`. Return one-line warnings.

    The least is parameters and moments, the tokens of the batch, and the larger of these two: the gradients, if they
    are clipped together; or half of the activations that the backward pass needs and of the logits, as if only inputs
    of matrix products were saved. `frozen_bytes`: of parameters that are not trained, as they are stored (codes, for
    instance), in place of float32. `allow_overcommit`: warn where the error would be raised.

    Raises OutOfMemoryError: even the least is more than what is free. Raises SpecError: mesh, model and batch do not
    fit together.
    """
    training, shared = config.training, devices.local if devices.free_bytes is None else 1
    step = memory_per_device(config, devices.lengths)
    least = memory_per_device(config, devices.lengths, least=True)
    stored = least.parameters
    if frozen_bytes is not None:
        trained = sum(row.size for row in trained_rows(config.model, training.only))
        stored = _FLOAT32_BYTES * trained + frozen_bytes // math.prod(devices.lengths.values())
    state = stored + least.moments + least.state
    gradients = 0 if config.optimizer.clip_norm is None else least.gradients
    saved = (least.activations + least.logits) // 2
    windows = _TOKEN_BYTES * training.batch_size * (training.sequence_length + 1)
    of_batch = shared * (step.activations + step.logits) + windows
    advice = (
        "Use a smaller model, or shard it over more devices (mesh)"
        if state + gradients > saved
        else f"Use a smaller training.batch_size ({training.batch_size}) or sequence_length "
        f"({training.sequence_length}), or a larger gradient_accumulation ({training.gradient_accumulation})"
    )
    total = shared * (step.total - least.parameters + stored) + windows
    need = _Need(
        what="training",
        least=shared * (state + max(gradients, saved)) + windows,
        estimate=total,
        parts=f"parameters, gradients and moments {_text(total - of_batch)}, activations and logits {_text(of_batch)}",
        advice=advice,
    )
    return need.check(devices, allow_overcommit)


def check_weights(weight_bytes: int, devices: Devices, where: str, *, allow_overcommit: bool = False) -> list[str]:
    """Check that the weights of a model fit; arguments and errors as in `check_training`."""
    shared = 1 if devices.free_bytes is None else math.prod(devices.lengths.values())
    size = weight_bytes // shared
    need = _Need(where, size, size, "weights as they are stored", "Use a smaller model")
    return need.check(devices, allow_overcommit)


def check_generation(
    spec: ModelSpec,
    batch_size: int,
    length: int,
    new_tokens: int,
    devices: Devices,
    *,
    may_end: bool,
    allow_overcommit: bool = False,
) -> list[str]:
    """Check that the KV caches of a generation fit, beside weights that are already on the device.

    Args:
        spec: the model.
        batch_size: number of sequences.
        length: number of tokens of the longest prompt.
        new_tokens: number of new tokens, at most.
        devices: of the model.
        may_end: an end token may end it earlier; then only the caches of the prompts are needed for certain.
        allow_overcommit: as in `check_training`.
    """
    logits = _FLOAT32_BYTES * batch_size * spec.vocab
    estimate = batch_size * cache_bytes(spec, length + new_tokens) + logits
    need = _Need(
        "generation",
        batch_size * cache_bytes(spec, length) + logits if may_end else estimate,
        estimate,
        f"caches of {batch_size} x {length + new_tokens} tokens",
        "Use fewer new tokens, fewer samples or shorter prompts",
    )
    return need.check(devices, allow_overcommit)


def check_scoring(
    spec: ModelSpec, batch_size: int, length: int, devices: Devices, *, allow_overcommit: bool = False
) -> list[str]:
    """Check that the logits of a batch [B, T] fit, beside weights that are already on the device.

    The least is in the compute dtype, the estimate in float32. The rest is as in `check_training`.
    """
    logits = batch_size * length * spec.vocab
    need = _Need(
        "evaluation",
        COMPUTE_BYTES[compute_dtype(spec)] * logits,
        _FLOAT32_BYTES * logits,
        f"logits of {batch_size} x {length} tokens",
        "Use a smaller batch size or sequence length",
    )
    return need.check(devices, allow_overcommit)


def scoring_size(
    config: Config, vocab_size: int, num_tokens: int, length: int | None, batch_size: int | None
) -> tuple[int, int]:
    """Return length and number of the windows of a batch over a file of `num_tokens` tokens.

    Those given, or else those of training: windows no longer than the file, and not so many of them that their logits
    take more than 128 MiB in float32. Raises SpecError: one that is given is below 1.
    """
    for name, given in (("sequence_length", length), ("batch_size", batch_size)):
        check_count(name, given)
    length = length or max(1, min(config.training.sequence_length, num_tokens - 1))
    largest_batch = max(1, _LOGITS_BYTES // (_FLOAT32_BYTES * length * vocab_size))
    return length, batch_size or min(config.training.batch_size, largest_batch)


@dataclass(frozen=True)
class _Need:
    """Memory that is needed where the devices have theirs: on one device, or on the host for all of them together."""

    what: str
    least: int
    estimate: int
    parts: str
    advice: str

    def check(self, devices: Devices, allow_overcommit: bool) -> list[str]:
        free = _free(devices)
        if free is None or self.estimate <= free.bytes:
            return []
        short = self.least > free.bytes
        needed = f"at least {_text(self.least)}" if short else f"about {_text(self.estimate)}"
        message = f"{self.what} needs {needed} of memory ({self.parts}); got {_text(free.bytes)} ({free.limit})"
        if short and not allow_overcommit:
            raise OutOfMemoryError(
                f"{message}. {self.advice}; train, generate and eval try it all the same with --allow-overcommit "
                "(moezoo.load with allow_overcommit=True)."
            )
        return [f"{message}. If it runs out of memory: {self.advice[0].lower()}{self.advice[1:]}."]


def _free(devices: Devices) -> Available | None:
    if devices.free_bytes is not None:
        return Available(devices.free_bytes, "free memory of the device")
    return available_memory()


def _text(size: int) -> str:
    """Format in GiB, or in MiB below 1 GiB, without a decimal from 10 on."""
    value, unit = (size / 2**30, "GiB") if size >= 2**30 else (size / 2**20, "MiB")
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
