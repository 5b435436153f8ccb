"""Text model of dots3-note. Source: the released model, rednote 2026; transformers, `dots3_note`.

Differs: transformers also multiplies the indexer's queries by sqrt(D / q_lora_rank). This changes no choice of
positions, only the softmax that an indexer is trained with here.
"""

from collections.abc import Mapping
from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families import deepseek_v32
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import IndexerSpec, LatentAttentionSpec, ModelSpec, MoESpec, RoPESpec, SharedExpertsSpec

FULL, INDEXED, SLIDING = "full_attention", "indexed_attention", "sliding_attention"
# Sizes of a layer, with the defaults of the model and, without `per_layer_config`, of layers with a sliding window.
SIZES: Mapping[str, tuple[int, int]] = {
    "num_attention_heads": (128, 64),
    "num_key_value_heads": (128, 64),
    "q_lora_rank": (1024, 1024),
    "kv_lora_rank": (512, 1024),
    "head_dim": (256, 256),
    "qk_nope_head_dim": (128, 192),
    "v_head_dim": (128, 128),
}
ROPE = "qk_rope_head_dim"


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers")
    norm, moe = parts.rms_norm(fields, 1e-5), _moe(fields)
    dense = parts.swiglu(fields, fields.count("intermediate_size", 13824))
    layers = [
        parts.layer(_attention(fields, kind, _sizes(fields, index, kind)), dense if is_dense else moe)
        for index, (kind, is_dense) in enumerate(zip(_kinds(fields, number), _dense(fields, number), strict=True))
    ]
    return parts.model(fields, layers, norm=norm)


def _kinds(fields: Fields, number: int) -> list[str]:
    """Return each layer's kind of attention; `full_attention` has an indexer unless `use_dsa` is false or absent."""
    sparse = fields.get("use_dsa", None if "per_layer_config" in fields else True)
    full = FULL if sparse is False else INDEXED
    windows = fields.flag("use_sliding_window", True)
    default = [full if not windows or index < 2 or index % 4 == 1 else SLIDING for index in range(number)]
    kinds = parts.layer_types(fields, number, default, known=(FULL, INDEXED, SLIDING))
    for name in () if SLIDING in kinds else (*SIZES, ROPE, "rope_theta"):
        fields.get(f"swa_{name}")  # has no effect without sliding layers
    return kinds if sparse is None else [kind if kind == SLIDING else full for kind in kinds]


def _dense(fields: Fields, number: int) -> list[bool]:
    first = fields.integer("first_k_dense_replace", 1)
    if isinstance(fields.get("moe_layer_freq"), list):
        sparse = [bool(each) for each in fields.items("moe_layer_freq", number)]
    else:
        step = fields.count("moe_layer_freq", 1)
        sparse = [index % step == 0 for index in range(number)]
    return parts.dense_by_type(fields, number, [index < first or not each for index, each in enumerate(sparse)])


def _sizes(fields: Fields, index: int, kind: str) -> dict[str, int]:
    """Return the sizes of a layer: the model's, or its own in `per_layer_config`, or else those named `swa_`."""
    found = {name: fields.count(name, base) for name, (base, _) in SIZES.items()}
    found[ROPE] = fields.count(ROPE, 64)
    own = fields.inside("per_layer_config")
    if own is None and kind == SLIDING:
        found = {name: fields.count(f"swa_{name}", other) for name, (_, other) in SIZES.items()}
        found[ROPE] = fields.count(f"swa_{ROPE}", found["head_dim"] - found["qk_nope_head_dim"])
    elif own is not None and str(index) in own:
        layer = own.inside(str(index))
        assert layer is not None
        found |= {name: layer.count(name, value) for name, value in found.items()}
        layer.finish()
        for name, value in found.items() if kind == SLIDING else ():
            fields.expect(f"swa_{name}", value)
    if found["num_key_value_heads"] != found["num_attention_heads"]:
        raise fields.refuse("num_key_value_heads", f"that of each layer to be its {found['num_attention_heads']} heads")
    if kind == SLIDING and found["head_dim"] != found["qk_nope_head_dim"] + found[ROPE]:
        raise fields.refuse("head_dim", "that of layers with a window to be qk_nope_head_dim + qk_rope_head_dim")
    return found


