"""A.X-K2: DeepSeek-V3.2 with gated norms and gated attention. Source: SK Telecom 2026; transformers, `axk2`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.axk1 import dense_by_frequency
from moezoo.core.huggingface.families.deepseek_v32 import FAMILY as DEEPSEEK
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor
from moezoo.core.spec import IndexerSpec, ModelSpec


def spec(fields: Fields) -> ModelSpec:
    number, rank = fields.count("num_hidden_layers"), fields.count("gated_norm_rank", 16)
    fields.expect("rope_interleave", True)  # of the attention; the indexer uses half-split
    indexer = IndexerSpec(
        num_heads=fields.count("index_n_heads", 16),
        head_dim=fields.count("index_head_dim", 128),
        top_k=fields.count("index_topk", 2048),
    )
    attention = parts.latent_attention(fields, queries=384, indexer=indexer, raw_query_latent=True, query_gate=True)
    # Trap: experts of other groups are masked with 0, not minus infinity.
    moe = parts.grouped_sigmoid(fields, scale=2.5, others="zero")
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    parts.layer_types(fields, number, ["indexed_attention"] * number, ("indexed_attention",))
    older = {"first_k_dense_replace": None, "moe_layer_freq": None}
    dense_layers = parts.dense_by_type(fields, number, dense_by_frequency(fields, number), older=older)
    plain, sparse = parts.layer(attention, dense), parts.layer(attention, moe)
    plain = plain.model_copy(update={"attention_norm_gate": rank})
    sparse = sparse.model_copy(update={"attention_norm_gate": rank, "feed_forward_norm_gate": rank})
    layers = [plain if is_dense else sparse for is_dense in dense_layers]
    return parts.model(fields, layers, norm=parts.rms_norm(fields))


def _gated_norm(theirs: str, ours: str) -> tuple[Fused, ...]:
    """Return rules for a norm with a gate."""
    gate = ((f"{OURS}.{ours}_gate.w_down", "d z"),)
    return (
        Tensor(f"{LAYER}.{theirs}.norm.weight", "d", f"{OURS}.{ours}.scale", "d", sizes=gate),
        Tensor(f"{LAYER}.{theirs}.W_down.weight", "z d", f"{OURS}.{ours}_gate.w_down", "d z"),
        Tensor(f"{LAYER}.{theirs}.W_up.weight", "d z", f"{OURS}.{ours}_gate.w_up", "z d"),
        Tensor(f"{LAYER}.{theirs}.mlp.fc1.weight", "z d", f"{OURS}.{ours}_gate.w_down", "d z"),  # in transformers 5
        Tensor(f"{LAYER}.{theirs}.mlp.fc2.weight", "d z", f"{OURS}.{ours}_gate.w_up", "z d"),
    )


def _queries(name: str) -> Fused:
    """Return the rule for the projection of queries and gate, which are interleaved by head."""
    query, gate = Part(f"{OURS}.attention.w_query", "h", "q n h"), Part(f"{OURS}.attention.w_query_gate", "v", "q n v")
    return Fused(f"{LAYER}.self_attn.{name}.weight", "(n x) q", (query, gate))


_NORMS = (
    *_gated_norm("input_layernorm", "attention_norm"),
    *_gated_norm("post_attention_layernorm", "feed_forward_norm"),
)

FAMILY = Family(
    model_types=("axk2",),
    architecture="AXK2ForCausalLM",
    spec=spec,
    tensors=parts.exported(
        (
            *(rule for rule in DEEPSEEK.tensors if ".q_b_proj." not in rule.theirs and ".q_proj." not in rule.theirs),
            _queries("q_b_proj"),
            _queries("q_gate_proj"),  # the name in transformers 5
        ),
        _NORMS,
    ),
    kept=DEEPSEEK.kept,
    later_layers_kept=True,
    harmless=DEEPSEEK.harmless,
)
