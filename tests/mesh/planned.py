"""The plan of a step and what XLA makes of it, on simulated devices, as JSON. Run by the tests.

python planned.py CASE...     CASE as JSON: [config, mesh, overrides of the config]
"""

import json
import math
import sys

from moezoo.core.config import load_config
from moezoo.core.describe_mesh import known_sizes
from moezoo.core.mesh import MeshConfig
from moezoo.core.plan import device_plan
from moezoo.jax_backend.ahead_of_time import compiled_step, simulate_devices


def planned(path: str, mesh: dict, overrides: list[str]) -> dict:
    """Of formula and program, by kind and axes: how many arrays, and their bytes."""
    config = load_config(path, overrides).model_copy(update={"mesh": MeshConfig(**mesh)})
    plan = device_plan(config, known_sizes(config.mesh, None), float_bytes=4)
    step = compiled_step(config)
    formula: dict[str, list[int]] = {}
    for own in plan.collectives:
        total = formula.setdefault(f"{own.kind} {','.join(own.axes)}", [0, 0])
        total[0] += own.count
        total[1] += own.payload
    return {
        "formula": formula,
        "program": {f"{own.kind} {','.join(own.axes)}": [own.count, own.payload] for own in step.collectives},
        "memory": dict(plan.memory),
        "arguments": step.arguments,
        "layers": step.layers,
    }


if __name__ == "__main__":
    cases = [json.loads(word) for word in sys.argv[1:]]
    simulate_devices(math.prod(size for size in cases[0][1].values() if isinstance(size, int)))
    print(json.dumps([planned(*case) for case in cases]))
