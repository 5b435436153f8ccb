"""Short causal convolutions with a residual connection, inside attention and behind blocks, as data."""

from typing import Annotated

from pydantic import Field

from moezoo.core.spec.base import Part


class ResidualConvolutionSpec(Part):
    """Short causal convolution with a residual connection: `x + convolution(x)`, depthwise, over `width` tokens.

    `dynamic`: each token adds its own filter to the learned one, a projection of what x is projected from, shared by
    the features of a head. `unit_variance`: the result is divided by the root of its number of terms, `1 + width`, or
    `1 + 2 width` if it is dynamic. Source: Allen-Zhu 2025 (Physics of Language Models, part 4.1: Canon layers);
    dynamic: Wu et al. 2019, arXiv 1901.10430; both: Thinking Machines 2026 (Inkling, the code in transformers).
    """

    width: Annotated[int, Field(ge=2)] = 4
    dynamic: bool = False
    unit_variance: bool = False
