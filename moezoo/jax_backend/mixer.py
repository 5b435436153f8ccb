"""The choice of a layer's mixer. Spec: moezoo.core.reference.mixer."""

from collections.abc import Callable, Mapping
from typing import Any, assert_never

import jax
from flax import nnx

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
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.attention import GroupedQueryAttention
from moezoo.jax_backend.compressed_attention import CompressedAttention
from moezoo.jax_backend.delta_attention import GatedDeltaAttention
from moezoo.jax_backend.kv_cache import Attended, Cache, Shared
from moezoo.jax_backend.latent_attention import LatentAttention
from moezoo.jax_backend.lightning_attention import LightningAttention
from moezoo.jax_backend.mamba import Mamba
from moezoo.jax_backend.mamba2 import Mamba2
from moezoo.jax_backend.positions import Documents
from moezoo.jax_backend.routing import Routing
from moezoo.jax_backend.short_convolution import ShortConvolution


def mixer(spec: MixerSpec, weights: Weights, index: int) -> nnx.Module:
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
    x_BTD: jax.Array,
    cache: Cache | None = None,
    *,
    first_value_BTMH: jax.Array | None = None,
    first_B: jax.Array | None = None,
    sources: Mapping[int, Shared | None],
    documents: Documents | None = None,
    routing: Routing | None = None,
    key_value_BTD: tuple[jax.Array, jax.Array] | None = None,
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
