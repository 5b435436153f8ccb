"""The page of `moezoo describe` for a model or config: layers, parameters, FLOPs and memory, before it is built."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moezoo.core.config.run_config import Config
from moezoo.core.config.training import TrainingConfig
from moezoo.core.cost.flops import Flops, flops_per_token
from moezoo.core.cost.memory import TrainingMemory, cache_bytes, kv_cache_bytes_per_token, training_memory
from moezoo.core.cost.parameters import ParameterCounts, parameter_counts
from moezoo.core.data.vocabulary import spec_with_real_vocab_size
from moezoo.core.errors import counted
from moezoo.core.huggingface.export_as import Exports, exports
from moezoo.core.parameters.trained import sizes_by_role, trained_rows
from moezoo.core.reports.model_words import attention_in_words, feed_forward_in_words, head_in_words, model_in_words
from moezoo.core.reports.text import bytes_text, count, new_table
from moezoo.core.spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


@dataclass(frozen=True)
class LayerRun:
    """Consecutive equal layers, `first` to `last`."""

    first: int
    last: int
    layer: LayerSpec

    def to_json(self) -> dict[str, Any]:
        """Return the indices, and the layer in words."""
        return {
            "first": self.first,
            "last": self.last,
            "attention": attention_in_words(self.layer.attention),
            "feed_forward": feed_forward_in_words(self.layer),
        }


@dataclass(frozen=True)
class ModelDescription:
    """Layers, parameters and cost of a model.

    Fields:
        spec: the model, with a vocabulary size.
        sequence_length: tokens of a sequence, for FLOPs and the KV cache.
        layers: runs of equal layers.
        parameters: numbers of parameters by role.
        forward, training: FLOPs per token of the forward pass, and of forward and backward.
        cache_bytes_per_token: bytes of the KV cache that each further token adds.
        cache_bytes: bytes of the KV cache of one sequence.
    """

    spec: ModelSpec
    sequence_length: int
    layers: tuple[LayerRun, ...]
    parameters: ParameterCounts
    forward: Flops
    training: Flops
    cache_bytes_per_token: int
    cache_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the description as plain data; numbers are exact, in units of one (parameters, FLOPs, bytes)."""
        counts = self.parameters
        return {
            "vocab_size": self.spec.vocab,
            "embed_dim": self.spec.embed_dim,
            "model": model_in_words(self.spec),
            "head": head_in_words(self.spec.head),
            "compute_dtype": self.spec.precision.compute,
            "num_layers": len(self.spec.all_layers),
            "layers": [run.to_json() for run in self.layers],
            "parameters": {
                "total": counts.total,
                "active": counts.active,
                "by_role": {
                    role: {"total": total, "active": counts.active_by_role[role]}
                    for role, total in counts.by_role.items()
                },
            },
            "flops_per_token": {
                "sequence_length": self.sequence_length,
                "forward": {"total": self.forward.total, **self.forward.by_part},
                "training": {"total": self.training.total, **self.training.by_part},
            },
            "kv_cache_bytes_per_token": self.cache_bytes_per_token,
            "kv_cache_bytes": self.cache_bytes,
        }


@dataclass(frozen=True)
class ConfigDescription:
    """A config's model, and the cost of training it.

    Fields:
        model: the model, with sequences as long as in training.
        assumed: the assumption about the vocabulary, if its size is unknown before data are read.
        training: the config's section.
        memory: memory of one training step.
        exports: the families that it can be written as, or what stands in the way; None if it was not asked for, or if
            it starts from a checkpoint, in whose layout it is written.
    """

    model: ModelDescription
    assumed: str | None
    training: TrainingConfig
    memory: TrainingMemory
    exports: Exports | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a training step."""
        return self.training.batch_size * self.training.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens of the whole training."""
        return self.training.steps * self.tokens_per_step

    @property
    def flops(self) -> int:
        """FLOPs of the whole training."""
        return self.tokens * self.model.training.total

    def to_json(self) -> dict[str, Any]:
        """Return the description as plain data; numbers are exact, in units of one (parameters, FLOPs, bytes)."""
        return {
            "assumed": self.assumed,
            **self.model.to_json(),
            "training_memory_bytes": self.memory.to_json(),
            "training": {
                "steps": self.training.steps,
                "batch_size": self.training.batch_size,
                "gradient_accumulation": self.training.gradient_accumulation,
                "sequence_length": self.training.sequence_length,
                "tokens_per_step": self.tokens_per_step,
                "tokens": self.tokens,
                "flops": self.flops,
            },
            **({} if self.exports is None else {"exports": self.exports.to_json()}),
        }


def config_description(config: Config, *, exported: bool = False) -> ConfigDescription:
    """Return the description of a config's model and training; `exported`: with the families that can have it."""
    spec, assumed = spec_with_real_vocab_size(config)
    config = config.model_copy(update={"model": spec})
    model = model_description(spec, config.training.sequence_length)
    found = exports(spec) if exported and config.init_from is None and spec.adapter is None else None
    return ConfigDescription(model, assumed, config.training, training_memory(config), found)


def model_description(spec: ModelSpec, sequence_length: int) -> ModelDescription:
    """Return the description of a model, for sequences of `sequence_length` tokens."""
    forward, training = (flops_per_token(spec, sequence_length, both) for both in (False, True))
    return ModelDescription(
        spec=spec,
        sequence_length=sequence_length,
        layers=_layer_runs(spec),
        parameters=parameter_counts(spec),
        forward=forward,
        training=training,
        cache_bytes_per_token=kv_cache_bytes_per_token(spec),
        cache_bytes=cache_bytes(spec, sequence_length),
    )


