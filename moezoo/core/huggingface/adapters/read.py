"""Read an adapter folder of mlx-lm, PEFT or vLLM. Every name, shape and number is checked before it is used."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.core.checkpoint.safetensors_file import SafetensorsFile
from moezoo.core.errors import CheckpointError, MoezooError, SpecError
from moezoo.core.huggingface.adapters.matrices import FACTORS, Array, StoredMatrix
from moezoo.core.huggingface.adapters.naming import every_matrix, named_matrices
from moezoo.core.huggingface.adapters.peft_config import PeftConfig, read_peft_config
from moezoo.core.huggingface.folder import ADAPTERS, inside, read_json_object
from moezoo.core.huggingface.layout import Description
from moezoo.core.parameters import Parameter, parameter_table
from moezoo.core.parameters.initialize import initial_value
from moezoo.core.parameters.trained import trainable_role
from moezoo.core.spec import ModelSpec

CONFIG, PEFT_FILE, MLX_FILE = ADAPTERS

_MLX_NAME = re.compile(r"(.+)\.(lora_a|lora_b)")
_PEFT_NAME = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter that was read.

    Fields:
        spec: the base model with the adapter.
        weights: the factors by canonical name, float32.
        notes: one-line notes for the user.
    """

    spec: ModelSpec
    weights: dict[str, Array]
    notes: list[str]


def is_adapter(path: str | Path) -> bool:
    """Return True if a path looks like an adapter folder of another tool."""
    return (Path(path) / CONFIG).is_file()


def read_adapter(path: Path, description: Description) -> ReadAdapter:
    """Read an adapter for a base model, which `description` describes, without adapter.

    The result has one rank, scale, and set of roles: of other matrices of these roles B is zero; a smaller rank is
    filled with zeros, and another scale is multiplied into B.

    Raises CheckpointError: a kind of adapter that is not supported; files that are damaged or do not fit the model.
    """
    fields = read_json_object(inside(path, CONFIG))
    if "peft_type" in fields:
        config = read_peft_config(fields, path / CONFIG)
        found = _peft_factors(path, config, description)
    else:
        scale = _mlx_scale(fields, path / CONFIG)
        named = {matrix.module: matrix for matrix in named_matrices(description, "mlx").values()}
        found = [(matrix, a, b, scale) for matrix, a, b in _pairs(path / MLX_FILE, named, _MLX_NAME, _mlx_order)]
    if not found:
        raise CheckpointError(f"{path} has no tensors of an adapter; expected lora_a and lora_b. Fetch it again.")
    return _assembled(path, found, description.spec)


# --- tensors ---------------------------------------------------------------------------------------------------------

Factors = tuple[StoredMatrix, Array, Array, float]


def _pairs(path: Path, named: Mapping[str, StoredMatrix], pattern: re.Pattern[str], order: Any) -> Iterator[Any]:
    """Yield each matrix of a file with A [*stack, R, in] and B [*stack, out, R], checked."""
    file = SafetensorsFile(inside(path.parent, path.name))
    entries: dict[str, dict[str, str]] = {}
    for name in file.entries:
        match = pattern.fullmatch(name)
        module = None if match is None else match[1]
        if match is None or module not in named:
            raise CheckpointError(
                f"{path} has {name!r:.120}, which is no factor of a matrix of this model. Use the adapter's own base."
            )
        entries.setdefault(match[1], {})[match[2].lower()[-1]] = name
    for module, own in entries.items():
        matrix = named[module]
        if own.keys() != {"a", "b"}:
            raise CheckpointError(f"{path} has {next(iter(own.values()))!r:.120} without its other factor.")
        shapes = [file.entries[own[which]].shape for which in "ab"]
        dtypes = {file.entries[name].dtype for name in own.values()}
        stack, inputs, outputs = matrix.sizes
        expected, to_ours = order(stack, inputs, outputs, shapes[0])
        if expected is None or [tuple(shape) for shape in shapes] != expected or not dtypes <= set(_FLOATS):
            raise CheckpointError(
                f"{path} has {own['a']!r:.120} {list(shapes[0])} and lora_b {list(shapes[1])} of {sorted(dtypes)}; "
                f"expected floats for a matrix from {inputs} to {outputs}"
                f"{f' of {stack[0]} experts' if stack else ''}. Use the adapter's own base."
            )
        a, b = to_ours(*(np.asarray(file.read(own[which]), np.float32) for which in "ab"))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise CheckpointError(f"{path}: {own['a']!r:.120} or its other factor has NaN or infinity. Fetch it again.")
        yield matrix, a, b


def _mlx_order(stack: tuple[int, ...], inputs: int, outputs: int, shape: tuple[int, ...]) -> Any:
    """Return the shapes that mlx-lm's factors must have, and a function that orders them as A and B."""
    if len(shape) != 2 + len(stack):
        return None, None
    if stack:
        rank = shape[1]
        return [(*stack, rank, inputs), (*stack, outputs, rank)], lambda a, b: (a, b)
    return [(inputs, shape[1]), (shape[1], outputs)], lambda a, b: (a.T, b.T)


