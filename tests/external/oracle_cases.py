"""The tiny configs of every family and option, in the spelling of files on the hub, and how their weights are drawn."""

# ruff: noqa: C408 (fields of config.json read best as keywords)

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Shapes = dict[str, tuple[int, ...]]
Stored = dict[str, tuple[str, np.ndarray]]

LAWS = {
    "matrix": {"mean": 0.0, "std": 0.25},
    "router": {"mean": 0.0, "std": 0.35},
    "embedding": {"mean": 0.0, "std": 0.5},
    "norm": {"mean": 1.0, "std": 0.2},
    "zero_centred_norm": {"mean": 0.0, "std": 0.2},
    "bias": {"mean": 0.0, "std": 0.2},
    "correction": {"mean": 0.0, "std": 0.1},
    "sink": {"mean": 0.0, "std": 1.0},
    "log_decay": {"mean": -2.0, "std": 0.5},
    "time_step": {"mean": -1.0, "std": 0.5},
    "convolution": {"mean": 0.0, "std": 0.5},
    "scale": {"mean": 1.0, "std": 0.2},
}

# the first that is found in a name decides
LAW_OF_NAME = (
    (r"e_score_correction_bias$|expert_bias$", "correction"),
    (r"sinks$|attention_sink_bias$", "sink"),
    (r"A_log$", "log_decay"),
    (r"dt_bias$", "time_step"),
    (r"conv1d\.weight$|conv\.conv\.weight$", "convolution"),
    (r"layer_scalar$|per_expert_scale$|router\.scale$", "scale"),
    (r"embed_tokens\.weight$|wte\.weight$", "embedding"),
    (r"bias$", "bias"),
    (r"norm(_1|_2|_f)?(\.\d)?\.weight$", "norm"),
    (r"\.(gate|router|router\.layer|router\.gate|router\.classifier|gate\.wg|router\.proj)\.weight$", "router"),
)


def as_written(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], str]]:
    """Storage in float32, one to one."""
    return [(name, shape, "F32")]


@dataclass(frozen=True)
class Case:
    """A checkpoint to make. The three functions are for what transformers writes otherwise than the hub does."""

    note: str
    config: dict[str, Any]
    laws: dict[str, dict[str, float]] = field(default_factory=dict)
    keep_hidden: bool = False
    hub_only: dict[str, Any] = field(default_factory=dict)
    config_additions: dict[str, Any] = field(default_factory=dict)
    as_on_the_hub: Callable[[Shapes], Shapes] = lambda shapes: shapes
    storage: Callable[[str, tuple[int, ...]], list[tuple[str, tuple[int, ...], str]]] = as_written
    for_transformers: Callable[[Stored], Stored | None] = lambda tensors: None

    @property
    def all_laws(self) -> dict[str, dict[str, float]]:
        return LAWS | self.laws


def law_of(case: Case, name: str, dtype: str) -> str:
    """The law that draws the tensor of that name."""
    if dtype == "U8":
        return name.rsplit("_", 1)[-1]
    if name.endswith("weight_scale_inv"):
        return "block_scale"
    law = next((law for pattern, law in LAW_OF_NAME if re.search(pattern, name)), "matrix")
    if law == "norm" and case.config["model_type"] in ("qwen3_next", "qwen3_5_moe_text"):
        return law if "linear_attn" in name else "zero_centred_norm"
    return law


COMMON = {
    "hidden_size": 32,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "torch_dtype": "float32",
}

CASES: dict[str, Case] = {}


def add(name: str, note: str, **rest: Any) -> None:
    """A case of the family `model_type`; fields of `Case` by their names, everything else is config.json."""
    ours = {key: rest.pop(key) for key in list(rest) if key in Case.__dataclass_fields__}
    rest = COMMON | rest
    CASES[name] = Case(note, {key: value for key, value in rest.items() if value is not ...}, **ours)


