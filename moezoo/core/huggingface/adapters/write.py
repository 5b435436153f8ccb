"""Write an adapter as a folder that mlx-lm, PEFT or vLLM opens on the base model."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.core.checkpoint.safetensors_file import write_tensors
from moezoo.core.errors import SpecError
from moezoo.core.files import write_atomically
from moezoo.core.huggingface.adapters.matrices import FACTORS, Array, StoredMatrix
from moezoo.core.huggingface.adapters.naming import AdapterLayout, named_matrices
from moezoo.core.huggingface.folder import ADAPTERS
from moezoo.core.huggingface.layout import Description
from moezoo.core.spec import AdapterSpec, TiedHeadSpec

CONFIG, PEFT_FILE, MLX_FILE = ADAPTERS


def write_adapter(
    adapter: AdapterSpec,
    weights: Mapping[str, Array],
    description: Description,
    base: str,
    layout: AdapterLayout,
    folder: Path,
) -> list[str]:
    """Write an adapter into an existing folder, and return one-line notes for the user.

    Args:
        adapter: its rank, scale and layers.
        weights: the factors by canonical name.
        description: the base model, without adapter.
        base: path or hub id of the base model, for the config.
        layout: whose folder it is.
        folder: an existing folder.

    Raises SpecError: the layout has no place for a factor.
    """
    matrices = named_matrices(description, layout)
    found = {matrix: both for matrix in matrices.values() if (both := matrix.factors(weights)) is not None}
    _check_complete(weights, found, description, layout)
    ranks = {matrix.name: a.shape[-2] for matrix, (a, _) in found.items()}
    if layout == "mlx" or layout == "vllm":  # one rank for all
        rank = max(ranks.values())
        found = {matrix: _padded(a, b, rank) for matrix, (a, b) in found.items()}
    else:
        rank = adapter.rank
    if layout == "mlx":
        tensors = _mlx_tensors(found)
        config = _mlx_config(adapter, rank, found, base)
        write_tensors(folder / MLX_FILE, tensors, {"format": "mlx"})
    else:
        tensors, wrapped = _peft_tensors(found)
        # Routers of transformers 5 are modules of their own kind, which PEFT adapts as plain parameters.
        routers = [matrix.name for matrix in found if matrix.rows[0].role == "router"]
        targets = {*wrapped, *(routers if layout == "peft-fused" else ())}
        own = {name: own for name, own in ranks.items() if own != rank} if layout != "vllm" else {}
        config = _peft_config(adapter, rank, own, found, targets, base)
        write_tensors(folder / PEFT_FILE, tensors, {"format": "pt"})
    write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return _notes(found, layout)


def _check_complete(
    weights: Mapping[str, Array],
    found: Iterable[StoredMatrix],
    description: Description,
    layout: AdapterLayout,
) -> None:
    written = {row.name for matrix in found for row in matrix.rows}
    missing = [name for name in weights if name.rpartition(".")[0] not in written]
    if missing:
        raise SpecError(
            f"the layout {layout} of {description.family.name} has no module for {missing[0]}; expected a matrix that "
            "is one there too. Leave its role out of adapter.on, or merge the adapter (--merge)."
        )
    tied = isinstance(description.spec.head, TiedHeadSpec) and "embedding.weight.lora_a" in weights
    if tied and layout != "mlx":
        raise SpecError(
            "the adapter is on the embedding, which is the head too (tied); PEFT and vLLM would adapt the embedding "
            "alone. Use --adapter mlx, or merge it (--merge)."
        )


def _padded(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """Return the factors with zeros up to a rank: the same product."""
    more, stack = rank - a.shape[-2], [(0, 0)] * (a.ndim - 2)
    return np.pad(a, [*stack, (0, more), (0, 0)]), np.pad(b, [*stack, (0, 0), (0, more)])


# --- mlx-lm ----------------------------------------------------------------------------------------------------------


def _mlx_tensors(found: Mapping[StoredMatrix, tuple[Array, Array]]) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for matrix, (a, b) in found.items():
        values = (a, b) if matrix.is_stacked else (a.T, b.T)
        tensors |= {f"{matrix.module}.{factor}": value for factor, value in zip(FACTORS, values, strict=True)}
    return tensors


def _mlx_config(adapter: AdapterSpec, rank: int, found: Iterable[StoredMatrix], base: str) -> dict[str, Any]:
    """Return the config: modules by their path in a block for all blocks, else by their whole path."""
    everywhere = adapter.layers == "all"
    keys = {(_in_block(matrix.module) if everywhere else None) or matrix.module for matrix in found}
    parameters = {"rank": rank, "scale": adapter.scale, "dropout": adapter.dropout, "keys": sorted(keys)}
    return {"model": base, "fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}


def _in_block(module: str) -> str | None:
    """Return a module's path inside its block; None outside of blocks."""
    _, found, path = module.partition(".layers.")
    return path.partition(".")[2] if found else None


