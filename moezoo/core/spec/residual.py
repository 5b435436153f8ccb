"""The residual stream as data: what blocks read from it, and how it takes up what they add."""

from collections.abc import Sequence
from typing import Annotated, Literal, assert_never

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from moezoo.core.spec.base import Part, default_kind, impossible
from moezoo.core.spec.layer import LayerSpec


class SumResidualSpec(Part):
    """One stream, to which each block adds its output: `x + f(x)`. Source: He et al. 2015, arXiv 1512.03385."""

    kind: Literal["sum"] = "sum"


class DepthScaledResidualSpec(Part):
    """One stream that keeps its variance: block i, counted from 2, makes `x sqrt(1 - 1 / i) + f(x) sqrt(1 / i)` of x.

    Block 2 is the attention of the first layer, so the stream is the sum of its i terms, the embedding among them, over
    sqrt(i). Source: Reflection AI 2026 (Beam; transformers 5.23, `depth_scaled_residual_add`).
    """

    kind: Literal["depth_scaled"] = "depth_scaled"


class ScaledResidualSpec(Part):
    """One stream, whose two terms have a learned bias and scale per feature: `(x + a) b + (f(x) + c) d`.

    So have the embeddings, with which the stream begins. `terms: stream`: a block scales the stream alone, `x b +
    f(x)`, and nothing has a bias (Doge). Source: Anthony et al. 2025 (ZAYA1), arXiv 2511.17127 (residual scaling);
    transformers 5.23, zaya and doge.
    """

    kind: Literal["scaled"] = "scaled"
    terms: Literal["both", "stream"] = "both"


class HyperConnectionsSpec(Part):
    """Several streams: a block reads a weighted sum of them, and adds its output to each with a weight of its own.

    All weights are functions of the token's streams, and of each block's own parameters. A block reads with weights
    `sigmoid + epsilon` and writes with `magnitude * sigmoid + write_epsilon`. When it writes, the streams are mixed by
    a nearly doubly stochastic matrix, made in `sinkhorn_iterations`; null: they are not mixed. `norm_epsilon`: of the
    norm of all streams that the weights are computed from. At first all weights but those of mixing are those of a
    plain sum. The final norm reads the streams as a block does, or with `final_read: mean` their mean (GLM-5.3).
    Source: Xie et al. 2025, arXiv 2512.24880 (mHC; DeepSeek-V4), after Zhu et al. 2024, arXiv 2409.19606 (hyper-
    connections); without mixing Tencent 2026 (HY-V4; transformers 5.23).
    """

    kind: Literal["hyper_connections"] = "hyper_connections"
    num_streams: PositiveInt = 4
    sinkhorn_iterations: PositiveInt | None = 20
    final_read: Literal["weighted", "mean"] = "weighted"
    magnitude: PositiveFloat = 2.0
    epsilon: NonNegativeFloat = 1e-6
    write_epsilon: NonNegativeFloat = 0.0
    norm_epsilon: PositiveFloat = 1e-6


class GatedStreamsSpec(Part):
    """Several streams, of which a block reads a mean gated by feature, and to each of which it adds with a weight.

    Streams are normalized by the model's norm, each with scales of its own, when they are read: layers have no other
    norm before a block, and the model no final one. Gates are functions of all streams of the token through a vector
    of `rank` features, weights through a matrix; they are each block's own. Source: Qwen Team 2026 (Qwen4;
    transformers 5.23).
    """

    kind: Literal["gated_streams"] = "gated_streams"
    num_streams: PositiveInt = 4
    rank: PositiveInt


class BlockAttentionResidualSpec(Part):
    """Attention over depth: what is read are earlier states of the token, weighted by attention with a learned query.

    The stream is cut every `layers_per_block` layers: at the first one's attention a sum begins anew, with what that
    attention adds, and the sum before it is kept. Each reader (a block, the final norm) attends to all sums kept and to
    the running one, which are keys and values, normalized without a scale, with `norm_epsilon`; its query is a learned
    vector, at first zero, so that it reads their mean. The first block reads the embeddings as they are. Source: Kimi
    Team 2026 (attention residuals), in the form of Thinking Machines 2026 (Inkling 2, the code in transformers).
    """

    kind: Literal["block_attention"] = "block_attention"
    layers_per_block: PositiveInt = 6
    norm_epsilon: PositiveFloat = 1e-6

    def begins(self, block: int) -> bool:
        """True if a sum begins with what this block adds: 2 l is the mixer of layer l, 2 l + 1 its feed-forward."""
        return block % (2 * self.layers_per_block) == 0


