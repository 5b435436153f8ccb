"""One of several MLX processes: loss terms and gradients of its part of a batch. See test_data_parallel."""

import sys
from pathlib import Path

import numpy as np

from moezoo.backends import load_backend
from moezoo.core.backend import IGNORED
from moezoo.core.config import load_config, with_vocab_size
from moezoo.core.initialize import initial_weights
from moezoo.core.random import micro_batch_keys

V, B, T = 31, 4, 9
KEY = micro_batch_keys(3, 0, 1)[0]


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets [B, T], where the first half of the sequences has fewer targets that count."""
    rows = np.random.default_rng(2).integers(0, V, (B, T + 1)).astype(np.int32)
    targets = rows[:, 1:].copy()
    targets[0, 2:], targets[3, 0] = IGNORED, IGNORED
    return rows[:, :-1], targets


def numbers(config: Path) -> dict[str, np.ndarray]:
    """Loss terms, gradients and scores of this process's part; of all, where it is alone."""
    backend = load_backend("mlx")
    spec = with_vocab_size(load_config(config, ["model.vocab_size=null"]), V).model
    model = backend.build(spec, initial_weights(spec, 0))
    tokens, targets = batch()
    own = model.own_sequences(B)
    terms, gradients = model.loss_and_gradients(tokens[own], targets[own], key=KEY)
    told = model.forward(tokens[own], targets[own], key=KEY).losses
    scores = model.score(tokens, targets)
    found = {f"term {name}": np.array(value) for name, value in terms.items()}
    found |= {f"told {name}": np.array(value) for name, value in told.items()}
    found |= {f"gradient {name}": value for name, value in gradients.items()}
    return found | {"score": scores.token_losses, "load": np.array(scores.load)}


if __name__ == "__main__":
    out, *configs = (Path(word) for word in sys.argv[1:])
    place = load_backend("mlx").processes.index
    for path in configs:
        np.savez(out / f"{path.stem}_{place}.npz", **numbers(path))
