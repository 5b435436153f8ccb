"""The model card of an export, its README.md: facts of the model, its training, data and results, and how to open it.

A card is for everyone: of files and folders it has the names, not the paths. Writing: writings/huggingface.md.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moezoo.core.config.data import TokenIdsSpec
from moezoo.core.config.run_config import Config
from moezoo.core.cost.parameters import parameter_counts
from moezoo.core.data.prepare import source_path
from moezoo.core.errors import RunError
from moezoo.core.files import read_bounded, write_atomically
from moezoo.core.hub import hub_id
from moezoo.core.huggingface.adapters.naming import AdapterLayout
from moezoo.core.huggingface.folder import read_json_object
from moezoo.core.huggingface.layout import CONFIG
from moezoo.core.huggingface.mlx_config import QUANTIZATION
from moezoo.core.reports.model_words import attention_in_words, feed_forward_in_words, head_in_words, model_in_brief
from moezoo.core.reports.text import count
from moezoo.core.runs.base import load_base
from moezoo.core.runs.run_folder import Run, is_run, load_run, load_run_config, run_of
from moezoo.core.runs.sessions import read_sessions
from moezoo.core.spec import ModelSpec
from moezoo.core.training.metric_columns import last_number, read_columns

CARD = "README.md"

_MAX_BYTES, _MAX_FIELDS = 10_000_000, 100_000
_FOLDERS = re.compile(r"(?<![^\s='\"(,])(?:~[^/]*|\w+:/)?/(?:[^/'\"]*/)*")  # of an absolute path, or of a URL
_KEPT = ("license", "license_name", "license_link", "language")  # of the base's card: true of what is made from it


@dataclass(frozen=True)
class _Card:
    """An export to describe.

    Fields:
        name: of the new folder, or of its repository.
        config: of the run.
        step: of the exported weights.
        adapter: the layout, if the export is an adapter alone; else None.
        is_mlx: the export is in mlx-lm's layout.
        quantized: the export is quantized, which its run was not.
        base: hub id of the model that the run started from, or the name of its folder; None: from random weights.
        base_id: the former alone.
        columns: numbers of metrics.jsonl up to the step.
        session: the last process that trained the run, as `core.runs.sessions` records it; empty if unknown.
    """

    name: str
    config: Config
    step: int
    adapter: AdapterLayout | None
    is_mlx: bool
    quantized: bool
    base: str | None
    base_id: str | None
    columns: Mapping[str, Any]
    session: Mapping[str, Any]


def write_model_card(
    path: str | Path,
    folder: Path,
    *,
    name: str | None = None,
    step: int | None = None,
    adapter: AdapterLayout | None = None,
) -> bool:
    """Write README.md into the exported folder of a run; return False, and write nothing, if nothing was trained.

    A card that came with the base model follows the new text, and its license and languages are kept.

    Args:
        path: the run. Nothing is written for a Hugging Face folder, or a run of one that was not trained.
        folder: the export, which is complete but for its card.
        name: of the model in the card; by default that of the folder.
        step: of the exported weights; None: of the run's newest intact checkpoint.
        adapter: the layout, if the export is an adapter alone.

    Raises RunError: the card cannot be written, or the run cannot be read; and what `load_run` raises.
    """
    if not is_run(path):
        return False
    step = load_run(path)[2].step if step is None else step
    if step == 0:
        return False
    run, config = Run(run_of(path)), load_run_config(path)
    base = load_base(run.path)
    start = base.path if base is not None else None if config.init_from is None else config.init_from.path
    base_id = None if start is None or (found := hub_id(start)) is None else found.name
    card = _Card(
        name=name or folder.resolve().name,
        config=config,
        step=step,
        adapter=adapter,
        is_mlx=adapter == "mlx" if adapter is not None else _is_mlx(folder),
        quantized=adapter is None and QUANTIZATION[0] in read_json_object(folder / CONFIG),
        base=None if start is None else base_id or Path(start).name,
        base_id=base_id,
        columns=_columns(run.metrics_path, step),
        session=next(iter(reversed(read_sessions(run.path, []))), {}),
    )
    given, text = _own_card(folder / CARD)
    write_atomically(folder / CARD, _text(card, given) + text)
    return True


def _columns(metrics: Path, step: int) -> dict[str, Any]:
    """Return the numbers of a metrics file up to a step; none if it cannot be read."""
    try:
        columns = read_columns(metrics, [])
    except RunError:
        return {}
    known = columns["step"] <= step
    return {name: values[known] for name, values in columns.items()}


def _text(card: _Card, given: Mapping[str, Any]) -> str:
    """Return the card. `given`: fields of the base's card."""
    fields = yaml.safe_dump(_fields(card, given), sort_keys=False, allow_unicode=True)
    kind = "mixture-of-experts language model" if card.config.model.moes else "language model"
    what = f"A {kind}" if card.adapter is None else f"An adapter (LoRA) of a {kind}"
    start = "from random weights" if card.base is None else f"from {_code(card.base)}"
    trained = f"trained {start} with [moezoo](https://github.com/moezoo/moezoo)"
    parts = [
        f"---\n{fields}---\n\n# {_plain(card.name)}",
        f"{what}, {trained}: {model_in_brief(_whole(card))}.",
        _section("Model", _model_rows(_whole(card))),
        _section("Training", _training_rows(card)),
        _data(card),
        _section("Results, before quantization" if card.quantized else "Results", _result_rows(card)),
        _made(card),
        _use(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _fields(card: _Card, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the front matter, which the hub reads."""
    fields = {name: given[name] for name in _KEPT if name in given}
    if card.base_id is not None:
        fields["base_model"] = card.base_id
        fields["base_model_relation"] = "finetune" if card.adapter is None else "adapter"
    library = "mlx" if card.is_mlx else "transformers" if card.adapter is None else "peft"
    tags = ["moezoo", *(["moe"] if card.config.model.moes else []), *(["mlx"] if card.is_mlx else [])]
    tags += [] if card.adapter is None else ["lora"] if card.is_mlx else ["lora", "peft"]
    return fields | {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}


def _whole(card: _Card) -> ModelSpec:
    return card.config.model.model_copy(update={"adapter": None})


def _model_rows(spec: ModelSpec) -> list[tuple[str, str]]:
    counts, depth = parameter_counts(spec), len(spec.all_layers)
    active = f"{counts.active:,} ({count(counts.active)})"
    return [
        ("parameters", f"{counts.total:,} ({count(counts.total)})"),
        *([("active for a token", active)] if spec.moes else []),
        ("layers, width", f"{depth}, {spec.embed_dim}"),
        ("attention", _distinct(attention_in_words(layer.attention) for layer in spec.all_layers)),
        ("feed-forward", _distinct(feed_forward_in_words(layer) for layer in spec.all_layers)),
        ("vocabulary", f"{spec.vocab:,}, head {head_in_words(spec.head)}"),
        *([] if spec.max_length is None else [("longest text", f"{spec.max_length:,} tokens")]),
    ]


def _training_rows(card: _Card) -> list[tuple[str, str]]:
    config, training, optimizer = card.config, card.config.training, card.config.optimizer
    settings = optimizer.model_dump(mode="json")
    adapter, schedule = config.model.adapter, settings["schedule"]
    decay = f", weight decay {settings['weight_decay']:g}" if settings.get("weight_decay") else ""
    warmup = f", {schedule['warmup_steps']:,} steps of warm-up" if schedule["warmup_steps"] else ""
    trained = "all" if training.only is None else ", ".join(training.only)
    if adapter is not None:
        trained = f"adapter of rank {adapter.rank}, scale {adapter.scale:g}"
    tokens = last_number(card.columns, "tokens") or card.step * training.batch_size * training.sequence_length
    return [
        ("steps", f"{card.step:,} of {training.steps:,}"),
        ("batch", f"{training.batch_size} sequences of {training.sequence_length:,} tokens"),
        ("tokens", f"{int(tokens):,}"),
        ("optimizer", f"{settings['kind']}{decay}"),
        ("learning rate", f"{optimizer.learning_rate:g}, {schedule['kind'].replace('_', ' ')}{warmup}"),
        ("trained parameters", trained),
        ("computed in", config.model.precision.compute),
        ("seed", str(training.seed)),
    ]


def _data(card: _Card) -> str:
    """Return the sources: the names, and what is known of their sizes."""
    sources = card.config.data.sources
    weights = [getattr(source, "weight", None) for source in sources]
    recorded = card.session.get("data")
    sizes = [row.get("tokens") for row in recorded if isinstance(row, dict)] if isinstance(recorded, list) else []
    tokens = [size for size in sizes[: len(sources)] if isinstance(size, int)]
    known = len(tokens) == len(sources)
    parts = [weight for weight in weights if weight is not None] or ([float(size) for size in tokens] if known else [])
    rows = ["| source | share | tokens |", "|---|---|---|"]
    for place, source in enumerate(sources):
        share = f"{parts[place] / (sum(parts) or 1):.1%}" if len(parts) == len(sources) else ""
        name = _code(_without_folders(source_path(source)) or source.kind)
        rows.append(f"| {name} | {share} | {f'{tokens[place]:,}' if known else ''} |")
    return "## Data\n\n" + "\n".join(rows)


def _result_rows(card: _Card) -> list[tuple[str, str]]:
    names = {"validation_loss": "validation loss", "bits_per_byte": "bits per byte", "loss": "training loss"}
    units = {"bits_per_byte": ""}
    found = [(name, last_number(card.columns, name)) for name in names]
    at = _last_step(card.columns, "validation_loss")
    rows = [
        (names[name], f"{value:.4f}{units.get(name, ' nats per token')}") for name, value in found if value is not None
    ]
    return rows if at is None else [*rows, ("validated at step", f"{at:,}")]


def _last_step(columns: Mapping[str, Any], name: str) -> int | None:
    """Return the step of the last finite number of a column; None if it has none."""
    steps = columns["step"][np.isfinite(columns[name])] if name in columns else np.zeros(0)
    return int(steps[-1]) if len(steps) else None


def _made(card: _Card) -> str:
    command, versions = card.session.get("command"), card.session.get("versions")
    if not isinstance(command, str):
        return ""
    known = {str(name): str(version) for name, version in versions.items()} if isinstance(versions, dict) else {}
    commit = card.session.get("commit")
    used = ", ".join(f"{name} {version}" for name, version in known.items())
    used += f"; moezoo's commit {commit}" if isinstance(commit, str) else ""
    return f"## Command\n\n{_block('', _public(command))}" + (f"\n\n{_plain(used)}" if used else "")


def _public(command: str) -> str:
    """Return a command line, or a call, with the names of files and folders in place of their absolute paths."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote without its end
        words = []
    if words[:1] != ["moezoo"]:
        return _without_folders(command)
    return shlex.join(_without_folders(word) for word in words)


def _without_folders(text: str) -> str:
    short = _FOLDERS.sub("", text.rstrip("/"))
    return short.partition("?")[0] if "://" in text else short  # the rest of a URL may be a key


def _use(card: _Card) -> str:
    name, base = json.dumps(card.name), json.dumps(card.base or "BASE")
    where = name if card.adapter is None else f"{base}, adapter={name}"
    has_text = not isinstance(card.config.data.tokenizer, TokenIdsSpec)
    prompt = '"the"' if has_text else "[[0, 1, 2]]"
    own = _block("python", f"import moezoo\n\nmodel = moezoo.load({where})\nprint(model.generate({prompt}))")
    if card.adapter is None and not has_text:
        return f"## Use\n\n{own}"
    match card.adapter:
        case None if not card.is_mlx:
            lines = ["from transformers import pipeline", "", f'writer = pipeline("text-generation", {name})']
            lines += ['print(writer("the"))']
        case None | "mlx":
            where = name if card.adapter is None else f"{base}, adapter_path={name}"
            lines = ["from mlx_lm import generate, load", "", f"model, tokenizer = load({where})"]
            lines += ['print(generate(model, tokenizer, "the"))']
        case "vllm":
            lines = ["from vllm import LLM", "from vllm.lora.request import LoRARequest", ""]
            lines += [f"model = LLM({base}, enable_lora=True)"]
            lines += [f'print(model.generate("the", lora_request=LoRARequest("adapter", 1, {name})))']
        case _:
            lines = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM", ""]
            lines += [f"base = AutoModelForCausalLM.from_pretrained({base})"]
            lines += [f"model = PeftModel.from_pretrained(base, {name})"]
    return f"## Use\n\n{own}\n\n{_block('python', chr(10).join(lines))}"


def _own_card(path: Path) -> tuple[dict[str, Any], str]:
    """Return the fields of a card that came with the base model, and its text under a heading; empty if none did."""
    if not path.is_file():
        return {}, ""
    text = read_bounded(path, _MAX_BYTES).decode("utf-8", "replace")
    split = re.fullmatch(r"---\r?\n(.*?\n)---\r?\n(.*)", text, re.DOTALL)
    fields, body = split.groups() if split is not None else ("", text)
    try:
        given = yaml.safe_load(fields) if len(fields) <= _MAX_FIELDS else None
    except (yaml.YAMLError, RecursionError, ValueError):
        given = None
    return given if isinstance(given, dict) else {}, f"\n## The base model's card\n\n{body.strip()}\n"


def _is_mlx(folder: Path) -> bool:
    """Return whether the tensors of a checkpoint that was just written are in mlx-lm's layout."""
    first = min(folder.glob("*.safetensors"), default=None)
    if first is None:
        raise RunError(f"{folder} has no safetensors file; expected an exported checkpoint. Export the run again.")
    with first.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return bool((header.get("__metadata__") or {}).get("format") == "mlx")


def _section(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a heading and a table; an empty text without rows."""
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines]) if rows else ""


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def _plain(text: str) -> str:
    """Return text in one line, without characters that Markdown or a page would obey."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", _printable(text))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_cell(_printable(text).replace('`', chr(39)))}`"


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.replace('```', chr(39) * 3)}\n```"


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text)
