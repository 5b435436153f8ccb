"""The source of moezoo as syntax trees, for tests that need no framework."""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "moezoo"
BACKENDS = ("jax", "mlx")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def stems(folder: str) -> set[str]:
    """File stems of a folder of the package, but `__init__`."""
    return {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}


def backend_file(backend: str, stem: str) -> Path:
    return PACKAGE / f"{backend}_backend" / f"{stem}.py"


def functions(tree: ast.Module) -> dict[str, Function]:
    """Every function by dotted name: `dispatch`, `MoE.__call__`, `grouped_product.inner`."""
    found: dict[str, Function] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                found[prefix + child.name] = child
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            else:
                visit(child, prefix)

    visit(tree, "")
    return found


AMBIGUOUS = {"dtype", "norm"}  # arrays have them too: counted where the owner is named as a part of the spec
OWNERS = {"spec", "model", "layer", "router"}


def attribute_reads(tree: ast.AST) -> set[str]:
    """Names read as `x.name`, or matched as `Part(name=...)`."""
    read: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.MatchClass):
            read.update(node.kwd_attrs)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = ast.unparse(node.value).rpartition(".")[2]
            if node.attr not in AMBIGUOUS or owner in OWNERS:
                read.add(node.attr)
    return read
