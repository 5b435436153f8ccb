"""The page of `moezoo plan`: memory and communication of a training step, by formula and in XLA's program."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from moezoo.core.cost.make_plan import CompiledComparison, Plan
from moezoo.core.cost.step_bound import StepBound
from moezoo.core.cost.step_plan import DevicePlan
from moezoo.core.distributed.mesh import MeshAxis
from moezoo.core.errors import counted
from moezoo.core.reports.text import bytes_text, count, new_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_MEMORY_LABELS = {
    "moments": "optimizer state",
    "state": "router state",
    "gathered": "gathered parameters",
    "exchange": "expert exchange buffers",
}


def plan_page(plan: Plan, where: str) -> "RenderableType":
    """Return the page of a plan, with title `where`."""
    from rich.console import Group
    from rich.text import Text

    devices, sequences, micro_batches = plan.devices, plan.sequences, plan.micro_batches
    title = Text.assemble(
        (where, "bold"),
        f"\non {_mesh_text(plan.lengths)}: {counted(devices, 'device')}\n"
        f"per device and step: {counted(micro_batches, 'micro-batch')} of "
        f"{counted(sequences, 'sequence')} of {counted(plan.sequence_length, 'token')}, {count(plan.flops, 'FLOPs')}\n"
        f"per token: {count(plan.flops_per_token, 'FLOPs')}, forward and backward",
    )
    pieces: list[RenderableType] = [title, _memory_table(plan)]
    if plan.device.collectives:
        pieces.append(_collective_table(plan.device, plan.lengths))
    if plan.bound is not None:
        tokens = plan.config.training.batch_size * plan.sequence_length
        pieces += [_bound_table(plan.bound), Text(_bound_basis(plan.bound, tokens), "yellow")]
    pieces.append(Text(_basis(plan), "yellow" if plan.extrapolated else "dim"))
    if plan.compiled is not None:
        pieces.append(_compiled_table(plan.compiled))
    if plan.chip is not None:
        arguments, temporary = bytes_text(plan.chip.arguments), bytes_text(plan.chip.temporary)
        pieces.append(
            Text(f"one chip of {plan.topology}, from the TPU compiler: {arguments} arguments, {temporary} temporary")
        )
    return Group(*pieces)


def _basis(plan: Plan) -> str:
    if plan.compiled is None:
        return "all by formula; nothing was compiled"
    basis = f"by formula, compared with XLA's program for {plan.compiled.devices} simulated devices"
    return f"extrapolated {basis}" if plan.extrapolated else basis


def _memory_table(plan: Plan) -> "Table":
    table = new_table("memory per device", "", "share", right=(1, 2))
    memory = plan.device.memory
    rows = [(_MEMORY_LABELS.get(kind, kind), size) for kind, size in asdict(memory).items() if size]
    for place, (label, size) in enumerate(rows):
        table.add_row(label, bytes_text(size), f"{size / memory.total:.1%}", end_section=place + 1 == len(rows))
    table.add_row("total", bytes_text(memory.total), "", style="bold")
    if plan.memory_limit is not None:
        verdict, style = ("fits", "green") if plan.fits else ("does not fit", "red")
        table.add_row(f"{verdict} in {bytes_text(plan.memory_limit)}", "", "", style=style)
    return table


def _collective_table(device: DevicePlan, lengths: Mapping[MeshAxis, int]) -> "Table":
    table = new_table(
        "communication per step", "collective", "along", "arrays", "payload", "sent per device", right=(3, 4, 5)
    )
    for own in device.collectives:
        along, sizes = _axes_text(own.axes, lengths), (bytes_text(own.payload), bytes_text(own.sent))
        table.add_row(own.purpose, own.kind, along, f"{own.count:,}", *sizes)
    table.add_section()
    table.add_row("total", "", "", "", "", bytes_text(device.sent), style="bold")
    return table


def _bound_table(bound: StepBound) -> "Table":
    table = new_table(f"least time of a step, {bound.on.name}", "", "at most", "at least", right=(1, 2, 3))
    link = "not known" if bound.on.link is None else f"{count(bound.on.link, 'B')}/s"
    rows = {
        "compute": (count(bound.flops, "FLOPs"), f"{count(bound.flops_per_second, 'FLOP')}/s"),
        "memory": (bytes_text(bound.memory_bytes), f"{count(bound.on.bandwidth, 'B')}/s"),
        "communication": (bytes_text(bound.sent_bytes), link),
    }
    for name, seconds in bound.seconds_by_limit.items():
        if seconds != 0:
            label = f"{name}, {bound.dtype}" if name == "compute" else name
            table.add_row(label, *rows[name], "" if seconds is None else _time(seconds))
    table.add_section()
    table.add_row("the largest", "", "", _time(bound.seconds), style="bold")
    return table


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _bound_basis(bound: StepBound, tokens: int) -> str:
    unknown = "; communication has no figure" if bound.seconds_by_limit["communication"] is None else ""
    return (
        f"at most {count(tokens / bound.seconds)} tokens/s on all devices: a bound, not a measurement, from "
        f"{bound.on.source}, with perfect overlap{unknown}. It counts products, parameters, gradients and optimizer "
        "state, but no activations: every real step is slower."
    )


def _compiled_table(compiled: CompiledComparison) -> "Table":
    depth = compiled.num_layers
    what = f"{counted(depth, 'layer')} compiled"
    if compiled.layers != (depth,):
        what = f"{', '.join(map(str, compiled.layers))} layers compiled, {depth} extrapolated"
    table = new_table(
        f"XLA's program on {_mesh_text(compiled.lengths)}", "arrays", "formula", "bytes", "formula", right=range(1, 5)
    )
    for own in compiled.collectives:
        table.add_row(
            f"{own.kind} along {_axes_text(own.axes, compiled.lengths)}",
            f"{own.program_arrays:,}",
            f"{own.formula_arrays:,}",
            f"{own.program_bytes:,}",
            f"{own.formula_bytes:,}",
        )
    arguments = f"{compiled.program_arguments:,}", f"{compiled.formula_arguments:,}"
    table.add_row("parameters, moments, state; program: and batch", "", "", *arguments)
    if compiled.temporary is not None:
        table.add_row("temporary arrays on the CPU", "", "", f"{compiled.temporary:,}", "")
    table.caption = f"{what}; collectives on the CPU send float32"
    table.caption_justify = "left"
    return table


def _axes_text(axes: Sequence[MeshAxis], lengths: Mapping[MeshAxis, int]) -> str:
    return ", ".join(f"{axis} {lengths[axis]}" for axis in axes)


def _mesh_text(lengths: Mapping[MeshAxis, int]) -> str:
    return _axes_text([axis for axis, size in lengths.items() if size > 1], lengths) or "one device"
