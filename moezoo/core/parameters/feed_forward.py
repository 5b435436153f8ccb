"""Parameter table rows of feed-forward layers, dense or stacked by expert."""

from collections.abc import Iterator

from moezoo.core.parameters.row import Parameter, Role, Rows
from moezoo.core.spec import FeedForwardSpec, PlainFeedForwardSpec


def feed_forward_rows(
    rows: Rows,
    name: str,
    spec: FeedForwardSpec,
    role: Role,
    *,
    num_experts: int | None = None,
    latent_dim: int | None = None,
) -> Iterator[Parameter]:
    """Yield the rows of one feed-forward, or of `num_experts` stacked; `latent_dim` if they read another width."""
    d, f = rows.embed_dim if latent_dim is None else latent_dim, spec.hidden_dim
    embed = "embed" if latent_dim is None else "latent"
    lead: tuple[int, ...] = () if num_experts is None else (num_experts,)
    lead_axes = () if num_experts is None else ("expert",)
    for which in ("up",) if isinstance(spec, PlainFeedForwardSpec) else ("gate", "up"):
        yield rows.matrix(f"{name}.w_{which}", (*lead, d, f), (*lead_axes, embed, "hidden"), role, batch=len(lead))
        if spec.bias:
            yield rows.vector(f"{name}.b_{which}", (*lead, f), (*lead_axes, "hidden"), role)
    # In a latent space, the projection after the experts writes into the residual stream.
    make = rows.output if latent_dim is None else rows.matrix
    yield make(f"{name}.w_down", (*lead, f, d), (*lead_axes, "hidden", embed), role, batch=len(lead))
    if spec.bias:
        yield rows.vector(f"{name}.b_down", (*lead, d), (*lead_axes, embed), role)
