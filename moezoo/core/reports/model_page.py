"""A model on one page: what it is made of and what it costs, before it is built."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moezoo.core.config.run_config import Config
from moezoo.core.config.vocabulary import spec_with_vocab_size
from moezoo.core.cost.flops import flops_per_token
from moezoo.core.cost.memory import cache_bytes, kv_cache_bytes_per_token, training_memory
from moezoo.core.cost.parameters import parameter_counts
from moezoo.core.reports.model_words import attention_in_words, feed_forward_in_words, head_in_words, model_in_words
from moezoo.core.reports.text import bytes_text, count, new_table, plural
from moezoo.core.spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def describe(config: Config, where: str) -> "RenderableType":
    """The page of `moezoo describe`: layers, parameters by role, operations, cache and memory. `where` is its title."""
    from rich.console import Group
    from rich.text import Text

    known = description(config)
    training = known["training"]
    parts = model_tables(known, where)
    if known["assumed"]:
        parts.append(Text(f"assumed: {known['assumed']}", "yellow"))
    amount = (
        f"{training['steps']:,} steps of {training['tokens_per_step']:,} tokens = {count(training['tokens'])} tokens"
    )
    parts.append(Text(f"training: {amount}, {count(training['flops'], 'FLOPs')} in all", "dim"))
    return Group(*parts)


def model_tables(known: Mapping[str, Any], where: str) -> list["RenderableType"]:
    """Title, layers, parameters and cost of what `model_description` knows; training's memory if it is there."""
    from rich.text import Text

    parameters = known["parameters"]
    title = Text.assemble(
        (where, "bold"),
        f"\n{count(parameters['total'])} parameters, {count(parameters['active'])} active per token",
        f" ({parameters['active'] / parameters['total']:.0%})" if parameters["active"] < parameters["total"] else "",
    )
    return [title, _model_table(known), _parameter_table(known), _cost_table(known)]


def header(config: Config, facts: Mapping[str, str]) -> "RenderableType":
    """What a training run says first: parameters, operations, tokens per step; and `facts` of device and paths."""
    from rich.table import Table

    known = description(config)
    parameters, flops, training = known["parameters"], known["flops_per_token"], known["training"]
    roles = ", ".join(_role(name, row) for name, row in parameters["by_role"].items() if row["total"])
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("parameters", f"{count(parameters['total'])}, {count(parameters['active'])} active per token")
    table.add_row("", f"[dim]{roles}")
    table.add_row("compute", f"{count(flops['training']['total'], 'FLOPs')} per token, forward and backward")
    pieces = training["gradient_accumulation"]
    table.add_row(
        "step",
        f"{training['tokens_per_step']:,} tokens ({training['batch_size']} x {training['sequence_length']}"
        + (f", in {pieces} parts)" if pieces > 1 else ")")
        + f", {training['steps']:,} steps",
    )
    if config.training.layers == "scanned":
        table.add_row("layers", "scanned: equal ones in a row are compiled once")
    for name, fact in facts.items():
        table.add_row(name, _escaped(fact))
    return table


def description(config: Config) -> dict[str, Any]:
    """The page as plain data for `--json`: numbers exact, in units of one (parameters, FLOPs, bytes, tokens)."""
    spec, assumed = spec_with_vocab_size(config)
    config = config.model_copy(update={"model": spec})
    training = config.training
    tokens_per_step = training.batch_size * training.sequence_length
    memory = training_memory(config)
    known = model_description(spec, training.sequence_length)
    return {
        "assumed": assumed,
        **known,
        "training_memory_bytes": {"total": sum(memory.values()), **memory},
        "training": {
            "steps": training.steps,
            "batch_size": training.batch_size,
            "gradient_accumulation": training.gradient_accumulation,
            "sequence_length": training.sequence_length,
            "tokens_per_step": tokens_per_step,
            "tokens": training.steps * tokens_per_step,
            "flops": training.steps * tokens_per_step * known["flops_per_token"]["training"]["total"],
        },
    }


