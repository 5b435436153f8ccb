"""Configs of published releases: every field is understood, the parameters are as many as published."""

import re
from collections.abc import Mapping
from typing import Any

import pytest

from moezoo.core.config.run_config import load_config
from moezoo.core.config.shipped import shipped_config
from moezoo.core.cost.parameters import parameter_counts
from moezoo.core.huggingface.family import families
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import ModelSpec
from tests.huggingface.release_configs import FOLDER, RELEASES, release_spec, release_text
from tests.support.backends_available import require_backend

_UNITS = {"B": 1e9, "T": 1e12}


@pytest.mark.parametrize("name", RELEASES)
def test_the_config_of_a_release_is_current_and_computes_its_model(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    assert path.read_text(encoding="utf-8") == release_text(name), "run python -m tests.huggingface.release_configs"
    assert shipped_config(name).samefile(path)  # no other config has the name
    model, expected = load_config(path).model, release_spec(name)
    assert model.all_layers == expected.all_layers
    assert model.model_copy(update={"layers": expected.layers}) == expected


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_has_as_many_parameters_as_published(name: str) -> None:
    spec, known = release_spec(name), RELEASES[name]
    counts = parameter_counts(spec)
    embeddings = counts.by_role["embeddings"]
    indexers = sum(row.size for row in parameter_table(spec) if ".indexer." in row.name)
    left_out = {
        None: 0,
        "embeddings": embeddings,
        "embeddings and indexers": embeddings + indexers,
        "input embedding": spec.vocab * spec.embed_dim,
    }
    active = parameter_counts(_skipping_none(spec)).active if known.get("active_skips_no_expert") else counts.active
    for which, ours in (("total", counts.total), ("active", active)):
        published, ours = known.get(which), ours - left_out[known.get(f"{which}_without")]
        if published is not None:
            assert _agrees(ours, published), f"{ours / 1e9:.3f} billion, published {published}"


def _skipping_none(spec: ModelSpec) -> ModelSpec:
    """Return the model without experts that compute nothing: with them, active parameters are counted on average."""
    layers = [
        layer if layer.moe is None else layer.model_copy(update={"moe": layer.moe.model_copy(update=_NO_ZERO)})
        for layer in spec.layers
    ]
    return spec.model_copy(update={"layers": tuple(layers)})


_NO_ZERO = {"zero_computation": None}


def _agrees(ours: float, published: str) -> bool:
    """Return whether a count is within 1 % of a published one, or has its digits, rounded or cut off."""
    number, unit = float(published[:-1]), _UNITS[published[-1]]
    last_digit = 10.0 ** -len(published[:-1].partition(".")[2])
    return abs(ours / unit - number) <= 0.01 * number or -last_digit / 2 <= ours / unit - number < last_digit


def test_a_count_that_is_off_does_not_agree() -> None:
    assert _agrees(3.353e9, "3.3B")
    assert not _agrees(3.41e9, "3.3B")
    assert not _agrees(3.2e9, "3.3B")
    assert not _agrees(0.9e12, "1.04T")


def test_every_family_has_a_release() -> None:
    shown = {families()[known["config"]["model_type"]].name for known in RELEASES.values()}
    missing = {family.name for family in families().values()} - shown
    assert not missing, f"add a release of {', '.join(sorted(missing))} to tests/data/releases.json"
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in RELEASES)


_IN_THE_GATE = ("gpt_oss_20b", "qwen3_next_80b_a3b")


@pytest.mark.parametrize("backend", ["jax", "mlx"])
@pytest.mark.parametrize(
    "name", [name if name in _IN_THE_GATE else pytest.param(name, marks=pytest.mark.release) for name in RELEASES]
)
def test_a_release_is_built_without_memory(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = release_spec(name)
    shapes = {row.name: row.shape for row in parameter_table(spec)}
    if backend == "jax":
        assert _sizes_on_jax(spec, shapes) == sorted(row.size for row in parameter_table(spec))
    else:
        assert _shapes_on_mlx(spec, shapes, monkeypatch) == shapes


def _sizes_on_jax(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    jax = require_backend("jax")
    from flax import nnx

    from moezoo.jax_backend.arrays import Weights
    from moezoo.jax_backend.transformer import Transformer

    def build(values: dict[str, Any]) -> Any:
        return nnx.state(Transformer(spec, Weights(values)))

    abstract = {name: jax.ShapeDtypeStruct(shape, "bfloat16") for name, shape in shapes.items()}
    return sorted(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(build, abstract)))


def _shapes_on_mlx(
    spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[int, ...]]:
    mx = require_backend("mlx")
    from moezoo.mlx_backend.arrays import Weights, named
    from moezoo.mlx_backend.transformer import Transformer

    # arrays of MLX are computed when they are read: nothing reads these
    monkeypatch.setattr(Weights, "_plain", lambda self, name: mx.zeros(shapes[self._prefix + name], mx.bfloat16))
    model = Transformer(spec, Weights(dict.fromkeys(shapes)))
    return {name: value.shape for name, value in named(model.parameters()).items()}
