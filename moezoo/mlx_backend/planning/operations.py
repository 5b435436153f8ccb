"""Number of operations of a token in MLX's graph: each costs some microseconds, however small its arrays are."""

import io
import re

import mlx.core as mx
import numpy as np

from moezoo.mlx_backend.inference import MlxInference
from moezoo.mlx_backend.kernels.early_start import whole_graph
from moezoo.mlx_backend.runtime.typed import flatten


def operations_per_token(model: MlxInference, batch: int = 1) -> int:
    """Return the number of MLX operations that extend each of B sequences by one token; sampling is not counted.

    Also of a model whose tokens NumPy computes here (`kernels/x86/token.py`): the graph is that of other platforms, and
    of prompts of unequal length.
    """
    tokens = np.zeros((batch, 2), np.int32)
    _, caches = model.prefill(tokens[:, :1], 2)
    with whole_graph():
        lazy = model._extended(mx.array(tokens[:, 1:]), caches)
    graph = io.StringIO()
    mx.export_to_dot(graph, *(array for _, array in flatten(lazy) if isinstance(array, mx.array)))
    return len(re.findall(r"shape ?= ?rectangle", graph.getvalue()))