MIXTRAL = dict(model_type="mixtral", intermediate_size=20, num_local_experts=7, num_experts_per_tok=2, rope_theta=1e6)
QWEN3_MOE = dict(
    model_type="qwen3_moe",
    num_hidden_layers=3,
    head_dim=12,
    intermediate_size=40,
    moe_intermediate_size=20,
    num_experts=7,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[0],
    rope_theta=1e6,
    rms_norm_eps=1e-6,
)
MLA = dict(
    num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=14
)
GROUPED = dict(n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, norm_topk_prob=True)
YARN = dict(
    type="yarn",
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=0.707,
)
DEEPSEEK_V3 = dict(
    model_type="deepseek_v3",
    num_hidden_layers=3,
    intermediate_size=40,
    moe_intermediate_size=20,
    n_shared_experts=1,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    rope_theta=1e4,
    rope_scaling=YARN,
    **MLA,
    **GROUPED,
)

add("mixtral", "softmax over all experts, top-2 renormalised", keep_hidden=True, **MIXTRAL)
add("qwen3_moe", "q/k norm per head, head_dim, dense layer 0", keep_hidden=True, **QWEN3_MOE)
add("deepseek_v3", "MLA with yarn, sigmoid scores with bias, 2 of 4 groups", keep_hidden=True, **DEEPSEEK_V3)

# families without given oracles

