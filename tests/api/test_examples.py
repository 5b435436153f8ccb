"""The examples in the docstrings of the Python API, run in a folder with `runs/owls` and a model that can chat."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest

import moezoo
import moezoo.api
from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.fixtures import write_checkpoint

MODULES = ["moezoo", *(f"moezoo.api.{module.name}" for module in pkgutil.iter_modules(moezoo.api.__path__))]


def test_the_examples_run_as_printed(owls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(write_checkpoint("mixtral", owls / "models" / "tiny"))
    monkeypatch.chdir(owls)
    monkeypatch.setenv("BACKEND", "mlx")
    given = {"moezoo": moezoo, "np": np}
    results = [doctest.testmod(importlib.import_module(name), extraglobs=given) for name in MODULES]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) > 12
