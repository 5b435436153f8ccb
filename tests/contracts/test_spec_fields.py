"""Every field of the spec is read by someone, and both backends read the same ones."""

import ast
import inspect
import typing
from typing import Literal

import pytest

from moezoo.core import spec
from moezoo.core.config import data, optimizers, run_config, training
from moezoo.core.spec import Part
from tests.contracts.test_twins import SHARED
from tests.support.source_tree import BACKENDS, PACKAGE, attribute_reads, backend_file, tree_of

# Both backends take angles from core/reference/positions.py.
IN_FREQUENCIES = {"base", "scaling", "factor", "original_length", "length", "short_factors", "long_factors", "truncate"}
IN_FREQUENCIES |= {
    "low_frequency_factor",
    "high_frequency_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
}
IN_FREQUENCIES |= {"attention_factor", "fraction", "fraction_of"}


def fields_of(part: type[Part]) -> set[str]:
    """Fields that say something: not those that can have but one value, as a union's tag has."""
    return {name for name, field in part.model_fields.items() if len(choices(field.annotation)) != 1}


def choices(annotation) -> tuple:
    """Values of a Literal, else nothing."""
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def parts_in(module) -> list[type[Part]]:
    classes = [value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, Part)]
    own = [part for part in classes if part is not Part and part.__module__.startswith(module.__name__)]
    return list(dict.fromkeys(own))  # an alias names a class again


PARTS = [part for module in (spec, data, training, optimizers, run_config) for part in parts_in(module)]


def without_validators(tree: ast.Module) -> ast.Module:
    """Checking a field is not using it."""

    class Remover(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef | None:
            checks = any("model_validator" in ast.unparse(decorator) for decorator in node.decorator_list)
            return None if checks else node

    return Remover().visit(ast.parse(ast.unparse(tree)))


@pytest.fixture(scope="module")
def reads() -> set[str]:
    found: set[str] = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        found |= attribute_reads(without_validators(tree_of(path)))
    return found


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_field_is_read_by_someone(part, reads):
    assert fields_of(part) - reads == set()


def spec_fields() -> set[str]:
    return {name for part in parts_in(spec) for name in fields_of(part)}


@pytest.mark.parametrize("stem", SHARED)
def test_both_backends_read_the_same_fields_of_the_spec(stem):
    jax, mlx = (attribute_reads(tree_of(backend_file(backend, stem))) & spec_fields() for backend in BACKENDS)
    assert jax == mlx


def test_backends_read_every_field_that_is_about_computing():
    """Fields that only core reads: of the table, initialization, frequencies, capacities, properties, writing out."""
    only_core = {
        "activation",
        "group",
        "extent",
        "layers_per_block",
        "unused",
        "max_length",
        "repeat",
        "layers",
        "initializer",
        "std",
        "vocab_size",
        "embed_dim",
        "hidden_dim",
        "select_on",
        "rank",
        "step_rank",
        "output_latent_dim",
        "on",
        "table_size",
        "multiple",
        "index",
    }
    for backend in BACKENDS:
        read: set[str] = set()
        for stem in SHARED:
            read |= attribute_reads(tree_of(backend_file(backend, stem)))
        assert spec_fields() - read <= only_core | IN_FREQUENCIES
