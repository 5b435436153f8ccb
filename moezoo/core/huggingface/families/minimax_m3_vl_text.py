"""MiniMax-M3, text model: each group of heads attends to the blocks that an index head chooses. Source: MiniMax 2026,
the released model; transformers, `minimax_m3_vl`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor
from moezoo.core.spec import (
    BlockIndexerSpec,
    ClampedSwiGLUSpec,
    GroupedQueryAttentionSpec,
    ModelSpec,
    MoESpec,
    RMSNormSpec,
    RouterSpec,
    SelectionBiasSpec,
    SharedExpertsSpec,
)

NESTED = "sparse_attention_config"
# Names and defaults of transformers 5, for those in `sparse_attention_config`, which go before.
INDEXER = {
    "sparse_num_index_heads": ("index_n_heads", 4),
    "sparse_index_dim": ("index_head_dim", 128),
    "sparse_block_size": ("index_block_size", 128),
    "sparse_topk_blocks": ("index_topk_blocks", 16),
}
LOCAL = "index_local_blocks"


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers")
    norm = parts.rms_norm(fields).model_copy(update={"scale": "zero_centred"})
    moe, dense = _moe(fields), _clamped(fields, "dense_intermediate_size", 12288)
    frequency = fields.get("moe_layer_freq")
    flags = [1] * number if frequency is None else fields.integers("moe_layer_freq")
    if len(flags) != number:
        raise fields.refuse("moe_layer_freq", f"{number} numbers, one per layer")
    dense_layers = parts.dense_by_type(fields, number, [not flag for flag in flags], older={"moe_layer_freq": None})
    layers = [
        parts.layer(attention, dense if is_dense else moe)
        for attention, is_dense in zip(_attention(fields, number, norm), dense_layers, strict=True)
    ]
    _expect_released(fields)
    return parts.model(fields, layers, norm=norm)


def _expect_released(fields: Fields) -> None:
    """Check options of the files on the hub, which transformers does not read."""
    fields.expect("hidden_act", "silu", "swigluoai")
    fields.expect("scoring_func", "sigmoid")
    fields.expect("use_routing_bias", True)
    fields.expect("use_qk_norm", True)
    fields.expect("qk_norm_type", "per_head")
    fields.expect("use_gemma_norm", True)
    fields.expect("attention_output_gate", False)
    fields.expect("n_shared_experts", 1)


def _attention(fields: Fields, number: int, norm: RMSNormSpec) -> list[GroupedQueryAttentionSpec]:
    def attention(indexer: BlockIndexerSpec | None) -> GroupedQueryAttentionSpec:
        return parts.attention(fields, position, kv_heads=4, head_dim=128, qk_norm=norm, indexer=indexer)

    position = parts.rope(fields, base=5e6, fraction=1.0)
    full = attention(None)
    rotated = position.rotated_dim(full.head_dim)
    if fields.get("rotary_dim", rotated) != rotated:
        raise fields.refuse("rotary_dim", f"{rotated}, which follows from partial_rotary_factor")
    by_default, indexer = _indexer(fields, number, norm)
    older = {} if by_default is None else {NESTED: None}
    by_default = by_default or ["full_attention"] * number
    types = parts.layer_types(fields, number, by_default, ("full_attention", "minimax_m3_sparse"), older=older)
    return [full if kind == "full_attention" else attention(indexer) for kind in types]


def _indexer(fields: Fields, number: int, norm: RMSNormSpec) -> tuple[list[str] | None, BlockIndexerSpec]:
    """Return each layer's kind by `sparse_attention_config`, or None, and the indexer of the sparse ones."""
    sizes = {old: fields.count(name, base) for old, (name, base) in INDEXER.items()}
    local, inner = fields.integer(LOCAL, 1), fields.inside(NESTED)
    by_default: list[str] | None = None
    if inner is not None:
        sizes = {old: inner.count(old, value) for old, value in sizes.items()}
        local = inner.integer("sparse_local_block", local)
        for old, (name, _) in INDEXER.items():
            fields.expect(name, sizes[old])
        fields.expect(LOCAL, local)
        flags = inner.integers("sparse_attention_freq")
        if "sparse_attention_freq" in inner:
            by_default = ["minimax_m3_sparse" if flag else "full_attention" for flag in flags]
            if len(flags) != number:
                raise inner.refuse("sparse_attention_freq", f"{number} numbers, one per layer")
        inner.expect("use_sparse_attention", True)
        inner.expect("sparse_score_type", "max")
        inner.expect("sparse_init_block", 0)
        inner.expect("sparse_disable_index_value", flags, [1] * number)
        inner.finish()
    indexer = BlockIndexerSpec(
        num_heads=sizes["sparse_num_index_heads"],
        head_dim=sizes["sparse_index_dim"],
        block_size=sizes["sparse_block_size"],
        top_k=sizes["sparse_topk_blocks"],
        norm=norm,
        pooled="scores",
        local_blocks=local,
    )
    return by_default, indexer


