"""The parameter table of a whole model."""

from collections.abc import Iterator

from moezoo.core.parameters.adapter import with_factors
from moezoo.core.parameters.attention import attention_rows
from moezoo.core.parameters.convolution import residual_convolution_rows
from moezoo.core.parameters.feed_forward import feed_forward_rows
from moezoo.core.parameters.moe import moe_rows, router_rows
from moezoo.core.parameters.ngram_embeddings import ngram_embedding_rows
from moezoo.core.parameters.residual import final_residual_rows, first_residual_rows, residual_rows
from moezoo.core.parameters.row import ONES, Parameter, Rows
from moezoo.core.spec import LayerSpec, LearnedPositionsSpec, ModelSpec, UntiedHeadSpec


def parameter_table(spec: ModelSpec) -> tuple[Parameter, ...]:
    """Return every parameter of the model, in the order of the forward pass.

    Raises SpecError while vocab_size is null, and if the rank of an adapter is above that of a matrix.

    Weight decay applies to matrices (two or more dimensions, embeddings included), not to scales and biases.
    """
    return tuple(with_factors(spec, _rows(spec, Rows(spec))))


def _rows(spec: ModelSpec, rows: Rows) -> Iterator[Parameter]:
    d, v = spec.embed_dim, spec.vocab
    yield rows.matrix("embedding.weight", (v, d), ("vocab", "embed"), "embeddings")
    if spec.embedding_norm:
        yield from rows.norm("embedding_norm", spec.norm, (d,), ("embed",))
    if isinstance(spec.position, LearnedPositionsSpec):
        yield rows.matrix("position.weight", (spec.position.max_length, d), ("length", "embed"), "embeddings")
    if spec.layer_inputs is not None:
        shape = (len(spec.all_layers), spec.layer_inputs.dim)
        yield rows.matrix("layer_inputs.weight", (v, *shape), ("vocab", "layer", "latent"), "embeddings")
        yield rows.matrix("layer_inputs.w_context", (d, *shape), ("embed", "layer", "latent"), "feed-forward")
        yield from rows.norm("layer_inputs.norm", spec.norm, shape[1:], ("latent",))
    yield from first_residual_rows(rows, "first_residual")
    previous: int | None = None
    for index, layer in enumerate(spec.all_layers):
        yield from _layer(rows, f"layers.{index}", layer, index, previous)
        if (routed := layer.routed) is not None:
            previous = routed.num_choices
    yield from final_residual_rows(rows, "final_residual")
    if spec.has_norms:
        yield from rows.norm("final_norm", spec.last_norm, (d,), ("embed",))
    if isinstance(spec.head, UntiedHeadSpec):
        yield rows.matrix("head.w_head", (d, v), ("embed", "vocab"), "embeddings")
    if spec.head.bias:
        yield rows.vector("head.b_head", (v,), ("vocab",), "embeddings")


def _norm_gate(rows: Rows, name: str, rank: int | None) -> Iterator[Parameter]:
    if rank is not None:
        d = rows.embed_dim
        yield rows.matrix(f"{name}.w_down", (d, rank), ("embed", "latent"), "norms")
        yield rows.matrix(f"{name}.w_up", (rank, d), ("latent", "embed"), "norms")


def _layer(rows: Rows, name: str, layer: LayerSpec, index: int, previous: int | None) -> Iterator[Parameter]:
    norm, shape, axes = rows.spec.norm, (rows.embed_dim,), ("embed",)
    if layer.ngram_embeddings is not None:
        yield from ngram_embedding_rows(rows, f"{name}.ngram_embeddings", layer.ngram_embeddings)
    if layer.has_mixer:
        yield from residual_rows(rows, f"{name}.attention_residual")
        for which in ("key", "value") if layer.separate_inputs else ():
            yield from residual_rows(rows, f"{name}.attention_{which}_residual")
            yield from rows.norm(f"{name}.attention_{which}_norm", norm, shape, axes)
        if rows.spec.has_norms:
            yield from rows.norm(f"{name}.attention_norm", norm, shape, axes)
        yield from _norm_gate(rows, f"{name}.attention_norm_gate", layer.attention_norm_gate)
    yield from attention_rows(rows, f"{name}.attention", layer.attention, index)
    convolution = layer.output_convolution
    if convolution is not None and layer.has_mixer:
        yield from residual_convolution_rows(rows, f"{name}.attention_convolution", convolution, shape, axes)
    if layer.norm_placement == "sandwich" and layer.has_mixer:
        yield from rows.norm(f"{name}.attention_output_norm", norm, shape, axes)
    if not layer.mixer_only:
        yield from residual_rows(rows, f"{name}.feed_forward_residual")
    if layer.norm_placement != "parallel" and not layer.mixer_only:
        if rows.spec.has_norms:
            yield from rows.norm(f"{name}.feed_forward_norm", norm, shape, axes)
        yield from _norm_gate(rows, f"{name}.feed_forward_norm_gate", layer.feed_forward_norm_gate)
    if layer.feed_forward is not None:
        yield from feed_forward_rows(rows, f"{name}.feed_forward", layer.feed_forward, "feed-forward")
    if layer.moe is not None:
        yield from moe_rows(rows, f"{name}.moe", layer.moe, previous)
    elif (routed := layer.routed) is not None:
        yield from router_rows(rows, f"{name}.moe.router", routed, previous)
    if layer.feed_forward_scale:
        yield rows.vector(f"{name}.feed_forward_scale", (1,), ("one",), "feed-forward", ONES)
    if convolution is not None and not layer.mixer_only:
        own = f"{name}.feed_forward_convolution"
        yield from residual_convolution_rows(rows, own, convolution, shape, axes, "feed-forward")
    if layer.norm_placement == "sandwich" and not layer.mixer_only:
        yield from rows.norm(f"{name}.feed_forward_output_norm", norm, shape, axes)
    if rows.spec.layer_inputs is not None:
        z = rows.spec.layer_inputs.dim
        yield rows.matrix(f"{name}.layer_input.w_gate", (rows.embed_dim, z), ("embed", "latent"), "feed-forward")
        yield rows.output(f"{name}.layer_input.w_output", (z, rows.embed_dim), ("latent", "embed"), "feed-forward")
        yield from rows.norm(f"{name}.layer_input.norm", norm, shape, axes)
    if layer.output_scale:
        yield rows.state(f"{name}.output_scale", (1,), ("one",), "norms", ONES)
