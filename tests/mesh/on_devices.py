"""Trains tiny models on 8 simulated devices and on one, and prints as JSON how far apart they are. Run by the tests.

python on_devices.py equal CONFIG MESH...    MESH as JSON, e.g. {"data": 8}
python on_devices.py collectives MESH
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from moezoo.core.config import parse_config
from moezoo.core.initialize import initial_weights
from moezoo.core.mesh import MeshConfig
from moezoo.jax_backend.steps import JaxBackend

VOCAB, STEPS = 64, 3


def config_of(path: Path):
    """With 8 experts, so that any mesh of 8 devices may cut them."""
    config = parse_config(re.sub(r"num_experts: [0-9]+", "num_experts: 8", path.read_text(encoding="utf-8")), str(path))
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": VOCAB})})


def trained(config, mesh, windows, key, rematerialize="none"):
    model = JaxBackend(mesh).build(config.model, initial_weights(config.model, 0))
    losses, gradients = model.loss_and_gradients(windows[0, :, :-1], windows[0, :, 1:], key=key)
    model.start_training(config.optimizer, rematerialize=rematerialize)
    keys = np.stack([key, key + 1])
    steps = [model.train_step(windows, 1e-3, keys).fetch() for _ in range(STEPS)]
    ways = {False, config.model.inference_differs}
    scores = [model.score(windows[0, :, :-1], windows[0, :, 1:], inference=way).token_losses for way in sorted(ways)]
    return losses, gradients, steps, scores, model


def apart(one, other) -> float:
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.max(np.abs(one - other)) / max(np.max(np.abs(one)), 1e-12))


def equal(path: Path, meshes: list[dict]) -> dict:
    config = config_of(path)
    windows = np.random.default_rng(0).integers(0, VOCAB, (2, 8, 17)).astype(np.int32)
    key = np.array([1, 2], np.uint32)
    losses, gradients, steps, scores, alone = trained(config, MeshConfig(), windows, key)
    found = {}
    for given in meshes:
        mesh = {name: value for name, value in given.items() if name != "rematerialize"}
        mine = trained(config, MeshConfig(**mesh), windows, key, given.get("rematerialize", "none"))
        assert sorted(mine[0]) == sorted(losses)
        assert sorted(mine[1]) == sorted(gradients)
        exported = mine[4].export_parameters()
        found[json.dumps(given)] = {
            "losses": max(apart(losses[name], mine[0][name]) for name in losses),
            "gradients": max(apart(gradients[name], mine[1][name]) for name in gradients),
            "steps": max(
                apart(step.losses[name], own.losses[name])
                for step, own in zip(steps, mine[2], strict=True)
                for name in step.losses
            ),
            "loads": all(
                np.array_equal(step.load, own.load) and step.dropped == own.dropped
                for step, own in zip(steps, mine[2], strict=True)
            ),
            "scores": apart(scores, mine[3]),
            "state": max(
                [apart(steps[-1].state[name], mine[2][-1].state[name]) for name in steps[-1].state], default=0.0
            ),
            "parameters": max(apart(value, exported[name]) for name, value in alone.export_parameters().items()),
        }
    return found


def collectives(path: Path, mesh: dict) -> dict:
    """How often the compiled step has each collective, by the shape of what it moves."""
    config = config_of(path)
    model = JaxBackend(MeshConfig(**mesh)).build(config.model, initial_weights(config.model, 0))
    model.start_training(config.optimizer)
    windows = model._placement.of_all_processes(np.zeros((1, 8, 17), np.int32))
    with model._placement.active(8):
        given = (model._parameters, model._state, model._moments, windows, np.float32(1e-3), None)
        text = model._step.lower(*given).compile().as_text()
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    found: Counter[str] = Counter()
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})\(", text):
        each = set(re.findall(r"[a-z]+[0-9]+\[[0-9,]*\]", shapes))
        for shape in each if kind == "all-to-all" else re.findall(r"[a-z]+[0-9]+\[[0-9,]*\]", shapes):
            found[f"{kind} {shape}"] += 1
    return dict(found)


if __name__ == "__main__":
    what, config, *given = sys.argv[1:]
    meshes = [json.loads(mesh) for mesh in given]
    print(json.dumps(equal(Path(config), meshes) if what == "equal" else collectives(Path(config), meshes[0])))
