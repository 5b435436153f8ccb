"""Every field read from a config.json has an effect, in every family; absent fields have transformers' defaults."""

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import pytest

from moezoo.core.errors import SpecError
from moezoo.core.huggingface.family import families, family_of
from moezoo.core.huggingface.fields import HARMLESS, Fields
from tests.support.fixtures import cases, read_fixture, text_config

# Fields without effect in some configs: another field of the config overrides them, or there is nothing that they apply
# to.
IDLE = {
    # overridden by a list of layers
    "global_attn_every_n_layers": ("afmoe*",),
    "first_k_dense_replace": ("deepseek_v32*", "exaone_moe*"),
    "interleave_moe_layer_step": ("llama4*",),
    "no_rope_layer_interval": ("llama4*",),
    "max_window_layers": ("qwen2_moe*",),
    "mlp_only_layers": ("qwen2_moe_sliding", "qwen3_moe_step"),
    "sliding_window_pattern": ("exaone_moe*",),
    "use_sliding_window": ("qwen2_moe*", "qwen3_moe*"),
    # no such layer, group, window or sequence length
    "attn_scale": ("llama4_text_top2",),
    "floor_scale": ("llama4_text_top2",),
    "intermediate_size": ("dots1_plain", "lfm2_moe_plain", "qwen3_next"),
    "intermediate_size_mlp": ("llama4_text_top2",),
    "moe_layer_end_index": ("ernie4_5_moe*",),
    "num_attention_heads": ("laguna*",),
    "sliding_window": ("dots1_plain",),
    "index_head_dim": ("dots3_note",),
    "index_n_heads": ("dots3_note",),
    "index_topk": ("dots3_note",),
    "layer_norm_eps": ("cohere2_moe_sigmoid",),
    "norm_topk_prob": ("cohere2_moe",),
    "prefix_dense_sliding_window_pattern": ("cohere2_moe_sigmoid",),
    "head_dim": ("bailing_hybrid*",),  # overridden by linear_head_dim
    "kda_lower_bound": ("bailing_hybrid_softplus",),
    "topk_group": (
        *("axk2", "bailing_hybrid_softplus", "dots1_plain", "glm4_moe", "glm4v_moe", "glm_moe_dsa", "hy_v4"),
        *("kimi_linear_query_rank", "nemotron_h", "nemotron_h_latent_bias"),
    ),
    "position_embedding_type": ("granitemoehybrid",),
    "attn_layer_period": ("jamba",),
    "use_double_wide_mlp": ("gemma4*",),
    "vocab_size_per_layer_input": ("gemma4", "gemma4_text", "gemma4_text_shared_kv"),
    "long_mscale": ("phimoe*",),
    **dict.fromkeys(
        ("interleaved", "mrope_interleaved", "mrope_section"),
        ("ernie4_5_vl_moe", "glm4v_moe", "qwen3_5_moe*", "qwen3_omni_moe*", "qwen3_vl_moe", "qwen4_exp*"),
    ),
    # overridden by rope_parameters
    "partial_rotary_factor": ("mimo_v2_flash*",),
    "rope_theta": ("granitemoe_swa*", "mimo_v2_flash*", "granitemoehybrid"),
    "rope_type": ("zaya",),  # beside the RoPE of each kind of layer, where transformers removes it
    "rotary_dim": ("minimax_m2*",),
    "swa_rope_theta": ("mimo_v2_flash*",),
    "type": ("*",),
    # overridden by the multimodal wrapper
    "tie_word_embeddings": (
        *("aria", "cohere2_moe_sigmoid", "deepseek_ocr2", "dots3_note", "ernie4_5_vl_moe", "gemma4", "glm4v_moe"),
        *("glm5_next", "llama4", "minimax_m3_vl", "mistral4_wrapped", "qwen3_5_moe", "qwen3_omni_moe*", "qwen3_vl_moe"),
        *("qwen4_exp", "step3p7"),
    ),
    # ignored by transformers
    "beta_fast": ("hunyuan_v1_moe",),
    "beta_slow": ("hunyuan_v1_moe",),
    "factor": ("hunyuan_v1_moe",),
    "mscale": ("hunyuan_v1_moe",),
    "hidden_size": ("dbrx*",),  # in ffn_config
}


