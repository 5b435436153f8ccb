"""The oracles that were given to this project, beside it: collected where they are (see conftest.py).

The fixtures in tests/data hold the same families, smaller, for machines that have nothing but the project.
"""

from pathlib import Path

import numpy as np
import pytest

import moezoo
from moezoo.core.huggingface.checkpoint import describe_checkpoint
from moezoo.core.huggingface.codecs import mxfp4_decode, mxfp4_encode
from moezoo.core.huggingface.folder import TensorFolder
from tests.huggingface.conftest import ORACLES
from tests.huggingface.test_families import BACKENDS, check, check_gradient, check_greedy
from tests.huggingface.test_round_trip import round_trip
from tests.huggingface.test_training_oracles import CASES
from tests.support.fixtures import FOLDER

GIVEN = sorted(path.parent.name for path in ORACLES.glob("*/oracle.npz"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GIVEN)
def test_given_oracle(case: str, backend: str) -> None:
    model = moezoo.load(ORACLES / case, backend=backend)
    with np.load(ORACLES / case / "oracle.npz") as expected:
        check(model, dict(expected))
        check_greedy(model, dict(expected))


@pytest.mark.parametrize("case", [case for case in GIVEN if (ORACLES / case / "config_v4.json").exists()])
def test_both_spellings_of_a_given_config_are_the_same_model(case: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((ORACLES / case / "config_v4.json").read_bytes())
    assert describe_checkpoint(tmp_path).spec == describe_checkpoint(ORACLES / case).spec


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GIVEN)
def test_gradient_of_a_given_oracle(case: str, backend: str) -> None:
    with np.load(ORACLES / case / "oracle.npz") as expected:
        check_gradient(ORACLES / case, backend, dict(expected))


@pytest.mark.parametrize("case", GIVEN)
def test_round_trip_of_a_given_oracle(case: str, tmp_path: Path) -> None:
    round_trip(ORACLES / case, tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_the_checked_in_training_oracles_are_the_given_ones(case: str) -> None:
    for path in (FOLDER / case).iterdir():
        assert path.read_bytes() == (ORACLES / case / path.name).read_bytes(), path.name


def test_mxfp4_codes_come_back_bit_for_bit() -> None:
    folder = TensorFolder(ORACLES / "gpt_oss_mxfp4")
    names = [name for name in folder.tensors if name.endswith("_blocks")]
    assert len(names) == 4
    for name in names:
        blocks, scales = folder.read(name), folder.read(name.removesuffix("_blocks") + "_scales")
        np.testing.assert_array_equal(mxfp4_encode(mxfp4_decode(blocks, scales), scales), blocks)
