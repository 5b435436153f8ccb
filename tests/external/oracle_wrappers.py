"""Cases inside multimodal wrappers, where transformers has no class for the text model alone: it is given text only."""

# ruff: noqa: C408 (fields of config.json are more readable as keywords)

from typing import Any

from oracle_case import COMMON, Shapes, add
from oracle_families import ERNIE, GLM4_MOE, GROUPED, MLA, QWEN3_MOE

VISION = dict(
    depth=1, hidden_size=24, num_heads=2, patch_size=4, intermediate_size=16, out_hidden_size=COMMON["hidden_size"]
)
DEEPSTACK = VISION | dict(num_position_embeddings=16, deepstack_visual_indexes=[0])
AUDIO = dict(
    num_mel_bins=8,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=16,
    d_model=24,
    max_source_positions=16,
    n_window=4,
    n_window_infer=8,
    conv_chunksize=4,
    output_dim=COMMON["hidden_size"],
    downsample_hidden_size=4,
)


def inside(name: str, note: str, outer: dict[str, Any], text: dict[str, Any], **options: Any) -> None:
    """Add a case whose text model has these fields; `outer`: config.json around it, with its model type."""
    text = {key: value for key, value in (COMMON | text).items() if value is not ... and key != "torch_dtype"}
    text["dtype"] = "float32"
    thinker = outer.get("thinker_config")
    inner = {"text_config": text} if thinker is None else {"thinker_config": thinker | {"text_config": text}}
    add(name, note, **options, **dict.fromkeys(COMMON, ...) | outer | inner)


def as_qwen3_vl_is_released(shapes: Shapes) -> Shapes:
    """Transpose the matrices of experts: transformers 5.23 saves them as it computes them, and opens both."""
    return {
        name: (shape[0], shape[2], shape[1]) if ".mlp.experts." in name else shape for name, shape in shapes.items()
    }


