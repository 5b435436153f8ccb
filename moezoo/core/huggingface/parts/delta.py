"""Kimi delta attention shared by several families: its tensor names."""

from moezoo.core.huggingface.tensors import Fused, Tensor, beside

CONVOLVED = (("q", "query", "m h"), ("k", "key", "m h"), ("v", "value", "n z"))


def channel_delta(
    theirs: str,
    ours: str = "layers.{layer}.attention",
    *,
    output: str = "o_proj",
    low_rank: bool = False,
    rates: str = "n",
) -> tuple[Fused, ...]:
    """Return rules for gated delta attention with a decay per channel; `low_rank`: of decays and output gate.

    `rates`: axes of their decay rates.
    """
    found: list[Fused] = []
    for name, which, heads in CONVOLVED:
        found.append(Tensor(f"{theirs}.{name}_proj.weight", f"({heads}) d", f"{ours}.w_{which}", f"d {heads}"))
        found.append(Tensor(f"{theirs}.{name}_conv1d.weight", f"({heads}) 1 w", f"{ours}.conv_{which}", f"w {heads}"))
    for name, which, heads in (("f", "decay", "n h"), ("g", "gate", "n z")):
        if low_rank:
            found.append(Tensor(f"{theirs}.{name}_a_proj.weight", "r d", f"{ours}.w_{which}_down", "d r"))
            found.append(Tensor(f"{theirs}.{name}_b_proj.weight", f"({heads}) r", f"{ours}.w_{which}", f"r {heads}"))
        else:
            found.append(Tensor(f"{theirs}.{name}_proj.weight", f"({heads}) d", f"{ours}.w_{which}", f"d {heads}"))
    found += [
        Tensor(f"{theirs}.b_proj.weight", "n d", f"{ours}.w_beta", "d n"),
        Tensor(f"{theirs}.dt_bias", "(n h)", f"{ours}.decay_bias", "n h"),
        Tensor(f"{theirs}.A_log", rates, f"{ours}.log_decay_rate", "n"),
        Tensor(f"{theirs}.o_norm.weight", "z", f"{ours}.output_norm.scale", "z"),
        Tensor(f"{theirs}.{output}.weight", "d (n z)", f"{ours}.w_output", "n z d"),
    ]
    return beside(f"{ours}.decay_bias", "n h", found)


def mlx_convolutions(theirs: str, name: str, ours: str = "layers.{layer}.attention") -> tuple[Fused, ...]:
    """Return mlx-lm's rules for the convolutions, whose axes it orders otherwise; `name`: `conv1d`, or another."""
    return tuple(
        Tensor(f"{theirs}.{short}_{name}.weight", f"({heads}) w 1", f"{ours}.conv_{which}", f"w {heads}")
        for short, which, heads in CONVOLVED
    )
