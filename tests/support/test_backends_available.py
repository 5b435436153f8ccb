import sys

import pytest

from tests.support.backends_available import require_backend


@pytest.fixture
def without_jax(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)  # the import system then reports it as not found


def test_missing_backend_is_a_skip(without_jax, monkeypatch):
    monkeypatch.delenv("MOEZOO_REQUIRE_BACKENDS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="jax is not installed"):
        require_backend("jax")


def test_missing_backend_is_a_skip_where_only_another_is_promised(without_jax, monkeypatch):
    monkeypatch.setenv("MOEZOO_REQUIRE_BACKENDS", "mlx")
    with pytest.raises(pytest.skip.Exception):
        require_backend("jax")


def test_missing_backend_is_a_failure_where_it_is_promised(without_jax, monkeypatch):
    monkeypatch.setenv("MOEZOO_REQUIRE_BACKENDS", "mlx, jax")
    with pytest.raises(pytest.fail.Exception, match="promises jax"):
        require_backend("jax")


def test_broken_backend_shows_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "jax.py").write_text("import a_library_that_jax_lacks\n")
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_jax_lacks"):
        require_backend("jax")
