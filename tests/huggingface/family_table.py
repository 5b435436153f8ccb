"""README's table of families, generated from test results: `python -m tests.huggingface.family_table [FAMILY ...]`.

Runs the tests of every fixture, and writes one row per family between two marks in README.md. With names of families,
only their fixtures are tested; the other rows stay.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from moezoo.core.huggingface.family import families
from tests.support.fixtures import cases, read_fixture

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


def merged(new: str, old: str, names: Sequence[str]) -> str:
    """Return the table `new`, with the rows of families other than `names` (if there are any) from the table `old`."""
    kept = {line.split("|")[1]: line for line in old.splitlines()[2:] if line.split("|")[1].strip(" `") not in names}
    return "\n".join(kept.get(line.split("|")[1], line) if names else line for line in new.splitlines())


def main(names: Sequence[str]) -> int:
    results = Results()
    own = [case for case in cases() if families()[read_fixture(case).model_type].name in names]
    chosen = f"fixture and ({' or '.join(own)})" if names else "fixture"
    tests = [str(HERE / "test_families.py"), str(HERE / "test_round_trip.py")]
    status = pytest.main([*tests, "-q", "-m", "", "-k", chosen, "-n", "2"], plugins=[results])
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    old, _, after = rest.partition(END)
    new = merged(table(results), old.strip(), names)
    before = re.sub(r"\b\d+ families\b", f"{len(new.splitlines()) - 2} families", before)
    README.write_text(f"{before}{BEGIN}\n{new}\n{END}{after}", encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
