"""One idea is one stem: in the reference, in both backends, and in tests/layers."""

from pathlib import Path

import pytest

from tests.support.source_tree import BACKENDS, PACKAGE, stems

LAYER_TESTS = Path(__file__).parents[1] / "layers"


@pytest.mark.parametrize("stem", sorted(stems("core/reference")))
def test_stem_of_the_reference_exists_in_both_backends(stem):
    for backend in BACKENDS:
        assert (PACKAGE / f"{backend}_backend" / f"{stem}.py").is_file()


@pytest.mark.parametrize("stem", sorted(stems("core/reference") | {"kv_cache"}))
def test_stem_of_the_reference_has_a_test_of_both_backends(stem):
    path = LAYER_TESTS / f"test_{stem}.py"
    assert path.is_file()
    assert "(twin" in path.read_text(encoding="utf-8")
