import pytest

from moezoo.core.errors import CheckpointError, SpecError
from moezoo.core.huggingface.recipe import RECIPES, FormatRule, Recipe, load_recipe, recipe_of_options
from moezoo.core.quantization.formats import QuantizationFormat

GATE, DOWN, VALUE = (
    "model.layers.3.mlp.gate",
    "model.layers.3.mlp.switch_mlp.down_proj",
    "model.layers.3.self_attn.v_proj",
)


def bits(recipe, module, role="attention", layer=3, num_layers=16):
    format = recipe.format_of(module, role, layer, num_layers)
    return None if format is None else format.bits


def test_first_matching_rule_counts(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        """
bits: 4
group_size: 32
rules:
  - {role: [attention, head], layers: [0, -1], bits: 6, group_size: 128}
  - {modules: "*.v_proj", bits: 3}
  - {role: embeddings, bits: null}
  - {role: routed experts, bits: 4, mode: mxfp4}
"""
    )
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe.format == QuantizationFormat("affine", 4, 32)
    assert recipe.format_of(VALUE, "attention", 0, 16) == QuantizationFormat("affine", 6, 128)
    assert bits(recipe, VALUE, layer=15) == 6
    assert bits(recipe, VALUE) == 3
    assert bits(recipe, "lm_head", "head", None) == 4  # a rule for layers is for no module outside of them
    assert bits(recipe, "model.embed_tokens", "embeddings", None) is None
    assert recipe.format_of(DOWN, "routed experts", 3, 16) == QuantizationFormat("mxfp4", 4, 32)


def test_routers_have_8_bits_unless_a_rule_is_for_them():
    recipe = Recipe(bits=4, mode="mxfp4")
    assert recipe.format_of(GATE, "router", 3, 16) == QuantizationFormat("affine", 8, 64)
    assert recipe.format_of("lm_head", "head", None, 16, ("lm_head",)) == QuantizationFormat("affine", 8, 64)
    assert bits(recipe.model_copy(update={"careful": False}), GATE, "router") == 4
    assert bits(Recipe(bits=4, rules=(FormatRule(role=("router",), bits=None),)), GATE, "router") is None


@pytest.mark.parametrize(("name", "low", "high"), [("mixed_2_6", 2, 6), ("mixed_3_4", 3, 4), ("mixed_4_6", 4, 6)])
def test_mixed_recipes_are_those_of_mlx_lm(name, low, high):
    """Source: mlx-lm 0.32, convert.py: i < L // 8 or i >= 7 L // 8 or (i - L // 8) % 3 == 2."""
    recipe, more = RECIPES[name], {0, 1, 4, 7, 10, 13, 14, 15}
    for layer in range(16):
        expected = high if layer in more else low
        assert bits(recipe, VALUE, layer=layer) == bits(recipe, DOWN, "routed experts", layer) == expected
        assert (
            bits(recipe, GATE, "router", layer) == bits(recipe, "model.layers.3.self_attn.k_proj", layer=layer) == low
        )
    assert bits(recipe, "lm_head", "head", None) == high
    assert bits(recipe, "model.embed_tokens", "embeddings", None) == low


def test_options():
    assert recipe_of_options(None, None, None, None, None) is None
    recipe = recipe_of_options("4bit", "nvfp4", None, "6bit", None)
    assert recipe.format == QuantizationFormat("nvfp4", 4, 16)
    assert bits(recipe, GATE, "router") == 6
    assert bits(recipe_of_options("3", None, 128, "float", None), GATE, "router") is None
    assert bits(recipe_of_options(None, None, None, "8bit", "mixed_2_6"), GATE, "router") == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((None, "mxfp4", None, None, None), "--mode is an option of --quantize, which is not given"),
        ((None, None, None, "8bit", None), "--router is an option of --quantize"),
        (("4bit", None, None, None, "mixed_2_6"), "--recipe has the widths of all modules; got --quantize"),
        (("four", None, None, None, None), "--quantize is 'four'; expected a width such as 4bit"),
        (("7bit", None, None, None, None), "bits of quantization mode affine is 7; expected 2 or 3"),
        (("4bit", "mxfp8", None, None, None), "bits of quantization mode mxfp8 is 4; expected 8"),
        (("4bit", None, 48, None, None), "group_size of quantization mode affine is 48"),
        (("4bit", None, None, "9bit", None), "bits of quantization mode affine is 9"),
        ((None, None, None, None, "mixed_2_5"), "recipe is 'mixed_2_5'; did you mean mixed_2_6"),
        ((None, None, None, None, "none.yaml"), "no such recipe"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises((SpecError, CheckpointError), match=message):
        recipe_of_options(*options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: 7", "bits of quantization mode affine is 7"),
        ("rules: []", "bits is missing"),
        ("bits: 4\nrules: [{role: gate, bits: 8}]", "rules.*role.*is 'gate'"),
        ("bits: 4\nrules: [{role: router}]", "bits is missing"),
        ("bits: 4\nwidth: 8", "width is not a known key"),
        ("bits: 4\nrules: [{role: router, bits: 8, mode: fp8}]", "mode is 'fp8'"),
    ],
)
def test_recipes_that_cannot_be(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises((SpecError, CheckpointError), match=message):
        load_recipe(str(tmp_path / "recipe.yaml"))
