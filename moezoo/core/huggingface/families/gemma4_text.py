"""Gemma 4, text model. Source: Google 2026; transformers, `gemma4` (Gemma4Text...)."""

import math
from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import (
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerInputsSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    MultipliersSpec,
    ParallelFeedForwardSpec,
    RMSNormSpec,
    RoPESpec,
    RouterSpec,
    with_repeats,
)


def spec(fields: Fields) -> ModelSpec:
    number, width = fields.count("num_hidden_layers"), fields.count("hidden_size")
    norm = parts.rms_norm(fields)
    by_default = ["full_attention" if (index + 1) % 6 == 0 else "sliding_attention" for index in range(number)]
    types = parts.layer_types(fields, number, by_default)
    types[-1] = "full_attention"  # as in transformers, regardless of the config
    attentions = _attentions(fields, types, norm)
    has_moe, double_width = fields.flag("enable_moe_block", False), fields.flag("use_double_wide_mlp", False)
    layers = []
    for attention in attentions:
        times = 2 if double_width and attention.keys_of_layer is not None else 1
        dense = parts.swiglu(
            fields, times * fields.count("intermediate_size"), name="hidden_activation", default="gelu_pytorch_tanh"
        )
        moe = _moe(fields, dense, norm) if has_moe else None
        layers.append(
            LayerSpec(
                norm_placement="sandwich",
                attention=attention,
                feed_forward=None if has_moe else dense,
                moe=moe,
                output_scale=True,
            )
        )
    fields.only_in_training("attention_dropout")
    return ModelSpec(
        vocab_size=fields.count("vocab_size"),
        embed_dim=width,
        layer_inputs=_layer_inputs(fields),
        layers=with_repeats(layers),
        norm=norm,
        head=parts.head(fields, tied=True),
        multipliers=MultipliersSpec(embedding=math.sqrt(width)),
        softcap=fields.get("final_logit_softcapping"),
    )


def _layer_inputs(fields: Fields) -> LayerInputsSpec | None:
    dim = fields.integer("hidden_size_per_layer_input", 256)
    rows = fields.get("vocab_size_per_layer_input", 262_144)
    if dim == 0:
        return None
    if rows != fields.count("vocab_size"):
        raise fields.refuse("vocab_size_per_layer_input", f"{fields.count('vocab_size')}, as vocab_size")
    gated = parts.swiglu(fields, dim, name="hidden_activation", default="gelu_pytorch_tanh")
    return LayerInputsSpec(dim=dim, activation=gated.kind)


def _attentions(fields: Fields, types: list[str], norm: RMSNormSpec) -> list[GroupedQueryAttentionSpec]:
    """Return each layer's attention; full attention has another head_dim and, with attention_k_eq_v, keys as values."""
    keys_are_values, bias = fields.flag("attention_k_eq_v", False), fields.flag("attention_bias", False)
    shape = {
        "head_dim": fields.count("head_dim", 256),
        "num_kv_heads": fields.count("num_key_value_heads", 4),
    }
    overrides = _overrides(fields, types, keys_are_values)
    positions = {
        "sliding_attention": _position(fields, "sliding_attention", 1e4, RoPESpec(base=1e4)),
        "full_attention": _position(
            fields, "full_attention", 1e6, RoPESpec(base=1e6, fraction=0.25, fraction_of="pairs")
        ),
    }
    own_keys = len(types) - fields.integer("num_kv_shared_layers", 0)
    if own_keys < 1 or set(types[:own_keys]) != set(types):
        raise fields.refuse("num_kv_shared_layers", "fewer, so that an earlier layer of each type has its own keys")
    found = []
    for index, (kind, own) in enumerate(zip(types, overrides, strict=True)):
        values = {
            "value_norm": norm.model_copy(update={"scale": "none"}),
            "values_from_keys": keys_are_values and kind == "full_attention",
        }
        shared = {"keys_of_layer": own_keys - 1 - types[:own_keys][::-1].index(kind)}
        found.append(
            GroupedQueryAttentionSpec(
                num_heads=fields.count("num_attention_heads"),
                position=positions[kind],
                qk_norm=norm,
                qkv_bias=bias,
                output_bias=bias,
                scale=1.0,
                window=fields.count("sliding_window", 512) if kind == "sliding_attention" else None,
                **shape | own | (values if index < own_keys else shared),
            )
        )
    return found


def _overrides(fields: Fields, types: list[str], keys_are_values: bool) -> list[dict[str, int]]:
    """Return each layer's overrides of head_dim and num_kv_heads.

    They come from `per_layer_config` (transformers 5), or for layers with full attention from the `global_*` fields of
    files on the hub.
    """
    head_dim = fields.count("global_head_dim", 512)
    kv_heads = fields.get("num_global_key_value_heads")
    everywhere = {"head_dim": head_dim}
    if keys_are_values and kv_heads is not None:
        everywhere["num_kv_heads"] = fields.count("num_global_key_value_heads")
    inner = fields.inside("per_layer_config")
    if inner is None:
        return [everywhere if kind == "full_attention" else {} for kind in types]
    found = []
    for index in range(len(types)):
        own: dict[str, int] = {}
        # transformers pads the keys with zeros to equal width: "05" of 30 layers
        name = next((name for width in (1, 2, 3) if (name := str(index).zfill(width)) in inner), str(index))
        layer = inner.inside(name)
        if layer is not None:
            for theirs, ours in (("head_dim", "head_dim"), ("num_key_value_heads", "num_kv_heads")):
                if theirs in layer:
                    own[ours] = layer.count(theirs)
            layer.finish()
        found.append(own)
    inner.finish()
    for kind, own in zip(types, found, strict=True):
        if kind == "full_attention":
            _agree(fields, own, everywhere)
    return found