ResidualSpec = Annotated[
    SumResidualSpec
    | DepthScaledResidualSpec
    | ScaledResidualSpec
    | HyperConnectionsSpec
    | GatedStreamsSpec
    | BlockAttentionResidualSpec,
    Field(discriminator="kind"),
    default_kind("sum"),
]


def check_residual(
    spec: ResidualSpec, layers: Sequence[LayerSpec], *, has_layer_inputs: bool, has_final_norm: bool
) -> None:
    """Raise if a model adds to its residual stream in a way that this kind of residual has no meaning for."""
    _check_separate_inputs(spec, layers)
    for place, layer in enumerate(layers):
        if layer.norm_placement == "stream" and not isinstance(spec, SumResidualSpec):
            raise impossible(
                f"layers[{place}].norm_placement",
                f"is stream, which normalizes the stream itself, but residual is {spec.kind}",
                "Use norm_placement: pre, or residual: {kind: sum}",
            )
    if has_final_norm and isinstance(spec, GatedStreamsSpec):
        raise impossible(
            "final_norm",
            "is set, but residual is gated_streams, which normalizes what it reads",
            "Remove one of the two",
        )
    shortcut = any(layer.shortcut for layer in layers)
    match spec:
        case SumResidualSpec() | ScaledResidualSpec():
            pass
        case DepthScaledResidualSpec():
            if has_layer_inputs or shortcut or any(layer.mixer_only or not layer.has_mixer for layer in layers):
                raise impossible(
                    "residual",
                    "is depth_scaled, which counts two blocks per layer, but there are layer_inputs, a shortcut or "
                    "single blocks",
                    "Remove one of the two",
                )
        case BlockAttentionResidualSpec():
            single = any(layer.mixer_only or not layer.has_mixer for layer in layers)
            parallel = any(layer.norm_placement == "parallel" for layer in layers)
            if has_layer_inputs or shortcut or parallel or single or any(_adds(layer) for layer in layers):
                raise impossible(
                    "residual",
                    "is block_attention, but there are layer_inputs, a shortcut, an output_scale, ngram_embeddings, or "
                    "layers without two blocks in a row",
                    "Remove one of the two",
                )
        case HyperConnectionsSpec() | GatedStreamsSpec():
            for place, layer in enumerate(layers):
                if isinstance(spec, GatedStreamsSpec) and layer.norm_placement != "pre":
                    raise impossible(
                        f"layers[{place}].norm_placement",
                        f"is {layer.norm_placement}, but residual is gated_streams, whose streams are normalized as "
                        "they are read",
                        "Use norm_placement: pre",
                    )
            parallel = any(layer.norm_placement == "parallel" for layer in layers)
            if has_layer_inputs or shortcut or parallel or any(layer.output_scale for layer in layers):
                raise impossible(
                    "residual",
                    f"is {spec.kind}, but there are layer_inputs, a shortcut, an output_scale or parallel blocks, "
                    "which add to one stream",
                    "Remove one of the two",
                )
        case _:
            assert_never(spec)


def _adds(layer: LayerSpec) -> bool:
    return layer.output_scale or layer.ngram_embeddings is not None


def _check_separate_inputs(spec: ResidualSpec, layers: Sequence[LayerSpec]) -> None:
    for place, layer in enumerate(layers):
        if layer.separate_inputs and not isinstance(spec, SumResidualSpec | BlockAttentionResidualSpec):
            raise impossible(
                f"layers[{place}].separate_inputs",
                f"is true, but residual is {spec.kind}, of which a block has one input",
                "Use residual: {kind: block_attention}, or remove it",
            )
