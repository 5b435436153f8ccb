"""README's table of families, generated from test results: `python -m tests.huggingface.family_table`.

Runs the tests of every fixture, and writes one row per family between two marks in README.md.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from moezoo.core.huggingface.family import families
from tests.support.fixtures import read_fixture

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- families: python -m tests.huggingface.family_table -->", "<!-- /families -->"
COLUMNS = {
    "load JAX": ("test_fixture", "jax"),
    "load MLX": ("test_fixture", "mlx"),
    "generate": ("test_generation_of_a_fixture", ""),
    "train": ("test_gradient_of_a_fixture", ""),
    "export": ("test_round_trip_of_a_fixture", ""),
}
_TEST = re.compile(r"::(\w+)\[([\w.]+?)(?:-(jax|mlx))?\]$")


class Results:
    """Pytest plugin that collects, per family, test and backend, whether all passed, and the largest difference."""

    def __init__(self) -> None:
        self.passed: dict[tuple[str, str, str], bool] = defaultdict(lambda: True)
        self.difference: dict[str, float] = defaultdict(float)
        self.cases: dict[str, set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = _TEST.search(report.nodeid)
        if found is None or (report.when != "call" and report.passed):
            return
        test, case, backend = found[1], found[2], found[3] or ""
        family = families()[read_fixture(case).model_type].name
        self.cases[family].add(case)
        for key in ((family, test, backend), (family, test, "")):
            self.passed[key] &= report.passed
        for name, value in report.user_properties:
            if name == "difference":
                self.difference[family] = max(self.difference[family], float(value))


def table(results: Results) -> str:
    """Return the table, with families in order of name."""
    lines = [
        f"| family | {' | '.join(COLUMNS)} | largest difference of a logit | fixtures |",
        f"|---|{'---|' * len(COLUMNS)}---|---|",
    ]
    for family in sorted({family.name for family in families().values()}):
        ticks = ["yes" if results.passed.get((family, *key)) else "**no**" for key in COLUMNS.values()]
        difference = f"{results.difference[family]:.0e}" if family in results.difference else "-"
        lines.append(f"| `{family}` | {' | '.join(ticks)} | {difference} | {len(results.cases[family])} |")
    return "\n".join(lines)


def main() -> int:
    results = Results()
    tests = [str(HERE / "test_families.py"), str(HERE / "test_round_trip.py")]
    status = pytest.main([*tests, "-q", "-m", "", "-k", "fixture", "-n", "2"], plugins=[results])
    text = README.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