def _agree(fields: Fields, own: dict[str, int], everywhere: dict[str, int]) -> None:
    """Check that `per_layer_config` and the `global_*` fields, if both are there, give a layer the same shape."""
    for name, theirs, outside in (
        ("head_dim", "global_head_dim", fields.count("head_dim", 256)),
        ("num_kv_heads", "num_global_key_value_heads", fields.count("num_key_value_heads", 4)),
    ):
        if theirs in fields and name in everywhere and own.get(name, outside) != everywhere[name]:
            raise fields.refuse(theirs, f"{own.get(name, outside)}, as in per_layer_config")


def _position(fields: Fields, layer_type: str, base: float, default: RoPESpec) -> RoPESpec:
    if "rope_parameters" not in fields:
        return default
    position = parts.rope(fields, base=base, fraction=1.0, layer_type=layer_type)
    if position.fraction_of == "features" and position.fraction != 1:  # transformers would rotate the whole head
        raise fields.refuse("rope_parameters", 'a partial_rotary_factor only with rope_type "proportional"')
    return position


def _moe(fields: Fields, dense: GatedFeedForwardSpec, norm: RMSNormSpec) -> MoESpec:
    router = RouterSpec(
        top_k=fields.count("top_k_experts"), input="normalized", input_epsilon=norm.epsilon, per_expert_scale=True
    )
    return MoESpec(
        num_experts=fields.count("num_experts"),
        router=router,
        experts=dense.model_copy(update={"hidden_dim": fields.count("moe_intermediate_size")}),
        shared=ParallelFeedForwardSpec(feed_forward=dense, norm=norm),
    )


def _mlx_config(spec: ModelSpec) -> dict[str, Any]:
    found = [layer.attention for layer in spec.all_layers]
    own = [each for each in found if isinstance(each, GroupedQueryAttentionSpec) and each.window is None]
    # Trap: the last layer has full attention in any case, but for mlx-lm.
    windows = [getattr(each, "window", None) is not None for each in found]
    types = ["sliding_attention" if slides else "full_attention" for slides in windows]
    shape = {"global_head_dim": own[0].head_dim, "num_global_key_value_heads": own[0].num_kv_heads}
    return {"layer_types": types, **shape}


FAMILY = Family(
    model_types=("gemma4_text",),
    spec=spec,
    tensors=parts.exported(
        (
            *parts.MODEL,
            Tensor(f"{LAYER}.input_layernorm.weight", "d", f"{OURS}.attention_norm.scale", "d"),
            Tensor(f"{LAYER}.post_attention_layernorm.weight", "d", f"{OURS}.attention_output_norm.scale", "d"),
            Tensor(f"{LAYER}.pre_feedforward_layernorm.weight", "d", f"{OURS}.feed_forward_norm.scale", "d"),
            Tensor(f"{LAYER}.post_feedforward_layernorm.weight", "d", f"{OURS}.feed_forward_output_norm.scale", "d"),
            Tensor(f"{LAYER}.layer_scalar", "s", f"{OURS}.output_scale", "s"),
            *parts.grouped_query(),
            *parts.qk_norm(),
            *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
            *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.moe.shared"),
            Tensor(f"{LAYER}.post_feedforward_layernorm_1.weight", "d", f"{OURS}.moe.shared_output_norm.scale", "d"),
            Tensor(f"{LAYER}.pre_feedforward_layernorm_2.weight", "d", f"{OURS}.moe.routed_input_norm.scale", "d"),
            Tensor(f"{LAYER}.post_feedforward_layernorm_2.weight", "d", f"{OURS}.moe.routed_output_norm.scale", "d"),
            *parts.router(f"{LAYER}.router.proj"),
            Tensor(f"{LAYER}.router.scale", "d", f"{OURS}.moe.router.input_scale", "d"),
            Tensor(f"{LAYER}.router.per_expert_scale", "e", f"{OURS}.moe.router.expert_scale", "e"),
            *parts.experts(f"{LAYER}.experts"),
            Tensor("model.embed_tokens_per_layer.weight", "v (l z)", "layer_inputs.weight", "v l z"),
            Tensor("model.per_layer_model_projection.weight", "(l z) d", "layer_inputs.w_context", "d l z"),
            Tensor("model.per_layer_projection_norm.weight", "z", "layer_inputs.norm.scale", "z"),
            Tensor(f"{LAYER}.per_layer_input_gate.weight", "z d", f"{OURS}.layer_input.w_gate", "d z"),
            Tensor(f"{LAYER}.per_layer_projection.weight", "d z", f"{OURS}.layer_input.w_output", "z d"),
            Tensor(f"{LAYER}.post_per_layer_input_norm.weight", "d", f"{OURS}.layer_input.norm.scale", "d"),
        ),
        parts.fused_experts(f"{LAYER}.experts"),
    ),
    mlx=parts.switch(f"{LAYER}.experts.switch_glu"),
    mlx_lm=MlxLM(config=_mlx_config, replaces=("layer_types",)),
    kept=(
        "*.rotary_emb.*inv_freq",
        *("*vision_tower.*", "*audio_tower.*", "*embed_vision.*", "*embed_audio.*"),
        # In released files, of layers that share the keys of others.
        *("*.self_attn.k_proj.weight", "*.self_attn.v_proj.weight", "*.self_attn.k_norm.weight"),
    ),
    harmless=("max_position_embeddings",),
)
