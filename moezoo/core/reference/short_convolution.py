"""Gated short convolutions: causal and depthwise."""

from moezoo.core.reference import Array, Parameters, adapter
from moezoo.core.reference.attention import Attended
from moezoo.core.reference.convolution import causal_convolution
from moezoo.core.reference.positions import Documents
from moezoo.core.spec import ShortConvolutionSpec


def short_convolution(
    spec: ShortConvolutionSpec, parameters: Parameters, x_BTD: Array, *, documents: Documents | None = None
) -> Attended:
    """Gated short convolution layer: [B, T, D] -> [B, T, D]. The convolution orders the tokens; no position encoding.

        input gate, output gate, value = three projections of x, each [B, T, Z] with Z = D
        out = (output gate * convolution(input gate * value)) w_output

    Gates have no activation: a gate is a factor of any sign and size. With `bias`, each projection and the convolution
    adds one. Tokens before the first (of a sequence, or of each of its `documents`) are zero as inputs of the
    convolution, with or without biases.

    Source: Amini et al. 2025, arXiv 2511.23404 (LFM2).
    Differs: released checkpoints store the three projections as one matrix: input gate, output gate, value.
    """
    input_gate_BTZ = adapter.einsum("BTD,DZ->BTZ", x_BTD, parameters["w_input_gate"])
    output_gate_BTZ = adapter.einsum("BTD,DZ->BTZ", x_BTD, parameters["w_output_gate"])
    value_BTZ = adapter.einsum("BTD,DZ->BTZ", x_BTD, parameters["w_value"])
    if spec.bias:
        input_gate_BTZ = input_gate_BTZ + parameters["b_input_gate"]
        output_gate_BTZ = output_gate_BTZ + parameters["b_output_gate"]
        value_BTZ = value_BTZ + parameters["b_value"]
    convolved_BTZ = causal_convolution(input_gate_BTZ * value_BTZ, parameters["conv"], documents)
    if spec.bias:
        convolved_BTZ = convolved_BTZ + parameters["b_conv"]
    output = adapter.einsum("BTZ,ZD->BTD", output_gate_BTZ * convolved_BTZ, parameters["w_output"])
    if spec.bias:
        output = output + parameters["b_output"]
    return Attended(output, None, None)
