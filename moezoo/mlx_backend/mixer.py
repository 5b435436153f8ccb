"""The choice of a layer's mixer. Spec: moezoo.core.reference.mixer."""

from collections.abc import Callable, Mapping
from typing import Any, assert_never

import mlx.core as mx
from mlx import nn

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
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.attention import GroupedQueryAttention
from moezoo.mlx_backend.compressed_attention import CompressedAttention
from moezoo.mlx_backend.delta_attention import GatedDeltaAttention
from moezoo.mlx_backend.kv_cache import Attended, Cache, Shared
from moezoo.mlx_backend.latent_attention import LatentAttention
from moezoo.mlx_backend.lightning_attention import LightningAttention
from moezoo.mlx_backend.mamba import Mamba
from moezoo.mlx_backend.mamba2 import Mamba2
from moezoo.mlx_backend.positions import Documents
from moezoo.mlx_backend.routing import Routing
from moezoo.mlx_backend.short_convolution import ShortConvolution


def mixer(spec: MixerSpec, weights: Weights, index: int) -> nn.Module:
    """Return the mixer of layer `index`, a module with the arguments of `mix` and a result of `Attended`."""
    match spec:
        case GroupedQueryAttentionSpec():
            return GroupedQueryAttention(spec, weights, index)
        case GatedDeltaAttentionSpec():
            return GatedDeltaAttention(spec, weights, index)
        case LatentAttentionSpec():
            return LatentAttention(spec, weights, index)
        case CompressedAttentionSpec():
            return CompressedAttention(spec, weights, index)
        case ShortConvolutionSpec():
            return ShortConvolution(spec, weights, index)
        case Mamba2Spec():
            return Mamba2(spec, weights, index)
        case MambaSpec():
            return Mamba(spec, weights, index)
        case LightningAttentionSpec():
            return LightningAttention(spec, weights, index)
        case _:
            assert_never(spec)


def mix(
    spec: MixerSpec,
    block: Callable[..., Any],
    x_BTD: mx.array,
    cache: Cache | None = None,
    *,
    first_value_BTMH: mx.array | None = None,
    first_B: mx.array | None = None,
    sources: Mapping[int, Shared | None],
    documents: Documents | None = None,
    routing: Routing | None = None,
    key_value_BTD: tuple[mx.array, mx.array] | None = None,
) -> Attended:
    """Spec: moezoo.core.reference.mixer.mix; by `block`, a `mixer` or what wraps it, with the layer's cache."""
    shared: dict[str, Any] = {} if key_value_BTD is None else {"key_value_BTD": key_value_BTD}
    match spec:
        case GroupedQueryAttentionSpec(keys_of_layer=int(other)):
            shared["source"] = sources[other]
        case LatentAttentionSpec(indexer_of_layer=int(other)):
            shared["chosen_BTS"] = sources[other]
    if routing is not None:
        shared["routing"] = routing
    attended: Attended = block(
        x_BTD, cache, first_value_BTMH=first_value_BTMH, first_B=first_B, documents=documents, **shared
    )
    return attended
