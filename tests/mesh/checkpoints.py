"""Write and read sharded checkpoints on the devices of this process. Run by the tests.

python checkpoints.py write BACKEND MESH RUN CONFIG    three steps, a save, three more steps; and what was to be saved
python checkpoints.py read BACKEND MESH RUN CONFIG     the newest checkpoint on this mesh, and three steps from there
"""

import json
import sys
from pathlib import Path

import numpy as np

from moezoo.backends import load_backend
from moezoo.core.checkpoint.manifest import ARRAYS
from moezoo.core.checkpoint.store import begin_checkpoint, complete_checkpoint, load_latest_checkpoint, save_checkpoint
from moezoo.core.config.run_config import dump_config
from moezoo.core.distributed.mesh import MeshConfig
from moezoo.core.parameters.initialize import initial_weights
from tests.mesh.on_devices import VOCAB, config_of


def windows(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, VOCAB, (1, 8, 17)).astype(np.int32)


def step_of(model, step: int) -> float:
    return model.train_step(windows(step), 1e-2).fetch().losses["loss"]


def write(config, model, run: Path) -> None:
    model.start_training(config.optimizer)
    for step in range(3):
        step_of(model, step)
    np.savez(run / "weights.npz", **model.export_parameters())
    np.savez(run / "moments.npz", **model.export_optimizer())
    writer, rest = model.checkpoint_writer(), (dump_config(config), None)
    if writer is None:
        save_checkpoint(run / "checkpoints", 3, model.export_parameters(), model.export_optimizer(), *rest)
    else:
        partial = begin_checkpoint(run / "checkpoints", 3)
        files = writer(partial / ARRAYS)
    losses = [step_of(model, step) for step in range(3, 6)]  # what is being saved is donated to these
    if writer is not None:
        files.finish()
        complete_checkpoint(partial, 3, *rest)
    (run / "losses.json").write_text(json.dumps(losses), encoding="utf-8")


def read(config, backend, run: Path) -> None:
    checkpoint, _, _ = load_latest_checkpoint(run / "checkpoints")
    model = backend.build(config.model, checkpoint.weights)
    model.start_training(config.optimizer, checkpoint.optimizer, checkpoint.step)
    for name, exported in (("weights", model.export_parameters()), ("moments", model.export_optimizer())):
        with np.load(run / f"{name}.npz") as expected:
            assert sorted(expected) == sorted(exported)
            for key in expected:
                np.testing.assert_array_equal(exported[key], expected[key])
    print(json.dumps([step_of(model, step) for step in range(3, 6)]))


if __name__ == "__main__":
    what, name, mesh, folder, path = sys.argv[1:]
    config = config_of(Path(path))
    backend = load_backend(name, MeshConfig(**json.loads(mesh)))
    if what == "write":
        write(config, backend.build(config.model, initial_weights(config.model, 0)), Path(folder))
    else:
        read(config, backend, Path(folder))
