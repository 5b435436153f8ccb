"""Program of one MLX process: loss terms and gradients of its shard of a batch. See test_data_parallel."""

import sys
from pathlib import Path

import numpy as np

from moezoo.backends import load_backend
from moezoo.core.backend import Model
from moezoo.core.config.run_config import load_config
from moezoo.core.config.training import Rematerialize
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.random import micro_batch_keys
from moezoo.core.tokens import IGNORED, PADDING, ExpertMasks

V, B, T = 31, 4, 9
PACKED = ("sequence_balance", "global_balance", "capacity_groups", "sparse_attention")
KEY = micro_batch_keys(3, 0, 1)[0]


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and targets [B, T]; the first half of the sequences has more masked targets."""
    rows = np.random.default_rng(2).integers(0, V, (B, T + 1)).astype(np.int32)
    targets = rows[:, 1:].copy()
    targets[0, 2:], targets[3, 0] = IGNORED, IGNORED
    return rows[:, :-1], targets


def documents() -> np.ndarray:
    """Return documents [B, T], of which the shards have different numbers, and padding."""
    lengths = ([4, 3], [1, 8], [9], [2, 2, 3])
    ids = np.full((B, T), PADDING, np.int32)
    for row, own in zip(ids, lengths, strict=True):
        row[: sum(own)] = np.repeat(np.arange(len(own)), own)
    return ids


def numbers(config: Path) -> dict[str, np.ndarray]:
    """Return loss terms, gradients and scores of this process's shard; of the whole batch with one process."""
    backend = load_backend("mlx")
    spec = with_vocab_size(load_config(config, ["model.vocab_size=null"]), V).model
    model = backend.build(spec, initial_weights(spec, 0))
    tokens, targets = batch()
    own = model.own_sequences(B)
    terms, gradients = model.loss_and_gradients(tokens[own], targets[own], key=KEY)
    forward = model.forward(tokens[own], targets[own], key=KEY).losses
    scores = model.score(tokens, targets)
    masks = [ExpertMasks(np.arange(B)[:, None] == np.arange(moe.num_choices)) for _, moe in spec.moes]
    masked = model.score(tokens, targets, masks=masks).token_losses
    step: dict[str, np.ndarray] = {}
    if config.stem in PACKED:
        step = packed(model)
    if config.stem == "sparse_attention":
        step |= stepped(model, config, "block")  # its indexer's loss is summed over the processes inside of a block
    if config.stem == "expert_balance":
        step = stepped(model, config)
    found = {f"term {name}": np.array(value) for name, value in terms.items()}
    found |= {f"forward {name}": np.array(value) for name, value in forward.items()}
    found |= {f"gradient {name}": value for name, value in gradients.items()}
    return (
        found
        | step
        | {"score": scores.token_losses, "masked score": masked}
        | {"load": np.array(scores.load), "dropped": np.array(scores.dropped)}
    )


def packed(model: Model) -> dict[str, np.ndarray]:
    """Return loss terms and gradients of this process's shard of packed documents."""
    (tokens, targets), ids, own = batch(), documents(), model.own_sequences(B)
    targets = np.where(ids == PADDING, IGNORED, targets)
    terms, gradients = model.loss_and_gradients(tokens[own], targets[own], documents=ids[own])
    found = {f"term of documents {name}": np.array(value) for name, value in terms.items()}
    return found | {f"gradient of documents {name}": value for name, value in gradients.items()}


def stepped(model: Model, config: Path, rematerialize: Rematerialize = "none") -> dict[str, np.ndarray]:
    """Return what a step on this process's share of two micro-batches measured, one of which has no targets here."""
    model.start_training(load_config(config, []).optimizer, rematerialize=rematerialize)
    tokens, targets = batch()
    own = model.own_sequences(B)
    many = np.stack([targets, np.where(np.arange(B)[:, None] < B // 2, IGNORED, targets)])
    windows = np.repeat(np.pad(tokens, ((0, 0), (0, 1)))[None], 2, axis=0)
    metrics = model.train_step(windows[:, own], 1e-3, np.stack([KEY, KEY + 1]), many[:, own]).fetch()
    found = {f"term of a step {name}": np.array(value) for name, value in metrics.losses.items()}
    return found | {"gradient norm of a step": np.array(metrics.gradient_norm)}


def mismatched(rank: int, seed: int) -> bool:
    """Return True if all-reduces were paired wrongly, in a random graph with extra operations that differ by process.

    An expert without rows causes such a difference: it has no product. MLX would then order collectives differently.
    """
    import mlx.core as mx

    from moezoo.mlx_backend.distributed.data_parallel import total

    common, own = np.random.default_rng(seed), np.random.default_rng([seed, rank])
    nodes = [mx.array([float(index)]) for index in range(3)]
    sums: list[mx.array] = []
    for _ in range(12):
        x = nodes[common.integers(len(nodes))] * 0
        x = mx.concatenate([x + 0 for _ in range(own.integers(1, 25))])[:1]
        for _ in range(own.integers(0, 30)):
            x = x + 0
        if common.random() < 0.5:
            x = total(x + 10.0 ** len(sums))
            sums.append(x)
        nodes.append(x)
    mx.eval(mx.stack([*(sums[index] for index in common.permutation(len(sums))), *nodes[-2:]]))
    return [value.item() for value in sums] != [2 * 10.0**index for index in range(len(sums))]


if __name__ == "__main__":
    out, *configs = (Path(word) for word in sys.argv[1:])
    rank = load_backend("mlx").processes.index
    np.savez(out / f"order_{rank}.npz", mismatched=sum(mismatched(rank, seed) for seed in range(60)))
    for path in configs:
        np.savez(out / f"{path.stem}_{rank}.npz", **numbers(path))
