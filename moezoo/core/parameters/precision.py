"""Cast points: the list of places where dtypes change, for both backends. With float32 each of them is a no-op.

A parameter is stored in one of STORED_DTYPES: the dtype of its file, or float32 if it is trained. Every use casts it,
to the compute dtype in a matrix product and to float32 elsewhere. Both casts are exact if compute is float32, so a
bfloat16 file gives exactly what the same values in float32 give.

With `precision.compute: bfloat16`:

| value | dtype |
|---|---|
| parameters as they are kept and exported | their own: float32, float16 or bfloat16 |
| parameters that are trained, optimizer moments | float32 |
| gradients of parameters (through the cast of the weight, so rounded to compute on the way) | float32 |
| embedding rows, residual stream, weights as they enter a product | compute |
| products of attention, feed-forward, experts and head | compute in and out, accumulated in float32 |
| embedding rows times their multiplier, plus positions; result cast to compute | float32 |
| norms: means, rsqrt, scale and bias; result cast back | float32 |
| gate of a norm: sigmoid and product; result cast back | float32 |
| RoPE angles and rotation; result cast back | float32 |
| attention scores, their cap, sinks and softmax; probabilities cast back | float32 |
| indexer of sparse attention: product with w_weight, means of pools, scores, index, choice and loss | float32 |
| dynamic mask: product with w_step, bias, choice | float32 |
| hyper-connections: weights of streams, their product and mixing matrix, sums of streams; result cast back | float32 |
| gated streams: gates, their mean, weights, sums of streams; result cast back | float32 |
| n-gram embeddings: gate, convolution and sum; result cast back | float32 |
| compressed entries: bias, softmax and sum over their tokens; result cast back | float32 |
| scale of a layer's output; result cast back | float32 |
| inputs of layers: sum of their two halves; result cast back | float32 |
| convolutions of queries and keys, their means, temperature of keys; result cast back | float32 |
| temperature of queries, multiplier and mix of values, function of the attention's gate; result cast back | float32 |
| linear attention behind its projections: convolutions, decay, beta, state, gate; result cast back | float32 |
| lightning attention behind its projections: silu, state, norm, gate; result cast back | float32 |
| Mamba-1 and 2 behind their projections: convolutions, step, decay, state, gate, norm; result cast back | float32 |
| short convolution: convolution and product with its output gate; result cast back | float32 |
| residual convolution: filters of a token, convolution and sum; result cast back | float32 |
| relative position logits: features after their projection, profiles, bias; projected sinks; L2 clips | float32 |
| inputs of those convolutions, in the cache and before it | compute |
| router: normalized input, jitter, noise, residual, bias, selection bias, cutoffs, scores, weights | float32 |
| router: product, and the input as it enters it (`router.dtype`) | float32 or compute |
| weighted sum over the K chosen experts, or product of weight and input (`apply_to: input`), cast back | float32 |
| experts without computation: mix and weighted sum; gate or weights of shared experts, product; cast back | float32 |
| logits as returned, cross-entropy, auxiliary losses | float32 |
"""

from collections.abc import Mapping

from moezoo.core.errors import TrainingError
from moezoo.core.spec import ModelSpec

STORED_DTYPES = ("float32", "float16", "bfloat16")
"""What a parameter may have; a backend makes float32 of anything else."""

COMPUTE_BYTES = {"float32": 4, "bfloat16": 2}


def compute_dtype(spec: ModelSpec) -> str:
    """Name of the activation dtype, `float32` or `bfloat16`."""
    return spec.precision.compute


def check_float32(dtypes: Mapping[str, str]) -> None:
    """Raises TrainingError where a parameter, given its dtype by name, is not float32: an update would be rounded."""
    other = [name for name, dtype in dtypes.items() if dtype != "float32"]
    if other:
        raise TrainingError(
            f"training needs float32 parameters; got {dtypes[other[0]]} in {other[0]} and {len(other) - 1} more. "
            "Convert them before the model is built."
        )