def _attention(fields: Fields, kind: str, sizes: Mapping[str, int]) -> LatentAttentionSpec:
    width, queries, latent = fields.count("hidden_size", 5120), sizes["q_lora_rank"], sizes["kv_lora_rank"]
    head_dim = sizes["qk_nope_head_dim"] + sizes[ROPE]
    window = fields.count(fields.either("sliding_window", "sliding_window_size"), 512)
    indexer = IndexerSpec(
        num_heads=fields.count("index_n_heads", 64),
        head_dim=fields.count("index_head_dim", 128),
        top_k=fields.count("index_topk", 2048),
        layout="interleaved",
    )
    return LatentAttentionSpec(
        num_heads=sizes["num_attention_heads"],
        head_dim=sizes["qk_nope_head_dim"],
        rope_head_dim=sizes[ROPE],
        value_head_dim=sizes["v_head_dim"],
        latent_dim=latent,
        query_latent_dim=queries,
        position=_rope(fields, kind, sizes[ROPE] / sizes["head_dim"]),
        norm=parts.rms_norm(fields, 1e-5),
        bias=fields.flag("attention_bias", False),
        latent_multiplier=(width / latent) ** 0.5,
        scale=(width / queries) ** 0.5 / head_dim**0.5,  # includes the constant on queries
        rope_key_norm=True,
        window=window if kind == SLIDING else None,
        gate="headwise",
        indexer=indexer if kind == INDEXED else None,
    )


def _rope(fields: Fields, kind: str, fraction: float) -> RoPESpec:
    """Return the rotation of a kind of layers; `fraction`: the share of `head_dim` that it says it is of."""
    fields.expect("rope_scaling")
    inner, slides = fields.inside("rope_parameters"), kind == SLIDING
    if inner is not None and kind not in inner:
        raise fields.refuse("rope_parameters", f"an object with {kind}")
    found = parts.rope(
        fields,
        base=5e4 if slides else 8e7,
        fraction=fraction,
        layout="interleaved",
        layer_type=kind,
        theta="swa_rope_theta" if slides else "rope_theta",
    )
    if abs(found.fraction - fraction) > 1e-6:
        raise fields.refuse("rope_parameters", f"{kind} with partial_rotary_factor {fraction:g}, as by its sizes")
    return found.model_copy(update={"fraction": 1.0})


def _moe(fields: Fields) -> MoESpec:
    width = fields.either("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size")
    shared = SharedExpertsSpec(num_experts=fields.count("n_shared_experts", 1), hidden_dim=fields.count(width, 1536))
    if fields.count("topk_group", 1) > fields.count("n_group", 1):
        raise fields.refuse("topk_group", "at most n_group")
    return parts.grouped_sigmoid(fields).model_copy(update={"shared": shared})


def config(spec: ModelSpec) -> dict[str, Any]:
    """Return the field that decides whether layers of full attention have an indexer, if all have the same."""
    full = [each.attention for each in spec.layers if isinstance(each.attention, LatentAttentionSpec)]
    sparse = {each.indexer is not None for each in full if each.window is None}
    return {"use_dsa": sparse.pop()} if len(sparse) == 1 else {}


FAMILY = Family(
    model_types=("dots3_note_text", "dots3_note"),
    spec=spec,
    tensors=(
        *deepseek_v32.FAMILY.tensors,
        Tensor(f"{LAYER}.self_attn.k_rope_only_layernorm.weight", "o", f"{OURS}.attention.rope_key_norm.scale", "o"),
        Tensor(f"{LAYER}.self_attn.g_proj.weight", "n d", f"{OURS}.attention.w_gate", "d n"),
    ),
    kept=("audio_encoder.*", "vision_encoder.*", "*audio_tower.*", "*vision_tower.*", "model.mtp.*"),
    later_layers_kept=True,
    config=config,
    harmless=("audio_config", "head_dim", "max_position_embeddings", "mlp_bias", "vision_config"),
)
