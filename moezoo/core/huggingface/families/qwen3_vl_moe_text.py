"""Qwen3-VL-MoE, text model: Qwen3-MoE inside a multimodal wrapper. Source: Qwen Team 2025, the released models;
transformers, `qwen3_vl_moe`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.qwen3_moe import FAMILY as QWEN3
from moezoo.core.huggingface.families.qwen3_moe import SHARED, multimodal_rope, qwen3
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import ModelSpec, TiedHeadSpec


def spec(fields: Fields) -> ModelSpec:
    fields.expect("norm_topk_prob", True)  # transformers ignores it, and divides by the sum
    position = multimodal_rope(fields, 5e5)
    return qwen3(fields, position, renormalize=True, kv_heads=16, num_experts=60, top_k=4)


def _mlx_config(spec: ModelSpec) -> dict[str, Any]:
    # Trap: of two `tie_word_embeddings`, transformers reads the outer one and mlx-lm that of the text model.
    return {"norm_topk_prob": True, "tie_word_embeddings": False}


def _mlx_refuses(spec: ModelSpec) -> str | None:
    return "its head is tied to the embedding" if isinstance(spec.head, TiedHeadSpec) else None


_THEIRS, _OURS = f"{LAYER}.mlp.experts", f"{OURS}.moe.experts"

FAMILY = Family(
    model_types=("qwen3_vl_moe_text", "qwen3_vl_moe"),
    architecture="Qwen3VLMoeForConditionalGeneration",
    spec=spec,
    tensors=(
        *SHARED,
        *parts.fused_experts(),  # as transformers saves them
        # As they are released. Of two rules for a tensor, the first that has its shape is used.
        parts.gate_and_up(f"{_THEIRS}.gate_up_proj", "e d x", _OURS),
        Tensor(f"{_THEIRS}.down_proj", "e f d", f"{_OURS}.w_down", "e f d"),
    ),
    mlx=parts.switch(),
    mlx_lm=MlxLM(config=_mlx_config, replaces=("tie_word_embeddings",), refuses=_mlx_refuses, wrapper="qwen3_vl_moe"),
    kept=("*.rotary_emb.inv_freq", "*visual.*"),
    harmless=QWEN3.harmless,
)
