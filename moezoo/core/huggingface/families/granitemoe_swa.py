"""Granite MoE with sliding windows and sinks. Source: IBM 2026, the released model; transformers, `granitemoe_swa`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.granitemoe import FAMILY as GRANITE
from moezoo.core.huggingface.families.granitemoe import MIXTURE, attention_options, granite
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import ModelSpec, NoPositionSpec, PositionSpec


def spec(fields: Fields) -> ModelSpec:
    number, options = fields.count("num_hidden_layers"), attention_options(fields)
    by_default = ["sliding_attention" if index % 4 else "full_attention" for index in range(number)]
    windows = parts.windows(fields, number, by_default, window=128)
    return granite(
        fields,
        [
            parts.attention(fields, position, window=window, sinks=True, **options)
            for position, window in zip(_positions(fields, number), windows, strict=True)
        ],
    )


def _positions(fields: Fields, num_layers: int) -> list[PositionSpec]:
    """Return the RoPE of each layer, with its own base in `layer_rope_theta`; 0 there means no position."""
    rope = parts.rope(fields)
    bases = fields.items("layer_rope_theta", num_layers, [rope.base] * num_layers)
    if any(type(base) not in (int, float) or not (base == 0 or base > 1) for base in bases):
        raise fields.refuse("layer_rope_theta", "numbers above 1, or 0")
    return [rope.model_copy(update={"base": float(base)}) if base else NoPositionSpec() for base in bases]


FAMILY = Family(
    model_types=("granitemoe_swa",),
    architecture="GraniteMoeSWAForCausalLM",
    spec=spec,
    tensors=(
        *parts.exported(
            GRANITE.tensors, (*parts.router(f"{MIXTURE}.router"), *parts.fused_experts(f"{MIXTURE}.experts"))
        ),
        Tensor(f"{LAYER}.self_attn.sinks", "n", f"{OURS}.attention.sink", "n"),
    ),
    kept=GRANITE.kept,
    harmless=GRANITE.harmless,
)
