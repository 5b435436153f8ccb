"""Recipes of quantization: the format of each module, by its role, its layer, or its name in mlx-lm's layout.

bits: 4                                                 # of every module that no rule is for
rules:                                                  # the first one that is for a module counts
  - {role: router, bits: 8}
  - {role: [attention, head], bits: 6, group_size: 32}
  - {modules: ["*.down_proj"], layers: [0, 1, -1], bits: 8}
  - {role: embeddings, bits: null}                      # left in floats
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from moezoo.core.config.validate import validate
from moezoo.core.config.yaml_file import read_mapping
from moezoo.core.errors import SpecError, nearest
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.spec import Part

QuantizedRole = Literal["embeddings", "head", "attention", "feed-forward", "router", "routed experts", "shared experts"]
ROLES: tuple[QuantizedRole, ...] = get_args(QuantizedRole)
WritableMode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]

DEFAULTS: Mapping[WritableMode, tuple[int, int]] = {
    "affine": (4, 64),
    "mxfp4": (4, 32),
    "mxfp8": (8, 32),
    "nvfp4": (4, 16),
}
"""Bits and group size of a mode, where none are given: mlx-lm's."""

_as_list = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)


class FormatRule(Part):
    """Format of the modules that a rule is for: all of `role`, `modules` and `layers` that it has must match.

    Fields:
        role: roles of the module's parameters.
        modules: patterns of its name in mlx-lm's layout, with * and ?.
        layers: indices of layers, from the end if negative; or the first and last eighth of all layers and every third
            one between them, which mlx-lm and llama.cpp give more bits to.
        bits: of a code; null: the module is left in floats.
        mode, group_size: the mode is affine, its group size 64, unless given.
    """

    role: Annotated[tuple[QuantizedRole, ...], _as_list] | None = None
    modules: Annotated[tuple[str, ...], _as_list] | None = None
    layers: tuple[int, ...] | Literal["ends and every third"] | None = None
    bits: int | None
    mode: WritableMode = "affine"
    group_size: int | None = None

    def is_for(self, module: str, role: str, layer: int | None, num_layers: int) -> bool:
        """Return True if the rule is for a module; `layer` is None outside of layers."""
        return (
            (self.role is None or role in self.role)
            and (self.modules is None or any(fnmatchcase(module, pattern) for pattern in self.modules))
            and (self.layers is None or self._has_layer(layer or 0, num_layers, outside=layer is None))
        )

    def _has_layer(self, layer: int, num_layers: int, *, outside: bool) -> bool:
        if isinstance(self.layers, str):
            # Trap: mlx-lm takes modules outside of layers for those of layer 0.
            eighth = num_layers // 8
            return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
        return not outside and any(layer == index % num_layers for index in self.layers or () if index < num_layers)

    @property
    def format(self) -> QuantizationFormat | None:
        """The format, or None for floats. Raises CheckpointError if it does not exist."""
        return None if self.bits is None else make_format(self.mode, self.bits, self.group_size)


class Recipe(Part):
    """Formats of a model's modules: those of the first rule for a module, else the outer one.

    Fields:
        bits, mode, group_size: the outer format.
        careful: modules that no rule is for have 8 bits in affine mode, if they are routers or if the family needs it.
        rules: formats of some modules.
    """

    bits: int
    mode: WritableMode = "affine"
    group_size: int | None = None
    careful: bool = True
    rules: Annotated[tuple[FormatRule, ...], Field(max_length=1000)] = ()

    @property
    def format(self) -> QuantizationFormat:
        """The outer format. Raises CheckpointError if it does not exist."""
        return make_format(self.mode, self.bits, self.group_size)

    def format_of(
        self, module: str, role: str, layer: int | None, num_layers: int, eight_bits: Sequence[str] = ()
    ) -> QuantizationFormat | None:
        """Return the format of a module, or None for floats; `eight_bits`: patterns of modules that need 8 bits."""
        careful = (FormatRule(role=("router",), bits=8), FormatRule(modules=tuple(eight_bits), bits=8))
        rules = self.rules + (careful if self.careful else ())
        found = next((rule for rule in rules if rule.is_for(module, role, layer, num_layers)), None)
        return self.format if found is None else found.format


