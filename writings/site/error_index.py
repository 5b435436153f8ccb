"""The error messages of moezoo, read from its source: for the site's index of errors.

A message is a text in which what differs from case to case is a named gap, `{path} is quantized`. It is found where an
error is made: `raise RunError(...)`, `impossible(path, problem, advice)`, or a call of a function that builds an error.
"""

import ast
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moezoo"
OPEN, CLOSE = "\x02", "\x03"
"""Around the name of a gap in a text."""

PARTS = {"HeaderProblem": "CheckpointError", "_DamagedError": "DataError", "LimitedProcessError": "TokenizerError"}
"""Exceptions whose text becomes a part of an error's message."""

VALIDATION = ("core/config/validate.py", "_explain", "SpecError")
"""The function whose results are lines of an error: file, name, error."""

_MOST = 12  # alternatives of one text
_SHORTEST = 12  # letters of a function's result, to write them in place of its call
Texts = list[str]


@dataclass(frozen=True)
class ErrorMessage:
    """A message and the place that it comes from.

    Fields:
        kind: class of the error.
        text: with gaps as OPEN name CLOSE.
        path: of the file, relative to the package.
        line: in the file.
        function: dotted name of the function that raises it, or ''.
        doing: first line of the docstring of that function, or else of its class; or ''.
    """

    kind: str
    text: str
    path: str
    line: int
    function: str
    doing: str

    @property
    def stem(self) -> str:
        """The problem: the text up to what was received or expected, or its first sentence."""
        return _cut(self.text, "; ", ". ", ": ")

    @property
    def advice(self) -> str:
        """The sentences after the first, which say what to do; '' if there is one sentence."""
        return self.text.partition(". ")[2]

    @property
    def anchor(self) -> str:
        """A name of the message for links, which stays the same while its text does."""
        words = re.sub(r"[^a-z0-9]+", "-", _without_gaps(self.stem).lower()).strip("-")[:60].strip("-")
        return f"{words}-{zlib.crc32(f'{self.kind} {self.text}'.encode()):08x}"

    @property
    def pattern(self) -> re.Pattern[str]:
        """A pattern that fits a whole line as the command line prints it."""
        pieces = re.split(f"{OPEN}[^{CLOSE}]*{CLOSE}", self.text)
        return re.compile(f"(?:{self.kind}: )?" + ".*".join(map(re.escape, pieces)), re.DOTALL)


@dataclass(frozen=True)
class Function:
    """A function, the module and class that it is in, and what surrounds it."""

    path: str
    name: str
    node: ast.FunctionDef
    owner: ast.ClassDef | None = None

    @property
    def doing(self) -> str:
        """The first line of its docstring, or else of its class's; or ''."""
        return _first_line(self.node) or ("" if self.owner is None else _first_line(self.owner))

    @property
    def parameters(self) -> list[str]:
        arguments = self.node.args
        names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        return names[1:] if names[:1] in (["self"], ["cls"]) else names


