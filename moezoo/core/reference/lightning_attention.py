"""Lightning attention: linear attention whose states decay at fixed rates."""

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, adapter, inside
from moezoo.core.reference.attention import Attended
from moezoo.core.reference.feed_forward import sigmoid, silu
from moezoo.core.reference.linear_recurrence import FORGETS, linear_recurrence
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.positions import Documents
from moezoo.core.spec import LightningAttentionSpec


def lightning_attention(
    spec: LightningAttentionSpec, parameters: Parameters, x_BTD: Array, *, documents: Documents | None = None
) -> Attended:
    """Lightning attention layer: [B, T, D] -> [B, T, D]. The decay orders the tokens; no position encoding.

        q, k, v  = silu(x w_query), silu(x w_key), silu(x w_value)
        out      = linear_recurrence(q, k, v, -decay_rates)
        layer(x) = (sigmoid(x w_gate) * norm(out)) w_output              norm: over the features of all heads

    The first token of each of the `documents` of packed sequences forgets everything.

    Source: MiniMax 2025, arXiv 2501.08313, section 2.2; Qin et al. 2024, arXiv 2405.17381.
    Differs: no rotation of queries and keys (as in the released model, unlike 2405.17381).
    """
    query, key, value = (
        silu(adapter.einsum("BTD,DNH->BTNH", x_BTD, parameters[f"w_{which}"])) for which in ("query", "key", "value")
    )
    log_decay_BTN = np.broadcast_to(-decay_rates(spec), query.shape[:3])
    if documents is not None:
        log_decay_BTN = np.where(documents.position_BT[..., None] == 0, FORGETS, log_decay_BTN)
    read = linear_recurrence(query, key, value[..., None, :], log_decay_BTN[..., None])[..., 0, :]
    normed = normalize(spec.norm, inside(parameters, "output_norm"), read, axes=2)
    gate = sigmoid(adapter.einsum("BTD,DNH->BTNH", x_BTD, parameters["w_gate"]))
    return Attended(adapter.einsum("BTNH,NHD->BTD", gate * normed, parameters["w_output"]), None, None)


def decay_rates(spec: LightningAttentionSpec) -> Array:
    """Return the rate of each head [N]: `decay_scale * 2^(-8 n / N)` for n from 1 to N, as slopes of ALiBi."""
    head_N = np.arange(1, spec.num_heads + 1)
    return spec.decay_scale * 2.0 ** (-8 * head_N / spec.num_heads)
