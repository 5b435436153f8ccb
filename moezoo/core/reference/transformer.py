"""The whole model."""

from collections.abc import Sequence

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, Record, inside
from moezoo.core.reference.attention import grouped_query_attention
from moezoo.core.reference.feed_forward import swiglu
from moezoo.core.reference.moe import moe
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.routing import Routing
from moezoo.core.spec import ModelSpec, TiedHeadSpec, UntiedHeadSpec


def forward(
    spec: ModelSpec,
    parameters: Parameters,
    tokens_BT: Array,
    *,
    forced: Sequence[Array] | None = None,
    record: Record | None = None,
) -> tuple[Array, list[Routing]]:
    """Logits of the next token at every position, and the Routing of every MoE layer.

    Each layer is pre-norm: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`, dense or a MoE.

    Args:
        spec: the model.
        parameters: canonical name -> float64 array.
        tokens_BT: int, 0 <= token < V.
        forced: one int [P, K] per MoE layer: experts to use instead of the routers' own choice.
        record: filled with named intermediates, in the order in which they are computed.

    Returns:
        logits [B, T, V] and one Routing per MoE layer.

    Source: Radford et al. 2019 (pre-norm decoder); Touvron et al. 2023, arXiv 2302.13971 (RMSNorm, RoPE, SwiGLU).
    """
    record = {} if record is None else record
    routings: list[Routing] = []
    first_value_BTMH: Array | None = None
    x_BTD = parameters["embedding.weight"][tokens_BT]
    record["embedding"] = x_BTD
    for index, layer in enumerate(spec.all_layers):
        name = f"layers.{index}"
        own = inside(parameters, name)
        normed = normalize(spec.norm, inside(own, "attention_norm"), x_BTD)
        attended = grouped_query_attention(
            layer.attention, inside(own, "attention"), normed, first_value_BTMH=first_value_BTMH
        )
        if index == 0:
            first_value_BTMH = attended.value_BTMH
        record[f"{name}.attention"] = attended.out_BTD
        x_BTD = x_BTD + attended.out_BTD
        normed = normalize(spec.norm, inside(own, "feed_forward_norm"), x_BTD)
        if layer.moe is not None:
            forced_PK = None if forced is None else forced[len(routings)]
            out, routing = moe(
                layer.moe, inside(own, "moe"), normed, forced_PK=forced_PK, record=record, name=f"{name}.moe"
            )
            routings.append(routing)
            record[f"{name}.moe"] = out
        else:
            out = swiglu(inside(own, "feed_forward"), normed)
            record[f"{name}.feed_forward"] = out
        x_BTD = x_BTD + out
        record[name] = x_BTD
    x_BTD = normalize(spec.norm, inside(parameters, "final_norm"), x_BTD)
    record["final_norm"] = x_BTD
    match spec.head:
        case TiedHeadSpec():
            logits_BTV = np.einsum("BTD,VD->BTV", x_BTD, parameters["embedding.weight"])
        case UntiedHeadSpec():
            logits_BTV = np.einsum("BTD,DV->BTV", x_BTD, parameters["head.w_head"])
    record["logits"] = logits_BTV
    return logits_BTV, routings
