"""The fields of PEFT's adapter_config.json that moezoo understands; any other that is set is refused by name."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moezoo.core.errors import CheckpointError

_ADVICE = "Merge it into its base model (PEFT's merge_and_unload), and use the result."

# Without effect on the result of a trained adapter, or read from the tensors.
_HARMLESS = (
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_core"),
    *("runtime_config", "ensure_weight_tying", "qalora_group_size", "eva_config"),
)
_WHOLE = ("gaussian", "eva", "orthogonal", "lora_ga")  # initializations that leave the base as it is


@dataclass(frozen=True)
class PeftConfig:
    """Rank, scale and targets of a LoRA adapter of PEFT.

    Fields:
        alpha: of modules that no pattern names.
        alphas: alpha by pattern.
        root: the scale is alpha / sqrt(rank), not alpha / rank (rank-stabilized LoRA).
        parameters: the plain parameters that it is on, by the ends of their paths.
    """

    alpha: float
    alphas: Mapping[str, float]
    root: bool
    parameters: tuple[str, ...]

    def scale(self, tensor: str, rank: int) -> float:
        """Return the scale of the adapter of a tensor, of which `rank` was read."""
        module = tensor.removesuffix(".weight")
        alpha = next((own for key, own in self.alphas.items() if _ends(module, key) or _ends(tensor, key)), self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)

    def targets(self, parameter: str) -> bool:
        """Return True if a plain parameter has an adapter; where no targets are listed, all may have."""
        named = self.parameters
        return not named or any(parameter == name or parameter.endswith(f".{name}") for name in named)


def read_peft_config(fields: Mapping[str, Any], where: Path) -> PeftConfig:
    """Parse the fields of a config. Raises CheckpointError that names the first one that is not supported."""
    known = dict(fields)
    kind = known.pop("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where} has peft_type {kind!r:.80}; expected LORA. {_ADVICE}")
    alpha, root = known.pop("lora_alpha", 8), known.pop("use_rslora", False)
    alphas = known.pop("alpha_pattern", None) or {}
    parameters = known.pop("target_parameters", None) or []
    start = known.pop("init_lora_weights", True)
    known.pop("rank_pattern", None)  # ranks are those of the tensors
    known.pop("r", None)
    if not (_is_positive(alpha) and isinstance(root, bool) and _are_alphas(alphas) and _are_names(parameters)):
        raise CheckpointError(
            f"{where} has lora_alpha {alpha!r:.40}, alpha_pattern {alphas!r:.80}, target_parameters "
            f"{parameters!r:.80}; expected positive numbers and names. Fetch it again."
        )
    if not isinstance(start, bool) and start not in _WHOLE:
        raise CheckpointError(f"{where} has init_lora_weights {start!r:.80}, which changes the base model. {_ADVICE}")
    if known.pop("bias", "none") != "none":
        raise CheckpointError(f"{where} has bias {fields['bias']!r:.80}; expected none. {_ADVICE}")
    for name, value in known.items():
        if name not in _HARMLESS and value:
            which = "DoRA" if name == "use_dora" else f"{name} {value!r:.80}"
            raise CheckpointError(f"{where} has {which}, which is not supported; expected plain LoRA. {_ADVICE}")
    expression = next((key for key in alphas if not re.fullmatch(r"[\w.]+", _plain(key))), None)
    if expression is not None:
        raise CheckpointError(
            f"{where} has {expression!r:.80} in alpha_pattern, an expression that is no module's name; expected names. "
            f"{_ADVICE}"
        )
    return PeftConfig(float(alpha), {_plain(key): float(own) for key, own in alphas.items()}, root, tuple(parameters))


def _plain(key: str) -> str:
    """Return the end of a module's path that a key of PEFT's patterns is, without what matches anything before it."""
    return key.removeprefix("^").removeprefix(".*").replace("\\.", ".").lstrip(".").removesuffix("$")


def _ends(path: str, key: str) -> bool:
    return path == key or path.endswith(f".{key}")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _are_alphas(value: object) -> bool:
    return isinstance(value, dict) and all(_is_positive(each) for each in value.values())


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
