"""Ling 3.0. Source: inclusionAI 2026, the released model; transformers, `bailing_hybrid`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.kimi_linear import LATENT, NAMES
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Tensor, beside
from moezoo.core.spec import AttentionSpec, GatedDeltaAttentionSpec, LatentAttentionSpec, ModelSpec


def spec(fields: Fields) -> ModelSpec:
    norm, number = parts.rms_norm(fields), fields.count("num_hidden_layers")
    mixers, size = _mixers(fields), fields.count("layer_group_size", 6)
    by_default = ["linear_attention" if (layer + 1) % size else "full_attention" for layer in range(number)]
    moe = parts.grouped_sigmoid(
        fields, names=NAMES, num_experts=("num_experts", "num_local_experts"), groups=(8, 4), scale=2.5
    )
    fields.expect("moe_shared_expert_intermediate_size", moe.experts.hidden_dim)
    fields.expect("score_function", "sigmoid")
    fields.expect("moe_router_enable_expert_bias", True)
    dense, first = (
        parts.swiglu(fields, fields.count("intermediate_size", 6144)),
        fields.integer("first_k_dense_replace", 2),
    )
    dense_layers = parts.dense_by_type(
        fields, number, [layer < first for layer in range(number)], older={"first_k_dense_replace": None}
    )
    types = parts.layer_types(fields, number, by_default, tuple(mixers), older={"layer_group_size": None})
    kinds = zip(types, dense_layers, strict=True)
    layers = [parts.layer(mixers[kind], dense if is_dense else moe) for kind, is_dense in kinds]
    fields.expect("hidden_act", "silu", "swish", because=parts.SILU_CONVOLUTIONS)
    return parts.model(fields, layers, norm=norm)


def _mixers(fields: Fields) -> Mapping[str, AttentionSpec]:
    for name, value in {"rope_interleave": True, "no_kda_lora": True, "use_bias": False, "use_qkv_bias": False}.items():
        fields.expect(name, value)
    fields.expect("q_lora_rank", because="transformers projects queries by one matrix in this family")
    rope = parts.rope(fields, base=6e6, layout="interleaved")
    heads, width = fields.count("num_attention_heads"), fields.count("head_dim", 128)
    fields.expect("linear_num_heads", heads)
    # Trap: transformers writes the width of linear attention by this name, and that of RoPE as head_dim.
    width = fields.count("linear_head_dim", width)
    return {
        "full_attention": parts.latent_attention(fields, rope, queries=None, gate="headwise"),
        "linear_attention": GatedDeltaAttentionSpec(
            num_key_heads=heads,
            num_value_heads=heads,
            key_head_dim=width,
            value_head_dim=width,
            conv_width=fields.count(fields.either("short_conv_kernel_size", "linear_conv_kernel_dim"), 4),
            norm=parts.rms_norm(fields),
            gate="sigmoid",
            decay="channel",
            log_decay_floor=fields.number("kda_lower_bound", -5.0) if fields.flag("kda_safe_gate", True) else None,
        ),
    }


def mlx_refuses(spec: ModelSpec) -> str | None:
    """Return why mlx-lm cannot compute the model, or None."""
    for layer in spec.all_layers:
        mixer = layer.attention
        if isinstance(mixer, GatedDeltaAttentionSpec) and mixer.log_decay_floor is None:
            return "mlx-lm has a floor of decays"
        if isinstance(mixer, LatentAttentionSpec) and mixer.bias:
            return "mlx-lm has no biases of latent attention"
    if any(moe.router.renormalize == "none" for _, moe in spec.moes):
        return "mlx-lm divides the weights of the chosen experts by their sum"
    full = [not isinstance(layer.attention, GatedDeltaAttentionSpec) for layer in spec.all_layers]
    size = full.index(True) + 1 if True in full else len(full) + 1
    if full != [(index + 1) % size == 0 or index >= len(full) // size * size for index in range(len(full))]:
        return "mlx-lm has full attention in the last layer of each group, and in all layers after the last whole group"
    return None


def mlx_config(spec: ModelSpec) -> dict[str, Any]:
    """Return fields of config.json that mlx-lm requires; it tells Ling 3.0 from 2.5 by the architecture's name."""
    mixers = [layer.attention for layer in spec.all_layers]
    full = [not isinstance(mixer, GatedDeltaAttentionSpec) for mixer in mixers]
    found: dict[str, Any] = {
        "architectures": ["BailingMoeV3ForCausalLM"],
        "first_k_dense_replace": parts.leading_dense(spec),
        "layer_group_size": full.index(True) + 1 if True in full else len(full) + 1,
        "q_lora_rank": None,
    }
    for mixer in mixers:
        if isinstance(mixer, GatedDeltaAttentionSpec):
            found["head_dim"] = mixer.key_head_dim
    for _, moe in spec.moes:
        found["moe_shared_expert_intermediate_size"] = moe.experts.hidden_dim
        found["num_experts_per_tok"] = moe.router.top_k
        found["n_group"] = getattr(moe.router.choice, "num_groups", 1)
    return found


def _latent() -> list[Fused]:
    """Return rules for latent attention, whose output projection has another name, and for its gate."""
    gate = Tensor(f"{LAYER}.attention.g_proj.weight", "n d", f"{OURS}.attention.w_gate", "d n")
    rules = parts.latent(f"{LAYER}.attention")
    return [*(replace(rule, theirs=rule.theirs.replace(".o_proj.", ".dense.")) for rule in rules), gate]


MIXER, OWN = f"{LAYER}.attention", f"{OURS}.attention"
OUTPUT = Tensor(f"{MIXER}.dense.weight", "d (n z)", f"{OWN}.w_output", "n z d")

FAMILY = Family(
    model_types=("bailing_hybrid",),
    spec=spec,
    tensors=(
        Tensor("model.word_embeddings.weight", "v d", "embedding.weight", "v d"),
        *(rule for rule in parts.MODEL if "embed_tokens" not in rule.theirs),
        *parts.PRE_NORMS,
        *parts.channel_delta(MIXER),
        *beside(f"{OWN}.decay_bias", "n h", [OUTPUT]),  # as transformers 5.23 saves it
        *beside(*LATENT, _latent()),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        Tensor(f"{LAYER}.mlp.gate.expert_bias", "e", f"{OURS}.moe.router.selection_bias", "e"),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    mlx=(*parts.mlx_convolutions(MIXER, "conv1d"), *beside(*LATENT, parts.absorbed(MIXER)), *parts.switch()),
    mlx_lm=MlxLM(
        config=mlx_config, replaces=("architectures", "head_dim"), refuses=mlx_refuses, floats=("*.mlp.gate",)
    ),
    kept=("*.rotary_emb.inv_freq",),
    later_layers_kept=True,
    harmless=(
        *("kda_lower_bound", "max_position_embeddings", "model_max_length", "mtp_loss_scaling_factor"),
        *("num_mtp_layers", "num_nextn_predict_layers", "partial_rotary_factor", "qk_head_dim"),
    ),
)