MROPE = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 2, 2]}
inside(
    "qwen3_vl_moe",
    "inside the wrapper, fused experts in the released axes, interleaved multimodal RoPE, ids of images in the prompt",
    dict(
        model_type="qwen3_vl_moe",
        vision_config=DEEPSTACK,
        tie_word_embeddings=False,
        image_token_id=9,
        video_token_id=10,
        vision_start_token_id=11,
        vision_end_token_id=12,
    ),
    QWEN3_MOE
    | dict(
        model_type="qwen3_vl_moe_text", rope_theta=5e6, rope_scaling=MROPE, norm_topk_prob=True, mlp_only_layers=[2]
    ),
    as_on_the_hub=as_qwen3_vl_is_released,
    keep_hidden=True,
)
inside(
    "glm4v_moe",
    "inside the wrapper, multimodal RoPE in sections over half of each head, biases by default, auxiliary loss",
    dict(
        model_type="glm4v_moe",
        vision_config=VISION | dict(image_size=16),
        tie_word_embeddings=False,
        image_token_id=9,
        video_token_id=10,
        image_start_token_id=11,
        image_end_token_id=12,
        video_start_token_id=13,
        video_end_token_id=14,
    ),
    GLM4_MOE
    | dict(
        model_type="glm4v_moe_text",
        head_dim=16,
        rope_theta=1e4,
        rope_scaling={"type": "default", "mrope_section": [1, 1, 2]},
        use_qk_norm=False,
        attention_bias=...,
        num_nextn_predict_layers=...,
    ),
)
inside(
    "ernie4_5_vl_moe",
    "inside the wrapper: experts and a router for text, others for images; interleaved RoPE in sections, tied head",
    dict(
        model_type="ernie4_5_vl_moe",
        vision_config={key: value for key, value in VISION.items() if key != "out_hidden_size"},
        tie_word_embeddings=True,
        image_token_id=9,
        video_token_id=10,
        image_start_token_id=11,
        image_end_token_id=12,
        video_start_token_id=13,
        video_end_token_id=14,
    ),
    {key: value for key, value in ERNIE.items() if key != "laws" and not key.startswith("moe_layer_")}
    | dict(
        model_type="ernie4_5_vl_moe_text",
        moe_intermediate_size=[20, 12],
        mlp_layer_types=["dense", "sparse", "sparse"],
        rope_theta=...,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5, "mrope_section": [1, 1, 2]},
    ),
    laws=ERNIE["laws"],
    keep_hidden=True,
)
THINKER = QWEN3_MOE | dict(
    model_type="qwen3_omni_moe_text",
    rope_scaling=MROPE | {"interleaved": True, "type": "default"},
    use_sliding_window=False,
    sliding_window=None,
)
OMNI = dict(
    vision_config=DEEPSTACK,
    audio_config=AUDIO,
    audio_token_id=8,
    image_token_id=9,
    video_token_id=10,
    vision_start_token_id=11,
    vision_end_token_id=12,
    audio_start_token_id=13,
    audio_end_token_id=14,
    position_id_per_seconds=13,
    seconds_per_chunk=2,
)
inside(
    "qwen3_omni_moe_thinker",
    "the thinker alone, interleaved multimodal RoPE, ids of sounds and images in the prompt",
    dict(model_type="qwen3_omni_moe_thinker", tie_word_embeddings=False, **OMNI),
    THINKER | dict(norm_topk_prob=..., rope_theta=...),
)
TALKER_TEXT = dict(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=8,
    num_experts_per_tok=2,
    num_experts=4,
)
PREDICTOR = dict(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_code_groups=2,
)
CODE2WAV = dict(
    codebook_size=24,
    hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=16,
    num_hidden_layers=1,
    num_quantizers=2,
    upsample_rates=[2],
    upsampling_ratios=[2],
    decoder_dim=16,
)
inside(
    "qwen3_omni_moe",
    "the thinker's text model beside talker and code2wav, no renormalization",
    dict(
        model_type="qwen3_omni_moe",
        thinker_config=dict(model_type="qwen3_omni_moe_thinker", tie_word_embeddings=False, **OMNI),
        talker_config=dict(
            text_config=TALKER_TEXT,
            code_predictor_config=PREDICTOR,
            num_code_groups=2,
            thinker_hidden_size=32,
            spatial_merge_size=2,
        ),
        code2wav_config=CODE2WAV,
        enable_audio_output=True,
    ),
    THINKER | dict(norm_topk_prob=False),
)
inside(
    "glm5_next",
    "inside the wrapper: linear layers, pools of 4 tokens without rotation, chosen a layer before too, and streams",
    dict(
        model_type="glm5_next",
        vision_config=VISION | dict(image_size=16, projection_intermediate_size=16),
        tie_word_embeddings=False,
        image_token_id=9,
        video_token_id=10,
        image_start_token_id=11,
        image_end_token_id=12,
        video_start_token_id=13,
        video_end_token_id=14,
    ),
    MLA
    | GROUPED
    | dict(
        model_type="glm5_next_text",
        num_hidden_layers=5,
        intermediate_size=40,
        moe_intermediate_size=20,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_router_dtype="float32",
        qk_rope_head_dim=0,
        mla_use_nope=True,
        index_n_heads=16,
        index_head_dim=12,
        index_topk=8,
        index_kpool=4,
        index_kpool_compress=True,
        index_kpool_always_select_tail=True,
        index_share_for_mtp_iteration=True,
        indexer_rope_interleave=True,
        indexer_types=["full", "full", "shared", "full", "full"],
        layer_types=[
            *("linear_attention", "deepseek_sparse_attention", "deepseek_sparse_attention"),
            *("linear_attention", "deepseek_sparse_attention"),
        ],
        linear_attn_config=dict(
            num_heads=3,
            head_dim=8,
            short_conv_kernel_size=3,
            gate_lower_bound=-1.0,
            kda_layers=[0, 3],
            full_attn_layers=[1, 2, 4],
        ),
        mlp_layer_types=["dense", "sparse", "sparse", "sparse", "sparse"],
        mhc=True,
        hc_mult=3,
        hc_eps=1e-3,
        hc_sinkhorn_iters=4,
        swiglu_limit=0.5,
    ),
)