def _clamped(fields: Fields, name: str, default: int) -> ClampedSwiGLUSpec:
    return ClampedSwiGLUSpec(
        hidden_dim=fields.count(name, default),
        alpha=fields.number("swiglu_alpha", 1.702),
        limit=fields.number("swiglu_limit", 7.0),
        bias=False,
    )


def _moe(fields: Fields) -> MoESpec:
    return MoESpec(
        num_experts=fields.count(fields.either("num_local_experts", "num_experts"), 128),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 4),
            score="sigmoid",
            selection_bias=SelectionBiasSpec(),
            scale=fields.number("routed_scaling_factor", 2.0),
        ),
        experts=_clamped(fields, "intermediate_size", 3072),
        shared=SharedExpertsSpec(hidden_dim=fields.count("shared_intermediate_size", 3072)),
        losses=parts.pooled_balance(fields),
    )


BLOCK, ATTENTION = f"{LAYER}.block_sparse_moe", f"{OURS}.attention.indexer"
BIAS = Tensor(f"{BLOCK}.e_score_correction_bias", "e", f"{OURS}.moe.router.selection_bias", "e")


def _index(theirs: str) -> tuple[Fused, ...]:
    """Return rules for the indexer, by what its names begin with."""
    return (
        Tensor(f"{theirs}q_proj.weight", "(n h) d", f"{ATTENTION}.w_query", "d n h"),
        Tensor(f"{theirs}k_proj.weight", "h d", f"{ATTENTION}.w_key", "d h"),
        Tensor(f"{theirs}q_norm.weight", "h", f"{ATTENTION}.query_norm.scale", "h"),
        Tensor(f"{theirs}k_norm.weight", "h", f"{ATTENTION}.key_norm.scale", "h"),
    )


def _gate_and_up(theirs: str, ours: str) -> Fused:
    """Return the rule for gate and up of a feed-forward in one tensor."""
    return Fused(
        f"{theirs}.gate_up_proj.weight", "x d", (Part(f"{ours}.w_gate", "f", "d f"), Part(f"{ours}.w_up", "f", "d f"))
    )


RELEASED: tuple[Fused, ...] = (
    *_index(f"{LAYER}.self_attn.index_"),
    *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
    Tensor(f"{BLOCK}.gate.weight", "e d", f"{OURS}.moe.router.w_router", "d e"),
    BIAS,
    *parts.feed_forward(f"{BLOCK}.shared_experts", f"{OURS}.moe.shared"),
)

FAMILY = Family(
    model_types=("minimax_m3_vl_text", "minimax_m3_vl"),
    architecture="MiniMaxM3VLForCausalLM",
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.qk_norm(),
        # The names of the text model by itself, as transformers 5.23 saves and opens it.
        *_index(f"{LAYER}.self_attn.indexer."),
        _gate_and_up(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        _gate_and_up(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
        Tensor(f"{LAYER}.mlp.shared_experts.down_proj.weight", "d f", f"{OURS}.moe.shared.w_down", "f d"),
        *parts.router(),
        *parts.fused_experts(),
        *RELEASED,
        *parts.experts(f"{BLOCK}.experts", ("w1", "w3", "w2")),
    ),
    mlx=(*RELEASED, *parts.switch(f"{BLOCK}.switch_mlp")),
    mlx_lm=MlxLM(wrapper="minimax_m3_vl", zero_centred=True),
    kept=(*parts.VISION, "*patch_merge_mlp.*", "*mtp.*"),
    harmless=(
        *("max_position_embeddings", "mtp_*", "num_mtp_modules", "num_nextn_predict_layers"),
        "router_jitter_noise",  # which the family's own code does not have
    ),
)
