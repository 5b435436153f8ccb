"""Parameter table rows of short convolutions with a residual connection."""

from collections.abc import Iterator

from moezoo.core.parameters.row import Parameter, Role, Rows
from moezoo.core.parameters.state_space import filters
from moezoo.core.spec import ResidualConvolutionSpec


def residual_convolution_rows(
    rows: Rows,
    name: str,
    spec: ResidualConvolutionSpec,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    role: Role = "attention",
) -> Iterator[Parameter]:
    """Yield the filter of features of this shape, and the projection to filters of heads of a dynamic one."""
    yield Parameter(f"{name}.conv", (spec.width, *shape), ("source", *axes), filters(spec.width), True, role)
    if spec.dynamic:
        shape = (rows.embed_dim, shape[0], spec.width)
        yield rows.matrix(f"{name}.w_filter", shape, ("embed", axes[0], "source"), role)
