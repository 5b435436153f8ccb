"""All attacks, on subjects that are made once in a work folder."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml

from moezoo.core.config.run_config import load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.data.prepare import prepare_data
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.runs.init_from import load_resolved_config
from moezoo.core.runs.open import open_model
from moezoo.core.runs.save import save_run
from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.fixtures import write_checkpoint
from tests.support.small_run import write_config
from tests.torture.files import Damage, Subject, flip, mutate, read_batches, read_model, replace
from tests.torture.outcome import Outcome
from tests.torture.processes import ATTEMPTS, WAYS, Attack, Training


class Attacker(Protocol):
    """A series of attempts of one kind."""

    name: str

    def run(self, number: int, seed: int) -> Outcome:
        """Make attempt `number` and say how it ended."""
        ...


def attackers(work: Path, *, sharded: bool = True) -> list[Attacker]:
    """Return all attacks; their subjects are made below `work`, afresh.

    `sharded`: also damage sharded checkpoints, for which a mesh trains first.
    """
    shutil.rmtree(work, ignore_errors=True)
    trainings = [Training(work / way.name, way) for way in WAYS]
    found: list[Attacker] = [*file_attackers(work, sharded=sharded)]
    return found + [Attack(name, training, attempt) for name, attempt in ATTEMPTS.items() for training in trainings]


def file_attackers(work: Path, *, sharded: bool) -> list[Damage]:
    """Return the attacks on files at rest."""
    subjects = {"run": _run(work), "fine-tuned run": _fine_tuned(work), "cache": _cache(work)}
    if sharded:
        subjects["sharded run"] = _sharded(work)
    found = [Damage(f"flip, {name}", subject, flip) for name, subject in subjects.items()]
    found.append(Damage("flip, checkpoint", subjects.setdefault("checkpoint", _checkpoint(work)), flip))
    subjects |= {"config and text": _config(work), "token shards": _token_shards(work)}
    for name, subject in subjects.items():
        found += [Damage(f"mutation, {name}", subject, mutate), Damage(f"replaced, {name}", subject, replace)]
    return found


def _run(work: Path) -> Subject:
    """A run with a character tokenizer and its metrics."""
    folder = work / "run"
    (work / "run_source").mkdir(parents=True)
    os.environ["MOEZOO_CACHE"] = str(work / "run_source" / "cache")
    config = load_config(write_config(work / "run_source"))
    data = prepare_data(config.data, config.training.sequence_length)
    config = with_vocab_size(config, data.tokenizer.vocab_size)
    save_run(folder, config, data.tokenizer, initial_weights(config.model, 0), 3, None)
    return Subject(folder, "", partial(read_model, folder), checked=True)


def _sharded(work: Path) -> Subject:
    """A run on a mesh, with checkpoints in shards."""
    training = Training(work / "sharded", WAYS[-1])
    status, output = training.finish(training.start())
    assert status == 0, output
    return Subject(training.run, "", partial(read_model, training.run, resumes=True), checked=True)


def _published(folder: Path) -> Path:
    write_tokenizer(write_checkpoint("qwen3_moe", folder, shards=2))
    return folder


def _fine_tuned(work: Path) -> Subject:
    """A run that started from a published checkpoint, with copies of its tokenizer and its files."""
    base, folder = _published(work / "base"), work / "fine_tuned"
    opened = open_model(base)
    weights = {name: np.asarray(opened.weights[name], np.float32) for name in opened.weights}
    save_run(folder, opened.config, opened.tokenizer, weights, 3, opened.layout)
    return Subject(folder, "", partial(read_model, folder), checked=True)


def _checkpoint(work: Path) -> Subject:
    folder = _published(work / "checkpoint")
    return Subject(folder, "", partial(read_model, folder), checked=False)


def _cache(work: Path) -> Subject:
    """The cache of tokenized text, read as training does."""
    folder = work / "cached"
    folder.mkdir()
    path = write_config(folder)
    read = _with_cache(folder / "cache", partial(read_batches, path))
    read()
    return Subject(folder, "cache", read, checked=True)


def _config(work: Path) -> Subject:
    """A config, its text and its documents, which have no digests."""
    folder = work / "config"
    folder.mkdir()
    path = write_config(folder)
    lines = [json.dumps({"text": f"{number} owls saw mice. "}) for number in range(200)]
    (folder / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    _change_data(path, {"kind": "jsonl", "path": str(folder / "documents.jsonl")})
    return Subject(folder, "", _with_cache(folder / "cache", lambda: _resolved(path)), checked=False)


def _token_shards(work: Path) -> Subject:
    """A config with shards of token ids in both formats."""
    folder = work / "shards"
    folder.mkdir()
    ids = np.random.default_rng(0).integers(0, 40, 4000).astype(np.uint16)
    np.save(folder / "a.npy", ids)
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    (folder / "b.bin").write_bytes(header.tobytes() + ids.tobytes())
    path = write_config(folder)
    sources = [{"kind": "tokens", "path": str(folder / name)} for name in ("a.npy", "b.bin")]
    _change_data(path, *sources, sources=[], tokenizer={"kind": "ids", "vocab_size": 40})
    return Subject(folder, "", _with_cache(folder / "cache", lambda: _resolved(path)), checked=False)


def _change_data(path: Path, *sources: object, **data: object) -> None:
    """Change the `data` section of a config file, and append sources."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["data"] |= data
    config["data"]["sources"] += sources
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def _resolved(path: Path) -> str:
    return repr(load_resolved_config(path)) + read_batches(path)


def _with_cache(cache: Path, read: Callable[[], str]) -> Callable[[], str]:
    def reading() -> str:
        os.environ["MOEZOO_CACHE"] = str(cache)
        return read()

    return reading
