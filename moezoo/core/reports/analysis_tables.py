"""CSV tables of the measures of routing traces, a file for each group of measures."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moezoo.core.analysis.analyze import Analysis, TraceAnalysis
from moezoo.core.analysis.expert_cache import CacheResult
from moezoo.core.files import make_folder, write_atomically

Row = Sequence[object]


def write_tables(folder: Path, analysis: Analysis, caches: Sequence[CacheResult]) -> list[Path]:
    """Write the tables that are not empty to a folder; return their paths. Raises RunError: it cannot be written."""
    make_folder(folder)
    last = analysis.last
    tables: dict[str, tuple[str, Iterator[Row]]] = {
        "layers": ("trace,layer,max_violation,entropy,dead,experts_per_token,first_weight,weight_sum,dropped,margin,"
                   "narrow,from_previous,from_token_before,most_loaded", _layers(analysis)),
        "load": ("trace,layer,expert,load,gate_mass", _load(analysis)),
        "domains": ("trace,layer,domain,expert,share,shift,chance,chance_spread", _domains(analysis)),
        "vocabulary": ("of,layer,token,text,occurrences,expert,share", _vocabulary(last)),
        "coactivation": ("layer,expert,other_layer,other,share,lift", _pairs(last)),
        "distinct_experts": ("layer,tokens,consecutive,unrelated,balanced", _windows(last)),
        "saturation": ("trace,layer,all_experts,first_expert,chance", _saturation(analysis)),
        "cache": ("policy,is_shared,cache_bytes,capacity,tokens,hit_rate,bytes_per_token", _caches(caches)),
    }  # fmt: skip
    written = []
    for name, (header, rows) in tables.items():
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header.split(","))
        empty = text.tell()
        writer.writerows([_cell(value) for value in row] for row in rows)
        if text.tell() > empty:
            written.append(folder / f"{name}.csv")
            write_atomically(written[-1], text.getvalue())
    return written


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _layers(analysis: Analysis) -> Iterator[Row]:
    for each in analysis.traces:
        for load, guess in zip(each.load, each.predictability, strict=True):
            yield (
                *(each.trace.where, load.layer, load.max_violation, load.entropy, len(load.dead)),
                *(load.experts_per_token, load.first_weight, load.weight_sum, load.dropped, load.margin),
                *(load.narrow, guess.from_previous, guess.from_token_before, guess.most_loaded),
            )


def _load(analysis: Analysis) -> Iterator[Row]:
    for each in analysis.traces:
        for layer in each.load:
            for expert, load in enumerate(layer.load):
                mass = None if layer.gate_mass is None else float(layer.gate_mass[expert])
                yield each.trace.where, layer.layer, expert, float(load), mass


def _domains(analysis: Analysis) -> Iterator[Row]:
    for each in analysis.traces:
        for layer in each.domains or ():
            for place, domain in enumerate(layer.names):
                numbers = [float(values[place]) for values in (layer.shift, layer.chance, layer.chance_spread)]
                for expert, share in enumerate(layer.share[place]):
                    yield each.trace.where, layer.layer, domain, expert, float(share), *numbers


def _vocabulary(last: TraceAnalysis) -> Iterator[Row]:
    for vocabulary in last.vocabulary or ():
        for layer in vocabulary.layers:
            for place, token in enumerate(vocabulary.token.tolist()):
                yield (
                    *(vocabulary.of, layer.layer, token, last.trace.text(token), int(vocabulary.occurrences[place])),
                    *(int(layer.expert[place]), float(layer.share[place])),
                )


def _pairs(last: TraceAnalysis) -> Iterator[Row]:
    """Yield the pairs of one layer and of neighboring layers that share a token."""
    one = last.coactivation
    for place, layer in enumerate(one.layers):
        for other, rates in ((place, one.within[place]), (place + 1, one.adjacent[place : place + 1])):
            for row, column in np.argwhere(rates.reshape(-1, rates.shape[-1]) > 0).tolist():
                rate = float(rates.reshape(-1, rates.shape[-1])[row, column])
                if other != place or row != column:
                    yield layer, row, one.layers[other], column, rate, rate / float(one.usage[other, column])


def _windows(last: TraceAnalysis) -> Iterator[Row]:
    for each in last.windows:
        for place, layer in enumerate(last.trace.info.layers):
            numbers = (each.consecutive, each.unrelated, each.balanced)
            yield layer, each.tokens, *(float(values[place]) for values in numbers)


def _saturation(analysis: Analysis) -> Iterator[Row]:
    for each in analysis.saturation:
        for place, layer in enumerate(analysis.last.trace.info.layers):
            numbers = (each.all_experts, each.first_expert, each.chance)
            yield each.where, layer, *(float(values[place]) for values in numbers)


def _caches(caches: Sequence[CacheResult]) -> Iterator[Row]:
    for each in caches:
        sizes = (each.policy, each.is_shared, each.cache_bytes, each.capacity, each.tokens)
        yield *sizes, each.hit_rate, each.bytes_per_token
