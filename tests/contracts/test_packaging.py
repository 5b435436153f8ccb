"""What is installed from a wheel is everything that a checkout has: every package, and every file that code reads."""

import re
import tomllib
from pathlib import Path

from moezoo.bench.configs import NAMES, config_path
from moezoo.core.recipes import list_recipes

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def shipped(package: str) -> set[Path]:
    """Data files of a package that lies in another folder of the checkout."""
    folder = ROOT / SETUPTOOLS["package-dir"][package]
    return {path for pattern in SETUPTOOLS["package-data"][package] for path in folder.glob(pattern)}


def test_every_folder_with_code_is_a_package_of_the_wheel():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "moezoo").rglob("*.py")}
    of_code = {".".join(folder.parts) for folder in folders}
    of_data = set(SETUPTOOLS["package-dir"]) - {"moezoo"}
    assert set(SETUPTOOLS["packages"]) == of_code | of_data
    assert of_data == set(SETUPTOOLS["package-data"]) - {"moezoo"}


def test_the_wheel_says_that_it_is_typed():
    assert SETUPTOOLS["package-data"]["moezoo"] == ["py.typed"]
    assert (ROOT / "moezoo" / "py.typed").is_file()


def test_every_module_that_is_imported_is_in_a_package_of_the_wheel():
    """Whatever the folders are: a name in an import statement leads to a file of a listed package."""
    packages = set(SETUPTOOLS["packages"])
    for path in (ROOT / "moezoo").rglob("*.py"):
        for module in re.findall(r"^\s*(?:from|import) (moezoo[\w.]*)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert module in packages or module.rpartition(".")[0] in packages, f"{path}: {module}"


def test_configs_and_recipes_that_code_reads_are_in_the_wheel():
    assert {config_path(name) for name in NAMES} <= shipped("moezoo.configs")
    recipes = {ROOT / "datasets" / recipe.name / "recipe.yaml" for recipe in list_recipes()}
    assert recipes
    assert recipes <= shipped("moezoo.datasets")
