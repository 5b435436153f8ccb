"""Fields of a config.json that record what a family reads: the name, kind and default of each field."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from moezoo.core.huggingface.fields import Fields

Kind = Literal["whole", "positive", "whole or null", "number", "option", "per layer", "layers", "object", "json"]

Path = tuple[str, ...]
"""Name of a field, after those of the objects that it is in."""

_FIRST_COUNTS = {"indexer_kv_heads": 1, "indexer_head_dim": 256}
"""Starting values of Qwen4's indexer: the only number of key heads, and at least as many features as are rotated."""

ABSENT = object()
"""In place of the value of a field that is not there, where null is a value."""


def get_at(config: Mapping[str, Any], path: Path, default: Any = None) -> Any:
    """Return the value at a path, or `default`."""
    found: Any = config
    for name in path:
        found = found.get(name, default) if isinstance(found, Mapping) else default
    return found


def set_at(config: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """Return the config with another value at a path."""
    first, *rest = path
    found = dict(config)
    if rest:
        inner = found.get(first)
        value = set_at(inner if isinstance(inner, Mapping) else {}, tuple(rest), value)
    found[first] = value
    return found


class Read(NamedTuple):  # there are thousands of them in a search
    """One field as a family reads it.

    Fields:
        kind: `whole`: integers of at least 0; `positive`: of at least 1; `option`: one of `options`; `per layer`: a
            list of one value per layer, each one of `options` if there are any; `layers`: indices of layers, or one
            integer per layer; `json`: any value.
        default: the value that an absent field has; None if it is required, or if null is its default.
        options: possible values.
    """

    kind: Kind
    default: Any = None
    options: tuple[Any, ...] = ()


class RecordedFields(Fields):
    """Fields that record the reads, and that have a starting value for each required field without one.

    `reads`: by path, in the order of reading. `started`: the starting values by path. `expected`: the first value that
    the family accepts of a field that has only one meaning. `asked`: paths looked for inside of objects, by layer type.
    """

    def __init__(self, values: Mapping[str, Any], num_layers: int, vocab: int, max_length: int | None = None):
        super().__init__(values, "config.json", max_length)
        self.num_layers, self.vocab = num_layers, vocab
        self.prefix: Path = ()
        self.reads: dict[Path, Read] = {}
        self.started: dict[Path, Any] = {}
        self.expected: dict[Path, Any] = {}
        self.asked: set[Path] = set()
        self._outermost = True

    def _record(self, name: str, read: Read, *, again: bool = True) -> None:
        path = (*self.prefix, name)
        if again or path not in self.reads:
            self.reads[path] = read

    def _start(self, name: str, value: Any) -> Any:
        if self._values.get(name) is None:
            self._values[name] = value
            self.started[(*self.prefix, name)] = value
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        self._record(name, Read("whole", default))
        if default is None or name.startswith("vocab_size"):
            self._start(name, self._first_count(name))
        return super().integer(name, default)

    def count(self, name: str, default: int | None = None) -> int:
        value = super().count(name, default)
        self._record(name, Read("positive", default))
        return value

    def count_or_null(self, name: str, default: int | None = None) -> int | None:
        self._record(name, Read("whole or null", default))
        return super().count_or_null(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        self._record(name, Read("number", default))
        if default is None:
            self._start(name, 1.0)
        return super().number(name, default)

    def flag(self, name: str, default: bool | None = None) -> bool:
        self._record(name, Read("option", default, (False, True)))
        if default is None:
            self._start(name, False)
        return super().flag(name, default)

    def choice(self, name: str, known: Mapping[str, Any], default: str | None = None) -> Any:
        value = super().choice(name, known, default)
        self._record(name, Read("option", default, tuple(known)))
        return value

    def text(self, name: str, default: str | None = None) -> str:
        self._record(name, Read("option", default, () if default is None else (default,)))
        return super().text(name, default)

    def items(
        self, name: str, length: int, default: Sequence[Any] | None = None, known: Sequence[Any] = ()
    ) -> list[Any]:
        self._record(name, Read("per layer", None if default is None else list(default), tuple(known)))
        if default is None:
            self._start(name, [known[0] if known else 1] * length)
        return super().items(name, length, default, known)

    def counts(self, name: str, length: int, default: int | None = None) -> list[int]:
        self._record(name, Read("per layer", None if default is None else [default] * length))
        if default is None:
            self._start(name, self._first_count(name))
        read = self.reads[(*self.prefix, name)]
        found = super().counts(name, length, default)
        self._record(name, read)
        return found

    def integers(self, name: str, default: Sequence[int] = ()) -> list[int]:
        self._record(name, Read("layers", list(default)))
        return super().integers(name, default)

    def get(self, name: str, default: Any = None, likely: Sequence[Any] = ()) -> Any:
        if name.startswith("vocab_size"):
            self._start(name, self.vocab)
        options = (False, True) if isinstance(default, bool) else ()
        options = tuple(likely) or options
        self._record(name, Read("option" if options else "json", default, options), again=False)
        return super().get(name, default, likely)

    def __contains__(self, name: str) -> bool:
        self.asked.add((*self.prefix, name))
        if name == "rope_parameters":
            self._record(name, Read("object"))
        self._saw(name)
        return self._values.get(name) is not None

    def expect(self, name: str, *values: Any, because: str = "") -> None:
        path = (*self.prefix, name)
        if values and path not in self.reads and name != "use_bidirectional_attention":
            self.expected.setdefault(path, values[0])
        if self._values.get(name) is not None and self._values[name] not in values:
            raise self.refuse(name, "another value")
        self._saw(name)

    def only_in_training(self, name: str) -> None:
        self.asked.add((*self.prefix, name))
        self._saw(name)

    def null(self, name: str) -> bool:
        self._saw(name)
        return name in self._values and self._values[name] is None

    def inside(self, name: str, default: Mapping[str, Any] | None = None) -> Fields | None:
        self._record(name, Read("object"))
        value = self._values.get(name, default)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refuse(name, "a JSON object")
        inner = RecordedFields(value, self.num_layers, self.vocab)
        inner.prefix = (*self.prefix, name)
        inner.reads, inner.started = self.reads, self.started
        inner.expected, inner.asked = self.expected, self.asked
        return inner

    def finish(self, harmless: Iterable[str] = ()) -> None:
        pass  # the search sets only fields that are read; the config that it finds is read by Fields

    def _first_count(self, name: str) -> int:
        """Return a starting value with which most other fields fit."""
        if name in _FIRST_COUNTS:
            return _FIRST_COUNTS[name]
        if name.startswith("vocab_size"):
            return self.vocab
        if "layer" in name:
            return self.num_layers
        if "per_tok" in name or "top_k" in name or "topk" in name:
            return 2
        if "heads" in name:
            return 4 if "key_value" in name else 32
        return 64 if "head_dim" in name or "rank" in name else 4096
