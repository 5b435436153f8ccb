"""A run folder made without training: config, metrics of a good run, and a checkpoint, for tests that spoil them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moezoo.core.checkpoint.store import save_checkpoint
from moezoo.core.config.run_config import Config, parse_config
from moezoo.core.config.update_rules import state_shapes
from moezoo.core.data.tokenizers import CharacterTokenizer
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.parameters.trained import trained_rows

STEPS, RECORDS, EXPERTS, TOP_K = 400, 40, 8, 2
CHARACTERS = "abcdefghijklmnopqrstuvwxyz ."


@dataclass
class MadeRun:
    """Contents of a run folder, to be changed before they are written.

    Fields:
        config, text: the run's config, and its file.
        lines: training records.
        weights: of the newest checkpoint.
        earlier: of one before it; None: there is none.
        optimizer: state of the newest checkpoint.
    """

    config: Config
    text: str
    lines: list[dict[str, Any]]
    weights: dict[str, np.ndarray]
    earlier: dict[str, np.ndarray] | None
    optimizer: dict[str, np.ndarray] = field(default_factory=dict)

    def layer(self, index: int = 0) -> list[dict[str, Any]]:
        """Return the routing of an MoE layer in each record."""
        return [next(row for row in line["routing"] if row["layer"] == index) for line in self.lines]

    def write(self, folder: Path) -> Path:
        """Write the run folder and return it."""
        folder.mkdir()
        (folder / "config.yaml").write_text(self.text)
        CharacterTokenizer(CHARACTERS).save(folder)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        for step, weights in ((STEPS // 2, self.earlier), (STEPS, self.weights)):
            if weights is not None:
                save_checkpoint(folder / "checkpoints", step, weights, self.optimizer, self.text, None)
        return folder


def made_run(
    change: Callable[[dict[str, Any]], None] | None = None, *, router: dict[str, Any] | None = None, **training: Any
) -> MadeRun:
    """Return a healthy run of two MoE layers; `change` edits its config as plain data, `router` its routers."""
    moe = {
        "num_experts": EXPERTS,
        "router": {"top_k": TOP_K, **(router or {})},
        "experts": {"hidden_dim": 12},
        "losses": [{"kind": "switch_balance", "coefficient": 0.01}],
    }
    attention = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "qk_norm": {}}
    raw: dict[str, Any] = {
        "model": {
            "vocab_size": len(CHARACTERS),
            "embed_dim": 8,
            "layers": [{"repeat": 2, "attention": attention, "moe": moe}],
        },
        "data": {"sources": [{"kind": "text", "path": "text.txt"}]},
        "training": {"steps": STEPS, "batch_size": 8, "sequence_length": 32, **training},
        "optimizer": {"learning_rate": 1e-3, "schedule": {"kind": "constant"}},
    }
    if change is not None:
        change(raw)
    text = yaml.safe_dump(raw)
    config = parse_config(text, "made_run")
    generator = np.random.default_rng(0)
    start = initial_weights(config.model, 0)
    rows = trained_rows(config.model, config.training.only)
    names = {row.name for row in rows}
    noise = {name: generator.normal(0, 0.02, value.shape).astype(np.float32) for name, value in start.items()}
    weights = {name: value + noise[name] if name in names else value for name, value in start.items()}
    shapes = state_shapes(config.optimizer, rows)
    optimizer = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return MadeRun(config, text, _lines(config, generator), weights, None, optimizer)


def _lines(config: Config, generator: np.random.Generator) -> list[dict[str, Any]]:
    lines = []
    for number in range(1, RECORDS + 1):
        loss = 1.5 + 2 * np.exp(-number / 10) + 0.02 * generator.normal()
        line: dict[str, Any] = {"step": number * STEPS // RECORDS, "tokens": number, "cross_entropy": loss}
        line |= {"loss": loss + 0.01, "switch_balance": 1.02, "switch_balance_weighted": 0.0102, "gradient_norm": 0.4}
        line |= {"learning_rate": 1e-3, "tokens_per_second": None, "routing": []}
        for index, moe in config.model.moes:
            share = generator.dirichlet(np.full(moe.num_choices, 200.0))
            row: dict[str, Any] = {"layer": index, "load": share.round(6).tolist(), "dropped": 0.0, "losses": {}}
            row["worst_load"] = round(float(share.max() * moe.num_choices), 4)
            if moe.router.selection_bias is not None:
                row["selection_bias"] = (0.001 * generator.integers(-9, 9, moe.num_choices)).round(6).tolist()
            line["routing"].append(row)
        lines.append(line)
    return lines
