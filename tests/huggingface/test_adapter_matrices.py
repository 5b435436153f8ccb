"""Factors in the order of a checkpoint's tensors: B A is what the tensor mapping makes of our own product."""

from pathlib import Path

import numpy as np
import pytest

from moezoo.core.huggingface.adapters.naming import AdapterLayout, named_matrices
from moezoo.core.huggingface.checkpoint import describe_checkpoint
from moezoo.core.parameters import parameter_table
from tests.support.fixtures import write_checkpoint

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe"]
LAYOUTS: list[AdapterLayout] = ["mlx", "peft", "peft-fused"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_factors_are_those_of_the_tensor_mapping(
    family: str, layout: AdapterLayout, tmp_path: Path
) -> None:
    description, rank = describe_checkpoint(write_checkpoint(family, tmp_path)), 3
    draw = np.random.default_rng(0)
    weights, products = {}, {}
    for row in parameter_table(description.spec):
        if row.matrix is None:
            continue
        stack, inputs, outputs = row.matrix.split(row.shape)
        a = weights[f"{row.name}.lora_a"] = draw.normal(size=(*stack, *inputs, rank)).astype(np.float32)
        b = weights[f"{row.name}.lora_b"] = draw.normal(size=(*stack, rank, *outputs)).astype(np.float32)
        products[row.name] = (a.reshape(*stack, -1, rank) @ b.reshape(*stack, rank, -1)).reshape(row.shape)
    matrices = named_matrices(description, layout)
    roles = {row.role for matrix in matrices.values() for row in matrix.rows}
    assert roles >= {"attention", "routed experts", "router"}
    for matrix in matrices.values():
        factors = matrix.factors(weights)
        assert factors is not None
        a, b = factors
        stack, inputs, outputs = matrix.sizes
        assert a.shape == (*stack, len(matrix.rows) * rank, inputs)
        assert b.shape == (*stack, outputs, len(matrix.rows) * rank)
        stored = np.zeros(matrix.placed.shape, np.float32)
        for place, (name, expert, _) in enumerate(matrix.placed.parts):
            matrix.placed.put(stored, place, products[name] if expert is None else products[name][expert])
        np.testing.assert_allclose(np.moveaxis(b @ a, -1, matrix.inputs), stored, atol=1e-5)
        for name, own in matrix.parts(a, b).items():
            for factor, value in zip(("lora_a", "lora_b"), own, strict=True):
                whole = weights[f"{name}.{factor}"]
                np.testing.assert_array_equal(value, whole if matrix.expert is None else whole[matrix.expert])
