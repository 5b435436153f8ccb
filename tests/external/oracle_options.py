"""Configs with options beyond the main cases, and files in other layouts and dtypes."""

# ruff: noqa: C408 (fields of config.json are more readable as keywords)

from oracle_case import (
    COMMON,
    add,
    as_axk1_is_released,
    in_dtype,
    in_e4m3_channels,
    inside_a_wrapper,
    inside_a_wrapper_without_hashes,
    renamed,
    unwrapped,
    with_fused_experts,
    with_hashes,
    with_mixed_experts,
    with_prediction_layer,
    without,
    without_e4m3_channels,
)
from oracle_families import (
    ARIA,
    AXK1,
    AXK2,
    BAILING_HYBRID,
    COHERE2_MOE,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    DELTA,
    DOGE,
    DOTS3_NOTE,
    ERNIE,
    GEMMA4,
    GLM4_MOE,
    GLM_MOE_DSA,
    GPT_OSS,
    GRANITE,
    GROUPED,
    HUNYUAN,
    HY_V3,
    HYBRID,
    INKLING2,
    KIMI_LINEAR,
    LAGUNA,
    LLAMA4,
    LONGCAT_FLASH,
    MINIMAX_M3,
    MISTRAL4,
    MIXTRAL,
    NEMOTRON,
    OLMOE,
    PHIMOE,
    QWEN3_MOE,
    QWEN3_NEXT,
    QWEN4,
)

add(
    "mixtral_sliding_tied",
    "sliding window, tied head, head_dim",
    **MIXTRAL | dict(sliding_window=8, tie_word_embeddings=True, head_dim=12),
)
add("mixtral_bfloat16", "stored in bfloat16", storage=in_dtype("BF16"), **MIXTRAL | dict(torch_dtype="bfloat16"))
add("mixtral_float16", "stored in float16", storage=in_dtype("F16"), **MIXTRAL | dict(torch_dtype="float16"))
add(
    "qwen3_moe_step",
    "dense layers by step, no renormalization, biases of q, k, v, o, sliding window, tied head",
    **QWEN3_MOE
    | dict(
        norm_topk_prob=False,
        decoder_sparse_step=2,
        mlp_only_layers=[],
        num_hidden_layers=4,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=4,
        tie_word_embeddings=True,
    ),
)
add("qwen3_moe_fused", "fused experts in every layer", as_on_the_hub=with_fused_experts, **QWEN3_MOE)
add(
    "qwen3_moe_mixed",
    "fused experts in layer 2, a tensor per expert in layer 1",
    as_on_the_hub=with_mixed_experts,
    **QWEN3_MOE,
)

