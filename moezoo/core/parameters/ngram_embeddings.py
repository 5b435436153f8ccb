"""Parameter table rows of n-gram embeddings."""

from collections.abc import Iterator

from moezoo.core.parameters.row import MatrixAxes, Parameter, Rows
from moezoo.core.parameters.state_space import filters
from moezoo.core.spec import NGramEmbeddingsSpec


def ngram_embedding_rows(rows: Rows, name: str, spec: NGramEmbeddingsSpec) -> Iterator[Parameter]:
    """Yield every parameter of a layer's n-gram embeddings."""
    z, j, d, w = spec.dim, rows.spec.num_streams, rows.embed_dim, spec.conv_width
    shape, axes = (spec.parts, spec.rows // spec.parts, spec.head_dim), ("part", "row", "ngram")
    yield Parameter(f"{name}.weight", shape, axes, rows.matrix_initializer, True, "embeddings", matrix=MatrixAxes(0, 2))
    yield rows.matrix(f"{name}.w_key", (z, j, d), ("latent", "stream", "embed"), "feed-forward")
    yield rows.matrix(f"{name}.w_value", (z, d), ("latent", "embed"), "feed-forward")
    for which in ("key_norm", "query_norm", "conv_norm"):
        yield from rows.norm(f"{name}.{which}", rows.spec.norm, (j, d), ("stream", "embed"))
    yield Parameter(f"{name}.conv", (w, j, d), ("source", "stream", "embed"), filters(w), True, "feed-forward")