def model_description(spec: ModelSpec, sequence_length: int) -> dict[str, Any]:
    """What `description` says of the model alone, computed with sequences of so many tokens."""
    counts = parameter_counts(spec)
    forward, both = (flops_per_token(spec, sequence_length, kind) for kind in (False, True))
    return {
        "vocab_size": spec.vocab,
        "embed_dim": spec.embed_dim,
        "model": model_in_words(spec),
        "head": head_in_words(spec.head),
        "compute_dtype": spec.precision.compute,
        "num_layers": len(spec.all_layers),
        "layers": [run.to_dict() for run in _runs(spec)],
        "parameters": {
            "total": counts.total,
            "active": counts.active,
            "by_role": {
                role: {"total": total, "active": counts.active_by_role[role]} for role, total in counts.by_role.items()
            },
        },
        "flops_per_token": {
            "sequence_length": sequence_length,
            "forward": {"total": forward.total, **forward.by_part},
            "training": {"total": both.total, **both.by_part},
        },
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(spec),
        "kv_cache_bytes": cache_bytes(spec, sequence_length),
    }


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """Consecutive equal layers."""

    first: int
    last: int
    layer: LayerSpec

    def to_dict(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "last": self.last,
            "attention": attention_in_words(self.layer.attention),
            "feed_forward": feed_forward_in_words(self.layer),
        }


def _runs(spec: ModelSpec) -> list[_Run]:
    """Layers in order, neighbours that are equal (however the config wrote them) as one run."""
    runs: list[_Run] = []
    for index, layer in enumerate(spec.all_layers):
        plain = layer.model_copy(update={"repeat": 1})
        if runs and runs[-1].layer == plain:
            runs[-1] = _Run(runs[-1].first, index, plain)
        else:
            runs.append(_Run(index, index, plain))
    return runs


# --- the tables ------------------------------------------------------------------------------------------------------


def _model_table(known: Mapping[str, Any]) -> "Table":
    layers, dtype = known["num_layers"], known["compute_dtype"]
    table = new_table(f"{layers} {plural('layer', layers)}", "attention", "feed-forward")
    for run in known["layers"]:
        single = run["first"] == run["last"]
        table.add_row(
            f"{run['first']}" if single else f"{run['first']} to {run['last']}", run["attention"], run["feed_forward"]
        )
    table.caption = f"width {known['embed_dim']}, vocabulary {known['vocab_size']:,}, {known['head']} head, {dtype}"
    if known["model"]:
        table.caption += f"; {known['model']}"
    table.caption_justify = "left"
    return table


def _parameter_table(known: Mapping[str, Any]) -> "Table":
    parameters = known["parameters"]
    table = new_table("parameters", "total", "share", "active per token", "share ", right=range(1, 5))
    rows = [(name, row) for name, row in parameters["by_role"].items() if row["total"]]
    for place, (name, row) in enumerate(rows):
        table.add_row(
            name,
            count(row["total"]),
            f"{row['total'] / parameters['total']:.1%}",
            count(row["active"]),
            f"{row['active'] / parameters['active']:.1%}",
            end_section=place + 1 == len(rows),
        )
    table.add_row("total", count(parameters["total"]), "", count(parameters["active"]), "", style="bold")
    return table


def _cost_table(known: Mapping[str, Any]) -> "Table":
    flops, memory = known["flops_per_token"], known.get("training_memory_bytes")
    parts = {name: value for name, value in flops["forward"].items() if name != "total" and value}
    shares = ", ".join(f"{name} {value / flops['forward']['total']:.0%}" for name, value in parts.items())
    table = new_table("cost", "", "made of")
    table.columns[1].justify = "right"
    table.columns[1].no_wrap = True
    table.columns[2].style = "dim"
    length = flops["sequence_length"]
    table.add_row("forward, per token", count(flops["forward"]["total"], "FLOPs"), f"{shares}; {length} tokens long")
    table.add_row("training, per token", count(flops["training"]["total"], "FLOPs"), "3 times forward")
    cache = known["kv_cache_bytes_per_token"]
    table.add_row("cache, per token", bytes_text(cache), f"{bytes_text(known['kv_cache_bytes'])} for {length} tokens")
    if memory is None:
        return table
    held = ", ".join(f"{name} {bytes_text(value)}" for name, value in memory.items() if name != "total")
    table.add_row("training memory", f"about {bytes_text(memory['total'])}", held)
    return table


def _role(name: str, row: Mapping[str, int]) -> str:
    active = f" ({count(row['active'])} active)" if row["active"] != row["total"] else ""
    return f"{name} {count(row['total'])}{active}"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
