"""The two backends say the same: files, public names, parameters, einsum strings. Needs neither framework."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.source_tree import BACKENDS, PACKAGE, Function, backend_file, functions, stems, tree_of

FOLDERS = {"kernels", "distributed", "transforms", "runtime", "planning"}
PROTOCOL = {"backend", "inference", "training", "model"}  # files that hand mesh and processes to the others
SEAMS = {
    "runtime.placement": {"row_by_row", "look_up"},
    "runtime.processes": {"on_host"},
    "runtime.typed": {"GraphDef", "State", "custom_function", "flatten", "to_float", "to_int", "to_ints"},
    "distributed.data_parallel": {"average", "first_draw", "total"},
}
OF_MACHINES = re.compile("platform|x86|default_(device|backend)|process|[Mm]esh|[Ss]hard|(?<!norm_)placement|Partition")
ONLY_JAX_PARAMETERS = {"placement=", "group="}  # a mesh of devices
SHARED = sorted(stems("jax_backend"))
ALPHABET = set("BTSDNMGHZECKFPRVLJIU")
FAMILIES = (
    *("mixtral", "mistral", "qwen", "deepseek", "olmoe", "gpt_oss", "granite", "glm4", "minimax", "phimoe"),
    *("llama", "gemma", "ernie", "hunyuan", "longcat"),
)


def public_surface(backend: str, stem: str) -> dict[str, list[str]]:
    """Public classes and functions, the methods of the former, each with its parameter names."""
    surface: dict[str, list[str]] = {}
    for node in tree_of(backend_file(backend, stem)).body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            surface[node.name] = parameters(node)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            name = without_prefix(node.name)
            surface[name] = []
            for method in node.body:
                if isinstance(method, Function) and (method.name.startswith("__") or not method.name.startswith("_")):
                    surface[f"{name}.{method.name}"] = parameters(method)
    # An __init__ that takes nothing is as good as none.
    return {name: names for name, names in surface.items() if not (name.endswith(".__init__") and names == ["self"])}


def without_prefix(name: str) -> str:
    return re.sub("Jax|Mlx", "", name)


def parameters(function: Function) -> list[str]:
    """Parameter names in order; keyword-only ones after a star; a default is told by `=`."""
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    without_default = len(positional) - len(spec.defaults)
    names = [each.arg + ("=" if place >= without_default else "") for place, each in enumerate(positional)]
    if spec.kwonlyargs:
        names.append("*")
        names += [
            each.arg + ("=" if default is not None else "")
            for each, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
        ]
    return names


def einsums(function: Function) -> list[str]:
    """First arguments of all `*.einsum` calls in order, nested functions left to themselves."""
    found = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                continue
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and child.func.attr == "einsum":
                assert isinstance(child.args[0], ast.Constant), f"line {child.lineno}: an einsum without a plain string"
                found.append(child.args[0].value)
            visit(child)

    visit(function)
    return found


def uses_fast_kernels(function: Function) -> bool:
    return any(
        ast.unparse(node).startswith("mx.fast.") for node in ast.walk(function) if isinstance(node, ast.Attribute)
    )


def test_both_backends_have_the_same_loose_files():
    """A file without a twin belongs into one of the folders of FOLDERS."""
    assert stems("jax_backend") == stems("mlx_backend")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_has_folders_for_files_without_a_twin_alone(backend):
    found = {path.parent.name for path in (PACKAGE / f"{backend}_backend").glob("*/*.py")}
    assert found <= FOLDERS


@pytest.mark.parametrize("stem", SHARED)
def test_twins_have_the_same_public_names_and_parameters(stem):
    jax = {
        name: [parameter for parameter in own if parameter not in ONLY_JAX_PARAMETERS]
        for name, own in public_surface("jax", stem).items()
    }
    assert jax == public_surface("mlx", stem)


@pytest.mark.parametrize("stem", SHARED)
def test_twins_have_the_same_einsums_function_by_function(stem):
    """But an MLX function that calls a fused kernel, which has them inside."""
    jax, mlx = (
        {without_prefix(name): function for name, function in functions(tree_of(backend_file(backend, stem))).items()}
        for backend in BACKENDS
    )
    for name in sorted(set(jax) | set(mlx)):
        of_jax, of_mlx = (einsums(twin[name]) if name in twin else [] for twin in (jax, mlx))
        if name in mlx and uses_fast_kernels(mlx[name]):
            assert set(of_mlx) <= set(of_jax), name
        else:
            assert of_mlx == of_jax, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_einsums_are_those_of_the_reference_or_left_to_a_kernel(backend):
    """Every einsum of a backend stands, letter by letter, in the reference's file of the same stem."""
    for stem in sorted(stems("core/reference") & set(SHARED)):
        of_reference = {
            string
            for function in functions(tree_of(PACKAGE / "core" / "reference" / f"{stem}.py")).values()
            for string in einsums(function)
        }
        for name, function in functions(tree_of(backend_file(backend, stem))).items():
            assert set(einsums(function)) <= of_reference, f"{stem}.{name}"


