"""The rules of the folder tree: imports run one way, core knows no backend, and the twins have equal stems.

`writings/architecture.md` draws the layers. These tests read the source and need neither framework.
"""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support.source_tree import BACKENDS, PACKAGE, stems, tree_of

# A module may import from its own layer and from those above its line, never from below. Modules of one row do not
# import each other.
LAYERS = (
    ("core.errors",),
    ("core.extras",),
    (
        "core.files",
        "core.garbage",
        "core.json_text",
        "core.limited_process",
        "core.malloc",
        "core.progress",
        "core.random",
        "core.reuse",
        "core.signals",
        "core.tokens",
    ),
    ("core.hub", "core.quantization"),
    ("core.spec",),
    ("core.parameters",),
    ("core.distributed",),
    ("core.config",),
    ("core.layer_routing", "core.reference"),
    ("core.backend", "core.checkpoint", "core.cost", "core.data"),
    ("core.generation", "core.huggingface", "core.traces"),
    ("core.analysis", "core.runs"),
    ("core.training",),
    ("core.doctor", "core.explorer", "core.interventions", "core.parity", "core.reports", "core.trackers"),
    ("core.comparison",),
    ("jax_backend", "mlx_backend"),
    ("backends",),
    ("api",),
    ("moezoo", "server"),
    ("evaluation_harness",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
WITHOUT_TWIN = ("kernels", "distributed", "transforms", "runtime", "planning")
FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "orbax", "mlx", "torch", "tensorflow"}
LATE = {
    "transformers",
    "matplotlib",
    "tensorboard",
    "wandb",
    "trackio",
    "starlette",
    "uvicorn",
}  # slow to import: only a function that needs one imports it
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}
NEEDS_AN_EXTRA = ("moezoo.jax_", "moezoo.mlx_", "moezoo.bench", "moezoo.evaluation_harness.model")
FRAMEWORK_FREE = [path for path in FILES if not module_of(path).startswith(NEEDS_AN_EXTRA)]


def unit_of(module: str) -> str:
    """Return the unit of LAYERS that a module belongs to: `moezoo.core.data.prepare` to `core.data`."""
    parts = module.split(".")[1:]
    if not parts:
        return "moezoo"
    return ".".join(parts[:2]) if parts[0] == "core" and len(parts) > 1 else parts[0]


@cache
def imports_of(module: str) -> list[tuple[str, str]]:
    """Return (module, name) of every import of moezoo's own names, those inside functions included."""
    found = []
    for node in ast.walk(tree_of(MODULES[module])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moezoo":
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner, "") if inner in MODULES else (node.module, alias.name))
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "moezoo"]
    return found


def frameworks_of(nodes: object) -> set[str]:
    """Return the top-level packages that import statements name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_every_module_belongs_to_a_layer():
    units = {unit_of(module) for module in MODULES} - {"core"}
    assert units == set(LEVEL)


def test_imports_run_one_way():
    """No import from a lower layer to a higher one, or from a folder to its neighbor of the same layer."""
    upward = [
        f"{module} imports {target}"
        for module in sorted(MODULES)
        for target, _ in imports_of(module)
        if (own := unit_of(module)) not in ("core", "moezoo") and (unit := unit_of(target)) != own
        if LEVEL[unit] >= LEVEL[own]
    ]
    assert upward == []


def test_modules_import_each_other_in_no_circle():
    """Imports inside functions count: they only hide a circle."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target, _ in imports_of(module):
                if target != module and target != "moezoo":
                    visit(target, (*path, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())


def test_core_knows_neither_a_backend_nor_what_uses_it():
    above = {"backends", "api", "cli", "bench", "jax_backend", "mlx_backend", "moezoo"}
    core = [module for module in MODULES if module.startswith("moezoo.core")]
    assert [(module, target) for module in core for target, _ in imports_of(module) if unit_of(target) in above] == []


def test_private_names_are_not_imported_across_modules():
    private = [(module, target, name) for module in MODULES for target, name in imports_of(module) if name[:1] == "_"]
    assert private == []


def test_backends_have_the_same_loose_stems():
    jax, mlx = (stems(f"{backend}_backend") for backend in BACKENDS)
    assert jax == mlx


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_no_twin_lies_in_a_named_folder(backend):
    folders = {path.name for path in (PACKAGE / f"{backend}_backend").iterdir() if (path / "__init__.py").is_file()}
    assert folders <= set(WITHOUT_TWIN)


def test_no_framework_is_imported_outside_the_backends():
    named = {module_of(path): frameworks_of(ast.walk(tree_of(path))) & FRAMEWORKS for path in FRAMEWORK_FREE}
    assert {module: names for module, names in named.items() if names} == {}


def test_slow_libraries_are_imported_late():
    for path in FRAMEWORK_FREE:
        at_import = [node for node in tree_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert frameworks_of(at_import) & LATE == set(), module_of(path)


def test_rich_progress_is_imported_only_by_the_progress_of_the_command_line():
    importing = [
        module_of(path)
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and node.module == "rich.progress"
    ]
    assert importing == ["moezoo.cli.progress"]


def test_functions_and_files_fit_a_reader():
    """At most 60 lines per function and 400 per file, except in kernels."""
    long = []
    for path in FILES:
        if "kernels" in path.parts:
            continue
        lines = len(path.read_text(encoding="utf-8").splitlines())
        long += [f"{module_of(path)}: {lines} lines"] if lines > 400 else []
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                long += [f"{module_of(path)}.{node.name}: {lines} lines"] if lines > 60 else []
    assert long == []


def test_importing_everything_but_the_backends_loads_no_framework():
    """In a fresh process, module by module, so that the failure names the first that loads one."""
    modules = [module_of(path) for path in FRAMEWORK_FREE if path.name != "__main__.py"]
    program = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    loaded = {FRAMEWORKS | LATE!r} & set(sys.modules)
    if loaded:
        sys.exit(f"import {{name}} loads {{', '.join(sorted(loaded))}}")
"""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
