"""Print the plan of a step and XLA's program of it on simulated devices, as JSON. Run by the tests.

python planned.py JOB...     a line of JSON for each; a JOB is JSON too: [what, config, mesh, overrides of the config]

    what    formula     the plan beside the program
            programs    what is derived from a few layers, of all layers, and without any fast
            chips       memory by the way that is for chips which are not there
"""

import json
import sys

import jax

from moezoo.core.config.run_config import load_config
from moezoo.core.cost.step_plan import device_plan
from moezoo.core.distributed.mesh import MeshConfig, planned_sizes
from moezoo.jax_backend.planning import ahead_of_time


def config_of(path: str, mesh: dict, overrides: list[str]):
    return load_config(path, overrides).model_copy(update={"mesh": MeshConfig(**mesh)})


def together(collectives) -> dict[str, list[int]]:
    """Return the number and the bytes of arrays by kind and axes."""
    found: dict[str, list[int]] = {}
    for own in collectives:
        total = found.setdefault(f"{own.kind} {','.join(own.axes)}", [0, 0])
        total[0] += own.count
        total[1] += own.payload
    return found


def formula(*case) -> dict:
    config = config_of(*case)
    plan = device_plan(config, planned_sizes(config.mesh, None), float_bytes=4)
    step = ahead_of_time.compiled_step(config)
    known = [own for own in plan.collectives if own.purpose != "losses and expert loads"]
    return {
        "formula": together(known),
        "program": together(step.collectives),
        "memory": plan.memory.to_json(),
        "arguments": step.arguments,
    }


def programs(*case) -> dict:
    config = config_of(*case)
    derived = ahead_of_time.compiled_step(config)
    whole = ahead_of_time._compiled(config)
    fast = dict(ahead_of_time._FAST_COMPILE)
    ahead_of_time._FAST_COMPILE.clear()
    slow = ahead_of_time._compiled(config)
    ahead_of_time._FAST_COMPILE.update(fast)
    return {
        name: {"layers": step.layers, "arguments": step.arguments, "collectives": together(step.collectives)}
        for name, step in {"derived": derived, "whole": whole, "slow": slow}.items()
    }


def chips(*case) -> dict:
    config = config_of(*case)
    step = ahead_of_time._compiled(config)
    return {"simulated": step.arguments, **ahead_of_time.memory_on_chips(config, jax.devices()).to_json()}


if __name__ == "__main__":
    whats = {function.__name__: function for function in (formula, chips, programs)}
    for job in sys.argv[1:]:
        what, *case = json.loads(job)
        print(json.dumps(whats[what](*case)))