@pytest.mark.parametrize("folder", ["core/reference", "jax_backend", "mlx_backend"])
def test_einsums_use_the_alphabet_of_dimensions(folder):
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        for name, function in functions(tree_of(path)).items():
            for string in einsums(function):
                letters = set(re.sub(r"\.\.\.|,|->", "", string).upper())
                assert letters <= ALPHABET, f"{path.stem}.{name}: {string}"


@pytest.mark.parametrize("stem", ["routing", "dispatch"])
def test_tuples_at_the_seam_have_the_references_fields(stem):
    """But margins: only the reference judges how sure a choice was."""

    def fields(path) -> list[str]:
        (seam,) = (
            node
            for node in tree_of(path).body
            if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["NamedTuple"]
        )
        return [ast.unparse(line.target) for line in seam.body if isinstance(line, ast.AnnAssign)]

    expected = [name for name in fields(PACKAGE / "core" / "reference" / f"{stem}.py") if name != "margin_P"]
    assert [fields(backend_file(backend, stem)) for backend in BACKENDS] == [expected, expected]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_family_is_named_under_a_backend(backend):
    for path in sorted((PACKAGE / f"{backend}_backend").rglob("*.py")):
        text = path.read_text(encoding="utf-8").lower()
        assert [family for family in FAMILIES if family in text] == [], path.name


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_public_twin_of_the_reference_says_so(backend):
    """A public name that the reference's file has too carries `Spec:`; so does the module."""
    for stem in sorted(stems("core/reference")):
        of_reference = public_nodes(PACKAGE / "core" / "reference" / f"{stem}.py")
        path = backend_file(backend, stem)
        assert "Spec:" in (ast.get_docstring(tree_of(path)) or ""), path.name
        for name, node in public_nodes(path).items():
            assert name not in of_reference or "Spec:" in (ast.get_docstring(node) or ""), f"{stem}.{name}"


def public_nodes(path: Path) -> dict[str, Function | ast.ClassDef]:
    return {
        node.name: node
        for node in tree_of(path).body
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stem", sorted(set(SHARED) - PROTOCOL))
def test_a_shared_stem_is_code_for_one_device(stem, backend):
    """It asks for no platform, and knows no mesh or process: kernels, and the few names of SEAMS, do so for it."""
    tree = tree_of(backend_file(backend, stem))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"moezoo.{backend}_backend."):
            folder, _, module = (node.module or "").split(".", 2)[2].rpartition(".")
            if folder in FOLDERS - {"kernels"}:
                assert {alias.name for alias in node.names} <= SEAMS.get(f"{folder}.{module}", set()), node.lineno
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert [name for name in sorted(names) if OF_MACHINES.search(name)] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_public_twin_names_the_reference_that_specifies_it(backend):
    """`Spec: moezoo.core.reference.<stem>.<name>` in the docstring, and that it exists."""
    for path in sorted((PACKAGE / f"{backend}_backend").rglob("*.py")):
        for name in re.findall(r"Spec: (moezoo\.core\.reference\.[\w.]+\w)", path.read_text(encoding="utf-8")):
            parts = name.removeprefix("moezoo.core.reference.").split(".")
            tree = tree_of(PACKAGE / "core" / "reference" / f"{parts[0]}.py")
            known = {node.name for node in tree.body if isinstance(node, Function | ast.ClassDef)}
            assert len(parts) == 1 or parts[1] in known, f"{path.name}: {name}"