@dataclass
class Source:
    """The parsed package: its files by path, the names of its errors, its functions by name, and who calls what."""

    trees: dict[str, ast.Module] = field(default_factory=dict)
    bases: dict[str, list[str]] = field(default_factory=dict)
    errors: set[str] = field(default_factory=set)
    functions: dict[str, list[Function]] = field(default_factory=dict)
    calls: list[tuple[str, Function | None, ast.Call | ast.Return]] = field(default_factory=list)

    def add(self, path: str) -> None:
        """Parse a file and note its classes, functions, calls and returned values, with the innermost function."""
        self.trees[path] = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
        self._visit(self.trees[path], path, None, "")

    def _visit(self, node: ast.AST, path: str, function: Function | None, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner, inside = function, prefix
            owner = node if isinstance(node, ast.ClassDef) else function and function.owner
            match child:
                case ast.Name() | ast.Constant() | ast.expr_context():
                    continue
                case ast.FunctionDef(name=name):
                    inner, inside = Function(path, prefix + name, child, owner), f"{prefix}{name}."
                    self.functions.setdefault(name, []).append(inner)
                case ast.ClassDef(name=name):
                    inside = f"{prefix}{name}."
                    self.bases[name] = [ast.unparse(base) for base in child.bases]
                case ast.Call() | ast.Return():
                    self.calls.append((path, function, child))
            self._visit(child, path, inner, inside)

    def find(self, call: ast.Call, path: str) -> Function | None:
        """Return the function of the package that a call names: of the same file, or the only one of its name."""
        name = _called(call)
        known = self.functions.get(name, [])
        own = [each for each in known if each.path == path]
        chosen = own if len(own) == 1 else known
        return chosen[0] if len(chosen) == 1 else None

    def builder(self, call: ast.Call, path: str) -> Function | None:
        """Return the function that a call makes an error with, or None."""
        function = self.find(call, path)
        return function if function is not None and builds_error(function) else None


def error_messages() -> list[ErrorMessage]:
    """Return every error message, in the order of files and lines."""
    return list(_unique(message for place in source().calls for message in messages_of(*place)))


@cache
def source() -> Source:
    """Return the parsed package."""
    found = Source(errors={"MoezooError", "RequestError", *PARTS})
    for path in sorted(PACKAGE.rglob("*.py")):
        found.add(str(path.relative_to(PACKAGE)))
    before: set[str] = set()
    while before != found.errors:
        before = set(found.errors)
        found.errors |= {name for name, bases in found.bases.items() if not found.errors.isdisjoint(bases)}
    return found


def messages_of(path: str, function: Function | None, node: ast.Call | ast.Return) -> Iterator[ErrorMessage]:
    """Yield the messages of an error that a call makes, or of a returned line of VALIDATION."""
    scope = _Scope(path, function)
    if isinstance(node, ast.Return):
        if function is not None and (path, function.name) == VALIDATION[:2]:
            yield from _made(VALIDATION[2], _read(node.value, scope), node, path, function)
        return
    name = _called(node)
    if name == "impossible":
        yield from _made("SpecError", _impossible(node, scope), node, path, function)
    elif name in source().errors:
        if node.args and not (function and builds_error(function)):
            yield from _made(PARTS.get(name, name), _read(node.args[0], scope), node, path, function)
    elif (builder := source().builder(node, path)) is not None:
        inner = _Scope(builder.path, builder, _bound(builder, node, scope))
        for kind, made in _errors_in(builder):
            yield from _made(PARTS.get(kind, kind), _read(made, inner), node, path, function)


def builds_error(function: Function) -> bool:
    """Return true for a function whose callers say what its error is about: they are listed, and it is not."""
    kind = "" if function.node.returns is None else ast.unparse(function.node.returns).strip("'\"")
    builds = kind in source().errors or (kind == "NoReturn" and "refuse" in function.name)
    return builds and bool(function.parameters)


def _errors_in(function: Function) -> list[tuple[str, ast.expr]]:
    calls = [node for node in ast.walk(function.node) if isinstance(node, ast.Call) and node.args]
    return [(_called(call), call.args[0]) for call in calls if _called(call) in source().errors]


def _first_line(node: ast.FunctionDef | ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]


def _called(call: ast.Call) -> str:
    """Return the name of the function or method that is called, '' if it has none."""
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _impossible(call: ast.Call, scope: "_Scope") -> Texts:
    path, problem, advice = (_read(argument, scope) for argument in call.args)
    return [
        f"{where} {what} ({_gap('file')}). {do}.".lstrip() for where, what, do in product(path[:2], problem, advice)
    ][:_MOST]


def _made(kind: str, texts: Texts, node: ast.AST, path: str, function: Function | None) -> Iterator[ErrorMessage]:
    name, doing = ("", "") if function is None else (function.name, function.doing)
    for text in texts:
        if sum(letter.isalpha() for letter in _without_gaps(text)) >= 4:  # else it passes a message on
            yield ErrorMessage(kind, " ".join(text.split()), path, getattr(node, "lineno", 0), name, doing)


def _unique(messages: Iterable[ErrorMessage]) -> Iterator[ErrorMessage]:
    seen: set[tuple[str, str]] = set()
    for message in messages:
        if (message.kind, message.text) not in seen:
            seen.add((message.kind, message.text))
            yield message


@dataclass(frozen=True)
class _Scope:
    """The place where a text is read, and the texts of a function's arguments."""

    path: str
    function: Function | None
    given: Mapping[str, Texts] = field(default_factory=dict)
    depth: int = 0

    def assigned(self, name: str) -> list[ast.expr]:
        """Return what a name is assigned to in the function, or in its module."""
        for node in ([] if self.function is None else [self.function.node]) + [source().trees[self.path]]:
            whole = isinstance(node, ast.FunctionDef)
            found = [value for each in (ast.walk(node) if whole else node.body) for value in _values_of(each, name)]
            if found:
                return found
        return []


def _values_of(node: ast.AST, name: str) -> list[ast.expr]:
    if not isinstance(node, ast.Assign) or len(node.targets) != 1:
        return []
    target, value = node.targets[0], node.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        pairs = zip(target.elts, value.elts, strict=True)
    else:
        pairs = iter([(target, value)])
    return [given for each, given in pairs if isinstance(each, ast.Name) and each.id == name]


def _read(node: ast.expr | None, scope: _Scope) -> Texts:
    """Return the texts that an expression may have."""
    match node:
        case ast.Constant(value=value):
            return [str(value)]
        case ast.JoinedStr(values=values):
            return _joined([_read(value, scope) for value in values])
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _joined([_read(left, scope), _read(right, scope)])
        case ast.IfExp(body=body, orelse=otherwise):
            both = [*_read(body, scope), *_read(otherwise, scope)]
            return [text for text in both if text.strip()][:_MOST] or [""]
        case ast.FormattedValue(value=value):
            return _read(value, scope)
        case ast.Name(id=name) if name in scope.given:
            return scope.given[name]
        case ast.Name(id=name) if scope.depth < 4:
            deeper = replace(scope, depth=scope.depth + 1)
            values = [value for value in scope.assigned(name) if _is_text(value)]
            texts = [text for value in values for text in _read(value, deeper)]
            return [text for text in texts if _without_gaps(text)][:_MOST] or [_gap(name.strip("_"))]
        case ast.Subscript(value=ast.Call(func=ast.Attribute(attr="partition", value=value))):
            return _read(value, scope)
        case ast.Call() if scope.depth < 4 and (result := _result(node, scope)):
            return result
        case None:
            return [""]
        case _:
            return [_gap(_named(node))]


def _is_text(node: ast.expr) -> bool:
    """Return true for what is written as text: literals, sums, choices and calls that may return one."""
    return isinstance(node, ast.JoinedStr | ast.IfExp | ast.Call | ast.BinOp) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _result(call: ast.Call, scope: _Scope) -> Texts:
    """Return the texts that a function of the package returns, if they are mostly written there; else nothing."""
    function = source().find(call, scope.path)
    if function is None or function.path == "core/errors.py":
        return []
    returns = [node.value for node in ast.walk(function.node) if isinstance(node, ast.Return)]
    inner = _Scope(function.path, function, _bound(function, call, scope), scope.depth + 1)
    texts = [text for value in returns if value is not None and _is_text(value) for text in _read(value, inner)]
    written = [text for text in texts if sum(map(str.isalpha, _without_gaps(text))) >= _SHORTEST and " " in text]
    return written[:_MOST] if len(written) == len(texts) else []


def _bound(function: Function, call: ast.Call, scope: _Scope) -> dict[str, Texts]:
    """Return the texts of a call's arguments by the names of the parameters."""
    given = dict(zip(function.parameters, call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    read = {name: _read(value, scope) for name, value in given.items() if not isinstance(value, ast.Starred)}
    return {name: [text if _without_gaps(text) else _gap(name) for text in texts] for name, texts in read.items()}


def _joined(parts: list[Texts]) -> Texts:
    texts = [""]
    for part in parts:
        texts = [before + after for before in texts for after in part][:_MOST]
    return texts


def _gap(name: str) -> str:
    return f"{OPEN}{name}{CLOSE}"


def _named(node: ast.AST | None) -> str:
    """Return a name for the value of an expression, as `path` for `shown(self.path)`."""
    match node:
        case ast.Name(id=name):
            return name.strip("_")
        case ast.Attribute(attr=name, value=value):
            return name.strip("_") if name not in ("name", "shape", "dtype", "value") else f"{_named(value)} {name}"
        case ast.Subscript(value=value):
            return _named(value)
        case ast.Call(func=ast.Name(id="len"), args=[value]):
            return f"number of {_named(value)}"
        case ast.Call(func=ast.Name(id="type")):
            return "type"
        case ast.Call(func=ast.Attribute(attr="join"), args=[value]):
            return _named(value)
        case ast.Call(args=[value, *_]) if not isinstance(value, ast.Constant):
            return _named(value)
        case ast.Call(func=function):
            return _named(function)
        case ast.GeneratorExp(elt=value) | ast.ListComp(elt=value) | ast.Starred(value=value):
            return _named(value)
        case ast.BinOp(left=left, right=right):
            return _named(right) if isinstance(left, ast.Constant) else _named(left)
    return "value"


def _without_gaps(text: str) -> str:
    while OPEN in text:
        before, _, rest = text.partition(OPEN)
        text = before + rest.partition(CLOSE)[2]
    return text


def _cut(text: str, *marks: str) -> str:
    """Return the text up to the first of some marks that has a few words of its own before it."""
    ends = [at for mark in marks if (at := text.find(mark)) > 0 and len(_without_gaps(text[:at]).split()) > 1]
    return text[: min(ends)] if ends else text.rstrip(".")
