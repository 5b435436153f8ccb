"""Aria, alone or inside its multimodal wrapper. Source: Rhymes AI 2024, arXiv 2410.05993; transformers, `aria`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import GatedFeedForwardSpec, ModelSpec, MoESpec, RouterSpec, SharedExpertsSpec


def spec(fields: Fields) -> ModelSpec:
    bias = fields.flag("attention_bias", False)
    attention = parts.attention(fields, parts.rope(fields), qkv_bias=bias, output_bias=bias)
    # The first files name the width of experts separately; transformers has it in intermediate_size.
    width = fields.count("moe_intermediate_size", fields.count("intermediate_size"))
    activation = parts.swiglu(fields, width).kind
    moe = MoESpec(
        num_experts=fields.count("moe_num_experts", 8),
        router=RouterSpec(
            top_k=fields.count("moe_topk", 2), score="none", weight="softmax_of_chosen", renormalize="none"
        ),
        experts=GatedFeedForwardSpec(hidden_dim=width),
        shared=SharedExpertsSpec(
            num_experts=fields.count("moe_num_shared_experts", 2),
            hidden_dim=width,
            bias=fields.flag("mlp_bias", False),
            # Trap: hidden_act is of the shared experts alone.
            activation=None if activation == "swiglu" else activation,
        ),
    )
    for loss in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):  # of the first files; transformers has no loss
        fields.only_in_training(loss)
    layers = [parts.layer(attention, moe)] * fields.count("num_hidden_layers")
    return parts.model(fields, layers, norm=parts.rms_norm(fields))


_THEIRS, _OURS = f"{LAYER}.mlp.experts", f"{OURS}.moe.experts"

FAMILY = Family(
    model_types=("aria_text", "aria", "aria_moe_lm"),
    architecture="AriaTextForCausalLM",
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.router(f"{LAYER}.mlp.router"),
        parts.gate_and_up(f"{_THEIRS}.fc1.weight", "e d x", _OURS),
        Tensor(f"{_THEIRS}.fc2.weight", "e f d", f"{_OURS}.w_down", "e f d"),
        parts.gate_and_up(f"{_THEIRS}.gate_up_proj", "e d x", _OURS),  # the names in transformers 5
        Tensor(f"{_THEIRS}.down_proj", "e f d", f"{_OURS}.w_down", "e f d"),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    kept=("*.rotary_emb.inv_freq", "*vision_tower.*", "*multi_modal_projector.*"),
    harmless=("max_position_embeddings",),
)
