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
    (r"(norm|layernorm|norm_1|norm_2|norm_f|_norm)\.weight$", "norm"),
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
