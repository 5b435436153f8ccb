"""A wheel holds everything that a checkout has: every package, and every file that code reads."""

import glob
import tomllib
from pathlib import Path

import pytest
import yaml
from setuptools import find_namespace_packages

import moezoo
from moezoo.backends import PACKAGES as OF_BACKENDS
from moezoo.bench.configs import NAMES, config_path
from moezoo.core.data.datasets import list_recipes
from moezoo.core.extras import EXTRAS

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
PACKAGES = set(find_namespace_packages(str(ROOT), **SETUPTOOLS["packages"]["find"]))


def shipped(package: str) -> set[Path]:
    """Data files of a package that the wheel holds."""
    folder = ROOT / package.replace(".", "/")
    return {path for pattern in SETUPTOOLS["package-data"][package] for path in folder.glob(pattern)}


def test_every_folder_with_code_is_a_package_of_the_wheel():
    folders = {path.parent for path in (ROOT / "moezoo").rglob("*.py")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} <= PACKAGES
    assert all((folder / "__init__.py").is_file() for folder in folders)


@pytest.mark.parametrize("folder", ["configs", "datasets"])
def test_folders_of_the_checkout_are_links_inside_the_package(folder):
    assert (ROOT / "moezoo" / folder).resolve() == ROOT / folder
    assert f"moezoo.{folder}" in PACKAGES


def test_configs_and_recipes_that_code_reads_are_in_the_wheel():
    assert {config_path(name) for name in NAMES} <= shipped("moezoo.configs")
    names = {path.parent.name for path in shipped("moezoo.datasets") if path.name == "recipe.yaml"}
    assert names == {recipe.name for recipe in list_recipes()} != set()


def test_assets_of_the_explorer_are_in_the_wheel():
    assets = ROOT / "moezoo" / "core" / "explorer" / "assets"
    assert set(assets.iterdir()) == shipped("moezoo.core.explorer") != set()


def test_every_file_beside_the_code_is_in_the_wheel():
    """Built and installed, the wheel is tested before a release: tests/cli/test_wheel.py."""
    found = {Path(path) for path in glob.glob(str(ROOT / "moezoo" / "**"), recursive=True)}
    others = {path for path in found if path.is_file() and path.suffix not in (".py", ".pyc")}
    held = {path for package in SETUPTOOLS["package-data"] for path in shipped(package)}
    assert others - held == {ROOT / "moezoo" / "datasets" / "README.md"}


def test_the_package_says_that_it_has_types():
    assert (ROOT / "moezoo" / "py.typed").is_file()
    assert "py.typed" in SETUPTOOLS["package-data"]["moezoo"]


def test_there_is_one_version_number():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "moezoo.__version__"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == moezoo.__version__


def test_every_optional_package_has_an_extra_that_installs_it():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) <= set(extras)
    assert {package for packages in OF_BACKENDS.values() for package in packages} <= set(EXTRAS)