# --- PEFT and vLLM ---------------------------------------------------------------------------------------------------


def _peft_tensors(found: Mapping[StoredMatrix, tuple[Array, Array]]) -> tuple[dict[str, Array], set[str]]:
    """Return the tensors, and the names of the plain parameters that a wrapper of PEFT is on."""
    wrapped: dict[str, list[StoredMatrix]] = {}
    for matrix in found:
        if matrix.is_stacked:
            wrapped.setdefault(matrix.name.rpartition(".")[0], []).append(matrix)
    paths = {}
    for module, matrices in wrapped.items():  # PEFT wraps a module once per parameter, the last one outermost
        ordered = sorted(matrices, key=lambda matrix: ("down" in matrix.name, matrix.name))
        for depth, matrix in enumerate(reversed(ordered)):
            paths[matrix.name] = module + ".base_layer" * depth
    tensors = {}
    for matrix, (a, b) in found.items():
        path, names = paths.get(matrix.name, matrix.module), ("lora_A.weight", "lora_B.weight")
        if matrix.is_stacked:
            a, b = a.reshape(-1, a.shape[-1]), np.moveaxis(b, 0, -1).reshape(b.shape[1], -1)
        elif matrix.rows[0].name == "embedding.weight":
            names = ("lora_embedding_A", "lora_embedding_B")
        for name, value in zip(names, (a, b), strict=True):
            tensors[f"base_model.model.{path}.{name}"] = np.ascontiguousarray(value)
    return tensors, set(paths)


def _peft_config(
    adapter: AdapterSpec,
    rank: int,
    ranks: Mapping[str, int],
    found: Iterable[StoredMatrix],
    parameters: Collection[str],
    base: str,
) -> dict[str, Any]:
    """Return the config; `ranks`: of tensors with another one, `parameters`: tensors that PEFT wraps by themselves."""
    everywhere = adapter.layers == "all"

    def target(name: str) -> str:
        return (_in_block(name) if everywhere else None) or name

    modules = {matrix.module.rpartition(".")[2] for matrix in found if matrix.name not in parameters}
    patterns = {
        target(name if name in parameters else name.removesuffix(".weight")): own for name, own in ranks.items()
    }
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": adapter.scale * rank,
        "lora_dropout": 0.0 if parameters else adapter.dropout,
        "bias": "none",
        "target_modules": sorted(modules),
        "rank_pattern": patterns,
        "alpha_pattern": {path: adapter.scale * own for path, own in patterns.items()},
    }
    if parameters:
        config["target_parameters"] = sorted({target(name) for name in parameters})
    if adapter.layers != "all":
        config["layers_to_transform"] = list(adapter.layers)
    return config


def _notes(found: Iterable[StoredMatrix], layout: AdapterLayout) -> list[str]:
    modules = [matrix for matrix in found if matrix.expert is None and not matrix.is_stacked]
    roles = {row.role for matrix in modules for row in matrix.rows}
    if layout in ("peft", "peft-fused") and roles & {"feed-forward", "shared experts"}:
        return [
            "PEFT 0.21 with transformers 5 takes gate_proj, up_proj and down_proj outside of experts for those of "
            "experts, and leaves them unadapted; merge the adapter (--merge) for it"
        ]
    return []