SHORT_FACTORS, LONG_FACTORS = [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], [1.0, 1.5, 2.5, 4.0, 6.0, 8.0]
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS}
for name, note, scaling in (
    ("linear", "positions divided by 4", {"type": "linear", "factor": 4.0}),
    (
        "dynamic",
        "frequencies that scale beyond 128 tokens, which is never reached",
        {"type": "dynamic", "factor": 4.0},
    ),
    (
        "llama3",
        "low frequencies divided, high ones kept, a ramp between",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    (
        "yarn",
        "with an explicit attention factor, and bounds that are not rounded",
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "attention_factor": 1.3,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
    ),
    ("longrope_short", "below the original length: short factors", LONGROPE | {"original_max_position_embeddings": 64}),
    ("longrope_long", "beyond the original length: long factors", LONGROPE | {"original_max_position_embeddings": 16}),
):
    refused = "expected at most 16 tokens" if name == "longrope_long" else ""
    add(f"qwen3_moe_rope_{name}", note, refused=refused, **QWEN3_MOE | dict(rope_theta=1e4, rope_scaling=scaling))
add(
    "qwen3_moe_rope_dynamic_beyond",
    "24 tokens where the config's length is 16: frequencies scale with the length; no greedy tokens",
    cache_agrees=False,
    refused="expected at most 16 tokens",
    **QWEN3_MOE | dict(rope_theta=1e4, max_position_embeddings=16, rope_scaling={"type": "dynamic", "factor": 4.0}),
)
add(
    "qwen2_moe_sliding",
    "sliding and full layers, renormalized, dense layers by step, no biases",
    model_type="qwen2_moe",
    num_hidden_layers=4,
    intermediate_size=40,
    moe_intermediate_size=20,
    shared_expert_intermediate_size=28,
    num_experts=7,
    num_experts_per_tok=3,
    norm_topk_prob=True,
    decoder_sparse_step=2,
    mlp_only_layers=[],
    qkv_bias=False,
    use_sliding_window=True,
    sliding_window=8,
    max_window_layers=3,
    rope_theta=1e6,
)
add(
    "deepseek_v3_half_split",
    "half-split instead of interleaved RoPE, attention biases, no yarn",
    **DEEPSEEK_V3 | dict(rope_interleave=False, attention_bias=True, rope_scaling=None),
)
add(
    "deepseek_v3_no_query_rank",
    "no query low-rank, no renormalization, two shared experts, tied head (Moonlight's shape)",
    **DEEPSEEK_V3
    | dict(q_lora_rank=None, norm_topk_prob=False, n_shared_experts=2, rope_scaling=None, tie_word_embeddings=True),
)
add(
    "deepseek_v3_prediction_layer",
    "with the tensors of a multi-token prediction layer, which do not affect logits",
    as_on_the_hub=with_prediction_layer,
    for_transformers=without(r"layers\.3\."),
    **DEEPSEEK_V3,
)
add(
    "deepseek_v32_plain",
    "as many keys selected as there are up to token 30, no yarn, attention biases",
    **DEEPSEEK_V3
    | dict(
        model_type="deepseek_v32",
        index_n_heads=16,
        index_head_dim=12,
        index_topk=30,
        num_nextn_predict_layers=...,
        rope_scaling=None,
        attention_bias=True,
    ),
)
add(
    "glm4_moe_plain",
    "no q/k norm, no biases, full rotary, groups that bind",
    **GLM4_MOE | dict(use_qk_norm=False, attention_bias=False, partial_rotary_factor=1.0, n_group=4, topk_group=2),
)
add(
    "glm_moe_dsa_pattern",
    "two layers share with the first by a pattern of letters, top 30 of up to 36 keys, groups, biases, yarn",
    **GLM_MOE_DSA
    | dict(
        index_topk_pattern="FSS",
        index_topk=30,
        attention_bias=True,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        rope_parameters={"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}
        | {"original_max_position_embeddings": 1024, "mscale": 1.0, "mscale_all_dim": 0.707},
    ),
)
add(
    "axk2_list",
    "dense layers by list, top 30 of up to 36 keys, biases, no yarn, no renormalization, 2 shared experts, tied head; "
    "experts of the other group count as zero, and biases are low enough that they are chosen",
    laws={"correction": {"mean": -1.5, "std": 0.8}},
    **AXK2
    | dict(
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        attention_bias=True,
        first_k_dense_replace=...,
        moe_layer_freq=...,
        index_topk=30,
        mlp_layer_types=["sparse", "dense", "sparse"],
        n_shared_experts=2,
        norm_topk_prob=False,
        rope_scaling=None,
        tie_word_embeddings=True,
    ),
)
add(
    "deepseek_v2_bias",
    "biases of attention, of dense and shared feed-forwards, but not of experts; exact GELU",
    **DEEPSEEK_V2_LITE | dict(num_hidden_layers=2, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
)
add(
    "nemotron_h_latent_bias",
    "biases of the projections to and from the latent space, of dense and shared feed-forwards",
    **NEMOTRON | dict(layers_block_type=["linear_attention", "moe", "full_attention", "mlp"], mlp_bias=True),
)
add(
    "axk1_no_bias",
    "files without a selection bias, and an unused norm of dense layers; every second layer sparse, half-split",
    as_on_the_hub=as_axk1_is_released,
    for_transformers=without(r"layers\.[13]\.post_mlp_layernorm"),
    **AXK1
    | dict(
        first_k_dense_replace=0,
        moe_layer_freq=2,
        num_hidden_layers=4,
        rope_interleave=False,
        rope_scaling=None,
        routed_scaling_factor=1.5,
    ),
)
add(
    "glm4_moe_lite_no_query_rank",
    "no query low-rank, half-split RoPE, yarn",
    **DEEPSEEK_V3
    | dict(
        model_type="glm4_moe_lite",
        q_lora_rank=None,
        rope_interleave=False,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
)
add(
    "ernie4_5_moe_bias",
    "biases everywhere, every second layer sparse, untied",
    **ERNIE
    | dict(
        use_bias=True,
        num_hidden_layers=4,
        moe_layer_start_index=1,
        moe_layer_end_index=-1,
        moe_layer_interval=2,
        moe_num_shared_experts=1,
        tie_word_embeddings=False,
    ),
)
add(
    "granitemoe_bias",
    "attention biases, no multipliers, untied",
    model_type="granitemoe",
    **GRANITE
    | dict(
        attention_bias=True,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        attention_multiplier=0.35,
        tie_word_embeddings=False,
    ),
)
add(
    "granitemoeshared_no_shared",
    "shared_intermediate_size 0 means no shared expert",
    model_type="granitemoeshared",
    laws={"embedding": {"mean": 0.0, "std": 0.2}},
    shared_intermediate_size=0,
    **GRANITE,
)
add(
    "granitemoe_swa_plain",
    "which layers slide and their RoPE by default, no shared expert, attention biases, untied",
    model_type="granitemoe_swa",
    num_hidden_layers=3,
    sliding_window=6,
    laws={"embedding": {"mean": 0.0, "std": 0.2}},
    **GRANITE | dict(attention_bias=True, tie_word_embeddings=False),
)
ARIA_NAMES = (
    "language_model.model.",
    "language_model.",
    {"vision_tower.post_layernorm.weight": (24,), "multi_modal_projector.query": (8, 24)},
)
add(
    "aria",
    "inside the multimodal wrapper: one kv head for two heads, biases, one shared expert, of GELU",
    as_on_the_hub=renamed(*ARIA_NAMES),
    for_transformers=unwrapped(*ARIA_NAMES),
    wrapper={
        "architectures": ["AriaForConditionalGeneration"],
        "model_type": "aria",
        "dtype": "float32",
        "tie_word_embeddings": False,
        "image_token_index": 9,
        "vision_feature_layer": -1,
        "projector_patch_to_query_dict": {"1225": 128, "4900": 256},
        "vision_config": {"model_type": "idefics3_vision", "hidden_size": 24, "num_hidden_layers": 1},
    },
    **ARIA
    | dict(num_key_value_heads=2, head_dim=12, attention_bias=True, mlp_bias=True, moe_num_shared_experts=1)
    | dict(hidden_act="gelu"),
)
add(
    "hy_v3_bias",
    "biases, dense layers by list, 2 shared experts, half the scale, tied head",
    **HY_V3
    | dict(
        attention_bias=True,
        mlp_bias=True,
        mlp_layer_types=["sparse", "dense", "sparse"],
        num_shared_experts=2,
        router_scaling_factor=1.4,
        rope_theta=1e4,
        tie_word_embeddings=True,
    ),
)
add("olmoe_renormalised", "renormalized, no clip", **OLMOE | dict(norm_topk_prob=True, clip_qkv=None))
add(
    "flex_olmo_renormalised",
    "renormalized, tied head",
    model_type="flex_olmo",
    intermediate_size=20,
    num_experts=7,
    num_experts_per_tok=3,
    norm_topk_prob=True,
    tie_word_embeddings=True,
    rope_theta=5e5,
)
add(
    "phimoe_sliding",
    "sliding window, no biases, plain RoPE, a wide jitter mask",
    **PHIMOE | dict(sliding_window=8, attention_bias=False, lm_head_bias=False, router_jitter_noise=0.1),
)
add(
    "llama4_text_top2",
    "two experts per token, every layer sparse, no q/k norm, no temperature, biases, tied head",
    **LLAMA4
    | dict(
        num_hidden_layers=2,
        num_experts_per_tok=2,
        interleave_moe_layer_step=1,
        no_rope_layers=[1, 0],
        use_qk_norm=False,
        attn_temperature_tuning=False,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_scaling=None,
    ),
)
add(
    "gpt_oss_clamped",
    "a clamp that binds, another slope, no attention biases, the first layer full, rounded yarn bounds",
    **GPT_OSS
    | dict(
        swiglu_limit=1.0,
        swiglu_alpha=1.5,
        attention_bias=False,
        layer_types=["full_attention", "sliding_attention"],
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 1024,
        },
    ),
)
add(
    "gemma4_text_shared_kv",
    "keys as values and one kv head on full layers, as in the 26B-A4B",
    **GEMMA4 | dict(attention_k_eq_v=True, num_global_key_value_heads=1, final_logit_softcapping=30.0),
)
add(
    "gemma4_text_keys_of_layers",
    "the last three layers attend to the keys of the second and third; wider dense feed-forwards; per-layer embeddings",
    **GEMMA4
    | dict(
        num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=3,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=10,  # without it transformers 5.23 cannot generate with shared keys
    ),
)
add(
    "qwen3_next_dense",
    "dense layer 0, no renormalization, attention biases, that of the gate among them",
    **QWEN3_NEXT | dict(mlp_only_layers=[0], norm_topk_prob=False, attention_bias=True),
)
add(
    "qwen3_5_moe",
    "a text model inside a multimodal wrapper: nested config, other prefix, tensors that the text model does not use",
    as_on_the_hub=inside_a_wrapper,
    for_transformers=without(r"^mtp\.|^model\.visual\."),
    **{key: ... for key in COMMON if key != "tie_word_embeddings"},
    model_type="qwen3_5_moe",
    text_config={key: value for key, value in COMMON.items() if key != "torch_dtype"}
    | {
        "model_type": "qwen3_5_moe_text",
        "dtype": "float32",
        "full_attention_interval": 3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [1, 1, 0],
        },
    }
    | DELTA,
    vision_config={"model_type": "qwen3_5_moe_vision", "depth": 1, "hidden_size": 24, "num_heads": 2, "patch_size": 4},
    tie_word_embeddings=False,
)
QWEN4_ONE = QWEN4 | dict(
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    ple_layer_ids=[1],
    split_ngram_parts=1,
    ngram_size=2,
    eos_token_id=5,
    output_gate_type=None,
    norm_topk_prob=True,
    attention_bias=True,
)
add(
    "qwen4_exp",
    "inside the multimodal wrapper; n-gram embeddings in one part, silu output gates, renormalized weights, biases",
    as_on_the_hub=inside_a_wrapper_without_hashes,
    for_transformers=with_hashes("model.language_model.", COMMON | QWEN4_ONE),
    **{key: ... for key in COMMON if key != "tie_word_embeddings"},
    model_type="qwen4_exp",
    text_config={key: value for key, value in COMMON.items() if key != "torch_dtype"}
    | {"model_type": "qwen4_exp_text", "dtype": "float32"}
    | QWEN4_ONE,
    vision_config={"model_type": "qwen4_exp_vision", "depth": 1, "hidden_size": 24, "num_heads": 2, "patch_size": 4},
    tie_word_embeddings=False,
)
LLAMA4_NAMES = ("language_model.model.", "language_model.", {"vision_model.class_embedding": (24,)})
add(
    "llama4",
    "inside the multimodal wrapper: names under language_model.model, the head under language_model",
    as_on_the_hub=renamed(*LLAMA4_NAMES),
    for_transformers=unwrapped(*LLAMA4_NAMES),
    wrapper={
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "boi_token_index": 60,
        "eoi_token_index": 61,
        "image_token_index": 62,
        "vision_config": {"model_type": "llama4_vision_model", "hidden_size": 24, "num_hidden_layers": 1},
    },
    **LLAMA4,
)
GEMMA4_NAMES = ("model.language_model.", "", {"model.vision_tower.patch_embedder.input_proj.weight": (24, 48)})
add(
    "gemma4",
    "inside the multimodal wrapper: names under model.language_model, tied head",
    as_on_the_hub=renamed(*GEMMA4_NAMES),
    for_transformers=unwrapped(*GEMMA4_NAMES),
    wrapper={
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "float32",
        "tie_word_embeddings": True,
        "image_token_id": 60,
        "vision_config": {"model_type": "gemma4_vision", "hidden_size": 24, "num_hidden_layers": 1},
        "audio_config": None,
    },
    **GEMMA4,
)
DOTS3_NAMES = (
    "model.",
    "",
    {
        "vision_encoder.post_trunk_norm.weight": (24,),
        "audio_encoder.dots_encoder.speech_encoder.conv_out.weight": (16, 8),
    },
)
add(
    "dots3_note",
    "inside the multimodal wrapper: no indexer, biases, no groups, no renormalization, dense layers by a list",
    as_on_the_hub=renamed(*DOTS3_NAMES),
    for_transformers=unwrapped(*DOTS3_NAMES),
    wrapper={
        "architectures": ["Dots3NoteForConditionalGeneration"],
        "model_type": "dots3_note",
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "image_token_id": 60,
        "vision_config": {
            "model_type": "dots3_note_vision_encoder",
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 24,
            "adapter_out_dim": 32,
        },
        "audio_config": {
            "model_type": "dots3_note_audio_encoder",
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "adapter_input_size": 16,
            "adapter_out_dim": 32,
        },
    },
    **DOTS3_NOTE
    | dict(
        num_hidden_layers=3,
        use_dsa=False,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        first_k_dense_replace=0,
        moe_layer_freq=[1, 1, 0],
        attention_bias=True,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        n_shared_experts=2,
    ),
)
MISTRAL4_NAMES = ("language_model.model.", "language_model.", {"vision_tower.ln_pre.weight": (24,)})
add(
    "mistral4_wrapped",
    "inside Mistral 3's multimodal wrapper",
    as_on_the_hub=renamed(*MISTRAL4_NAMES),
    for_transformers=unwrapped(*MISTRAL4_NAMES),
    wrapper={
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "dtype": "float32",
        "tie_word_embeddings": False,
        "image_token_index": 10,
        "vision_config": {"model_type": "pixtral", "hidden_size": 24, "num_hidden_layers": 1},
    },
    **MISTRAL4,
)
add(
    "lfm2_moe_plain",
    "no selection bias, no renormalization, biased convolutions, untied",
    model_type="lfm2_moe",
    rms_norm_eps=...,
    norm_eps=1e-5,
    num_hidden_layers=3,
    layer_types=["conv", "full_attention", "conv"],
    conv_L_cache=4,
    conv_bias=True,
    intermediate_size=40,
    moe_intermediate_size=20,
    num_dense_layers=0,
    num_experts=7,
    num_experts_per_tok=3,
    use_expert_bias=False,
    norm_topk_prob=False,
    tie_word_embeddings=False,
    rope_theta=1e6,
)
add(
    "hunyuan_v1_moe_plain",
    "no alpha, one number for top-k, biases, untied",
    **HUNYUAN | dict(moe_topk=3, attention_bias=True, tie_word_embeddings=False, rope_scaling=None),
)
add(
    "dots1_plain",
    "no window, attention biases, no renormalization, head_dim by division",
    model_type="dots1",
    intermediate_size=40,
    moe_intermediate_size=20,
    n_shared_experts=1,
    first_k_dense_replace=0,
    routed_scaling_factor=1.0,
    attention_bias=True,
    sliding_window=None,
    rope_theta=1e4,
    **GROUPED | dict(norm_topk_prob=False, n_group=1, topk_group=1),
)
add(
    "solar_open_yarn",
    "yarn, attention biases",
    max_position_embeddings=2048,
    routed_scaling_factor=1.0,
    partial_rotary_factor=1.0,
    model_type="solar_open",
    head_dim=12,
    intermediate_size=40,
    moe_intermediate_size=20,
    n_shared_experts=1,
    first_k_dense_replace=0,
    attention_bias=True,
    rope_theta=1e6,
    rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024},
    **GROUPED,
)
add(
    "afmoe_plain",
    "no scaled embedding, one shared expert, all but one layer full",
    model_type="afmoe",
    num_hidden_layers=3,
    head_dim=12,
    intermediate_size=40,
    moe_intermediate_size=20,
    num_dense_layers=2,
    num_experts=7,
    num_experts_per_tok=2,
    num_shared_experts=1,
    route_scale=1.0,
    mup_enabled=False,
    layer_types=["full_attention", "sliding_attention", "full_attention"],
    sliding_window=8,
    rope_theta=1e4,
)
add(
    "longcat_flash_bias",
    "no identities, attention biases, GELU under another name",
    laws={"correction": {"mean": 0.0, "std": 0.02}},
    **LONGCAT_FLASH | dict(num_layers=1, zero_expert_num=0, attention_bias=True, hidden_act="gelu_fast"),
)
add(
    "inkling2_text_sqrt",
    "scores are the root of softplus; a layer of each kind",
    **INKLING2 | dict(num_hidden_layers=2, layer_types=["hybrid_sliding", "hybrid"], scoring_func="sqrtsoftplus"),
)
add(
    "mistral4_plain",
    "half-split RoPE, no query low-rank, attention biases, no renormalization, temperature of the context length",
    **MISTRAL4
    | dict(
        rope_interleave=False,
        q_lora_rank=None,
        attention_bias=True,
        norm_topk_prob=False,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
            "llama_4_scaling_beta": 0.3,
        },
    ),
)
add(
    "dbrx_p2",
    "weights divided by their Euclidean norm, a clip that never binds, as many kv heads as heads",
    **{key: ... for key in COMMON if key not in ("vocab_size", "torch_dtype", "tie_word_embeddings")},
    model_type="dbrx",
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=128,
    rope_theta=1e4,
    tie_word_embeddings=False,
    attn_config={"clip_qkv": 8.0, "kv_n_heads": 4, "rope_theta": 1e4},
    ffn_config={
        "ffn_act_fn": {"name": "silu"},
        "ffn_hidden_size": 20,
        "moe_num_experts": 5,
        "moe_top_k": 2,
        "moe_normalize_expert_weights": 2.0,
    },
)
COHERE2_NAMES = (
    "model.language_model.",
    "",
    {
        "model.multi_modal_projector.linear_1.weight": (24, 48),
        "model.vision_tower.embeddings.patch_embedding.bias": (24,),
    },
)
add(
    "cohere2_moe_sigmoid",
    "in its multimodal wrapper: RMS norms, biases, sigmoid of the chosen logits, summed shared expert, untied head",
    as_on_the_hub=renamed(*COHERE2_NAMES),
    for_transformers=unwrapped(*COHERE2_NAMES),
    wrapper={
        "architectures": ["Cohere2VisionForConditionalGeneration"],
        "model_type": "cohere2_vision",
        "dtype": "float32",
        "tie_word_embeddings": False,
        "alignment_intermediate_size": 48,
        "downsample_factor": 2,
        "image_token_id": 60,
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 24, "num_hidden_layers": 1},
    },
    **COHERE2_MOE
    | dict(
        num_hidden_layers=3,
        rms_norm_eps=1e-5,
        attention_bias=True,
        expert_selection_fn="sigmoid",
        num_shared_experts=1,
        shared_expert_combination_strategy="sum",
        prefix_dense_sliding_window_pattern=2,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        tie_word_embeddings=False,
    ),
)
add(
    "laguna_per_element",
    "softplus gates per feature, biases, equal head counts, router logits as they are, tied head, default rotations",
    **LAGUNA
    | dict(
        num_attention_heads_per_layer=None,
        moe_routed_scaling_factor=1.0,
        moe_router_logit_softcapping=0.0,
        gating="per-element",
        attention_bias=True,
        rope_parameters=None,
        tie_word_embeddings=True,
    ),
)
add(
    "granitemoehybrid_rope",
    "RoPE, biases of projections but not of convolutions, clipped steps, older names of layers",
    cache_agrees=False,  # one new token is not clipped
    **HYBRID
    | dict(
        position_embedding_type="rope",
        layer_types=["mamba", "attention", "mamba"],
        mamba_d_head="auto",
        mamba_proj_bias=True,
        mamba_conv_bias=False,
        time_step_limit=[0.3, 0.6],
        tie_word_embeddings=False,
    ),
)
add(
    "nemotron_h_plain",
    "no latent space, groups of experts, biases, not renormalized, a pattern of letters, clipped steps",
    cache_agrees=False,  # one new token is not clipped
    **NEMOTRON
    | dict(
        layers_block_type=...,
        hybrid_override_pattern="MM*E-",
        moe_latent_size=None,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        mlp_bias=True,
        use_bias=True,
        use_conv_bias=False,
        time_step_min=0.35,
    ),
)

