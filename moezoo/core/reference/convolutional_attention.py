"""Queries, keys and values that mix those of the last tokens, in attention with a `convolution`."""

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, adapter, inside
from moezoo.core.reference.positions import Documents, causal_windows


def convolved(
    parameters: Parameters, query_BTNH: Array, key_BTMH: Array, documents: Documents | None = None
) -> tuple[Array, Array]:
    """Return queries [B, T, N, H] and keys [B, T, M, H] after both convolutions, plus their means.

        c_t     = sum over w of conv[w] x_(t - (W - 1) + w) + b_conv                  each feature by itself
        mixed_t = sum over w of c_(t - (W - 1) + w) mix[w] + b_mix                    the features of each head
        query   = mixed query + (query + its group's key) / 2
        key     = mixed key + mean over its group of (query + key) / 2

    Projected queries and keys before the first token (of a sequence, or of each of its `documents`) are zero, so that c
    is there b_conv.

    Args:
        parameters: of `query`, `conv` [W, N, H], `mix` [W, N, H, H] from its third axis to its fourth, and a bias
            [N, H] of each; of `key`, the same with M heads.
        query_BTNH, key_BTMH: as projected, with their biases.
        documents: those of packed sequences, each by itself.

    Source: Figliolia et al. 2025, arXiv 2510.04476 (compressed convolutional attention); transformers 5.23, zaya
    (`ZayaCCAProjection`).
    """
    batch, length, num_heads, head_dim = query_BTNH.shape
    groups = num_heads // key_BTMH.shape[2]
    query_mean = (query_BTNH + np.repeat(key_BTMH, groups, axis=2)) / 2
    key_mean = np.mean(query_mean.reshape(batch, length, -1, groups, head_dim), axis=3)
    query = _mixed(inside(parameters, "query"), query_BTNH, documents) + query_mean
    return query, _mixed(inside(parameters, "key"), key_BTMH, documents) + key_mean


def _mixed(parameters: Parameters, x_BTNH: Array, documents: Documents | None) -> Array:
    """Return the output of both convolutions; b_conv, which is in every c, is added behind the second."""
    mix_WNHZ = parameters["mix"]
    conv_WNH = parameters["conv"]
    rows = causal_windows(x_BTNH, len(conv_WNH), documents)
    filtered = sum(row * own for row, own in zip(rows, conv_WNH, strict=True))
    rows = causal_windows(filtered, len(mix_WNHZ), documents)
    mixed = sum(np.einsum("BTNH,NHZ->BTNZ", row, own) for row, own in zip(rows, mix_WNHZ, strict=True))
    return mixed + np.einsum("NH,NHZ->NZ", parameters["b_conv"], np.sum(mix_WNHZ, axis=0)) + parameters["b_mix"]


def half_delayed_values(
    parameters: Parameters, x_BTD: Array, num_kv_heads: int, documents: Documents | None = None
) -> Array:
    """Return values [B, T, M, H], as a row of M H features: `x_t w_value`, and then `x_(t - 1) w_value_before`.

    Args:
        parameters: `w_value` and `w_value_before` [D, M H / 2]; biases `b_value` and `b_value_before` [M H / 2], if the
            layer has them, are those of every token, the first included, before which x is zero.
        x_BTD: the layer's input.
        num_kv_heads: M.
        documents: those of packed sequences, each by itself.

    Source: as `convolved` (value shift).
    """
    now = adapter.einsum("BTD,DZ->BTZ", x_BTD, parameters["w_value"])
    before, _ = causal_windows(adapter.einsum("BTD,DZ->BTZ", x_BTD, parameters["w_value_before"]), 2, documents)
    if "b_value" in parameters:
        now, before = now + parameters["b_value"], before + parameters["b_value_before"]
    return np.concatenate([now, before], axis=-1).reshape(*x_BTD.shape[:2], num_kv_heads, -1)
