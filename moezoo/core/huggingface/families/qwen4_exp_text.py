"""Qwen4, text model: gated residual streams, n-gram embeddings, attention to blocks that an indexer chooses. Source:
Qwen Team 2026; transformers, `qwen4_exp_text`, `qwen4_exp`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.qwen3_5_moe_text import FAMILY as QWEN35
from moezoo.core.huggingface.families.qwen3_next import ATTENTION, FULL, gate_biases
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor
from moezoo.core.spec import (
    AttentionSpec,
    BlockIndexerSpec,
    GatedDeltaAttentionSpec,
    GatedStreamsSpec,
    ModelSpec,
    MoESpec,
    NGramEmbeddingsSpec,
    RMSNormSpec,
    RouterSpec,
    SharedExpertsSpec,
)


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers", 40)
    norm = parts.rms_norm(fields).model_copy(update={"scale": "zero_centred"})
    moe = _moe(fields)
    layers = [
        parts.layer(mixer, moe).model_copy(update={"ngram_embeddings": ngrams})
        for mixer, ngrams in zip(_mixers(fields, number, norm), _ngrams(fields, number), strict=True)
    ]
    residual = GatedStreamsSpec(num_streams=fields.count("hc_count", 4), rank=fields.count("hc_lowrank", 320))
    fields.expect("hidden_act", "silu", "swish", because=parts.SILU_CONVOLUTIONS)
    return parts.model(fields, layers, norm=norm).model_copy(update={"residual": residual})


def _mixers(fields: Fields, number: int, norm: RMSNormSpec) -> list[AttentionSpec]:
    interval = fields.count("full_attention_interval", 4)
    by_default = ["indexed_attention" if (index + 1) % interval == 0 else "linear_attention" for index in range(number)]
    known = ("linear_attention", "indexed_attention", "full_attention")  # the last two are one, in two spellings
    types = parts.layer_types(fields, number, by_default, known, older={"full_attention_interval": None})
    gate = fields.get("output_gate_type", fields.get("hidden_act", "silu"), likely=("silu", "sigmoid"))
    if gate not in ("silu", "sigmoid"):
        raise fields.refuse("output_gate_type", "silu or sigmoid")
    delta = GatedDeltaAttentionSpec(
        num_key_heads=fields.count("linear_num_key_heads", 16),
        num_value_heads=fields.count("linear_num_value_heads", 32),
        key_head_dim=fields.count("linear_key_head_dim", 128),
        value_head_dim=fields.count("linear_value_head_dim", 128),
        conv_width=fields.count("linear_conv_kernel_dim", 4),
        norm=RMSNormSpec(epsilon=norm.epsilon),
        gate=gate,
    )
    attention = parts.attention(
        fields,
        # For text only, the three positions of multimodal RoPE are equal.
        parts.rope(fields, fraction=1.0, harmless=("mrope_section", "mrope_interleaved")),
        kv_heads=2,
        head_dim=256,
        qk_norm=norm,
        gate="elementwise",
        **gate_biases(fields.flag("attention_bias", False)),
        indexer=None if set(types) == {"linear_attention"} else _indexer(fields, norm),
    )
    return [delta if kind == "linear_attention" else attention for kind in types]


def _indexer(fields: Fields, norm: RMSNormSpec) -> BlockIndexerSpec:
    if fields.count("indexer_kv_heads") != 1:
        raise fields.refuse("indexer_kv_heads", "1")
    budget, size = fields.count("indexer_budget"), fields.count("indexer_compress_ratio")
    if budget % size:
        raise fields.refuse("indexer_budget", f"a multiple of indexer_compress_ratio, {size}")
    return BlockIndexerSpec(
        num_heads=fields.count("indexer_n_heads"),
        head_dim=fields.count("indexer_head_dim"),
        top_k=budget // size,
        block_size=size,
        norm=norm,
    )


def _ngrams(fields: Fields, number: int) -> list[NGramEmbeddingsSpec | None]:
    """Return each layer's n-gram embeddings; `ple_layer_ids` count layers from 1."""
    named = sorted(set(fields.integers("ple_layer_ids")))
    if any(not 1 <= layer <= number for layer in named):
        raise fields.refuse("ple_layer_ids", f"numbers of layers from 1 to {number}")
    options = {
        "largest": fields.count("ngram_size", 3),
        "heads": fields.count("heads_per_ngram", 8),
        "dim": fields.count("ple_embed_dim", fields.count("hidden_size")),
        "table_size": fields.count("ngram_vocab_size_base", 20_000_000),
        "conv_width": fields.count("ple_conv_kernel_size", 4),
        "reset_token": _end(fields) if named else 0,
        "seed": fields.integer("seed", 1234),
        "multiple": fields.count("make_ngram_vocab_size_divisible_by", 128),
        "parts": fields.count("split_ngram_parts", 512),
    }
    return [
        NGramEmbeddingsSpec.model_validate({**options, "index": named.index(layer)}) if layer in named else None
        for layer in range(1, number + 1)
    ]


