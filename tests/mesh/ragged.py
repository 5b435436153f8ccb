"""Run the exchange `ragged` on the CPU with a stand-in for JAX's operation. Run by the tests.

python ragged.py    as JSON: `apart`, losses and gradients of a mesh with it beside those of one device, and
                    `lowered`, how often JAX's own is in the training step that is lowered for a TPU
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moezoo.core.distributed.mesh import MeshConfig
from moezoo.core.parameters.initialize import initial_weights
from moezoo.jax_backend.backend import JaxBackend
from moezoo.jax_backend.runtime.step_batch import step_batch
from tests.mesh.on_devices import VOCAB, apart, config_of, one_device

CONFIG = Path("configs/tiny/top_k.yaml")


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """As documented: `send_sizes[j]` rows from `input_offsets[j]` go to `output_offsets[j]` of device j."""
    me = lax.axis_index(axis_name)
    rows = lax.all_gather(operand, axis_name)
    starts, counts, places = (lax.all_gather(x, axis_name)[:, me] for x in (input_offsets, send_sizes, output_offsets))
    for sender in range(rows.shape[0]):
        row_R = jnp.arange(operand.shape[0])
        place_R = places[sender] + row_R - starts[sender]
        mine_R = (row_R >= starts[sender]) & (row_R < starts[sender] + counts[sender])
        output = output.at[jnp.where(mine_R, place_R, output.shape[0])].set(rows[sender], mode="drop")
    return output


def equal() -> dict[str, float]:
    config = config_of(CONFIG)
    windows = np.random.default_rng(0).integers(0, VOCAB, (8, 17)).astype(np.int32)
    found = []
    for backend in (one_device("mlx"), JaxBackend(MeshConfig(data=2, expert=4, exchange="ragged"))):
        model = backend.build(config.model, initial_weights(config.model, 0))
        found.append(model.loss_and_gradients(windows[:, :-1], windows[:, 1:]))
    (losses, gradients), (also, these) = found
    return {
        "losses": max(apart(losses[name], also[name]) for name in losses),
        "gradients": max(apart(gradients[name], these[name]) for name in gradients),
    }


def lowered() -> dict[str, int]:
    config = config_of(CONFIG)
    model = JaxBackend(MeshConfig(data=2, expert=4, exchange="ragged")).build(
        config.model, initial_weights(config.model, 0)
    )
    model.start_training(config.optimizer)
    batch = jax.tree.map(model._placement.of_all_processes, step_batch(np.zeros((1, 8, 17), np.int32)))
    with model._placement.active(8):
        text = model._step.trace(*model._step_inputs(batch, 1e-3, None)).lower(lowering_platforms=("tpu",)).as_text()
    return {"ragged_all_to_all": text.count("ragged_all_to_all(") + text.count('@ragged_all_to_all"')}


if __name__ == "__main__":
    of_a_tpu = lowered()
    jax.lax.ragged_all_to_all = ragged_all_to_all
    print(json.dumps({"apart": equal(), "lowered": of_a_tpu}))
