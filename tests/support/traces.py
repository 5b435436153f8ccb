"""Synthetic routing traces."""

from dataclasses import replace
from typing import Any

import numpy as np

from moezoo.core.traces.trace import RoutingTrace, TraceInfo, TraceRows, trace_of


def synthetic_trace(
    num_tokens: int = 40,
    layers: tuple[int, ...] = (1, 2, 4),
    num_experts: int = 8,
    top_k: int = 2,
    domains: tuple[str, ...] = ("verse", "prose"),
    vocab: int = 30,
    seed: int = 0,
) -> RoutingTrace:
    """Return a trace of random choices: two documents per domain, a tenth of the assignments dropped."""
    generator = np.random.default_rng(seed)
    shape = (num_tokens, len(layers))
    value = generator.normal(size=(*shape, num_experts))
    order = np.argsort(-value, axis=-1)
    weight = np.take_along_axis(np.exp(value), order, axis=-1)[..., :top_k]
    dropped = generator.random((*shape, top_k)) < 0.1
    part = np.arange(num_tokens) * 2 * len(domains) // num_tokens
    loss = generator.exponential(size=num_tokens)
    loss[np.flatnonzero(np.diff(part, prepend=-1))] = np.nan
    rows = TraceRows(
        expert=order[..., :top_k].astype(np.int16),
        weight=(np.where(dropped, 0.0, weight / weight.sum(-1, keepdims=True))).astype(np.float32),
        dropped=dropped.astype(np.uint8),
        margin=generator.random(shape).astype(np.float32),
        runner_up=order[..., top_k].astype(np.int16),
        token=generator.integers(0, vocab, num_tokens).astype(np.int32),
        loss=loss.astype(np.float32),
        document=part.astype(np.int32),
        domain=(part // 2).astype(np.int16),
        generated=np.zeros(num_tokens, np.uint8),
    )
    info = TraceInfo(layers=layers, num_experts=(num_experts,) * len(layers), domains=domains, sequence_length=16)
    texts = {token: f"w{token} " for token in sorted(set(rows.token.tolist()))} if rows.token is not None else {}
    return trace_of(info, rows, texts)


def with_columns(trace: RoutingTrace, **columns: Any) -> RoutingTrace:
    """Return a trace with other values in some columns."""
    return trace_of(trace.info, replace(trace.rows(), **columns), trace.texts, trace.where)
