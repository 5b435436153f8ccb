"""The wheel: its files, and the README's commands with it installed, outside of a checkout."""

import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import moezoo
from tests.cli.test_tour import OTHER_TEXT, SHORTENED
from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.backends_available import require_backend
from tests.support.fixtures import write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.release]

ROOT = Path(__file__).parents[2]
# The first line of each command: what runs is what was installed.
CHECK = "import moezoo\nassert 'site-packages' in moezoo.__file__, moezoo.__file__\n"
BUILD = "from setuptools import build_meta; import sys; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"


def built(kind: str, source: Path, folder: Path) -> Path:
    """Return the distribution that the build backend makes of a source, as pip has it made."""
    words = [sys.executable, "-c", BUILD, kind, str(folder)]
    done = subprocess.run(words, cwd=source, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source distribution of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("moezoo", "configs", "datasets"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    with tarfile.open(built("sdist", source, folder)) as archive:
        archive.extractall(folder, filter="data")
    return built("wheel", folder / f"moezoo-{moezoo.__version__}", folder)


def test_the_wheel_holds_the_files_of_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    found = map(Path, glob.glob(str(ROOT / "moezoo" / "**"), recursive=True))  # follows links, unlike `rglob`
    expected = {path.relative_to(ROOT).as_posix() for path in found if path.is_file() and path.suffix != ".pyc"}
    assert names == expected - {"moezoo/datasets/README.md"}
    assert {"moezoo/py.typed", "moezoo/configs/fables.yaml"} <= names
    assert not any("test" in name for name in names)


def test_the_tour_runs_with_the_installed_wheel_outside_of_a_checkout(wheel: Path, tmp_path: Path) -> None:
    """Dependencies are those of this environment, so that no network is needed; moezoo is the wheel's alone."""
    require_backend("jax")
    require_backend("mlx")
    scripts = tmp_path / ".venv" / "bin"
    for words in (
        [sys.executable, "-m", "venv", str(tmp_path / ".venv")],
        [str(scripts / "python"), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)],
    ):
        subprocess.run(words, check=True, timeout=300)
    packages = next((tmp_path / ".venv" / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    shown = subprocess.check_output([str(scripts / "moezoo"), "--version"], cwd=tmp_path, text=True)
    assert shown.startswith(f"moezoo {moezoo.__version__}\n")

    (packages / "sitecustomize.py").write_text(OTHER_TEXT, encoding="utf-8")
    (scripts / "moezoo").write_text(f"#!{scripts}/python\n{CHECK}{SHORTENED}", encoding="utf-8")
    (tmp_path / "text.txt").write_text("".join(f"ROMEO: To be, or not to see {n} owls.\n" for n in range(800)))
    (tmp_path / "some.txt").write_text("the cat sat on the mat and the dog ran to the cat. " * 20)
    write_tokenizer(write_checkpoint("qwen3_moe", tmp_path / "model"))
    data = tmp_path / "data" / "tiny_shakespeare"
    data.mkdir(parents=True)
    shutil.copy(tmp_path / "text.txt", data / "tiny_shakespeare.txt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "MOEZOO_CACHE": str(tmp_path / "cache"),
        "MOEZOO_DATA": str(tmp_path / "data"),
    }
    for block in tour():
        done = subprocess.run(
            ["bash", "-exc", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, done.stderr[-3000:]


def tour() -> list[str]:
    """Return the commands of the README's first screen and tour; a config is named, since no file of it is near."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Parts\n")[0]
    text = re.sub(r"\bconfigs/(\S+)\.yaml", r"\1", re.sub(r"\b(org|path/to)/model\b", "model", text))
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in ("", "console")]