add(
    "deepseek_v2_lite",
    "deepseek_v2 in Lite's shape: no query low-rank, no rope scaling, plain top-k, no renormalisation",
    keep_hidden=True,
    model_type="deepseek_v2",
    num_hidden_layers=3,
    intermediate_size=40,
    moe_intermediate_size=20,
    n_routed_experts=7,
    num_experts_per_tok=3,
    n_shared_experts=2,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    aux_loss_alpha=0.001,
    seq_aux=True,
    rope_theta=1e4,
    rope_scaling=None,
    **MLA | dict(q_lora_rank=None),
)
add(
    "deepseek_v32",
    "sparse attention: 16 index heads choose 8 of up to 36 keys",
    keep_hidden=True,
    **DEEPSEEK_V3
    | dict(model_type="deepseek_v32", index_n_heads=16, index_head_dim=12, index_topk=8, num_nextn_predict_layers=...),
)
add(
    "glm4_moe_lite",
    "MLA, grouped sigmoid routing, dense layer 0 by mlp_layer_types",
    keep_hidden=True,
    **DEEPSEEK_V3
    | dict(
        model_type="glm4_moe_lite",
        rope_scaling=None,
        routed_scaling_factor=1.8,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
)
add(
    "dots1",
    "q/k norm per head, grouped sigmoid routing, 2 shared experts, sliding window from layer 1",
    keep_hidden=True,
    model_type="dots1",
    num_hidden_layers=3,
    head_dim=12,
    intermediate_size=40,
    moe_intermediate_size=20,
    n_shared_experts=2,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    scoring_func="noaux_tc",
    sliding_window=8,
    max_window_layers=1,
    rope_theta=1e4,
    **GROUPED,
)
add(
    "exaone_moe",
    "q/k norm, sliding window with rotation and full attention without, grouped sigmoid routing",
    keep_hidden=True,
    model_type="exaone_moe",
    num_hidden_layers=4,
    head_dim=12,
    intermediate_size=40,
    moe_intermediate_size=20,
    num_experts=8,
    num_experts_per_tok=3,
    num_shared_experts=1,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    sliding_window=8,
    sliding_window_pattern="LLLG",
    layer_types=["sliding_attention"] * 3 + ["full_attention"],
    mlp_layer_types=["dense"] + ["sparse"] * 3,
    rope_theta=1e6,
)
add(
    "solar_open",
    "grouped-query attention, grouped sigmoid routing, every layer sparse",
    keep_hidden=True,
    model_type="solar_open",
    head_dim=12,
    partial_rotary_factor=1.0,
    intermediate_size=40,
    moe_intermediate_size=20,
    n_shared_experts=1,
    first_k_dense_replace=0,
    routed_scaling_factor=1.5,
    rope_theta=1e6,
    **GROUPED,
)
add(
    "mellum",
    "q/k norm, sliding window with a rotation of its own, yarn on the full layers, dense layer by list",
    keep_hidden=True,
    model_type="mellum",
    num_hidden_layers=3,
    head_dim=12,
    intermediate_size=40,
    moe_intermediate_size=20,
    num_experts=7,
    num_experts_per_tok=3,
    norm_topk_prob=True,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    mlp_layer_types=["dense", "sparse", "sparse"],
    rope_parameters={
        "full_attention": {
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
)
add(
    "flex_olmo",
    "norms after attention and mixture, q/k norm over the whole projection, no renormalisation",
    keep_hidden=True,
    model_type="flex_olmo",
    intermediate_size=20,
    num_experts=7,
    num_experts_per_tok=3,
    norm_topk_prob=False,
    rope_theta=5e5,
)
GRANITE = dict(
    intermediate_size=20,
    num_local_experts=7,
    num_experts_per_tok=3,
    embedding_multiplier=3.0,
    attention_multiplier=0.2,
    residual_multiplier=0.7,
    logits_scaling=0.5,
    tie_word_embeddings=True,
    rope_theta=1e4,
)
add(
    "granitemoeshared",
    "softmax over the chosen logits, four multipliers, fused gate and up, shared expert, tied head",
    keep_hidden=True,
    model_type="granitemoeshared",
    shared_intermediate_size=28,
    **GRANITE,
)
HUNYUAN = dict(
    model_type="hunyuan_v1_moe",
    head_dim=12,
    intermediate_size=20,
    num_experts=7,
    moe_topk=2,
    num_shared_expert=1,
    use_mixed_mlp_moe=True,
    use_qk_norm=True,
    tie_word_embeddings=True,
    rope_theta=1e4,
)
add(
    "hunyuan_v1_moe",
    "q/k norm after rotation, base stretched by alpha, shared expert, lists of top-k by layer, tied head",
    keep_hidden=True,
    **HUNYUAN
    | dict(
        moe_topk=[2, 2],
        rope_scaling={"type": "dynamic", "alpha": 50.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0},
    ),
)
add(
    "mistral4",
    "MLA with yarn, softmax routing in groups masked with 0, queries scaled by position",
    keep_hidden=True,
    **DEEPSEEK_V3
    | dict(
        model_type="mistral4",
        num_nextn_predict_layers=...,
        scoring_func=...,
        topk_method=...,
        rope_theta=...,
        rope_scaling=...,
        rope_interleave=True,
        rope_parameters={
            "type": "yarn",
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "original_max_position_embeddings": 8,
            "max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
)
add(
    "afmoe",
    "gated attention with q/k norm, rotation on sliding layers alone, four norms a layer, embedding times sqrt(D)",
    keep_hidden=True,
    model_type="afmoe",
    num_hidden_layers=3,
    head_dim=12,
    intermediate_size=40,
    moe_intermediate_size=20,
    num_dense_layers=1,
    num_experts=7,
    num_experts_per_tok=3,
    num_shared_experts=2,
    n_group=1,
    topk_group=1,
    score_func="sigmoid",
    route_norm=True,
    route_scale=2.5,
    mup_enabled=True,
    global_attn_every_n_layers=3,
    sliding_window=8,
    rope_theta=1e4,
)
add(
    "mimo_v2_flash",
    "sliding window with sinks and twice the kv heads, narrow scaled values, a third of each head rotated",
    keep_hidden=True,
    model_type="mimo_v2_flash",
    num_hidden_layers=3,
    num_key_value_heads=1,
    head_dim=12,
    v_head_dim=10,
    intermediate_size=40,
    moe_intermediate_size=20,
    attention_value_scale=0.707,
    routed_scaling_factor=None,
    sliding_window_size=7,
    hub_only=dict(
        hybrid_layer_pattern=[0, 1, 0],
        moe_layer_freq=[0, 1, 1],
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=12,
        swa_v_head_dim=10,
        swa_rope_theta=1e4,
        rope_theta=5e6,
        partial_rotary_factor=0.334,
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        layernorm_epsilon=1e-5,
        n_shared_experts=None,
    ),
    layer_types=["full_attention", "sliding_attention", "full_attention"],
    mlp_layer_types=["dense", "sparse", "sparse"],
    rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.334},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.334},
    },
    **GROUPED,
)
add(
    "dbrx",
    "fused and clipped q, k, v, layer norms without bias, experts of all in one matrix, renormalised",
    keep_hidden=True,
    model_type="dbrx",
    hidden_size=...,
    num_attention_heads=...,
    num_key_value_heads=...,
    num_hidden_layers=...,
    max_position_embeddings=...,
    rms_norm_eps=...,
    hidden_act=...,
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=128,
    rope_theta=5e5,
    attn_config={"clip_qkv": 1.5, "kv_n_heads": 2, "rope_theta": 5e5},
    ffn_config={
        "ffn_act_fn": {"name": "silu"},
        "ffn_hidden_size": 20,
        "moe_num_experts": 7,
        "moe_top_k": 3,
        "moe_loss_weight": 0.05,
        "moe_normalize_expert_weights": 1.0,
        "moe_jitter_eps": None,
    },
)


def without_identity_rows(shapes: Shapes) -> Shapes:
    """The hub has no weights for experts that compute nothing; transformers 5.23 writes and wants gate and up."""
    return {name: shape for name, shape in shapes.items() if not re.search(r"experts\.(7|8|9)\.", name)}


def with_identity_rows(tensors: Stored) -> Stored:
    """Zeros where transformers wants what it never reads."""
    zero = {
        re.sub(r"experts\.0\.", f"experts.{expert}.", name): (dtype, np.zeros_like(array))
        for name, (dtype, array) in tensors.items()
        for expert in (7, 8, 9)
        if re.search(r"experts\.0\.(gate|up)_proj", name)
    }
    return tensors | zero


add(
    "longcat_flash",
    "two MLA and two dense networks a layer, the mixture as a shortcut, 7 experts and 3 identities",
    keep_hidden=True,
    as_on_the_hub=without_identity_rows,
    for_transformers=with_identity_rows,
    laws={"correction": {"mean": 0.0, "std": 0.02}},
    model_type="longcat_flash",
    num_hidden_layers=...,
    num_layers=2,
    ffn_hidden_size=40,
    expert_ffn_hidden_size=20,
    n_routed_experts=7,
    zero_expert_num=3,
    zero_expert_type="identity",
    moe_topk=3,
    routed_scaling_factor=6.0,
    router_bias=False,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
    attention_method="MLA",
    head_dim=8,
    rope_theta=1e7,
    **MLA,
)
DELTA = dict(
    linear_conv_kernel_dim=4,
    linear_key_head_dim=8,
    linear_value_head_dim=10,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    num_hidden_layers=3,
    head_dim=16,
    moe_intermediate_size=20,
    shared_expert_intermediate_size=28,
    num_experts=7,
    num_experts_per_tok=3,
)


def with_fused_experts(shapes: Shapes) -> Shapes:
    """Experts in two tensors, gate above up, where transformers 5.23 would write a tensor for each."""
    fused: Shapes = {}
    for name, shape in shapes.items():
        match = re.search(r"(.*\.experts\.)(\d+)\.(gate|up|down)_proj\.weight$", name)
        if not match:
            fused[name] = shape
        elif match[3] != "up":
            key = match[1] + ("down_proj" if match[3] == "down" else "gate_up_proj")
            rows = shape[0] * (1 if match[3] == "down" else 2)
            fused[key] = (fused.get(key, (0,))[0] + 1, rows, shape[1])
    return fused


add(
    "qwen3_5_moe_text",
    "gated delta networks and gated attention, gated shared expert, a quarter of each head rotated, fused experts",
    keep_hidden=True,
    as_on_the_hub=with_fused_experts,
    model_type="qwen3_5_moe_text",
    full_attention_interval=3,
    attn_output_gate=True,
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [1, 1, 0],
    },
    **DELTA,
)
add(
    "lfm2_moe",
    "short convolutions and attention with q/k norm, sigmoid scores with bias, tied head",
    keep_hidden=True,
    model_type="lfm2_moe",
    rms_norm_eps=...,
    norm_eps=1e-5,
    num_hidden_layers=4,
    layer_types=["conv", "full_attention", "conv", "conv"],
    conv_L_cache=3,
    conv_bias=False,
    intermediate_size=40,
    moe_intermediate_size=20,
    num_dense_layers=1,
    num_experts=7,
    num_experts_per_tok=3,
    use_expert_bias=True,
    norm_topk_prob=True,
    routed_scaling_factor=1.5,
    tie_word_embeddings=True,
    rope_theta=1e6,
)
