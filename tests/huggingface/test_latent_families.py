"""Options of families with latent attention and of Phi-3.5-MoE: the parsed spec of each, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from moezoo.core.errors import SpecError
from moezoo.core.huggingface.checkpoint import describe_checkpoint, open_checkpoint
from moezoo.core.huggingface.families.longcat_flash import FAMILY as LONGCAT
from moezoo.core.huggingface.ledger import first_rules
from moezoo.core.spec import ModelSpec, TemperatureTuningSpec, TopKChoiceSpec
from tests.support.fixtures import read_fixture, text_config, write_described

MISTRAL_ROPE = read_fixture("mistral4").description["config"]["rope_parameters"]


def spec_of(case: str, tmp_path: Path, **changes: Any) -> ModelSpec:
    """Return the spec of a fixture's config with changed fields of its text model; `...` removes a field."""
    config = text_config(read_fixture(case).description["config"]) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return describe_checkpoint(tmp_path).spec


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is true; expected false"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, 'topk_method is "noaux_tc"; expected one of greedy'),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, 'scoring_func is "sigmoid"; expected "softmax"'),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq is 2; expected 1"),
        ("deepseek_v3", {"topk_method": "greedy"}, 'topk_method is "greedy"; expected "noaux_tc"'),
        ("deepseek_v32", {"layer_types": ["full_attention"] * 3}, r"layer_types is .* one of indexed_attention"),
        ("deepseek_v32", {"rope_interleave": False}, "rope_interleave is false; expected true"),
        ("deepseek_v32", {"index_head_dim": 4}, "indexer.head_dim is 4, but it rotates rope_head_dim = 8 features"),
        ("glm_moe_dsa", {"index_skip_topk_offset": 0, "indexer_types": ...}, "indexer_types is .* full in the first"),
        ("glm_moe_dsa", {"indexer_types": ["full", "full", "full"]}, "which follows from index_topk_freq 2"),
        (
            "glm_moe_dsa_pattern",
            {"index_topk_pattern": "FXF", "indexer_types": ...},
            "each layer to be one of full, sh",
        ),
        ("hy_v4", {"indexer_types": ["shared", "full", "full", "full"]}, "indexer_types is .* the first one full"),
        ("hy_v4", {"n_shared_experts": 0}, "n_shared_experts is 0; expected at least 1"),
        ("hy_v4", {"hc_mult": 0}, "hc_mult is 0"),
        ("glm5_next", {"index_kpool_always_select_tail": False}, "true, because the first tokens would attend"),
        ("glm5_next", {"qk_rope_head_dim": 4}, "qk_rope_head_dim is 4; expected 0"),
        ("glm5_next", {"index_topk": 6}, "top_k is 6, which is not divisible by pool_size = 4"),
        ("glm5_next", {"indexer_types": ["full"] * 4 + ["shared"]}, "full in layer 4, since the layer before"),
        ("glm5_next", {"mlp_layer_types": ..., "first_k_dense_replace": 1}, "because transformers ignores it"),
        ("glm5_next", {"linear_attn_config": {"kda_layers": [1, 4]}}, r"kda_layers is .* expected \[0, 3\]"),
        ("axk2", {"rope_interleave": False}, "rope_interleave is false; expected true"),
        ("axk1", {"first_k_dense_replace": 2}, "mlp_layer_types is .* which follows from first_k_dense_replace 2"),
        ("glm4_moe_lite", {"mlp_layer_types": ..., "first_k_dense_replace": 2}, "first_k_dense_replace is 2; exp"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", "linear", "sparse"]}, "mlp_layer_types is .* dense, sparse"),
        (
            "mistral4",
            {"rope_parameters": MISTRAL_ROPE | {"partial_rotary_factor": 0.5}},
            "rope_parameters is .* expected partial_rotary_factor 0.444",
        ),
        ("mistral4", {"rope_parameters": MISTRAL_ROPE | {"llama_5": 1}}, "unknown for this family: llama_5 1"),
        ("longcat_flash", {"zero_expert_type": "zero"}, 'zero_expert_type is "zero"; expected "identity"'),
        ("longcat_flash", {"mla_scale_q_lora": False}, "mla_scale_q_lora is false; expected true"),
        ("longcat_flash", {"attention_method": "MHA"}, 'attention_method is "MHA"; expected "MLA"'),
        ("longcat_flash", {"qk_head_dim": 20}, "qk_head_dim is 20; expected 18"),
        ("longcat_flash", {"head_dim": 16}, "head_dim is 16; expected 8"),
        ("longcat_flash", {"norm_topk_prob": True}, "norm_topk_prob is true; expected false, because transf"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok is 3; expected 2"),
    ],
)
def test_refused(case: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(case, tmp_path, **changes)


@pytest.mark.parametrize("case", ["deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "longcat_flash"])
def test_latent_norms_ignore_rms_norm_eps(case: str, tmp_path: Path) -> None:
    spec = spec_of(case, tmp_path, rms_norm_eps=1e-3, attention_bias=True)
    assert (spec.norm.epsilon, spec.layers[0].attention.norm.epsilon) == (1e-3, 1e-6)
    assert spec.layers[0].attention.bias


def test_dense_layers_follow_mlp_layer_types(tmp_path: Path) -> None:
    for case in ("deepseek_v32", "glm4_moe_lite"):
        types = ["sparse", "dense", "sparse"]
        spec = spec_of(case, tmp_path, mlp_layer_types=types, first_k_dense_replace=...)
        assert spec.moe_layers == (0, 2)


def test_mistral_temperature_counts_from_0_or_is_absent(tmp_path: Path) -> None:
    attention = spec_of("mistral4", tmp_path).layers[0].attention
    assert attention.temperature_tuning == TemperatureTuningSpec(floor_length=8, scale=0.1, first=0)
    assert attention.position.fraction == 1
    without = MISTRAL_ROPE | {"llama_4_scaling_beta": 0.0}
    assert spec_of("mistral4", tmp_path, rope_parameters=without).layers[0].attention.temperature_tuning is None


def test_one_group_is_plain_top_k(tmp_path: Path) -> None:
    for case in ("deepseek_v3", "mistral4"):
        moe = spec_of(case, tmp_path, n_group=1, topk_group=1).layers[-1].moe
        assert isinstance(moe.router.choice, TopKChoiceSpec)


def test_phi_has_an_attention_factor_per_factor_list(tmp_path: Path) -> None:
    rope = read_fixture("phimoe").description["config"]["rope_parameters"]
    original = rope["original_max_position_embeddings"]
    spec_of("phimoe", tmp_path)
    for length, factor in ((original, rope["short_mscale"]), (original + 1, rope["long_mscale"])):
        scaling = describe_checkpoint(tmp_path, max_length=length).spec.layers[0].attention.position.scaling
        assert (scaling.length, scaling.attention_factor) == (length, factor)


def test_a_longcat_layer_becomes_two_layers(tmp_path: Path) -> None:
    spec = spec_of("longcat_flash", tmp_path)
    assert [layer.shortcut for layer in spec.all_layers] == [True, False] * 2
    assert spec.moe_layers == (0, 2)
    assert spec_of("longcat_flash", tmp_path, zero_expert_num=0).layers[0].moe.zero_computation is None


def test_a_router_bias_of_longcat_is_added(tmp_path: Path) -> None:
    """As by mlx-lm: transformers has the tensor, but neither adds nor trains it."""
    spec = spec_of("longcat_flash", tmp_path, router_bias=True)
    router = spec.moes[0][1].router
    assert router == spec_of("longcat_flash", tmp_path).moes[0][1].router.model_copy(update={"bias": True})
    written = {ours: name for name, rule in first_rules(LONGCAT.tensors, spec).items() for ours in rule.ours}
    assert written["layers.0.moe.router.b_router"] == "model.layers.0.mlp.router.classifier.bias"


def test_gate_tensors_of_copy_experts_are_kept(tmp_path: Path) -> None:
    """Transformers 5.23 writes them; a routed expert without its gate is still reported as missing."""
    description = read_fixture("longcat_flash").description
    more = [
        [f"model.layers.{{0-1}}.mlp.experts.{{7-9}}.{which}_proj.weight", "F32", [20, 32], "matrix"]
        for which in ("gate", "up")
    ]
    folder = write_described(description | {"tensors": description["tensors"] + more}, tmp_path / "more")
    assert open_checkpoint(folder).ledger.counts()["kept"] == 12


@pytest.mark.parametrize(
    "renamed",
    [
        (("hc_attn_layer.hc_pre.hc_", "attn_hc."), ("hc_mlp_layer.hc_pre.hc_", "ffn_hc."), ("hc_head_", "hc_")),
        (("hc_attn_layer.hc_pre.", "hc_pre.hc_attn_layer."), ("model.hc_head.", "model.hc_pre.hc_head.")),
    ],
    ids=["inside of transformers 5", "as transformers 5.23 saves them"],
)
def test_other_names_of_hy_v4_are_mapped(renamed: tuple[tuple[str, str], ...], tmp_path: Path) -> None:
    """Streams, sinks and gates; those of the release are the fixture's."""
    description = read_fixture("hy_v4").description
    if len(renamed) == 3:
        renamed += (("linear_gate", "gate_proj"), ("learnable_sink_param", "sinks"))
    else:
        renamed += (("hc_mlp_layer.hc_pre.", "hc_pre.hc_mlp_layer."), ("gate_proj", "linear_gate"))
    lines = []
    for pattern, *rest in description["tensors"]:
        for theirs, other in renamed:
            pattern = pattern.replace(theirs, other)
        lines.append([pattern, *rest])
    assert sum(line not in description["tensors"] for line in lines) >= 10
    write_described(description | {"tensors": lines}, tmp_path)
    assert set(open_checkpoint(tmp_path).ledger.counts()) == {"mapped"}