def _layer_runs(spec: ModelSpec) -> tuple[LayerRun, ...]:
    """Return the layers in order, with equal neighbors (however the config writes them) as one run."""
    runs: list[LayerRun] = []
    for index, layer in enumerate(spec.all_layers):
        plain = layer.model_copy(update={"repeat": 1})
        if runs and runs[-1].layer == plain:
            runs[-1] = LayerRun(runs[-1].first, index, plain)
        else:
            runs.append(LayerRun(index, index, plain))
    return tuple(runs)


# --- pages -----------------------------------------------------------------------------------------------------------


def config_page(known: ConfigDescription, where: str) -> "RenderableType":
    """Return the page of `moezoo describe` for a config, with title `where`."""
    from rich.console import Group
    from rich.text import Text

    pieces = model_tables(known.model, where, known.memory)
    if known.assumed:
        pieces.append(Text(f"assumed: {known.assumed}", "yellow"))
    steps = f"{known.training.steps:,} steps of {known.tokens_per_step:,} tokens = {count(known.tokens)} tokens"
    pieces.append(Text(f"training: {steps}, {count(known.flops, 'FLOPs')} in total", "dim"))
    if known.exports is not None:
        pieces.append(Text(f"export: {known.exports.words}", "dim"))
    return Group(*pieces)


def model_tables(known: ModelDescription, where: str, memory: TrainingMemory | None = None) -> list["RenderableType"]:
    """Return the title and the tables of layers, parameters and cost; with `memory`, that of training too."""
    from rich.text import Text

    counts = known.parameters
    title = Text.assemble(
        (where, "bold"),
        f"\n{count(counts.total)} parameters, {count(counts.active)} active per token",
        f" ({counts.active / counts.total:.0%})" if counts.active < counts.total else "",
    )
    return [title, _layer_table(known), _parameter_table(counts), _cost_table(known, memory)]


def training_header(config: Config, facts: Mapping[str, str]) -> "RenderableType":
    """Return the header of a training run: parameters, FLOPs, tokens per step; and `facts` on device and paths."""
    from rich.markup import escape
    from rich.table import Table

    known = config_description(config)
    counts, training = known.model.parameters, known.training
    active = counts.active_by_role
    roles = [_role(role, total, active[role]) for role, total in counts.by_role.items() if total]
    pieces = training.gradient_accumulation
    micro_batches = f", in {pieces} micro-batches" if pieces > 1 else ""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("parameters", f"{count(counts.total)}, {count(counts.active)} active per token")
    table.add_row("", f"[dim]{', '.join(roles)}")
    spec = known.model.spec
    if len(trained := trained_rows(spec, training.only)) < len(trained_rows(spec, ("all",))):
        sizes = sizes_by_role(trained)
        by_role = ", ".join(f"{role} {count(size)}" for role, size in sizes.items())
        table.add_row("trained", f"{count(sum(sizes.values()))} ({by_role}); the other parameters are frozen")
    table.add_row("compute", f"{count(known.model.training.total, 'FLOPs')} per token, forward and backward")
    table.add_row(
        "step",
        f"{known.tokens_per_step:,} tokens ({training.batch_size} x {training.sequence_length}{micro_batches}), "
        f"{training.steps:,} steps",
    )
    if training.layers == "scanned":
        table.add_row("layers", "scanned: consecutive equal layers are compiled once")
    for name, fact in facts.items():
        table.add_row(name, escape(fact))
    return table


def _layer_table(known: ModelDescription) -> "Table":
    spec, layers = known.spec, len(known.spec.all_layers)
    table = new_table(counted(layers, "layer"), "attention", "feed-forward")
    for run in known.layers:
        indices = f"{run.first}" if run.first == run.last else f"{run.first} to {run.last}"
        table.add_row(indices, attention_in_words(run.layer.attention), feed_forward_in_words(run.layer))
    head, dtype = head_in_words(spec.head), spec.precision.compute
    table.caption = f"width {spec.embed_dim}, vocabulary {spec.vocab:,}, {head} head, {dtype}"
    if words := model_in_words(spec):
        table.caption += f"; {words}"
    table.caption_justify = "left"
    return table


def _parameter_table(counts: ParameterCounts) -> "Table":
    table = new_table("parameters", "total", "share", "active per token", "share ", right=range(1, 5))
    rows = [(role, total, counts.active_by_role[role]) for role, total in counts.by_role.items() if total]
    for place, (role, total, active) in enumerate(rows):
        table.add_row(
            role,
            count(total),
            f"{total / counts.total:.1%}",
            count(active),
            f"{active / counts.active:.1%}",
            end_section=place + 1 == len(rows),
        )
    table.add_row("total", count(counts.total), "", count(counts.active), "", style="bold")
    return table


def _cost_table(known: ModelDescription, memory: TrainingMemory | None) -> "Table":
    forward, length = known.forward, known.sequence_length
    shares = ", ".join(f"{name} {value / forward.total:.0%}" for name, value in forward.by_part.items() if value)
    table = new_table("cost", "", "breakdown")
    table.columns[1].justify = "right"
    table.columns[1].no_wrap = True
    table.columns[2].style = "dim"
    table.add_row("forward, per token", count(forward.total, "FLOPs"), f"{shares}; sequences of {length} tokens")
    table.add_row("training, per token", count(known.training.total, "FLOPs"), "3 times forward")
    cache = f"{bytes_text(known.cache_bytes)} for {length} tokens"
    table.add_row("KV cache, per token", bytes_text(known.cache_bytes_per_token), cache)
    if memory is not None:
        kinds = ", ".join(f"{kind} {bytes_text(size)}" for kind, size in asdict(memory).items())
        table.add_row("training memory", f"about {bytes_text(memory.total)}", kinds)
    return table


def _role(name: str, total: int, active: int) -> str:
    return f"{name} {count(total)}" + (f" ({count(active)} active)" if active != total else "")
