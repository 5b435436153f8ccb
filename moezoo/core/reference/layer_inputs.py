"""Per-layer inputs: one vector per layer and token, beside the residual stream (per-layer embeddings, Gemma 3n)."""

import math

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, adapter, inside
from moezoo.core.reference.feed_forward import activate
from moezoo.core.reference.normalization import normalize
from moezoo.core.spec import LayerInputsSpec, NormSpec


def layer_inputs(
    spec: LayerInputsSpec, norm: NormSpec, parameters: Parameters, tokens_BT: Array, x_BTD: Array
) -> Array:
    """Return the input of each layer: `(sqrt(Z) weight[token] + norm(x w_context / sqrt(D))) / sqrt(2)`, [B, T, L, Z].

    Args:
        spec: Z is its `dim`.
        norm: the model's norm.
        parameters: `weight` [V, L, Z], `w_context` [D, L, Z], and a `norm` over Z.
        tokens_BT: int, 0 <= token < V.
        x_BTD: token embeddings, scaled as at the start of the residual stream.

    Source: transformers, `gemma4` (project_per_layer_inputs); Google 2025 (Gemma 3n).
    """
    context = np.einsum("BTD,DLZ->BTLZ", x_BTD, parameters["w_context"]) / math.sqrt(x_BTD.shape[-1])
    context = normalize(norm, inside(parameters, "norm"), context)
    return (context + math.sqrt(spec.dim) * parameters["weight"][tokens_BT]) / math.sqrt(2)


def layer_input(spec: LayerInputsSpec, norm: NormSpec, parameters: Parameters, x_BTD: Array, input_BTZ: Array) -> Array:
    """Return the last residual update of a layer, from its own input: `norm((f(x w_gate) * input) w_output)`.

    Args:
        spec: f is its activation.
        norm: the model's norm.
        parameters: `w_gate` [D, Z], `w_output` [Z, D], and a `norm` over D.
        x_BTD: the residual stream after the attention and feed-forward blocks of the layer.
        input_BTZ: this layer's slice of `layer_inputs`.

    Source: transformers, `gemma4` (Gemma4TextDecoderLayer).
    """
    gate = adapter.einsum("BTD,DZ->BTZ", x_BTD, parameters["w_gate"])
    out = adapter.einsum("BTZ,ZD->BTD", activate(spec.gated, gate, input_BTZ), parameters["w_output"])
    return normalize(norm, inside(parameters, "norm"), out)