def make_format(mode: WritableMode, bits: int | None, group_size: int | None) -> QuantizationFormat:
    """Return a format with the mode's defaults for None. Raises CheckpointError if it does not exist."""
    default_bits, default_group = DEFAULTS[mode]
    return QuantizationFormat(
        mode, default_bits if bits is None else bits, default_group if group_size is None else group_size
    )


def _mixed(low: int, high: int) -> Recipe:
    """Return mlx-lm's recipe: more bits for the head and, in some layers, for values and the last matrix of experts."""
    values = ("*v_proj*", "*v_a_proj*", "*v_b_proj*")
    return Recipe(
        bits=low,
        careful=False,
        rules=(
            FormatRule(modules=(*values, "*down_proj*"), layers="ends and every third", bits=high),
            FormatRule(modules=("*lm_head*",), bits=high),
        ),
    )


RECIPES: Mapping[str, Recipe] = {
    f"mixed_{low}_{high}": _mixed(low, high) for low, high in ((2, 6), (3, 4), (3, 6), (4, 6))
}
"""Recipes by name: those of mlx-lm. Source: mlx-lm 0.32, `convert --quant-predicate`."""


def recipe_of_options(
    quantize: str | None, mode: WritableMode | None, group_size: int | None, router: str | None, recipe: str | None
) -> Recipe | None:
    """Return the recipe that options of a command line ask for, or None if they ask for none.

    Args:
        quantize: width such as `4bit`.
        mode, group_size: of the outer format; None: affine, and the mode's own.
        router: width of routers, or `float`; None: as the recipe says.
        recipe: name or YAML file.

    Raises SpecError or CheckpointError: options that contradict each other, or a format that does not exist.
    """
    if quantize is None and recipe is None:
        given = {"--mode": mode, "--group-size": group_size, "--router": router}
        surplus = [name for name, value in given.items() if value is not None]
        if surplus:
            raise SpecError(f"{surplus[0]} is an option of --quantize, which is not given. Add --quantize 4bit.")
        return None
    if recipe is not None and (quantize, mode, group_size) != (None, None, None):
        raise SpecError(
            "--recipe has the widths of all modules; got --quantize, --mode or --group-size too. Leave them out."
        )
    if recipe is not None:
        found = load_recipe(recipe)
    else:
        assert quantize is not None
        found = Recipe(bits=_width("--quantize", quantize), mode=mode or "affine", group_size=group_size)
    assert found.format.mode != "fp8"  # raises if the format does not exist
    if router is None:
        return found
    bits = None if router == "float" else _width("--router", router)
    rule = FormatRule(role=("router",), bits=bits)
    assert rule.format is None or rule.format.bits == bits
    return found.model_copy(update={"rules": (rule, *found.rules)})


def _width(option: str, text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,3})(?:-?bits?)?", text)
    if found is None:
        others = " or float" if option == "--router" else ""
        raise SpecError(f"{option} is {text!r:.40}; expected a width such as 4bit{others}.")
    return int(found[1])


def load_recipe(option: str) -> Recipe:
    """Return the recipe of a name, or of a YAML file. Raises SpecError or CheckpointError."""
    if option in RECIPES:
        return RECIPES[option]
    if Path(option).suffix not in (".yaml", ".yml"):
        raise SpecError(
            f"recipe is {option!r:.80}{nearest(option, list(RECIPES))}; expected one of {', '.join(RECIPES)}, or a "
            "YAML file."
        )
    recipe = validate(Recipe, read_mapping(option, "recipe"), option)
    for format in (recipe.format, *(rule.format for rule in recipe.rules)):
        assert format is None or format.mode != "fp8"
    return recipe
