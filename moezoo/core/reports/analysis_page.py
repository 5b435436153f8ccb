"""The page of `moezoo analyze`: tables of the measures of routing traces, for a terminal of 80 columns."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moezoo.core.analysis.analyze import Analysis, TraceAnalysis
from moezoo.core.analysis.coactivation import Pair
from moezoo.core.analysis.expert_cache import POLICIES, CacheResult, ExpertSizes
from moezoo.core.analysis.vocabulary import FEWEST, favorite_tokens
from moezoo.core.errors import counted
from moezoo.core.reports.text import bytes_text, count, new_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_SHOWN_EXPERTS = 16


def analysis_page(
    analysis: Analysis,
    caches: Sequence[CacheResult] = (),
    sizes: ExpertSizes | None = None,
    bandwidths: Sequence[float] = (),
) -> "RenderableType":
    """Return the page: a table of all traces if there are several, and the measures of the last one."""
    from rich.console import Group
    from rich.text import Text

    last = analysis.last
    parts: list[RenderableType] = [Text(_title(last))]
    parts += [Text(f"missing: {line}") for line in last.missing]
    parts += [_checkpoint_table(analysis)] if len(analysis.traces) > 1 else []
    parts += [_load_table(last)]
    parts += _domain_parts(last)
    parts += _vocabulary_parts(last)
    parts += [_pair_table(last), _guess_table(last), _window_table(last)]
    parts += _cache_parts(caches, sizes, bandwidths)
    return Group(*(line for part in parts for line in _with_title(part)))


def _with_title(part: "RenderableType") -> "Iterator[RenderableType]":
    """Yield a table's title as a line of its own, which is not limited to the table's width, and the table."""
    from rich.table import Table
    from rich.text import Text

    if isinstance(part, Table):
        yield Text(str(part.title), style="bold")
        part.title = None
    yield part


def _titled(title: str, first: str, *others: str, right: Iterable[int] = ()) -> "Table":
    """Return an empty table under a title."""
    table = new_table(first, *others, right=right)
    table.title, table.caption_justify = title, "left"
    return table


def _title(last: TraceAnalysis) -> str:
    trace, info = last.trace, last.trace.info
    experts = sorted(set(info.num_experts))
    words = [
        f"{trace.where}: {counted(trace.num_tokens, 'token')}",
        f"{counted(trace.num_layers, 'MoE layer')} of {' or '.join(map(str, experts))} experts, up to {trace.top_k} "
        "per token",
        *([f"model {info.model}"] if info.model else []),
        f"written by {info.written_by}",
    ]
    return "; ".join(words)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _checkpoint_table(analysis: Analysis) -> "Table":
    table = _titled(
        "All traces: means over layers, but MaxVio of the worst layer; shares in %",
        *("trace", "MaxVio", "entropy", "shift", "input id", "next id", "saturation", "first"),
        right=range(1, 8),
    )
    for each, saturation in zip(analysis.traces, [*analysis.saturation, None], strict=True):
        words = ["", ""]
        if each.vocabulary is not None:
            words = [_percent(_mean([layer.mean for layer in one.layers])) for one in each.vocabulary]
        table.add_row(
            Path(each.trace.where).stem,
            f"{max(layer.max_violation for layer in each.load):.2f}",
            f"{np.mean([layer.entropy for layer in each.load]):.3f}",
            _percent(None if each.domains is None else _mean([float(layer.shift.mean()) for layer in each.domains])),
            *words,
            *(["", ""] if saturation is None else [_percent(float(saturation.all_experts.mean()))]),
            *([] if saturation is None else [_percent(float(saturation.first_expert.mean()))]),
        )
    return table


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _load_table(last: TraceAnalysis) -> "Table":
    table = _titled(
        "Load: most and least loaded expert, an equal share being 1; in %: weight of a token's first expert, dropped "
        "assignments, margins below 0.01",
        *("layer", "MaxVio", "entropy", "most", "least", "dead", "first", "dropped", "narrow"),
        right=range(1, 9),
    )
    for layer in last.load:
        relative = layer.load * len(layer.load)
        most, least = int(np.argmax(relative)), int(np.argmin(relative))
        table.add_row(
            str(layer.layer),
            f"{layer.max_violation:.2f}",
            f"{layer.entropy:.3f}",
            f"e{most} {relative[most]:.2f}",
            f"e{least} {relative[least]:.2f}",
            str(len(layer.dead)),
            *map(_percent, (layer.first_weight, layer.dropped, layer.narrow)),
        )
    return table


def _domain_parts(last: TraceAnalysis) -> "Iterator[Table]":
    if last.domains is None:
        return
    table = _titled(
        "Domains: share of choices that differ from the mean of all texts, in %",
        *("layer", "shift", "by chance", "strongest preference"),
        right=(1, 2),
    )
    for layer in last.domains:
        place = int(np.argmax([np.subtract(*layer.strongest(one)[1:]) for one in range(len(layer.names))]))
        expert, own, others = layer.strongest(place)
        table.add_row(
            str(layer.layer),
            _percent(float(layer.shift.mean())),
            f"{_percent(float(layer.chance.mean()))} ± {_percent(float(layer.chance_spread.mean()))}",
            f"e{expert} by {_percent(own)} % of {layer.names[place]:.24}, {_percent(others)} % of others",
        )
    yield table


def _vocabulary_parts(last: TraceAnalysis) -> "Iterator[Table]":
    if last.vocabulary is None or not last.vocabulary[0].layers:
        return
    own, following = last.vocabulary
    table = _titled(
        f"Vocabulary: share of an id's tokens with its main first expert, in % ({counted(len(own.token), 'id')})",
        *("layer", "input id", "by chance", "next id", "by chance"),
        right=range(1, 5),
    )
    if own.left_out:
        table.caption = f"{own.left_out} rarer ids that occur at least {FEWEST} times are left out"
    for place, layer in enumerate(own.layers):
        later = following.layers[place : place + 1]
        numbers = [layer.mean, layer.chance, *(value for one in later for value in (one.mean, one.chance))]
        table.add_row(str(layer.layer), *map(_percent, numbers))
    yield table
    place = int(np.argmax([layer.mean - layer.chance for layer in own.layers]))
    title = f"Favorite tokens in layer {own.layers[place].layer}"
    table = _titled(title, "expert", "ids whose main first expert it is, share in %")
    favorites = [(expert, words) for expert, words in favorite_tokens(last.trace, own, place).items() if words]
    for expert, words in favorites[:_SHOWN_EXPERTS]:
        table.add_row(f"e{expert}", "  ".join(words))
    yield table


def _pair_table(last: TraceAnalysis) -> "Table":
    title = "Co-activation: share of the first expert's tokens; times the second's share of all"
    table = _titled(title, "layer", "strongest pair", "with an expert of the next MoE layer")
    for place, layer in enumerate(last.coactivation.layers):
        later = place + 1 < last.trace.num_layers
        table.add_row(
            str(layer),
            _pair_words(last.coactivation.strongest(place)),
            _pair_words(last.coactivation.strongest_next(place)) if later else "",
        )
    if last.coactivation.across is None:
        table.caption = "too many experts for pairs of all layers: only within a layer and with the next one"
    return table


def _pair_words(pair: Pair | None) -> str:
    if pair is None:
        return "none"
    return f"e{pair.one} with e{pair.other} {_percent(pair.share)} % (x {pair.lift:.1f})"


def _guess_table(last: TraceAnalysis) -> "Table":
    title = "Predictability: share of a token's experts that are guessed, in %"
    table = _titled(title, "layer", "from previous layer", "from token before", "most loaded", right=range(1, 4))
    for layer in last.predictability:
        table.add_row(
            str(layer.layer), *map(_percent, (layer.from_previous, layer.from_token_before, layer.most_loaded))
        )
    return table


def _window_table(last: TraceAnalysis) -> "Table":
    title = f"Distinct experts per layer that a number of tokens needs, of {np.mean(last.trace.info.num_experts):g}"
    table = _titled(title, "tokens", "consecutive", "unrelated", "unrelated and balanced", right=range(1, 4))
    for each in last.windows:
        numbers = (each.consecutive, each.unrelated, each.balanced)
        table.add_row(str(each.tokens), *(f"{values.mean():.1f}" for values in numbers))
    return table


def _cache_parts(
    caches: Sequence[CacheResult], sizes: ExpertSizes | None, bandwidths: Sequence[float]
) -> "Iterator[RenderableType]":
    from rich.text import Text

    if not caches or sizes is None:
        return
    for cache_bytes in dict.fromkeys(each.cache_bytes for each in caches):
        group = [each for each in caches if each.cache_bytes == cache_bytes]
        limits = [f"{bandwidth / 1e9:.3g} GB/s" for bandwidth in bandwidths]
        part = "shared by all layers" if group[0].is_shared else "an equal part for each layer"
        table = _titled(
            f"Cache of {bytes_text(cache_bytes)}, {part}: {group[0].capacity} of {sum(sizes.num_experts)} experts "
            f"({bytes_text(sizes.total_bytes)}); tokens/s at most",
            *("policy", "hits %", "per token", *limits),
            right=range(1, 3 + len(limits)),
        )
        for each in group:
            rates = [each.tokens_per_second(bandwidth) for bandwidth in bandwidths]
            speeds = ["no load" if np.isinf(rate) else count(rate) if rate >= 1000 else f"{rate:.3g}" for rate in rates]
            table.add_row(each.policy, _percent(each.hit_rate), bytes_text(each.bytes_per_token), *speeds)
        yield table
    for name in dict.fromkeys(each.policy for each in caches):
        yield Text(f"{name}: {POLICIES[name]}")
    yield Text("One sequence, one token at a time; the rates count the transfer of experts that are not cached, alone.")
