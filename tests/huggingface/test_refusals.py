"""Published configs with unsupported computations are refused with an error, never computed incorrectly."""

from pathlib import Path

import pytest

import moezoo
from moezoo.core.errors import MoezooError
from tests.support.fixtures import cases, read_fixture, write_checkpoint


@pytest.mark.parametrize("backend", ["jax", "mlx"])
@pytest.mark.parametrize("case", cases(refused=True))
def test_unsupported_config_is_refused(case: str, backend: str, tmp_path: Path) -> None:
    fixture = read_fixture(case)
    folder = write_checkpoint(case, tmp_path)
    with pytest.raises(MoezooError, match=fixture.description["refused"]):
        moezoo.load(folder, backend=backend).forward(fixture.expected["input_ids"])
