"""Mutants of every small file of a Hugging Face folder and of a run: it opens, or there is one line of error."""

import contextlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from moezoo.core.checkpoint.manifest import manifest_digest
from moezoo.core.errors import MoezooError
from moezoo.core.json_text import parse_json
from moezoo.core.runs.convert import convert
from moezoo.core.runs.open import describe_model, open_model
from moezoo.core.training.metrics import read_metrics
from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.fixtures import write_checkpoint
from tests.support.hostile import at_most, json_mutant, mutant

MUTANTS = int(os.environ.get("MOEZOO_MUTANTS", "25"))
TEXT = [".json", ".jsonl", ".jinja", ".yaml"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Hugging Face checkpoint with tokenizer, template and generation settings, and the run that it converts to."""
    place = tmp_path_factory.mktemp("hostile")
    write_checkpoint("mixtral", place / "huggingface", shards=2)
    write_tokenizer(place / "huggingface")
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 5, "eos_token_id": [2, 3]}
    (place / "huggingface" / "generation_config.json").write_text(json.dumps(settings))
    convert(place / "huggingface", place / "run")
    lines = [{"kind": "train", "step": step, "loss": 4.0 - step} for step in range(1, 4)]
    (place / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def use(path):
    """Read everything that commands read of a run or a checkpoint."""
    describe_model(path)
    opened = open_model(path)
    opened.generation.options()
    for name in opened.weights:
        assert np.asarray(opened.weights[name]).shape == opened.weights.shapes[name]
    opened.tokenizer.decode(opened.tokenizer.encode("the cat sat"))
    opened.tokenizer.encode_chat([{"role": "user", "content": "the cat"}])
    read_metrics(Path(path) / "metrics.jsonl")


def problem_of(path):
    with at_most(60):
        try:
            use(path)
        except MoezooError as error:
            return str(error)
    return None


def spoil(path, draw):
    """Change one file of a folder, and in half of the cases what protects it."""
    file = draw.choice(sorted(file for file in path.rglob("*") if file.suffix in TEXT))
    change = draw.choice([mutant, json_mutant]) if file.suffix == ".json" else mutant
    content = change(file.read_bytes(), draw)
    if draw.random() < 0.5:
        (path / "manifest.json").unlink(missing_ok=True)  # as in a run of an earlier version
        with contextlib.suppress(ValueError, AttributeError):
            value = parse_json(content)
            if value.pop("sha256", None) is not None:
                content = json.dumps({**value, "sha256": manifest_digest(value)}).encode()
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["huggingface", "run"])
def test_mutants_open_or_are_one_line(folders, tmp_path, kind):
    """`MOEZOO_MUTANTS=3000` runs more than the gate does."""
    assert problem_of(folders / kind) is None
    draw, problems = random.Random(kind), []
    for _ in range(MUTANTS):
        shutil.rmtree(tmp_path / kind, ignore_errors=True)
        shutil.copytree(folders / kind, tmp_path / kind)
        spoil(tmp_path / kind, draw)
        problems.append(problem_of(tmp_path / kind))
    found = [problem for problem in problems if problem is not None]
    lines = [line for problem in found for line in problem.splitlines()]  # a config can have several problems
    assert [line for line in lines if len(line) > 1_200] == []
    assert max(problem.count("\n") for problem in found) <= 20
    assert len(set(found)) > MUTANTS // 3
