"""A plan by formula, beside what XLA makes of the same step where it is asked: what `moezoo plan` does."""

import math
from typing import Any

from moezoo.core.config.run_config import Config
from moezoo.core.cost.step_plan import smaller, with_same_sequences
from moezoo.core.reports.mesh_page import known_sizes
from moezoo.core.reports.plan_page import plan_description


def make_plan(
    config: Config, num_devices: int | None, memory: int | None, *, compiled: bool = True, topology: str | None = None
) -> dict[str, Any]:
    """The plan of a config, whose model has a vocabulary, on its mesh, as `plan_description` has it.

    Args:
        config: with the mesh, of which an axis may be `auto`.
        num_devices: how many there are; None: as many as the mesh says, or as the topology has chips.
        memory: bytes that a device has, if it is asked whether the step fits.
        compiled: compile the step too, for simulated devices: on this mesh, or on a smaller one with the same axes
            where it has more of them than can be simulated in seconds. JAX must not have started with others.
        topology: TPU chips to compile for in place of them; then `chip` says what memory one of them needs.

    Raises SpecError where mesh, rules, model and batch do not fit. Raises BackendError: JAX or libtpu is not installed,
    or JAX has started.
    """
    from moezoo.backends import load_planner

    chips = None if topology is None else load_planner().chips_of(topology)
    lengths = known_sizes(config.mesh, num_devices if chips is None else len(chips))
    mesh = config.mesh.model_copy(update={str(axis): length for axis, length in lengths.items()})
    config = config.model_copy(update={"mesh": mesh})
    known = plan_description(config, lengths, memory)  # refuses what does not fit together, before anything is compiled
    if chips is not None:
        return known | {"chip": {"topology": topology, **load_planner().memory_on_chips(config, chips)}}
    if not compiled:
        return known
    planner = load_planner()
    others = lengths if known["devices"] <= planner.MOST_DEVICES else smaller(lengths)
    planner.simulate_devices(math.prod(others.values()))
    small = with_same_sequences(config, lengths, others)
    return plan_description(config, lengths, memory, (small, others, planner.compiled_step(small)))
