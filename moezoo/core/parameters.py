"""The parameter table: every parameter of a model, once.

It drives initialization, checkpoints, weight decay, cost, sharding, and the shape tests of both backends. A canonical
name is the attribute path of the parameter in both frameworks: `layers.3.moe.experts.w_gate`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moezoo.core.spec import (
    DepthScaledInitializerSpec,
    GroupedQueryAttentionSpec,
    ModelSpec,
    MoESpec,
    SwiGLUSpec,
    UntiedHeadSpec,
)

Role = Literal["embeddings", "attention", "feed-forward", "router", "routed experts", "shared experts", "norms"]
ROLES: tuple[Role, ...] = (
    "embeddings",
    "attention",
    "feed-forward",
    "router",
    "routed experts",
    "shared experts",
    "norms",
)


@dataclass(frozen=True)
class Initializer:
    """How a parameter starts: `normal` with a standard deviation, `ones` or `zeros`."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = 0.0


@dataclass(frozen=True)
class Parameter:
    """One row. `axes` are axis words of the dimension alphabet, one a dimension; `decay`: weight decay acts on it."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    initializer: Initializer
    decay: bool
    role: Role

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def parameter_table(spec: ModelSpec) -> tuple[Parameter, ...]:
    """Every parameter of the model, in the order of the forward pass. Raises SpecError while vocab_size is null.

    Weight decay acts on matrices (two dimensions or more, the embedding included), not on scales and biases.
    """
    return tuple(_Table(spec).rows())


class _Table:
    def __init__(self, spec: ModelSpec):
        self.spec = spec
        std = spec.initializer.std
        depth_scaled = isinstance(spec.initializer, DepthScaledInitializerSpec)
        self.matrix = Initializer("normal", std)
        self.output = Initializer("normal", std / math.sqrt(2 * len(spec.all_layers)) if depth_scaled else std)
        self.ones, self.zeros = Initializer("ones"), Initializer("zeros")

    def rows(self) -> Iterator[Parameter]:
        d, v = self.spec.embed_dim, self.spec.vocab
        yield Parameter("embedding.weight", (v, d), ("vocab", "embed"), self.matrix, True, "embeddings")
        for index, layer in enumerate(self.spec.all_layers):
            prefix = f"layers.{index}"
            yield self.scale(f"{prefix}.attention_norm", d, "embed")
            yield from self.attention(f"{prefix}.attention", layer.attention)
            yield self.scale(f"{prefix}.feed_forward_norm", d, "embed")
            if layer.feed_forward is not None:
                yield from self.swiglu(f"{prefix}.feed_forward", layer.feed_forward, "feed-forward")
            if layer.moe is not None:
                yield from self.moe(f"{prefix}.moe", layer.moe)
        yield self.scale("final_norm", d, "embed")
        if isinstance(self.spec.head, UntiedHeadSpec):
            yield Parameter("head.w_head", (d, v), ("embed", "vocab"), self.matrix, True, "embeddings")

    def scale(self, name: str, size: int, axis: str) -> Parameter:
        return Parameter(f"{name}.scale", (size,), (axis,), self.ones, False, "norms")

    def attention(self, name: str, spec: GroupedQueryAttentionSpec) -> Iterator[Parameter]:
        d, n, m, h = self.spec.embed_dim, spec.num_heads, spec.num_kv_heads, spec.head_dim
        for which, heads, axis in (("query", n, "head"), ("key", m, "kv_head"), ("value", m, "kv_head")):
            axes = ("embed", axis, "head_dim")
            yield Parameter(f"{name}.w_{which}", (d, heads, h), axes, self.matrix, True, "attention")
            if spec.qkv_bias:
                yield Parameter(f"{name}.b_{which}", (heads, h), axes[1:], self.zeros, False, "attention")
        if spec.qk_norm is not None:
            yield self.scale(f"{name}.query_norm", h, "head_dim")
            yield self.scale(f"{name}.key_norm", h, "head_dim")
        yield Parameter(f"{name}.w_output", (n, h, d), ("head", "head_dim", "embed"), self.output, True, "attention")
        if spec.output_bias:
            yield Parameter(f"{name}.b_output", (d,), ("embed",), self.zeros, False, "attention")

    def swiglu(self, name: str, spec: SwiGLUSpec, role: Role, num_experts: int | None = None) -> Iterator[Parameter]:
        d, f = self.spec.embed_dim, spec.hidden_dim
        lead: tuple[int, ...] = () if num_experts is None else (num_experts,)
        lead_axes = () if num_experts is None else ("expert",)
        for which in ("gate", "up"):
            axes = (*lead_axes, "embed", "hidden")
            yield Parameter(f"{name}.w_{which}", (*lead, d, f), axes, self.matrix, True, role)
        yield Parameter(f"{name}.w_down", (*lead, f, d), (*lead_axes, "hidden", "embed"), self.output, True, role)

    def moe(self, name: str, spec: MoESpec) -> Iterator[Parameter]:
        d, e = self.spec.embed_dim, spec.num_experts
        yield Parameter(f"{name}.router.w_router", (d, e), ("embed", "expert"), self.matrix, True, "router")
        yield from self.swiglu(f"{name}.experts", spec.experts, "routed experts", num_experts=e)
        if spec.shared is not None:
            yield from self.swiglu(f"{name}.shared", spec.shared.feed_forward, "shared experts")
