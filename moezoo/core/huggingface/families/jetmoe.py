"""JetMoE: attention heads and feed-forwards as experts. Source: Shen et al. 2024, arXiv 2404.07413; transformers."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER
from moezoo.core.huggingface.tensors import Fused, Part, Tensor
from moezoo.core.spec import (
    GroupedQueryAttentionSpec,
    HeadRouterSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    NoAttentionSpec,
    PooledBalanceLossSpec,
    RMSNormSpec,
    RouterSpec,
)


def spec(fields: Fields) -> ModelSpec:
    """One of their layers is two of ours, of one router each."""
    experts, top_k = fields.count("num_local_experts", 8), fields.count("num_experts_per_tok", 2)
    kv_heads, name = fields.count("num_key_value_heads", 16), fields.either("kv_channels", "head_dim")
    fields.expect("num_attention_heads", kv_heads * top_k)  # heads of a token
    router = RouterSpec(top_k=top_k, weight="softmax_of_chosen", renormalize="none")
    coefficient = fields.number("aux_loss_coef", 0.01)
    losses = (PooledBalanceLossSpec(coefficient=coefficient),) if coefficient else ()
    attention = LayerSpec(
        attention=GroupedQueryAttentionSpec(
            num_heads=kv_heads * experts,
            num_kv_heads=kv_heads,
            head_dim=fields.count(name, 128),
            position=parts.rope(fields),
            output_bias=True,
        ),
        mixer_only=True,
        # Trap: transformers records the logits of these routers twice, and pools both.
        head_router=HeadRouterSpec(
            router=router, losses=tuple(loss.model_copy(update={"times": 2}) for loss in losses)
        ),
    )
    mixture = LayerSpec(
        attention=NoAttentionSpec(),
        moe=MoESpec(
            num_experts=experts,
            router=router,
            experts=parts.swiglu(fields, fields.count("intermediate_size", 5632), name="activation_function"),
            output_bias=True,
            losses=losses,
        ),
    )
    # Trap: rms_norm_eps is of the last norm only.
    last = parts.rms_norm(fields)
    found = parts.model(
        fields, [attention, mixture] * fields.count("num_hidden_layers", 12), norm=RMSNormSpec(epsilon=1e-6), tied=True
    )
    return found if last == found.norm else found.model_copy(update={"final_norm": last})


HEADS, MIXTURE = f"{LAYER}.self_attention", f"{LAYER}.mlp"
EVEN, ODD = "layers.{even}", "layers.{odd}"
OWN, EXPERTS = f"{EVEN}.attention", f"{ODD}.moe.experts"
KEYS = ((f"{OWN}.w_key", "d m h"),)

FAMILY = Family(
    model_types=("jetmoe",),
    architecture="JetMoeForCausalLM",
    spec=spec,
    tensors=(
        *parts.MODEL,
        Tensor(f"{LAYER}.input_layernorm.weight", "d", f"{EVEN}.attention_norm.scale", "d"),
        Tensor(f"{LAYER}.post_attention_layernorm.weight", "d", f"{ODD}.feed_forward_norm.scale", "d"),
        Fused(
            f"{HEADS}.kv_proj.weight",
            "x d",
            (Part(f"{OWN}.w_key", "m h", "d m h"), Part(f"{OWN}.w_value", "m h", "d m h")),
        ),
        Tensor(f"{HEADS}.experts.input_linear.weight", "g (m h) d", f"{OWN}.w_query", "d (m g) h", sizes=KEYS),
        Tensor(f"{HEADS}.experts.output_linear.weight", "g d (m h)", f"{OWN}.w_output", "(m g) h d", sizes=KEYS),
        Tensor(f"{HEADS}.experts.bias", "d", f"{OWN}.b_output", "d"),
        Tensor(f"{HEADS}.experts.router.layer.weight", "e d", f"{EVEN}.moe.router.w_router", "d e"),
        parts.gate_and_up(f"{MIXTURE}.input_linear.weight", "e x d", EXPERTS),
        Tensor(f"{MIXTURE}.output_linear.weight", "e d f", f"{EXPERTS}.w_down", "e f d"),
        Tensor(f"{MIXTURE}.bias", "d", f"{ODD}.moe.b_output", "d"),
        Tensor(f"{MIXTURE}.router.layer.weight", "e d", f"{ODD}.moe.router.w_router", "d e"),
    ),
    harmless=("max_position_embeddings",),
)
