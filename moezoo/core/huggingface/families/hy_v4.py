"""HY-V4: sparse latent attention with sinks and gates; several residual streams. Source: Tencent 2026; transformers,
`hy_v4`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.deepseek_v32 import FAMILY as DEEPSEEK
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Tensor
from moezoo.core.spec import (
    ClampedSwiGLUSpec,
    HyperConnectionsSpec,
    IndexerSpec,
    LatentAttentionSpec,
    LayerNormSpec,
    ModelSpec,
    MoESpec,
    SharedExpertsSpec,
)


def spec(fields: Fields) -> ModelSpec:
    number, norm = fields.count("num_hidden_layers", 34), parts.rms_norm(fields, 1e-5)
    dense, moe = parts.swiglu(fields, fields.count("intermediate_size", 6912)), _moe(fields)
    parts.layer_types(fields, number, ["indexed_attention"] * number, ("indexed_attention",))
    for flag in ("enable_ihc", "gated_mla", "learnable_sink", "use_dsa"):  # in the release: transformers has no other
        fields.expect(flag, True)
    fields.expect("gating_type", "elementwise")
    dense_layers = parts.dense_by_type(fields, number, [index < 1 for index in range(number)])
    layers = [
        parts.layer(attention, dense if is_dense else moe)
        for attention, is_dense in zip(_attentions(fields, number, norm.epsilon), dense_layers, strict=True)
    ]
    epsilon = fields.number("hc_eps", 1e-6)
    residual = HyperConnectionsSpec(
        num_streams=fields.count("hc_mult", 4),
        sinkhorn_iterations=None,
        magnitude=fields.number("hc_magnitude", 2.0),
        epsilon=epsilon,
        write_epsilon=epsilon,
        norm_epsilon=norm.epsilon,
    )
    return parts.model(fields, layers, norm=norm).model_copy(update={"residual": residual})


def _attentions(fields: Fields, number: int, epsilon: float) -> list[LatentAttentionSpec]:
    """Return each layer's attention; a `shared` layer attends to the tokens that the last `full` one chose."""
    indexer = IndexerSpec(
        num_heads=fields.count("index_n_heads", 16),
        head_dim=fields.count("index_head_dim", 128),
        top_k=fields.count("index_topk", 2048),
        rotated="last",
        key_norm=LayerNormSpec(epsilon=epsilon),
    )
    attention = parts.latent_attention(
        fields, parts.rope(fields), gate="elementwise", sinks=True, kv_heads_ignored=True
    )
    by_default = ["full" if index == 0 or index % 4 == 1 else "shared" for index in range(number)]
    types = fields.items("indexer_types", number, by_default)
    if types[0] != "full" or set(types) - {"full", "shared"}:
        raise fields.refuse("indexer_types", "each layer to be full or shared, and the first one full")
    full = [index for index, kind in enumerate(types) if kind == "full"]
    return [
        attention.model_copy(
            update={"indexer": indexer} if index in full else {"indexer_of_layer": max(i for i in full if i < index)}
        )
        for index in range(number)
    ]


def _moe(fields: Fields) -> MoESpec:
    """Return the MoE layer, in which only the routed experts are clamped."""
    moe = parts.grouped_sigmoid(fields, scale=2.827)
    clamped = ClampedSwiGLUSpec(
        hidden_dim=moe.experts.hidden_dim,
        alpha=1.0,
        limit=fields.number("swiglu_limit", 10.0),
        up_offset=0.0,
        bias=False,
    )
    if not isinstance(moe.shared, SharedExpertsSpec):
        raise fields.refuse("n_shared_experts", "at least 1")
    return moe.model_copy(update={"experts": clamped, "shared": moe.shared.model_copy(update={"activation": "swiglu"})})


def _streams(theirs: str, names: tuple[str, str, str], ours: str) -> tuple[Fused, ...]:
    fn, base, scale = (f"{theirs}.{name}" for name in names)
    return parts.hyper_connection((fn, base, scale), ours, mixed=False)


def _head(theirs: str, names: tuple[str, str, str]) -> tuple[Fused, ...]:
    """Return rules for the last step, from the streams to the final norm."""
    fn, base, scale = (f"{theirs}.{name}" for name in names)
    return (
        Tensor(fn, "i (j d)", "final_residual.w_read", "j d i"),
        Tensor(base, "i", "final_residual.b_read", "i"),
        Tensor(scale, "y", "final_residual.read_scale", "y"),
    )


def _attention(gate: str, sink: str) -> tuple[Fused, ...]:
    return (
        Tensor(f"{LAYER}.self_attn.{gate}.weight", "(n v) d", f"{OURS}.attention.w_gate", "d n v"),
        Tensor(f"{LAYER}.self_attn.{sink}", "n", f"{OURS}.attention.sink", "n"),
    )


_ATTENTION, _FEED_FORWARD = f"{OURS}.attention_residual", f"{OURS}.feed_forward_residual"
_NAMES, _SAVED = ("fn", "base", "scale"), ("hc_fn", "hc_base", "hc_scale")
_SHARED, _DENSE = (f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"), (f"{LAYER}.mlp", f"{OURS}.feed_forward")

FAMILY = Family(
    model_types=("hy_v4",),
    architecture="HYV4ForCausalLM",
    spec=spec,
    tensors=parts.exported(
        (
            *DEEPSEEK.tensors,
            *_attention("linear_gate", "learnable_sink_param"),
            *_streams(f"{LAYER}.hc_attn_layer.hc_pre", _SAVED, _ATTENTION),
            *_streams(f"{LAYER}.hc_mlp_layer.hc_pre", _SAVED, _FEED_FORWARD),
            *_head("model.hc_head", ("hc_head_fn", "hc_head_base", "hc_head_scale")),
            # The names in transformers 5.
            *_attention("gate_proj", "sinks"),
            *_streams(f"{LAYER}.attn_hc", _NAMES, _ATTENTION),
            *_streams(f"{LAYER}.ffn_hc", _NAMES, _FEED_FORWARD),
            *_head("model.hc_head", _SAVED),
            # Those that transformers 5.23 saves: it renames all gates, and moves hc_pre to the front.
            *_streams(f"{LAYER}.hc_pre.hc_attn_layer", _SAVED, _ATTENTION),
            *_streams(f"{LAYER}.hc_pre.hc_mlp_layer", _SAVED, _FEED_FORWARD),
            *_head("model.hc_pre.hc_head", ("hc_head_fn", "hc_head_base", "hc_head_scale")),
            *(
                Tensor(f"{theirs}.linear_gate.weight", "f d", f"{ours}.w_gate", "d f")
                for theirs, ours in (_DENSE, _SHARED)
            ),
        ),
        parts.fused_experts(),
    ),
    kept=("*.rotary_emb.inv_freq", "model.mtp_layers.*"),
    later_layers_kept=True,
    harmless=(
        "enable_lm_head_fp32",
        "head_dim",
        "learnable_sink_init",
        "max_position_embeddings",
        "num_key_value_heads",  # 8 in the release: transformers sets it to the number of heads
        "qk_head_dim",
    ),
)
