"""All measures of routing traces: of one, or of the traces of a run's checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.analysis.coactivation import Coactivation, Pair, measure_coactivation
from moezoo.core.analysis.domains import LayerDomains, measure_domains
from moezoo.core.analysis.load import LayerLoad, measure_load
from moezoo.core.analysis.predictability import LayerPredictability, measure_predictability
from moezoo.core.analysis.saturation import Saturation, measure_saturation
from moezoo.core.analysis.vocabulary import Vocabulary, favorite_tokens, measure_vocabulary
from moezoo.core.analysis.windows import DistinctExperts, measure_windows
from moezoo.core.progress import Progress
from moezoo.core.traces.trace import RoutingTrace

_NEEDED_BY = {
    "weight": "gate mass, first weight, sum of weights",
    "margin": "margin, narrow margins",
    "dropped": "dropped assignments",
    "token": "vocabulary specialization",
    "domain": "domain specialization",
    "document": "borders of documents, which windows and the token before then ignore",
}


@dataclass(frozen=True)
class TraceAnalysis:
    """Measures of one trace. `missing` has a line for each measure that the trace has no column for."""

    trace: RoutingTrace
    load: tuple[LayerLoad, ...]
    domains: tuple[LayerDomains, ...] | None
    vocabulary: tuple[Vocabulary, Vocabulary] | None
    coactivation: Coactivation
    predictability: tuple[LayerPredictability, ...]
    windows: tuple[DistinctExperts, ...]
    missing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the measures as plain data. Matrices of pairs are left out."""
        info, one = self.trace.info, self.coactivation
        places = range(self.trace.num_layers)
        found = {
            "trace": self.trace.where,
            "tokens": self.trace.num_tokens,
            "top_k": self.trace.top_k,
            "info": info.model_dump(mode="json"),
            "missing": list(self.missing),
            "load": [_plain(vars(layer)) for layer in self.load],
            "domains": None if self.domains is None else [_plain(vars(layer)) for layer in self.domains],
            "vocabulary": None if self.vocabulary is None else [self._words(each) for each in self.vocabulary],
            "coactivation": {
                "strongest": [_pair(one.strongest(place)) for place in places],
                "strongest_next": [_pair(one.strongest_next(place)) for place in places[:-1]],
                "strongest_partner": None if one.across is None else _plain(one.across),
            },
            "predictability": [_plain(vars(layer)) for layer in self.predictability],
            "distinct_experts": [_plain(vars(each)) for each in self.windows],
        }
        return found

    def _words(self, vocabulary: Vocabulary) -> dict[str, Any]:
        return {
            "of": vocabulary.of,
            "ids": len(vocabulary.token),
            "left_out": vocabulary.left_out,
            "layers": [
                {
                    "layer": layer.layer,
                    "mean": _plain(layer.mean),
                    "chance": _plain(layer.chance),
                    "favorites": favorite_tokens(self.trace, vocabulary, place),
                }
                for place, layer in enumerate(vocabulary.layers)
            ],
        }


@dataclass(frozen=True)
class Analysis:
    """Measures of the traces of one model's checkpoints, in the order of training, and their saturation."""

    traces: tuple[TraceAnalysis, ...]
    saturation: tuple[Saturation, ...]

    @property
    def last(self) -> TraceAnalysis:
        """The measures of the last trace."""
        return self.traces[-1]

    def to_json(self) -> dict[str, Any]:
        """Return the measures as plain data."""
        return {
            "traces": [each.to_json() for each in self.traces],
            "saturation": [_plain(vars(each)) for each in self.saturation],
        }


def analyze(traces: Sequence[RoutingTrace], on_progress: Progress | None = None) -> Analysis:
    """Measure the traces of one model: one, or those of its checkpoints in the order of training.

    Raises DataError: traces of other layers or texts.
    """
    saturation = measure_saturation(traces, on_progress)
    return Analysis(tuple(analyze_trace(trace, on_progress) for trace in traces), saturation)


def analyze_trace(trace: RoutingTrace, on_progress: Progress | None = None) -> TraceAnalysis:
    """Measure one trace. What needs a column that it lacks is None, and named in `missing`."""
    missing = [f"{_NEEDED_BY[name]} (no {name} recorded)" for name in _NEEDED_BY if not trace.has(name)]
    domains = measure_domains(trace, on_progress) if trace.has("domain") else None
    if domains == ():
        missing.append("domain specialization (one text; record several with `--data NAME=FILE`)")
    vocabulary = None
    if trace.has("token"):
        vocabulary = measure_vocabulary(trace, "input", on_progress), measure_vocabulary(trace, "next", on_progress)
    return TraceAnalysis(
        trace=trace,
        load=measure_load(trace, on_progress),
        domains=domains or None,
        vocabulary=vocabulary,
        coactivation=measure_coactivation(trace, on_progress),
        predictability=measure_predictability(trace, on_progress),
        windows=measure_windows(trace, on_progress),
        missing=tuple(missing),
    )


def _plain(value: Any) -> Any:
    """Return numbers as Python's, with 6 decimals, and arrays as lists."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, np.ndarray):
        return _rounded(value).tolist()
    return round(value, 6) if isinstance(value, float) else value


def _rounded(values: NDArray[Any]) -> NDArray[Any]:
    return values.round(6) if values.dtype.kind == "f" else values


def _pair(pair: Pair | None) -> dict[str, Any] | None:
    found: dict[str, Any] | None = None if pair is None else _plain(vars(pair))
    return found
