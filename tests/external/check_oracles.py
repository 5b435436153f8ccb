"""Checks a folder of oracles: checkpoints that transformers wrote, each with what it computed from them.

    python -m tests.external.check_oracles FOLDER [CASE ...]

`FOLDER/<case>/` is a checkpoint with an `oracle.npz` of the keys that README.md lists. Logits, routing, losses, greedy
text and the norm of the gradient are compared on both backends, by the checks and tolerances of the fixtures; an export
must equal the folder bit for bit; `config_v4.json`, where there is one, must describe the same model. Prints a line for
each check and fails if one of them did. Needs moezoo alone. The tests do not use such a folder: the fixtures in
tests/data have the same families, smaller.
"""

import argparse
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import moezoo
from moezoo.core.huggingface.checkpoint import describe_checkpoint
from moezoo.core.huggingface.codecs import mxfp4_decode, mxfp4_encode
from moezoo.core.huggingface.folder import TensorFolder
from tests.huggingface.test_families import BACKENDS, check, check_gradient, check_greedy
from tests.huggingface.test_round_trip import round_trip

Check = Callable[[Path], object]


def main() -> int:
    parser = argparse.ArgumentParser(description="Check a folder of oracles on both backends")
    parser.add_argument("folder", type=Path, help="its folders are checkpoints with an oracle.npz")
    parser.add_argument("cases", nargs="*", help="names of folders; none is all of them")
    options = parser.parse_args()
    cases = options.cases or sorted(path.parent.name for path in options.folder.glob("*/oracle.npz"))
    if not cases:
        parser.error(f"{options.folder} has no folder with an oracle.npz")
    failed = 0
    for case in cases:
        for name, check_it in checks_of(options.folder / case):
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    check_it(Path(scratch))
                except Exception:
                    failed += 1
                    print(f"{case}: {name}: FAILED\n{traceback.format_exc()}", flush=True)
                else:
                    print(f"{case}: {name}: passed", flush=True)
    return failed > 0


def checks_of(folder: Path) -> Iterator[tuple[str, Check]]:
    """Name and function of each check of an oracle; a function gets an empty folder."""
    with np.load(folder / "oracle.npz") as arrays:
        expected = dict(arrays)
    for backend in BACKENDS:
        yield f"forward and greedy text on {backend}", lambda _, backend=backend: check_model(folder, backend, expected)
        yield f"gradient on {backend}", lambda _, backend=backend: check_gradient(folder, backend, expected)
    yield "round trip", lambda scratch: round_trip(folder, scratch)
    if (folder / "config_v4.json").exists():
        yield "both spellings of the config", lambda scratch: check_spellings(folder, scratch)
    codes = [name for name in TensorFolder(folder).tensors if name.endswith("_blocks")]
    if codes:
        yield "MXFP4 codes come back bit for bit", lambda _: check_codes(folder, codes)


def check_model(folder: Path, backend: str, expected: dict[str, np.ndarray]) -> None:
    model = moezoo.load(folder, backend=backend)
    check(model, expected)
    check_greedy(model, expected)


def check_spellings(folder: Path, scratch: Path) -> None:
    shutil.copy(folder / "config_v4.json", scratch / "config.json")
    assert describe_checkpoint(scratch).spec == describe_checkpoint(folder).spec


def check_codes(folder: Path, names: list[str]) -> None:
    tensors = TensorFolder(folder)
    for name in names:
        blocks, scales = tensors.read(name), tensors.read(name.removesuffix("_blocks") + "_scales")
        np.testing.assert_array_equal(mxfp4_encode(mxfp4_decode(blocks, scales), scales), blocks)


if __name__ == "__main__":
    sys.exit(main())