# FP8 of compressed-tensors: a scale per row

add(
    "qwen3_moe_fp8_channels",
    "E4M3 codes with a scale per row; outputs are of code * scale",
    storage=in_e4m3_channels,
    for_transformers=without_e4m3_channels,
    laws={"block_scale": {"mean": 0.015, "std": 0.003}},
    config_additions={
        "quantization_config": {
            "config_groups": {
                "group_0": {
                    "input_activations": {"dynamic": True, "num_bits": 8, "strategy": "token", "type": "float"},
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"},
                }
            },
            "format": "float-quantized",
            "ignore": ["lm_head", "re:.*mlp.gate$"],
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }
    },
    **QWEN3_MOE,
)
add(
    "kimi_linear_query_rank",
    "kinds by default: full attention in layer 4; queries of low rank, biases, no groups, weights not divided",
    **KIMI_LINEAR
    | dict(
        num_hidden_layers=5,
        linear_attn_config=...,
        linear_num_heads=2,
        linear_head_dim=8,
        q_lora_rank=20,
        attention_bias=True,
        num_expert_group=1,
        topk_group=1,
        moe_renormalize=False,
        first_k_dense_replace=...,
    ),
)
add(
    "bailing_hybrid_softplus",
    "decays without a floor, biases, no groups and no yarn; full attention in every second layer",
    **BAILING_HYBRID
    | dict(
        layer_group_size=2,
        kda_safe_gate=False,
        attention_bias=True,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        rope_scaling=None,
        num_nextn_predict_layers=0,
    ),
)
M3_TEXT = MINIMAX_M3 | dict(
    num_hidden_layers=2,
    moe_layer_freq=[1, 0],
    sparse_attention_config=...,
    layer_types=["minimax_m3_sparse", "full_attention"],
    index_n_heads=1,
    num_key_value_heads=1,
    index_head_dim=6,
    index_block_size=3,
    index_topk_blocks=4,
    index_local_blocks=2,
    partial_rotary_factor=...,
    rotary_dim=4,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    rope_theta=...,
    head_dim=8,
    tie_word_embeddings=...,
)
add(
    "minimax_m3_vl",
    "inside the multimodal wrapper, with the released names; one key/value head, two local blocks, dense layer last",
    **{key: ... for key in COMMON if key != "tie_word_embeddings"},
    model_type="minimax_m3_vl",
    text_config={
        key: value
        for key, value in (COMMON | {"dtype": "float32"} | M3_TEXT).items()
        if value is not ... and key != "torch_dtype"
    },
    vision_config={
        "model_type": "minimax_m3_vl_vision",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 16,
    },
    projector_hidden_size=24,
    tie_word_embeddings=False,
)
add(
    "doge_window",
    "a window beside the dynamic mask, biases, one key/value head, tied",
    loss_times=5,
    **DOGE
    | dict(
        sliding_window=11,
        keep_window_size=8,
        attention_bias=True,
        mlp_bias=True,
        num_key_value_heads=1,
        num_experts=9,
        num_experts_per_tok=5,
        tie_word_embeddings=True,
        rope_scaling=dict(rope_type="linear", factor=2.0),
    ),
)
