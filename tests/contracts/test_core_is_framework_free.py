import ast
import os
import subprocess
import sys

import pytest

from tests.support.source_tree import PACKAGE, tree_of

FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "orbax", "mlx", "torch", "tensorflow"}
BESIDE = ("__init__.py", "cli.py", "cli_options.py", "backends.py")
CORE = sorted([*(PACKAGE / "core").rglob("*.py"), *(PACKAGE / name for name in BESIDE)])
# Slow to import; only a function that needs one imports it.
LATE = {"transformers", "matplotlib"}


def module_of(path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(nodes) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", CORE, ids=module_of)
def test_no_framework_is_imported_in_core(path):
    names = imported(ast.walk(tree_of(path)))
    assert {name for name in names if name.split(".")[0] in FRAMEWORKS} == set()
    if path.name != "backends.py":
        assert {name for name in names if name.startswith(("moezoo.jax_backend", "moezoo.mlx_backend"))} == set()


@pytest.mark.parametrize("path", CORE, ids=module_of)
def test_slow_libraries_are_imported_late(path):
    at_import = [node for node in tree_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {name for name in imported(at_import) if name.split(".")[0] in LATE} == set()


def test_importing_all_of_core_loads_no_framework():
    """In a fresh process, module by module, so that the failure names the first that loads one."""
    modules = [module_of(path) for path in CORE]
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
