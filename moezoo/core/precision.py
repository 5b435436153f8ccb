"""Where numbers change dtype. One list, for both backends; `float32` everywhere makes each of them a no-op.

With `precision.compute: bfloat16` (parameters stay float32, and so do their gradients and moments):

| value | dtype |
|---|---|
| parameters, optimizer moments | float32 |
| gradients of parameters (through the cast of the weight, so rounded to compute on the way) | float32 |
| embedding rows, residual stream, weights as they enter a product | compute |
| products of attention, feed-forward, experts and head | compute in and out, accumulated in float32 |
| norms: means, rsqrt, scale and bias; result cast back | float32 |
| RoPE angles and rotation; result cast back | float32 |
| attention scores, their cap, sinks and softmax; probabilities cast back | float32 |
| indexer of sparse attention: product with w_weight, scores, index, choice and loss | float32 |
| temperature of queries, mix of values, sigmoid of the attention's gate; result cast back | float32 |
| linear attention behind its projections: convolutions, decay, beta, state, gate; result cast back | float32 |
| inputs of those convolutions in the cache | compute |
| router: normalized input, jitter, noise, residual, scores, weights | float32 |
| router: product, and the input as it enters it (`router.dtype`) | float32 or compute |
| weighted sum over the K chosen experts, or product of weight and input (`apply_to: input`), cast back | float32 |
| experts without computation: mix and weighted sum; gate of shared experts: sigmoid and product; cast back | float32 |
| logits as returned, cross-entropy, auxiliary losses | float32 |
"""

from moezoo.core.spec import ModelSpec, RouterSpec

COMPUTE_BYTES = {"float32": 4, "bfloat16": 2}


def compute_dtype(spec: ModelSpec) -> str:
    """Name of the activation dtype, `float32` or `bfloat16`."""
    return spec.precision.compute


def router_dtype(spec: ModelSpec, router: RouterSpec) -> str:
    """Name of the dtype of the router's matrix product."""
    return "float32" if router.dtype == "float32" else compute_dtype(spec)
