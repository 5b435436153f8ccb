"""From a spec alone, the fields of a config.json that a family reads as the same spec."""

from typing import Any

import pytest

from moezoo.core.huggingface.export_as import exports
from moezoo.core.huggingface.family import Family, families, family_of
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.inverse.candidates import candidates
from moezoo.core.huggingface.inverse.leaves import distance, leaves_of
from moezoo.core.huggingface.inverse.rotations import rope_fields
from moezoo.core.huggingface.inverse.solve import solve
from moezoo.core.huggingface.ledger import first_rules, wrapping
from moezoo.core.huggingface.parts import rope
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import ModelSpec, RoPESpec
from tests.huggingface.release_configs import RELEASES
from tests.support.fixtures import cases, drawn_tensors, read_fixture


def configs() -> dict[str, dict[str, Any]]:
    """Return the config.json of every fixture and release."""
    found = {case: read_fixture(case).description["config"] for case in cases()}
    return found | {f"{name} (release)": RELEASES[name]["config"] for name in RELEASES}


def read(config: dict[str, Any]) -> tuple[Family, ModelSpec]:
    fields = Fields(config, "config.json")
    family = family_of(fields)
    return family, family.spec_of(fields)


CONFIGS = configs()


def in_the_gate() -> list[str]:
    """Return the first config of every family."""
    found: dict[str, str] = {}
    for name, config in CONFIGS.items():
        found.setdefault(families()[Fields(config, name).model_type].name, name)
    return list(found.values())


# Its balance loss is a field of the wrapper alone, for which transformers has no class: the export is of the
# family's other model type, which computes the same.
WITHOUT_ITS_LOSS = ("glm4v_moe",)


@pytest.mark.parametrize(
    "name",
    [name if name in in_the_gate() else pytest.param(name, marks=pytest.mark.release) for name in CONFIGS],
)
def test_a_config_is_derived_from_the_spec_alone(name: str) -> None:
    family, spec = read(CONFIGS[name])
    possible = [each.family for each in candidates(spec, leaves_of(spec)) if each.possible]
    assert family in possible
    assert len(possible) <= 4, "the cheap test lets too many families through"
    solution = solve(family, spec, {})
    assert solution.exact, (solution.problem, solution.differences)
    if "release" not in name:
        written = {ours for each in first_rules(family.tensors, spec).values() for ours in each.ours}
        assert written == {row.name for row in parameter_table(spec)}
    again, wanted = leaves_of(family.spec_of(Fields(solution.config, "derived"))), leaves_of(spec)
    assert again == wanted or (name in WITHOUT_ITS_LOSS and distance(again, wanted).computed == 0)


def test_a_family_whose_models_have_other_parts_is_left_out_by_its_defaults() -> None:
    _, spec = read(CONFIGS["mixtral"])
    left = [each.family.name for each in candidates(spec, leaves_of(spec)) if each.possible]
    assert left == ["mixtral", "hunyuan_v1_moe"]  # the second has an option for each part that it has by default


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"kind": "linear", "factor": 2.0},
        {"kind": "yarn", "factor": 4.0, "original_length": 64, "mscale": 0.7, "mscale_all_dim": 0.5},
        {"kind": "llama3", "factor": 8.0, "original_length": 64, "low_frequency_factor": 1.5},
        {"kind": "dynamic", "factor": 2.0, "original_length": 64, "length": 64},
    ],
)
def test_the_fields_of_a_rotation_are_read_back(scaling: dict[str, Any] | None) -> None:
    position = RoPESpec.model_validate({"base": 5e5, "fraction": 0.5, "scaling": scaling})
    fields = Fields({"rope_parameters": rope_fields(position), "max_position_embeddings": 64}, "config.json")
    assert rope(fields, fraction=1.0) == position


def test_a_model_that_no_family_computes_names_the_nearest() -> None:
    _, spec = read(CONFIGS["mixtral"])
    for path, value in (("apply_to", "input"), ("renormalize", "p_norm")):
        moe = spec.layers[0].moe
        assert moe is not None
        router = moe.router.model_copy(update={path: value})
        layer = spec.layers[0].model_copy(update={"moe": moe.model_copy(update={"router": router})})
        found = exports(spec.model_copy(update={"layers": (layer,)}))
        assert not found.families
        assert found.obstacles.startswith("mixtral, which has model.layers[0].moe.router.")
        assert path in found.obstacles


# Fixtures whose files have another layout than an export: codes, fused experts, no bias, or names not of the hub, or
# of a wrapper only.
OTHER_LAYOUT = (
    *("axk1_no_bias", "bailing_hybrid_softplus", "gpt_oss_mxfp4", "kimi_linear_query_rank", "qwen3_moe_fused"),
    *("minimax_m3_vl", "qwen3_moe_mixed"),
)


@pytest.mark.parametrize("case", [case for case in cases() if case not in OTHER_LAYOUT])
def test_an_export_has_the_names_that_transformers_saves(case: str) -> None:
    family, spec = read(CONFIGS[case])
    saved = drawn_tensors(read_fixture(case).description)
    wrap = wrapping(family, saved)
    assert {wrap(name) for name in first_rules(family.tensors, spec)} <= set(saved)
