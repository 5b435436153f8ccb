"""A built model has the names and shapes of the parameter table, and hands back the weights it was given."""

from pathlib import Path

import numpy as np
import pytest

from moezoo.core.config.run_config import load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.initialize import initial_weights

TINY = sorted((Path(__file__).parents[2] / "configs" / "tiny").glob("*.yaml"))


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_names_shapes_and_values_of_a_built_model(twin, path):
    spec = with_vocab_size(load_config(path), 31).model
    weights = initial_weights(spec, seed=3)
    exported = twin.backend().build(spec, weights).export_parameters()
    assert {name: value.shape for name, value in exported.items()} == {
        row.name: row.shape for row in parameter_table(spec)
    }
    for name, value in weights.items():
        assert exported[name].dtype == np.float32
        np.testing.assert_array_equal(exported[name], value, err_msg=name)


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_canonical_name_is_the_attribute_path_of_the_module(twin, path):
    spec = with_vocab_size(load_config(path), 31).model
    weights = initial_weights(spec, seed=3)
    module = twin.module("transformer").Transformer(spec, twin.weights(weights))
    for row in parameter_table(spec):
        value = module
        for step in row.name.split("."):
            value = value[int(step)] if step.isdigit() else getattr(value, step)
        assert tuple(value.shape) == row.shape, row.name


def test_matrices_say_which_axes_are_inputs_and_outputs():
    """Of every tiny config: batch axes number experts or constants; a row without MatrixAxes is no linear map."""
    rows = {
        row.name: row for path in TINY for row in parameter_table(with_vocab_size(load_config(path), 31).model)
    }.values()
    for row in rows:
        if row.matrix is None:
            leaf = row.name.rpartition(".")[2]
            assert len(row.shape) == 1 or row.role == "norms" or not leaf.startswith("w_"), row
            continue
        batch, fan_in, fan_out = row.matrix.split(row.axes)
        assert set(batch) <= {"expert", "constant"}, row
        assert fan_in, row
        assert fan_out, row
        if row.name.endswith(".w_output") and "head" in row.axes:
            assert (fan_in, fan_out) == (("head", "head_dim"), ("embed",)), row
        if ".experts.w_" in row.name:
            assert batch == ("expert",), row
