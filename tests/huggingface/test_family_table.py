"""README's table of families: one row per family, generated from tests, without failures."""

from moezoo.core.huggingface.family import families
from tests.huggingface.family_table import BEGIN, COLUMNS, END, README, Results, merged, table


def rows() -> list[list[str]]:
    text = README.read_text(encoding="utf-8")
    lines = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_every_family_has_a_row_in_which_all_passed() -> None:
    assert [row[0] for row in rows()] == sorted({family.name for family in families().values()})
    assert all(row[1 : 1 + len(COLUMNS)] == ["yes"] * len(COLUMNS) for row in rows())


def test_failed_or_missing_tests_are_not_a_yes() -> None:
    results = Results()
    results.passed["mixtral", "test_fixture", "jax"] = True
    results.passed["mixtral", "test_fixture", "mlx"] = False
    row = next(line for line in table(results).splitlines() if "`mixtral`" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][1:6] == ["yes", *["**no**"] * 4]


def test_rows_of_other_families_stay() -> None:
    old = table(Results())
    new = old.replace("**no**", "yes")
    assert merged(new, old, ["mixtral"]).splitlines() == [
        line if "`mixtral`" in line else before for line, before in zip(new.splitlines(), old.splitlines(), strict=True)
    ]
    assert merged(new, old, []) == new
