"""A vector for each layer and token, beside the residual stream."""

import math

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, inside
from moezoo.core.reference.feed_forward import activate
from moezoo.core.reference.normalization import normalize
from moezoo.core.spec import LayerInputsSpec, NormSpec


def layer_inputs(
    spec: LayerInputsSpec, norm: NormSpec, parameters: Parameters, tokens_BT: Array, x_BTD: Array
) -> Array:
    """`(sqrt(Z) weight[token] + norm(x w_context / sqrt(D))) / sqrt(2)`: what each layer is given, [B, T, L, Z].

    Args:
        spec: Z is its `dim`.
        norm: the model's.
        parameters: `weight` [V, L, Z], `w_context` [D, L, Z], and a `norm` over Z.
        tokens_BT: int, 0 <= token < V.
        x_BTD: the tokens' embeddings, multiplied as the residual stream starts with them.

    Source: transformers, `gemma4` (project_per_layer_inputs); Google 2025 (Gemma 3n).
    """
    context = np.einsum("BTD,DLZ->BTLZ", x_BTD, parameters["w_context"]) / math.sqrt(x_BTD.shape[-1])
    context = normalize(norm, inside(parameters, "norm"), context)
    return (context + math.sqrt(spec.dim) * parameters["weight"][tokens_BT]) / math.sqrt(2)


def layer_input(spec: LayerInputsSpec, norm: NormSpec, parameters: Parameters, x_BTD: Array, input_BTZ: Array) -> Array:
    """`norm((f(x w_gate) * input) w_output)`: what a layer adds to the residual stream behind its two blocks.

    Args:
        spec: f is its activation.
        norm: the model's.
        parameters: `w_gate` [D, Z], `w_output` [Z, D], and a `norm` over D.
        x_BTD: the residual stream behind the layer's blocks.
        input_BTZ: the layer's own of `layer_inputs`.

    Source: transformers, `gemma4` (Gemma4TextDecoderLayer).
    """
    gate = np.einsum("BTD,DZ->BTZ", x_BTD, parameters["w_gate"])
    out = np.einsum("BTZ,ZD->BTD", activate(spec.gated, gate, input_BTZ), parameters["w_output"])
    return normalize(norm, inside(parameters, "norm"), out)
