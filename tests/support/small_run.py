"""A config that trains in a second, on a text that a test writes."""

from pathlib import Path

import yaml

MODEL = {
    "embed_dim": 20,
    "layers": [
        {
            "repeat": 2,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "qk_norm": {}},
            "moe": {
                "num_experts": 5,
                "router": {"top_k": 2},
                "experts": {"hidden_dim": 12},
                "losses": [
                    {"kind": "switch_balance", "coefficient": 0.01},
                    {"kind": "router_z", "coefficient": 0.001},
                ],
            },
        }
    ],
    "initializer": {"kind": "normal", "std": 0.3},
}


def write_config(folder: Path, **training: object) -> Path:
    """A YAML config beside its text; returns the config's path."""
    text = folder / "text.txt"
    text.write_text("".join(f"{n} owls saw {n * n} mice. " for n in range(400)), encoding="utf-8")
    config = {
        "model": MODEL,
        "data": {"sources": [{"kind": "text", "path": str(text)}]},
        "training": {"steps": 8, "batch_size": 3, "sequence_length": 24, "log_every": 1, **training},
        "optimizer": {"learning_rate": 3e-3, "schedule": {"kind": "cosine", "warmup_steps": 2}},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