def read(config: dict[str, Any]) -> Any:
    """Parse a config into a spec and notes."""
    fields = Fields(json.loads(json.dumps(config)), "config.json")
    return family_of(fields).spec_of(fields), fields.notes


def others(value: Any) -> list[Any]:
    """Return other values of the same type; one of them must make a difference."""
    match value:
        case None:
            return [3]
        case bool():
            return [not value]
        case int():
            return [value + 1, 2 * value + 2]
        case float():
            return [2 * value + 0.5]
        case str():
            return ["foo"]
        case list():
            return [value[:-1] or [0], ["foo"] * len(value), value[::-1]]
        case _:
            return []


def objects(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the config and its nested objects that concern the text model."""
    yield config
    for name, value in config.items():
        if isinstance(value, dict) and name not in ("id2label", "label2id", "quantization_config"):
            yield from objects(value)


@pytest.mark.parametrize("spelling", ["config", "hub_config"])
@pytest.mark.parametrize("case", cases())
def test_a_field_without_effect_is_listed_as_harmless(case: str, spelling: str) -> None:
    config = read_fixture(case).description[spelling]
    try:
        expected = read(config)
    except SpecError:
        return  # refused by name
    family = families()[Fields(config, "config.json").model_type]
    unused = []
    for owner in objects(text_config(config)):
        for name, value in list(owner.items()):
            if any(fnmatchcase(name, pattern) for pattern in (*HARMLESS, *family.harmless)):
                continue
            if any(fnmatchcase(case, pattern) for pattern in IDLE.get(name, ())):
                continue
            different = isinstance(value, dict)
            for other in others(value):
                owner[name] = other
                try:
                    different = different or read(config) != expected
                except SpecError:
                    different = True
            owner[name] = value
            if not different:
                unused.append(f"{name} {json.dumps(value)}")
    assert not unused, f"changing these has no effect, and IDLE does not list them: {', '.join(unused)}"


@cache
def main_cases() -> dict[str, str]:
    """Return the first case of every text model's type: alone, or if there is none, inside of a multimodal wrapper."""
    found: dict[str, str] = {}
    for wrapped in (False, True):
        for case in cases():
            config = read_fixture(case).description["config"]
            inner = text_config(config)
            if (inner is not config) == wrapped:
                found.setdefault(inner["model_type"], case)
    return found


def in_python(value: Any) -> Any:
    """Return JSON with the numbers that transformers writes as objects: {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: in_python(v) for k, v in value.items()}
    return [in_python(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("model_type", sorted(main_cases()))
def test_an_absent_field_has_the_default_of_transformers(model_type: str) -> None:
    """Unless it is required, or the default itself is refused, here or there."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)
    outer = read_fixture(main_cases()[model_type]).description["config"]
    config = text_config(outer)
    differing = []
    for name in config:
        if config is not outer and name == "tie_word_embeddings":
            continue  # the wrapper's counts
        part = {other: value for other, value in config.items() if other != name}
        without_type = {
            key: value for key, value in part.items() if key not in ("architectures", "dtype", "model_type")
        }
        with suppress(SpecError, StrictDataclassError):
            without = read(part)
            whole = json.loads(
                AutoConfig.for_model(model_type, **in_python(without_type)).to_json_string(use_diff=False)
            )
            if read(whole) != without:
                differing.append(f"{name} {json.dumps(whole.get(name))}")
    assert not differing, f"other default than in transformers: {'; '.join(differing)}"


def test_the_class_of_a_family_is_that_of_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    ours = {family.name: family.causal_class for family in families().values()}
    assert {name: known for name, known in ours.items() if CLASSES.get(name, known) != known} == {}
