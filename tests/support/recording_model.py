"""A backend without arithmetic, for tests of the training loop and of run folders."""

import numpy as np

from moezoo.core.backend import Scores, StepMetrics
from moezoo.core.distributed.processes import Numbers, Processes
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import ModelSpec


class RecordingModel:
    """A backend and its model in one, which does not train and records the keys of each step."""

    name = "recording"

    def __init__(self) -> None:
        self.keys: list[np.ndarray] = []

    processes = Processes()

    def build(self, spec: ModelSpec, weights: dict[str, np.ndarray]) -> "RecordingModel":
        self.spec, self.weights = spec, weights
        return self

    def gather(self, number: int) -> Numbers:
        return Numbers((number,))

    def own_sequences(self, batch: int) -> np.ndarray:
        return np.arange(batch)

    def start_training(self, *arguments: object, **options: object) -> None:
        """Ignored."""

    def train_step(
        self,
        windows: np.ndarray,
        learning_rate: float,
        keys: np.ndarray,
        targets: np.ndarray,
        documents: np.ndarray | None = None,
    ) -> "RecordingModel":
        self.keys.append(keys)
        return self

    def fetch(self) -> StepMetrics:
        terms = ("loss", "cross_entropy", "switch_balance", "switch_balance_weighted", "router_z", "router_z_weighted")
        return StepMetrics(dict.fromkeys(terms, 1.0), 1.0, [np.ones(5, np.int64)] * 2, [0, 0])

    def score(self, tokens: np.ndarray, targets: np.ndarray, **options: object) -> Scores:
        return Scores(np.zeros(tokens.shape, np.float32), [np.ones(5, np.int64)] * 2, [0, 0])

    def nonfinite_parameters(self) -> list[str]:
        return []

    def checkpoint_writer(self, names: object = None) -> None:
        return None

    def export_parameters(self, names: object = None) -> dict[str, np.ndarray]:
        return dict(self.weights)

    def export_optimizer(self) -> dict[str, np.ndarray]:
        names = [row.name for row in parameter_table(self.spec) if row.trained]
        moments = ("first_moment", "second_moment")
        return {f"{moment}.{name}": self.weights[name] for moment in moments for name in names}
