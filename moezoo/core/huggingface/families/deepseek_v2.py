"""DeepSeek-V2 and V2-Lite. Source: DeepSeek-AI 2024, arXiv 2405.04434; transformers, `deepseek_v2`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.spec import (
    ChoiceSpec,
    GroupedTopKChoiceSpec,
    ModelSpec,
    MoESpec,
    RouterSpec,
    SharedExpertsSpec,
    TopKChoiceSpec,
)


def spec(fields: Fields) -> ModelSpec:
    fields.expect("rope_interleave", True)
    attention = parts.latent_attention(fields)
    moe = mixture(fields)
    dense = parts.swiglu(fields, fields.count("intermediate_size"), bias=fields.flag("mlp_bias", False))
    first = fields.integer("first_k_dense_replace", 0)
    fields.expect("moe_layer_freq", 1)
    layers = [
        parts.layer(attention, dense if index < first else moe) for index in range(fields.count("num_hidden_layers"))
    ]
    return parts.model(fields, layers, norm=parts.rms_norm(fields))


def mixture(fields: Fields) -> MoESpec:
    """Return the MoE layer of the first DeepSeek models: softmax scores that are not renormalized."""
    fields.expect("scoring_func", "softmax")
    # Trap: if true, DeepSeek's own code renormalizes and omits the scale.
    fields.expect("norm_topk_prob", False, because="transformers ignores it and DeepSeek's own code does not")
    choice: ChoiceSpec = TopKChoiceSpec()
    if fields.choice("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy"):
        choice = GroupedTopKChoiceSpec(num_groups=fields.count("n_group"), keep=fields.count("topk_group"))
    width, shared = fields.count("moe_intermediate_size"), fields.integer("n_shared_experts", 2)
    return MoESpec(
        num_experts=fields.count(fields.either("n_routed_experts", "num_experts", "num_local_experts")),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok"),
            choice=choice,
            renormalize="none",
            scale=fields.number("routed_scaling_factor", 1.0),
        ),
        experts=parts.swiglu(fields, width),
        # Trap: routed experts have no biases.
        shared=SharedExpertsSpec(num_experts=shared, hidden_dim=width, bias=fields.flag("mlp_bias", False) or None)
        if shared
        else None,
    )


FAMILY = Family(
    model_types=("deepseek_v2",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.latent(),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    mlx=parts.switch(),
    mlx_lm=MlxLM(floats=("*.mlp.gate",)),
    kept=("*.rotary_emb.inv_freq",),
    harmless=(
        "aux_loss_alpha",  # of balance losses that transformers does not have
        "head_dim",
        "max_position_embeddings",
        "n_group",  # unused with topk_method greedy
        "qk_head_dim",
        "seq_aux",
        "topk_group",
    ),
)
