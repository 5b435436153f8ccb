"""Values of config.json as other programs write them: two spellings of one field, whole numbers as floats."""

import json
from typing import Any

import pytest

from moezoo.core.errors import SpecError
from moezoo.core.huggingface.family import family_of
from moezoo.core.huggingface.fields import INNER, Fields
from moezoo.core.huggingface.mlx_config import with_mlx_spellings
from moezoo.core.spec import ModelSpec
from tests.support.fixtures import FOLDER, cases, text_config


def read(config: dict[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    return family_of(fields).spec_of(fields)


def described(case: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{case}.json").read_text())
    return found


def both(case: str, **changes: Any) -> dict[str, Any]:
    """Return a fixture's config in the spelling of transformers 5 and in that of the hub, in one."""
    description = described(case)
    configs = description["config"], description["hub_config"]
    inner = text_config(configs[0]) | text_config(configs[1]) | changes
    wrappers = [config for config in configs if text_config(config) is not config]
    return with_text({name: value for config in wrappers for name, value in config.items()}, inner)


def with_text(config: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """Return the config with another text model inside."""
    name = next((name for name in INNER if name in config), None)
    return text if name is None else config | {name: with_text(config[name], text)}


def in_floats(value: Any) -> Any:
    match value:
        case dict():
            return {name: in_floats(item) for name, item in value.items()}
        case list():
            return [in_floats(item) for item in value]
        case bool() | str() | None:
            return value
    return float(value)


@pytest.mark.parametrize("case", cases())
def test_two_spellings_that_agree_are_the_same_model(case: str) -> None:
    assert read(both(case)) == read(described(case)["config"])


@pytest.mark.parametrize("case", cases())
def test_the_spellings_of_mlx_lm_beside_those_of_transformers_are_the_same_model(case: str) -> None:
    config = described(case)["config"]
    fields = Fields(config, "config.json")
    family = family_of(fields)
    written = with_mlx_spellings(family, fields, read(config))
    for before, after in ((config, written), (config.get("text_config", {}), written.get("text_config", {}))):
        assert all(after[name] == before[name] for name in before.keys() - {"text_config", *family.mlx_lm.replaces})
    assert read(written) == read(config)


def test_mistral4_keeps_its_share_of_rotated_features_beside_the_spelling_of_mlx_lm() -> None:
    config = described("mistral4")["hub_config"]  # transformers lets rope_scaling take the place of rope_parameters
    family = family_of(Fields(config, "config.json"))
    written = with_mlx_spellings(family, Fields(config, "config.json"), read(config))
    rotated, others = config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    assert written["partial_rotary_factor"] == rotated / (rotated + others)
    assert read(written) == read(config)


@pytest.mark.parametrize("case", cases())
def test_whole_numbers_may_be_written_as_floats(case: str) -> None:
    for spelling in ("config", "hub_config"):
        config = described(case)[spelling]
        assert read(in_floats(config)) == read(config)


def test_lfm2_lists_its_full_attention_layers_in_two_ways() -> None:
    config = both("lfm2_moe")
    full = [index for index, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    assert read(config | {"full_attn_idxs": full}) == read(config)
    assert read(config | {"full_attn_idxs": full, "layer_types": None}) == read(config)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("lfm2_moe", {"full_attn_idxs": [0]}, r"layer_types is .*; expected .*follows from full_attn_idxs \[0\]"),
        ("mixtral", {"rope_theta": 5e5}, r"rope_theta is 500000\.0; expected 1000000\.0"),
        ("qwen3_moe_rope_yarn", {"rope_scaling": YARN | {"factor": 8.0}}, "rope_scaling is .*; expected the same"),
        ("qwen3_moe_rope_yarn", {"rope_scaling": YARN | {"rope_theta": 5.0}}, "rope_scaling is .*; expected the same"),
        ("qwen3_moe_rope_yarn", {"rope_parameters": YARN | {"type": "linear"}}, 'type is "linear"; expected "yarn"'),
        ("mixtral", {"rope_scaling": YARN}, "rope_scaling is .*; expected the same as in rope_parameters"),
        ("hunyuan_v1_moe", {"rope_scaling": {"type": "dynamic", "alpha": 9.0}}, "rope_scaling is .* the same"),
        ("glm4_moe", {"partial_rotary_factor": 1.0}, r"partial_rotary_factor is 1\.0; expected 0\.5"),
        ("minimax_m2", {"rotary_dim": 2}, "rotary_dim is 2; expected .* follows from partial_rotary_factor"),
        ("qwen3_next", {"full_attention_interval": 2}, "layer_types .* follows from full_attention_interval 2"),
        ("exaone_moe", {"sliding_window_pattern": "GL"}, 'layer_types .* follows from sliding_window_pattern "GL"'),
        ("exaone_moe", {"first_k_dense_replace": 0}, "mlp_layer_types .* follows from first_k_dense_replace 0"),
        ("deepseek_v32_plain", {"first_k_dense_replace": 0}, "mlp_layer_types .* follows from first_k_dense_replace 0"),
        ("glm4_moe_lite", {"first_k_dense_replace": 0}, "mlp_layer_types .* follows from first_k_dense_replace 0"),
        ("afmoe", {"global_attn_every_n_layers": 2}, "layer_types .* follows from global_attn_every_n_layers 2"),
        ("qwen2_moe_sliding", {"max_window_layers": 1}, "layer_types .* follows from max_window_layers 1"),
        ("llama4_text", {"interleave_moe_layer_step": 3}, "moe_layers .* follows from interleave_moe_layer_step 3"),
        ("gemma4_text", {"global_head_dim": 10}, "global_head_dim is 10; expected 16, as in per_layer_config"),
        ("lfm2_moe", {"num_local_experts": 5}, "num_local_experts is 5; expected 7"),
    ],
)
def test_two_spellings_that_contradict_each_other_are_refused(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read(both(case, **changes))
