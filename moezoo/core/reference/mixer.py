"""The choice of a layer's mixer: attention, or what takes its place."""

from collections.abc import Mapping

from moezoo.core.reference import Array, Parameters
from moezoo.core.reference.attention import Attended, Source, grouped_query_attention
from moezoo.core.reference.compressed_attention import compressed_attention
from moezoo.core.reference.delta_attention import gated_delta_attention
from moezoo.core.reference.latent_attention import latent_attention
from moezoo.core.reference.lightning_attention import lightning_attention
from moezoo.core.reference.mamba import mamba
from moezoo.core.reference.mamba2 import mamba2
from moezoo.core.reference.positions import Documents
from moezoo.core.reference.routing import Routing
from moezoo.core.reference.short_convolution import short_convolution
from moezoo.core.spec import (
    CompressedAttentionSpec,
    GatedDeltaAttentionSpec,
    GroupedQueryAttentionSpec,
    LatentAttentionSpec,
    LightningAttentionSpec,
    Mamba2Spec,
    MambaSpec,
    MixerSpec,
    ShortConvolutionSpec,
)


def mix(
    spec: MixerSpec,
    parameters: Parameters,
    x_BTD: Array,
    first_value_BTMH: Array | None,
    sources: Mapping[int, Source | None],
    documents: Documents | None,
    routing: Routing | None = None,
    key_value_BTD: tuple[Array, Array] | None = None,
) -> Attended:
    """Mix the tokens of each sequence, causally: [B, T, D] -> [B, T, D], by the kind of the spec.

    Args:
        parameters: the mixer's own.
        first_value_BTMH: values of the first layer's attention, or None in that layer itself.
        sources: what the layers before share, by index: keys and values, or positions chosen by an indexer.
        documents: those of packed sequences; none of them affects another.
        routing: of a router over attention heads.
        key_value_BTD: inputs of keys and of values, where they are others than x.
    """
    match spec:
        case GroupedQueryAttentionSpec(keys_of_layer=int(other)):
            return grouped_query_attention(
                spec, parameters, x_BTD, source=sources[other], documents=documents, routing=routing
            )
        case GroupedQueryAttentionSpec():
            return grouped_query_attention(
                spec,
                parameters,
                x_BTD,
                first_value_BTMH=first_value_BTMH,
                documents=documents,
                key_value_BTD=key_value_BTD,
                routing=routing,
            )
        case GatedDeltaAttentionSpec():
            return gated_delta_attention(spec, parameters, x_BTD, documents=documents)
        case LatentAttentionSpec(indexer_of_layer=int(other)):
            return latent_attention(spec, parameters, x_BTD, chosen_BTS=sources[other], documents=documents)
        case LatentAttentionSpec():
            return latent_attention(spec, parameters, x_BTD, documents=documents)
        case CompressedAttentionSpec():
            return compressed_attention(spec, parameters, x_BTD, documents=documents)
        case ShortConvolutionSpec():
            return short_convolution(spec, parameters, x_BTD, documents=documents)
        case Mamba2Spec():
            return mamba2(spec, parameters, x_BTD, documents=documents)
        case MambaSpec():
            return mamba(spec, parameters, x_BTD, documents=documents)
        case LightningAttentionSpec():
            return lightning_attention(spec, parameters, x_BTD, documents=documents)
