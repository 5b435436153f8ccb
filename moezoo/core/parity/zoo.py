"""The zoo's table: every feature of the spec, a config that shows it, its source, and the results of its parity check.

The list of features is derived from the spec: every member of a union, every choice of a field, every switch, and every
number that is off by default. A test checks that the tiny configs show every feature.
"""

import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moezoo.core.config.yaml_file import read_text
from moezoo.core.errors import SpecError
from moezoo.core.parity.report import json_safe
from moezoo.core.progress import Progress
from moezoo.core.runs.init_from import load_resolved_config
from moezoo.core.spec import ModelSpec

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from moezoo.core.parity.report import ParityReport

# Numbers whose default is one or zero, but which are no feature of their own.
_CONSTANTS = {
    *("beta_slow", "low_frequency_factor", "loss_coefficient", "repeat", "num_experts", "coefficient"),
    "unused",  # ids of a padded vocabulary, which a tokenizer here never has
}
_SIZES = {"model.vocab_size"}


# --- features --------------------------------------------------------------------------------------------------------


def all_features() -> tuple[str, ...]:
    """List every feature of the spec, in the spec's order: `attention: latent`, `router.score: sigmoid`."""
    named = dict.fromkeys(_features_of_type(ModelSpec, "model", set()))
    return tuple(feature for feature in named if feature not in _SIZES)


def features(spec: ModelSpec) -> set[str]:
    """Return the features of a model, named as by `all_features`."""
    return set(_features_of_value(spec, "model")) - _SIZES


def _features_of_type(part: type[BaseModel], owner: str, seen: set[type[BaseModel]]) -> Iterator[str]:
    if part in seen:
        return
    seen.add(part)
    for name, field in part.model_fields.items():
        annotation = _bare(field.annotation)
        members = list(_members(annotation))
        if name == "kind":
            continue  # named by the field that holds the part
        yield from (_kind_feature(owner, name, kind) for member in members for kind in _kinds(member))
        yield from (f"{owner}.{name}: {choice}" for choice in _choices(annotation) if not _only(annotation))
        if _is_switch(field, name) or (_optional(field) and not any(map(_kinds, members))):
            yield f"{owner}.{name}"
        for member in members:
            yield from _features_of_type(member, _owner(name, member), seen)


def _features_of_value(value: BaseModel, owner: str) -> Iterator[str]:
    for name, field in type(value).model_fields.items():
        held, annotation = getattr(value, name), _bare(field.annotation)
        if name == "kind" or held is None:
            continue
        for item in held if isinstance(held, tuple) else (held,):
            if isinstance(item, BaseModel):
                if "kind" in type(item).model_fields:
                    yield _kind_feature(owner, name, item.kind)  # type: ignore[attr-defined]
                elif _optional(field):
                    yield f"{owner}.{name}"
                yield from _features_of_value(item, _owner(name, type(item)))
            elif not _only(annotation):
                yield f"{owner}.{name}: {item}"
            elif (_is_switch(field, name) and item != field.default) or _optional(field):
                yield f"{owner}.{name}"


_PLURALS = {"losses": "loss"}
_SAME = {
    "experts": "feed_forward",
    "qk_norm": "norm",
    "key_norm": "norm",
    "value_norm": "norm",
    "output_norm": "norm",
    "kv_convolution": "residual_convolution",
    "output_convolution": "residual_convolution",
    "final_norm": "norm",
    "head": "head",
    "attention_factors": "factors",
    "feed_forward_factors": "factors",
}


def _owner(name: str, part: type[BaseModel]) -> str:
    """Return the prefix of a part's features: the field that holds it, with its kind if the field has several."""
    kinds = _kinds(part)
    return {"layers": "layer"}.get(name, f"{kinds[0]} {_name(name)}" if len(kinds) == 1 else _name(name))


def _name(name: str) -> str:
    name = _PLURALS.get(name, name)
    return _SAME.get(name, name)


def _kind_feature(owner: str, name: str, kind: object) -> str:
    holder = "model " if name == "position" and owner == "model" else ""
    return f"{holder}{_name(name)}: {kind}"


