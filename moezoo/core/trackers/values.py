"""Records of metrics.jsonl as numbers with flat names."""

import math
from collections.abc import Iterator

from moezoo.core.training.evaluation import ValidationRecord
from moezoo.core.training.metrics import RoutingStatistics, StepRecord


def step_values(record: StepRecord) -> dict[str, float]:
    """Return the numbers of a training record that are finite.

    Names: `loss/total`, `loss/cross_entropy`, `loss/<term>`, `loss/<term>_weighted`; `train/tokens`, `gradient_norm`,
    `learning_rate`, `tokens_per_second`; per MoE layer `layers.3/max_vio`, `entropy`, `dropped`, `load/<expert>`,
    `loss/<term>`, `selection_bias/<expert>`, `cutoff/<expert>`.
    """
    values = {f"loss/{'total' if name == 'loss' else name}": value for name, value in record.losses.items()}
    values |= {
        "train/tokens": record.tokens,
        "train/gradient_norm": record.gradient_norm,
        "train/learning_rate": record.learning_rate,
        "train/tokens_per_second": math.nan if record.tokens_per_second is None else record.tokens_per_second,
    }
    for layer in record.routing:
        values |= _layer_values(layer.statistics)
        prefix = f"layers.{layer.statistics.layer}"
        values |= {f"{prefix}/loss/{name}": value for name, value in layer.losses.items()}
        for name, numbers in layer.state.items():
            values |= {f"{prefix}/{name}/{expert}": number for expert, number in enumerate(numbers)}
    return _finite(values)


def validation_values(record: ValidationRecord) -> dict[str, float]:
    """Return the numbers of a validation record that are finite.

    Names: `validation/loss`, `bits_per_byte`, `inference_loss`, `above_optimum` (a share), and per MoE layer as in
    training, `validation/layers.3/...`.
    """
    evaluation = record.evaluation
    values = {
        "loss": evaluation.validation_loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "inference_loss": evaluation.inference_loss,
        "above_optimum": None if evaluation.optimum is None else evaluation.optimum.excess,
    }
    known = {name: value for name, value in values.items() if value is not None}
    for layer in evaluation.routing:
        known |= _layer_values(layer)
    return _finite({f"validation/{name}": value for name, value in known.items()})


def _layer_values(layer: RoutingStatistics) -> dict[str, float]:
    def values() -> Iterator[tuple[str, float]]:
        yield "max_vio", layer.max_vio
        yield "entropy", layer.entropy
        yield "dropped", layer.dropped
        for expert, share in enumerate(layer.load):
            yield f"load/{expert}", share * len(layer.load)

    return {f"layers.{layer.layer}/{name}": value for name, value in values()}


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}
