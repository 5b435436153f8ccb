"""Granite 4: Mamba-2 and attention. Source: IBM 2025, the released models; transformers, `granitemoehybrid`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.granitemoe import FAMILY as GRANITE
from moezoo.core.huggingface.families.granitemoe import attention_options, granite, scaled
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor
from moezoo.core.spec import AttentionSpec, GroupedQueryAttentionSpec, Mamba2Spec, ModelSpec, NoPositionSpec, RoPESpec

OLDER_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}  # of transformers 4 and the hub


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers")
    name = fields.either("layer_types", "layers_block_type")
    known = (*OLDER_TYPES, *OLDER_TYPES.values())
    types = [OLDER_TYPES.get(kind, kind) for kind in fields.items(name, number, ["linear_attention"] * number, known)]
    found: dict[str, AttentionSpec] = {"linear_attention": _mamba2(fields), "full_attention": _attention(fields)}
    mixers = [found[kind] for kind in types]
    fields.expect("hidden_act", "silu", "swish", because=parts.SILU_CONVOLUTIONS)
    if fields.integer("num_local_experts", 8):
        return granite(fields, mixers, shared=1024)
    for unused in ("intermediate_size", "num_experts_per_tok", "router_aux_loss_coef"):
        fields.get(unused)  # without experts these have no effect
    dense = parts.swiglu(fields, fields.count("shared_intermediate_size", 1024))
    return scaled(fields, [parts.layer(mixer, dense) for mixer in mixers])


def _attention(fields: Fields) -> GroupedQueryAttentionSpec:
    rope = parts.rope(fields)
    rotated = fields.get("position_embedding_type", likely=("rope", "nope")) == "rope"  # anything else is no position
    return parts.attention(fields, rope if rotated else NoPositionSpec(), **attention_options(fields))


def _mamba2(fields: Fields) -> Mamba2Spec:
    heads, width = fields.count("mamba_n_heads", 128), fields.count("mamba_expand", 2) * fields.count("hidden_size")
    if width % heads:
        raise fields.refuse("mamba_n_heads", f"a divisor of mamba_expand * hidden_size = {width}")
    fields.expect("mamba_d_head", "auto", width // heads)
    least, greatest = parts.step_limits(fields)
    return Mamba2Spec(
        num_heads=heads,
        head_dim=width // heads,
        state_dim=fields.count("mamba_d_state", 256),
        num_groups=fields.count("mamba_n_groups", 1),
        conv_width=fields.count("mamba_d_conv", 4),
        conv_bias=fields.flag("mamba_conv_bias", True),
        bias=fields.flag("mamba_proj_bias", False),
        min_step=least,
        max_step=greatest,
        norm_epsilon=parts.rms_norm(fields).epsilon,
    )


def config(spec: ModelSpec) -> dict[str, Any]:
    """Return the fields of config.json that hold several values of the spec each."""
    found = [
        (each.attention.min_step, each.attention.max_step)
        for each in spec.layers
        if isinstance(each.attention, Mamba2Spec)
    ]
    return {"time_step_limit": parts.written_limits(*found[0])} if found else {}


def mlx_config(spec: ModelSpec) -> dict[str, Any]:
    """Return fields of config.json as mlx-lm reads them: older words for layers, a word for no position."""
    mamba = next((each.attention for each in spec.layers if isinstance(each.attention, Mamba2Spec)), None)
    width = {} if mamba is None else {"mamba_d_head": mamba.head_dim}
    grouped = [each.attention for each in spec.layers if isinstance(each.attention, GroupedQueryAttentionSpec)]
    rotated = any(isinstance(attention.position, RoPESpec) for attention in grouped)
    return width | {
        "position_embedding_type": "rope" if rotated else "nope",
        "layer_types": ["mamba" if isinstance(each.attention, Mamba2Spec) else "attention" for each in spec.all_layers],
    }


DENSE = f"{OURS}.feed_forward"

FAMILY = Family(
    model_types=("granitemoehybrid",),
    architecture="GraniteMoeHybridForCausalLM",
    spec=spec,
    tensors=(
        GRANITE.tensors[0],
        *parts.mamba2(f"{LAYER}.mamba"),  # before attention, whose parameters have some of the same names
        *GRANITE.tensors[1:],
        Fused(
            f"{LAYER}.shared_mlp.input_linear.weight",
            "x d",
            (Part(f"{DENSE}.w_gate", "f", "d f"), Part(f"{DENSE}.w_up", "f", "d f")),
        ),
        Tensor(f"{LAYER}.shared_mlp.output_linear.weight", "d f", f"{DENSE}.w_down", "f d"),
    ),
    mlx=(*GRANITE.mlx, *parts.mlx_mamba2(f"{LAYER}.mamba")),
    mlx_lm=MlxLM(
        config=mlx_config,
        replaces=("mamba_d_head", "layer_types", "position_embedding_type"),
        eight_bits=GRANITE.mlx_lm.eight_bits,
    ),
    kept=GRANITE.kept,
    harmless=(*GRANITE.harmless, "mamba_chunk_size"),
    config=config,
)
