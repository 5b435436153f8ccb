"""On JAX a checkpoint is loaded directly into its shards: no device holds more than its shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CHECKPOINT = Path(__file__).parents[1] / "data" / "huggingface" / "train_mixtral"

SCRIPT = """
import json, sys
import jax, numpy as np
import moezoo
from moezoo.core.distributed.mesh import MeshConfig
from moezoo.jax_backend.backend import JaxBackend

model = moezoo.load(sys.argv[1], backend=JaxBackend(MeshConfig(expert=8)))
whole = moezoo.load(sys.argv[1], backend="jax")
tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
experts = model.model._parameters["layers.1.moe.experts.w_gate"]
print(json.dumps({
    "devices": len(experts.sharding.device_set),
    "shard": list(experts.addressable_shards[3].data.shape),
    "whole": list(experts.shape),
    "difference": float(np.abs(model.forward(tokens).logits - whole.forward(tokens).logits).max()),
    "greedy": bool((model.generate(tokens, max_new_tokens=4) == whole.generate(tokens, max_new_tokens=4)).all()),
}))
"""


def test_experts_load_into_their_shards() -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(CHECKPOINT)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.pop("difference") < 1e-5
    assert found == {"devices": 8, "shard": [1, 64, 24], "whole": [8, 64, 24], "greedy": True}