def _peft_order(stack: tuple[int, ...], inputs: int, outputs: int, shape: tuple[int, ...]) -> Any:
    """Return the shapes that PEFT's factors must have, and a function that orders them as A and B."""
    experts = math.prod(stack)
    if len(shape) != 2 or shape[0] % experts:
        return None, None
    rank = shape[0] // experts

    def ordered(a: Array, b: Array) -> tuple[Array, Array]:
        own = np.moveaxis(b.reshape(outputs, rank, *stack), -1, 0) if stack else b
        return a.reshape(*stack, rank, inputs), own

    return [(shape[0], inputs), (outputs, shape[0])], ordered


def _peft_factors(path: Path, config: PeftConfig, description: Description) -> list[Factors]:
    every = {matrix.name: matrix for matrix in every_matrix(description)}
    named = {matrix.module: matrix for matrix in every.values() if not matrix.is_stacked}
    wrapped: dict[str, list[StoredMatrix]] = {}
    for matrix in every.values():
        if matrix.is_stacked and config.targets(matrix.name):
            wrapped.setdefault(matrix.name.rpartition(".")[0], []).append(matrix)
    for module, matrices in wrapped.items():  # the last parameter of a module has the outermost wrapper
        ordered = sorted(matrices, key=lambda matrix: ("down" in matrix.name, matrix.name))
        named |= {module + ".base_layer" * depth: matrix for depth, matrix in enumerate(reversed(ordered))}
    tied_embedding = description.family.tensors[0].theirs.removesuffix(".weight")
    found = []
    for matrix, a, b in _pairs(path / PEFT_FILE, named, _PEFT_NAME, _peft_order):
        if matrix.module == tied_embedding and description.spec.head.kind == "tied":
            raise CheckpointError(
                f"{path} adapts the embedding, but not the head, which is the same matrix here (tied); expected an "
                "adapter without it. Untie the base model's head first."
            )
        found.append((matrix, a, b, config.scale(matrix.name, a.shape[-2])))
    return found


def _mlx_scale(fields: Mapping[str, Any], where: Path) -> float:
    kind, parameters = fields.get("fine_tune_type", "lora"), fields.get("lora_parameters")
    if kind != "lora":
        advice = "Fuse it into its base model (mlx_lm.fuse), and use the result."
        raise CheckpointError(f"{where} has fine_tune_type {kind!r:.80}; expected lora. {advice}")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or scale <= 0:
        raise CheckpointError(
            f"{where} has lora_parameters {parameters!r:.120}; expected a dict with a positive scale. Fetch it again."
        )
    return float(scale)


# --- the whole adapter -----------------------------------------------------------------------------------------------


def _assembled(path: Path, found: list[Factors], spec: ModelSpec) -> ReadAdapter:
    """Return factors of one rank and scale for every matrix of the roles that the adapter is on."""
    own: dict[str, dict[int | None, tuple[Array, Array, float]]] = {}
    for matrix, a, b, scale in found:
        for name, (our_a, our_b) in matrix.parts(a, b).items():
            own.setdefault(name, {})[matrix.expert] = (our_a, our_b, scale)
    rows = {row.name: row for row in parameter_table(spec)}
    stack_axes = {name: 0 if None not in each else _num_stack_axes(rows[name]) for name, each in own.items()}
    rank = max(b.shape[stack_axes[name]] for name, each in own.items() for _, b, _ in each.values())
    scale = found[0][3]
    layers = sorted({int(name.split(".")[1]) for name in own if name.startswith("layers.")})
    everywhere = not layers or layers == list(range(len(spec.all_layers)))
    adapter = {
        "rank": rank,
        "scale": scale,
        "on": list(dict.fromkeys(trainable_role(rows[name]) for name in own)),
        "layers": "all" if everywhere else layers,
    }
    try:
        adapted = ModelSpec.model_validate({**spec.model_dump(), "adapter": adapter})
        table = [row for row in parameter_table(adapted) if row.base is not None]
    except (ValueError, MoezooError) as error:
        raise SpecError(f"{path} does not fit the base model: {error}".partition("\n")[0]) from None
    weights: dict[str, Array] = {}
    for row in table:
        weights[row.name] = initial_value(row, 0) if row.name.endswith("lora_a") else np.zeros(row.shape, np.float32)
    for name, each in own.items():
        if f"{name}.lora_a" not in weights:
            raise CheckpointError(f"{path} adapts {name}, which moezoo does not adapt. Merge it with its own tool.")
        for expert, (a, b, its_scale) in each.items():
            _put(weights, name, expert, a, b * (its_scale / scale), stack_axes[name])
    zero = len({row.base for row in table}) - len(own)
    notes = [f"{zero} matrices of the roles {', '.join(adapter['on'])} have no adapter in {path}: theirs are zero"]
    return ReadAdapter(adapted, weights, notes if zero else [])


def _num_stack_axes(row: Parameter) -> int:
    return 0 if row.matrix is None else row.matrix.batch


def _put(weights: dict[str, Array], name: str, expert: int | None, a: Array, b: Array, stack_axes: int) -> None:
    """Write the factors of a matrix, or of one expert, into those of the whole adapter, whose rank may be larger."""
    rank = b.shape[stack_axes]
    of_a, of_b = (weights[f"{name}.{factor}"] for factor in FACTORS)
    if expert is not None:
        of_a, of_b = of_a[expert], of_b[expert]
    of_a[..., :rank], of_a[..., rank:] = a, 0
    of_b[(slice(None),) * stack_axes + (slice(rank),)] = b