def _bare(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _members(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the spec classes that a field may hold."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    arguments = typing.get_args(annotation)
    for argument in arguments[:1] if typing.get_origin(annotation) is Annotated else arguments:
        yield from _members(argument)


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values of a Literal, or of an optional Literal."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return tuple(choice for argument in typing.get_args(annotation) for choice in _literal(argument))


def _literal(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def _only(annotation: Any) -> bool:
    return len(_choices(annotation)) < 2


def _kinds(part: type[BaseModel]) -> tuple[Any, ...]:
    kind = part.model_fields.get("kind")
    return typing.get_args(kind.annotation) if kind else ()


def _is_switch(field: FieldInfo, name: str) -> bool:
    """Return whether a field is a boolean, or a number whose default has no effect."""
    if isinstance(field.default, bool):
        return True
    return isinstance(field.default, int | float) and field.default in (0, 1) and name not in _CONSTANTS


def _optional(field: FieldInfo) -> bool:
    return field.default is None and type(None) in typing.get_args(field.annotation) and not _choices(field.annotation)


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ZooConfig:
    """One config: its features and source, and the results of its parity check (None: not run).

    Fields:
        name: of the file.
        source: the `# source:` line of its header.
        features: features of the model.
        differences: per pair of sides, the largest relative difference of logits and of any gradient.
        passed: result of the whole parity check, causality included.
        causal: `causal`, or the first leak with inference routing.
    """

    name: str
    source: str
    features: tuple[str, ...]
    differences: Mapping[str, tuple[float, float]] | None = None
    passed: bool | None = None
    causal: str | None = None


@dataclass(frozen=True)
class Zoo:
    """The zoo's table.

    Fields:
        configs: every config.
        rows: every feature with the config that shows it best; None if no config does.
    """

    configs: tuple[ZooConfig, ...]
    rows: tuple[tuple[str, ZooConfig | None], ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """Features that no config shows."""
        return tuple(feature for feature, config in self.rows if config is None)

    @property
    def passed(self) -> bool | None:
        """True if every feature is shown and every config passes; None if all are shown and no config was checked."""
        if not self.missing and all(config.passed is None for config in self.configs):
            return None
        return not self.missing and all(config.passed for config in self.configs)

    def to_json(self) -> str:
        """Return the table as JSON text."""
        rows = [{"part": feature, "config": config and config.name} for feature, config in self.rows]
        content = {"passed": self.passed, "parts": rows, "configs": [asdict(config) for config in self.configs]}
        return json.dumps(json_safe(content), indent=2, allow_nan=False)

    def table(self) -> "RenderableType":
        """Return two tables for a terminal, narrow enough for it: features with their config, then configs."""
        from rich.console import Group

        return Group(self._parts(), self._figures())

    def _parts(self) -> "RenderableType":
        table = _table("part", "config")
        for feature, config in self.rows:
            table.add_row(feature, "[bold red]none" if config is None else _in_color(config, config.name))
        return table

    def _figures(self) -> "RenderableType":
        pairs = self._pairs()
        checked = ("inference",) if pairs else ()
        table = _table("config", *(pair.replace("/", " /\n") for pair in pairs), *checked, "source")
        for config in self.configs:
            figures = config.differences or {}
            cells = [_in_color(config, f"{max(figures[pair]):.0e}") for pair in pairs]
            table.add_row(config.name, *cells, *([config.causal or ""] if checked else []), config.source)
        return table

    def markdown(self) -> str:
        """Return the table as the Markdown page writings/zoo_table.md."""
        pairs = self._pairs()
        head = ["part", "config", *(f"{pair}: logits, gradients" for pair in pairs), "inference", "source"]
        lines = ["# Every part, as checked", "", "Written by `moezoo zoo --out`, not by hand; [how](zoo.md).", ""]
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for feature, config in self.rows:
            if config is None:
                lines.append(f"| {feature} | **none** |" + " |" * (len(head) - 2))
                continue
            cells = [f"{a:.0e}, {b:.0e}" for a, b in config.differences.values()] if config.differences else []
            link = f"[{config.name}](../configs/tiny/{config.name}.yaml)"
            lines.append(f"| {feature} | {link} | {' | '.join([*cells, config.causal or '', config.source])} |")
        return "\n".join(lines) + "\n"

    def _pairs(self) -> list[str]:
        return next((list(config.differences) for config in self.configs if config.differences), [])


def _table(first: str, *others: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, no_wrap="/" in heading)
    return table


def _in_color(config: ZooConfig, text: str) -> str:
    return text if config.passed is None else f"[green]{text}" if config.passed else f"[bold red]{text}"


def zoo(
    folder: Path,
    check: Callable[[Path], "ParityReport"] | None = None,
    on_progress: Progress | None = None,
) -> Zoo:
    """Build the table from the configs of a folder.

    Args:
        folder: of `*.yaml` configs.
        check: runs the parity check of a config; None: no checks, and no figures in the table.
        on_progress: called before each config with its name, its index and the number of configs.

    Raises SpecError: the folder has no configs, or one cannot be read.
    """
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise SpecError(f"{folder} has no configs; expected *.yaml files. Use the folder configs/tiny of the project.")
    configs = []
    for index, path in enumerate(paths):
        if on_progress is not None:
            on_progress(path.stem, index, len(paths))
        spec = load_resolved_config(path).model
        config = ZooConfig(path.stem, _source(path), tuple(sorted(features(spec))))
        configs.append(config if check is None else _checked(config, check(path)))
    return Zoo(tuple(configs), tuple((feature, _showing(feature, configs)) for feature in all_features()))


def _showing(feature: str, configs: Sequence[ZooConfig]) -> ZooConfig | None:
    """Choose the config that shows a feature best: one named after it, else the one with the fewest features."""
    showing = [config for config in configs if feature in config.features]
    owner, _, own = feature.replace(": ", ".").rpartition(".")
    words, others = set(own.split("_")), set(owner.replace(" ", "_").split("_"))

    def rank(config: ZooConfig) -> tuple[int, int, int, int, str]:
        of_name = set(config.name.split("_"))
        right, near = len(words & of_name), len(others & of_name)
        beside = len(of_name) - right - near if right or near else 0
        return -right, -near, beside, len(config.features), config.name

    return min(showing, key=rank, default=None)


def _checked(config: ZooConfig, report: "ParityReport") -> ZooConfig:
    differences = {}
    for pair in report.pairs:
        worst = [report.worst(pair, kind) for kind in ("logits", "gradient")]
        logits, gradient = (0.0 if row is None else row.relative for row in worst)
        differences[pair] = (logits, gradient)
    return ZooConfig(
        config.name, config.source, config.features, differences, report.passed, report.causal("inference")
    )


def _source(path: Path) -> str:
    lines = read_text(path, "config").splitlines()
    return next((line.removeprefix("# source: ") for line in lines if line.startswith("# source: ")), "")
