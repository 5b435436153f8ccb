"""Parameter table rows of low-rank adapters: two factors after each adapted matrix."""

import math
from collections.abc import Iterable, Iterator

from moezoo.core.errors import SpecError
from moezoo.core.parameters.row import ZEROS, Initializer, MatrixAxes, Parameter, Role
from moezoo.core.spec import AdapterRole, AdapterSpec, ModelSpec

_ROLES: dict[Role, AdapterRole] = {
    "attention": "attention",
    "routed experts": "experts",
    "shared experts": "shared",
    "feed-forward": "dense",
    "router": "router",
}
_OUTSIDE_LAYERS: dict[str, AdapterRole] = {"embedding.weight": "embedding", "head.w_head": "head"}
_LEFT_OUT = ("w_shared_gate", "w_mix", "w_residual")  # one or two outputs; from one router's logits to the next


def with_factors(spec: ModelSpec, rows: Iterable[Parameter]) -> Iterator[Parameter]:
    """Yield the rows, and after each adapted matrix those of its factors.

    A matrix NAME [*stack, *in, *out] has `NAME.lora_a` [*stack, *in, rank] and `NAME.lora_b` [*stack, rank, *out]. The
    first is uniform within 1 / sqrt(fan-in), as in PEFT and mlx-lm, the second zero.

    Raises SpecError: the rank is above that of a matrix, the smaller number of its inputs and outputs.
    """
    adapter = spec.adapter
    for row in rows:
        yield row
        if adapter is not None and _adapter_role(adapter, row) in spec.adapted_roles:
            yield from _factors(adapter, row)


def _adapter_role(adapter: AdapterSpec, row: Parameter) -> AdapterRole | None:
    """Return the role under which a config adapts this row; None if nothing adapts it."""
    part, index, *_ = row.name.split(".")
    if row.matrix is None or row.name.endswith(_LEFT_OUT):
        return None
    if part != "layers":
        return _OUTSIDE_LAYERS.get(row.name)
    return _ROLES.get(row.role) if adapter.has_layer(int(index)) else None


def _factors(adapter: AdapterSpec, row: Parameter) -> Iterator[Parameter]:
    assert row.matrix is not None
    stack, fan_in, fan_out = row.matrix.split(row.shape)
    stack_axes, in_axes, out_axes = row.matrix.split(row.axes)
    inputs, most = math.prod(fan_in), min(math.prod(fan_in), math.prod(fan_out))
    if adapter.rank > most:
        raise SpecError(
            f"model.adapter.rank is {adapter.rank}, but {row.name} {list(row.shape)} has rank {most} at most. Use "
            f"rank <= {most}, or leave {_adapter_role(adapter, row)} out of adapter.on."
        )
    for factor, shape, axes, initializer, inner in (
        ("lora_a", (*fan_in, adapter.rank), (*in_axes, "rank"), _uniform(inputs), len(fan_in)),
        ("lora_b", (adapter.rank, *fan_out), ("rank", *out_axes), ZEROS, 1),
    ):
        yield Parameter(
            f"{row.name}.{factor}",
            (*stack, *shape),
            (*stack_axes, *axes),
            initializer,
            row.decay,
            row.role,
            matrix=MatrixAxes(len(stack), inner),
            base=row.name,
        )


def _uniform(inputs: int) -> Initializer:
    return Initializer("uniform", value=1 / math.sqrt(inputs))