def _end(fields: Fields) -> int:
    """Return the token at which n-grams end: the first of a list."""
    if not isinstance(fields.get("eos_token_id"), list):
        return fields.integer("eos_token_id")
    tokens = fields.integers("eos_token_id")
    if not tokens:
        raise fields.refuse("eos_token_id", "a token, since n-grams end there")
    return tokens[0]


def _config(spec: ModelSpec) -> dict[str, Any]:
    """Return the fields of n-gram embeddings, all of which have the same; and the only value of another."""
    found = [(index + 1, layer.ngram_embeddings) for index, layer in enumerate(spec.all_layers)]
    named = [(layer, ngrams) for layer, ngrams in found if ngrams is not None]
    if not named:
        return {"indexer_kv_heads": 1}
    ngrams = named[0][1]
    return {
        "indexer_kv_heads": 1,
        "ple_layer_ids": [layer for layer, _ in named],
        "ngram_size": ngrams.largest,
        "heads_per_ngram": ngrams.heads,
        "ple_embed_dim": ngrams.dim,
        "ngram_vocab_size_base": ngrams.table_size,
        "ple_conv_kernel_size": ngrams.conv_width,
        "eos_token_id": ngrams.reset_token,
        "seed": ngrams.seed,
        "make_ngram_vocab_size_divisible_by": ngrams.multiple,
        "split_ngram_parts": ngrams.parts,
    }


def _moe(fields: Fields) -> MoESpec:
    return MoESpec(
        num_experts=fields.count(fields.either("num_experts", "num_local_experts"), 512),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 10),
            renormalize="sum" if fields.flag("norm_topk_prob", True) else "none",
        ),
        experts=parts.swiglu(fields, fields.count("moe_intermediate_size", 512)),
        shared=SharedExpertsSpec(kind="sigmoid_gated", hidden_dim=fields.count("shared_expert_intermediate_size", 512)),
        losses=parts.pooled_balance(fields),
    )


def _streams(theirs: str, ours: str) -> tuple[Fused, ...]:
    return (
        Tensor(f"{theirs}.hc_norm.weight", "(j d)", f"{ours}.norm.scale", "j d"),
        Tensor(f"{theirs}.input_mix_weight_down.weight", "z (j d)", f"{ours}.w_down", "j d z"),
        Tensor(f"{theirs}.input_mix_weight_up.weight", "(j d) z", f"{ours}.w_up", "z j d"),
        Tensor(f"{theirs}.block_inject_weight.weight", "u (j d)", f"{ours}.w_write", "j d u"),
    )


NGRAMS, TABLE = f"{OURS}.ngram_embeddings", f"{LAYER}.ple.ple_embedding.ngram_embedding"

FAMILY = Family(
    model_types=("qwen4_exp_text", "qwen4_exp"),
    spec=spec,
    tensors=(
        *QWEN35.tensors,
        Fused(
            f"{FULL}.indexer.index_qk_proj.weight",
            "x d",
            (
                Part(f"{ATTENTION}.indexer.w_query", "n h", "d n h"),
                Part(f"{ATTENTION}.indexer.w_key", "h", "d h"),
            ),
        ),
        Tensor(f"{FULL}.indexer.q_layernorm.weight", "h", f"{ATTENTION}.indexer.query_norm.scale", "h"),
        Tensor(f"{FULL}.indexer.k_layernorm.weight", "h", f"{ATTENTION}.indexer.key_norm.scale", "h"),
        *_streams(f"{LAYER}.attn_hyper_connection", f"{OURS}.attention_residual"),
        *_streams(f"{LAYER}.mlp_hyper_connection", f"{OURS}.feed_forward_residual"),
        *_streams("model.hyper_connection_mixer", "final_residual"),
        Tensor(f"{TABLE}.shard_{{expert}}.weight", "v h", f"{NGRAMS}.weight", "e v h"),
        Tensor(f"{TABLE}.weight", "(e v) h", f"{NGRAMS}.weight", "e v h"),
        Tensor(f"{LAYER}.ple.key_proj.weight", "(j d) z", f"{NGRAMS}.w_key", "z j d"),
        Tensor(f"{LAYER}.ple.value_proj.weight", "d z", f"{NGRAMS}.w_value", "z d"),
        Tensor(f"{LAYER}.ple.conv1d.weight", "(j d) 1 w", f"{NGRAMS}.conv", "w j d"),
        *(
            Tensor(f"{LAYER}.ple.norm_{which}.weight", "(j d)", f"{NGRAMS}.{which}_norm.scale", "j d")
            for which in ("key", "query", "conv")
        ),
    ),
    # The hash functions follow from the config.
    kept=(*QWEN35.kept, "*.ple_embedding.layer_multipliers", "*.ple_embedding.ngram_heads_*"),
    architecture="Qwen4ExpForCausalLM",
    computed_tokens=("eos_token_id",),
    config=_config,
    harmless=(
        "intermediate_size",  # of dense feed-forwards, which there are none of
        "mamba_ssm_dtype",
        "max_position_embeddings",
        "mtp",
        "number_of_conv_states",
        "ple_embedding_dtype",
    ),
)
