"""Fixtures for all tests."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from functools import cache

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the tests' tolerances are float32's; a GPU would multiply in TF32

# Most of the suite's time is XLA compiling tiny functions. Without optimizing them it takes 40 % less, and by its older
# emitters, which are in the pinned version, half of the rest. What users compile, by the newer ones and with every
# optimization, is what `moezoo parity` and `moezoo zoo` check.
# Splitting a program into parts that compile in parallel costs a third more processor time, and the workers already
# use every core.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

import pytest

import moezoo.mlx_backend  # noqa: F401  loads OpenBLAS, which must come before any test imports MLX
from moezoo.core.garbage import collect_seldom
from tests.support.backends_available import require_backend
from tests.support.twins import Twin, forget_programs

# Every option of these parts is also in a combination, which JAX runs whole in the gate (tests/parity). So one case of
# each of these tests is enough there on JAX, where compiling the others takes half a minute of a core: they run on MLX,
# and before a release. Caches, padding and packed documents, and experts on every path, are compiled in the gate.
ONE_CASE_ON_JAX = {
    *(f"test_{part}.test_value_and_gradients_match_the_reference" for part in ("attention", "latent_attention", "moe")),
    *(f"test_{part}.test_bfloat16_is_near_float32" for part in ("attention", "moe")),
    "test_experts.test_value_and_gradients_of_experts_match_the_reference",
    "test_experts.test_blocks_of_few_and_of_many_rows_match_the_reference",
}


@pytest.fixture(scope="session", params=["jax", "mlx"])
def twin(request: pytest.FixtureRequest) -> Twin:
    """Each backend in turn; a skip where it is missing, or a failure where MOEZOO_REQUIRE_BACKENDS names it."""
    require_backend(request.param)
    return Twin(request.param)


@pytest.fixture
def monkeypatch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Pytest's; and no program of a layer outlives what it was traced from."""
    forget_programs()
    yield monkeypatch
    forget_programs()


def pytest_configure(config: pytest.Config) -> None:
    """Compile a JAX function once, not once a model, a worker and a run: two thirds of the time of the suite.

    And look seldom for reference cycles: a quarter of the time of collecting 8,000 tests, and 5 % of running them.
    """
    collect_seldom()
    # Under nohup, or behind a shell's &, signals are ignored, by the runs that tests start too. A handler that does
    # nothing ignores them as well, but a program that is started begins with the default.
    for number in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    # One worker may read what another is writing. JAX sees it, compiles for itself and warns. A bound on the folder's
    # size would have it lock, but also look at every entry at every write: there are thousands.
    half_written = "ignore:Error reading persistent compilation cache entry"
    config.addinivalue_line("filterwarnings", half_written)
    os.environ.setdefault("PYTHONWARNINGS", half_written)  # for the processes that tests start


def pytest_collection_finish() -> None:
    """No longer look for cycles among what stays to the end: modules and tests."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


def pytest_runtest_setup() -> None:
    """Lower JAX's programs in one context: to load MLIR's dialects for each takes a fifth of a small one's time."""
    mlir = sys.modules.get("jax._src.interpreters.mlir")  # only where JAX is imported, which takes more
    if mlir is not None and not hasattr(mlir.make_ir_context, "cache_clear"):
        mlir.make_ir_context = cache(mlir.make_ir_context)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of several devices, which share long processes.

    A worker must not find them left at the end, nor take some from the other and start their processes once more.
    """
    items.sort(key=lambda item: item.path.parent.name not in ("mesh", "distributed"))
    compiled: set[str] = set()
    for item in items:
        test = f"{item.path.stem}.{getattr(item, 'originalname', '')}"
        if test in ONE_CASE_ON_JAX and "jax" in item.callspec.id.split("-") and not item.get_closest_marker("release"):
            if test in compiled:
                item.add_marker(pytest.mark.release)
            compiled.add(test)
        if item.path.parent.name == "mesh":
            item.add_marker(pytest.mark.slow)
